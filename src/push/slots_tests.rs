use super::*;
use crate::push::unread::Unread;

const NOW: fn() -> Instant = Instant::now;

fn task() -> TaskId {
    TaskId::generate()
}

fn claim(task_id: TaskId, claim_epoch: i64, claim_id: Option<Uuid>) -> HeldClaim {
    HeldClaim { task_id, claim_epoch, claim_id }
}

/// Of a worker that holds nothing.
fn slots(size: usize) -> Slots {
    let mut slots = Slots::new(size);
    slots.look(0, Look::All(&[]), NOW());
    slots
}

fn frame(number: u64) -> Frame {
    Frame { number, mark: Unread::default().announced(10, None) }
}

#[test]
fn nothing_is_given_before_it_is_known_what_the_worker_holds() {
    let mut slots = Slots::new(2);
    assert_eq!((slots.free(), slots.claimable(99_999)), (0, 0));
    let (a, b) = (task(), task());
    slots.look(0, Look::All(&[claim(a, 1, None), claim(b, 1, None)]), NOW());
    assert_eq!(slots.owed(99_999).len(), 2);
    slots.finish(a, 1);
    assert_eq!((slots.owed(99_999), slots.free()), (vec![b], 0));
    slots.pushed(b, frame(0), 10, NOW());
    assert_eq!(slots.free(), 1);
}

#[test]
fn a_claim_that_is_made_has_its_slot_from_the_beginning() {
    let mut slots = slots(3);
    let id = new_claim_id();
    slots.begin(id, 2);
    assert_eq!(slots.free(), 1);
    // It was won, and a look sees it before its answer comes.
    let a = task();
    slots.look(slots.look_begins(), Look::All(&[claim(a, 1, Some(id))]), NOW());
    assert_eq!((slots.free(), slots.owes()), (1, false));
    slots.end(id);
    slots.hold_new(a, 1);
    slots.pushed(a, frame(0), 10, NOW());
    assert_eq!(slots.free(), 2);
}

#[test]
fn what_came_after_a_look_began_is_not_gone() {
    let mut slots = slots(3);
    let (old, new) = (task(), task());
    slots.hold(old, 1);
    let began = slots.look_begins();
    slots.hold(new, 1);
    assert!(slots.look(began, Look::Task(new, None), NOW()).is_none());
    slots.look(began, Look::Task(old, None), NOW());
    assert_eq!(slots.free(), 2);
}

#[test]
fn what_is_missing_in_all_is_free_when_it_is_missing_twice() {
    let mut slots = slots(3);
    let (old, now) = (task(), NOW());
    slots.hold(old, 1);
    slots.look(slots.look_begins(), Look::All(&[]), now);
    assert!(slots.is_doubtful() && slots.free() == 2);
    slots.look(slots.look_begins(), Look::All(&[claim(old, 1, None)]), now + GONE_FOR);
    assert!(!slots.is_doubtful());
    slots.look(slots.look_begins(), Look::All(&[]), now + GONE_FOR);
    slots.look(slots.look_begins(), Look::All(&[]), now + 2 * GONE_FOR);
    assert!(!slots.is_doubtful() && slots.free() == 3);
}

#[test]
fn what_was_claimed_for_the_worker_is_pushed_and_what_it_claimed_itself_only_counts() {
    let mut slots = slots(3);
    let (pushed, own) = (task(), task());
    let claims = [claim(pushed, 1, Some(new_claim_id())), claim(own, 1, Some(Uuid::new_v4()))];
    slots.look(slots.look_begins(), Look::All(&claims), NOW());
    assert_eq!(slots.owed(99_999), [pushed]);
    assert_eq!(slots.is_owed(pushed, 1), Some(true));
    slots.pushed(pushed, frame(0), 10, NOW());
    assert_eq!(slots.free(), 1);
}

#[test]
fn a_claim_that_is_over_and_a_newer_one_of_the_same_task_are_two() {
    let mut slots = slots(3);
    let a = task();
    slots.hold_new(a, 1);
    slots.pushed(a, frame(0), 10, NOW());
    slots.look(slots.look_begins(), Look::All(&[claim(a, 2, Some(new_claim_id()))]), NOW());
    assert_eq!((slots.is_owed(a, 2), slots.is_owed(a, 1)), (Some(true), None));
    // The call that ended the first one comes late.
    assert!(slots.finish(a, 1).is_none());
    assert_eq!(slots.is_owed(a, 2), Some(true));
}

#[test]
fn only_what_no_worker_can_know_of_is_given_back() {
    let mut slots = slots(9);
    let tasks: Vec<_> = (0..5).map(|_| task()).collect();
    for (number, id) in (0..).zip(&tasks[..3]) {
        slots.hold_new(*id, 1);
        slots.pushed(*id, frame(number), 10, NOW());
    }
    slots.hold_new(tasks[3], 7);
    slots.hold(tasks[4], 1);
    slots.close();
    let mut back = slots.unread_by_anyone(2);
    back.sort();
    let mut expected = vec![(tasks[2], 1), (tasks[3], 7)];
    expected.sort();
    assert_eq!((back, slots.free()), (expected, 0));
    assert!(slots.unread_by_anyone(2).is_empty());
}

#[test]
fn no_more_is_claimed_than_may_be_pushed() {
    let mut slots = slots(1000);
    assert_eq!(slots.claimable(10 * FRAME_BYTES_USUAL), 10);
    slots.begin(new_claim_id(), 4);
    assert_eq!(slots.claimable(10 * FRAME_BYTES_USUAL), 6);
    for number in 0..40 {
        let id = task();
        slots.hold_new(id, 1);
        slots.pushed(id, frame(number), 8 * FRAME_BYTES_USUAL, NOW());
    }
    assert!(slots.claimable(40 * FRAME_BYTES_USUAL) <= 2);
}

#[test]
fn a_worker_that_knows_of_nothing_it_holds_rests() {
    let mut slots = slots(3);
    assert!(slots.is_idle());
    let (owed, known) = (task(), task());
    slots.hold_new(owed, 1);
    assert!(slots.is_idle() && !slots.is_any_known());
    slots.hold(known, 1);
    assert!(!slots.is_idle());
    slots.finish(known, 1);
    assert!(slots.is_idle());
    slots.pushed(owed, frame(0), 10, NOW());
    assert!(!slots.is_idle() && slots.is_any_known());
}

#[test]
fn a_task_that_came_in_an_answer_to_nobody_is_owed() {
    let mut slots = slots(3);
    let task = task();
    slots.owe(task, 2);
    slots.owe(task, 2);
    assert_eq!(slots.owed(99_999), [task]);
    assert_eq!(slots.is_owed(task, 2), Some(true), "told as one it may know of");
}
