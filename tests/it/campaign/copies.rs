//! P18: start as many copies at once as you like on an empty database, and kill whom you like.

use std::time::Duration;

use futures_util::future::join_all;
use rand::RngExt;

use super::Campaign;
use crate::support::{Replica, TestDb, eventually};

/// How long so many processes may take on a small machine.
const START_PATIENCE: Duration = Duration::from_mins(2);
/// When a process is killed after its start, in ms: before, in, and after its migration.
const KILLED_AFTER_MS: std::ops::Range<u64> = 5..400;

/// Every migration is there once, and whole.
async fn expect_whole(db: &TestDb) {
    let files = std::fs::read_dir("migrations").unwrap().flatten();
    let count = files.filter(|file| file.file_name().to_string_lossy().starts_with('V')).count();
    let history = "select count(*) || ' ' || max(version) from refinery_schema_history";
    assert_eq!(db.value(history).await, format!("{count} {count}"));
}

#[tokio::test]
async fn p18_copies_that_start_at_once_on_an_empty_database_migrate_it_once_and_all_serve() {
    let campaign = Campaign::new("p18_copies_that_start_at_once");
    let (copies, rounds) = (campaign.number("COPIES", 10), campaign.number("ROUNDS", 1));
    for _ in 0..rounds {
        let db = TestDb::new().await;
        let started =
            (0..copies).map(|_| Replica::try_spawn(Replica::command(&db, &[]), START_PATIENCE));
        let replicas: Vec<_> = join_all(started).await.into_iter().map(Result::unwrap).collect();
        expect_whole(&db).await;
        let migrated = |replica: &&Replica| replica.log().contains("migration applied");
        assert_eq!(replicas.iter().filter(migrated).count(), 1, "one of them migrates");
        for replica in &replicas {
            eventually("it is ready", async || {
                (replica.get("/readyz").await.status == 200).then_some(())
            })
            .await;
        }
    }
    campaign.figures(&format!("{copies} copies at once, {rounds} rounds: one migrated, all serve"));
}

#[tokio::test]
async fn p18_who_is_killed_in_a_migration_leaves_nothing_half_applied() {
    let campaign = Campaign::new("p18_who_is_killed_in_a_migration");
    let (kills, mut rng) = (campaign.number("KILLS", 6), campaign.rng("kills", 0));
    let mut half = 0;
    for _ in 0..kills {
        let db = TestDb::new().await;
        let mut child = Replica::command(&db, &[])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // When it is hit is the point.
        tokio::time::sleep(Duration::from_millis(rng.random_range(KILLED_AFTER_MS))).await;
        child.kill().unwrap();
        child.wait().unwrap();
        half += usize::from(
            db.try_value("select count(*) from refinery_schema_history").await.is_some(),
        );
        let replica = Replica::start(&db).await;
        expect_whole(&db).await;
        replica.create(serde_json::json!({"title": "x"})).await;
    }
    campaign.figures(&format!(
        "{kills} killed, {half} of them after their first table: 0 half applied"
    ));
}

/// F53: what is not our history is refused, in a sentence.
#[tokio::test]
async fn p18_a_history_that_was_edited_by_hand_is_refused_in_a_sentence() {
    let db = TestDb::new().await;
    drop(Replica::start(&db).await);
    let edits = [
        "update refinery_schema_history set checksum = 'x' where version = 1",
        "update refinery_schema_history set checksum = '1' where version = 1",
        "update refinery_schema_history set checksum = null, applied_on = 'yesterday' where version = 1",
    ];
    for edit in edits {
        db.execute(edit).await;
        let command = Replica::command(&db, &[]);
        let Err(why) = Replica::try_spawn(command, START_PATIENCE).await else {
            panic!("it serves after: {edit}");
        };
        assert!(!why.contains("panicked"), "{edit}: {why}");
        assert!(why.contains("history") || why.contains("migration"), "{edit}: {why}");
    }
}
