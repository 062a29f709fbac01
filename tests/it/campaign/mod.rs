//! Promises P1 to P5, each under faults: a small seeded form runs with the other tests, a large one
//! by hand. What is random comes from the seed, which each test prints. Threads and sockets keep
//! their own time, so a seed replays the plan of a run and not its every microsecond.
//!
//! `TASKWIRE_CAMPAIGN_<NAME>` sets the numbers; see [`Campaign::number`] and its callers.

mod caller;
mod cluster;
mod copies;
mod everything;
mod faults;
pub mod fleet;
mod gremlin;
mod hostile;
mod larger;
mod ledger;
mod outages;
mod p1_ledger;
mod p2_zombies;
mod p3_racers;
mod p4_cuts;
mod p5_deaths;
mod p9_crowd;
mod processes;
mod producers;
mod real_workers;
mod weather;
mod wire;
mod witnesses;
mod workers;

use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

/// The seed where none is given: runs of CI are to be comparable.
const SEED_DEFAULT: usize = 20_260_101;

/// One run of one promise's test: its seed, its numbers, its figures.
pub struct Campaign {
    test: &'static str,
    seed: usize,
    begun: Instant,
}

impl Campaign {
    pub fn new(test: &'static str) -> Self {
        let campaign = Self { test, seed: setting("SEED", SEED_DEFAULT), begun: Instant::now() };
        eprintln!("{test}: seed {}", campaign.seed);
        campaign
    }

    /// A number of this run: `TASKWIRE_CAMPAIGN_<name>`, or the one for CI.
    #[expect(clippy::unused_self, reason = "a run's numbers are asked of the run")]
    pub fn number(&self, name: &str, default: usize) -> usize {
        setting(name, default)
    }

    /// Randomness for one part of the run. Parts have their own, so that the order in which they are
    /// scheduled changes nobody's choices.
    fn rng(&self, part: &str, n: usize) -> StdRng {
        let bytes = part.bytes().chain(n.to_le_bytes());
        // FNV-1a: the standard hasher may change with the compiler, and with it every plan.
        let seed = bytes.fold(self.seed as u64 ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        StdRng::seed_from_u64(seed)
    }

    /// The one line that a run is about; `--nocapture` shows it.
    pub fn figures(&self, figures: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        eprintln!("{}: seed {}, {seconds:.1} s: {figures}", self.test, self.seed);
    }
}

impl Drop for Campaign {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (test, seed) = (self.test, self.seed);
            eprintln!(
                "replay with the same numbers and: TASKWIRE_CAMPAIGN_SEED={seed} cargo test --test it {test} -- --nocapture"
            );
        }
    }
}

/// The one place that reads this folder's environment.
fn setting(name: &str, default: usize) -> usize {
    let name = format!("TASKWIRE_CAMPAIGN_{name}");
    std::env::var_os(&name).filter(|text| !text.is_empty()).map_or(default, |text| {
        let number = text.to_str().and_then(|text| text.replace('_', "").parse().ok());
        number.unwrap_or_else(|| panic!("{name} is {}, but must be a whole number", text.display()))
    })
}

/// A list of words of this folder's environment, such as kinds of faults; empty if not given.
fn words(name: &str) -> Vec<String> {
    let text = std::env::var_os(format!("TASKWIRE_CAMPAIGN_{name}")).unwrap_or_default();
    let text = text.to_string_lossy();
    text.split([',', ' ']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// The value that a share (0 to 1) of the sample does not exceed.
fn percentile(sample: &mut [Duration], share: f64) -> Duration {
    sample.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index of a sample"
    )]
    let at = (sample.len() as f64 * share) as usize;
    sample.get(at.min(sample.len().saturating_sub(1))).copied().unwrap_or_default()
}
