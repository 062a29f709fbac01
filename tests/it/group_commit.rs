//! Group commit loses nothing and delays nobody. (What one group promises by itself is in
//! `src/store/group_tests.rs`.)

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::raw::{connect, json_request, read_answer};
use crate::support::{PATIENCE, Replica, TestDb, eventually};

const MIB: usize = 1024 * 1024;
/// The first key of the locks by which rows are seen in flight.
const LOCKS: u32 = 4711;

/// What an operator may add to a database: statements on tasks of certain codebases stay in flight, right
/// before their commit, while their gate is closed. Every inserted row locks the number of its priority until
/// then, so that all can see in which statement it is. And all statements are counted.
const GATES: &str = "
    create table gates (codebase_id text primary key);
    create table statements (verb text, tasks bigint);
    create function wait_at_gate() returns trigger language plpgsql as $$
    begin
        insert into statements select lower(tg_op), count(*) from rows having count(*) > 0;
        while exists (select from gates join rows using (codebase_id)) loop
            perform pg_sleep(0.005);
        end loop;
        return null;
    end $$;
    create function lock_number() returns trigger language plpgsql as $$
    begin
        perform pg_advisory_xact_lock(4711, new.priority);
        return new;
    end $$;
    create trigger lock_number before insert on tasks
        for each row when (new.priority > 0) execute function lock_number();
    create trigger wait_at_gate_inserted after insert on tasks referencing new table as rows
        for each statement execute function wait_at_gate();
    create trigger wait_at_gate_updated after update on tasks referencing new table as rows
        for each statement execute function wait_at_gate();
";

async fn start() -> (TestDb, Replica) {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    db.execute(GATES).await;
    (db, replica)
}

async fn close(db: &TestDb, gate: &str) {
    db.execute(&format!("insert into gates values ('{gate}')")).await;
}

async fn open(db: &TestDb, gate: &str) {
    db.execute(&format!("delete from gates where codebase_id = '{gate}'")).await;
}

/// How many statements of a kind are in flight.
async fn in_flight(db: &TestDb, name: &str) -> usize {
    let sql = format!(
        "select count(*) from pg_stat_activity where datname = current_database()
            and application_name = 'taskwire' and state = 'active' and query like '-- {name}%'"
    );
    db.value(&sql).await.parse().unwrap()
}

async fn are_in_flight(db: &TestDb, name: &str, count: usize) {
    eventually("the statements are in flight", async || {
        (in_flight(db, name).await == count).then_some(())
    })
    .await;
}

/// Statements so far, and what they were about in all.
async fn statements(db: &TestDb, verb: &str) -> (usize, usize) {
    let sql =
        format!("count(*) || ' ' || coalesce(sum(tasks), 0) from statements where verb = '{verb}'");
    let text = db.value(&format!("select {sql}")).await;
    let (count, tasks) = text.split_once(' ').unwrap();
    (count.parse().unwrap(), tasks.parse().unwrap())
}

/// Sends a create and does not wait for its answer.
async fn send_create(replica: &Replica, number: usize, codebase: &str) -> TcpStream {
    let body = json!({"title": format!("{number}"), "priority": number, "codebase_id": codebase});
    let mut socket = connect(replica).await;
    let bytes = json_request("POST", "/v1/tasks", body.to_string().as_bytes());
    socket.write_all(&bytes).await.unwrap();
    socket
}

/// Two creates that stay in flight until their gate is open: what comes now has to wait.
async fn occupy(db: &TestDb, replica: &Replica, gate: &str) -> [TcpStream; 2] {
    close(db, gate).await;
    let first = send_create(replica, 1, gate).await;
    are_in_flight(db, "task_create", 1).await;
    let second = send_create(replica, 2, gate).await;
    are_in_flight(db, "task_create", 2).await;
    [first, second]
}

/// Hangs up, with a reset in place of a farewell.
fn hang_up(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
    drop(socket);
}

#[tokio::test]
async fn a_caller_that_hangs_up_cancels_nobodys_statement_and_not_its_own() {
    let (db, replica) = start().await;
    let [alone, other] = occupy(&db, &replica, "a").await;
    close(&db, "b").await;
    let mut callers = HashMap::new();
    for n in 3..63 {
        callers.insert(n, send_create(&replica, n, "b").await);
    }
    // One hangs up whose statement is its own, and then many of those who share one.
    hang_up(alone);
    open(&db, "a").await;
    let numbers = format!(
        "string_agg(objid::text, ' ') from pg_locks where locktype = 'advisory' and granted
            and classid = {LOCKS} and objid > 2
            and database = (select oid from pg_database where datname = current_database())"
    );
    let shared = eventually("a statement of several is in flight", async || {
        let numbers = db.value(&format!("select {numbers}")).await;
        let numbers: Vec<usize> = numbers.split_whitespace().map(|n| n.parse().unwrap()).collect();
        (numbers.len() > 4).then_some(numbers)
    })
    .await;
    for number in shared.iter().step_by(2) {
        hang_up(callers.remove(number).unwrap());
    }
    open(&db, "b").await;
    callers.insert(2, other);
    for (number, mut socket) in callers {
        let answer = timeout(PATIENCE, read_answer(&mut socket, false)).await.expect("in time");
        let task = answer.expect("an answer").expect(201);
        assert_eq!(task["title"], number.to_string());
    }
    eventually("all tasks are there, once", async || {
        let sql = "select count(*) || ' ' || count(distinct title) from tasks";
        (db.value(sql).await == "62 62").then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_bad_member_fails_alone_and_its_neighbours_succeed() {
    let (db, replica) = start().await;
    // What the checks in front of the store cannot know.
    db.execute("alter table tasks add constraint tasks_are_good check (title <> 'bad')").await;
    let before = occupy(&db, &replica, "a").await;
    let title = |n: usize| if n % 10 == 3 { "bad".to_owned() } else { format!("good {n}") };
    let create = |n| replica.post("/v1/tasks", json!({ "title": title(n) }));
    let (answers, ()) = tokio::join!(join_all((0..40).map(create)), async {
        // All of them are on their way.
        tokio::task::yield_now().await;
        open(&db, "a").await;
    });
    for (n, answer) in answers.into_iter().enumerate() {
        if title(n) == "bad" {
            assert_eq!((answer.status, answer.problem().as_str()), (422, "refused"));
        } else {
            assert_eq!(answer.expect(201)["title"], title(n));
        }
    }
    assert_eq!(db.value("select count(*) from tasks where title like 'good%'").await, "36");
    assert_eq!(db.value("select count(*) from tasks").await, (36 + before.len()).to_string());
}

#[tokio::test]
async fn each_of_many_at_once_gets_its_own_answer() {
    let (db, replica) = start().await;
    for n in 0..20 {
        replica.register(&format!("w-{n}"), &[], &[]).await;
    }
    let create = async |n: usize| {
        let task = replica.post("/v1/tasks", json!({"title": format!("task {n}")})).await;
        let task = task.expect(201);
        assert_eq!(task["title"], format!("task {n}"));
        task["id"].as_str().unwrap().to_owned()
    };
    let ids = join_all((0..300).map(create)).await;
    let claim = async |(n, id): (usize, &String)| {
        let worker = format!("w-{}", n % 20);
        let task = replica.claim(id, &worker).await.expect(200);
        assert_eq!((&task["id"], &task["title"]), (&json!(id), &json!(format!("task {n}"))));
        assert_eq!(task["claimed_by"], worker.as_str());
    };
    join_all(ids.iter().enumerate().map(claim)).await;
    let finish = async |(n, id): (usize, &String)| {
        let worker = format!("w-{}", n % 20);
        let result = json!({ "result": n });
        let done = replica.finish("complete", id, &worker, result).await.expect(200);
        assert_eq!(done["task_id"], id.as_str());
    };
    join_all(ids.iter().enumerate().map(finish)).await;
    let sql =
        "select count(*) from tasks where status = 'completed' and title = 'task ' || result::text";
    assert_eq!(db.value(sql).await, "300");
}

#[tokio::test]
async fn of_many_claims_of_one_task_in_one_statement_one_wins_and_each_is_told_its_own() {
    let (db, replica) = start().await;
    for n in 0..6 {
        replica.register(&format!("w-{n}"), &["a"], &[]).await;
    }
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(replica.create(json!({"title": format!("{n}")})).await);
    }
    let held = [
        replica.create(json!({"title": "x", "codebase_id": "a"})).await,
        replica.create(json!({"title": "y", "codebase_id": "a"})).await,
    ];
    // Two statements stay in flight, so that all others share the next ones.
    close(&db, "a").await;
    let first = replica.claim(&held[0], "w-0");
    let second = async {
        are_in_flight(&db, "task_claim", 1).await;
        replica.claim(&held[1], "w-0").await
    };
    let race = async {
        are_in_flight(&db, "task_claim", 2).await;
        let claims = ids.iter().flat_map(|id| (0..6).map(move |n| (id, format!("w-{n}"))));
        let claim = async |(id, worker): (&String, String)| {
            let answer = replica.claim(id, &worker).await;
            (id.clone(), worker, answer)
        };
        let mut racing = Box::pin(join_all(claims.map(claim)));
        // They are sent, and no answer comes.
        assert!((&mut racing).now_or_never().is_none());
        open(&db, "a").await;
        racing.await
    };
    let (first, second, race) = tokio::join!(first, second, race);
    assert_eq!((first.status, second.status), (200, 200));
    let (before, _) = statements(&db, "update").await;
    assert!(before < 2 + ids.len(), "{before} statements for {} tasks", ids.len());
    for id in &ids {
        let mut winners = Vec::new();
        for (_, worker, answer) in race.iter().filter(|(task, ..)| task == id) {
            if answer.status == 200 {
                let task = answer.json();
                assert_eq!((&task["id"], &task["claimed_by"]), (&json!(id), &json!(worker)));
                winners.push(worker.clone());
            } else {
                assert_eq!((answer.status, answer.problem().as_str()), (409, "already_claimed"));
            }
        }
        assert_eq!(winners, [replica.task(id).await["claimed_by"].as_str().unwrap()]);
    }
}

#[tokio::test]
async fn an_idle_servers_single_request_goes_out_at_once_as_one_statement() {
    let (db, replica) = start().await;
    let (mut created, mut inserted) = (Vec::new(), Vec::new());
    for n in 0..60 {
        let begun = Instant::now();
        replica.create(json!({"title": format!("{n}")})).await;
        created.push(begun.elapsed());
        // The same by hand, for what this machine takes for it now.
        let begun = Instant::now();
        db.execute("insert into tasks (title) values ('by hand')").await;
        inserted.push(begun.elapsed());
    }
    assert_eq!(statements(&db, "insert").await, (120, 120));
    created.sort();
    inserted.sort();
    let (created, inserted) = (created[30], inserted[30]);
    assert!(created < inserted * 3 + Duration::from_millis(5), "{created:?}, {inserted:?}");
}

#[tokio::test]
async fn under_load_statements_are_shared_and_two_of_a_kind_are_in_flight_at_most() {
    let (db, replica) = start().await;
    let before = occupy(&db, &replica, "a").await;
    let create = |n| replica.post("/v1/tasks", json!({"title": format!("{n}")}));
    let mut creating = Box::pin(join_all((0..200).map(create)));
    // While two are in flight there is no third one, whoever asks.
    for _ in 0..20 {
        assert!((&mut creating).now_or_never().is_none());
        assert_eq!(in_flight(&db, "task_create").await, 2);
    }
    open(&db, "a").await;
    for answer in creating.await {
        answer.expect(201);
    }
    let (statements, tasks) = statements(&db, "insert").await;
    assert_eq!(tasks, 200 + before.len());
    assert!(statements <= tasks / 2, "{statements} statements for {tasks} tasks");
}

#[tokio::test]
async fn a_full_queue_answers_busy_and_nothing_that_was_acknowledged_is_lost() {
    let (db, replica) = start().await;
    let mut before = occupy(&db, &replica, "a").await;
    // The queue holds 128 MiB.
    let body = json!({"title": "large", "prompt": "x".repeat(MIB)}).to_string();
    let request = bytes::Bytes::from(json_request("POST", "/v1/tasks", body.as_bytes()));
    let create = async |_: usize| {
        let mut socket = connect(&replica).await;
        socket.write_all(&request).await.unwrap();
        let answer = timeout(PATIENCE, read_answer(&mut socket, false)).await.expect("in time");
        let answer = answer.expect("an answer");
        if answer.status == 503 {
            assert!(answer.headers.contains_key("retry-after"));
            let code = answer.problem();
            if code == "busy" {
                open(&db, "a").await;
            }
            return Err(code);
        }
        Ok(answer.expect(201)["id"].as_str().unwrap().to_owned())
    };
    let answers: Vec<Result<String, String>> = join_all((0..140).map(create)).await;
    let busy = answers.iter().filter(|answer| *answer == &Err("busy".to_owned())).count();
    assert!(busy > 0, "{answers:?}");
    for socket in &mut before {
        read_answer(socket, false).await.expect("an answer").expect(201);
    }
    let acknowledged: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    let mut rows: Vec<Value> = Vec::new();
    for id in &acknowledged {
        rows.push(json!(db.value(&format!("select count(*) from tasks where id = '{id}'")).await));
    }
    assert_eq!(rows, vec![json!("1"); acknowledged.len()]);
    let large = db.value("select count(*) from tasks where title = 'large'").await;
    assert_eq!(large, acknowledged.len().to_string(), "who is busy has done nothing");
    replica.create(json!({"title": "there is room again"})).await;
}
