//! What the servers said, kept apart from them, and held against the table at the end.
//!
//! A million tasks must fit: ids are kept as numbers, names in no more bytes than they have.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::TestDb;

/// Rows that are read at once.
const PAGE_ROWS: usize = 20_000;
/// How titles begin of tasks that processes work on of which the ledger hears nothing.
pub const UNHEARD: &str = "unheard-";

/// A claim: a task and its epoch.
type Claim = (Uuid, i64);

#[derive(Default)]
pub struct Ledger(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    /// Acknowledged creates: id and title.
    created: HashMap<Uuid, Box<str>>,
    /// Batches that got no answer, by name, with their sizes: each is there as a whole or not at all.
    unanswered_batches: HashMap<String, usize>,
    /// How many claims were asked for: of this task, by however many calls.
    asked: HashMap<Uuid, u32>,
    /// Claims of whatever is best that got no answer yet.
    asked_any: HashSet<String>,
    /// Claims that were answered, and which worker asked by which `claim_id`.
    claimed: HashMap<Claim, (Box<str>, Uuid)>,
    /// Completions that were sent.
    sent: HashMap<Claim, Box<str>>,
    /// Completions that were acknowledged: the epoch, and others if there are any.
    completed: HashMap<Uuid, (i64, Option<i64>)>,
    lost: usize,
    superseded: usize,
    violations: Vec<String>,
}

/// The result that a worker gives with a completion.
pub fn result(id: &str, epoch: i64, worker: &str) -> Value {
    json!({"task": id, "epoch": epoch, "worker": worker})
}

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub created: usize,
    pub completed: usize,
    pub claims: usize,
    pub stale: usize,
    pub violations: usize,
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap()
    }

    /// The number of an id that a server gave.
    fn id(&self, id: &str) -> Uuid {
        id.parse().unwrap_or_else(|_| {
            self.violation(format!("{id:?} is no id"));
            Uuid::nil()
        })
    }

    pub fn created(&self, id: &str, title: &str) {
        let number = self.id(id);
        let before = self.entries().created.insert(number, title.into());
        if let Some(before) = before.filter(|before| **before != *title) {
            self.violation(format!("{id} is both {before} and {title}"));
        }
    }

    pub fn created_count(&self) -> usize {
        self.entries().created.len()
    }

    pub fn counts(&self) -> Counts {
        let entries = self.entries();
        Counts {
            created: entries.created.len(),
            completed: entries.completed.len(),
            claims: entries.claimed.len(),
            stale: entries.lost,
            violations: entries.violations.len(),
        }
    }

    pub fn batch_unanswered(&self, name: &str, size: usize) {
        self.entries().unanswered_batches.insert(name.to_owned(), size);
    }

    pub fn claim_asked(&self, id: &str) {
        let id = self.id(id);
        *self.entries().asked.entry(id).or_default() += 1;
    }

    pub fn claim_of_any_asked(&self, claim_id: &str) {
        self.entries().asked_any.insert(claim_id.to_owned());
    }

    pub fn claim_of_any_answered(&self, claim_id: &str) {
        self.entries().asked_any.remove(claim_id);
    }

    /// Whoever is told that a claim is his must be the only one.
    pub fn claimed(&self, id: &str, epoch: i64, worker: &str, claim_id: &str) {
        let owner = (Box::from(worker), self.id(claim_id));
        let claim = (self.id(id), epoch);
        let first = self.entries().claimed.entry(claim).or_insert_with(|| owner.clone()).clone();
        if first != owner {
            self.violation(format!("epoch {epoch} of {id} was given to {first:?} and {owner:?}"));
        }
    }

    pub fn completion_sent(&self, id: &str, epoch: i64, worker: &str) {
        let id = self.id(id);
        self.entries().sent.insert((id, epoch), worker.into());
    }

    pub fn completed(&self, id: &str, epoch: i64) {
        let id = self.id(id);
        let mut entries = self.entries();
        let known = entries.completed.entry(id).or_insert((epoch, None));
        if known.0 != epoch {
            known.1 = Some(epoch);
        }
    }

    pub fn claim_lost(&self) {
        self.entries().lost += 1;
    }

    pub fn superseded(&self) {
        self.entries().superseded += 1;
    }

    pub fn violation(&self, what: String) {
        eprintln!("VIOLATION: {what}");
        self.entries().violations.push(what);
    }

    /// Holds the table against the ledger. Gives the figures.
    pub async fn prove(&self, db: &TestDb) -> String {
        let mut violations = std::mem::take(&mut self.entries().violations);
        let mut comparison = Comparison::default();
        let mut last = Uuid::nil();
        loop {
            let rows = format!(
                "select coalesce(json_agg(json_build_array(
                            id, title, status, claim_epoch, attempt, claimed_by, result) order by id), '[]')
                   from (select * from tasks where id > '{last}' order by id limit {PAGE_ROWS}) as page"
            );
            let rows: Vec<Row> = serde_json::from_str(&db.value(&rows).await).expect("rows");
            let Some(row) = rows.last() else { break };
            last = row.0;
            let entries = self.entries();
            for row in &rows {
                comparison.row(&entries, row, &mut violations);
            }
        }
        let figures = comparison.end(&self.entries(), &mut violations);
        violations.extend(attempts_disagree(db).await);
        let first: Vec<_> = violations.iter().take(20).collect();
        assert!(violations.is_empty(), "{} violations: {first:#?}\n{figures}", violations.len());
        figures
    }
}

/// id, title, status, epoch, attempt, owner, result
type Row = (Uuid, String, String, i64, i64, Option<String>, Value);

/// The table against the ledger, row by row.
#[derive(Default)]
struct Comparison {
    unknown: HashMap<String, usize>,
    found: usize,
    epochs: i64,
    unanswered_claims: usize,
    unanswered_ends: usize,
}

impl Comparison {
    fn row(&mut self, ledger: &Entries, row: &Row, violations: &mut Vec<String>) {
        let (id, title, status, epoch, attempt, owner, result) = row;
        match ledger.created.get(id) {
            Some(known) if **known == **title => self.found += 1,
            Some(known) => violations.push(format!("{id} is {title}, acknowledged as {known}")),
            None => {
                let batch = title.split('/').next().unwrap_or_default();
                *self.unknown.entry(batch.to_owned()).or_default() += 1;
            }
        }
        if title.starts_with(UNHEARD) {
            // Who worked on it speaks to the servers only; `attempts` says whether it was one.
            if status != "completed" {
                violations.push(format!("not completed: {row:?}"));
            }
            self.epochs += epoch;
            return;
        }
        let owner = owner.as_deref().unwrap_or_default();
        if status != "completed" || *result != self::result(&id.to_string(), *epoch, owner) {
            violations.push(format!("not completed by its last owner: {row:?}"));
        }
        if ledger.sent.get(&(*id, *epoch)).map(AsRef::as_ref) != Some(owner) {
            violations.push(format!("completed, but {owner} sent no such completion: {row:?}"));
        }
        match ledger.completed.get(id) {
            None => self.unanswered_ends += 1,
            Some(acknowledged) if *acknowledged == (*epoch, None) => {}
            Some(acknowledged) => {
                violations.push(format!("acknowledged at epochs {acknowledged:?}: {row:?}"));
            }
        }
        // Each epoch is a claim that somebody asked for.
        let answered = (1..=*epoch).filter(|e| ledger.claimed.contains_key(&(*id, *e))).count();
        let rest = usize::try_from(*epoch).expect("positive") - answered;
        let asked = ledger.asked.get(id).copied().unwrap_or_default() as usize;
        if attempt > epoch || rest > asked + ledger.asked_any.len() {
            violations.push(format!("{answered} claims answered, {asked} asked: {row:?}"));
        }
        self.epochs += epoch;
        self.unanswered_claims += rest;
    }

    fn end(&self, ledger: &Entries, violations: &mut Vec<String>) -> String {
        let Self { found, epochs, unanswered_claims, unanswered_ends, unknown } = self;
        if *found != ledger.created.len() {
            violations.push(format!("{} acknowledged, {found} found", ledger.created.len()));
        }
        for (batch, count) in unknown {
            if ledger.unanswered_batches.get(batch) != Some(count) {
                violations.push(format!("{count} tasks of {batch} that nobody acknowledged"));
            }
        }
        format!(
            "{found} tasks acknowledged, 0 lost, 0 finished twice; {epochs} claims ({unanswered_claims} \
             of them unanswered), {} stale ends refused, {unanswered_ends} ends unanswered, \
             {} of {} unanswered batches made, {} streams superseded",
            ledger.lost,
            unknown.len(),
            ledger.unanswered_batches.len(),
            ledger.superseded,
        )
    }
}

/// Every claim has ended, exactly one of each task by a completion: the last one.
async fn attempts_disagree(db: &TestDb) -> Option<String> {
    let wrong = "select json_agg(wrong) from (
        select t.id, t.claim_epoch, count(*) as ended,
               count(*) filter (where a.outcome = 'completed') as completed,
               max(a.claim_epoch) filter (where a.outcome = 'completed') as completed_epoch
          from tasks t left join attempts a on a.task_id = t.id
         group by t.id
        having count(*) <> t.claim_epoch
            or count(*) filter (where a.outcome = 'completed') <> 1
            or max(a.claim_epoch) filter (where a.outcome = 'completed') <> t.claim_epoch
         limit 10) as wrong";
    let wrong = db.value(wrong).await;
    (!wrong.is_empty()).then(|| format!("attempts: {wrong}"))
}
