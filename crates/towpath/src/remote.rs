//! `towpath cm`: the cache manager in a process of its own, which tells what it learns to a `towpath fpm`.
//!
//! Batches are acknowledged when they have been taken, and few may be under way, so that what is read at the other end
//! need not wait there. Thus an alarm finds the way free however long a batch takes.

use crate::flows::Keeper;
use crate::instance::Instance;
use crate::source::thread;
use anyhow::{Context, Result};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
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

/// What the writer must not wait to hear.
enum Urgent {
    /// To be sent ahead of all batches
    Message(Message),
    /// The other end has taken a batch
    Acknowledged,
    /// The other end has left
    Left,
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
    let (hurry, urgent) = channel();
    let mut writer = Writer { sender, urgent, unacknowledged: 0 };
    let acknowledged = hurry.clone();
    thread("feedback", move || {
        listen(receiver, &mut netlink, &connections, &listener, &acknowledged);
        // Nobody hears it if nobody waits.
        drop(acknowledged.send(Urgent::Left));
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
        match describe(&mut writer, &hurry, &stopped, flows) {
            Ok(()) => {}
            Err(CmError::Sink(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn describe(
    writer: &mut Writer,
    hurry: &std::sync::mpsc::Sender<Urgent>,
    stopped: &UnixStream,
    flows: FlowMode,
) -> Result<(), CmError> {
    let (batches, waiting) = sync_channel(BATCHES);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || writer.write_out(&waiting));
        let mut sink = Outlet { batches, hurry: hurry.clone(), waiting: None };
        let options = towpath_cm::Options { flows, ..towpath_cm::Options::default() };
        let watchers = towpath_cm::guard::watchers(options.flows)?;
        let mut cm = Cm::new(options, watchers)?;
        let ended = cm.run(&mut sink, stopped.as_fd());
        drop(sink);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.and(written.map_err(|error| CmError::Sink(error.to_string())))
    })
}

/// Messages on their way to the thread that writes them to the socket.
struct Outlet {
    batches: SyncSender<Vec<Message>>,
    hurry: std::sync::mpsc::Sender<Urgent>,
    /// What did not fit
    waiting: Option<Vec<Message>>,
}

impl Outlet {
    fn hurry(&self, message: Message) -> Result<(), CmError> {
        self.hurry
            .send(Urgent::Message(message))
            .map_err(|_| CmError::Sink("the fast path manager has left".into()))?;
        // Wakes the writer up if it waits for batches; if it does not, it looks for what is urgent before each message.
        let _ = self.batches.try_send(Vec::new());
        Ok(())
    }
}

impl FpcSink for Outlet {
    fn send(&mut self, messages: Vec<Message>) -> Result<(), CmError> {
        self.waiting.get_or_insert_default().extend(messages);
        self.is_full().map(drop)
    }

    fn alarm(&mut self, alarm: Alarm) -> Result<(), CmError> {
        self.hurry(Message::Alarm(alarm))
    }

    fn heartbeat(&mut self, at: u64) -> Result<(), CmError> {
        self.hurry(Message::Heartbeat(at))
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

/// Writes batches to the socket, and alarms between their messages.
struct Writer {
    sender: Sender,
    urgent: Receiver<Urgent>,
    /// Batches
    unacknowledged: usize,
}

impl Writer {
    fn write_out(&mut self, batches: &Receiver<Vec<Message>>) -> Result<(), ConnectionError> {
        for batch in batches {
            self.look_up()?;
            while self.unacknowledged >= WINDOW {
                match self.urgent.recv() {
                    Ok(urgent) => self.act(urgent)?,
                    Err(_) => return Err(ConnectionError::CutOff),
                }
            }
            let last = batch.len().saturating_sub(1);
            for (index, message) in batch.into_iter().enumerate() {
                self.sender.push(Packet::Message(message), index == last)?;
                self.unacknowledged += usize::from(index == last);
                self.look_up()?;
            }
            self.sender.flush_frames()?;
        }
        Ok(())
    }

    fn look_up(&mut self) -> Result<(), ConnectionError> {
        while let Ok(urgent) = self.urgent.try_recv() {
            self.act(urgent)?;
        }
        Ok(())
    }

    fn act(&mut self, urgent: Urgent) -> Result<(), ConnectionError> {
        match urgent {
            Urgent::Message(message) => {
                self.sender.push(Packet::Message(message), false)?;
                self.sender.flush_frames()
            }
            Urgent::Acknowledged => {
                self.unacknowledged = self.unacknowledged.saturating_sub(1);
                Ok(())
            }
            Urgent::Left => Err(ConnectionError::CutOff),
        }
    }
}

/// Does what the fast path manager asks, until it leaves.
fn listen(
    mut receiver: towpath_fpc::Receiver,
    netlink: &mut Netlink,
    connections: &Keeper,
    shared: &Shared,
    hurry: &std::sync::mpsc::Sender<Urgent>,
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
                Packet::Ack(_) => drop(hurry.send(Urgent::Acknowledged)),
                Packet::Message(_) | Packet::Hello(_) => {}
                Packet::Bye(_) => return,
            },
            Ok(None) => return,
            Err(error) => return tracing::warn!("{error}"),
        }
    }
}
