//! Clients of a socket that the daemon listens on: each in a thread of its own, and only so many at once.

use anyhow::{Context, Result};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A socket that clients connect to.
pub trait Listener: Send + 'static {
    /// What leads to a client
    type Stream: Send + 'static;
    /// Waits for the next one.
    fn next(&self) -> io::Result<Self::Stream>;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn next(&self) -> io::Result<UnixStream> {
        self.accept().map(|(stream, _)| stream)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn next(&self) -> io::Result<TcpStream> {
        self.accept().map(|(stream, _)| stream)
    }
}

/// Serves each client by `work`, until the process ends; more than `limit` at once are turned away.
pub fn serve<L: Listener>(
    name: &'static str,
    listener: L,
    limit: usize,
    work: impl Fn(L::Stream) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let (clients, work) = (Arc::new(AtomicUsize::new(0)), Arc::new(work));
    spawn(name, move || {
        loop {
            let Ok(stream) = listener.next() else {
                std::thread::sleep(Duration::from_millis(100)); // out of descriptors: let clients leave
                continue;
            };
            if clients.fetch_add(1, Ordering::Relaxed) >= limit {
                clients.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (count, work) = (clients.clone(), work.clone());
            let started = spawn("client", move || {
                if let Err(error) = work(stream) {
                    tracing::debug!("{name} client: {error:#}");
                }
                count.fetch_sub(1, Ordering::Relaxed);
            });
            if started.is_err() {
                clients.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).context("cannot start a thread")?;
    Ok(())
}
