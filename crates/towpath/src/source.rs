//! Where Linux's state comes from: a CM in a thread of this process, one that connects over a socket, or one on another host
//! (`link`). Either way batches of messages arrive in the daemon's inbox.

use crate::daemon::Event;
use crate::link::{self, Remote};
use crate::sentry::Sentry;
use crate::twins::Numbers;
use anyhow::{Context, Result};
use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use towpath_cm::{Cm, CmError, FpcSink};
use towpath_fpc::codec::Packet;
use towpath_fpc::{Alarm, Connection, ConnectionError, Message, Sender};
use towpath_tables::clock;

/// Frames of a socket that are worked on at once.
const BATCH: usize = 512;

/// The ways into the daemon for a source.
#[derive(Clone)]
pub struct Inbound {
    /// In turn
    pub events: SyncSender<Event>,
    /// Alarms, ahead of all that is in `events`; they are few, so nobody has to wait
    pub sentry: Sentry,
}

impl Inbound {
    fn alarm(&self, alarm: Alarm) {
        let on_its_way = Duration::from_nanos(clock::exact().saturating_sub(alarm.id.number));
        self.sentry.raise(alarm, on_its_way);
        // If the inbox is full the daemon is awake, and looks for alarms again and again.
        let _ = self.events.try_send(Event::Alarm);
    }
}

/// A CM's messages on their way into the inbox; what does not fit waits here, and CM leaves the rest in the kernel.
struct Inlet {
    inbound: Inbound,
    waiting: Option<Event>,
}

impl FpcSink for Inlet {
    fn send(&mut self, messages: Vec<Message>) -> Result<(), CmError> {
        if let Some(Event::Messages(waiting)) = &mut self.waiting {
            waiting.extend(messages);
        } else {
            self.waiting = Some(Event::Messages(messages));
        }
        self.is_full().map(drop)
    }

    fn alarm(&mut self, alarm: Alarm) -> Result<(), CmError> {
        self.inbound.alarm(alarm);
        Ok(())
    }

    fn heartbeat(&mut self, at: u64) -> Result<(), CmError> {
        self.inbound.sentry.heartbeat(at);
        Ok(())
    }

    fn is_full(&mut self) -> Result<bool, CmError> {
        let Some(event) = self.waiting.take() else { return Ok(false) };
        match self.inbound.events.try_send(event) {
            Ok(()) => Ok(false),
            Err(TrySendError::Full(event)) => {
                self.waiting = Some(event);
                Ok(true)
            }
            Err(TrySendError::Disconnected(_)) => Err(CmError::Sink("it has ended".into())),
        }
    }
}

/// Which source to use.
pub enum Source {
    /// A CM in this process
    InProcess(towpath_cm::Options),
    /// A CM that connects here
    Socket(PathBuf),
    /// A CM on another host
    Remote(Remote),
}

/// A source at work. It ends with the process, or when this is dropped.
pub struct Running {
    /// A CM in this process stops when this is closed
    _stop: Option<UnixStream>,
    /// The CM at the other end of a socket
    pub peer: Option<Peer>,
}

impl Running {
    /// One at the other end of a socket.
    pub fn of_peer(peer: Peer) -> Self {
        Self { _stop: None, peer: Some(peer) }
    }
}

/// The way back to a CM at the other end of a socket, while there is one.
#[derive(Clone, Default)]
pub struct Peer(Arc<Mutex<Option<Back>>>);

struct Back {
    sender: Sender,
    /// The other host's numbers of interfaces, if it is another
    numbers: Option<Numbers>,
}

impl Back {
    fn send(&mut self, packet: Packet) -> Result<(), ConnectionError> {
        let packet = match &self.numbers {
            Some(numbers) => numbers.outbound(packet),
            None => packet,
        };
        self.sender.push(packet, false)?;
        self.sender.flush_frames()
    }
}

impl Peer {
    /// Sends FPM's word to the CM, if there is one.
    pub fn send(&self, packet: Packet) {
        let mut peer = self.lock();
        if let Some(Err(error)) = peer.as_mut().map(|back| back.send(packet)) {
            tracing::warn!("cannot answer the cache manager: {error}");
            *peer = None;
        }
    }

    /// Tells the CM, if there is one, why the session ends.
    pub fn bye(&self, why: &str) {
        let back = self.lock().take();
        if let Some(mut back) = back {
            back.sender.bye(why);
        }
    }

    fn set(&self, back: Option<Back>) {
        *self.lock() = back;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Back>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    /// Starts it; its messages go to `events`, and `Event::SourceEnded` if there will be no more.
    pub fn start(self, inbound: Inbound) -> Result<Running> {
        match self {
            Source::InProcess(options) => start_cm(options, inbound),
            Source::Socket(path) => listen(&path, inbound),
            Source::Remote(remote) => link::listen(&remote, &inbound),
        }
    }
}

/// A watcher stays in the thread that made it, so everything is made there.
fn start_cm(options: towpath_cm::Options, inbound: Inbound) -> Result<Running> {
    let (stop, stopped) = UnixStream::pair().context("cannot make a socket pair")?;
    thread("cm", move || {
        if let Err(error) = follow_linux(options, &inbound, &stopped) {
            let _ = inbound.events.send(Event::SourceEnded(error.to_string()));
        }
    })?;
    Ok(Running { _stop: Some(stop), peer: None })
}

fn follow_linux(options: towpath_cm::Options, inbound: &Inbound, stopped: &UnixStream) -> Result<(), CmError> {
    let mut sink = Inlet { inbound: inbound.clone(), waiting: None };
    let watchers = towpath_cm::guard::watchers(options.flows)?;
    Cm::new(options, watchers)?.run(&mut sink, stopped.as_fd())
}

/// One CM at a time; when it goes, the tables stay as they are until the next one describes everything anew.
fn listen(path: &Path, inbound: Inbound) -> Result<Running> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    let peer = Peer::default();
    let running = Running::of_peer(peer.clone());
    thread("fpc", move || {
        for stream in listener.incoming() {
            let end = stream.context("no connection").and_then(|stream| meet(stream, &inbound, &peer));
            peer.set(None);
            match end {
                Ok(()) => tracing::warn!("the cache manager has left; the fast path keeps its last state"),
                Err(error) => tracing::warn!("lost the cache manager: {error:#}; the fast path keeps its last state"),
            }
            if inbound.events.send(Event::SourceLost).is_err() {
                return;
            }
        }
    })?;
    Ok(running)
}

fn meet(stream: UnixStream, inbound: &Inbound, peer: &Peer) -> Result<()> {
    let connection = Connection::open(stream)?;
    tracing::info!("a cache manager has connected");
    receive(connection, None, inbound, peer, |message, all| {
        all.push(message);
        Ok(())
    })
}

/// Reads whatever comes, at once, for the sake of alarms. The CM sends so little that is not acknowledged that it may
/// wait here. `interpret` adds what a message means on this host.
pub fn receive(
    connection: Connection,
    numbers: Option<Numbers>,
    inbound: &Inbound,
    peer: &Peer,
    mut interpret: impl FnMut(Message, &mut Vec<Message>) -> Result<()>,
) -> Result<()> {
    let Connection { sender, mut receiver } = connection;
    peer.set(Some(Back { sender, numbers }));
    let (queue, waiting) = channel();
    // The queue ends with the work in here, and with the queue the thread.
    std::thread::scope(move |scope| {
        scope.spawn(move || waiting.into_iter().try_for_each(|event| inbound.events.send(event)));
        loop {
            let frames = receiver.batch(BATCH)?;
            if frames.is_empty() {
                return Ok(());
            }
            let (mut messages, mut meant) = (Vec::with_capacity(frames.len()), Vec::new());
            let mut acknowledge = Vec::new();
            for frame in frames {
                acknowledge.extend(frame.report.then_some(frame.sequence));
                if let Packet::Message(message) = frame.packet {
                    interpret(message, &mut meant)?;
                }
                for message in meant.drain(..) {
                    match message {
                        Message::Alarm(alarm) => inbound.alarm(alarm),
                        Message::Heartbeat(at) => inbound.sentry.heartbeat(at),
                        message => messages.push(message),
                    }
                }
            }
            let events = std::iter::once(Event::Messages(messages));
            for event in events.chain(acknowledge.into_iter().map(Event::Acknowledge)) {
                queue.send(event).ok().context("the daemon has ended")?;
            }
        }
    })
}

/// Starts a thread.
pub fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).with_context(|| format!("cannot start thread {name}"))?;
    Ok(())
}
