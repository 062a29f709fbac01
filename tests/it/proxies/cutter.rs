//! A proxy that cuts each connection at a certain age, as Envoy does with a route's default timeout.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// The proxy.
pub struct Cutter {
    pub address: SocketAddr,
    /// Connections that reached the age.
    pub cuts: Arc<AtomicUsize>,
}

impl Cutter {
    /// Leads each new connection to the next of some servers, and cuts it at `age`.
    pub async fn to(servers: Vec<SocketAddr>, age: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cuts = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&cuts);
        tokio::spawn(async move {
            for server in servers.into_iter().cycle() {
                let Ok((mut near, _)) = listener.accept().await else { return };
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(server).await else { return };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let passing = copy_bidirectional(&mut near, &mut far);
                    if tokio::time::timeout(age, passing).await.is_err() {
                        count.fetch_add(1, Relaxed);
                    }
                });
            }
        });
        Self { address, cuts }
    }
}
