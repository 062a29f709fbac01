//! What one stream's socket has not taken yet. Bounded: what does not fit stays in Postgres.

use std::borrow::Borrow;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;

/// Bytes that may wait for one socket. Twice a window's 32 KiB: a reader that is alive never fills it.
const MAILBOX_BYTES_MAX: usize = 64 * 1024;

/// One stream's queue of frames. Many may put, one takes.
#[derive(Debug, Default)]
pub struct Mailbox {
    state: Mutex<State>,
    taker: AtomicWaker,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Frames that were taken so far.
    taken: u64,
    is_closed: bool,
    /// Something found no room: whoever empties the mailbox is to ask for it again.
    has_refused: bool,
}

impl Mailbox {
    /// Puts frames in, all or none. False: no room, or closed.
    pub fn put(&self, frames: &[impl Borrow<Bytes>]) -> bool {
        let bytes: usize = frames.iter().map(|frame| frame.borrow().len()).sum();
        let mut state = self.lock();
        if state.is_closed || state.bytes + bytes > MAILBOX_BYTES_MAX {
            state.has_refused = true;
            return false;
        }
        state.frames.extend(frames.iter().map(|frame| frame.borrow().clone()));
        state.bytes += bytes;
        drop(state);
        self.taker.wake();
        true
    }

    /// Puts one frame in, and says which of all frames it is. `None`: no room, or closed.
    pub fn put_one(&self, frame: Bytes) -> Option<u64> {
        let mut state = self.lock();
        if state.is_closed || state.bytes + frame.len() > MAILBOX_BYTES_MAX {
            state.has_refused = true;
            return None;
        }
        let number = state.taken + state.frames.len() as u64;
        state.bytes += frame.len();
        state.frames.push_back(frame);
        drop(state);
        self.taker.wake();
        Some(number)
    }

    /// Takes nothing more in, and gives nothing more out.
    pub fn shut(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.frames.clear();
        state.bytes = 0;
        drop(state);
        self.taker.wake();
    }

    /// Whether it takes nothing more in.
    pub fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// How many frames were taken so far.
    pub fn taken(&self) -> u64 {
        self.lock().taken
    }

    /// Puts the last frame in, room or not, and ends the stream after it.
    pub fn close(&self, last: Bytes) {
        let mut state = self.lock();
        if !state.is_closed {
            state.frames.push_back(last);
            state.is_closed = true;
        }
        drop(state);
        self.taker.wake();
    }

    /// The next frame; `None` once the last one is out.
    pub fn poll_take(&self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        // Register before looking, or a frame put in between would wake nobody.
        self.taker.register(context.waker());
        let mut state = self.lock();
        match state.frames.pop_front() {
            Some(frame) => {
                state.bytes = state.bytes.saturating_sub(frame.len());
                state.taken += 1;
                Poll::Ready(Some(frame))
            }
            None if state.is_closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// Whether its socket has taken everything.
    pub fn is_empty(&self) -> bool {
        self.lock().frames.is_empty()
    }

    /// How many frames were taken so far, while some wait; `None`: none does.
    pub fn taken_while_waiting(&self) -> Option<u64> {
        let state = self.lock();
        (!state.frames.is_empty()).then_some(state.taken)
    }

    /// True once after frames were refused and the mailbox is empty again.
    pub fn wants_refill(&self) -> bool {
        let mut state = self.lock();
        if state.frames.is_empty() { std::mem::take(&mut state.has_refused) } else { false }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(mailbox: &Mailbox) -> Poll<Option<Bytes>> {
        mailbox.poll_take(&mut Context::from_waker(std::task::Waker::noop()))
    }

    #[test]
    fn a_full_mailbox_takes_no_more_but_its_last_frame() {
        let mailbox = Mailbox::default();
        let frame = Bytes::from(vec![0; 40 * 1024]);
        assert!(mailbox.put(std::slice::from_ref(&frame)));
        assert!(!mailbox.put(std::slice::from_ref(&frame)));
        mailbox.close(Bytes::from_static(b"end"));
        assert!(!mailbox.put(&[Bytes::from_static(b"late")]));
        assert_eq!(take(&mailbox), Poll::Ready(Some(frame)));
        assert_eq!(take(&mailbox), Poll::Ready(Some(Bytes::from_static(b"end"))));
        assert_eq!(take(&mailbox), Poll::Ready(None));
    }

    #[test]
    fn a_mailbox_that_was_shut_gives_nothing_more_out() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.put_one(Bytes::from_static(b"a")), Some(0));
        assert!(take(&mailbox).is_ready());
        assert_eq!(mailbox.put_one(Bytes::from_static(b"b")), Some(1));
        mailbox.shut();
        assert_eq!(take(&mailbox), Poll::Ready(None));
        assert_eq!((mailbox.taken(), mailbox.put_one(Bytes::from_static(b"c"))), (1, None));
    }
}
