-- task_create
-- Inserts some tasks in one statement; the trigger tells every replica at commit. Rows whose
-- Idempotency-Key is taken are left out, and the caller then reads the first task of that key.
insert into tasks as t (id, title, prompt, codebase_id, priority, required_capabilities, target_worker_id,
                        target_agent_name, agent_type, metadata, run_at, expires_at, max_attempts,
                        timeout_seconds, idempotency_key, idempotency_hash)
select new.id, new.title, new.prompt, new.codebase_id, new.priority,
       string_to_array(new.required_capabilities, ','), new.target_worker_id,
       new.target_agent_name, new.agent_type, coalesce(new.metadata, '{}'),
       coalesce(new.run_at, now()), new.expires_at, new.max_attempts, new.timeout_seconds,
       new.idempotency_key, new.idempotency_hash
  from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::text[], $7::text[],
              $8::text[], $9::text[], $10::jsonb[], $11::timestamptz[], $12::timestamptz[],
              $13::integer[], $14::integer[], $15::text[], $16::bytea[])
    as new (id, title, prompt, codebase_id, priority, required_capabilities, target_worker_id,
            target_agent_name, agent_type, metadata, run_at, expires_at, max_attempts,
            timeout_seconds, idempotency_key, idempotency_hash)
 order by new.idempotency_key, new.id  -- two batches that repeat each other's keys wait in one order
    on conflict (idempotency_key) where idempotency_key is not null do nothing
returning t.id as "id: _", t.title, t.status as "status: _", t.codebase_id, t.priority, t.required_capabilities,
       t.target_worker_id, t.target_agent_name, t.agent_type, t.prompt, t.metadata as "metadata!: Lenient", t.attempt, t.max_attempts,
       t.timeout_seconds, t.claim_epoch, t.claimed_by, t.created_at, t.run_at, t.expires_at, t.claimed_at,
       t.finished_at, t.result, t.error, t.cancel_requested_at, t.cancel_reason,
       null::double precision as progress, null::text as message, null::jsonb as checkpoint
