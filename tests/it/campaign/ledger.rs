//! What the servers said, kept apart from them, and held against the table at the end.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::support::TestDb;

/// A claim: a task and its epoch.
type Claim = (String, i64);

#[derive(Default)]
pub struct Ledger(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    /// Acknowledged creates: id and title.
    created: HashMap<String, String>,
    /// Batches that got no answer, by name, with their sizes: each is there as a whole or not at all.
    unanswered_batches: HashMap<String, usize>,
    /// How many claims were asked for: of this task, by however many calls.
    asked: HashMap<String, usize>,
    /// Claims of whatever is best that got no answer yet.
    asked_any: HashSet<String>,
    /// Claims that were answered, and which worker asked by which `claim_id`.
    claimed: HashMap<Claim, (String, String)>,
    /// Completions that were sent.
    sent: HashMap<Claim, String>,
    /// Completions that were acknowledged.
    completed: HashMap<String, HashSet<i64>>,
    lost: usize,
    superseded: usize,
    violations: Vec<String>,
}

/// The result that a worker gives with a completion.
pub fn result(id: &str, epoch: i64, worker: &str) -> Value {
    json!({"task": id, "epoch": epoch, "worker": worker})
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap()
    }

    pub fn created(&self, id: &str, title: &str) {
        let before = self.entries().created.insert(id.to_owned(), title.to_owned());
        if let Some(before) = before.filter(|before| before != title) {
            self.violation(format!("{id} is both {before} and {title}"));
        }
    }

    pub fn created_count(&self) -> usize {
        self.entries().created.len()
    }

    pub fn batch_unanswered(&self, name: &str, size: usize) {
        self.entries().unanswered_batches.insert(name.to_owned(), size);
    }

    pub fn claim_asked(&self, id: &str) {
        *self.entries().asked.entry(id.to_owned()).or_default() += 1;
    }

    pub fn claim_of_any_asked(&self, claim_id: &str) {
        self.entries().asked_any.insert(claim_id.to_owned());
    }

    pub fn claim_of_any_answered(&self, claim_id: &str) {
        self.entries().asked_any.remove(claim_id);
    }

    /// Whoever is told that a claim is his must be the only one.
    pub fn claimed(&self, id: &str, epoch: i64, worker: &str, claim_id: &str) {
        let owner = (worker.to_owned(), claim_id.to_owned());
        let claim = (id.to_owned(), epoch);
        let first = self.entries().claimed.entry(claim).or_insert_with(|| owner.clone()).clone();
        if first != owner {
            self.violation(format!("epoch {epoch} of {id} was given to {first:?} and {owner:?}"));
        }
    }

    pub fn completion_sent(&self, id: &str, epoch: i64, worker: &str) {
        self.entries().sent.insert((id.to_owned(), epoch), worker.to_owned());
    }

    pub fn completed(&self, id: &str, epoch: i64) {
        self.entries().completed.entry(id.to_owned()).or_default().insert(epoch);
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
        let rows = "select coalesce(json_agg(json_build_array(
                        id, title, status, claim_epoch, attempt, claimed_by, result)), '[]') from tasks";
        let rows: Vec<Row> = serde_json::from_str(&db.value(rows).await).expect("rows");
        let mut violations = std::mem::take(&mut self.entries().violations);
        let figures = self.entries().compare(&rows, &mut violations);
        violations.extend(attempts_disagree(db).await);
        let first: Vec<_> = violations.iter().take(20).collect();
        assert!(violations.is_empty(), "{} violations: {first:#?}\n{figures}", violations.len());
        figures
    }
}

/// id, title, status, epoch, attempt, owner, result
type Row = (String, String, String, i64, i64, Option<String>, Value);

impl Entries {
    fn compare(&self, rows: &[Row], violations: &mut Vec<String>) -> String {
        let mut unknown: HashMap<&str, usize> = HashMap::new();
        let (mut found, mut epochs, mut unanswered_claims, mut unanswered_ends) = (0, 0, 0, 0);
        for row in rows {
            let (id, title, status, epoch, attempt, owner, result) = row;
            match self.created.get(id) {
                Some(known) if known == title => found += 1,
                Some(known) => violations.push(format!("{id} is {title}, acknowledged as {known}")),
                None => {
                    let batch = title.split('/').next().unwrap_or_default();
                    *unknown.entry(batch).or_default() += 1;
                }
            }
            let owner = owner.clone().unwrap_or_default();
            if status != "completed" || *result != self::result(id, *epoch, &owner) {
                violations.push(format!("not completed by its last owner: {row:?}"));
            }
            if self.sent.get(&(id.clone(), *epoch)) != Some(&owner) {
                violations.push(format!("completed, but {owner} sent no such completion: {row:?}"));
            }
            match self.completed.get(id) {
                None => unanswered_ends += 1,
                Some(acknowledged) if *acknowledged == HashSet::from([*epoch]) => {}
                Some(acknowledged) => {
                    violations.push(format!("acknowledged at epochs {acknowledged:?}: {row:?}"));
                }
            }
            // Each epoch is a claim that somebody asked for.
            let answered =
                (1..=*epoch).filter(|e| self.claimed.contains_key(&(id.clone(), *e))).count();
            let rest = usize::try_from(*epoch).expect("positive") - answered;
            let asked = self.asked.get(id).copied().unwrap_or_default() + self.asked_any.len();
            if attempt > epoch || rest > asked {
                violations.push(format!("{answered} claims answered, {asked} asked: {row:?}"));
            }
            epochs += epoch;
            unanswered_claims += rest;
        }
        if found != self.created.len() {
            violations.push(format!("{} acknowledged, {found} found", self.created.len()));
        }
        for (batch, count) in &unknown {
            if self.unanswered_batches.get(*batch) != Some(count) {
                violations.push(format!("{count} tasks of {batch} that nobody acknowledged"));
            }
        }
        let lost_batches = self.unanswered_batches.len();
        format!(
            "{found} tasks acknowledged, 0 lost, 0 finished twice; {epochs} claims ({unanswered_claims} \
             of them unanswered), {} stale ends refused, {unanswered_ends} ends unanswered, \
             {} of {lost_batches} unanswered batches made, {} streams superseded",
            self.lost,
            unknown.len(),
            self.superseded,
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
