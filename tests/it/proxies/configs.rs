//! Configurations: those that we ship, with nothing but addresses and paths replaced, and those
//! that a beginner would write.

use std::net::SocketAddr;
use std::path::Path;

use super::process::Kind;

/// How a proxy is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// The file in `deploy`.
    Shipped,
    /// A name for the replicas, and nothing else that was thought about.
    Defaults,
    /// The same, and everything is compressed.
    Compressing,
}

/// The configuration's text. What it replaces must be there.
pub fn write(kind: Kind, setup: Setup, to: &[SocketAddr], port: u16, folder: &Path) -> String {
    match (kind, setup) {
        (Kind::Nginx, Setup::Shipped) => shipped_nginx(to, port, folder),
        (Kind::Haproxy, Setup::Shipped) => shipped_haproxy(to, port),
        (Kind::Nginx, _) => plain_nginx(to, port, folder, setup == Setup::Compressing),
        (Kind::Haproxy, _) => plain_haproxy(to, port, setup == Setup::Compressing),
    }
}

/// Replaces `old`, which must be there `times` times.
fn replaced(text: &str, old: &str, new: &str, times: usize) -> String {
    assert_eq!(text.matches(old).count(), times, "{old} in the shipped file");
    text.replace(old, new)
}

/// Where nginx may write, for a user that is not root.
fn nginx_paths(folder: &Path) -> String {
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let folder = folder.display();
    kinds.map(|kind| format!("{kind}_temp_path {folder}/{kind};\n")).concat()
}

fn shipped_nginx(to: &[SocketAddr], port: u16, folder: &Path) -> String {
    let text = include_str!("../../../deploy/nginx.conf");
    let paths = nginx_paths(folder);
    let access = format!("{paths}    access_log {}/access.log main;", folder.display());
    let text = replaced(text, "access_log /var/log/nginx/access.log main;", &access, 1);
    let text = replaced(&text, "    resolver 127.0.0.11 valid=5s ipv6=off;\n", "", 1);
    let listen = format!("listen 127.0.0.1:{port} backlog");
    let text = replaced(&text, "listen 8080 backlog", &listen, 1);
    // For calls, and for streams.
    [" resolve max_fails=3 fail_timeout=2s;", " resolve max_fails=0;"].iter().fold(
        text,
        |text, rest| {
            let new_rest = rest.replace(" resolve", "");
            servers(&text, to, |name, address| {
                let old = format!("        server {name}:8000{rest}\n");
                (old, format!("        server {address}{new_rest}\n"))
            })
        },
    )
}

fn shipped_haproxy(to: &[SocketAddr], port: u16) -> String {
    let text = include_str!("../../../deploy/haproxy.cfg");
    let text = replaced(text, "bind :8080 backlog", &format!("bind 127.0.0.1:{port} backlog"), 1);
    servers(&text, to, |name, address| {
        let old = format!("    server {name} {name}:8000\n");
        (old, format!("    server {name} {address}\n"))
    })
}

/// Replaces the three `server` lines by those of `to`. `lines` gives the old and the new one for a
/// name and an address.
fn servers(
    text: &str,
    to: &[SocketAddr],
    lines: impl Fn(&str, &str) -> (String, String),
) -> String {
    assert!((1..=3).contains(&to.len()), "the file has three servers");
    (0..3).fold(text.to_owned(), |text, n| {
        let address = to.get(n).map(ToString::to_string).unwrap_or_default();
        let (old, new) = lines(&format!("taskwire-{}", n + 1), &address);
        replaced(&text, &old, if address.is_empty() { "" } else { &new }, 1)
    })
}

/// Nothing but `proxy_pass`: HTTP/1.0 to the replicas, a connection for each call, buffering,
/// timeouts of 60 s, headers with underscores dropped.
fn plain_nginx(to: &[SocketAddr], port: u16, folder: &Path, compresses: bool) -> String {
    let servers: Vec<_> = to.iter().map(|address| format!("server {address};\n")).collect();
    let servers = servers.concat();
    let gzip = if compresses {
        "gzip on; gzip_types *; gzip_proxied any; gzip_http_version 1.0;"
    } else {
        ""
    };
    format!(
        "events {{}}
        http {{
            access_log off;
            {paths} {gzip}
            upstream app {{ {servers} }}
            server {{
                listen 127.0.0.1:{port};
                location / {{ proxy_pass http://app; }}
            }}
        }}",
        paths = nginx_paths(folder),
    )
}

/// The timeouts of the file that Debian installs, and servers.
fn plain_haproxy(to: &[SocketAddr], port: u16, compresses: bool) -> String {
    let servers: Vec<_> = to
        .iter()
        .zip(1..)
        .map(|(address, n)| format!("    server app{n} {address} check\n"))
        .collect();
    let servers = servers.concat();
    let gzip = if compresses {
        "    compression algo gzip\n    compression type text/event-stream application/json\n"
    } else {
        ""
    };
    format!(
        "defaults
    mode http
    timeout connect 5000
    timeout client 50000
    timeout server 50000
frontend front
    bind 127.0.0.1:{port}
    default_backend app
backend app
{gzip}{servers}"
    )
}
