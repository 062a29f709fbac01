//! The pulse: one connection that only asks "are you there?". When it gets no answer the link is dead,
//! although TCP would not say so for a quarter of an hour, and with it every connection that was not
//! heard since.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::{CONNECT_WAIT, Carriage, LIFETIME, Link, Plans, Shared, State, session};

/// How often it asks.
const PULSE_EVERY: Duration = Duration::from_millis(300);
/// A link on which nothing is heard for so long, although it was asked, is dead. Twice the slowest
/// round trip that is promised to work; with the interval, what a caller waits for at most.
const SILENCE: Duration = Duration::from_secs(1);
/// Through a pooler the question waits for its turn, behind statements that may wait for a lock.
const SILENCE_POOLED: Duration = Duration::from_secs(4);
/// When others are heard, its own connection gets this much longer: the machine may be busy.
const DOUBT: Duration = Duration::from_millis(400);
/// Connections that were heard at most so long after the question may have died with this one.
const MARGIN: Duration = Duration::from_millis(200);
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
        let Some(link) = link.upgrade().map(|shared| Link(shared, Plans::Shared)) else {
            return;
        };
        let asked = Instant::now();
        let Some(connection) = &mut own else {
            let options = link.0.options.clone().application_name("taskwire pulse");
            let connect = session::connect(&options, link.0.carriage);
            match timeout(CONNECT_WAIT, connect).await {
                Ok(connected) => (own, made) = (connected.ok(), Instant::now()),
                // Not even a refusal.
                Err(_) if link.0.heard() < asked => give_up(&link, asked),
                Err(_) => {}
            }
            drop(link);
            tokio::time::sleep(PULSE_EVERY).await;
            continue;
        };
        keep_alive(&link);
        match ask(&link, connection, asked).await {
            Ok(Ok(())) => {
                link.0.hear();
            }
            Ok(Err(_)) => own = None,
            Err(_) => {
                own = None;
                give_up(&link, asked);
            }
        }
        if made.elapsed() > LIFETIME {
            own = None;
        }
        drop(link);
        tokio::time::sleep(PULSE_EVERY).await;
    }
}

/// Whether the pulse's connection answers; `Err`: it does not say either.
async fn ask(
    link: &Link,
    connection: &mut PgConnection,
    asked: Instant,
) -> Result<sqlx::Result<()>, Elapsed> {
    let question = connection.ping();
    tokio::pin!(question);
    let silence = match link.0.carriage {
        Carriage::Direct => SILENCE,
        Carriage::Transactions => SILENCE_POOLED,
    };
    let answer = timeout(silence, &mut question).await;
    if answer.is_err() && link.0.heard() > asked {
        return timeout(DOUBT, question).await;
    }
    answer
}

/// Gives up every connection, but for those that were heard since the question to finish what they do.
fn give_up(link: &Link, asked: Instant) {
    tracing::debug!("the link to Postgres is silent since {} ms", asked.elapsed().as_millis());
    link.0.is_away.store(link.0.heard() < asked, Ordering::Relaxed);
    link.renew();
    link.0.dead_before.send_replace(asked + MARGIN);
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
