-- push_ready_since
-- What became claimable since the last sweep, whether it was announced or not. $1 is the snapshot
-- that the last sweep returned. What was visible in it is known; the rest is what its transactions
-- in progress, and all later ones, made ready. So nothing is missed however late a transaction
-- commits, and the cost is that of the new rows, however old a transaction lingers.
select pg_current_snapshot()::text as "snapshot!",
       ready.id as "id?: TaskId", ready.ready_xid as "ready_xid?"
  from (select 1) as always
  left join lateral (
        (select id, ready_xid
           from tasks
          where status = 'pending' and due and ready_xid > 0
            and ready_xid = any (array(select pg_snapshot_xip($1::text::pg_snapshot)::text::bigint)))
         union all
        (select id, ready_xid
           from tasks
          where status = 'pending' and due and ready_xid > 0
            and ready_xid >= pg_snapshot_xmax($1::text::pg_snapshot)::text::bigint
            and ready_xid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
          order by ready_xid, id
          limit $2)
         limit $2) as ready on true
