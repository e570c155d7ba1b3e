//! A worker: every frame from receipt to transmission, a batch at a time.

use crate::driver::{BATCH, Linux, Lookout, PortDriver};
use crate::exchange::Exchange;
use crate::pool::{Area, Buffer, Pool};
use std::sync::Arc;
use towpath_pipeline::batch::{Ways, process_batch};
use towpath_pipeline::filters::{self, Bytes};
use towpath_pipeline::mapped::Mapped;
use towpath_pipeline::{SlotSet, Tables, Verdict, capture, count_exceptions, count_exceptions_lost, count_tx_lost};
use towpath_tables::Reason;
use towpath_tables::backing::Backing;
use towpath_tables::grace;
use towpath_tables::record::PORT_SLOTS;
use towpath_tables::trace::Outcome;
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

/// How a frame gets to the port in a slot.
#[derive(Clone, Copy)]
enum Way {
    /// It does not
    None,
    /// The port is the worker's, at this place
    Own(usize),
    /// Another worker has it
    Other(usize),
}

/// A port that another worker sends for this one.
struct Others {
    ifindex: u32,
    slot: u32,
    worker: usize,
}

/// Batches that a port may still have when it is taken away, several times what a ring holds.
const LAST_BATCHES: usize = 64;

/// Runs the packet path for its ports.
pub struct Worker<S> {
    tables: Arc<S>,
    line: u32,
    reading: Reading,
    others: Vec<Others>,
    transmitters: SlotSet,
    sorter: Sorter,
}

/// What of a worker changes while it looks at the tables.
struct Sorter {
    pool: Pool,
    linux: Box<dyn Linux>,
    ports: Vec<Served>,
    /// By slot
    ways: [Way; PORT_SLOTS as usize],
    /// None if there is no other worker
    exchange: Option<Exchange>,
    lookout: Option<Arc<dyn Lookout>>,
    batch: Vec<Buffer>,
    exceptions: Vec<Buffer>,
}

impl<S: TableSource> Worker<S> {
    /// A worker without ports. `line`: which line of the statistics only it writes (see `PortStats`); `linux`: where its
    /// exceptions go.
    pub fn new(tables: Arc<S>, line: u32, pool: Pool, linux: Box<dyn Linux>) -> Self {
        let sorter = Sorter {
            pool,
            linux,
            ports: Vec::new(),
            ways: [Way::None; PORT_SLOTS as usize],
            exchange: None,
            lookout: None,
            batch: Vec::with_capacity(BATCH),
            exceptions: Vec::with_capacity(BATCH),
        };
        let (reading, others, transmitters) = (Reading::default(), Vec::new(), SlotSet::NONE);
        Self { tables, line, reading, others, transmitters, sorter }
    }

    /// The word to wait by for tables to be out of use.
    pub fn reading(&self) -> Reading {
        self.reading.clone()
    }

    /// Memory of its pool.
    pub fn area(&self) -> Area {
        self.sorter.pool.area()
    }

    /// Joins it with other workers.
    pub(crate) fn join(&mut self, exchange: Exchange) {
        self.sorter.exchange = Some(exchange);
    }

    /// Buffers of its pool.
    pub(crate) fn buffers(&self) -> usize {
        self.sorter.pool.count()
    }

    /// Looks at these tables from now on.
    pub fn set_tables(&mut self, tables: Arc<S>) {
        self.tables = tables;
    }

    /// Has this see what is received from now on, or nobody.
    pub(crate) fn set_lookout(&mut self, lookout: Option<Arc<dyn Lookout>>) {
        self.sorter.lookout = lookout;
    }

    /// Serves a port; one with the same index is replaced.
    pub fn add(&mut self, mut port: Port) {
        self.remove(port.ifindex);
        port.driver.start(&mut self.sorter.pool);
        self.sorter.ports.push(Served { port, out: Vec::with_capacity(BATCH) });
        self.find_ways();
    }

    /// Has another worker send what leaves by a port, also if it is a port of this one.
    pub(crate) fn leave_to(&mut self, ifindex: u32, slot: u32, worker: usize) {
        self.others.retain(|other| other.ifindex != ifindex);
        self.others.push(Others { ifindex, slot, worker });
        self.find_ways();
    }

    /// Serves a port no more; nothing if there is none with this index. What has arrived is forwarded, and what others have
    /// handed over is sent.
    pub fn remove(&mut self, ifindex: u32) {
        if let Some(place) = self.sorter.ports.iter().position(|served| served.port.ifindex == ifindex) {
            let tables = self.tables.seen(self.line, self.transmitters);
            let sorter = &mut self.sorter;
            let mut batch = || sorter.serve(&tables, place) + sorter.take_parcels(&tables);
            let _batches = (0..LAST_BATCHES).take_while(|_| batch() != 0).count();
            sorter.ports.remove(place).port.driver.close(&mut sorter.pool);
        }
        self.others.retain(|other| other.ifindex != ifindex);
        self.find_ways();
    }

    fn find_ways(&mut self) {
        let Sorter { ports, ways, .. } = &mut self.sorter;
        *ways = [Way::None; PORT_SLOTS as usize];
        self.transmitters = SlotSet::NONE;
        let own = ports.iter().enumerate().map(|(place, served)| (served.port.slot, Way::Own(place)));
        let others = self.others.iter().map(|other| (other.slot, Way::Other(other.worker)));
        for (slot, way) in own.chain(others) {
            if let Some(entry) = ways.get_mut(slot as usize) {
                *entry = way;
                self.transmitters.insert(slot);
            }
        }
    }

    /// The drivers, to ask what to wait for.
    pub fn drivers(&self) -> impl Iterator<Item = &dyn PortDriver> {
        self.sorter.ports.iter().map(|served| &*served.port.driver)
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
        let Self { tables, line, transmitters, sorter, .. } = self;
        let tables = tables.seen(*line, *transmitters);
        sorter.take_parcels(&tables) + (0..sorter.ports.len()).map(|place| sorter.serve(&tables, place)).sum::<usize>()
    }
}

impl Sorter {
    /// Forwards a batch of a port; how many frames were received.
    fn serve<T: Tables>(&mut self, tables: &T, place: usize) -> usize {
        let Self { pool, ports, lookout, batch, .. } = self;
        let Some(Served { port, .. }) = ports.get_mut(place) else { return 0 };
        let (ifindex, filters) = (port.ifindex, filters::are_there(tables));
        let lookout = lookout.clone();
        let drops = |bytes: &[u8]| {
            let dropped = filters && filters::drops(&Bytes(bytes), tables, ifindex);
            let reason = if dropped { Reason::Filtered } else { Reason::PartialChecksum };
            let told = |lookout| tell(lookout, ifindex, bytes, Outcome::Exception(reason));
            lookout.as_deref().into_iter().for_each(told);
            dropped
        };
        port.driver.receive_unless(pool, batch, &drops);
        let (received, passed) = (batch.len(), port.driver.passed());
        if passed.frames != 0 {
            count_exceptions(tables, port.slot, Reason::PartialChecksum, passed.frames);
            count_exceptions_lost(tables, port.slot, passed.lost);
        }
        if received != 0 {
            let (entered, filter) = ((port.ifindex, port.slot), !port.driver.filtered());
            let ways = match lookout {
                None => forward(tables, entered.0, batch, filter),
                Some(lookout) => self.forward_seen(tables, entered.0, filter, &*lookout),
            };
            self.sort_out(tables, &ways);
            let Self { pool, linux, ports, exceptions, .. } = self;
            if !exceptions.is_empty() {
                let own = ports.get_mut(place).and_then(|served| served.port.driver.deliver(exceptions));
                let lost = own.unwrap_or_else(|| linux.deliver(entered.0, exceptions));
                count_exceptions_lost(tables, entered.1, lost as u64);
                exceptions.drain(..).for_each(|frame| pool.give(frame));
            }
            ports.iter_mut().for_each(|served| transmit(tables, pool, served));
        }
        received
    }

    /// As `forward`, with somebody who looks.
    fn forward_seen<T: Tables>(&mut self, tables: &T, ifindex: u32, filter: bool, lookout: &dyn Lookout) -> Ways {
        if filter {
            self.take_out(tables, ifindex, lookout);
        }
        let copy = |(place, frame): (usize, &Buffer)| {
            let traces = lookout.traces(frame.bytes());
            (traces != 0).then(|| (place, traces, frame.bytes().to_vec()))
        };
        let kept: Vec<_> = self.batch.iter().enumerate().filter_map(copy).collect();
        let ways = forward(tables, ifindex, &mut self.batch, false);
        for (place, traces, frame) in kept {
            ways.outcome(place).into_iter().for_each(|outcome| lookout.tell(traces, ifindex, &frame, outcome));
        }
        ways
    }

    /// Takes out of the batch what the operator has dropped and what captures are to see, as an XDP program does before the
    /// packet path.
    fn take_out<T: Tables>(&mut self, tables: &T, ifindex: u32, lookout: &dyn Lookout) {
        let Self { pool, batch, exceptions, .. } = self;
        let filters = filters::are_there(tables);
        let mut at = 0;
        while let Some(frame) = batch.get(at) {
            let verdict = if filters && filters::drops(frame, tables, ifindex) {
                Verdict::Drop
            } else if lookout.captures(ifindex, frame.bytes()) {
                capture(frame, tables, ifindex)
            } else {
                at += 1;
                continue;
            };
            tell(lookout, ifindex, frame.bytes(), verdict.into());
            let frame = batch.remove(at);
            if verdict == Verdict::Drop { pool.give(frame) } else { exceptions.push(frame) }
        }
    }

    /// Puts each frame of the batch where it is to go.
    #[inline]
    fn sort_out<T: Tables>(&mut self, tables: &T, ways: &Ways) {
        let Self { pool, ports, batch, exchange, .. } = self;
        if let Some(slot) = ways.all_one(batch.len())
            && let Some(Way::Own(place)) = self.ways.get(slot as usize)
            && let Some(Served { out, .. }) = ports.get_mut(*place)
            && out.is_empty()
        {
            return std::mem::swap(batch, out);
        }
        for (frame, slot) in batch.drain(..).zip(ways.0) {
            match slot {
                Ways::NOWHERE => {
                    pool.give(frame);
                    continue;
                }
                Ways::LINUX.. => {
                    self.exceptions.push(frame);
                    continue;
                }
                _ => {}
            }
            let way = self.ways.get(slot as usize).copied().unwrap_or(Way::None);
            let refused = match (way, &mut *exchange) {
                (Way::Own(place), _) if place < ports.len() => {
                    ports[place].out.push(frame);
                    None
                }
                (Way::Other(worker), Some(exchange)) => exchange.hand(worker, slot, frame),
                // Cannot be: `transmitters` holds those with a way only.
                _ => Some(frame),
            };
            if let Some(frame) = refused {
                count_tx_lost(tables, slot, 1);
                pool.give(frame);
            }
        }
        exchange.iter_mut().for_each(Exchange::wake);
    }

    /// Sends what other workers have handed over, a batch at most; how many frames that were.
    fn take_parcels<T: Tables>(&mut self, tables: &T) -> usize {
        let Self { pool, ports, exchange: Some(exchange), .. } = self else { return 0 };
        while let Some(buffer) = exchange.returned() {
            pool.give(buffer);
        }
        let mut taken = 0;
        while taken < BATCH
            && let Some(parcel) = exchange.take()
        {
            taken += 1;
            let served = ports.iter_mut().find(|served| served.port.slot == parcel.slot);
            match served.and_then(|served| Some((served, copy(pool, &parcel.frame)?))) {
                Some((served, frame)) => served.out.push(frame),
                None => count_tx_lost(tables, parcel.slot, 1),
            }
            exchange.give_back(parcel);
        }
        if taken != 0 {
            ports.iter_mut().for_each(|served| transmit(tables, pool, served));
        }
        taken
    }
}

/// Tells the traces of a frame that is as it arrived.
fn tell(lookout: &dyn Lookout, ifindex: u32, frame: &[u8], outcome: Outcome) {
    let traces = lookout.traces(frame);
    if traces != 0 {
        lookout.tell(traces, ifindex, frame, outcome);
    }
}

/// The frame in a buffer of this pool, if one is free and large enough.
#[inline]
fn copy(pool: &mut Pool, frame: &Buffer) -> Option<Buffer> {
    let (mut buffer, bytes) = (pool.take()?, frame.bytes());
    let place = buffer.resize(bytes.len());
    if place.len() < bytes.len() {
        pool.give(buffer);
        return None;
    }
    place.copy_from_slice(bytes);
    Some(buffer)
}

/// Takes a batch that came in by an interface along the whole path; `filter` as for `process_batch`.
#[inline]
fn forward<T: Tables>(tables: &T, ifindex: u32, batch: &mut [Buffer], filter: bool) -> Ways {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
    {
        // SAFETY: this processor has what the function was compiled for.
        return unsafe { forward_v3(tables, ifindex, batch, filter) };
    }
    process_batch(tables, ifindex, batch, filter)
}

/// The same, compiled for the instructions that nearly all processors have (x86-64-v3).
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn forward_v3<T: Tables>(tables: &T, ifindex: u32, batch: &mut [Buffer], filter: bool) -> Ways {
    process_batch(tables, ifindex, batch, filter)
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
        let Sorter { pool, ports, .. } = &mut self.sorter;
        ports.drain(..).for_each(|served| served.port.driver.close(pool));
    }
}
