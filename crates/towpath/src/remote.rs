//! `towpath cm`: the cache manager in a process of its own, which tells what it learns to a `towpath fpm`.
//!
//! Batches are acknowledged when they have been taken, and few may be under way, so that what is read at the other end
//! need not wait there. Thus an alarm finds the way free however long a batch takes. Whoever has an alarm writes it himself,
//! unless somebody else is writing, who then does: where many want the processor, each thread that a message has to go
//! through costs it milliseconds.

use crate::flows::Keeper;
use crate::instance::Instance;
use crate::source::thread;
use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;
use towpath_cm::{Cm, CmError, FlowMode, FpcSink};
use towpath_fpc::codec::Packet;
use towpath_fpc::tls::Identity;
use towpath_fpc::{Alarm, Connection, ConnectionError, Feedback, Message, Sender};
use towpath_hitflags::{Netlink, Refresh};

/// Between two tries to reach the `towpath fpm`.
const RETRY: Duration = Duration::from_millis(500);
/// For TCP to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// Batches that may wait for the socket.
const BATCHES: usize = 8;
/// Batches that may have been sent and not been acknowledged.
const WINDOW: usize = 8;

/// Serves one `towpath fpm` after another until the process is ended.
pub fn run_cm(cli: &crate::cli::Cm) -> Result<()> {
    match cli.far.zip(cli.tls.identity()) {
        Some((address, identity)) => serve_far(address, &identity),
        None => serve_near(cli),
    }
}

fn serve_near(cli: &crate::cli::Cm) -> Result<()> {
    let path = match &cli.socket {
        Some(path) => path.clone(),
        None => Instance::current()?.fpc_socket(),
    };
    let mut waiting = false;
    loop {
        match Connection::connect(&path) {
            Ok(connection) => {
                waiting = false;
                tracing::info!("connected to {}", path.display());
                serve(connection, cli.follow.flows)?;
                tracing::warn!("the fast path manager has left");
            }
            Err(ConnectionError::Io(error)) if is_absent(&error) => {
                if !std::mem::replace(&mut waiting, true) {
                    tracing::info!("waiting for a towpath fpm at {}", path.display());
                }
            }
            Err(error) => return Err(error).with_context(|| format!("cannot talk to {}", path.display())),
        }
        std::thread::sleep(RETRY);
    }
}

/// Whatever keeps it from another host may pass: a link, a certificate that is over, another release.
fn serve_far(address: SocketAddr, identity: &Identity) -> Result<()> {
    identity.check()?;
    let mut told = None;
    loop {
        match connect(address, identity) {
            Ok(connection) => {
                told = None;
                tracing::info!("connected to {address}");
                serve(connection, FlowMode::None)?;
                tracing::warn!("the fast path manager has left");
            }
            Err(error) => {
                let why = error.to_string();
                if told.as_ref() != Some(&why) {
                    tracing::warn!("waiting for a towpath fpm at {address}: {why}");
                }
                told = Some(why);
            }
        }
        std::thread::sleep(RETRY);
    }
}

fn connect(address: SocketAddr, identity: &Identity) -> Result<Connection> {
    let tcp = TcpStream::connect_timeout(&address, CONNECT)?;
    Ok(Connection::open(identity.connect(tcp)?)?)
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
}

/// The way to the other end, for whoever has something to say.
struct Line {
    /// Held while something is written
    sender: Mutex<Sender>,
    state: Mutex<State>,
    /// `state` is not what it was
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// To be written ahead of all batches, in turn
    urgent: VecDeque<Message>,
    /// Batches
    unacknowledged: usize,
    /// The other end has left
    left: bool,
}

impl Line {
    fn new(sender: Sender) -> Self {
        Self { sender: Mutex::new(sender), state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the other end told, ahead of all batches.
    fn hurry(&self, message: Message) -> Result<(), ConnectionError> {
        let mut state = self.state();
        if state.left {
            return Err(ConnectionError::CutOff);
        }
        state.urgent.push_back(message);
        drop(state);
        self.write_urgent()
    }

    /// Writes what is urgent, or leaves it to whoever is writing, who looks again when he has done.
    fn write_urgent(&self) -> Result<(), ConnectionError> {
        while !self.state().urgent.is_empty() {
            let mut sender = match self.sender.try_lock() {
                Ok(sender) => sender,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(()),
            };
            self.write_urgent_by(&mut sender)?;
        }
        Ok(())
    }

    fn write_urgent_by(&self, sender: &mut Sender) -> Result<(), ConnectionError> {
        loop {
            // Not to be locked while it is written.
            let Some(message) = self.state().urgent.pop_front() else { return Ok(()) };
            sender.push(Packet::Message(message), false)?;
            sender.flush_frames()?;
        }
    }

    /// Writes a batch, and what is urgent between its messages, when few batches are under way.
    fn write(&self, batch: Vec<Message>) -> Result<(), ConnectionError> {
        let Some(last) = batch.len().checked_sub(1) else { return Ok(()) };
        let full = |state: &mut State| state.unacknowledged >= WINDOW && !state.left;
        let mut state = self.changed.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        if state.left {
            return Err(ConnectionError::CutOff);
        }
        state.unacknowledged += 1;
        drop(state);
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, message) in batch.into_iter().enumerate() {
            self.write_urgent_by(&mut sender)?;
            sender.push(Packet::Message(message), index == last)?;
        }
        sender.flush_frames()?;
        drop(sender);
        self.write_urgent()
    }

    fn acknowledged(&self) {
        let mut state = self.state();
        state.unacknowledged = state.unacknowledged.saturating_sub(1);
        self.changed.notify_all();
    }

    fn leave(&self) {
        self.state().left = true;
        self.changed.notify_all();
    }
}

/// What the two threads of a connection share.
#[derive(Default)]
struct Shared {
    /// The cache manager at work stops when this is closed
    stop: Mutex<Option<UnixStream>>,
    /// The other end has left
    ended: AtomicBool,
}

impl Shared {
    fn set_stop(&self, stop: Option<UnixStream>) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = stop;
    }
}

/// Describes everything, then every change, until the other end leaves; again from the start if it asks.
fn serve(connection: Connection, flows: FlowMode) -> Result<()> {
    let Connection { sender, receiver } = connection;
    let shared = Arc::new(Shared::default());
    let listener = shared.clone();
    let mut netlink = Netlink::open()?;
    let connections = match flows {
        FlowMode::None => Keeper::Nobody,
        _ => Keeper::local()?,
    };
    let line = Arc::new(Line::new(sender));
    let heard = line.clone();
    thread("feedback", move || {
        listen(receiver, &mut netlink, &connections, &listener, &heard);
        heard.leave();
        listener.ended.store(true, Ordering::SeqCst);
        listener.set_stop(None);
    })?;
    loop {
        let (stop, stopped) = UnixStream::pair().context("cannot make a socket pair")?;
        shared.set_stop(Some(stop));
        // Looked at after `stop` is in its place, where the listener closes it once it has said that it ended.
        if shared.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        match describe(&line, &stopped, flows) {
            Ok(()) => {}
            Err(CmError::Sink(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn describe(line: &Line, stopped: &UnixStream, flows: FlowMode) -> Result<(), CmError> {
    let (batches, waiting) = sync_channel(BATCHES);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_out(line, &waiting));
        let mut sink = Outlet { line, batches, waiting: None };
        let options = towpath_cm::Options { flows, ..towpath_cm::Options::default() };
        let watchers = towpath_cm::guard::watchers(options.flows)?;
        let mut cm = Cm::new(options, watchers)?;
        let ended = cm.run(&mut sink, stopped.as_fd());
        drop(sink);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.and(written.map_err(refused))
    })
}

fn write_out(line: &Line, batches: &Receiver<Vec<Message>>) -> Result<(), ConnectionError> {
    batches.iter().try_for_each(|batch| line.write(batch))
}

fn refused(error: ConnectionError) -> CmError {
    CmError::Sink(error.to_string())
}

/// Messages on their way to the thread that writes batches to the socket, and alarms on theirs past it.
struct Outlet<'l> {
    line: &'l Line,
    batches: SyncSender<Vec<Message>>,
    /// What did not fit
    waiting: Option<Vec<Message>>,
}

impl FpcSink for Outlet<'_> {
    fn send(&mut self, messages: Vec<Message>) -> Result<(), CmError> {
        self.waiting.get_or_insert_default().extend(messages);
        self.is_full().map(drop)
    }

    fn alarm(&mut self, alarm: Alarm) -> Result<(), CmError> {
        self.line.hurry(Message::Alarm(alarm)).map_err(refused)
    }

    fn heartbeat(&mut self, at: u64) -> Result<(), CmError> {
        self.line.hurry(Message::Heartbeat(at)).map_err(refused)
    }

    fn is_full(&mut self) -> Result<bool, CmError> {
        let Some(batch) = self.waiting.take() else { return Ok(false) };
        match self.batches.try_send(batch) {
            Ok(()) => Ok(false),
            Err(TrySendError::Full(batch)) => {
                self.waiting = Some(batch);
                Ok(true)
            }
            Err(TrySendError::Disconnected(_)) => Err(CmError::Sink("the fast path manager has left".into())),
        }
    }
}

/// Does what the fast path manager asks, until it leaves.
fn listen(
    mut receiver: towpath_fpc::Receiver,
    netlink: &mut Netlink,
    connections: &Keeper,
    shared: &Shared,
    line: &Line,
) {
    loop {
        match receiver.next() {
            Ok(Some(frame)) => match frame.packet {
                Packet::Feedback(Feedback::Resync(why)) => {
                    tracing::info!("everything is described again: {why}");
                    shared.set_stop(None);
                }
                Packet::Feedback(Feedback::Hits(neighbours)) => {
                    if let Err(error) = netlink.refresh(&neighbours) {
                        tracing::warn!("{error}");
                    }
                }
                Packet::Feedback(feedback @ (Feedback::FlowsUsed(_) | Feedback::FlowsAhead(_))) => {
                    connections.tell(feedback);
                }
                Packet::Ack(_) => line.acknowledged(),
                Packet::Message(_) | Packet::Hello(_) => {}
                Packet::Bye(_) => return,
            },
            Ok(None) => return,
            Err(error) => return tracing::warn!("{error}"),
        }
    }
}
