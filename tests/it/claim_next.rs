//! `POST /v1/tasks/claim`: the best tasks for workers that cannot hold a stream.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{Answer, Replica, TestDb, eventually};

async fn claim_next(replica: &Replica, worker: &str, more: Value) -> Answer {
    let mut body = more;
    body["worker_id"] = json!(worker);
    replica.post("/v1/tasks/claim", body).await
}

fn ids(answer: &Value) -> Vec<String> {
    let tasks = answer["tasks"].as_array().unwrap();
    tasks.iter().map(|task| task["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_best_of_what_is_for_the_worker_comes_first_and_no_more_than_asked_for() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &["a"], &["build"]).await;
    assert_eq!(claim_next(&replica, "w", json!({})).await.expect(200), json!({"tasks": []}));
    for body in [
        json!({"title": "other codebase", "codebase_id": "b", "priority": 9}),
        json!({"title": "other capability", "required_capabilities": ["deploy"], "priority": 9}),
        json!({"title": "other target", "target_worker_id": "v", "priority": 9}),
        json!({"title": "later", "run_at": "2099-01-01T00:00:00Z", "priority": 9}),
    ] {
        replica.create(body).await;
    }
    let mut expected = Vec::new();
    for (codebase, priority) in [("a", 5), ("global", 4), ("a", 4), ("__pending__", 0), ("a", -1)] {
        let body =
            json!({"title": "x", "codebase_id": codebase, "priority": priority, "prompt": "p"});
        expected.push(replica.create(body).await);
    }
    let first = claim_next(&replica, "w", json!({"n": 2})).await.expect(200);
    assert_eq!(ids(&first), expected[..2]);
    for task in first["tasks"].as_array().unwrap() {
        let told = (&task["status"], &task["claimed_by"], &task["claim_epoch"], &task["prompt"]);
        assert_eq!(told, (&json!("running"), &json!("w"), &json!(1), &json!("p")));
        assert_eq!(task["lease_expires_in"], 60);
    }
    assert_eq!(ids(&claim_next(&replica, "w", json!({})).await.expect(200)), expected[2..3]);
    let rest = claim_next(&replica, "w", json!({"n": 100, "wait": 5})).await.expect(200);
    assert_eq!(ids(&rest), expected[3..]);
    // Fenced as any claim is.
    let body = json!({"claim_epoch": 1});
    replica.finish("complete", &expected[0], "w", body).await.expect(200);
}

#[tokio::test]
async fn a_bad_ask_is_refused_by_its_field_and_a_stranger_is_told_to_register() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for (field, value) in
        [("n", json!(0)), ("n", json!(1_001)), ("wait", json!(60.1)), ("wait", json!(-1))]
    {
        let refused = claim_next(&replica, "w", json!({ field: value })).await;
        assert_eq!((refused.status, refused.problem().as_str()), (422, "invalid_field"));
        assert_eq!(refused.json()["field"], field);
    }
    for wait in [0, 60] {
        let refused = claim_next(&replica, "w", json!({"wait": wait})).await;
        assert_eq!((refused.status, refused.problem().as_str()), (403, "unknown_worker"));
    }
    let nobody = replica.post("/v1/tasks/claim", json!({})).await;
    assert_eq!(nobody.problem(), "worker_id_missing");
}

#[tokio::test]
async fn a_call_that_waits_hears_of_a_new_task_at_once_on_any_replica_and_of_none_in_the_end() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &["a"], &[]).await;
    let begun = Instant::now();
    let nothing = claim_next(&replicas[0], "w", json!({"wait": 1})).await.expect(200);
    assert_eq!((ids(&nothing).len(), begun.elapsed().as_secs()), (0, 1));

    for (n, sql) in [
        "insert into tasks (title, codebase_id) values ('by hand', 'a')",
        "select requeue_task(id) from tasks",
        "insert into tasks (title, run_at) values ('later', now() + interval '1 s')",
    ]
    .into_iter()
    .enumerate()
    {
        let waiting = claim_next(&replicas[n % 2], "w", json!({"wait": 20}));
        let insert = async {
            // Once it waits: nothing else tells from outside.
            tokio::time::sleep(Duration::from_millis(300)).await;
            db.execute(sql).await;
        };
        let (answer, ()) = tokio::join!(waiting, insert);
        assert_eq!(ids(&answer.expect(200)).len(), 1, "{sql}");
        let late = "select extract(epoch from max(claimed_at - greatest(run_at, created_at)))
                      from tasks where status = 'running' and attempt = 1";
        let late: f64 = db.value(late).await.parse().unwrap();
        assert!(late < 2.0, "{sql}: {late} s");
        if n == 0 {
            assert!(late < 0.5, "told by the notification, not by the sweep: {late} s");
        }
    }
}

#[tokio::test]
async fn of_many_that_wait_each_task_goes_to_one_and_none_is_left_behind() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    for n in 0..40 {
        replicas[0].register(&format!("w-{n}"), &[], &[]).await;
    }
    let waiting = (0..40).map(|n| {
        let replica = &replicas[n % 2];
        async move { claim_next(replica, &format!("w-{n}"), json!({"wait": 20})).await.expect(200) }
    });
    let create = async {
        for n in 0..40 {
            replicas[n % 2].create(json!({"title": format!("task {n}")})).await;
        }
    };
    let (answers, ()) = tokio::join!(join_all(waiting), create);
    let claimed: Vec<_> = answers.iter().flat_map(ids).collect();
    assert_eq!((claimed.len(), claimed.iter().collect::<BTreeSet<_>>().len()), (40, 40));
}

#[tokio::test]
async fn who_waits_for_what_another_one_left_is_told_at_once() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    for (worker, codebases) in [("both", &["a", "b"][..]), ("only-b", &["b"]), ("only-a", &["a"])] {
        replica.register(worker, codebases, &[]).await;
    }
    let waiting = async |worker: &str, after_ms| {
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        claim_next(&replica, worker, json!({"wait": 20})).await.expect(200)
    };
    let insert = async {
        tokio::time::sleep(Duration::from_millis(900)).await;
        // Told of the first one, the first of those who wait takes the second or the third: these matter more
        // to it, whichever of them another one is just taking.
        db.execute(
            "insert into tasks (title, codebase_id) values ('a', 'a');
             insert into tasks (title, codebase_id, priority) values ('b', 'b', 9);
             select pg_sleep(0.3);
             insert into tasks (title, codebase_id, priority) values ('b', 'b', 5)",
        )
        .await;
    };
    let begun = Instant::now();
    let (both, only_b, only_a, ()) =
        tokio::join!(waiting("both", 0), waiting("only-b", 300), waiting("only-a", 600), insert);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    for answer in [both, only_b, only_a] {
        assert_eq!(ids(&answer).len(), 1);
    }
}

#[tokio::test]
async fn a_worker_that_is_routed_anew_or_unregistered_while_it_waits_is_waited_for_no_more() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    for worker in ["ghost", "moved"] {
        replicas[0].register(worker, &["old"], &[]).await;
    }
    let change = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        db.execute("insert into tasks (title, codebase_id) values ('x', 'new')").await;
        replicas[1].post("/v1/agent/workers/ghost/unregister", json!({})).await.expect(200);
        let codebases = json!({"worker_id": "moved", "codebases": ["new"]});
        let put = replicas[1].http("PUT", "/v1/worker/codebases").json(&codebases);
        replicas[1].request(put).await.expect(200);
    };
    let begun = Instant::now();
    let (ghost, moved, ()) = tokio::join!(
        claim_next(&replicas[0], "ghost", json!({"wait": 20})),
        claim_next(&replicas[0], "moved", json!({"wait": 20})),
        change
    );
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!((ghost.status, ghost.problem().as_str()), (403, "unknown_worker"));
    assert_eq!(ids(&moved.expect(200)).len(), 1);
}

#[tokio::test]
async fn c2_a_call_repeated_with_its_claim_id_gets_the_same_tasks_also_when_both_race() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    replicas[0].register("w", &[], &[]).await;
    let batch: Vec<_> = (0..200).map(|n| json!({"title": n.to_string()})).collect();
    replicas[0].post("/v1/tasks/batch", json!(batch)).await.expect(201);
    for round in 0..10 {
        let claim_id = format!("00000000-0000-4000-8000-0000000000{round:02}");
        let ask = json!({"n": 5, "claim_id": claim_id});
        let calls = (0..6).map(|n| claim_next(&replicas[n % 2], "w", ask.clone()));
        let answers: Vec<_> =
            join_all(calls).await.into_iter().map(|answer| answer.expect(200)).collect();
        assert_eq!(ids(&answers[0]).len(), 5);
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
    }
    assert_eq!(db.value("select count(*) from tasks where status = 'running'").await, "50");
    // One that was long on its way comes after all of it has ended: it must not claim for nobody.
    db.execute("update tasks set status = 'completed' where status = 'running'").await;
    let late = json!({"claim_id": "00000000-0000-4000-8000-000000000000", "wait": 60});
    let late = claim_next(&replicas[0], "w", late).await;
    assert_eq!((late.status, late.problem().as_str()), (409, "claim_id_spent"));
    assert_eq!(db.value("select count(*) from tasks where status = 'running'").await, "0");
}

#[tokio::test]
async fn what_was_claimed_for_a_call_that_hung_up_is_free_again() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    for _ in 0..10 {
        let waiting = claim_next(&replica, "w", json!({"wait": 20}));
        let gone = tokio::time::timeout(Duration::from_millis(50), waiting).await;
        assert!(gone.is_err(), "there was nothing to claim");
    }
    let id = replica.create(json!({"title": "x"})).await;
    let claimed = eventually("somebody who waits gets it", async || {
        let answer = claim_next(&replica, "w", json!({"wait": 1})).await.expect(200);
        ids(&answer).pop()
    })
    .await;
    assert_eq!(claimed, id);
}

#[tokio::test]
async fn a_replica_that_drains_sends_those_who_wait_to_another_one() {
    let db = TestDb::new().await;
    let mut replica = Replica::start(&db).await;
    replica.register("w", &[], &[]).await;
    let begun = Instant::now();
    let waiting = claim_next(&replica, "w", json!({"wait": 60}));
    let stop = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        replica.signal("TERM");
    };
    let (answer, ()) = tokio::join!(waiting, stop);
    assert_eq!(answer.expect(200), json!({"tasks": []}));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(replica.ends_within(Duration::from_secs(5)).await.is_some());
}
