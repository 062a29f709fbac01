//! What a window promises.

use super::*;

fn ready(xid: i64) -> Ready {
    Ready { id: TaskId::generate(), xid }
}

fn of(ready: Ready, priority: i32, bytes: u64) -> Offered {
    Offered { ready, priority, bytes, is_urgent: false }
}

fn filled(size: usize, priority: i32, now: Instant) -> (Window, Vec<Ready>) {
    let mut window = Window::new(size);
    let tasks: Vec<_> = (0..size).map(|_| ready(1)).collect();
    for task in &tasks {
        assert_eq!(window.consider(of(*task, priority, 100), now), Verdict::Announce);
        window.note(of(*task, priority, 100), now);
    }
    (window, tasks)
}

#[test]
fn a_full_window_holds_back_its_own_priority_and_lets_higher_pass() {
    let now = Instant::now();
    let (mut window, _) = filled(4, 0, now);
    assert_eq!(window.consider(of(ready(1), 0, 100), now), Verdict::HoldBack);
    assert_eq!(window.consider(of(ready(1), -1, 100), now), Verdict::HoldBack);
    for _ in 0..4 {
        let urgent = ready(1);
        assert_eq!(window.consider(of(urgent, 1, 100), now), Verdict::Announce);
        window.note(of(urgent, 1, 100), now);
    }
    assert_eq!(
        window.consider(of(ready(1), 2, 100), now),
        Verdict::HoldBack,
        "twice the window in all"
    );
}

#[test]
fn bytes_fill_a_window_too() {
    let now = Instant::now();
    let mut window = Window::new(128);
    window.note(of(ready(1), 0, 16 * 1024), now);
    window.note(of(ready(1), 0, 16 * 1024), now);
    assert_eq!(window.consider(of(ready(1), 0, 100), now), Verdict::HoldBack);
}

#[test]
fn an_announcement_is_not_repeated_within_a_minute_settled_or_not() {
    let now = Instant::now();
    let (mut window, tasks) = filled(4, 0, now);
    assert_eq!(
        window.consider(of(tasks[0], 0, 100), now + Duration::from_secs(59)),
        Verdict::Known
    );
    assert!(window.settle(tasks[0].id));
    assert!(!window.settle(tasks[0].id));
    assert_eq!(window.consider(of(tasks[0], 0, 100), now), Verdict::Known);
}

#[test]
fn a_task_that_came_back_is_announced_anew() {
    let now = Instant::now();
    let (mut window, tasks) = filled(4, 0, now);
    window.settle(tasks[0].id);
    let again = Ready { xid: 2, ..tasks[0] };
    assert_eq!(window.consider(of(again, 0, 100), now), Verdict::Announce);
}

#[test]
fn a_task_that_came_back_is_news_while_its_earlier_announcement_is_outstanding() {
    let now = Instant::now();
    let (mut window, tasks) = filled(4, 0, now);
    let again = Ready { xid: 2, ..tasks[0] };
    assert_eq!(window.consider(of(again, 0, 100), now), Verdict::Anew);
    window.note(of(again, 0, 100), now);
    assert_eq!(window.consider(of(again, 0, 100), now), Verdict::Known);
}

#[test]
fn a_task_whose_row_was_locked_is_told_again_soon() {
    let now = Instant::now();
    let (mut window, tasks) = filled(4, 0, now);
    window.hasten(tasks[0].id, now);
    assert!(window.to_repeat(now + REPEAT_RETRY / 2).is_empty());
    assert_eq!(window.to_repeat(now + REPEAT_RETRY), [tasks[0]]);
}

#[test]
fn a_full_window_repeats_too_and_a_repeat_that_failed_is_tried_again() {
    let now = Instant::now();
    let (mut window, tasks) = filled(1, 0, now);
    let later = now + Duration::from_mins(1);
    assert_eq!(window.to_repeat(later), tasks);
    assert_eq!(window.consider(of(tasks[0], 0, 100), later), Verdict::Again);
    assert!(window.to_repeat(later + Duration::from_secs(1)).is_empty());
    let later = later + REPEAT_RETRY;
    assert_eq!(window.to_repeat(later), tasks, "it was not noted");
    window.note(of(tasks[0], 0, 100), later);
    assert!(window.to_repeat(later + REPEAT_RETRY).is_empty());
}

#[test]
fn repeats_come_after_a_minute_then_at_growing_intervals() {
    let mut now = Instant::now();
    let mut window = Window::new(4);
    let task = ready(1);
    window.note(of(task, 0, 100), now);
    for wait in [60, 120, 240, 480, 600, 600] {
        assert!(window.to_repeat(now + Duration::from_secs(wait - 1)).is_empty());
        now += Duration::from_secs(wait);
        assert_eq!(window.to_repeat(now), [task]);
        assert_eq!(window.consider(of(task, 0, 100), now), Verdict::Again);
        window.note(of(task, 0, 100), now);
    }
}

/// Tells of tasks of 1 KiB each that others take, until there is no room.
fn fill(window: &mut Window, now: Instant) -> Vec<Ready> {
    let mut told = Vec::new();
    loop {
        let task = ready(1);
        match window.consider(of(task, 0, 1024), now) {
            Verdict::Announce => window.note(of(task, 0, 1024), now),
            verdict => {
                assert_eq!(verdict, Verdict::Unread);
                window.wait_for_proof();
                return told;
            }
        }
        window.settle(task.id);
        told.push(task);
    }
}

#[test]
fn s8_what_others_settle_makes_no_room_for_what_the_worker_may_not_have_read() {
    let now = Instant::now();
    let mut window = Window::new(128);
    let told = fill(&mut window, now);
    assert_eq!(told.len(), 40);
    assert!(!window.has_room() && window.waits_for_proof());
    // A smaller one does not pass, what is more important does.
    assert_eq!(window.consider(of(ready(1), 0, 10), now), Verdict::Unread);
    let urgent = Offered { is_urgent: true, ..of(ready(1), 1, 1024) };
    assert_eq!(window.consider(urgent, now), Verdict::Announce);
    // It asks for the 20th, which somebody else has taken long ago.
    window.prove(told[19].id, now);
    assert!(window.has_room());
    assert_eq!(fill(&mut window, now).len(), 20);
}

#[test]
fn s8_a_claim_from_before_an_announcement_proves_nothing() {
    let now = Instant::now();
    let mut window = Window::new(128);
    let told = fill(&mut window, now + Duration::from_secs(1));
    window.prove(told[39].id, now);
    assert!(!window.has_room());
}

#[test]
fn s8_repeats_stay_within_what_a_worker_may_not_have_read() {
    let mut now = Instant::now();
    let mut window = Window::new(128);
    let tasks: Vec<_> = (0..31).map(|_| ready(1)).collect();
    for task in &tasks {
        window.note(of(*task, 0, 1024), now);
    }
    let mut repeated = 0;
    for _ in 0..100 {
        now += Duration::from_mins(5);
        for task in window.to_repeat(now) {
            if window.consider(of(task, 0, 1024), now) == Verdict::Again {
                window.note(of(task, 0, 1024), now);
                repeated += 1;
            }
        }
    }
    assert_eq!(repeated, 8);
    window.prove(tasks[30].id, now);
    now += REPEAT_LAST;
    assert!(!window.to_repeat(now).is_empty(), "it reads, so it is told again");
}

#[test]
fn what_was_unsaid_is_news_again() {
    let now = Instant::now();
    let (mut window, tasks) = filled(4, 0, now);
    window.unsay(tasks[0].id);
    assert_eq!(window.consider(of(tasks[0], 0, 100), now), Verdict::Announce);
    window.unsay(tasks[0].id);
    assert_eq!((window.count(), window.bytes), (3, 300));
}
