-- worker_seen
-- Calls since the last flush, as seconds ago: durations travel, Postgres makes the times. And what each
-- worker asked for last where it has no stream: a task, or (null) whatever was best.
with called as materialized (
    select w.id, seen.seconds_ago, seen.asked_task_id, seen.asked_seconds_ago
      from unnest($1::text[], $2::double precision[], $3::uuid[], $4::double precision[])
        as seen (worker_id, seconds_ago, asked_task_id, asked_seconds_ago)
      join workers w on w.id = seen.worker_id
     order by w.id
       for no key update of w
)
update workers w
   set last_seen_at  = greatest(w.last_seen_at, now() - make_interval(secs => called.seconds_ago)),
       asked_task_id = case when called.asked_seconds_ago is null then w.asked_task_id
                            else called.asked_task_id end,
       asked_at      = case when called.asked_seconds_ago is null then w.asked_at
                            else now() - make_interval(secs => called.asked_seconds_ago) end
  from called
 where w.id = called.id
