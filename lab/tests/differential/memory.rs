//! A router whose ports are memory: a worker of the user engine over tables that hold what Linux has told, and Linux behind
//! it by TAPs. And a plain router that is fed by TAPs too, so that both Linuxes receive in the same way.

use crate::router::{Ends, PORT_NAMES, PORTS};
use anyhow::{Context, Result, ensure};
use std::cell::RefCell;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use towpath_cm::{Cm, Options, guard};
use towpath_fpc::Message;
use towpath_fpm::{Fpm, all_classes};
use towpath_lab::{Frame, Node};
use towpath_tables::backing::{Backing, HeapBacking, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::record::PortStats;
use towpath_tables::writer::TableWriter;
use towpath_user::memory::{Cable, MemoryPort, Nowhere};
use towpath_user::tap::Tap;
use towpath_user::twin::Twinned;
use towpath_user::{BATCH, Buffer, Core, Engine, Linux, Pool, Port};

/// Room for every frame in one buffer.
const STRIDE: usize = 16384 + 64;
/// Frames that a cable holds; the harness sends far fewer at once.
const ROOM: usize = 4096;
/// How long nothing is told any more when everything was.
const QUIET: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(20);

/// Opens the TAPs that are a router's ports.
pub fn taps(node: &Node) -> Result<Vec<Tap>> {
    PORT_NAMES.iter().map(|name| Ok(node.enter(|| Tap::open(name))??)).collect()
}

/// Linux's side alone: whatever is sent Linux receives.
pub struct Taps {
    taps: Vec<Tap>,
    pool: RefCell<Pool>,
}

impl Taps {
    pub fn new(taps: Vec<Tap>) -> Self {
        Self { taps, pool: RefCell::new(Pool::new(1, STRIDE)) }
    }

    fn with_buffer<T>(&self, f: impl FnOnce(&mut Buffer) -> T) -> Result<T> {
        let mut pool = self.pool.borrow_mut();
        let mut buffer = pool.take().context("a buffer")?;
        let value = f(&mut buffer);
        pool.give(buffer);
        Ok(value)
    }
}

fn whole(bytes: &[u8]) -> Frame {
    Frame { bytes: bytes.to_vec(), partial_checksum: false }
}

impl Ends for Taps {
    fn send(&self, port: usize, frames: &[&[u8]]) -> Result<()> {
        for frame in frames {
            let taken = self.with_buffer(|buffer| {
                buffer.resize(frame.len()).copy_from_slice(frame);
                self.taps[port].send_frame(buffer)
            })?;
            ensure!(taken, "Linux does not take a frame of {} bytes", frame.len());
        }
        Ok(())
    }

    fn drain(&self, port: usize) -> Result<Vec<Frame>> {
        let next = || self.with_buffer(|buffer| self.taps[port].receive(buffer).then(|| whole(buffer.bytes())));
        std::iter::from_fn(|| next().transpose()).collect()
    }
}

/// The worker's ports.
pub struct Worker {
    cables: Vec<Cable>,
    tables: Arc<HeapBacking>,
    _engine: Engine<HeapBacking>,
}

impl Worker {
    /// Serves the configured router's ports by their TAPs.
    pub fn start(node: &Node, taps: Vec<Tap>) -> Result<Self> {
        let (tables, slots) = mirror(node)?;
        let tables = Arc::new(tables);
        // Every port has a way to Linux of its own.
        let equip = |_| (Pool::new(8 * BATCH, STRIDE), Box::new(Nowhere) as Box<dyn Linux>);
        let engine = Engine::start(&tables, &[Core(0)], 0, equip)?;
        let mut cables = Vec::new();
        for ((ifindex, slot), tap) in slots.into_iter().zip(taps) {
            let cable = Cable::new(ROOM);
            let driver = Box::new(Twinned::new(Box::new(MemoryPort(cable.clone())), Arc::new(tap)));
            ensure!(engine.add(0, Port { ifindex, slot, driver }), "the worker is gone");
            cables.push(cable);
        }
        Ok(Self { cables, tables, _engine: engine })
    }

    /// A sum over the ports.
    pub fn sum(&self, figure: impl Fn(&PortStats) -> u64) -> u64 {
        self.tables.view().stats().iter().map(figure).sum()
    }
}

impl Ends for Worker {
    fn send(&self, port: usize, frames: &[&[u8]]) -> Result<()> {
        ensure!(frames.iter().all(|frame| self.cables[port].inwards.push(frame)), "the cable is full");
        Ok(())
    }

    fn drain(&self, port: usize) -> Result<Vec<Frame>> {
        Ok(std::iter::from_fn(|| self.cables[port].outwards.pop()).map(|bytes| whole(&bytes)).collect())
    }
}

/// Tables with all that Linux tells of a router, which does not change any more; and each port's index and slot.
fn mirror(node: &Node) -> Result<(HeapBacking, Vec<(u32, u32)>)> {
    let mut fpm = Fpm::new(TableWriter::create(HeapBacking::new(initial_elements(1)), NoReaders)?, all_classes());
    let ports = PORT_NAMES.iter().map(|name| node.ifindex(name)).collect::<Result<Vec<_>>>()?;
    for ifindex in &ports {
        fpm.serve(*ifindex, true);
        // Nothing travels beside what comes from memory.
        fpm.set_beside(*ifindex, true);
        fpm.set_unmarked(*ifindex, true);
    }
    let (mut sender, messages) = channel::<Vec<Message>>();
    let (stop, stopped) = UnixStream::pair()?;
    std::thread::scope(|scope| -> Result<()> {
        let manager = scope.spawn(move || {
            node.enter(|| -> Result<()> {
                let options = Options { serve: Some(PORT_NAMES.map(String::from).into()), ..Options::default() };
                let watchers = guard::watchers(options.flows)?;
                Ok(Cm::new(options, watchers)?.run(&mut sender, stopped.as_fd())?)
            })?
        });
        let told = loop {
            match messages.recv_timeout(if fpm.is_complete() { QUIET } else { LIMIT }) {
                Ok(messages) => messages.into_iter().for_each(|message| fpm.apply(message)),
                Err(RecvTimeoutError::Timeout) => break fpm.is_complete(),
                Err(RecvTimeoutError::Disconnected) => break false,
            }
        };
        drop(stop);
        manager.join().map_err(|_| anyhow::anyhow!("the cache manager panicked"))??;
        ensure!(told, "Linux's state was not told within {} s", LIMIT.as_secs());
        Ok(())
    })?;
    while let towpath_fpm::Progress::More = fpm.publish_while(|| true) {}
    let slot = |ifindex: &u32| {
        let state = fpm.ports().find(|state| state.port.ifindex == *ifindex && state.ready);
        Ok((*ifindex, state.context("a port is not ready")?.slot))
    };
    let slots = ports.iter().map(slot).collect::<Result<Vec<_>>>()?;
    ensure!(slots.len() == PORTS && fpm.full().next().is_none(), "a table is full");
    Ok((fpm.into_tables().into_backing(), slots))
}
