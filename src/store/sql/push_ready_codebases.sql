-- push_ready_codebases
-- The codebases of what became claimable since a snapshot, when that is too much to name.
select distinct codebase_id
  from tasks
 where status = 'pending' and due and ready_xid > 0
   and ready_xid >= pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint
 limit $2
