//! P20: operate it with SQL. What is changed by hand keeps every invariant and has its effects, or is
//! refused by a named constraint; what operators may rely on is there.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::postgres::PgPoolCopyExt;

use crate::support::{Replica, TestDb, eventually};

async fn replica_with(db: &TestDb, workers: &[&str]) -> Replica {
    let replica = Replica::start(db).await;
    for worker in workers {
        replica.register(worker, &[], &[]).await;
    }
    replica
}

#[tokio::test]
async fn each_way_to_reopen_a_task_by_hand_is_pushed_within_a_second_and_fences_its_worker_off() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    let mut stream = replica.stream("worker_id=other&events=task_available").await;
    let id = replica.create(json!({"title": "x", "max_attempts": 1})).await;
    assert_eq!(stream.announced().await, id);
    let mut epoch = 0;
    for end in [None, Some("complete"), Some("fail")] {
        for sql in [
            "update tasks set claimed_by = null, status = 'pending'",
            "update tasks set status = 'pending'",
            "select requeue_task(id) from tasks",
            "update tasks set claimed_by = null",
        ] {
            if end.is_some() && sql == "update tasks set claimed_by = null" {
                continue; // of a finished task that is only who did it
            }
            epoch += 1;
            let claimed = replica.claim(&id, "w").await.expect(200);
            assert_eq!(claimed["claim_epoch"], epoch);
            if let Some(verb) = end {
                replica.finish(verb, &id, "w", json!({"error": null})).await;
                replica.finish(verb, &id, "w", json!({})).await;
            }
            let begun = Instant::now();
            db.execute(sql).await;
            assert_eq!(stream.announced().await, id, "{sql} of a task that is {end:?}");
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
            let task = replica.task(&id).await;
            for field in
                ["claimed_by", "claimed_at", "finished_at", "result", "cancel_requested_at"]
            {
                assert_eq!(task[field], json!(null), "{field} after {sql} of {end:?}");
            }
            let late = replica.finish("release", &id, "w", json!({"claim_epoch": epoch})).await;
            assert_eq!(late.problem(), "claim_lost");
        }
    }
    let requeued = "select count(*) from attempts where outcome = 'requeued'";
    assert_eq!(db.value(requeued).await, "4");
}

#[tokio::test]
async fn every_change_of_status_by_hand_leaves_a_whole_row() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    let states = ["pending", "running", "completed", "failed", "cancelled"];
    for from in states {
        for to in states.into_iter().filter(|to| *to != "running") {
            let id = replica.create(json!({"title": "x"})).await;
            if from != "pending" {
                replica.claim(&id, "w").await.expect(200);
            }
            match from {
                "completed" => {
                    replica.finish("complete", &id, "w", json!({"result": 1})).await.expect(200);
                }
                "failed" => {
                    replica.finish("fail", &id, "w", json!({"retry": false})).await.expect(200);
                }
                "cancelled" => {
                    replica.post(&format!("/v1/tasks/{id}/cancel"), json!({})).await.expect(200);
                    replica.finish("release", &id, "w", json!({})).await.expect(200);
                }
                _ => {}
            }
            db.execute(&format!("update tasks set status = '{to}' where id = '{id}'")).await;
            let task = replica.task(&id).await;
            assert_eq!(task["status"], to);
            assert_eq!(task["finished_at"].is_null(), to == "pending", "{from} -> {to}: {task}");
            if to == "pending" {
                assert_eq!(replica.claim(&id, "w").await.status, 200, "{from} -> {to}");
            } else {
                assert_eq!(replica.claim(&id, "w").await.problem(), "task_ended");
            }
        }
    }
}

#[tokio::test]
async fn a_cancel_by_hand_reaches_the_worker_however_it_is_written() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    for (sql, ends) in [
        ("select cancel_task(id, 'by hand') from tasks", false),
        ("update tasks set cancel_requested_at = now(), cancel_reason = 'by hand'", false),
        ("update tasks set status = 'cancelled', cancel_reason = 'by hand'", true),
    ] {
        db.execute("delete from tasks").await;
        let id = replica.create(json!({"title": "x"})).await;
        assert_eq!(stream.announced().await, id);
        replica.claim(&id, "w").await.expect(200);
        db.execute(sql).await;
        let told = stream.expect("task_cancelled").await;
        assert_eq!((told.task(), &told.data["reason"]), (id.as_str(), &json!("by hand")), "{sql}");
        let answer = replica.finish("release", &id, "w", json!({})).await;
        if ends {
            assert_eq!(answer.problem(), "claim_lost");
        } else {
            assert_eq!(answer.expect(200)["status"], "cancelled");
        }
        assert_eq!(replica.task(&id).await["cancel_reason"], "by hand");
    }
    for (status, expected) in [("pending", "cancelled"), ("completed", "completed")] {
        let id = replica.create(json!({"title": "x", "run_at": "2099-01-01T00:00:00Z"})).await;
        db.execute(&format!("update tasks set status = '{status}' where id = '{id}'")).await;
        assert_eq!(db.value(&format!("select cancel_task('{id}')")).await, expected);
    }
    for function in ["cancel_task", "requeue_task"] {
        let missing = format!("select {function}('00000000-0000-0000-0000-000000000000') is null");
        assert_eq!(db.value(&missing).await, "true");
    }
}

#[tokio::test]
async fn what_is_due_is_announced_within_a_second_and_what_is_past_is_ended() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    db.execute(
        "insert into tasks (title, run_at) values ('soon', now() + interval '700 ms');
         insert into tasks (title, run_at, expires_at)
         values ('never', now() + interval '1 hour', now() + interval '1 s')",
    )
    .await;
    let soon = stream.expect("task_available").await;
    assert_eq!(soon.data["title"], "soon");
    let late =
        "select extract(epoch from clock_timestamp() - run_at) from tasks where title = 'soon'";
    let late: f64 = db.value(late).await.parse().unwrap();
    assert!((0.0..1.0).contains(&late), "announced {late} s after it was due");
    eventually("what nobody could claim in time has failed", async || {
        let status = db.value("select status from tasks where title = 'never'").await;
        (status == "failed").then_some(())
    })
    .await;
    // By hand, too: earlier than it was to be.
    let id = replica.create(json!({"title": "x", "run_at": "2099-01-01T00:00:00Z"})).await;
    db.execute("update tasks set run_at = now() where status = 'pending' and not due").await;
    assert_eq!(stream.announced().await, id);
}

#[tokio::test]
async fn what_is_copied_in_or_inserted_in_a_long_transaction_is_pushed_at_its_commit() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    let mut slow = db.pool.begin().await.unwrap();
    let insert = "insert into tasks (title, priority) values ('slow', 5)";
    sqlx::raw_sql(insert).execute(&mut *slow).await.unwrap();
    let mut copy = db.pool.copy_in_raw("copy tasks (title, codebase_id) from stdin").await.unwrap();
    copy.send(&b"one\tglobal\ntwo\tglobal\n"[..]).await.unwrap();
    copy.finish().await.unwrap();
    let mut titles = Vec::new();
    for _ in 0..2 {
        titles.push(stream.expect("task_available").await.data["title"].clone());
    }
    titles.sort_by_key(ToString::to_string);
    assert_eq!(titles, [json!("one"), json!("two")]);
    // Longer than the sweep takes: what it did not see then is not forgotten.
    assert!(stream.next_within(Duration::from_secs(3)).await.is_none());
    slow.commit().await.unwrap();
    let begun = Instant::now();
    assert_eq!(stream.expect("task_available").await.data["title"], "slow");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_run_at_that_is_changed_while_a_task_runs_holds_when_it_comes_back() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w", "v"]).await;
    let id = replica.create(json!({"title": "x", "priority": 9})).await;
    replica.claim(&id, "w").await.expect(200);
    db.execute("update tasks set run_at = now() + interval '3 s'").await;
    replica.finish("release", &id, "w", json!({})).await.expect(200);
    let depth = "select concat_ws(' ', waiting, scheduled) from queue_depth";
    assert_eq!(db.value(depth).await, "0 1");
    let other = replica.create(json!({"title": "y"})).await;
    let next = json!({"worker_id": "v"});
    let claimed = replica.post("/v1/tasks/claim", next).await.expect(200);
    assert_eq!(claimed["tasks"][0]["id"], other, "it holds up nothing");
    let next = json!({"worker_id": "v", "wait": 10});
    let claimed = replica.post("/v1/tasks/claim", next).await.expect(200);
    assert_eq!(claimed["tasks"][0]["id"], id);
}

#[tokio::test]
async fn a_worker_whose_presence_is_deleted_by_hand_keeps_its_claim_and_is_present_again() {
    let db = TestDb::new().await;
    let replica = Replica::start_with(&db, &["--lease-seconds", "2"]).await;
    let _stream = replica.stream("worker_id=w").await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    db.execute("delete from streams").await;
    eventually("it is present again", async || {
        (db.value("select count(*) from streams").await == "1").then_some(())
    })
    .await;
    let before = db.value("select lease_expires_at from tasks").await;
    eventually("its lease moves on", async || {
        (db.value("select lease_expires_at from tasks").await > before).then_some(())
    })
    .await;
    assert_eq!(replica.task(&id).await["claim_epoch"], 1);
}

#[tokio::test]
async fn a_timeout_that_is_changed_holds_for_the_attempt_that_runs() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    db.execute("update tasks set timeout_seconds = 1").await;
    eventually("the attempt is ended", async || {
        let outcome = db.value("select claim_outcome from tasks").await;
        (outcome == "timed_out").then_some(())
    })
    .await;
}

#[tokio::test]
async fn rows_that_are_deleted_or_truncated_while_they_are_worked_on_wedge_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    for sql in ["delete from tasks", "truncate tasks"] {
        let id = replica.create(json!({"title": "x"})).await;
        // The one before may have been announced once more before it went.
        while stream.announced().await != id {}
        replica.claim(&id, "w").await.expect(200);
        replica.finish("heartbeat", &id, "w", json!({"checkpoint": 1})).await.expect(200);
        replica.finish("release", &id, "w", json!({})).await.expect(200);
        db.execute(sql).await;
        for table in ["attempts", "heartbeats"] {
            assert_eq!(db.value(&format!("select count(*) from {table}")).await, "0", "{sql}");
        }
        for verb in ["heartbeat", "complete", "fail", "release"] {
            assert_eq!(replica.finish(verb, &id, "w", json!({})).await.problem(), "task_not_found");
        }
    }
    db.execute(
        "insert into tasks (title) select 'row ' || n from generate_series(1, 100000) n;
         update tasks set priority = 1; delete from tasks where title <> 'row 7'",
    )
    .await;
    // Others may have been announced before they went.
    loop {
        let event = stream.expect("task_available").await;
        if event.data["title"] == "row 7" && event.data["priority"] == 1 {
            break;
        }
    }
}

#[tokio::test]
async fn the_views_show_what_their_names_say() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    let _stream = replica.stream("worker_id=s&codebases=a").await;
    let running = replica.create(json!({"title": "r", "timeout_seconds": 100})).await;
    replica.claim(&running, "w").await.expect(200);
    let beat = json!({"progress": 0.5, "message": "half way"});
    replica.finish("heartbeat", &running, "w", beat).await.expect(200);
    let dead = replica.create(json!({"title": "d"})).await;
    replica.claim(&dead, "w").await.expect(200);
    let why = json!({"error": "boom", "retry": false});
    replica.finish("fail", &dead, "w", why).await.expect(200);
    for (codebase, run_at) in [("a", None), ("a", Some("2099-01-01T00:00:00Z")), ("nobody", None)] {
        let body = json!({"title": "p", "codebase_id": codebase, "run_at": run_at, "priority": 3});
        replica.create(body).await;
    }
    for (sql, expected) in [
        (
            "select string_agg(concat_ws(' ', codebase_id, waiting, scheduled, highest_priority), ', ') from queue_depth",
            "a 1 1 3, nobody 1 0 3",
        ),
        (
            "select concat_ws(' ', worker_id, attempt, claim_epoch, lease_left_s between 50 and 60,
                    timeout_left_s between 90 and 100, has_stream, progress, message) from running_tasks",
            "w 1 1 t t f 0.5 half way",
        ),
        ("select concat_ws(' ', title, attempt, worker_id, claim_outcome, error) from dead_letters", "d 1 w failed boom"),
        ("select codebase_id || ': ' || why from stuck_tasks", "nobody: nobody who is connected has its codebase, its capabilities and its target"),
        ("select string_agg(concat_ws(' ', attempt, worker_id, outcome), ', ' order by outcome) from attempt_history", "1 w failed, 1 w"),
        ("select string_agg(concat_ws(' ', worker_id, connected_at is not null, running), ', ') from worker_states", "s t 0, w f 1"),
        ("select concat_ws(' ', version, silent_for < interval '10 s', streams) from replica_states", concat!(env!("CARGO_PKG_VERSION"), " t 1")),
    ] {
        assert_eq!(db.value(sql).await, expected, "{sql}");
    }
    db.execute("update tasks set cancel_requested_at = now() - interval '2 minutes' where status = 'running'").await;
    let stuck = "select string_agg(why, '') from stuck_tasks where status = 'running'";
    assert!(db.value(stuck).await.contains("asked to cancel"));
}

#[tokio::test]
async fn finished_tasks_are_pruned_after_the_retention_with_all_that_they_left() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    let [old, young] =
        [replica.create(json!({"title": "x"})).await, replica.create(json!({"title": "x"})).await];
    for id in [&old, &young] {
        replica.claim(id, "w").await.expect(200);
        replica.finish("heartbeat", id, "w", json!({"checkpoint": 1})).await.expect(200);
        replica.finish("complete", id, "w", json!({})).await.expect(200);
    }
    db.execute(&format!(
        "update tasks set finished_at = now() - interval '31 days' where id = '{old}'"
    ))
    .await;
    drop(replica);
    // A replica prunes when it starts, and then every minute.
    let replica = Replica::start(&db).await;
    eventually("the old one is gone", async || {
        (replica.get(&format!("/v1/tasks/{old}")).await.status == 404).then_some(())
    })
    .await;
    assert_eq!(replica.task(&young).await["status"], "completed");
    for table in ["attempts", "heartbeats"] {
        assert_eq!(db.value(&format!("select count(*) from {table}")).await, "1", "{table}");
    }
}

#[tokio::test]
async fn a_task_that_is_ended_by_hand_with_all_that_belongs_to_it_has_its_attempt_noted_and_its_worker_told()
 {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    for (status, outcome) in
        [("completed", "completed"), ("cancelled", "cancelled"), ("failed", "lapsed")]
    {
        let id = replica.create(json!({"title": "x"})).await;
        replica.claim(&id, "w").await.expect(200);
        db.execute(&format!(
            "update tasks set status = '{status}', claim_outcome = '{outcome}', finished_at = now(),
                              lease_expires_at = null where id = '{id}'"
        ))
        .await;
        let noted = format!("select outcome from attempts where task_id = '{id}'");
        assert_eq!(db.value(&noted).await, outcome);
    }
    // One whose outcome was changed before the rest, too.
    let mut stream = replica.stream("worker_id=w&events=task_available").await;
    let id = replica.create(json!({"title": "x"})).await;
    assert_eq!(stream.announced().await, id);
    replica.claim(&id, "w").await.expect(200);
    db.execute(&format!("update tasks set claim_outcome = 'failed' where id = '{id}'")).await;
    db.execute(&format!("select requeue_task('{id}')")).await;
    assert_eq!(stream.expect("task_cancelled").await.task(), id);
    let noted = format!("select outcome from attempts where task_id = '{id}'");
    assert_eq!(db.value(&noted).await, "requeued");
}

/// The clock is read more than once in the course of an update: it must not be due by one look and not by the
/// other, as then nobody would be told.
#[tokio::test]
async fn a_task_that_becomes_due_in_the_moment_in_which_its_claim_ends_is_marked_as_news() {
    let db = TestDb::new().await;
    let replica = replica_with(&db, &["w"]).await;
    for n in 0..40 {
        replica.create(json!({"title": format!("{n}")})).await;
    }
    let body = json!({"worker_id": "w", "n": 40});
    replica.post("/v1/tasks/claim", body).await.expect(200);
    let before = "select max(ready_xid) from tasks";
    let before = db.value(before).await;
    for _ in 0..20 {
        db.execute(
            "update tasks set status = 'pending', run_at = clock_timestamp() + (random() * 60) * interval '1 microsecond'
              where status = 'running' and ctid in (select ctid from tasks where status = 'running' limit 2)",
        )
        .await;
    }
    let forgotten = format!("select count(*) from tasks where due and ready_xid <= {before}");
    assert_eq!(db.value(&forgotten).await, "0");
}
