//! P14: generated requests that are hostile all over: target, query, headers and body at once.
//!
//! The seed is printed with the request that failed, and replays it. `TASKWIRE_TEST_SEED` and
//! `TASKWIRE_TEST_REQUESTS` make a campaign of it.

use futures_util::{StreamExt, stream};
use serde_json::json;

use crate::bad_input::{ROUTES, Route, VALUES, body, target};
use crate::support::raw::{Soundness, exchange, request};
use crate::support::{Replica, TestDb};

const SEED: u64 = 20_260_731;
const REQUESTS: u64 = 3_000;

const IDS: &[&str] = &[
    "%00",
    "%2f",
    "..%2f..%2fetc",
    "%ff",
    "%",
    "%zz",
    "%C3%A9",
    "0",
    "-",
    "..",
    "%2e%2e",
    "a,b",
    "{id}",
    "*",
    "00000000-0000-0000-0000-000000000000",
    "ffffffffffffffffffffffffffffffff",
    "a%0d%0ab",
    "%F0%9F%92%A5",
    ";",
];
const PARAMETERS: &[&str] = &[
    "worker_id",
    "status",
    "codebase_id",
    "created_after",
    "created_before",
    "cursor",
    "limit",
    "agent_name",
    "codebases",
    "capabilities",
    "events",
    "slots",
    "unknown",
    "%00",
    "",
    "worker%5fid",
    "%ff",
];
const PARAMETER_VALUES: &[&str] = &[
    "",
    "w",
    "v",
    "%00",
    "%0d%0aX-A:%20b",
    "%",
    "%f",
    "%zz",
    "%ff%fe",
    "%ed%a0%80",
    "+",
    "a+b",
    "a=b",
    "0",
    "-1",
    "1e9",
    "99999999999999999999",
    "pending",
    "PENDING",
    "2030-01-01T00:00:00Z",
    "2030-01-01T00:00:00+99:99",
    "0000-01-01T00:00:00Z",
    "9999-12-31T23:59:60Z",
    "-9999-01-01T00:00:00Z",
    "infinity",
    "1790000000000000_00000000-0000-0000-0000-000000000000",
    "9223372036854775807_00000000-0000-0000-0000-000000000000",
    "-1_00000000-0000-0000-0000-000000000000",
    "_",
    "1_1",
    "task",
    "task_available",
    "task_available,task",
    "a,b,,c",
    ",",
    "%2c",
    "%E2%80%A8",
    "'%20or%201=1--",
    "../..",
    "[]",
    "null",
];
const HEADERS: &[&str] = &[
    "X-Worker-ID",
    "worker_id",
    "X-Codebases",
    "X-Capabilities",
    "X-Agent-Name",
    "X-Worker-Slots",
    "Idempotency-Key",
    "Last-Event-ID",
    "Content-Type",
    "Accept",
    "Accept-Encoding",
    "Expect",
    "Authorization",
    "X-Forwarded-For",
    "Cookie",
    "Content-Encoding",
    "Range",
    "If-None-Match",
];
const HEADER_VALUES: &[&[u8]] = &[
    b"",
    b"w",
    b"v",
    b" ",
    b"a b",
    b"a,b",
    b",",
    b"\xff\xfe",
    b"\xc3\xa9",
    b"\t",
    b"100-continue",
    b"gzip",
    b"application/json",
    b"text/html",
    b"application/x+json",
    b"\"",
    b"0",
    b"-1",
    b"bytes=0-1",
    b"a\tb",
    b"$(id)",
    b"%00",
    b"*",
];
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// `SplitMix64`: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("it fits")
    }

    /// True once in so many times.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// One request, made of nothing but its seed.
fn hostile(seed: u64, task: &str) -> Vec<u8> {
    let mut random = Random(seed);
    let route = &ROUTES[random.below(ROUTES.len())];
    let method = if random.once_in(8) { random.of(METHODS) } else { route.method };
    let target = hostile_target(&mut random, route, task);
    let long = "x".repeat(30 * 1024);
    let mut headers: Vec<(&str, &[u8])> = Vec::new();
    if !random.once_in(10) {
        headers.push(("Content-Type", b"application/json"));
    }
    for _ in 0..random.of(&[0, 0, 1, 2, 3]) {
        let is_long = random.once_in(40);
        let value = if is_long { long.as_bytes() } else { random.of(HEADER_VALUES) };
        headers.push((random.of(HEADERS), value));
    }
    let body = if random.once_in(4) { Vec::new() } else { hostile_body(&mut random, route) };
    request(method, target.as_bytes(), &headers, &body)
}

fn hostile_target(random: &mut Random, route: &Route, task: &str) -> String {
    let mut text = if random.once_in(3) {
        let long = "a".repeat(5_000);
        let id = if random.once_in(10) { long.as_str() } else { random.of(IDS) };
        route.path.replace("{id}", id)
    } else {
        target(route.path, task)
    };
    let count = random.of(&[0, 0, 1, 2, 3]);
    for n in 0..count {
        text.push(if n == 0 { '?' } else { '&' });
        text.push_str(random.of(PARAMETERS));
        if !random.once_in(20) {
            text.push('=');
        }
        if random.once_in(20) {
            text.push_str(&"9".repeat(10_000));
        } else {
            text.push_str(random.of(PARAMETER_VALUES));
        }
    }
    text
}

fn hostile_body(random: &mut Random, route: &Route) -> Vec<u8> {
    let (name, value) = if route.fields.is_empty() || random.once_in(5) {
        ("other", random.of(VALUES))
    } else {
        (random.of(route.fields).0, random.of(VALUES))
    };
    // Fields that may be left out are left out now and then, so that others are looked at.
    let some: Vec<_> = route.fields.iter().copied().filter(|_| !random.once_in(4)).collect();
    let mut bytes = body(&some, name.as_bytes(), value);
    match random.below(10) {
        0 => bytes.truncate(random.below(bytes.len())),
        1 => {
            let place = random.below(bytes.len());
            bytes[place] ^= 1 << random.below(8);
        }
        2 => bytes = [b"[", &bytes[..], b"]"].concat(),
        3 => {
            bytes = (0..random.below(200)).map(|_| random.next().to_le_bytes()[0]).collect();
        }
        4 => bytes = random.of(VALUES).to_vec(),
        _ => {}
    }
    bytes
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var_os(name).and_then(|text| text.into_string().ok());
    text.map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test]
async fn p14_thousands_of_generated_hostile_requests_do_no_harm() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &["a"], &["build"]).await;
    let task = replica.create(json!({"title": "x"})).await;
    let sound = Soundness::of(&replica).await;
    let (seed, requests) =
        (setting("TASKWIRE_TEST_SEED", SEED), setting("TASKWIRE_TEST_REQUESTS", REQUESTS));
    let refusals = stream::iter(0..requests).map(async |n| {
        let bytes = hostile(seed.wrapping_add(n), &task);
        let answer = exchange(&replica, &bytes).await;
        let about = format!(
            "TASKWIRE_TEST_SEED={} TASKWIRE_TEST_REQUESTS=1: {answer:?} to {}",
            seed.wrapping_add(n),
            String::from_utf8_lossy(&bytes[..bytes.len().min(2_000)])
        );
        let answer = answer.unwrap_or_else(|| panic!("no answer: {about}"));
        assert!(answer.status < 500, "{about}");
        let is_refused = answer.status >= 400;
        if is_refused && !bytes.starts_with(b"HEAD ") {
            let kind =
                answer.headers.get("content-type").map(reqwest::header::HeaderValue::as_bytes);
            assert_eq!(kind, Some(&b"application/problem+json"[..]), "{about}");
            answer.problem();
        }
        usize::from(is_refused)
    });
    let refused: usize = refusals.buffer_unordered(4).collect::<Vec<_>>().await.iter().sum();
    // Not all of it may be refused at the door, or nothing behind it was tried.
    let requests = usize::try_from(requests).unwrap();
    assert!(requests < 100 || (requests / 2..requests * 19 / 20).contains(&refused), "{refused}");
    sound.holds(&replica).await;
}
