//! A TCP link to Postgres with faults: slow, silent without a word (half-open), or reset.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::TestDb;

/// Bytes that are passed on at a time.
const CHUNK_BYTES: usize = 16 * 1024;

/// What is wrong with the link. A number `n` means the connections up to the `n`th.
#[derive(Clone, Copy, Default)]
struct Faults {
    /// Connections made so far.
    made: u64,
    /// Nothing of what the server sends to Postgres arrives.
    deaf: u64,
    /// Nothing of what Postgres sends to the server arrives.
    mute: u64,
    /// Closed with RST.
    reset: u64,
    /// How long each chunk travels, each way.
    delay: Duration,
}

/// The link, in the place of the database's own address.
pub struct FaultyLink {
    pub url: String,
    faults: Arc<watch::Sender<Faults>>,
    target: Arc<Mutex<String>>,
}

#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

impl FaultyLink {
    pub async fn to(db: &TestDb) -> Self {
        Self::to_url(&db.url).await
    }

    pub async fn to_url(url: &str) -> Self {
        let (front, rest) = url.rsplit_once('@').unwrap();
        let (target, path) = rest.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let faults = Arc::new(watch::Sender::new(Faults::default()));
        let target = Arc::new(Mutex::new(target.to_owned()));
        tokio::spawn(accept(listener, Arc::clone(&target), Arc::clone(&faults)));
        Self { url: format!("{front}@{address}/{path}"), faults, target }
    }

    /// From now on it leads to another server, as after a failover.
    pub fn lead_to(&self, target: String) {
        *self.target.lock().unwrap() = target;
        self.reset();
    }

    /// Every open connection passes nothing more, in one direction or both, and nobody is told.
    pub fn silence(&self, to_postgres: bool, from_postgres: bool) {
        self.faults.send_modify(|faults| {
            faults.deaf = if to_postgres { faults.made } else { faults.deaf };
            faults.mute = if from_postgres { faults.made } else { faults.mute };
        });
    }

    /// New connections pass nothing either, until [`Self::mend`].
    pub fn silence_new(&self) {
        self.faults.send_modify(|faults| (faults.deaf, faults.mute) = (u64::MAX, u64::MAX));
    }

    /// New connections work again; those that went silent stay so.
    pub fn mend(&self) {
        self.silence(true, true);
    }

    /// Every open connection is reset.
    pub fn reset(&self) {
        self.faults.send_modify(|faults| faults.reset = faults.made);
    }

    /// How long everything takes from now on, each way.
    pub fn delay(&self, delay: Duration) {
        self.faults.send_modify(|faults| faults.delay = delay);
    }
}

async fn accept(
    listener: TcpListener,
    target: Arc<Mutex<String>>,
    faults: Arc<watch::Sender<Faults>>,
) {
    while let Ok((near, _)) = listener.accept().await {
        let target = target.lock().unwrap().clone();
        let Ok(far) = TcpStream::connect(target).await else {
            continue;
        };
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        faults.send_modify(|faults| faults.made += 1);
        let number = faults.borrow().made;
        tokio::spawn(carry(near, far, number, faults.subscribe()));
    }
}

async fn carry(
    mut near: TcpStream,
    mut far: TcpStream,
    number: u64,
    mut faults: watch::Receiver<Faults>,
) {
    let is_reset = {
        let watched = faults.clone();
        let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
        tokio::select! {
            () = pass(near_in, far_out, Way::Up, number, watched.clone()) => false,
            () = pass(far_in, near_out, Way::Down, number, watched) => false,
            _ = faults.wait_for(|faults| faults.reset >= number) => true,
        }
    };
    if is_reset {
        // Closing is a reset then, and no orderly end.
        let _ = socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO));
    }
}

/// Passes bytes on until either side ends; once silent, it holds the sockets open for ever.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    number: u64,
    faults: watch::Receiver<Faults>,
) {
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(length @ 1..) = from.read(&mut chunk).await {
        let now = *faults.borrow();
        tokio::time::sleep(now.delay).await;
        let silent_up_to = match way {
            Way::Up => faults.borrow().deaf,
            Way::Down => faults.borrow().mute,
        };
        if number <= silent_up_to {
            // What comes is read and lost, and no end is passed on.
            std::future::pending::<()>().await;
        }
        if to.write_all(&chunk[..length]).await.is_err() {
            return;
        }
    }
    let silent = |faults: &Faults| number <= faults.deaf || number <= faults.mute;
    if silent(&faults.borrow()) {
        std::future::pending::<()>().await;
    }
}
