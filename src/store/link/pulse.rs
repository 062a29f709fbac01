//! The pulse: one connection that only asks "are you there?". While nothing at all is heard, neither
//! on it nor on any other, the link is dead, although TCP would not say so for a quarter of an hour.

use std::sync::Weak;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, timeout};

use super::{CONNECT_WAIT, LIFETIME, Link, Shared, State, session};

/// How often it asks.
const PULSE_EVERY: Duration = Duration::from_millis(300);
/// A link on which nothing is heard for so long, although it was asked, is dead. Twice the slowest
/// round trip that is promised to work; with the interval, what a caller waits for at most.
const SILENCE: Duration = Duration::from_secs(1);
/// How often an idle connection is asked, so that those that went silent are found before a request
/// finds them, and no firewall forgets one.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// How long such a connection has to answer.
const KEEPALIVE_WAIT: Duration = Duration::from_secs(2);
/// Idle connections that are kept, so that a burst does not wait for handshakes.
const IDLE_KEPT: usize = 4;
/// Those beyond are closed when idle for longer.
const IDLE_FOR: Duration = Duration::from_mins(5);

/// Runs as long as the link does.
pub(super) async fn run(link: Weak<Shared>) {
    let mut own: Option<PgConnection> = None;
    let mut made = Instant::now();
    loop {
        tokio::time::sleep(PULSE_EVERY).await;
        let Some(link) = link.upgrade().map(Link) else {
            return;
        };
        keep_alive(&link);
        let Some(connection) = &mut own else {
            let connect = session::connect(&link.0.options, link.0.carriage);
            // Who cannot connect finds out by himself.
            own = timeout(CONNECT_WAIT, connect).await.ok().and_then(Result::ok);
            made = Instant::now();
            continue;
        };
        let asked = Instant::now();
        match timeout(SILENCE, connection.ping()).await {
            Ok(Ok(())) => {
                link.0.hear();
                if made.elapsed() > LIFETIME {
                    own = None;
                }
            }
            Ok(Err(_)) => own = None,
            Err(_) => {
                own = None;
                if link.0.heard() < asked {
                    silence(&link);
                }
            }
        }
    }
}

/// Gives up everything that waits for an answer, and every connection.
fn silence(link: &Link) {
    tracing::debug!("nothing is heard from Postgres for {} ms", SILENCE.as_millis());
    link.0.silences.send_modify(|count| *count += 1);
    link.renew();
}

/// Asks the connection that was not heard for longest; closes one that nobody needs.
fn keep_alive(link: &Link) {
    let Ok(permit) = link.0.ready.try_acquire() else {
        return;
    };
    let mut idle = link.0.idle();
    let oldest = (0..idle.len()).min_by_key(|n| idle[*n].heard);
    let Some(oldest) = oldest.filter(|n| idle[*n].heard.elapsed() > KEEPALIVE_EVERY) else {
        return;
    };
    permit.forget();
    let is_spare = idle.len() > IDLE_KEPT && idle[oldest].age.used.elapsed() > IDLE_FOR;
    let rested = idle.remove(oldest);
    drop(idle);
    let held = link.hold(rested, State::Broken);
    if !is_spare {
        tokio::spawn(held.check(KEEPALIVE_WAIT));
    }
}
