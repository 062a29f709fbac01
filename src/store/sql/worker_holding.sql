-- worker_holding
-- Which of some workers hold a claim: their streams keep it alive.
select distinct claimed_by as "worker_id!"
  from tasks
 where claimed_by = any ($1)
   and status = 'running'
