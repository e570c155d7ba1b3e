//! A worker: every frame from receipt to transmission, a batch at a time.

use crate::driver::{BATCH, Linux, PortDriver};
use crate::pool::{Area, Buffer, Pool};
use arrayvec::ArrayVec;
use std::sync::Arc;
use towpath_pipeline::cache::prefetch;
use towpath_pipeline::mapped::Mapped;
use towpath_pipeline::{
    Entry, Parsed, Search, SlotSet, Tables, count_exception, count_exceptions_lost, count_tx_lost, finish, parse,
    route_found,
};
use towpath_tables::Reason;
use towpath_tables::backing::Backing;
use towpath_tables::grace;
use towpath_tables::record::PORT_SLOTS;
use towpath_tables::word::W32;

/// Where a worker finds the tables.
pub trait TableSource {
    /// The tables as the pipeline sees them
    type Seen<'t>: Tables
    where
        Self: 't;
    /// The tables now, for the reader whose line of the statistics this is.
    fn seen(&self, line: u32, transmitters: SlotSet) -> Self::Seen<'_>;
}

impl<B: Backing> TableSource for B {
    type Seen<'t>
        = Mapped<'t>
    where
        B: 't;

    #[inline(always)]
    fn seen(&self, line: u32, transmitters: SlotSet) -> Mapped<'_> {
        Mapped { view: self.view(), counters: Some(line), transmitters }
    }
}

/// A worker's word for `towpath_tables::grace`: odd while it reads the tables. Clones are the same word.
#[derive(Clone, Default)]
pub struct Reading(Arc<Alone>);

/// On a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Alone(W32);

impl std::ops::Deref for Reading {
    type Target = W32;
    fn deref(&self) -> &W32 {
        &self.0.0
    }
}

/// A port of a worker.
pub struct Port {
    /// Interface index in Linux
    pub ifindex: u32,
    /// Slot in the table of ports
    pub slot: u32,
    /// Its queues
    pub driver: Box<dyn PortDriver>,
}

struct Served {
    port: Port,
    /// Frames to be sent by it, at most a batch
    out: Vec<Buffer>,
}

/// Marks a slot that is none of the worker's ports.
const NO_PORT: u8 = u8::MAX;

/// Runs the packet path for its ports.
pub struct Worker<S> {
    tables: Arc<S>,
    line: u32,
    pool: Pool,
    linux: Box<dyn Linux>,
    reading: Reading,
    ports: Vec<Served>,
    /// Place in `ports` by slot
    places: [u8; PORT_SLOTS as usize],
    transmitters: SlotSet,
    batch: Vec<Buffer>,
    exceptions: Vec<Buffer>,
}

impl<S: TableSource> Worker<S> {
    /// A worker without ports. `line`: which line of the statistics only it writes (see `PortStats`); `linux`: where its
    /// exceptions go.
    pub fn new(tables: Arc<S>, line: u32, pool: Pool, linux: Box<dyn Linux>) -> Self {
        Self {
            tables,
            line,
            pool,
            linux,
            reading: Reading::default(),
            ports: Vec::new(),
            places: [NO_PORT; PORT_SLOTS as usize],
            transmitters: SlotSet::NONE,
            batch: Vec::with_capacity(BATCH),
            exceptions: Vec::with_capacity(BATCH),
        }
    }

    /// The word to wait by for tables to be out of use.
    pub fn reading(&self) -> Reading {
        self.reading.clone()
    }

    /// Memory of its pool.
    pub fn area(&self) -> Area {
        self.pool.area()
    }

    /// Looks at these tables from now on.
    pub fn set_tables(&mut self, tables: Arc<S>) {
        self.tables = tables;
    }

    /// Serves a port; one with the same index is replaced.
    pub fn add(&mut self, mut port: Port) {
        self.remove(port.ifindex);
        port.driver.start(&mut self.pool);
        self.ports.push(Served { port, out: Vec::with_capacity(BATCH) });
        self.index_ports();
    }

    /// Serves a port no more; nothing if there is none with this index.
    pub fn remove(&mut self, ifindex: u32) {
        if let Some(place) = self.ports.iter().position(|served| served.port.ifindex == ifindex) {
            self.ports.remove(place).port.driver.close(&mut self.pool);
            self.index_ports();
        }
    }

    fn index_ports(&mut self) {
        self.places = [NO_PORT; PORT_SLOTS as usize];
        self.transmitters = SlotSet::NONE;
        for (place, served) in self.ports.iter().enumerate().take(NO_PORT.into()) {
            if let Some(entry) = self.places.get_mut(served.port.slot as usize) {
                *entry = place as u8;
                self.transmitters.insert(served.port.slot);
            }
        }
    }

    /// The drivers, to ask what to wait for.
    pub fn drivers(&self) -> impl Iterator<Item = &dyn PortDriver> {
        self.ports.iter().map(|served| &*served.port.driver)
    }

    /// Between this and `leave` the tables stay what they are.
    pub fn enter(&self) {
        grace::enter(&*self.reading);
    }

    /// Nothing of the tables is held any more.
    pub fn leave(&self) {
        grace::leave(&*self.reading);
    }

    /// One batch of each port, between `enter` and `leave`; how many frames were received.
    pub fn turn(&mut self) -> usize {
        (0..self.ports.len()).map(|place| self.serve(place)).sum()
    }

    fn serve(&mut self, place: usize) -> usize {
        let Self { tables, pool, ports, batch, .. } = self;
        let Some(Served { port, .. }) = ports.get_mut(place) else { return 0 };
        port.driver.receive(pool, batch);
        let received = batch.len();
        if received != 0 {
            let (ifindex, slot) = (port.ifindex, port.slot);
            let tables = tables.seen(self.line, self.transmitters);
            let ways = forward(&tables, ifindex, batch);
            for (frame, way) in batch.drain(..).zip(ways) {
                let Some(slot) = way else {
                    self.exceptions.push(frame);
                    continue;
                };
                let place = self.places.get(slot as usize).map_or(NO_PORT, |place| *place);
                match ports.get_mut(usize::from(place)) {
                    Some(served) => served.out.push(frame),
                    // Cannot be: `transmitters` holds the ports only.
                    None => pool.give(frame),
                }
            }
            deliver(&tables, &mut *self.linux, pool, (ifindex, slot), &mut self.exceptions);
            ports.iter_mut().for_each(|served| transmit(&tables, pool, served));
        }
        received
    }
}

/// A frame of a batch on its way.
struct Job<'t> {
    /// Its place in the batch
    place: usize,
    entry: Entry<'t>,
    parsed: Parsed,
    search: Search,
}

/// Takes a batch that came in by an interface along the whole path; for each frame the slot of the interface that
/// transmits it, or None if it is Linux's.
#[inline]
fn forward<T: Tables>(tables: &T, ifindex: u32, batch: &mut [Buffer]) -> [Option<u32>; BATCH] {
    let mut ways = [None; BATCH];
    let Some(entry) = Entry::find(tables, ifindex) else { return ways };
    batch.iter().filter_map(|frame| frame.bytes().first()).for_each(prefetch);
    let mut jobs: ArrayVec<Job<'_>, BATCH> = ArrayVec::new();
    for (place, frame) in batch.iter().enumerate() {
        let mut entry = entry;
        match begin(tables, &mut entry, frame) {
            Ok((parsed, search)) => jobs.push(Job { place, entry, parsed, search }),
            Err(reason) => count_exception(tables, entry.slot, reason),
        }
    }
    let mut walking = true;
    while walking {
        walking = false;
        for job in &mut jobs {
            walking |= job.search.step(&batch[job.place], tables, &job.parsed);
        }
    }
    for Job { place, entry, parsed, search } in &jobs {
        let frame = &mut batch[*place];
        match end(tables, entry, parsed, search, frame) {
            Ok(slot) => ways[*place] = Some(slot),
            Err(reason) => count_exception(tables, entry.slot, reason),
        }
    }
    ways
}

#[inline(always)]
fn begin<'t, T: Tables>(tables: &'t T, entry: &mut Entry<'t>, frame: &Buffer) -> Result<(Parsed, Search), Reason> {
    let parsed = parse(frame, tables, entry)?;
    Ok((parsed, Search::new(frame, tables, entry, &parsed)?))
}

#[inline(always)]
fn end<T: Tables>(
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
    search: &Search,
    frame: &mut Buffer,
) -> Result<u32, Reason> {
    let hop = route_found(frame, tables, entry, parsed, search)?;
    finish(frame, tables, entry, parsed, &hop)
}

/// Hands frames that came in by an interface to Linux.
#[inline]
fn deliver<T: Tables>(
    tables: &T,
    linux: &mut dyn Linux,
    pool: &mut Pool,
    (ifindex, slot): (u32, u32),
    frames: &mut Vec<Buffer>,
) {
    if frames.is_empty() {
        return;
    }
    let lost = linux.deliver(ifindex, frames);
    if lost != 0 {
        count_exceptions_lost(tables, slot, lost as u64);
    }
    frames.drain(..).for_each(|frame| pool.give(frame));
}

/// Sends what a port has to send.
#[inline]
fn transmit<T: Tables>(tables: &T, pool: &mut Pool, Served { port, out }: &mut Served) {
    if out.is_empty() {
        return;
    }
    port.driver.transmit(pool, out);
    if !out.is_empty() {
        count_tx_lost(tables, port.slot, out.len() as u64);
        out.drain(..).for_each(|frame| pool.give(frame));
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        for served in self.ports.drain(..) {
            served.port.driver.close(&mut self.pool);
        }
    }
}
