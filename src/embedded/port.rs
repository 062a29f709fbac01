//! Ports of the loopback interface, where PostgreSQL listens.

use super::error::Error;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// The longest a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// Whether somebody accepts connections there.
pub(super) fn accepts(port: u16) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok()
}

/// Whether nobody uses the port now.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// A port that nobody uses now. Somebody may take it before PostgreSQL does; then another is
/// tried.
pub(super) fn find_free() -> Result<u16, Error> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| Error::new(format!("No port is free on the loopback interface: {error}.")))
}
