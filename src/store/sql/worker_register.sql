-- worker_register
-- The same worker_id registers again by updating; what it does not mention stays as it was.
insert into workers as w (id, name, codebases, capabilities, hostname, metadata)
values ($1, coalesce($2, $1), coalesce($3::text[], '{}'), coalesce($4::text[], '{}'), $5, coalesce($6::jsonb, '{}'))
    on conflict (id) do update
   set name         = coalesce($2, w.name),
       codebases    = coalesce($3, w.codebases),
       capabilities = coalesce($4, w.capabilities),
       hostname     = coalesce($5, w.hostname),
       metadata     = coalesce($6, w.metadata),
       last_seen_at = now()
returning w.id as "id: WorkerId", w.name
