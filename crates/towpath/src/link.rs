//! The way to a cache manager on another host: TLS over TCP, one session at a time.
//!
//! A fixed number of threads accepts connections, so what strangers send takes bounded memory, and since a thread rests after
//! each failure, bounded time too. The session has one of the threads; the others say so to whoever comes meanwhile.

use crate::daemon::Event;
use crate::source::{Inbound, Peer, Running, receive, thread};
use crate::twins::{Interpreter, Survey, Twins};
use anyhow::{Context, Result, anyhow, bail};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use towpath_fpc::Connection;
use towpath_fpc::stream::Stream;
use towpath_fpc::tls::Identity;

/// Connections at once, with the one of the session.
const THREADS: usize = 4;
/// After each connection that came to nothing.
const REST: Duration = Duration::from_secs(1);
/// Between two looks at this host's ports.
const LOOK: Duration = Duration::from_secs(1);

/// Where a cache manager of another host is awaited, and for which ports.
#[derive(Clone)]
pub struct Remote {
    /// Address to listen on
    pub address: SocketAddr,
    /// Who the two ends are
    pub identity: Identity,
    /// Names of the ports
    pub ports: Vec<String>,
}

/// Awaits cache managers until the process ends.
pub fn listen(remote: &Remote, inbound: &Inbound) -> Result<Running> {
    remote.identity.check()?;
    let address = remote.address;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let (peer, session) = (Peer::default(), Arc::new(Mutex::new(None)));
    for _ in 0..THREADS {
        let desk = Desk {
            remote: remote.clone(),
            listener: listener.try_clone().context("cannot share a socket")?,
            inbound: inbound.clone(),
            peer: peer.clone(),
            session: session.clone(),
        };
        thread("fpc", move || desk.serve())?;
    }
    Ok(Running::of_peer(peer))
}

/// One of the threads.
struct Desk {
    remote: Remote,
    listener: TcpListener,
    inbound: Inbound,
    peer: Peer,
    /// Whom the session is with
    session: Arc<Mutex<Option<SocketAddr>>>,
}

impl Desk {
    fn serve(&self) {
        loop {
            if let Err(error) = self.next() {
                tracing::warn!("{error}");
                std::thread::sleep(REST);
            }
        }
    }

    fn next(&self) -> Result<()> {
        let (tcp, from) = self.listener.accept().map_err(|error| anyhow!("cannot take a connection: {error}"))?;
        self.meet(tcp, from).map_err(|error| anyhow!("{from}: {error}"))
    }

    fn meet(&self, tcp: TcpStream, from: SocketAddr) -> Result<()> {
        let stream = self.remote.identity.accept(tcp)?;
        let mut connection = Connection::open(stream)?;
        let before = *self.turn().get_or_insert(from);
        if before != from {
            let why = format!("another cache manager is connected, from {before}");
            connection.sender.bye(&why);
            bail!(why);
        }
        let end = self.session(connection, from);
        let error = end.err().map_or_else(|| "the cache manager has left".into(), |error| error.to_string());
        // Who comes now is not refused, but waits until the session has ended.
        let mut turn = self.turn();
        tracing::warn!("lost the cache manager at {from}: {error}; the fast path keeps its last state");
        self.peer.bye(&error);
        let sent = self.inbound.events.send(Event::SourceLost);
        *turn = None;
        sent.context("the daemon has ended")
    }

    fn turn(&self) -> MutexGuard<'_, Option<SocketAddr>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session, until either end leaves or this host's ports change.
    fn session(&self, connection: Connection, from: SocketAddr) -> Result<()> {
        let mut survey = Survey::new(self.remote.ports.clone())?;
        let twins = survey.look()?;
        tracing::info!("the cache manager at {from} has connected");
        let mut interpreter = Interpreter::new(twins.clone());
        let (handle, numbers) = (connection.sender.handle()?, interpreter.numbers());
        std::thread::scope(|scope| {
            let (session, ended) = channel::<()>();
            let watch = scope.spawn(move || watch(&mut survey, &twins, &handle, &ended));
            let end = receive(connection, Some(numbers), &self.inbound, &self.peer, |message, all| {
                interpreter.take(message, all)
            });
            drop(session);
            match watch.join() {
                Ok(Some(why)) => bail!(why),
                _ => end,
            }
        })
    }
}

/// Ends the session when this host's ports are not what they were; says why.
fn watch(survey: &mut Survey, twins: &Twins, handle: &Stream, ended: &Receiver<()>) -> Option<String> {
    loop {
        match ended.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return None,
        }
        let why = match survey.look() {
            Ok(now) if now == *twins => continue,
            Ok(_) => "ports of the fast path's host are not what they were".into(),
            Err(error) => format!("the ports of the fast path's host are unknown: {error:#}"),
        };
        handle.stop_reading();
        return Some(why);
    }
}
