//! What a worker does beside the packet path: counts what is lost, keeps its buffers, and takes orders.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use towpath_pipeline::cases::{self, Case, Expect, world::*};
use towpath_pipeline::slices::Slices;
use towpath_pipeline::{SlotSet, Tables};
use towpath_tables::grace::Grace;
use towpath_user::memory::{Cable, Exceptions, MemoryPort, Nowhere, Wire};
use towpath_user::{BATCH, Buffer, Core, Engine, Error, Linux, Pool, Port, PortDriver, TableSource, Worker};

struct Router(World);

impl TableSource for Router {
    type Seen<'t> = Slices<'t>;
    fn seen(&self, line: u32, transmitters: SlotSet) -> Slices<'_> {
        Slices { cpu: line, transmitters, ..self.0.slices() }
    }
}

fn port(slot: u32, cable: &Cable) -> Port {
    Port { ifindex: slot, slot, driver: Box::new(MemoryPort(cable.clone())) }
}

fn case(name: &str) -> Case {
    cases::all().into_iter().find(|case| case.name == name).expect("a case of this name")
}

/// A frame from `IN` to `OUT`, and what it becomes.
fn forwarded() -> (Vec<u8>, Vec<u8>) {
    let Case { frame, expect: Expect::Forward { frame: after, .. }, .. } = case("IPv4, padding 0") else {
        panic!("it is forwarded")
    };
    (frame, after)
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within 10 s");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn frames_that_find_no_room_are_counted_and_their_buffers_come_back() {
    let tables = Arc::new(Router(World::new()));
    // No more buffers than a batch: one that is lost would be missed.
    let mut worker = Worker::new(tables.clone(), 0, Pool::new(BATCH, 2112), Box::new(Nowhere));
    let (inside, outside) = (Cable::new(1000), Cable::new(10));
    worker.add(port(IN, &inside));
    worker.add(port(OUT, &outside));
    let (frame, after) = forwarded();
    let exception = case("EtherType 0806").frame;
    for round in 0..5 {
        for _ in 0..50 {
            assert!(inside.inwards.push(&frame));
        }
        for _ in 0..30 {
            assert!(inside.inwards.push(&exception));
        }
        worker.enter();
        assert_eq!((worker.turn(), worker.turn(), worker.turn()), (64, 16, 0), "round {round}");
        worker.leave();
        let sent: Vec<_> = std::iter::from_fn(|| outside.outwards.pop()).collect();
        assert_eq!(sent, vec![after.clone(); 10], "round {round}");
    }
    let stats = tables.0.stats(OUT);
    assert_eq!((stats.tx_packets.load(), stats.tx_lost.load()), (250, 200));
    let stats = tables.0.stats(IN);
    let exceptions: u64 = stats.exceptions.iter().map(|counter| counter.load()).sum();
    assert_eq!((stats.rx_packets.load(), exceptions, stats.exceptions_lost.load()), (250, 150, 150));
}

#[test]
fn what_leaves_by_a_port_of_nobodys_is_linuxs() {
    let tables = Arc::new(Router(World::new()));
    let linux = Exceptions::default();
    let mut worker = Worker::new(tables.clone(), 0, Pool::new(BATCH, 2112), Box::new(linux.clone()));
    let (inside, outside) = (Cable::new(10), Cable::new(10));
    worker.add(port(IN, &inside));
    worker.add(port(OUT, &outside));
    let (frame, after) = forwarded();
    let turn = |worker: &mut Worker<Router>| {
        assert!(inside.inwards.push(&frame));
        worker.enter();
        assert_eq!(worker.turn(), 1);
        worker.leave();
    };
    turn(&mut worker);
    assert_eq!((outside.outwards.pop(), linux.take()), (Some(after), vec![]));
    worker.remove(OUT);
    turn(&mut worker);
    assert_eq!((outside.outwards.pop(), linux.take()), (None, vec![(IN, frame.clone())]));
    let reason = towpath_tables::Reason::EgressNotServed as usize;
    assert_eq!(tables.0.stats(IN).exceptions[reason].load(), 1);
}

#[test]
fn the_table_of_statistics_has_a_line_for_each_worker() {
    let tables = Arc::new(Router(World::new()));
    let inside = Cable::new(10);
    // The world has one line only, so a worker that writes another one finds none.
    let mut worker = Worker::new(tables.clone(), 1, Pool::new(BATCH, 2112), Box::new(Nowhere));
    worker.add(port(IN, &inside));
    assert!(inside.inwards.push(&case("EtherType 0806").frame));
    worker.enter();
    assert_eq!(worker.turn(), 1);
    worker.leave();
    assert!(tables.0.stats(IN).exceptions.iter().all(|counter| counter.load() == 0));
    assert!(tables.0.slices().stats(1).is_none());
}

fn start(tables: &Arc<Router>, linux: &Exceptions) -> Engine<Router> {
    let equip = |_| (Pool::new(4 * BATCH, 2112), Box::new(linux.clone()) as Box<dyn Linux>);
    Engine::start(tables, &[Core(0)], 0, equip).expect("there is a core 0")
}

#[test]
#[cfg_attr(miri, ignore = "threads on cores")]
fn an_engine_takes_ports_and_tables_while_it_works() {
    let linux = Exceptions::default();
    let first = Arc::new(Router(World::new()));
    let engine = start(&first, &linux);
    let (inside, outside) = (Cable::new(1000), Cable::new(1000));
    assert!(engine.add(0, port(IN, &inside)));
    assert!(engine.add(0, port(OUT, &outside)));
    assert!(!engine.add(1, port(OTHER, &outside)), "there is one worker");
    let (frame, after) = forwarded();
    assert!(inside.inwards.push(&frame));
    assert_eq!(wait_for("a frame", || outside.outwards.pop()), after);

    // Tables in which the port is down. The old ones are nobody's when `set_tables` returns.
    let second = Arc::new(Router(World::new()));
    second.0.unflag(IN, towpath_tables::record::port_flags::READY);
    engine.set_tables(&second);
    assert!(inside.inwards.push(&frame));
    assert_eq!(wait_for("an exception", || linux.take().pop()), (IN, frame.clone()));
    assert_eq!((first.0.stats(IN).rx_packets.load(), second.0.stats(IN).rx_packets.load()), (1, 0));
    wait_for("the first tables' end", || (Arc::strong_count(&first) == 1).then_some(()));

    engine.remove(IN);
    assert!(inside.inwards.push(&frame));
    drop(engine);
    assert_eq!(inside.inwards.pop(), Some(frame), "nobody took it");
    assert_eq!(Arc::strong_count(&second), 1);
}

/// A port that says when frames arrive, so that its worker sleeps until something else wakes it.
struct Silent(MemoryPort<Cable>);

impl PortDriver for Silent {
    fn start(&mut self, _: &mut Pool) {}
    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        self.0.receive(pool, frames);
    }
    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        self.0.transmit(pool, frames);
    }
    fn readable<'d>(&'d self, _: &mut Vec<BorrowedFd<'d>>) -> bool {
        true
    }
    fn close(self: Box<Self>, _: &mut Pool) {}
}

/// In by a port of one worker, out by one of the other, which is asleep at first and has few buffers; more frames than
/// there are buffers, so that they must come back.
#[test]
#[cfg_attr(miri, ignore = "threads on cores")]
fn a_worker_hands_frames_to_the_one_that_has_the_port() {
    let tables = Arc::new(Router(World::new()));
    let linux = Exceptions::default();
    let cores = towpath_user::usable_cores().expect("cores");
    let [first, second, ..] = cores[..] else { return eprintln!("there is one core only") };
    let equip = |_| (Pool::new(BATCH, 2112), Box::new(linux.clone()) as Box<dyn Linux>);
    // The world has one line of statistics: the first worker's.
    let engine =
        Engine::start(&tables, &[first, second], 0u32.wrapping_sub(first.0), equip).expect("there are two cores");
    let (inside, outside) = (Cable::new(1000), Cable::new(1000));
    assert!(engine.add(0, port(IN, &inside)));
    let out = Box::new(Silent(MemoryPort(outside.clone())));
    assert!(engine.add(1, Port { ifindex: OUT, slot: OUT, driver: out }));
    engine.leave_to(0, (OUT, OUT), 1);
    let (frame, after) = forwarded();
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(if round % 10 == 0 { 20 } else { 0 }));
        for _ in 0..BATCH / 2 {
            assert!(inside.inwards.push(&frame));
        }
        for _ in 0..BATCH / 2 {
            assert_eq!(wait_for("a frame", || outside.outwards.pop()), after, "round {round}");
        }
    }
    let count = 20 * BATCH as u64 / 2;
    let (inner, outer) = (tables.0.stats(IN), tables.0.stats(OUT));
    assert_eq!((inner.rx_packets.load(), outer.tx_packets.load(), outer.tx_lost.load()), (count, count, 0));
    assert_eq!(linux.take(), []);
    // What has arrived is forwarded before the port is gone; then the way is closed.
    for _ in 0..BATCH {
        assert!(inside.inwards.push(&frame));
    }
    engine.remove(IN);
    engine.remove(OUT);
    let sent: Vec<_> = std::iter::from_fn(|| outside.outwards.pop()).collect();
    assert_eq!((sent.len(), outer.tx_lost.load()), (BATCH, 0));
    assert!(engine.add(0, port(IN, &inside)));
    assert!(inside.inwards.push(&frame));
    assert_eq!(wait_for("an exception", || linux.take().pop()), (IN, frame));
}

/// A next hop changes to and fro as fast as it can, with a grace period each time, while frames flow: none may be lost,
/// and none may be sent by what was out of use before it came.
#[test]
#[cfg_attr(miri, ignore = "threads on cores")]
fn nothing_is_misrouted_while_tables_change() {
    let linux = Exceptions::default();
    let tables = Arc::new(Router(World::new()));
    let engine = start(&tables, &linux);
    let cables = [(IN, Cable::new(64)), (OUT, Cable::new(64)), (OTHER, Cable::new(64))];
    assert!(cables.iter().all(|(slot, cable)| engine.add(0, port(*slot, cable))));
    let [(_, inside), (_, out), (_, other)] = &cables;
    let (frame, _) = forwarded();
    let mut grace = engine.grace();
    let hop = tables.0.nexthop(HOP);
    for round in 0..2000u32 {
        let (slot, cable, not) = if round % 2 == 0 { (OUT, out, other) } else { (OTHER, other, out) };
        towpath_tables::order::change(&hop.sequence, || {
            hop.port.store(slot);
            hop.device.store(slot);
        });
        grace.wait();
        assert!(inside.inwards.push(&frame));
        wait_for("the frame", || cable.outwards.pop());
        assert_eq!((not.outwards.pop(), linux.take()), (None, vec![]), "round {round}");
    }
}

/// A wire that holds whoever asks for a frame until it is told to let go.
struct Held {
    asked: SyncSender<()>,
    go_on: Receiver<()>,
}

impl Wire for Held {
    fn arrive(&mut self, _: &mut Buffer) -> bool {
        let _ = self.asked.send(());
        let _ = self.go_on.recv();
        false
    }

    fn leave(&mut self, _: &[u8]) -> bool {
        false
    }
}

#[test]
#[cfg_attr(miri, ignore = "threads on cores")]
fn whoever_waits_for_a_grace_period_waits_for_a_batch_that_is_under_way() {
    let engine = start(&Arc::new(Router(World::new())), &Exceptions::default());
    let ((asked, when_asked), (let_go, go_on)) = (sync_channel(0), sync_channel(0));
    assert!(engine.add(0, Port { ifindex: IN, slot: IN, driver: Box::new(MemoryPort(Held { asked, go_on })) }));
    when_asked.recv().expect("the worker asks for a frame");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            engine.grace().wait();
            over.store(true, SeqCst);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!over.load(SeqCst), "the worker is still at its batch");
        // It lets go, then and ever after.
        drop(let_go);
        drop(when_asked);
        wait_for("the grace period's end", || over.load(SeqCst).then_some(()));
    });
}

/// A wire that breaks.
struct Broken;

impl Wire for Broken {
    fn arrive(&mut self, _: &mut Buffer) -> bool {
        panic!("this worker is to panic")
    }

    fn leave(&mut self, _: &[u8]) -> bool {
        false
    }
}

#[test]
#[cfg_attr(miri, ignore = "threads on cores")]
fn nobody_waits_for_a_worker_that_is_gone() {
    let engine = start(&Arc::new(Router(World::new())), &Exceptions::default());
    assert!(engine.add(0, Port { ifindex: IN, slot: IN, driver: Box::new(MemoryPort(Broken)) }));
    wait_for("the worker's end", || (!engine.add(0, port(OUT, &Cable::new(1)))).then_some(()));
    engine.remove(IN);
    engine.grace().wait();
}

#[test]
#[cfg_attr(miri, ignore = "cores")]
fn cores_that_cannot_be_are_refused() {
    let tables = Arc::new(Router(World::new()));
    let start = |cores: &[Core]| {
        Engine::start(&tables, cores, 0, |_| (Pool::new(1, 512), Box::new(Nowhere) as Box<dyn Linux>)).err()
    };
    assert!(matches!(start(&[Core(1_000_000)]), Some(Error::NoCore { core: 1_000_000, .. })));
    assert!(matches!(start(&[Core(0), Core(0)]), Some(Error::SameCore(0))));
}
