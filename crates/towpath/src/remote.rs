//! `towpath cm`: the cache manager in a process of its own, which tells what it learns to a `towpath fpm`.

use crate::instance::Instance;
use crate::source::thread;
use anyhow::{Context, Result};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use towpath_cm::{Cm, CmError, FpcSink};
use towpath_fpc::codec::Packet;
use towpath_fpc::{Connection, ConnectionError, Feedback, Message, Sender, Sink, SinkError};
use towpath_hitflags::{Netlink, Refresh};

/// Between two tries to reach the `towpath fpm`.
const RETRY: Duration = Duration::from_millis(500);
/// Batches that may wait for the socket.
const BATCHES: usize = 8;

/// Serves one `towpath fpm` after another until the process is ended.
pub fn run_cm(cli: &crate::cli::Cm) -> Result<()> {
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
                serve(connection)?;
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

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
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
fn serve(connection: Connection) -> Result<()> {
    let Connection { mut sender, receiver } = connection;
    let shared = Arc::new(Shared::default());
    let listener = shared.clone();
    let mut netlink = Netlink::open()?;
    thread("feedback", move || {
        listen(receiver, &mut netlink, &listener);
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
        match describe(&mut sender, &stopped) {
            Ok(()) => {}
            Err(CmError::Sink(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn describe(sender: &mut Sender, stopped: &UnixStream) -> Result<(), CmError> {
    let (batches, waiting) = sync_channel(BATCHES);
    let (alarmist, alarms) = channel();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_out(sender, &waiting, &alarms));
        let mut sink = Outlet { batches, alarms: alarmist, waiting: None };
        let mut cm = Cm::new(towpath_cm::Options::default(), towpath_cm::guard::watchers()?)?;
        let ended = cm.run(&mut sink, stopped.as_fd());
        drop(sink);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.and(written.map_err(|error| CmError::Sink(error.to_string())))
    })
}

/// Messages on their way to the thread that writes them to the socket.
struct Outlet {
    batches: SyncSender<Vec<Message>>,
    alarms: std::sync::mpsc::Sender<Message>,
    /// What did not fit
    waiting: Option<Vec<Message>>,
}

impl FpcSink for Outlet {
    fn send(&mut self, messages: Vec<Message>) -> Result<(), CmError> {
        self.waiting.get_or_insert_default().extend(messages);
        self.is_full().map(drop)
    }

    fn alarm(&mut self, alarm: Message) -> Result<(), CmError> {
        self.alarms.send(alarm).map_err(|error| CmError::Sink(error.to_string()))?;
        // Wakes the writer up if it waits; if it does not, it looks for alarms before each message.
        let _ = self.batches.try_send(Vec::new());
        Ok(())
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
fn write_out(
    sender: &mut Sender,
    batches: &Receiver<Vec<Message>>,
    alarms: &Receiver<Message>,
) -> Result<(), SinkError> {
    for batch in batches {
        send_alarms(sender, alarms)?;
        for message in batch {
            sender.send(message)?;
            send_alarms(sender, alarms)?;
        }
        sender.flush()?;
    }
    Ok(())
}

fn send_alarms(sender: &mut Sender, alarms: &Receiver<Message>) -> Result<(), SinkError> {
    while let Ok(alarm) = alarms.try_recv() {
        sender.send(alarm)?;
        sender.flush()?;
    }
    Ok(())
}

/// Does what the fast path manager asks, until it leaves.
fn listen(mut receiver: towpath_fpc::Receiver, netlink: &mut Netlink, shared: &Shared) {
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
                Packet::Message(_) | Packet::Ack(_) | Packet::Hello(_) => {}
                Packet::Bye(_) => return,
            },
            Ok(None) => return,
            Err(error) => return tracing::warn!("{error}"),
        }
    }
}
