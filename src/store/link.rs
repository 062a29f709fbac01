//! The link to Postgres: a small pool of connections, and what tells a slow Postgres from a link
//! that is dead but does not say so.
//!
//! A pool of our own, and not the driver's: that one has no deadline where a link that went silent
//! needs one (the ping of a connection that is handed back keeps its place in the pool until TCP gives
//! up, a quarter of an hour later), it pings twice for each statement, and a caller that stops waiting
//! takes the half-made connection with it, so that over a slow link there is never a first one.

mod executor;
mod held;
mod pulse;
mod session;

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use sqlx::postgres::{PgConnectOptions, PgQueryResult, PgRow};
use sqlx::{Connection, Either, Error, Execute, Executor, PgConnection, Postgres};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};

use held::{Held, State};
pub(crate) use session::SESSION;
pub(super) use session::{Carriage, Plans, bare};

/// Connections that run statements, at most; the pulse has one more. Group commit needs few; the rest
/// serve reads.
const CONNECTIONS_MAX: usize = 19;
/// Connections that are made at the same time. Proving a password costs more than a statement: whoever
/// waits is better served by the first that is free than by one of twenty that are all half made.
const MAKING_MAX: usize = 4;
/// How long a request waits for a connection: within it an answer must leave (protocol E3).
const ACQUIRE_WAIT: Duration = Duration::from_millis(900);
/// And how long once it is known that Postgres is away: those behind it wait, too.
const AWAY_WAIT: Duration = Duration::from_millis(200);
/// How long a connection may take to be made. More than a caller waits: what it began is finished for
/// the next one, and so a link of half a second for each round trip has connections, too.
const CONNECT_WAIT: Duration = Duration::from_secs(4);
/// Waits before a refused connection is tried again.
const REFUSED_RETRY: Duration = Duration::from_millis(50);
/// Pause after a connection could not be made.
const FAILED_PAUSE: Duration = Duration::from_millis(100);
/// A connection that was idle for longer is asked whether it still is one.
const PING_AFTER_IDLE: Duration = Duration::from_millis(100);
/// How long it has to answer. More than the slowest link that is promised to work.
const PING_WAIT: Duration = Duration::from_millis(700);
/// How long a connection on which a statement was given up keeps its place, at most: Postgres may be at it
/// still, as when a commit waits for a standby, and each further one would be one more backend.
const SETTLE_WAIT: Duration = Duration::from_mins(5);
/// How long a statement may take: a little longer than Postgres' own limit for it.
const STATEMENT_WAIT: Duration = Duration::from_secs(12);
/// A connection is replaced after this long, busy or not.
const LIFETIME: Duration = Duration::from_mins(30);
/// How long a goodbye may take.
const CLOSE_WAIT: Duration = Duration::from_millis(200);

type Done = Either<PgQueryResult, PgRow>;

/// The connections. Cheap to clone; statements run on a reference to it.
#[derive(Clone)]
pub(super) struct Link(Arc<Shared>, Plans);

struct Shared {
    options: PgConnectOptions,
    carriage: Carriage,
    /// The one that was used last stands last and is used next: what is warm stays warm.
    idle: Mutex<Vec<Idle>>,
    /// A permit for each idle connection that nobody is about to take. Changed with `idle` locked.
    ready: Semaphore,
    /// Connections in use, idle, or being made.
    total: AtomicUsize,
    /// A permit for each connection that may be made now.
    making: Arc<Semaphore>,
    /// Callers that wait for a connection.
    waiting: AtomicUsize,
    /// Why there is none at all, for those who wait.
    failure: watch::Sender<String>,
    /// When an answer of Postgres was last heard.
    heard: Mutex<Instant>,
    /// Connections that were last heard before this are dead. Whoever waits for their answer gives up.
    dead_before: watch::Sender<Instant>,
    /// Since there was last a connection, none could be made.
    is_away: AtomicBool,
    /// Connections of an older generation are not used again.
    generation: AtomicU64,
}

/// A connection that nobody uses.
struct Idle {
    connection: PgConnection,
    age: Age,
    /// When it last answered.
    heard: Instant,
}

/// What decides how long a connection is kept.
#[derive(Clone, Copy)]
struct Age {
    made: Instant,
    /// When somebody last wanted it.
    used: Instant,
    generation: u64,
}

/// Who waits for a connection.
struct Waiting<'l>(&'l AtomicUsize);

impl Link {
    /// Makes connections when they are needed. Must be called in a runtime.
    pub(super) fn start(options: PgConnectOptions, carriage: Carriage) -> Self {
        let link = Self(
            Arc::new(Shared {
                options: bare(options).application_name("taskwire"),
                carriage,
                idle: Mutex::default(),
                ready: Semaphore::new(0),
                total: AtomicUsize::new(0),
                making: Arc::new(Semaphore::new(MAKING_MAX)),
                waiting: AtomicUsize::new(0),
                failure: watch::Sender::default(),
                heard: Mutex::new(Instant::now()),
                dead_before: watch::Sender::new(Instant::now()),
                is_away: AtomicBool::new(false),
                generation: AtomicU64::new(0),
            }),
            Plans::Shared,
        );
        tokio::spawn(pulse::run(Arc::downgrade(&link.0)));
        link
    }

    /// The same connections, for a statement that is planned for its arguments.
    pub(super) fn planned_anew(&self) -> Self {
        Self(Arc::clone(&self.0), Plans::Own)
    }

    /// Uses no connection again that was made before: they may have old settings, or lead to a server
    /// that is not the primary any more.
    pub(super) fn renew(&self) {
        self.0.generation.fetch_add(1, Ordering::Relaxed);
        drop(self.take_idle());
    }

    /// Says goodbye on the idle connections.
    pub(super) async fn close(&self) {
        let idle = self.take_idle();
        let goodbyes = idle.into_iter().map(|idle| timeout(CLOSE_WAIT, idle.connection.close()));
        futures_util::future::join_all(goodbyes).await;
    }

    fn take_idle(&self) -> Vec<Idle> {
        let mut idle = self.0.idle();
        let taken = std::mem::take(&mut *idle);
        // Who has a permit already finds nothing, and asks again.
        self.0.ready.forget_permits(taken.len());
        self.0.total.fetch_sub(taken.len(), Ordering::Relaxed);
        taken
    }

    /// A connection that answers, within [`ACQUIRE_WAIT`].
    async fn acquire(&self) -> Result<Held, Error> {
        let is_away = self.0.is_away.load(Ordering::Relaxed);
        let wait = if is_away { AWAY_WAIT } else { ACQUIRE_WAIT };
        let acquired = async {
            loop {
                let Some(idle) = self.idle_connection().await? else {
                    continue;
                };
                let rested = idle.heard.elapsed() > PING_AFTER_IDLE;
                let mut held = self.hold(idle, State::InUse);
                if !rested || held.answers(PING_WAIT).await {
                    held.age.used = Instant::now();
                    return Ok(held);
                }
                held.state = State::Broken;
            }
        };
        timeout(wait, acquired).await.map_err(|_| Error::PoolTimedOut)?
    }

    /// The next idle connection. `None`: somebody else was faster.
    async fn idle_connection(&self) -> Result<Option<Idle>, Error> {
        let shared = &*self.0;
        if let Ok(permit) = shared.ready.try_acquire() {
            permit.forget();
            return Ok(shared.idle().pop());
        }
        let mut failure = shared.failure.subscribe();
        let _waiting = Waiting::new(&shared.waiting);
        self.want_another();
        tokio::select! {
            biased;
            permit = shared.ready.acquire() => {
                permit.map_err(|_| Error::PoolClosed)?.forget();
                Ok(shared.idle().pop())
            }
            _ = failure.changed() => {
                let why = failure.borrow().clone();
                Err(Error::Io(io::Error::other(why)))
            }
        }
    }

    fn hold(&self, idle: Idle, state: State) -> Held {
        let Idle { connection, age, heard } = idle;
        Held { link: self.clone(), connection: Some(connection), age, heard, state }
    }

    /// Has one more connection made, if there may be one more.
    fn want_another(&self) {
        let (Ok(turn), Ok(runtime)) =
            (Arc::clone(&self.0.making).try_acquire_owned(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let link = self.clone();
        runtime.spawn(async move {
            // In a task of its own: it is finished also when its caller has given up, and then serves
            // the next one.
            while link.0.waiting.load(Ordering::Relaxed) > 0 && link.0.count_one_more() {
                if !link.make().await {
                    tokio::time::sleep(FAILED_PAUSE).await;
                }
            }
            drop(turn);
        });
    }

    /// Makes a connection and puts it by.
    async fn make(&self) -> bool {
        let generation = self.0.generation.load(Ordering::Relaxed);
        let begun = Instant::now();
        let made = timeout(CONNECT_WAIT, async {
            loop {
                match session::connect(&self.0.options, self.0.carriage).await {
                    Err(error) if is_starting(&error) && begun.elapsed() < ACQUIRE_WAIT => {
                        tokio::time::sleep(REFUSED_RETRY).await;
                    }
                    done => return done,
                }
            }
        })
        .await
        .unwrap_or(Err(Error::PoolTimedOut));
        match made {
            Ok(connection) => {
                let now = self.0.hear();
                self.0.is_away.store(false, Ordering::Relaxed);
                let age = Age { made: now, used: now, generation };
                drop(self.hold(Idle { connection, age, heard: now }, State::Clean));
                true
            }
            Err(error) => {
                // As long as there is another one, it serves those who wait.
                if self.0.total.fetch_sub(1, Ordering::Relaxed) == 1 {
                    self.0.is_away.store(true, Ordering::Relaxed);
                    self.0.failure.send_replace(super::chain(&error));
                }
                false
            }
        }
    }

    /// Runs one statement to its end. What it gives is collected: the connection is free for others
    /// before the rows are looked at.
    async fn run<'q, E: Execute<'q, Postgres> + 'q>(&self, query: E) -> Result<Vec<Done>, Error> {
        let mut held = self.acquire().await?;
        held.state = State::InUse;
        let Some(connection) = held.connection.as_mut() else {
            return Err(Error::WorkerCrashed);
        };
        let last = held.heard;
        let done = match self.0.carriage {
            Carriage::Direct if self.1 == Plans::Shared => {
                let answer = connection.fetch_many(query).try_collect::<Vec<_>>();
                self.answered(last, STATEMENT_WAIT, answer).await
            }
            Carriage::Direct | Carriage::Transactions => {
                held.state = State::InTransaction;
                let answer = session::in_transaction(connection, query, self.1);
                self.answered(last, STATEMENT_WAIT, answer).await
            }
        };
        match &done {
            Ok(_) => (held.heard, held.state) = (Instant::now(), State::Clean),
            Err(error) if is_fatal(error) => held.state = State::Broken,
            Err(_) => {}
        }
        done
    }

    /// Waits for an answer on a connection that was last heard at some time; not if it is dead.
    async fn answered<T>(
        &self,
        last: Instant,
        wait: Duration,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let mut dead_before = self.0.dead_before.subscribe();
        tokio::select! {
            biased;
            done = timeout(wait, answer) => {
                let done = done.unwrap_or_else(|_| Err(silent()));
                if matches!(&done, Ok(_) | Err(Error::Database(_))) {
                    self.0.hear();
                }
                done
            }
            _ = dead_before.wait_for(|dead| last < *dead) => Err(silent()),
        }
    }
}

/// The error of a link on which nothing comes back.
fn silent() -> Error {
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, "the link to Postgres is silent"))
}

/// Whether the connection cannot be used after this error: it is gone, or not to the primary.
fn is_fatal(error: &Error) -> bool {
    match error {
        Error::Database(error) => {
            error.code().is_some_and(|code| code.starts_with("57P") || FATAL.contains(&&*code))
        }
        Error::RowNotFound | Error::Decode(_) | Error::Encode(_) | Error::ColumnDecode { .. } => {
            false
        }
        _ => true,
    }
}

/// `SQLSTATE`s of a connection that leads to a standby, is in a broken transaction, was ended by a
/// timeout, or has plans of tables that have changed.
const FATAL: [&str; 6] = ["25006", "25P02", "25P03", "25P04", "0A000", "26000"];

/// Whether nobody listens yet, or someone who says that he is starting.
fn is_starting(error: &Error) -> bool {
    match error {
        Error::Io(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        Error::Database(error) => error.code().is_some_and(|code| code == "57P03"),
        _ => false,
    }
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection that is to be made; not beyond the limit.
    fn count_one_more(&self) -> bool {
        let more = |total| (total < CONNECTIONS_MAX).then_some(total + 1);
        self.total.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Puts a connection by for whoever comes next.
    fn put_by(&self, connection: PgConnection, age: Age, heard: Instant) {
        let mut idle = self.idle();
        let at = idle.partition_point(|other| other.age.used <= age.used);
        idle.insert(at, Idle { connection, age, heard });
        self.ready.add_permits(1);
    }

    /// Notes that Postgres was heard.
    fn hear(&self) -> Instant {
        let now = Instant::now();
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = now;
        now
    }

    fn heard(&self) -> Instant {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'l> Waiting<'l> {
    fn new(count: &'l AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Link")
    }
}
