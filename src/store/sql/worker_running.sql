-- worker_running
-- What a worker holds now.
select t.id as "id: TaskId", t.title, t.claim_epoch, t.claimed_at as "claimed_at!"
  from tasks t
 where t.claimed_by = $1 and t.status = 'running'
 order by t.claimed_at, t.id
 limit 1000
