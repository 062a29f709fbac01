//! The own Postgres: it lives as long as somebody uses it, whoever is killed and when.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::{PATIENCE, Replica, eventually};

/// A folder of its own, gone at the end with what the own Postgres keeps elsewhere for it.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("taskwire {} {name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taskwire"));
        command
            .args(["serve", "--bind", "127.0.0.1:0", "--drain-seconds", "0"])
            .env_remove("DATABASE_URL")
            .current_dir(&self.0);
        command
    }

    async fn serve(&self) -> Replica {
        Replica::spawn(self.command()).await
    }

    fn pid_in(&self, file: &str) -> Option<u32> {
        let text = fs::read_to_string(self.0.join(".taskwire").join(file)).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    fn postmaster(&self) -> Option<u32> {
        self.pid_in("postgres/postmaster.pid").filter(|pid| is_alive(*pid))
    }

    async fn is_quiet(&self) {
        eventually("the own Postgres has ended", async || {
            self.postmaster().is_none().then_some(())
        })
        .await;
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Ok(elsewhere) = fs::read_link(self.0.join(".taskwire/postgres"))
            && let Some(folder) = elsewhere.parent()
        {
            let _ = fs::remove_dir_all(folder);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

#[tokio::test]
async fn first_starts_at_the_same_moment_share_one_postgres() {
    let home = Home::new("at once");
    let replicas = futures_util::future::join_all((0..4).map(|_| home.serve())).await;
    let id = replicas[0].create(json!({"title": "x"})).await;
    for replica in &replicas {
        assert_eq!(replica.task(&id).await["title"], "x");
    }
    drop(replicas);
    home.is_quiet().await;
}

#[tokio::test]
async fn a_killed_postmaster_comes_back_and_nothing_acknowledged_is_lost() {
    let home = Home::new("postmaster");
    let replica = home.serve().await;
    let mut stream = replica.stream("worker_id=w").await;
    let mut ids = Vec::new();
    for n in 0..3 {
        ids.push(replica.create(json!({"title": format!("{n}")})).await);
        let before = home.postmaster().unwrap();
        kill(before);
        eventually("it serves again", async || {
            (replica.get("/readyz").await.status == 200 && home.postmaster() != Some(before))
                .then_some(())
        })
        .await;
        for id in &ids {
            // A connection that broke unnoticed may answer 503 once.
            let task = eventually("it is read again", async || {
                let answer = replica.get(&format!("/v1/tasks/{id}")).await;
                (answer.status != 503).then_some(answer)
            });
            assert_eq!(task.await.expect(200)["status"], "pending");
        }
    }
    // The stream stayed open all the while, and hears of what comes now.
    let last = replica.create(json!({"title": "last"})).await;
    loop {
        let event = stream.next().await;
        if event.name == "task_available" && event.task() == last {
            break;
        }
    }
    drop(replica);
    home.is_quiet().await;
}

#[tokio::test]
async fn a_killed_guard_is_replaced_and_its_postgres_still_ends_with_its_last_user() {
    let home = Home::new("guard");
    let replica = home.serve().await;
    let guard = home.pid_in("guard.lock").unwrap();
    kill(guard);
    eventually("another guard is there", async || {
        home.pid_in("guard.lock").filter(|pid| *pid != guard && is_alive(*pid))
    })
    .await;
    replica.create(json!({"title": "x"})).await;
    replica.kill();
    home.is_quiet().await;
}

#[tokio::test]
async fn a_start_that_meets_the_end_of_the_last_run_waits_for_it_and_serves() {
    let home = Home::new("race");
    let mut known: Vec<String> = Vec::new();
    for round in 0..6 {
        let replica = home.serve().await;
        for id in &known {
            assert_eq!(replica.task(id).await["status"], "pending");
        }
        known.push(replica.create(json!({"title": "x"})).await);
        if round % 2 == 0 {
            replica.kill();
        } else {
            replica.signal("TERM");
        }
    }
    home.is_quiet().await;
}

#[tokio::test]
async fn it_also_starts_in_a_folder_that_only_its_owner_may_enter() {
    let home = Home::new("it's \"private\"");
    fs::set_permissions(&home.0, fs::Permissions::from_mode(0o700)).unwrap();
    let replica = home.serve().await;
    replica.create(json!({"title": "x"})).await;
    let url = home.0.join(".taskwire/url");
    assert_eq!(fs::metadata(&url).unwrap().permissions().mode() & 0o777, 0o600, "holds a password");
    assert!(!replica.log().contains(fs::read_to_string(&url).unwrap().trim()));
    drop(replica);
    home.is_quiet().await;
}

#[tokio::test]
async fn ctrl_c_in_the_terminal_lets_the_server_say_goodbye_before_its_postgres_ends() {
    let home = Home::new("ctrl-c");
    let mut command = home.command();
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut replica = Replica::spawn(command).await;
    let stream = replica.stream("worker_id=w").await;
    // To the whole group, as a terminal does.
    let group = format!("-{}", replica.pid());
    assert!(Command::new("kill").args(["-s", "INT", "--", &group]).status().unwrap().success());
    let status = replica.ends_within(PATIENCE).await;
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    assert!(!replica.log().contains("could not say farewell"), "{}", replica.log());
    assert!(home.postmaster().is_none(), "it ended before the server did");
    drop(stream);
}

#[test]
fn a_folder_without_postgresqls_programs_is_named_in_a_sentence() {
    let home = Home::new("programs");
    let empty = home.0.join("empty");
    fs::create_dir_all(&empty).unwrap();
    for folder in [empty.as_path(), Path::new("/nowhere/at/all")] {
        let mut command = home.command();
        let child = command
            .env("TASKWIRE_POSTGRES_BIN", folder)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success());
        assert!(said.contains("TASKWIRE_POSTGRES_BIN"), "{said}");
        assert!(said.contains(folder.to_str().unwrap()), "{said}");
    }
    assert!(!home.0.join(".taskwire/postgres").exists());
}
