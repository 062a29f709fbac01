-- worker_seen
-- Calls since the last flush, as seconds ago: durations travel, Postgres makes the times.
update workers w
   set last_seen_at = greatest(w.last_seen_at, now() - make_interval(secs => seen.seconds_ago))
  from unnest($1::text[], $2::double precision[]) as seen (worker_id, seconds_ago)
 where w.id = seen.worker_id
