-- worker_unregister
-- The farewell: claims go back at no attempt's cost, then row and stream go.
with gone as (
    delete from workers where id = $1 returning id
), held as materialized (
    select t.id from tasks t join gone on t.claimed_by = gone.id
     where t.status = 'running'
     order by t.id
       for no key update of t
), released as (
    update tasks t
       set status        = case when t.cancel_requested_at is null then 'pending' else 'cancelled' end,
           claim_outcome = case when t.cancel_requested_at is null then 'released' else 'cancelled' end,
           attempt       = greatest(t.attempt - 1, 0)
      from held
     where t.id = held.id and t.lease_expires_at is not null
    returning t.id
)
select (select count(*) from gone) as "gone!", (select count(*) from released) as "released!"
