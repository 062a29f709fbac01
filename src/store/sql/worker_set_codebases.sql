-- worker_set_codebases
update workers set codebases = $2, last_seen_at = now() where id = $1
