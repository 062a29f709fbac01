//! The faults of the campaigns. Each is a function of the world and of randomness of its own, so
//! that the seed gives all of them: what, when, to whom, how long.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokio::time::sleep;

use super::Campaign;
use super::fleet::{Fleet, Slot};
use super::gremlin::Trick;
use super::larger::More;
use super::workers::Control;

/// How long an operator waits for Postgres.
const OPERATOR_WAIT: Duration = Duration::from_mins(1);

/// What can be broken. Numbers are those of the table of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// F25: SIGKILL of a replica, and a new one.
    ReplicaKilled,
    /// All replicas at once.
    AllReplicasKilled,
    /// F26: SIGSTOP of a replica, and SIGCONT.
    ReplicaStopped,
    /// F27: SIGTERM of a replica, and a new one.
    ReplicaDrained,
    /// F3: random backends of the servers.
    BackendsKilled,
    /// F4: the listeners' backends only.
    ListenersKilled,
    /// F28, F7: a replica without Postgres.
    LinkCut,
    /// F41: every stream of every worker ends.
    StreamsCut,
    /// F32: workers forget what they hold.
    WorkersCrashed,
    /// F33: workers sleep past their leases and go on.
    WorkersPaused,
    /// F22: nobody can read or write a task.
    TableLocked,
    /// F15: no insert is announced.
    TriggerOff,
    /// An operator's open transaction on some rows.
    RowsLocked,
    /// F23: an operator changes many rows, in an order of his own.
    RowsRewritten,
    /// An operator takes tasks away from their workers.
    TasksRequeued,
    /// F16: notifications that nobody sent.
    NotificationsForged,
    /// F37: answers cut after some bytes.
    AnswersCut,
    /// F37: the same, by a reset.
    AnswersReset,
    /// F38: requests cut after some bytes.
    RequestsCut,
    /// F39: clients that are gone before their answer.
    ClientsHungUp,
    /// A replica behind a link that passes nothing for a while.
    LinkStalled,
    /// F40: every call comes twice, on two replicas at once.
    CallsDoubled,

    // These need a Postgres of their own, or more than a moment.
    /// F1: Postgres is restarted.
    PostgresRestarted,
    /// F2: Postgres is stopped at once, and recovers.
    PostgresCrashed,
    /// F2: SIGKILL of the postmaster, and of the backends that it leaves.
    PostmasterKilled,
    /// P10: no Postgres for some time.
    PostgresAway,
    /// F6: SIGSTOP of all of Postgres.
    PostgresFrozen,
    /// F9: no connection is left.
    ConnectionsUsedUp,
    /// F5: the listeners are killed, and nobody may log in.
    LoginsRefused,
    /// F7: every connection of a replica to Postgres is reset.
    WireReset,
    /// F6: they neither pass anything nor end.
    WireStalled,
    /// F8: each answer of Postgres comes late.
    WireSlow,
    /// F7: a replica's listener is reset.
    ListenerReset,
    /// F28: a replica's listener hears nothing any more; the rest works.
    ListenerStalled,
    /// F15: no notification arrives at any replica.
    NotificationsLost,
    /// F15: none but canaries, so that no replica knows.
    AnnouncementsLost,
    /// F13: someone listens, and never reads, in a transaction that stays open.
    DeafListener,
    /// F54: many rows come and go in one statement each.
    ManyRows,
    /// F26: SIGSTOP for longer than anybody waits.
    ReplicaStoppedLong,
    /// F30: a replica is out of file descriptors.
    DescriptorsUsedUp,
    /// F52: more replicas, all started at once.
    ReplicasAdded,
    /// F27: SIGTERM of a replica with many streams.
    CrowdDrained,
    /// F41: many streams end at once, and come back at once.
    CrowdCut,
    /// F34: streams go silent without an end.
    StreamsFrozen,
    /// F46: a proxy that cuts what is older than it likes.
    StreamsCutByAge,
    /// F35: workers that read nothing.
    ReadersStuck,
    /// F36: workers that read ten bytes a second.
    ReadersSlow,
    /// F49: heads that take for ever.
    HeadsTrickle,
    /// F49: bodies that take for ever.
    BodiesTrickle,
    /// P16: connections that say nothing.
    IdleConnections,
    /// F50: heads that no client would send.
    HostileHeads,
    /// F55: bodies too large, and too deep; and the largest that are welcome.
    LargeBodies,
    /// F32: real worker processes are killed.
    ProcessesKilled,
    /// F33: real worker processes sleep past their leases.
    ProcessesStopped,
}

/// Those that a shared Postgres bears, and that are over in a moment.
pub const FAULTS: [Fault; 22] = [
    Fault::ReplicaKilled,
    Fault::AllReplicasKilled,
    Fault::ReplicaStopped,
    Fault::ReplicaDrained,
    Fault::BackendsKilled,
    Fault::ListenersKilled,
    Fault::LinkCut,
    Fault::StreamsCut,
    Fault::WorkersCrashed,
    Fault::WorkersPaused,
    Fault::TableLocked,
    Fault::TriggerOff,
    Fault::RowsLocked,
    Fault::RowsRewritten,
    Fault::TasksRequeued,
    Fault::NotificationsForged,
    Fault::AnswersCut,
    Fault::AnswersReset,
    Fault::RequestsCut,
    Fault::ClientsHungUp,
    Fault::LinkStalled,
    Fault::CallsDoubled,
];

/// The others.
pub const LARGER_FAULTS: [Fault; 32] = [
    Fault::PostgresRestarted,
    Fault::PostgresCrashed,
    Fault::PostmasterKilled,
    Fault::PostgresAway,
    Fault::PostgresFrozen,
    Fault::ConnectionsUsedUp,
    Fault::LoginsRefused,
    Fault::WireReset,
    Fault::WireStalled,
    Fault::WireSlow,
    Fault::ListenerReset,
    Fault::ListenerStalled,
    Fault::NotificationsLost,
    Fault::AnnouncementsLost,
    Fault::DeafListener,
    Fault::ManyRows,
    Fault::ReplicaStoppedLong,
    Fault::DescriptorsUsedUp,
    Fault::ReplicasAdded,
    Fault::CrowdDrained,
    Fault::CrowdCut,
    Fault::StreamsFrozen,
    Fault::StreamsCutByAge,
    Fault::ReadersStuck,
    Fault::ReadersSlow,
    Fault::HeadsTrickle,
    Fault::BodiesTrickle,
    Fault::IdleConnections,
    Fault::HostileHeads,
    Fault::LargeBodies,
    Fault::ProcessesKilled,
    Fault::ProcessesStopped,
];

/// What faults act on.
pub struct World {
    pub fleet: Arc<Fleet>,
    pub workers: Vec<Arc<Control>>,
    pub lease: Duration,
    /// What the larger faults need besides.
    pub more: Option<Arc<More>>,
    /// Statements of the operator that Postgres refused: he is a victim of faults, too.
    pub refused: AtomicUsize,
}

/// So many faults of these kinds, with the time from one to the next. Each kind comes before any
/// comes twice.
pub fn schedule(
    campaign: &Campaign,
    kinds: &[Fault],
    count: usize,
    gap: Duration,
) -> Vec<(Fault, Duration)> {
    let mut rng = campaign.rng("schedule", 0);
    let mut planned = Vec::new();
    while planned.len() < count {
        let mut round = kinds.to_vec();
        round.shuffle(&mut rng);
        planned.extend(round);
    }
    planned.truncate(count);
    planned.into_iter().map(|fault| (fault, gap.mul_f64(rng.random_range(0.5..1.5)))).collect()
}

pub fn between(rng: &mut StdRng, from_ms: u64, to_ms: u64) -> Duration {
    Duration::from_millis(rng.random_range(from_ms..=to_ms))
}

impl Fault {
    pub async fn strike(self, world: &World, rng: &mut StdRng) {
        let fleet = &world.fleet;
        let slot = &fleet.slots[rng.random_range(0..fleet.slots.len())];
        let (short, long) = (between(rng, 500, 1_500), between(rng, 1_000, 3_000));
        match self {
            Self::ReplicaKilled => {
                let mut replica = slot.replica.lock().await;
                slot.kill(&mut replica);
                fleet.boot(slot, &mut replica).await;
            }
            Self::AllReplicasKilled => all_killed(fleet).await,
            Self::ReplicaStopped => stopped(slot, long).await,
            Self::ReplicaDrained => {
                let mut replica = slot.replica.lock().await;
                slot.drain(&mut replica, &fleet.tally).await;
                fleet.boot(slot, &mut replica).await;
            }
            Self::BackendsKilled => {
                for _ in 0..rng.random_range(3..=10) {
                    world.operate(&killed("like 'taskwire%' order by random() limit 2")).await;
                    sleep(Duration::from_millis(100)).await;
                }
            }
            Self::ListenersKilled => world.operate(&killed("= 'taskwire listener'")).await,
            Self::LinkCut => {
                let _wire = slot.postgres.breaking.lock().await;
                let _replica = slot.replica.lock().await;
                slot.postgres.cut();
                sleep(long).await;
                slot.postgres.mend();
            }
            Self::StreamsCut => fleet.slots.iter().for_each(|slot| slot.streams.cut_all()),
            Self::WorkersCrashed => some(&world.workers, rng).for_each(Control::crash),
            Self::WorkersPaused => {
                let past = world.lease + between(rng, 500, 2_500);
                some(&world.workers, rng).for_each(|worker| worker.pause(past));
            }
            Self::TableLocked => {
                world.operate_for("lock table tasks in access exclusive mode", short).await;
            }
            Self::TriggerOff => {
                let turn = |how| format!("alter table tasks {how} trigger tasks_notify_inserted");
                world.operate(&turn("disable")).await;
                sleep(long).await;
                world.insist(&turn("enable")).await;
            }
            Self::RowsLocked => {
                let rows = "select 1 from tasks where status in ('pending', 'running')
                             order by random() limit 30 for update";
                world.operate_for(rows, short).await;
            }
            Self::RowsRewritten => {
                let rewritten = "update tasks set priority = 10 - priority where id in
                    (select id from tasks where status in ('pending', 'running') order by random() limit 200)";
                world.operate_for(rewritten, Duration::ZERO).await;
            }
            Self::TasksRequeued => world.operate(REQUEUED).await,
            Self::NotificationsForged => world.operate(FORGED).await,
            Self::AnswersCut => fleet.play(&[Trick::CutAnswer], short).await,
            Self::AnswersReset => fleet.play(&[Trick::ResetAnswer], short).await,
            Self::RequestsCut => fleet.play(&[Trick::CutRequest], short).await,
            Self::ClientsHungUp => fleet.play(&[Trick::HangUp], short).await,
            Self::LinkStalled => {
                slot.calls.play(&[Trick::Stall], 100);
                sleep(short).await;
                slot.calls.behave();
            }
            Self::CallsDoubled => {
                fleet.is_doubling.store(true, Ordering::Relaxed);
                sleep(long).await;
                fleet.is_doubling.store(false, Ordering::Relaxed);
            }
            _ => self.strike_larger(world, rng).await,
        }
    }
}

const REQUEUED: &str = "
    select requeue_task(id)
      from (select id from tasks where status = 'running' limit 10 for update skip locked) as chosen";

const FORGED: &str = "
    select pg_notify('taskwire', words.word || repeat(' ' || ids.id, n % 3))
      from unnest(array['tasks', 'codebases', 'cancel', 'worker', 'canary', '', 'tasks x']) as words (word),
           lateral (select coalesce((select id::text from tasks order by random() limit 1),
                                    gen_random_uuid()::text) as id) as ids,
           generate_series(1, 30) as n";

pub fn killed(which: &str) -> String {
    format!(
        "select pg_terminate_backend(pid) from (select pid from pg_stat_activity
          where datname = current_database() and application_name {which}) as them"
    )
}

/// A quarter of the workers, and at least one.
fn some<'a>(workers: &'a [Arc<Control>], rng: &mut StdRng) -> impl Iterator<Item = &'a Control> {
    let mut chosen: Vec<_> = workers.iter().map(Arc::as_ref).collect();
    chosen.shuffle(rng);
    chosen.truncate((workers.len() / 4).max(1));
    chosen.into_iter()
}

pub async fn stopped(slot: &Slot, pause: Duration) {
    let replica = slot.replica.lock().await;
    let Some(replica) = replica.as_ref() else { return };
    replica.signal("STOP");
    sleep(pause).await;
    replica.signal("CONT");
}

async fn all_killed(fleet: &Fleet) {
    let mut replicas = Vec::new();
    for slot in &fleet.slots {
        let mut replica = slot.replica.lock().await;
        slot.kill(&mut replica);
        replicas.push(replica);
    }
    for (slot, mut replica) in fleet.slots.iter().zip(replicas) {
        fleet.boot(slot, &mut replica).await;
    }
}

impl Fleet {
    /// Breaks a fifth of what passes for a while, in front of every replica.
    async fn play(&self, tricks: &[Trick], during: Duration) {
        self.slots.iter().for_each(|slot| slot.calls.play(tricks, 20));
        sleep(during).await;
        self.slots.iter().for_each(|slot| slot.calls.behave());
    }
}

impl World {
    /// Runs a statement and says whether it is alright when Postgres refuses it.
    pub async fn operate(&self, sql: &str) {
        self.operate_for(sql, Duration::ZERO).await;
    }

    /// Runs a statement that must be done, whatever else is broken.
    pub async fn insist(&self, sql: &str) {
        while !self.try_operate(sql, Duration::ZERO).await {
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Runs a statement and leaves its transaction open for a while.
    pub async fn operate_for(&self, sql: &str, during: Duration) {
        let _ = self.try_operate(sql, during).await;
    }

    /// The same, and says whether it was done.
    pub async fn try_operate(&self, sql: &str, during: Duration) -> bool {
        let done = async {
            let mut transaction = self.fleet.db.pool.begin().await?;
            let sql = sqlx::AssertSqlSafe(sql.to_owned());
            sqlx::raw_sql(sql).execute(&mut *transaction).await?;
            sleep(during).await;
            transaction.commit().await
        };
        // Longer than any statement of his: one that hangs, as on a Postgres that was frozen, is over.
        let done = tokio::time::timeout(OPERATOR_WAIT + during, done).await;
        match done {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => eprintln!("the operator was refused: {error}"),
            Err(_) => eprintln!("the operator gave up"),
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        false
    }
}
