//! The wire between a replica and Postgres, to be cut, reset, stalled, slowed, or robbed of its
//! notifications. It reads the protocol's frames, so that it can tell which are which.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};

/// What happens to what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// New connections are closed.
    Refuse,
    /// Nothing passes, and nothing is closed: a half-open link.
    Stall,
    /// Each answer comes so much later.
    Delay(Duration),
    /// Notifications are dropped; with `canaries` those pass, so that the listener thinks all is well.
    Mute {
        canaries: bool,
    },
}

/// Whose connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    All,
    Listeners,
}

/// The wire of one replica.
pub struct Wire {
    pub address: SocketAddr,
    state: Arc<State>,
    /// Whoever breaks the wire holds this meanwhile.
    pub breaking: tokio::sync::Mutex<()>,
}

struct State {
    target: String,
    mode: watch::Sender<(Mode, Whose)>,
    /// Breaks the connections that are open; with a reset or without.
    broken: broadcast::Sender<(Whose, bool)>,
}

/// What is known of one connection.
#[derive(Default)]
struct Known {
    is_listener: AtomicBool,
    /// It began by asking for TLS, which Postgres answers by a single byte.
    asked_for_tls: AtomicBool,
}

impl Wire {
    /// A wire to `target`, from a free port of loopback.
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mode = watch::Sender::new((Mode::Pass, Whose::All));
        let state = Arc::new(State { target, mode, broken: broadcast::Sender::new(8) });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&shared).connect(near));
            }
        });
        Self { address, state, breaking: tokio::sync::Mutex::default() }
    }

    pub fn set(&self, mode: Mode, whose: Whose) {
        self.state.mode.send_replace((mode, whose));
    }

    /// Everything passes again.
    pub fn mend(&self) {
        self.set(Mode::Pass, Whose::All);
    }

    /// Breaks every connection, and each new one.
    pub fn cut(&self) {
        self.set(Mode::Refuse, Whose::All);
        self.cut_once(Whose::All, false);
    }

    /// Breaks the connections that are open; the next ones pass.
    pub fn cut_once(&self, whose: Whose, reset: bool) {
        let _ = self.state.broken.send((whose, reset));
    }
}

impl State {
    async fn connect(self: Arc<Self>, mut near: TcpStream) {
        let mut broken = self.broken.subscribe();
        if self.mode.borrow().0 == Mode::Refuse {
            return;
        }
        let Ok(mut far) = TcpStream::connect(&self.target).await else { return };
        // It must not add Nagle's 40 ms to every round trip.
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let known = Known::default();
        let reset = {
            let (near_read, near_write) = near.split();
            let (far_read, far_write) = far.split();
            let broken = async {
                loop {
                    match broken.recv().await {
                        Ok((Whose::Listeners, _)) if !known.listens() => {}
                        Ok((_, reset)) => return reset,
                        Err(_) => return false,
                    }
                }
            };
            tokio::select! {
                () = self.ask(&known, near_read, far_write) => false,
                () = self.answer(&known, far_read, near_write) => false,
                reset = broken => reset,
            }
        };
        if reset {
            let _ = (near.set_zero_linger(), far.set_zero_linger());
        }
    }

    fn mode_for(&self, known: &Known) -> Mode {
        let (mode, whose) = *self.mode.borrow();
        if whose == Whose::All || known.listens() { mode } else { Mode::Pass }
    }

    /// Returns when this connection is not stalled.
    async fn unstalled(&self, known: &Known) {
        let mut changes = self.mode.subscribe();
        while self.mode_for(known) == Mode::Stall {
            let _ = changes.changed().await;
        }
    }

    async fn ask(
        &self,
        known: &Known,
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
    ) {
        let mut bytes = vec![0; 64 * 1024];
        let mut passed = 0;
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            if passed < 1_024 {
                known.learn(&bytes[..count], passed == 0);
            }
            passed += count;
            self.unstalled(known).await;
            if to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    }

    async fn answer(
        &self,
        known: &Known,
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
    ) {
        let mut bytes = vec![0; 64 * 1024];
        let mut frames = Frames::default();
        let mut is_first = true;
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            self.unstalled(known).await;
            let mode = self.mode_for(known);
            if let Mode::Delay(delay) = mode {
                tokio::time::sleep(delay).await;
            }
            let mut piece = &bytes[..count];
            let mut out = Vec::with_capacity(count);
            if std::mem::take(&mut is_first) && known.asked_for_tls.load(Ordering::Relaxed) {
                out.push(piece[0]);
                piece = &piece[1..];
            }
            frames.pass(piece, &mut out, |payload| match mode {
                Mode::Mute { canaries } => canaries && payload.starts_with(b"canary"),
                _ => true,
            });
            if to.write_all(&out).await.is_err() {
                return;
            }
        }
    }
}

impl Known {
    fn listens(&self) -> bool {
        self.is_listener.load(Ordering::Relaxed)
    }

    /// From the first bytes that a client sends.
    fn learn(&self, bytes: &[u8], is_first: bool) {
        if is_first && bytes.starts_with(&[0, 0, 0, 8, 4, 210, 22, 47]) {
            self.asked_for_tls.store(true, Ordering::Relaxed);
        }
        let name = b"taskwire listener";
        if bytes.windows(name.len()).any(|part| part == name) {
            self.is_listener.store(true, Ordering::Relaxed);
        }
    }
}

/// The server's messages: a type, a length that counts itself, a body.
#[derive(Default)]
struct Frames {
    /// Of a message that is being looked at: its head, and of a notification all of it.
    held: Vec<u8>,
    /// Bytes of a message that pass unseen.
    unseen: usize,
}

impl Frames {
    /// Adds to `out` what passes. `wanted` is asked with each notification's payload.
    fn pass(&mut self, mut bytes: &[u8], out: &mut Vec<u8>, wanted: impl Fn(&[u8]) -> bool) {
        while !bytes.is_empty() {
            if self.unseen > 0 {
                let (now, rest) = bytes.split_at(self.unseen.min(bytes.len()));
                out.extend(now);
                self.unseen -= now.len();
                bytes = rest;
                continue;
            }
            self.held.push(bytes[0]);
            bytes = &bytes[1..];
            let [kind, a, b, c, d, ..] = self.held[..] else { continue };
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            if kind != b'A' {
                out.append(&mut self.held);
                self.unseen = length.saturating_sub(4);
            } else if self.held.len() == length + 1 {
                // Type and length, the sender's pid, the channel, the payload.
                let rest = &self.held[9..];
                let channel = rest.iter().position(|byte| *byte == 0).unwrap_or_default();
                if wanted(rest.get(channel + 1..).unwrap_or_default()) {
                    out.extend(&self.held);
                }
                self.held.clear();
            }
        }
    }
}

#[test]
fn the_wire_drops_announcements_and_nothing_else_however_the_bytes_are_split() {
    let message = |kind: u8, body: &[u8]| {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[kind], &length.to_be_bytes()[..], body].concat()
    };
    let canary = message(b'A', b"\0\0\0\x07taskwire\0canary x 1\0");
    let tasks = message(b'A', b"\0\0\0\x07taskwire\0tasks y\0");
    let (row, ready) = (message(b'D', b"A\0\0\0\x04"), message(b'Z', b"I"));
    let all = [&row[..], &tasks, &canary, &ready, &tasks, &row].concat();
    let left = [&row[..], &canary, &ready, &row].concat();
    for size in 1..=all.len() {
        let (mut frames, mut out) = (Frames::default(), Vec::new());
        for piece in all.chunks(size) {
            frames.pass(piece, &mut out, |payload| payload.starts_with(b"canary"));
        }
        assert_eq!(out, left, "in pieces of {size}");
    }
}
