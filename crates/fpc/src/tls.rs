//! TLS 1.3 over TCP with a certificate at each end, both signed by one authority and each for a name that the other end
//! asks for. Sessions are never resumed, so what was recorded of one is nothing to another.
//!
//! One thread may read while another writes. Whoever works on the session's state holds its lock only while bytes are put
//! into records or taken out of them; nobody waits for the network under it.

use rustix::net::sockopt;
use rustls::client::{Resumption, verify_server_name};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The whole handshake has to be done in this time.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A link that carries nothing for so long is dead.
const DEAD: Duration = Duration::from_secs(5);
/// How long and for how many bytes the other end is listened to after the end, so that it can read why.
const PARTING: (Duration, usize) = (Duration::from_secs(1), 1 << 16);
/// No file of certificates is larger.
const LARGEST: u64 = 1 << 20;
/// Bytes that are read at once.
const CHUNK: usize = 16 * 1024;

/// Why there is no session with another host.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// Which
        path: PathBuf,
        /// The system's words
        error: io::Error,
    },
    /// A key that is no secret
    #[error("{} may be read by everyone (mode {mode:o}); run: chmod o= {}", path.display(), path.display())]
    Exposed {
        /// The key's file
        path: PathBuf,
        /// Its permissions
        mode: u32,
    },
    /// A file that does not hold what it should
    #[error("{} holds no {what} in PEM ({error})", path.display())]
    NoPem {
        /// Which
        path: PathBuf,
        /// What it should hold
        what: &'static str,
        /// Why it does not
        error: pem::Error,
    },
    /// A file whose contents cannot be used
    #[error("{} cannot be used: {error}", path.display())]
    Unusable {
        /// Which
        path: PathBuf,
        /// Why
        error: String,
    },
    /// What this end cannot accept, or the other end could not
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The other end does not speak TLS, or too slowly
    #[error("no TLS handshake within {} s", HANDSHAKE.as_secs())]
    Slow,
    /// The other end left before the handshake was done
    #[error("the other end closed the connection during the TLS handshake")]
    CutOff,
    /// TCP failed
    #[error("TCP: {0}")]
    Tcp(#[from] io::Error),
}

/// Who this end is, and who the other end has to be. The files are read anew for each session, so those that were renewed
/// hold from the next one on.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This end's certificate in PEM, with those that lead to the authority's
    pub certificate: PathBuf,
    /// Its private key in PEM
    pub key: PathBuf,
    /// The authority's certificate in PEM
    pub authority: PathBuf,
    /// What the other end's certificate has to be for
    pub peer: Name,
}

/// A host's name, or address, as a certificate has it (subjectAltName).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Name(ServerName<'static>);

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = ServerName::try_from(text.to_owned());
        name.map(Self).map_err(|_| format!("{text:?} is neither the name of a host nor an address"))
    }
}

impl Identity {
    /// Finds out whether the files can be used.
    pub fn check(&self) -> Result<(), TlsError> {
        self.server()?;
        self.client().map(drop)
    }

    /// Opens a session on a connection that the other end has made.
    pub fn accept(&self, tcp: TcpStream) -> Result<Stream, TlsError> {
        let connection = ServerConnection::new(self.server()?)?;
        let stream = Stream::open(connection.into(), tcp)?;
        // What verifies a client's certificate does not know the names that it is for.
        match self.verify(&stream) {
            Ok(()) => Ok(stream),
            Err(error) => {
                stream.part();
                Err(error)
            }
        }
    }

    /// Opens a session on a connection to the other end.
    pub fn connect(&self, tcp: TcpStream) -> Result<Stream, TlsError> {
        Stream::open(ClientConnection::new(self.client()?, self.peer.0.clone())?.into(), tcp)
    }

    fn verify(&self, stream: &Stream) -> Result<(), TlsError> {
        let tls = stream.0.tls();
        let certificate =
            tls.peer_certificates().and_then(<[_]>::first).ok_or(rustls::Error::NoCertificatesPresented)?;
        Ok(verify_server_name(&ParsedCertificate::try_from(certificate)?, &self.peer.0)?)
    }

    fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider())
            .build()
            .map_err(|error| self.unusable(&self.authority, error))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.certificates()?, self.private_key()?)
            .map_err(|error| self.unusable(&self.key, error))?;
        (config.session_storage, config.send_tls13_tickets) = (Arc::new(NoServerSessionStorage {}), 0);
        Ok(Arc::new(config))
    }

    fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.certificates()?, self.private_key()?)
            .map_err(|error| self.unusable(&self.key, error))?;
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn unusable(&self, path: &Path, error: impl std::fmt::Display) -> TlsError {
        TlsError::Unusable { path: path.into(), error: error.to_string() }
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.authority)? {
            roots.add(certificate).map_err(|error| self.unusable(&self.authority, error))?;
        }
        Ok(roots)
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.certificate)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let (bytes, mode) = read(&self.key)?;
        if mode & 0o007 != 0 {
            return Err(TlsError::Exposed { path: self.key.clone(), mode });
        }
        let no_pem = |error| TlsError::NoPem { path: self.key.clone(), what: "private key", error };
        PrivateKeyDer::from_pem_slice(&bytes).map_err(no_pem)
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// All certificates of a file: at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let no_pem = |error| TlsError::NoPem { path: path.into(), what: "certificate", error };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?.0).collect::<Result<_, _>>().map_err(no_pem)?;
    if found.is_empty() { Err(no_pem(pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// What a file holds, and its permissions.
fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let unreadable = |error| TlsError::Unreadable { path: path.into(), error };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o777;
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok((bytes, mode))
}

/// An open session, or one of several handles on it.
pub struct Stream(Arc<Session>, Incoming);

/// Bytes from the network that are in no record yet. Only the handle that reads has any.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
}

struct Session {
    tcp: TcpStream,
    tls: Mutex<Connection>,
    /// Records on their way to the network: whoever holds this may write to it, so they leave in the order they were made
    out: Mutex<Vec<u8>>,
}

impl Session {
    fn tls(&self) -> MutexGuard<'_, Connection> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what this puts into records, and whatever else waits.
    fn send(&self, put: impl FnOnce(&mut Connection) -> io::Result<()>) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut tls = self.tls();
            put(&mut tls)?;
            while tls.wants_write() {
                tls.write_tls(&mut *out)?;
            }
        }
        let sent = (&self.tcp).write_all(&out);
        out.clear();
        sent
    }

    /// Takes in the next records; the session's words if they are none.
    fn receive(&self, incoming: &mut Incoming) -> io::Result<()> {
        let mut tls = self.tls();
        let mut rest = incoming.bytes.get(incoming.start..).unwrap_or_default();
        let there = rest.len();
        tls.read_tls(&mut rest)?;
        incoming.start += there - rest.len();
        let taken = tls.process_new_packets();
        drop(tls);
        if let Err(error) = taken {
            // The other end is to hear why, unless it does not listen at the moment.
            if self.out.try_lock().is_ok() {
                drop(self.send(|_| Ok(())));
            }
            return Err(io::Error::new(ErrorKind::InvalidData, TlsError::Tls(error)));
        }
        Ok(())
    }
}

impl Stream {
    /// The handshake.
    fn open(mut tls: Connection, tcp: TcpStream) -> Result<Self, TlsError> {
        watch(&tcp)?;
        tls.set_buffer_limit(None);
        let end = Instant::now() + HANDSHAKE;
        tcp.set_write_timeout(Some(HANDSHAKE))?;
        let shaken = loop {
            match shake(&mut tls, &tcp, end) {
                Ok(true) => {}
                done => break done,
            }
        };
        tcp.set_read_timeout(None)?;
        tcp.set_write_timeout(None)?;
        let stream = Self(Arc::new(Session { tcp, tls: tls.into(), out: Mutex::default() }), Incoming::default());
        match shaken {
            Ok(_) => Ok(stream),
            Err(error) => {
                stream.part();
                Err(error)
            }
        }
    }

    /// Another handle on the session.
    pub fn another(&self) -> Self {
        Self(self.0.clone(), Incoming::default())
    }

    /// How long a read waits; None: for ever.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.0.tcp.set_read_timeout(limit)
    }

    /// Ends what comes in.
    pub fn stop_reading(&self) -> io::Result<()> {
        self.0.tcp.shutdown(Shutdown::Read)
    }

    /// Ends this direction such that the other end can still read what was sent: if what it sends meanwhile were not read
    /// here, its TCP would throw that away.
    pub fn part(&self) {
        let tcp = &self.0.tcp;
        // The other end may be gone already, which is what is wanted.
        drop(self.0.send(|tls| {
            tls.send_close_notify();
            Ok(())
        }));
        drop(tcp.shutdown(Shutdown::Write));
        let (limit, most) = PARTING;
        let (end, mut read, mut buffer) = (Instant::now() + limit, 0, [0; 4096]);
        while read < most {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || tcp.set_read_timeout(Some(left)).is_err() {
                return;
            }
            match (&*tcp).read(&mut buffer) {
                Ok(length) if length > 0 => read += length,
                _ => return,
            }
        }
    }
}

/// A step of the handshake; false once it is done.
fn shake(tls: &mut Connection, mut tcp: &TcpStream, end: Instant) -> Result<bool, TlsError> {
    while tls.wants_write() {
        tls.write_tls(&mut tcp)?;
    }
    if !tls.is_handshaking() {
        return Ok(false);
    }
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(TlsError::Slow);
    }
    tcp.set_read_timeout(Some(left))?;
    match tls.read_tls(&mut tcp) {
        Ok(0) => return Err(TlsError::CutOff),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Err(TlsError::Slow);
        }
        Err(error) => return Err(error.into()),
    }
    tls.process_new_packets()?;
    Ok(true)
}

/// Has TCP find out within seconds that the other end is gone, and send small messages at once.
fn watch(tcp: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_nodelay(tcp, true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(tcp, DEAD.as_secs() as u32 - 1)?;
    sockopt::set_tcp_user_timeout(tcp, DEAD.as_millis() as u32)?;
    Ok(())
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self(session, incoming) = self;
        loop {
            match session.tls().reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Err(io::Error::new(error.kind(), "the connection was cut off, without an end of TLS"));
                }
                result => return result,
            }
            if incoming.start == incoming.bytes.len() {
                incoming.start = 0;
                incoming.bytes.resize(CHUNK, 0);
                let read = (&session.tcp).read(&mut incoming.bytes);
                incoming.bytes.truncate(*read.as_ref().unwrap_or(&0));
                read?;
            }
            session.receive(incoming)?;
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(|tls| tls.writer().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
