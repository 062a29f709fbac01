//! R3: the predicate stands once in Rust and once in SQL, and both say the same.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use taskwire::domain::{Routing, TaskRouting, WorkerId};

use crate::support::{Replica, TestDb};

const CASES: usize = 3_000;

#[derive(Debug)]
struct Case {
    codebase_id: String,
    required: Vec<String>,
    target_worker: Option<String>,
    target_agent: Option<String>,
    worker: Routing,
}

/// Few words, so that matches are as common as mismatches.
fn cases() -> impl Strategy<Value = Case> {
    let word = || prop::sample::select(vec!["a", "b", "c", "global", "__pending__", "A"]);
    let words = move || {
        prop::collection::vec(word(), 0..4)
            .prop_map(|list| list.into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    let maybe = move || prop::option::weighted(0.3, word().prop_map(str::to_owned));
    (word(), words(), maybe(), maybe(), word(), word(), words(), words()).prop_map(
        |(codebase, required, target_worker, target_agent, id, name, codebases, capabilities)| {
            Case {
                codebase_id: codebase.to_owned(),
                required,
                target_worker,
                target_agent,
                worker: Routing {
                    worker_id: WorkerId::parse(id).unwrap(),
                    name: name.to_owned(),
                    codebases,
                    capabilities,
                },
            }
        },
    )
}

#[tokio::test]
async fn r3_push_and_claim_are_decided_by_the_same_predicate() {
    let db = TestDb::new().await;
    let _schema = Replica::start(&db).await;
    let mut runner = TestRunner::deterministic();
    let (mut matched, mut unmatched) = (0, 0);
    for _ in 0..CASES {
        let case = cases().new_tree(&mut runner).unwrap().current();
        let in_rust = case.worker.matches(TaskRouting {
            codebase_id: &case.codebase_id,
            required_capabilities: &case.required,
            target_worker_id: case.target_worker.as_deref(),
            target_agent_name: case.target_agent.as_deref(),
        });
        let in_sql: bool = sqlx::query_scalar("select task_is_for($1, $2, $3, $4, $5, $6, $7, $8)")
            .bind(&case.codebase_id)
            .bind(&case.required)
            .bind(&case.target_worker)
            .bind(&case.target_agent)
            .bind(case.worker.worker_id.as_str())
            .bind(&case.worker.name)
            .bind(&case.worker.codebases)
            .bind(&case.worker.capabilities)
            .fetch_one(&db.pool)
            .await
            .unwrap();
        assert_eq!(in_rust, in_sql, "{case:?}");
        if in_rust {
            matched += 1;
        } else {
            unmatched += 1;
        }
    }
    assert!(matched > 200 && unmatched > 200, "both answers are tried: {matched}, {unmatched}");
}
