//! A TCP proxy between clients and a replica that breaks what passes through it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// What a gremlin may do to a piece of what passes: a request or an answer, or a part of a long one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trick {
    /// The answer is cut after some bytes, which may be none.
    CutAnswer,
    /// The same, and both ends get a reset.
    ResetAnswer,
    /// The request is cut after some bytes.
    CutRequest,
    /// The client is gone while the server is at it.
    HangUp,
    /// Nothing passes for as long as the gremlin plays this.
    Stall,
}

/// Which tricks are played, and on how many of a hundred pieces.
#[derive(Clone, Debug, Default)]
pub struct Mischief {
    pub tricks: Vec<Trick>,
    pub percent: u32,
}

/// The proxy. Without mischief it passes everything on.
pub struct Gremlin {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    target: Mutex<Option<SocketAddr>>,
    mischief: Mutex<Mischief>,
    rng: Mutex<StdRng>,
    /// Pieces broken so far: answers, and others.
    cuts: [AtomicUsize; 2],
    /// Breaks the connections that are open.
    cut_all: Notify,
    /// Connections older than this are cut.
    age_max: watch::Sender<Option<Duration>>,
}

/// How a connection ends.
enum End {
    Quietly,
    Cut { reset: bool },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Request,
    Answer,
}

impl Gremlin {
    /// A proxy to nowhere yet, on a free port of loopback.
    pub async fn new(rng: StdRng) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            target: Mutex::default(),
            mischief: Mutex::default(),
            rng: Mutex::new(rng),
            cuts: Default::default(),
            cut_all: Notify::new(),
            age_max: watch::Sender::new(None),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&shared).connect(near));
            }
        });
        Self { address, state }
    }

    /// Where new connections lead; `None`: they are closed.
    pub fn lead_to(&self, target: Option<SocketAddr>) {
        *lock(&self.state.target) = target;
    }

    pub fn play(&self, tricks: &[Trick], percent: u32) {
        *lock(&self.state.mischief) = Mischief { tricks: tricks.to_vec(), percent };
    }

    pub fn behave(&self) {
        self.play(&[], 0);
    }

    /// Breaks every connection.
    pub fn cut_all(&self) {
        self.state.cut_all.notify_waiters();
    }

    /// From now on every connection is cut at this age, as by a proxy's limit.
    pub fn cut_at_age(&self, age: Option<Duration>) {
        self.state.age_max.send_replace(age);
    }

    /// How many answers were broken so far, and how many requests.
    pub fn cuts(&self) -> [usize; 2] {
        [0, 1].map(|side| self.state.cuts[side].load(Ordering::Relaxed))
    }
}

impl State {
    async fn connect(self: Arc<Self>, mut near: TcpStream) {
        let cut_all = self.cut_all.notified();
        let Some(target) = *lock(&self.target) else { return };
        let Ok(mut far) = TcpStream::connect(target).await else { return };
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let end = {
            let (mut near_read, mut near_write) = near.split();
            let (mut far_read, mut far_write) = far.split();
            tokio::select! {
                end = self.forward(Side::Request, &mut near_read, &mut far_write) => end,
                end = self.forward(Side::Answer, &mut far_read, &mut near_write) => end,
                () = cut_all => End::Cut { reset: false },
                () = self.too_old() => End::Cut { reset: false },
            }
        };
        if let End::Cut { reset: true } = end {
            let _ = (near.set_zero_linger(), far.set_zero_linger());
        }
    }

    async fn forward(
        &self,
        side: Side,
        from: &mut (impl AsyncReadExt + Unpin),
        to: &mut (impl AsyncWriteExt + Unpin),
    ) -> End {
        let mut bytes = vec![0; 64 * 1024];
        loop {
            let count = match from.read(&mut bytes).await {
                Ok(0) | Err(_) => return End::Quietly,
                Ok(count) => count,
            };
            while self.is_stalled() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let Some((trick, kept, pause)) = self.choose(side, count) else {
                if to.write_all(&bytes[..count]).await.is_err() {
                    return End::Quietly;
                }
                continue;
            };
            self.cuts[usize::from(side == Side::Request)].fetch_add(1, Ordering::Relaxed);
            let _ = to.write_all(&bytes[..kept]).await;
            // How far the server gets in the meantime is the point.
            tokio::time::sleep(pause).await;
            return End::Cut { reset: trick == Trick::ResetAnswer };
        }
    }

    /// Returns when a connection that begins now is too old.
    async fn too_old(&self) {
        let begun = tokio::time::Instant::now();
        let mut limit = self.age_max.subscribe();
        loop {
            let age = *limit.borrow_and_update();
            let too_old = async {
                match age {
                    Some(age) => tokio::time::sleep_until(begun + age).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = too_old => return,
                changed = limit.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn is_stalled(&self) -> bool {
        lock(&self.mischief).tricks == [Trick::Stall]
    }

    /// Whether to break this piece: how, after how many bytes, and how long after those.
    fn choose(&self, side: Side, count: usize) -> Option<(Trick, usize, Duration)> {
        let mischief = lock(&self.mischief).clone();
        let ours = |trick: &Trick| match trick {
            Trick::CutAnswer | Trick::ResetAnswer => side == Side::Answer,
            Trick::CutRequest | Trick::HangUp => side == Side::Request,
            Trick::Stall => false,
        };
        let tricks: Vec<Trick> = mischief.tricks.into_iter().filter(ours).collect();
        let mut rng = lock(&self.rng);
        if tricks.is_empty() || rng.random_range(0..100) >= mischief.percent {
            return None;
        }
        let trick = tricks[rng.random_range(0..tricks.len())];
        Some(match trick {
            Trick::HangUp => (trick, count, Duration::from_micros(rng.random_range(0..6_000))),
            // A quarter of them before the first byte.
            _ if rng.next_u32().is_multiple_of(4) => (trick, 0, Duration::ZERO),
            _ => (trick, rng.random_range(0..count), Duration::ZERO),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
