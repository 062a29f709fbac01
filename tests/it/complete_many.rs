//! `POST /v1/tasks/complete`: many claims of one worker end in one call.

use serde_json::{Value, json};

use crate::support::{Replica, TestDb};

async fn three_claims(replica: &Replica) -> Vec<Value> {
    replica.register("w", &[], &[]).await;
    for n in 0..3 {
        replica.create(json!({"title": format!("{n}")})).await;
    }
    let body = json!({"worker_id": "w", "n": 3});
    let claimed = replica.post("/v1/tasks/claim", body).await.expect(200);
    claimed["tasks"].as_array().unwrap().clone()
}

fn done(task: &Value, result: &Value) -> Value {
    json!({"task_id": task["id"], "claim_epoch": task["claim_epoch"], "result": result})
}

#[tokio::test]
async fn many_claims_end_in_one_call_and_what_was_lost_is_refused_alone() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let claims = three_claims(&replica).await;
    let lost = claims[1]["id"].as_str().unwrap();
    replica.finish("release", lost, "w", json!({})).await.expect(200);
    let nowhere = json!({"task_id": "00000000-0000-4000-8000-000000000000"});
    let tasks = [
        done(&claims[0], &json!(0)),
        done(&claims[1], &json!(1)),
        nowhere,
        done(&claims[2], &json!(2)),
    ];
    let body = json!({"worker_id": "w", "tasks": tasks});
    // The repetition of a call whose answer was lost says the same.
    for _ in 0..2 {
        let answer = replica.post("/v1/tasks/complete", body.clone()).await.expect(200);
        let results = answer["results"].as_array().unwrap();
        let said: Vec<_> =
            results.iter().map(|result| (&result["status"], &result["problem"]["code"])).collect();
        let (completed, none) = (&json!("completed"), &Value::Null);
        assert_eq!(said[0], (completed, none), "{answer}");
        assert_eq!(said[1], (none, &json!("claim_lost")));
        assert_eq!(said[2], (none, &json!("task_not_found")));
        assert_eq!(said[3], (completed, none));
        assert_eq!(results[1]["task_id"], claims[1]["id"]);
    }
    for n in [0, 2] {
        let task = replica.task(claims[n]["id"].as_str().unwrap()).await;
        assert_eq!((&task["status"], &task["result"]), (&json!("completed"), &json!(n)));
    }
    assert_eq!(replica.task(lost).await["status"], "pending");
    let attempts = "select string_agg(outcome, ' ' order by outcome) from attempts";
    assert_eq!(db.value(attempts).await, "completed completed released");
}

#[tokio::test]
async fn a_list_that_is_not_valid_ends_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let claims = three_claims(&replica).await;
    let good = done(&claims[0], &Value::Null);
    let too_large = done(&claims[1], &json!("x".repeat(300 * 1024)));
    for (bad, status) in [
        (json!([good, too_large]), 422),
        (json!([good, {"task_id": "x"}]), 404),
        (json!([good, {"claim_epoch": 1}]), 422),
        (json!([good, {"task_id": claims[1]["id"], "error": "x"}]), 422),
        (json!(vec![&good; 1001]), 422),
        (json!("all"), 422),
    ] {
        let body = json!({"worker_id": "w", "tasks": bad});
        assert_eq!(replica.post("/v1/tasks/complete", body).await.status, status);
    }
    assert_eq!(db.value("select count(*) from tasks where status = 'running'").await, "3");
    let nobody = json!({"tasks": [good]});
    assert_eq!(replica.post("/v1/tasks/complete", nobody).await.problem(), "worker_id_missing");
    let empty = replica.post("/v1/tasks/complete", json!({"worker_id": "w", "tasks": []})).await;
    assert_eq!(empty.expect(200), json!({"results": []}));
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_costs_the_others_of_a_list_nothing() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let claims = three_claims(&replica).await;
    let locked = claims[1]["id"].as_str().unwrap();
    let mut operator = db.pool.begin().await.unwrap();
    let lock = format!("select 1 from tasks where id = '{locked}' for update");
    sqlx::query(sqlx::AssertSqlSafe(lock)).execute(&mut *operator).await.unwrap();
    let tasks: Vec<_> = claims.iter().map(|task| done(task, &json!(1))).collect();
    let body = json!({"worker_id": "w", "tasks": tasks});
    let answer = replica.post("/v1/tasks/complete", body.clone()).await.expect(200);
    let results = answer["results"].as_array().unwrap();
    assert_eq!(
        (&results[0]["status"], &results[2]["status"]),
        (&json!("completed"), &json!("completed"))
    );
    assert_eq!(results[1]["problem"]["status"], 503, "{answer}");
    operator.rollback().await.unwrap();
    let answer = replica.post("/v1/tasks/complete", body).await.expect(200);
    for result in answer["results"].as_array().unwrap() {
        assert_eq!(result["status"], "completed", "{answer}");
    }
    // What failed was a statement, not its connection: nothing was begun that had to be taken back.
    assert!(!replica.log().contains("no transaction in progress"), "{}", replica.log());
}
