-- task_by_key
-- The first tasks of some Idempotency-Keys, with the digest of the body that made each.
select t.idempotency_key as "idempotency_key!", t.idempotency_hash as "idempotency_hash!", t.id as "id: TaskId"
  from tasks t
 where t.idempotency_key = any ($1)
