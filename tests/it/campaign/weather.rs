//! What is broken at the moment, so that what is measured can be told apart: in calm weather, with
//! nothing but announcements lost, or in a storm.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::faults::Fault;
use super::percentile;

/// After a change of the weather nothing is counted for so long.
const AFTERMATH: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Calm,
    /// Announcements are lost, and nothing else is broken (P6).
    Unheard,
    Storm,
}

pub struct Weather {
    now: Mutex<Now>,
    delays: Mutex<[Vec<Duration>; 2]>,
}

struct Now {
    active: Vec<Fault>,
    class: Class,
    since: SystemTime,
    changes: usize,
    counts: BTreeMap<String, usize>,
    most_at_once: usize,
}

impl Default for Weather {
    fn default() -> Self {
        let (class, since, counts) = (Class::Calm, SystemTime::now(), BTreeMap::new());
        let now = Now { active: Vec::new(), class, since, changes: 0, counts, most_at_once: 0 };
        Self { now: Mutex::new(now), delays: Mutex::default() }
    }
}

impl Now {
    fn changed(&mut self) {
        self.changes += 1;
        self.most_at_once = self.most_at_once.max(self.active.len());
        let unheard = [Fault::TriggerOff, Fault::NotificationsLost, Fault::AnnouncementsLost];
        let class = match &self.active[..] {
            [] => Class::Calm,
            active if active.iter().all(|fault| unheard.contains(fault)) => Class::Unheard,
            _ => Class::Storm,
        };
        if class != self.class {
            (self.class, self.since) = (class, SystemTime::now());
        }
    }
}

impl Weather {
    pub fn begins(&self, fault: Fault) {
        let mut now = self.now.lock().unwrap();
        now.active.push(fault);
        *now.counts.entry(format!("{fault:?}")).or_default() += 1;
        now.changed();
    }

    pub fn ends(&self, fault: Fault) {
        let mut now = self.now.lock().unwrap();
        if let Some(at) = now.active.iter().position(|active| *active == fault) {
            now.active.remove(at);
        }
        now.changed();
    }

    pub fn active(&self) -> Vec<Fault> {
        self.now.lock().unwrap().active.clone()
    }

    /// `Some` while a single fault strikes, and the same number as long as nothing changes.
    pub fn single(&self) -> Option<usize> {
        let now = self.now.lock().unwrap();
        (now.active.len() == 1).then_some(now.changes)
    }

    /// Notes how long something took from `begun` until now, if the weather was the same throughout.
    /// What counts with announcements lost is also given back.
    pub fn announced(&self, begun: SystemTime) -> Option<(Class, Duration)> {
        let delay = SystemTime::now().duration_since(begun).unwrap_or_default();
        let (class, since) = {
            let now = self.now.lock().unwrap();
            (now.class, now.since)
        };
        if begun < since + AFTERMATH || class == Class::Storm {
            return None;
        }
        self.delays.lock().unwrap()[usize::from(class == Class::Unheard)].push(delay);
        Some((class, delay))
    }

    pub fn fault_count(&self) -> usize {
        self.now.lock().unwrap().counts.values().sum()
    }

    /// The faults so far, by kind, in as many lines.
    pub fn table(&self) -> String {
        let now = self.now.lock().unwrap();
        let mut table = String::new();
        for (kind, count) in &now.counts {
            let _ = writeln!(table, "  {count:5}  {kind}");
        }
        let (kinds, sum) = (now.counts.len(), now.counts.values().sum::<usize>());
        format!("{table}  {sum:5}  faults of {kinds} kinds, at most {} at once", now.most_at_once)
    }

    /// From the creation of a task to its announcement, calm and with announcements lost.
    pub fn delays(&self) -> String {
        let mut delays = self.delays.lock().unwrap();
        let [calm, unheard] = &mut *delays;
        format!("announced in calm {}; with announcements lost {}", shares(calm), shares(unheard))
    }
}

/// A sample in a few words.
pub fn shares(sample: &mut [Duration]) -> String {
    if sample.is_empty() {
        return "not measured".to_owned();
    }
    let ms = |share, sample: &mut [Duration]| percentile(sample, share).as_millis();
    format!(
        "p50 {} ms, p99 {} ms, at most {} ms of {}",
        ms(0.5, sample),
        ms(0.99, sample),
        ms(1.0, sample),
        sample.len()
    )
}
