//! Puts one replica together, runs it, and takes it apart again.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;

use crate::config::{Config, Secret};
use crate::domain::{Fanout, ReplicaId};
use crate::http::room::Room;
use crate::http::{self, App, StreamSettings, accept};
use crate::maintenance::seen::Seen;
use crate::maintenance::{expire, promote, prune, reap, replicas, seen, vigil};
use crate::metrics::Metrics;
use crate::push::assign::Assigner;
use crate::push::hub::Hub;
use crate::push::inbox::Inbox;
use crate::push::listener::Listener;
use crate::push::router::Router;
use crate::push::watch::Watch;
use crate::push::{age, fanout, held, presence, settle, stuck, sweep, watch};
use crate::shutdown::{self, Shutdown, Stage, Trigger};
use crate::stalls;
use crate::store::migrate::{MigrateError, migrate};
use crate::store::{Danger, Store, StoreError, Times, chain, parse_url};

/// Connections that wait to be accepted, as far as the machine lets them. One that finds no place there tries again
/// after a second; a fleet that reconnects at once is some thousands.
const BACKLOG: u32 = 8_192;
/// How long a start waits for a Postgres that is not there yet.
const POSTGRES_WAIT: Duration = Duration::from_secs(30);
/// How long the first canary may take.
const FIRST_CANARY_WAIT: Duration = Duration::from_secs(10);
/// Requests in flight have this long after the drain.
const DRAIN_GRACE: Duration = Duration::from_secs(2);
/// How long a leaving replica tries to give claims back.
const GIVE_BACK_WAIT: Duration = Duration::from_millis(500);
/// How long a leaving replica tries to say so to Postgres.
const FAREWELL_WAIT: Duration = Duration::from_secs(1);

/// Why a replica cannot serve (any more). Each is a sentence for the operator.
#[derive(Debug)]
pub enum StartError {
    /// The address cannot be listened on.
    Bind(SocketAddr, io::Error),
    /// A URL cannot be read.
    Url(&'static str, StoreError),
    /// Postgres or its schema is not usable.
    Migrate(MigrateError),
    /// Postgres stopped answering.
    Store(StoreError),
    /// Notifications do not arrive.
    NoCanary,
    /// A loop that must run as long as the replica does has ended: a fault of ours.
    Loop,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bind(address, error) if error.kind() == io::ErrorKind::AddrInUse => write!(
                f,
                "{address} is in use: is a server running there already? Choose another address with \
                 TASKWIRE_BIND, such as TASKWIRE_BIND=127.0.0.1:8001"
            ),
            Self::Bind(address, _) => write!(f, "cannot listen on {address}"),
            Self::Url(name, _) => write!(f, "{name} cannot be read"),
            Self::Migrate(error) => error.fmt(f),
            Self::Store(error) => error.fmt(f),
            Self::NoCanary => f.write_str(
                "notifications of Postgres do not arrive. LISTEN needs a direct connection to the \
                 primary: if DATABASE_URL leads through a pooler in transaction mode, such as \
                 PgBouncer, set DATABASE_LISTEN_URL to the direct one",
            ),
            Self::Loop => {
                f.write_str("a background loop ended unexpectedly; start the server again")
            }
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Bind(_, error) => Some(error),
            Self::Url(_, error) | Self::Store(error) => Some(error),
            Self::Migrate(error) => error.source(),
            Self::NoCanary | Self::Loop => None,
        }
    }
}

impl From<StoreError> for StartError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Listens before anything is started, so that a taken address is known at once.
pub fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A port that a server has just left.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error| StartError::Bind(address, error))
}

/// Reads the two URLs of Postgres: for statements, and for LISTEN.
pub fn parse_urls(
    database: &Secret,
    listen: Option<&Secret>,
) -> Result<(PgConnectOptions, PgConnectOptions), StartError> {
    let read =
        |name, url: &Secret| parse_url(url.reveal()).map_err(|error| StartError::Url(name, error));
    Ok((read("DATABASE_URL", database)?, read("DATABASE_LISTEN_URL", listen.unwrap_or(database))?))
}

/// Brings the schema up to date; waits a while for a Postgres that is not there yet.
pub async fn migrate_patiently(options: &PgConnectOptions) -> Result<Vec<String>, StartError> {
    let begun = Instant::now();
    loop {
        match migrate(options).await {
            Ok(applied) => return Ok(applied),
            Err(MigrateError::Connection(error))
                if begun.elapsed() < POSTGRES_WAIT && is_starting(&error) =>
            {
                tracing::warn!("Postgres is not there yet, trying again: {}", chain(&error));
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(StartError::Migrate(error)),
        }
    }
}

/// Asks the store until it answers, for a while: a machine that has just started is busy.
async fn patiently<T, Fut>(mut ask: impl FnMut() -> Fut) -> Result<T, StoreError>
where
    Fut: Future<Output = Result<T, StoreError>>,
{
    let begun = Instant::now();
    loop {
        match ask().await {
            Err(error) if error.is_passing() && begun.elapsed() < POSTGRES_WAIT => {
                tracing::debug!("Postgres does not answer yet: {}", chain(&error));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            answer => return answer,
        }
    }
}

/// Whether waiting may help: nobody answers yet, or someone who says that he is starting, or full.
fn is_starting(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("53"))
        }
        _ => false,
    }
}

/// One replica that serves.
#[derive(Debug)]
pub struct Replica {
    /// Where it serves.
    pub address: SocketAddr,
    trigger: Trigger,
    serving: tokio::task::JoinHandle<Result<(), StartError>>,
    drain: Duration,
}

impl Replica {
    /// Starts everything. Returns once the replica serves and its listener is proven.
    pub async fn start(
        config: &Config,
        database_url: &Secret,
        listener: TcpListener,
    ) -> Result<Self, StartError> {
        let address =
            listener.local_addr().map_err(|error| StartError::Bind(config.bind, error))?;
        let (database, listen) = parse_urls(database_url, config.database_listen_url.as_ref())?;
        // By the direct connection: a pooler in transaction mode would lose the session's lock.
        for name in migrate_patiently(&listen).await? {
            tracing::info!("migration applied: {name}");
        }
        // A claim never outlives the time after which its worker counts as gone (protocol S9).
        let lease = config.lease.min(config.worker_timeout);
        let times = Times { lease, worker_timeout: config.worker_timeout };
        // Who names a direct connection besides says that the other one is none.
        let pooled = config
            .database_listen_url
            .as_ref()
            .is_some_and(|url| url.reveal() != database_url.reveal());
        let parts = Parts::new(Store::new(database, listen, pooled, times), address, config);
        let (trigger, shutdown) = shutdown::channel();

        let room = Room::open();
        let (listener_task, mut proof) = Listener::new();
        let app = App::new(
            parts.store.clone(),
            Arc::clone(&parts.hub),
            Arc::clone(&parts.watch),
            Arc::clone(&parts.seen),
            Arc::clone(&parts.metrics),
            proof.clone(),
            shutdown.clone(),
            Arc::clone(&room),
            parts.replica,
            StreamSettings {
                enabled: config.sse_enabled,
                keepalive: config.keepalive,
                window: config.window,
            },
        );
        let own_address = address.to_string();
        patiently(|| parts.store.replica_heartbeat(parts.replica, &own_address)).await?;
        log_trigger(&parts.store).await?;
        let mut loops = parts.start_loops(listener_task, config, &shutdown);
        if tokio::time::timeout(FIRST_CANARY_WAIT, proof.first()).await.is_err() {
            trigger.advance(Stage::Stopping);
            parts.farewell().await;
            return Err(StartError::NoCanary);
        }

        let drain = config.drain;
        let serving = tokio::spawn(async move {
            let hub = Arc::clone(&parts.hub);
            let drained = {
                let shutdown = shutdown.clone();
                async move {
                    shutdown.reached(Stage::Draining).await;
                    hub.drain(drain).await;
                }
            };
            let serve = accept::serve(listener, http::router(app), room, drained, shutdown.clone());
            let result = tokio::select! {
                () = serve => Ok(()),
                _ = loops.join_next() => shutdown.is_stopping().then_some(()).ok_or(StartError::Loop),
            };
            // The loops first: a heartbeat after the farewell would bring the replica back.
            loops.shutdown().await;
            parts.give_back().await;
            parts.farewell().await;
            result
        });
        Ok(Self { address, trigger, serving, drain })
    }

    /// Serves until a signal, then drains; a second signal, or the hard deadline, ends at once.
    pub async fn run_until(mut self, mut signal: impl AsyncFnMut()) -> Result<(), StartError> {
        tokio::select! {
            () = signal() => {}
            ended = &mut self.serving => return ended.unwrap_or(Err(StartError::Loop)),
        }
        tracing::info!(
            "draining: streams end over {} s, requests in flight are finished",
            self.drain.as_secs()
        );
        self.trigger.advance(Stage::Draining);
        tokio::select! {
            ended = &mut self.serving => return ended.unwrap_or(Err(StartError::Loop)),
            () = tokio::time::sleep(self.drain + DRAIN_GRACE) => {
                tracing::warn!("the drain took too long, stopping now");
            }
            () = signal() => tracing::warn!("second signal, stopping now"),
        }
        self.trigger.advance(Stage::Stopping);
        let _ = tokio::time::timeout(GIVE_BACK_WAIT + FAREWELL_WAIT, &mut self.serving).await;
        Ok(())
    }
}

/// What the loops and the handlers share.
struct Parts {
    store: Store,
    hub: Arc<Hub>,
    inbox: Arc<Inbox>,
    watch: Arc<Watch>,
    seen: Arc<Seen>,
    metrics: Arc<Metrics>,
    assigner: Assigner,
    replica: ReplicaId,
    address: SocketAddr,
}

impl Parts {
    fn new(store: Store, address: SocketAddr, config: &Config) -> Self {
        let metrics = Arc::new(Metrics::new());
        let hub = Arc::new(Hub::new(Arc::clone(&metrics), config.max_age, config.fanout));
        let inbox = Arc::default();
        let assigner = Assigner::new(
            store.clone(),
            Arc::clone(&hub),
            Arc::clone(&inbox),
            Arc::clone(&metrics),
        );
        Self {
            store,
            hub,
            inbox,
            assigner,
            watch: Arc::default(),
            seen: Arc::default(),
            metrics,
            replica: ReplicaId::generate(),
            address,
        }
    }

    fn start_loops(&self, listener: Listener, config: &Config, shutdown: &Shutdown) -> JoinSet<()> {
        let (store, hub, inbox) = (&self.store, &self.hub, &self.inbox);
        let router = Router::new(
            store.clone(),
            Arc::clone(hub),
            Arc::clone(inbox),
            self.replica,
            config.window,
        );
        let mut loops = JoinSet::new();
        let mut run = |work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            loops.spawn(work);
        };
        let stop = || shutdown.clone();
        run(Box::pin(listener.run(
            store.clone(),
            Arc::clone(inbox),
            self.replica,
            Arc::clone(&self.metrics),
            stop(),
        )));
        run(Box::pin(stalls::run(Arc::clone(&self.metrics), stop())));
        run(Box::pin(router.clone().run(stop())));
        run(Box::pin(router.clone().attend(stop())));
        run(Box::pin(sweep::run(
            store.clone(),
            Arc::clone(hub),
            Arc::clone(inbox),
            router.clone(),
            stop(),
        )));
        if config.fanout != Fanout::All {
            run(Box::pin(fanout::run(
                store.clone(),
                Arc::clone(hub),
                router.clone(),
                self.replica,
                stop(),
            )));
        }
        run(Box::pin(settle::run(store.clone(), Arc::clone(hub), router, stop())));
        run(Box::pin(self.assigner.clone().run(stop())));
        run(Box::pin(held::run(store.clone(), Arc::clone(hub), stop())));
        run(Box::pin(age::run(store.clone(), Arc::clone(hub), stop())));
        run(Box::pin(stuck::run(Arc::clone(hub), stop())));
        run(Box::pin(watch::run(store.clone(), Arc::clone(&self.watch), stop())));
        run(Box::pin(presence::heartbeat(
            store.clone(),
            Arc::clone(hub),
            self.replica,
            self.address.to_string(),
            stop(),
        )));
        run(Box::pin(presence::departures(store.clone(), Arc::clone(hub), stop())));
        run(Box::pin(reap::run(store.clone(), Arc::clone(&self.metrics), stop())));
        run(Box::pin(expire::run(store.clone(), stop())));
        run(Box::pin(promote::run(store.clone(), stop())));
        run(Box::pin(prune::run(store.clone(), config.retention_days, stop())));
        run(Box::pin(replicas::run(store.clone(), stop())));
        run(Box::pin(vigil::run(store.clone(), Arc::clone(&self.metrics), stop())));
        run(Box::pin(seen::run(store.clone(), Arc::clone(&self.seen), stop())));
        loops
    }

    /// Gives back what was claimed for workers that have not heard of it.
    async fn give_back(&self) {
        if tokio::time::timeout(GIVE_BACK_WAIT, self.assigner.finish()).await.is_err() {
            tracing::warn!("could not give all claims back: their leases end them");
        }
    }

    /// Tells Postgres that this replica is gone, if Postgres is there to be told.
    async fn farewell(&self) {
        let farewell = async {
            if let Err(error) = self.store.replica_leave(Some(self.replica)).await {
                tracing::warn!("could not say farewell: {}", chain(&error));
            }
            self.store.close().await;
        };
        let _ = tokio::time::timeout(FAREWELL_WAIT, farewell).await;
    }
}

async fn log_trigger(store: &Store) -> Result<(), StartError> {
    let condition = patiently(|| store.condition()).await?;
    if condition.dangers.iter().any(|danger| matches!(danger, Danger::TriggerOff)) {
        tracing::warn!(
            target: "worker_sse",
            "task creation hook is OFF: trigger tasks_notify_inserted is missing or disabled; \
             the sweep announces tasks within 2 s all the same"
        );
    } else {
        tracing::info!(
            target: "worker_sse",
            "task creation hook is on: trigger tasks_notify_inserted announces every insert"
        );
    }
    Ok(())
}
