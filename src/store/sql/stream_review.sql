-- stream_review
-- What has become of some connections and of their workers: who owns the worker's stream row now,
-- and how the worker is routed. Null connection_id: nobody; null name: the worker is gone.
select a.n as "n!", s.connection_id as "connection_id?: ConnectionId",
       w.name as "name?", w.codebases as "codebases?", w.capabilities as "capabilities?"
  from unnest($1::text[]) with ordinality as a (worker_id, n)
  left join workers w on w.id = a.worker_id
  left join streams s on s.worker_id = a.worker_id
