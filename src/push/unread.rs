//! How much of its stream a worker may not have read yet (protocol S8): pure bookkeeping.
//!
//! A worker that executes inside its read loop does not read for hours. Whatever happens meanwhile,
//! what is on its way to it must fit into its socket, or the stream would be closed under a worker that
//! is well, and its claims would lapse. The receive window of a fresh Linux socket is 64 KiB. So this
//! counts the bytes that were sent, and how far the worker is *proven* to have read:
//!
//! ```text
//!   0 .. 40 KiB   announcements that the worker may not have read
//!     .. 48 KiB   the same, for a task of a higher priority than all that is held back
//!     .. 60 KiB   keepalives too: 33 bytes every 30 s, and none any more when they would go beyond
//!     .. 64 KiB   what is always sent: cancellations, and the error before the end
//! ```
//!
//! The only proof is that the worker tries to claim a task by its id: then it has read as far as the
//! end of that announcement. Whoever reads and finds no keepalive takes the connection for dead and
//! opens a new one; whoever does not read misses none.

/// Bytes of announcements that a worker may not have read yet. More than the largest announcement, two
/// frames of 16 KiB, and [`REPEATED_BYTES_MAX`] together.
pub const UNREAD_BYTES_MAX: u64 = 40 * 1024;
/// The same, for a task of a higher priority than all that is held back.
const URGENT_BYTES_MAX: u64 = 48 * 1024;
/// All bytes that may be on their way before even keepalives are left out.
const ALL_BYTES_MAX: u64 = 60 * 1024;
/// Of the announcements, those that repeat one that may not have been read: which of the two a worker
/// has read when it claims the task cannot be told, so they prove nothing.
const REPEATED_BYTES_MAX: u64 = 8 * 1024;
/// What the transport adds to a frame: the length and the line ends of a chunk, or a frame's head.
const FRAME_OVERHEAD_BYTES: usize = 9;

/// A place in a stream, in bytes from its beginning. Later places are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Of announcements.
    tasks: u64,
    /// Of everything else.
    others: u64,
    /// Of announcements that prove nothing; they are among `tasks` too.
    repeated: u64,
}

/// What one stream has sent, and how far its worker has read.
#[derive(Debug, Default)]
pub struct Unread {
    sent: Mark,
    read: Mark,
}

/// Bytes that frames of so many bytes take on their way.
#[must_use]
pub fn on_the_way<'a>(frames: impl IntoIterator<Item = &'a bytes::Bytes>) -> u64 {
    frames.into_iter().map(|frame| (frame.len() + FRAME_OVERHEAD_BYTES) as u64).sum()
}

impl Unread {
    /// Whether an announcement may be sent. `earlier`: one of the same task may not have been read.
    #[must_use]
    pub fn fits(&self, bytes: u64, is_urgent: bool, earlier: Option<Mark>) -> bool {
        let most = if is_urgent { URGENT_BYTES_MAX } else { UNREAD_BYTES_MAX };
        let repeated = self.sent.repeated - self.read.repeated;
        self.tasks() + bytes <= most
            && self.all() + bytes <= ALL_BYTES_MAX
            && (earlier.is_none() || repeated + bytes <= REPEATED_BYTES_MAX)
    }

    /// Notes an announcement that was sent; the place up to which a claim of its task proves reading.
    pub fn announced(&mut self, bytes: u64, earlier: Option<Mark>) -> Mark {
        self.sent.tasks += bytes;
        if earlier.is_some() {
            self.sent.repeated += bytes;
        }
        earlier.unwrap_or(self.sent)
    }

    /// Notes something else that was sent.
    pub fn sent_other(&mut self, bytes: u64) {
        self.sent.others += bytes;
    }

    /// Whether so many bytes that are of no account may be sent.
    #[must_use]
    pub fn has_room_for_others(&self, bytes: u64) -> bool {
        self.all() + bytes <= ALL_BYTES_MAX
    }

    /// The worker has read up to there. Whether that is news.
    pub fn prove(&mut self, mark: Mark) -> bool {
        let is_news = mark > self.read;
        self.read = self.read.max(mark);
        is_news
    }

    /// The worker has read all that was sent.
    pub fn prove_all(&mut self) {
        self.read = self.sent;
    }

    /// Bytes of announcements that may be sent.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        let announced = UNREAD_BYTES_MAX.saturating_sub(self.tasks());
        announced.min(ALL_BYTES_MAX.saturating_sub(self.all()))
    }

    /// Whether the worker is known to have read up to there.
    #[must_use]
    pub fn is_read(&self, mark: Mark) -> bool {
        mark <= self.read
    }

    /// Whether a quarter is free: worth asking Postgres for more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.tasks() * 4 <= UNREAD_BYTES_MAX * 3
    }

    fn tasks(&self) -> u64 {
        self.sent.tasks - self.read.tasks
    }

    fn all(&self) -> u64 {
        self.tasks() + self.sent.others - self.read.others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    #[test]
    fn announcements_stop_at_40_kib_and_urgent_ones_at_48() {
        let mut unread = Unread::default();
        for _ in 0..40 {
            assert!(unread.fits(KIB, false, None));
            unread.announced(KIB, None);
        }
        assert!(!unread.fits(1, false, None));
        assert!(unread.fits(8 * KIB, true, None));
        assert!(!unread.fits(8 * KIB + 1, true, None));
    }

    #[test]
    fn a_claim_proves_reading_up_to_the_end_of_its_announcement_whatever_the_order() {
        let mut unread = Unread::default();
        let first = unread.announced(10 * KIB, None);
        unread.sent_other(KIB);
        let second = unread.announced(10 * KIB, None);
        let third = unread.announced(20 * KIB, None);
        assert!(unread.prove(second) && unread.is_read(first) && !unread.is_read(third));
        assert!(!unread.prove(first), "it has read further already");
        assert_eq!((unread.tasks(), unread.all()), (20 * KIB, 20 * KIB));
    }

    #[test]
    fn repeats_of_what_may_be_unread_leave_room_for_the_largest_announcement() {
        let mut unread = Unread::default();
        let first = unread.announced(KIB, None);
        let mut repeats = 0;
        while unread.fits(KIB, false, Some(first)) {
            assert_eq!(unread.announced(KIB, Some(first)), first);
            repeats += 1;
        }
        assert_eq!(repeats, 8);
        // All of it was read, but no more than the first one can be proven.
        unread.prove(first);
        assert!(unread.fits(32 * KIB, false, None));
    }

    #[test]
    fn keepalives_stop_before_the_socket_is_full_and_come_back_with_a_proof() {
        let mut unread = Unread::default();
        let mark = unread.announced(40 * KIB, None);
        let mut hours = 0.0;
        while unread.has_room_for_others(42) {
            unread.sent_other(42);
            hours += 30.0 / 3600.0;
        }
        assert!((4.0..5.0).contains(&hours), "{hours}");
        assert!(unread.all() <= ALL_BYTES_MAX && !unread.fits(42, true, None));
        unread.prove(mark);
        assert!(unread.has_room_for_others(42) && unread.fits(32 * KIB, false, None));
    }
}
