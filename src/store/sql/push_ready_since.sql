-- push_ready_since
-- What became claimable since the last sweep, whether it was announced or not. $1 is the snapshot
-- that the last sweep returned: what was visible in it is known, so that nothing is missed however
-- late a transaction commits, and nothing is read twice while an old one lingers.
select pg_current_snapshot()::text as "snapshot!",
       ready.id as "id?: TaskId", ready.ready_xid as "ready_xid?"
  from (select 1) as always
  left join lateral (
        select id, ready_xid
          from tasks
         where status = 'pending'
           and due
           and ready_xid >= pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint
           and ready_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           and not pg_visible_in_snapshot(ready_xid::text::xid8, $1::text::pg_snapshot)
         order by ready_xid, id
         limit $2) as ready on true
