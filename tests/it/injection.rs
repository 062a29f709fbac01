//! F51: no text of a task can end an event or begin another, whoever wrote it.

use serde_json::{Value, json};

use crate::support::raw::Soundness;
use crate::support::{PATIENCE, Replica, TestDb};

/// Characters that end a line for some reader: those of the standard, and those that Python's
/// `splitlines` takes for one (the client of the users' document reads with it).
const LINE_ENDS: [char; 10] =
    ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];

/// So many tasks fit into a stream's window for sure.
const WINDOWFUL: usize = 20;

fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "a\nb",
        "a\rb",
        "a\r\nb",
        "\n\n",
        "x\n\nevent: task\ndata: {}\n\n",
        "x\revent: error\rdata: {}\r\r",
        "x\u{2028}event: task\u{2028}data: {}",
        "x\u{85}data: {}",
        ": comment",
        "data: {}",
        "event: task\ndata: {}",
        "id: 1\nretry: 0",
        "\u{feff}x",
        "\\n\\r",
        "\"},\"x\":{\"",
        "</script>",
        "\u{1b}[2J",
        "\u{202e}x",
        "\u{7f}",
    ]
    .map(str::to_owned)
    .into();
    texts.extend(('\u{1}'..='\u{1f}').map(|control| format!("a{control}b")));
    texts.extend(('\u{80}'..='\u{9f}').map(|control| format!("a{control}b")));
    texts
}

/// Reads a stream as bytes until so many events of a name have come. Every line that any reader
/// could see is checked.
async fn read(response: &mut reqwest::Response, name: &str, count: usize) -> Vec<(String, Value)> {
    let mut text = String::new();
    let mut unread = Vec::new();
    let wanted = format!("event: {name}\n");
    while text.matches(&wanted).count() < count || !text.ends_with("\n\n") {
        let chunk = tokio::time::timeout(PATIENCE, response.chunk()).await;
        unread.extend(chunk.expect("in time").expect("an open stream").expect("more"));
        if let Ok(more) = std::str::from_utf8(&unread) {
            text.push_str(more);
            unread.clear();
        }
    }
    let mut events = Vec::new();
    for block in text.trim_end_matches('\n').split("\n\n") {
        let mut lines: Vec<_> = block.split(LINE_ENDS).collect();
        lines.retain(|line| !line.starts_with("retry: "));
        let [event, data] = lines[..] else { panic!("not two lines: {block:?}") };
        let event = event.strip_prefix("event: ").unwrap_or_else(|| panic!("{block:?}"));
        let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("{block:?}"));
        let data = serde_json::from_str(data).unwrap_or_else(|_| panic!("no JSON: {block:?}"));
        events.push((event.to_owned(), data));
    }
    events.retain(|(event, _)| !["connected", "keepalive"].contains(&event.as_str()));
    events
}

/// One announcement and one task for each text, in order, with the text as it was.
fn check_pairs(events: &[(String, Value)], texts: &[String]) {
    assert_eq!(events.len(), 2 * texts.len());
    for (pair, text) in events.chunks(2).zip(texts) {
        let [(first, available), (second, task)] = pair else { unreachable!() };
        assert_eq!((first.as_str(), second.as_str()), ("task_available", "task"));
        assert_eq!((&available["title"], &task["title"]), (&json!(text), &json!(text)));
        assert_eq!(task["prompt"], json!(text));
        assert_eq!(task["metadata"], json!({ text: [text] }));
    }
}

/// Makes room in the stream's window.
async fn claim_all(replica: &Replica, events: &[(String, Value)]) {
    for (_, task) in events.iter().filter(|(event, _)| event == "task") {
        let id = task["id"].as_str().expect("an id");
        replica.claim(id, "w").await.expect(200);
    }
}

#[tokio::test]
async fn f51_hostile_text_by_the_api_is_one_pair_of_events_with_the_same_text() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    let mut stream = replica.stream("worker_id=w").await;
    let texts = hostile_texts();
    for texts in texts.chunks(WINDOWFUL) {
        for text in texts {
            let task = json!({"title": text, "prompt": text, "metadata": {text: [text]}});
            replica.create(task).await;
        }
        let events = read(&mut stream.response, "task", texts.len()).await;
        check_pairs(&events, texts);
        claim_all(&replica, &events).await;
    }
    sound.holds(&replica).await;
}

#[tokio::test]
async fn f51_hostile_text_by_sql_is_one_pair_of_events_with_the_same_text() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    let mut stream = replica.stream("worker_id=w").await;
    let texts = hostile_texts();
    for texts in texts.chunks(WINDOWFUL) {
        for text in texts {
            let insert = "insert into tasks (title, prompt, metadata)
                          values ($1, $1, jsonb_build_object($1, jsonb_build_array($1)))";
            let insert = sqlx::query(insert).bind(text).execute(&db.pool);
            insert.await.unwrap();
        }
        let events = read(&mut stream.response, "task", texts.len()).await;
        check_pairs(&events, texts);
        claim_all(&replica, &events).await;
    }
    sound.holds(&replica).await;
}

#[tokio::test]
async fn f51_hostile_text_in_a_cancellation_and_a_workers_name_stays_in_its_event() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let reason = "x\n\nevent: task\r\ndata: {}\u{2028}\u{85}";
    let mut stream = replica.stream("worker_id=w&agent_name=%E2%80%A8data:%20x").await;
    let id = replica.create(json!({"title": "x"})).await;
    replica.claim(&id, "w").await.expect(200);
    let path = format!("/v1/tasks/{id}/cancel");
    replica.post(&path, json!({ "reason": reason })).await.expect(200);
    let events = read(&mut stream.response, "task_cancelled", 1).await;
    let told = events.last().expect("an event");
    assert_eq!(told.1, json!({"task_id": id, "claim_epoch": 1, "reason": reason}));
}

#[tokio::test]
async fn times_that_no_client_could_read_are_refused_also_by_sql_and_harm_nobody() {
    let db = TestDb::new().await;
    let replica = Replica::start(&db).await;
    let sound = Soundness::of(&replica).await;
    let mut stream = replica.stream("worker_id=w").await;
    for column in ["expires_at", "run_at", "created_at"] {
        for time in ["infinity", "-infinity", "290000-01-01", "4000-01-01 BC"] {
            let sql = format!("insert into tasks (title, {column}) values ('{time}', '{time}')");
            let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await;
            let error = done.expect_err("refused").to_string();
            assert!(error.contains("tasks_times_are_in_range"), "{error}");
        }
    }
    for column in ["last_seen_at", "stream_ended_at", "registered_at"] {
        let sql = format!("update workers set {column} = 'infinity'");
        let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await;
        let error = done.expect_err("refused").to_string();
        assert!(error.contains("workers_times_are_in_range"), "{error}");
    }
    let id = replica.create(json!({"title": "x", "expires_at": "9999-12-31T23:59:59Z"})).await;
    assert_eq!(stream.announced().await, id);
    replica.get("/v1/tasks").await.expect(200);
    sound.holds(&replica).await;
}
