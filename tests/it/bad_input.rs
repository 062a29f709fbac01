//! E1, E2, P14: bad input of every kind against every route. Never a 500, never a panic, never a
//! hung request, and every refusal is a problem that says why.

use std::collections::BTreeSet;

use futures_util::{StreamExt, stream};
use serde_json::json;

use crate::support::raw::{Soundness, exchange, json_request, request};
use crate::support::{Answer, Replica, TestDb};

/// A route, and the fields of the JSON that it takes, each with a value that is right.
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    pub fields: &'static [(&'static str, &'static str)],
}

const fn route(
    method: &'static str,
    path: &'static str,
    fields: &'static [(&'static str, &'static str)],
) -> Route {
    Route { method, path, fields }
}

const NIL: &str = r#""00000000-0000-0000-0000-000000000000""#;
const WORKER: (&str, &str) = ("worker_id", r#""w""#);
const EPOCH: (&str, &str) = ("claim_epoch", "1");
const RESULT: (&str, &str) = ("result", r#"{"a":1}"#);
const ERROR: (&str, &str) = ("error", r#""boom""#);
const TASK: &[(&str, &str)] = &[
    ("title", r#""x""#),
    ("prompt", r#""do it""#),
    ("codebase_id", r#""global""#),
    ("priority", "1"),
    ("required_capabilities", r#"["build"]"#),
    ("target_worker_id", r#""w""#),
    ("target_agent_name", r#""w""#),
    ("agent_type", r#""build""#),
    ("metadata", r#"{"a":1}"#),
    ("run_at", r#""2030-01-01T00:00:00Z""#),
    ("expires_at", r#""2031-01-01T00:00:00Z""#),
    ("max_attempts", "3"),
    ("timeout_seconds", "60"),
];

/// Every route of the server.
pub const ROUTES: &[Route] = &[
    route("POST", "/v1/tasks", TASK),
    route("GET", "/v1/tasks", &[]),
    route("POST", "/v1/tasks/batch", &[("tasks", r#"[{"title":"x"}]"#)]),
    route("GET", "/v1/tasks/{id}", &[]),
    route("POST", "/v1/tasks/{id}/cancel", &[("reason", r#""no""#)]),
    route("POST", "/v1/tasks/{id}/claim", &[WORKER, ("claim_id", NIL)]),
    route("GET", "/v1/tasks/{id}/attempts", &[]),
    route("GET", "/v1/tasks/{id}/events", &[]),
    route("POST", "/v1/tasks/claim", &[WORKER, ("n", "1"), ("wait", "0.01"), ("claim_id", NIL)]),
    route(
        "POST",
        "/v1/tasks/{id}/heartbeat",
        &[
            WORKER,
            EPOCH,
            ("progress", "0.5"),
            ("message", r#""half way""#),
            ("checkpoint", r#"{"a":1}"#),
        ],
    ),
    route("POST", "/v1/tasks/{id}/complete", &[WORKER, EPOCH, RESULT]),
    route(
        "POST",
        "/v1/tasks/complete",
        &[WORKER, ("tasks", r#"[{"task_id":"00000000-0000-4000-8000-000000000000"}]"#)],
    ),
    route(
        "POST",
        "/v1/tasks/{id}/fail",
        &[WORKER, EPOCH, ERROR, ("retry", "true"), ("retry_after_seconds", "1")],
    ),
    route("POST", "/v1/tasks/{id}/release", &[WORKER, EPOCH]),
    route("POST", "/v1/worker/tasks/claim", &[("task_id", NIL), WORKER]),
    route(
        "POST",
        "/v1/worker/tasks/release",
        &[("task_id", NIL), ("status", r#""failed""#), WORKER, EPOCH, RESULT, ERROR],
    ),
    route("GET", "/v1/worker/tasks/stream", &[]),
    route("GET", "/v1/worker/connected", &[]),
    route("PUT", "/v1/worker/codebases", &[WORKER, ("codebases", r#"["a"]"#)]),
    route("GET", "/v1/workers/connected", &[]),
    route("GET", "/v1/workers/{id}/status", &[]),
    route("GET", "/v1/agent/workers", &[]),
    route(
        "POST",
        "/v1/agent/workers/register",
        &[
            WORKER,
            ("name", r#""w""#),
            ("capabilities", r#"["build"]"#),
            ("codebases", r#"["a"]"#),
            ("hostname", r#""h""#),
            ("metadata", r#"{"a":1}"#),
        ],
    ),
    route("POST", "/v1/agent/workers/{id}/heartbeat", &[]),
    route("POST", "/v1/agent/workers/{id}/unregister", &[]),
    route("GET", "/healthz", &[]),
    route("GET", "/readyz", &[]),
    route("GET", "/metrics", &[]),
];

/// Values in place of the right one. None of them is right for any field that must be refused; some
/// are no JSON.
pub const VALUES: &[&[u8]] = &[
    b"null",
    b"true",
    b"0",
    b"-1",
    b"1.5",
    b"1e400",
    b"-1e400",
    b"1e308",
    b"1e-400",
    b"-0",
    b"99999999999999999999999",
    b"-9223372036854775809",
    b"2147483648",
    b"01",
    b"+1",
    b"NaN",
    b"Infinity",
    b"",
    b"undefined",
    b"'x'",
    b"\"",
    b"\"\"",
    b"\" \"",
    b"\"1\"",
    b"\"null\"",
    b"\"\\u0000\"",
    b"\"a\\u0000b\"",
    b"\"\\ud800\"",
    b"\"\\udc00x\"",
    b"\"\\ud83d\"",
    b"\"\\u00\"",
    b"\"\\x\"",
    b"\"\xff\xfe\"",
    b"\"\xed\xa0\x80\"",
    b"\"\xc0\xaf\"",
    b"\"a\nb\"",
    b"\"\x01\"",
    b"\"\0\"",
    b"\"\\r\\n\\r\\nevent: task\"",
    b"\"\\u2028\\u0085\"",
    b"\"a,b\"",
    b"\"../../etc\"",
    b"\"%00\"",
    b"\"'; drop table tasks; --\"",
    b"\"9999-99-99T99:99:99Z\"",
    b"\"+275760-09-13T00:00:00Z\"",
    b"\"0000-01-01T00:00:00Z\"",
    b"\"infinity\"",
    b"[]",
    b"[null]",
    b"[1]",
    b"[\"\"]",
    b"[\"\\u0000\"]",
    b"[\"a\",\"a b\"]",
    b"[[\"a\"]]",
    b"[{}]",
    b"[",
    b"{}",
    b"{\"\\u0000\":1}",
    b"{\"a\":{\"b\":\"\\u0000\"}}",
    b"{\"a\":1,\"a\":2}",
    b"{\"$serde_json::private::RawValue\":\"x\"}",
    b"{\"$serde_json::private::Number\":\"1e999\"}",
    b"{a:1}",
    b"{\"a\":1,}",
    b"{",
    b"}",
    b"/* */ 1",
];

/// A target that exists as far as its id goes.
pub fn target(path: &str, task: &str) -> String {
    let id = if path.starts_with("/v1/tasks") { task } else { "w" };
    path.replace("{id}", id)
}

/// An object of JSON with one field's value replaced, or added.
pub fn body(fields: &[(&str, &str)], name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut pairs: Vec<Vec<u8>> = fields
        .iter()
        .filter(|(field, _)| field.as_bytes() != name)
        .map(|(field, right)| format!("\"{field}\":{right}").into_bytes())
        .collect();
    pairs.push([b"\"", name, b"\":", value].concat());
    [b"{", pairs.join(&b","[..]).as_slice(), b"}"].concat()
}

/// The answer is none of ours to be ashamed of.
fn check(answer: &Answer, about: &dyn Fn() -> String) {
    assert!(answer.status < 500, "{answer:?} to {}", about());
    if answer.status >= 400 && !answer.text.is_empty() {
        answer.problem();
    }
}

/// Refused with a problem: by its code.
async fn refused(replica: &Replica, bytes: &[u8]) -> (u16, String) {
    let answer = exchange(replica, bytes).await.expect("an answer");
    let is_4xx = (400..500).contains(&answer.status);
    let about = String::from_utf8_lossy(&bytes[..bytes.len().min(500)]);
    assert!(is_4xx, "{answer:?} to {about}");
    (answer.status, answer.problem())
}

async fn replica_with_worker_and_task(db: &TestDb) -> (Replica, String) {
    let replica = Replica::start(db).await;
    replica.register("w", &["a"], &["build"]).await;
    let task = replica.create(json!({"title": "x"})).await;
    (replica, task)
}

#[test]
fn the_table_of_routes_names_every_route_of_the_server() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http");
    let mut served = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let routes = text.split(".route(").skip(1);
        served.extend(routes.map(|rest| rest.split('"').nth(1).unwrap().to_owned()));
    }
    let known: BTreeSet<_> = ROUTES.iter().map(|route| route.path.to_owned()).collect();
    assert_eq!(known, served);
}

#[tokio::test]
async fn e1_wrong_methods_are_told_the_right_ones_and_unknown_routes_are_problems() {
    let db = TestDb::new().await;
    let (replica, task) = replica_with_worker_and_task(&db).await;
    let sound = Soundness::of(&replica).await;
    for path in ROUTES.iter().map(|route| route.path).collect::<BTreeSet<_>>() {
        let of_path = ROUTES.iter().filter(|route| route.path == path);
        let mut right: BTreeSet<_> = of_path.map(|route| route.method).collect();
        if right.contains("GET") {
            right.insert("HEAD");
        }
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]
        {
            if right.contains(method) {
                continue;
            }
            let bytes = request(method, target(path, &task).as_bytes(), &[], b"");
            let answer = exchange(&replica, &bytes).await.expect("an answer");
            assert_eq!(answer.status, 405, "{method} {path}: {answer:?}");
            if method != "HEAD" {
                assert_eq!(answer.problem(), "method_not_allowed");
            }
            let allow = answer.headers["allow"].to_str().unwrap();
            assert_eq!(allow.split(',').map(str::trim).collect::<BTreeSet<_>>(), right);
        }
    }
    let long = format!("/{}", "a/".repeat(10_000));
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v1/tasks/",
        "//v1/tasks",
        "/V1/tasks",
        "/v1/tasks/x/y",
        "/v1/tasks/x/claim/",
        "/v1/workers/a/b/status",
        "/v1%2ftasks",
        "/%2e%2e/etc/passwd",
        "/../../etc/passwd",
        "/.env",
        "/%00",
        "/%ff",
        "/%",
        "/healthz%0d%0aX-A:b",
        "*",
        &long,
    ] {
        let found = refused(&replica, &request("GET", path.as_bytes(), &[], b"")).await;
        assert_eq!(found, (404, "route_not_found".to_owned()), "{path}");
    }
    sound.holds(&replica).await;
}

#[tokio::test]
async fn e1_every_wrong_value_of_every_field_of_every_route_is_survived_and_nul_is_refused() {
    let db = TestDb::new().await;
    let (replica, task) = replica_with_worker_and_task(&db).await;
    let sound = Soundness::of(&replica).await;
    let deep = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
    let deep_object = [b"{\"a\":".repeat(10_000), b"1".to_vec(), b"}".repeat(10_000)].concat();
    let values = VALUES.iter().copied().chain([&deep[..], &deep_object]);
    let values: Vec<_> = values.collect();
    let mut cases = Vec::new();
    for route in ROUTES {
        for (field, _) in route.fields {
            cases.extend(values.iter().map(|value| (route, field.as_bytes(), *value)));
        }
        let keys: [&[u8]; 6] = [b"unknown", b"a\\u0000b", b"\\ud800", b"\xff", b"", b"__proto__"];
        if !route.fields.is_empty() {
            let values: [&[u8]; 3] = [b"1", b"\"\\u0000\"", &deep];
            for key in keys {
                cases.extend(values.map(|value| (route, key, value)));
            }
        }
    }
    let count = cases.len();
    let ask = async |(route, field, value): (&Route, &[u8], &[u8])| {
        let body = body(route.fields, field, value);
        let bytes = json_request(route.method, &target(route.path, &task), &body);
        let answer = exchange(&replica, &bytes).await.expect("an answer");
        let about = || String::from_utf8_lossy(&bytes[..bytes.len().min(1_000)]).into_owned();
        check(&answer, &about);
        let known = route.fields.iter().any(|(name, _)| name.as_bytes() == field);
        if known && value.windows(6).any(|six| six == b"\\u0000") {
            assert!((400..500).contains(&answer.status), "{answer:?} to {}", about());
        }
        // Only a registration keeps what it does not know; the older server's calls ignore it.
        let is_lenient = route.path.contains("/worker/tasks/") || route.path.ends_with("register");
        if field == b"unknown" && !is_lenient && route.path != "/v1/tasks/batch" {
            assert!((400..500).contains(&answer.status), "{answer:?} to {}", about());
        }
    };
    stream::iter(cases).for_each_concurrent(4, ask).await;
    assert!(count > 2_000, "{count}");
    sound.holds(&replica).await;
}

#[tokio::test]
async fn e1_bodies_that_are_no_json_of_the_right_kind_are_refused_by_every_route_that_takes_one() {
    let db = TestDb::new().await;
    let (replica, task) = replica_with_worker_and_task(&db).await;
    let sound = Soundness::of(&replica).await;
    let taking = ROUTES.iter().filter(|route| !route.fields.is_empty());
    for route in taking {
        let (method, target) = (route.method, target(route.path, &task));
        let deep = "[".repeat(10_000);
        for (code, bodies) in [
            ("malformed_json", &["{", "[1,", "\u{feff}{}", "\0", "nul", &deep][..]),
            ("invalid_body", &["1", "\"x\"", "true", "null", "[1,[]]"][..]),
        ] {
            for body in bodies {
                let found =
                    refused(&replica, &json_request(method, &target, body.as_bytes())).await.1;
                let lists_tasks = route.path.ends_with("batch") && found == "invalid_batch";
                assert!(found == code || lists_tasks, "{found} for {body:.50} to {target}");
            }
        }
        let kinds = [
            "text/plain",
            "application/x-www-form-urlencoded",
            "",
            "json",
            "\u{e9}",
            "application/jsonx",
        ];
        for kind in kinds {
            let headers = [("Content-Type", kind.as_bytes())];
            let bytes = request(method, target.as_bytes(), &headers, b"{}");
            assert_eq!(
                refused(&replica, &bytes).await,
                (415, "not_json".to_owned()),
                "{kind} to {target}"
            );
        }
    }
    sound.holds(&replica).await;
}
