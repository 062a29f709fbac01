//! From an insert, by whomever, to every worker that it is for, on whatever replica.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Replica, SseStream, TestDb, eventually};

#[tokio::test]
async fn r1_a_task_reaches_the_workers_it_is_for_on_every_replica_and_nobody_else() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut mine = Vec::new();
    let mut others = Vec::new();
    for (n, replica) in replicas.iter().enumerate() {
        let open = async |who: &str, query: &str| {
            replica.stream(&format!("worker_id={who}-{n}&events=task_available&{query}")).await
        };
        mine.push(open("mine", "codebases=mine,more&capabilities=build,test").await);
        others.push(open("elsewhere", "codebases=other&capabilities=build,test").await);
        others.push(open("unable", "codebases=mine&capabilities=test").await);
        others.push(open("bare", "").await);
    }
    let body = json!({"title": "x", "codebase_id": "mine", "required_capabilities": ["build"]});
    let id = replicas[1].create(body).await;
    for stream in &mut mine {
        assert_eq!(stream.announced().await, id);
    }
    // What everybody hears of comes first to those who did not hear of the other one.
    for codebase in ["global", "__pending__"] {
        let id = replicas[0].create(json!({"title": "all", "codebase_id": codebase})).await;
        for stream in mine.iter_mut().chain(&mut others) {
            assert_eq!(stream.announced().await, id);
        }
    }
}

#[tokio::test]
async fn r2_a_target_narrows_a_task_to_a_worker_or_a_name() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut ann =
        replica.stream("worker_id=ann&agent_name=Deploy%20Bot&events=task_available").await;
    let mut bob = replica.stream("worker_id=bob&events=task_available").await;
    let for_bob = replica.create(json!({"title": "x", "target_worker_id": "bob"})).await;
    let for_named = replica.create(json!({"title": "y", "target_agent_name": "Deploy Bot"})).await;
    assert_eq!(bob.announced().await, for_bob);
    assert_eq!(ann.announced().await, for_named);
    let for_all = replica.create(json!({"title": "z"})).await;
    assert_eq!((ann.announced().await, bob.announced().await), (for_all.clone(), for_all));
}

#[tokio::test]
async fn an_insert_by_hand_is_pushed_like_one_by_api() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    db.execute("insert into tasks (title) values ('by hand')").await;
    assert_eq!(stream.expect("task_available").await.data["title"], "by hand");
}

#[tokio::test]
async fn ten_thousand_rows_of_one_statement_all_reach_workers_that_take_them() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut streams = Vec::new();
    for n in 0..4 {
        // Two workers to a codebase, on different replicas: each task has two takers.
        let query = format!("worker_id=w-{n}&events=task_available&codebases=bulk-{}", n / 2);
        streams.push(replicas[n % 2].stream(&query).await);
    }
    db.execute(
        "insert into tasks (title, codebase_id) select 'row ' || n, 'bulk-' || n % 2
           from generate_series(1, 10000) n",
    )
    .await;
    // Each worker claims what it hears of, several at a time, until nothing more comes.
    let work = streams.iter_mut().enumerate().map(async |(n, stream)| {
        let (replica, worker) = (&replicas[n % 2], format!("w-{n}"));
        let take = async |id: String| {
            if replica.claim(&id, &worker).await.status != 200 {
                return 0;
            }
            replica.finish("complete", &id, &worker, json!({})).await.expect(200);
            1
        };
        let mut won = 0;
        while let Some(event) = stream.next_within(Duration::from_secs(4)).await {
            let mut heard = vec![event];
            while heard.len() < 32
                && let Some(event) = stream.next_within(Duration::from_millis(20)).await
            {
                heard.push(event);
            }
            let announced = heard.iter().filter(|event| event.name == "task_available");
            let taken = announced.map(|event| take(event.task().to_owned()));
            won += futures_util::future::join_all(taken).await.into_iter().sum::<usize>();
        }
        won
    });
    let won: usize = futures_util::future::join_all(work).await.into_iter().sum();
    let done = db.value("select count(*) from tasks where status = 'completed'").await;
    assert_eq!((won, done.as_str()), (10_000, "10000"));
}

#[tokio::test]
async fn a_scheduled_task_is_announced_when_it_is_due_and_not_before() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    db.execute("insert into tasks (title, run_at) values ('later', now() + interval '2 s')").await;
    let begun = Instant::now();
    let sentinel = replica.create(json!({"title": "sentinel"})).await;
    assert_eq!(stream.announced().await, sentinel);
    assert_eq!(stream.expect("task_available").await.data["title"], "later");
    let waited = begun.elapsed();
    assert!((1_500..3_500).contains(&waited.as_millis()), "{waited:?}");
}

#[tokio::test]
async fn what_an_operator_changes_by_hand_has_its_effect() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&codebases=a&events=task_available").await;
    let id = replica.create(json!({"title": "x", "codebase_id": "b"})).await;
    db.execute("update tasks set codebase_id = 'a'").await;
    assert_eq!(stream.announced().await, id, "moved to this worker's codebase");
    replica.claim(&id, "w").await.expect(200);
    db.execute("update tasks set status = 'pending'").await;
    let told = stream.expect("task_cancelled").await;
    assert_eq!((told.task(), &told.data["claim_epoch"]), (id.as_str(), &json!(1)));
    assert_eq!(stream.announced().await, id, "requeued");
    assert_eq!(replica.claim(&id, "w").await.expect(200)["claim_epoch"], 2);
    db.execute("update tasks set cancel_requested_at = now(), cancel_reason = 'by hand'").await;
    assert_eq!(stream.expect("task_cancelled").await.data["reason"], "by hand");
}

#[tokio::test]
async fn forged_notifications_change_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    let claimed = replica.create(json!({"title": "claimed"})).await;
    assert_eq!(stream.announced().await, claimed);
    replica.claim(&claimed, "w").await.expect(200);
    db.execute(&format!(
        "select pg_notify('taskwire', 'tasks {claimed} {}');
         select pg_notify('taskwire', 'cancel {claimed}');
         select pg_notify('taskwire', 'worker w');
         select pg_notify('taskwire', 'canary x 99999999');
         select pg_notify('taskwire', repeat('x', 7999));
         select pg_notify('taskwire', 'tasks ' || repeat(E'\\u00e4 ', 100));
         select pg_notify('taskwire', word) from unnest(array['', ' ', 'tasks', 'tasks ', 'codebases *']) word",
        uuid::Uuid::new_v4()
    ))
    .await;
    let id = replica.create(json!({"title": "real"})).await;
    assert_eq!(stream.announced().await, id);
}

#[tokio::test]
async fn a_killed_replicas_workers_go_on_at_another_one() {
    let db = TestDb::new().await;
    let (doomed, other) = (Replica::start(&db).await, Replica::start(&db).await);
    let mut stream = doomed.stream("worker_id=w").await;
    let id = doomed.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
    doomed.claim(&id, "w").await.expect(200);
    doomed.kill();
    assert!(stream.has_ended().await);
    let mut stream = other.stream("worker_id=w").await;
    other.finish("complete", &id, "w", json!({"claim_epoch": 1})).await.expect(200);
    let next = other.create(json!({"title": "next"})).await;
    assert_eq!(stream.announced().await, next);
    let connected = other.get("/v1/workers/connected").await.expect(200);
    assert_eq!(connected.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_presence_of_a_killed_replica_ends() {
    let db = TestDb::new().await;
    let (doomed, other) = (Replica::start(&db).await, Replica::start(&db).await);
    let _stream = doomed.stream("worker_id=w").await;
    doomed.kill();
    // Its silence, moved rather than waited for.
    db.execute(
        "update replicas set last_seen_at = now() - interval '1 min'
          where id = (select replica_id from streams)",
    )
    .await;
    eventually("nobody is connected", async || {
        let connected = other.get("/v1/workers/connected").await.expect(200);
        connected.as_array().unwrap().is_empty().then_some(())
    })
    .await;
    eventually("its row is gone", async || {
        (db.value("select count(*) from replicas").await == "1").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_replica_that_was_given_up_by_mistake_comes_back_with_its_streams() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w").await;
    db.execute("delete from replicas").await;
    assert_eq!(db.value("select count(*) from streams").await, "0");
    eventually("its stream is present again", async || {
        (db.value("select count(*) from streams").await == "1").then_some(())
    })
    .await;
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
}

#[tokio::test]
async fn a_push_from_one_replica_to_another_takes_less_than_fifty_milliseconds() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let mut stream = replicas[1].stream("worker_id=w&events=task_available").await;
    let mut took = Vec::new();
    for n in 0..40 {
        let begun = Instant::now();
        replicas[0].create(json!({"title": format!("{n}")})).await;
        stream.announced().await;
        took.push(begun.elapsed());
    }
    took.sort();
    assert!(took[20] < Duration::from_millis(50), "median {:?} of {took:?}", took[20]);
}

#[tokio::test]
async fn many_streams_each_hear_of_every_task_once() {
    let db = TestDb::new().await;
    let replicas = [Replica::start(&db).await, Replica::start(&db).await];
    let open = (0..100).map(async |n: usize| {
        let query = format!("worker_id=w-{n}&events=task_available");
        let mut stream = SseStream::open(&replicas[n % 2].url, &query, &[]).await;
        stream.expect("connected").await;
        stream
    });
    let mut streams = futures_util::future::join_all(open).await;
    let mut ids = HashSet::new();
    for n in 0..20 {
        ids.insert(replicas[n % 2].create(json!({"title": format!("{n}")})).await);
    }
    for stream in &mut streams {
        let heard = stream.announced_many(20).await;
        assert_eq!(heard.into_iter().collect::<HashSet<_>>(), ids);
    }
}

#[tokio::test]
async fn arrivals_do_not_starve_what_waits_and_matters_more() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--worker-sse-window", "8"]).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    db.execute(
        "insert into tasks (title, priority) select 'better', 10 from generate_series(1, 20)",
    )
    .await;
    let mut heard = stream.announced_many(8).await;
    // After each claim there is room for one, but not yet enough for a look at the backlog: a worse
    // task that arrives then must not take it.
    for _ in 0..6 {
        for _ in 0..2 {
            replica.claim(&heard.remove(0), "w").await.expect(200);
            replica.create(json!({"title": "worse"})).await;
        }
        for _ in 0..2 {
            let event = stream.expect("task_available").await;
            assert_eq!(event.data["title"], "better");
            heard.push(event.task().to_owned());
        }
    }
}
