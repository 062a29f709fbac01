//! What a newcomer does next.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;

/// Prints where it serves, and lines to paste. `own`: the folder of the own Postgres.
pub(super) fn print(address: SocketAddr, own: Option<&Path>) {
    let psql = match own {
        Some(folder) => format!("psql \"$(cat {}/url)\"", folder.display()),
        None => "psql \"$DATABASE_URL\"".to_owned(),
    };
    let text = format!(
        "
Taskwire {version} serves on http://{address}

Be a worker (in a second terminal; it stays open and shows what is pushed):
  curl -N 'http://{address}/v1/worker/tasks/stream?worker_id=me'
Create a task:
  curl -X POST http://{address}/v1/tasks -H 'Content-Type: application/json' -d '{{\"title\":\"Say hello\"}}'
See who is connected:
  curl http://{address}/v1/workers/connected
Create a task by hand:
  {psql} -c \"insert into tasks (title) values ('by hand')\"

",
        version = env!("CARGO_PKG_VERSION"),
    );
    // Nobody may be there to read it.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
