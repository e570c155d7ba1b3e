use super::*;
use crate::codec::{Packet, VERSION};
use crate::{Connection as Fpc, ConnectionError, Message, Sink};
use std::net::TcpListener;
use std::thread;
use towpath_lab::{Authority, Files, Validity, relay};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("towpath-tls-{}-{name}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn identity(files: Files, peer: &str) -> Identity {
    let Files { certificate, key, authority } = files;
    Identity { certificate, key, authority, peer: peer.parse().unwrap() }
}

/// Those of the cache manager's host and of the fast path manager's, which know each other.
fn identities(folder: &Folder) -> (Identity, Identity) {
    let authority = Authority::new(&folder.0.display().to_string()).unwrap();
    let of = |name, peer| identity(authority.certify(&folder.0, name, Validity::Now).unwrap(), peer);
    (of("cm.example", "fpm.example"), of("fpm.example", "cm.example"))
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (here, listener.accept().unwrap().0)
}

/// What each end says of a session between them, up to FPC's hello.
fn meet(cm: Identity, fpm: Identity) -> (Result<Fpc, String>, Result<Fpc, String>) {
    let (there, here) = tcp();
    let open = |stream: Result<Stream, TlsError>| {
        Fpc::open(stream.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
    };
    let cm = thread::spawn(move || open(cm.connect(there)));
    let fpm = open(fpm.accept(here));
    (cm.join().unwrap(), fpm)
}

fn refused(cm: Identity, fpm: Identity) -> [String; 2] {
    let (cm, fpm) = meet(cm, fpm);
    [cm.err().expect("refused by the FPM"), fpm.err().expect("refused by the CM")]
}

#[test]
fn both_ends_send_at_once() {
    const COUNT: u32 = 50_000;
    let folder = Folder::new("both");
    let (cm, fpm) = identities(&folder);
    let (cm, fpm) = meet(cm, fpm);
    let work = |mut connection: Fpc| {
        let mut sender = connection.sender;
        let sending = thread::spawn(move || {
            (0..COUNT).for_each(|index| sender.send(Message::PortDelete(index)).unwrap());
            sender.flush().unwrap();
            sender
        });
        for index in 0..COUNT {
            let frame = connection.receiver.next().unwrap().unwrap();
            assert_eq!(frame.packet, Packet::Message(Message::PortDelete(index)));
        }
        (sending.join().unwrap(), connection.receiver)
    };
    let (cm, fpm) = (cm.unwrap(), fpm.unwrap());
    let there = thread::spawn(move || work(cm));
    let (_sender, mut receiver) = work(fpm);
    let (mut sender, _) = there.join().unwrap();
    sender.bye("done");
    assert!(matches!(receiver.next(), Err(ConnectionError::Refused(why)) if why == "done"));
}

#[test]
fn who_reads_nothing_does_not_keep_what_it_sends_from_being_read() {
    let folder = Folder::new("full");
    let (cm, fpm) = identities(&folder);
    let (cm, fpm) = meet(cm, fpm);
    let (mut cm, mut fpm) = (cm.unwrap(), fpm.unwrap());
    let writer = thread::spawn(move || {
        while fpm.sender.push(Packet::Bye("x".repeat(1000)), false).and_then(|_| fpm.sender.flush_frames()).is_ok() {}
    });
    // Whatever the network takes, it is full before the end.
    for index in 0..10_000 {
        cm.sender.send(Message::PortDelete(index)).unwrap();
        cm.sender.flush().unwrap();
        assert_eq!(fpm.receiver.next().unwrap().unwrap().packet, Packet::Message(Message::PortDelete(index)));
    }
    drop(cm);
    writer.join().unwrap();
}

#[test]
fn strangers_are_refused_with_a_reason_on_both_ends() {
    let folder = Folder::new("strangers");
    let (cm, fpm) = identities(&folder);
    let elsewhere = Folder::new("elsewhere");
    let (stranger, _) = identities(&elsewhere);
    let authority = Authority::new("one for all names").unwrap();
    let others = Folder::new("others");
    let of = |name: &str, validity| {
        let folder = others.0.join(format!("{name}-{}", validity == Validity::Now));
        let peer = if name == "fpm.example" { "cm.example" } else { "fpm.example" };
        identity(authority.certify(&folder, name, validity).unwrap(), peer)
    };
    let good = |name| of(name, Validity::Now);
    let old = |name| of(name, Validity::Past);
    let refusals = [
        // One that trusts this authority, and is not known to it
        (Identity { authority: cm.authority.clone(), ..stranger.clone() }, fpm.clone(), "UnknownCA", "UnknownIssuer"),
        (Identity { authority: stranger.authority, ..cm.clone() }, fpm.clone(), "UnknownIssuer", "UnknownCA"),
        (old("cm.example"), good("fpm.example"), "CertificateExpired", "expired"),
        (good("cm.example"), old("fpm.example"), "expired", "CertificateExpired"),
        (good("other.example"), good("fpm.example"), "", "other.example"),
        (Identity { peer: "other.example".parse().unwrap(), ..cm }, fpm, "fpm.example", "BadCertificate"),
    ];
    for (cm, fpm, at_cm, at_fpm) in refusals {
        let [cm, fpm] = refused(cm, fpm);
        assert!(cm.contains(at_cm), "{at_cm:?} is missing in {cm}");
        assert!(fpm.contains(at_fpm), "{at_fpm:?} is missing in {fpm}");
    }
}

/// What the FPM says of whoever sends this.
fn answer(fpm: Identity, send: impl FnOnce(&mut TcpStream)) -> String {
    let (mut there, here) = tcp();
    let fpm = thread::spawn(move || fpm.accept(here).map(drop));
    send(&mut there);
    // It may have been cut already.
    let _ = there.shutdown(Shutdown::Write);
    fpm.join().unwrap().expect_err("no session").to_string()
}

#[test]
fn one_without_a_certificate_is_refused() {
    let folder = Folder::new("none");
    let (cm, fpm) = identities(&folder);
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(cm.roots().unwrap())
        .with_no_client_auth();
    let why = answer(fpm, |tcp| {
        let tls = ClientConnection::new(Arc::new(config), cm.peer.0.clone()).unwrap();
        drop(Stream::open(tls.into(), tcp.try_clone().unwrap()));
    });
    assert_eq!(why, "TLS: peer sent no certificates");
}

#[test]
fn what_is_no_tls_is_refused_at_once() {
    let folder = Folder::new("garbage");
    let (_, fpm) = identities(&folder);
    let begin = Instant::now();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100_000], &[0xff; 100_000], &[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 9]] {
        let why = answer(fpm.clone(), |tcp| drop(tcp.write_all(bytes)));
        assert!(why.contains("corrupt") || why.contains("peer"), "{why}");
    }
    assert!(begin.elapsed() < HANDSHAKE, "{:?}", begin.elapsed());
    assert_eq!(answer(fpm.clone(), |_| {}), TlsError::CutOff.to_string());
    assert_eq!(answer(fpm, |tcp| drop(tcp.write_all(&[0x16, 3, 1]))), TlsError::CutOff.to_string());
}

#[test]
fn one_that_says_nothing_is_not_waited_for() {
    let folder = Folder::new("slow");
    let (_, fpm) = identities(&folder);
    let why = answer(fpm, |tcp| drop(tcp.read(&mut [0; 8])));
    assert_eq!(why, TlsError::Slow.to_string());
}

#[test]
fn what_was_recorded_opens_nothing_and_what_is_changed_ends_all() {
    let folder = Folder::new("replay");
    let (cm, fpm) = identities(&folder);
    let ((there, near), (far, here)) = (tcp(), tcp());
    let recorder = thread::spawn(move || relay(near, far).unwrap());
    let session = thread::spawn(move || {
        let mut connection = Fpc::open(cm.connect(there).unwrap()).unwrap();
        connection.sender.send(Message::PortDelete(7)).unwrap();
        connection.sender.bye("done");
    });
    let mut connection = Fpc::open(fpm.accept(here).unwrap()).unwrap();
    assert_eq!(connection.receiver.next().unwrap().unwrap().packet, Packet::Message(Message::PortDelete(7)));
    assert!(matches!(connection.receiver.next(), Err(ConnectionError::Refused(_))));
    connection.sender.bye("done");
    session.join().unwrap();
    let recorded = recorder.join().unwrap();
    assert!(recorded.len() > 100, "{}", recorded.len());

    let why = answer(fpm.clone(), |tcp| drop(tcp.write_all(&recorded)));
    assert_eq!(why, "TLS: cannot decrypt peer's message", "the keys are others");
}

#[test]
fn a_record_twice_or_in_part_ends_the_session() {
    let folder = Folder::new("records");
    for (spoil, words) in [
        ((|record: &[u8]| record.repeat(2)) as fn(&[u8]) -> Vec<u8>, "cannot decrypt"),
        (|record| record[..record.len() / 2].into(), "cut off"),
        (|record| record.iter().map(|byte| byte ^ 0x80).collect(), "TLS"),
        (|_| b"plain text that belongs to no session".to_vec(), "TLS"),
    ] {
        let (cm, fpm) = identities(&folder);
        let (cm, fpm) = meet(cm, fpm);
        let (cm, mut fpm) = (cm.unwrap(), fpm.unwrap());
        let Ok(crate::stream::Stream::Tls(Stream(session, _))) = cm.sender.handle() else { panic!("it is TLS") };
        let mut frames = Vec::new();
        let packet = Packet::Message(Message::PortDelete(7));
        crate::codec::encode(&crate::codec::Frame { sequence: 1, report: false, packet }, &mut frames).unwrap();
        let mut record = Vec::new();
        session.tls().writer().write_all(&frames).unwrap();
        session.tls().write_tls(&mut record).unwrap();
        (&session.tcp).write_all(&spoil(&record)).unwrap();
        session.tcp.shutdown(Shutdown::Write).unwrap();
        let end = loop {
            match fpm.receiver.next() {
                Ok(Some(frame)) => assert_eq!(frame.packet, Packet::Message(Message::PortDelete(7))),
                Ok(None) => panic!("an orderly end"),
                Err(error) => break error.to_string(),
            }
        };
        assert!(end.contains(words), "{words:?} is missing in {end}");
    }
}

#[test]
fn another_version_of_fpc_is_told_why() {
    let folder = Folder::new("version");
    let (cm, fpm) = identities(&folder);
    let (there, here) = tcp();
    let other = thread::spawn(move || {
        let mut stream = cm.connect(there).unwrap();
        let mut hello = Vec::new();
        let packet = Packet::Hello(crate::codec::Hello { magic: crate::codec::MAGIC, version: VERSION + 1 });
        crate::codec::encode(&crate::codec::Frame { sequence: 0, report: false, packet }, &mut hello).unwrap();
        // More than is read of it
        stream.write_all(&[hello, vec![0; 50_000]].concat()).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    let ours = Fpc::open(fpm.accept(here).unwrap()).err().expect("refused");
    assert!(matches!(ours, ConnectionError::Version { theirs } if theirs == VERSION + 1));
    let said = other.join().unwrap();
    assert!(said.contains(&format!("version {}", VERSION + 1)), "{said:?}");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = Folder::new("files");
    let (cm, fpm) = identities(&folder);
    cm.check().unwrap();
    let says = |identity: &Identity, path: &Path, words: &[&str]| {
        let why = identity.check().expect_err("wrong").to_string();
        let name = path.display().to_string();
        for word in [&[name.as_str()], words].concat() {
            assert!(why.contains(word), "{word:?} is missing in {why}");
        }
    };
    let missing = folder.0.join("missing");
    says(&Identity { certificate: missing.clone(), ..cm.clone() }, &missing, &["cannot read", "No such file"]);
    says(&Identity { key: missing.clone(), ..cm.clone() }, &missing, &["cannot read"]);
    says(&Identity { authority: missing.clone(), ..cm.clone() }, &missing, &["cannot read"]);
    let empty = folder.0.join("empty");
    std::fs::write(&empty, "no PEM").unwrap();
    std::fs::set_permissions(&empty, std::fs::Permissions::from_mode(0o600)).unwrap();
    says(&Identity { certificate: empty.clone(), ..cm.clone() }, &empty, &["holds no certificate in PEM"]);
    says(&Identity { key: empty.clone(), ..cm.clone() }, &empty, &["holds no private key in PEM"]);
    says(&Identity { authority: empty.clone(), ..cm.clone() }, &empty, &["holds no certificate in PEM"]);
    says(&Identity { key: fpm.key.clone(), ..cm.clone() }, &fpm.key, &["cannot be used", "KeyMismatch"]);
    std::fs::set_permissions(&cm.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    says(&cm, &cm.key, &["may be read by everyone", "mode 644", "chmod o= "]);
}
