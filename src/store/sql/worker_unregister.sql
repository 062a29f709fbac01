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
       set status           = case when t.cancel_requested_at is null then 'pending' else 'cancelled' end,
           claimed_by       = case when t.cancel_requested_at is null then null else t.claimed_by end,
           claimed_at       = case when t.cancel_requested_at is null then null else t.claimed_at end,
           claim_id         = null,
           lease_expires_at = null,
           finished_at      = case when t.cancel_requested_at is null then null else now() end,
           attempt          = greatest(t.attempt - 1, 0)
      from held
     where t.id = held.id and t.status = 'running'
    returning t.id
)
select (select count(*) from gone) as "gone!", (select count(*) from released) as "released!"
