-- push_ready_codebases
-- The codebases of what became claimable since a snapshot, when that is too much to name. (In the order of the
-- index tasks_pending_ready first: tasks_pending_best has the codebases in order, but of everything that waits.)
select distinct codebase_id
  from (select codebase_id
          from tasks
         where status = 'pending' and due and ready_xid > 0
           and ready_xid >= pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint
         order by ready_xid, id
        offset 0) as ready
 limit $2
