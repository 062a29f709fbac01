-- worker_seen
-- Calls since the last flush, as seconds ago: durations travel, Postgres makes the times.
with called as materialized (
    select w.id, seen.seconds_ago
      from unnest($1::text[], $2::double precision[]) as seen (worker_id, seconds_ago)
      join workers w on w.id = seen.worker_id
     order by w.id
       for no key update of w
)
update workers w
   set last_seen_at = greatest(w.last_seen_at, now() - make_interval(secs => called.seconds_ago))
  from called
 where w.id = called.id
