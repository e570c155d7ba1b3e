//! The packet path's table of cases through a worker over ports in memory: everything must be as it is when the pipeline
//! takes the same frames one by one, and as the table says.

use std::collections::BTreeMap;
use std::sync::Arc;
use towpath_pipeline::cases::{self, Case, Expect, world::*};
use towpath_pipeline::packet::Packet;
use towpath_pipeline::slices::Slices;
use towpath_pipeline::{Beside, SlotSet, Verdict, process};
use towpath_tables::record::{TableId, port_flags::SINGLE_BUFFER};
use towpath_user::memory::{Cable, Exceptions, MemoryPort};
use towpath_user::{BATCH, Pool, Port, TableSource, Worker};

/// Room for every frame of the table in one buffer.
const STRIDE: usize = 16384 + 64;
/// Frames before and after a case's own in its batch.
const COMPANY: usize = if cfg!(miri) { 2 } else { BATCH - 1 };

struct Router(World);

impl TableSource for Router {
    type Seen<'t> = Slices<'t>;
    fn seen(&self, line: u32, transmitters: SlotSet) -> Slices<'_> {
        Slices { cpu: line, transmitters, ..self.0.slices() }
    }
}

/// What became of frames: those sent by each slot's interface, and Linux's, each in order.
#[derive(PartialEq, Eq, Debug, Default)]
struct Outcome {
    sent: BTreeMap<u32, Vec<Vec<u8>>>,
    exceptions: Vec<Vec<u8>>,
}

/// Interfaces that transmit, and their slots.
const DEVICES: [u32; 3] = [IN, OUT, OTHER];

fn by_worker(world: World, frames: &[&[u8]]) -> (World, Outcome) {
    let tables = Arc::new(Router(world));
    let linux = Exceptions::default();
    let mut worker = Worker::new(tables.clone(), 0, Pool::new(2 * BATCH, STRIDE), Box::new(linux.clone()));
    let cables = DEVICES.map(|slot| (slot, Cable::new(frames.len())));
    for (slot, cable) in &cables {
        worker.add(Port { ifindex: *slot, slot: *slot, driver: Box::new(MemoryPort(cable.clone())) });
    }
    frames.iter().for_each(|frame| assert!(cables[0].1.inwards.push(frame)));
    worker.enter();
    let mut received = 0;
    while received < frames.len() {
        let turn = worker.turn();
        assert!(turn > 0, "{received} of {} frames received", frames.len());
        received += turn;
    }
    worker.leave();
    drop(worker);
    let mut outcome = Outcome::default();
    for (slot, cable) in &cables {
        let sent: Vec<_> = std::iter::from_fn(|| cable.outwards.pop()).collect();
        if !sent.is_empty() {
            outcome.sent.insert(*slot, sent);
        }
    }
    for (ifindex, frame) in linux.take() {
        assert_eq!(ifindex, INGRESS);
        outcome.exceptions.push(frame);
    }
    let Ok(Router(world)) = Arc::try_unwrap(tables) else { panic!("the worker has ended") };
    (world, outcome)
}

fn by_pipeline(world: World, frames: &[&[u8]]) -> (World, Outcome) {
    let mut outcome = Outcome::default();
    for frame in frames {
        let mut packet = Packet::new(frame, 256);
        match process(&mut packet, &world.slices(), INGRESS) {
            Verdict::Forward(slot) => outcome.sent.entry(slot).or_default().push(packet.bytes().to_vec()),
            Verdict::Drop => {}
            Verdict::Exception(_) | Verdict::NotAPort => outcome.exceptions.push(packet.bytes().to_vec()),
        }
    }
    (world, outcome)
}

fn difference(worker: &(World, Outcome), pipeline: &(World, Outcome)) -> Option<String> {
    if worker.1 != pipeline.1 {
        return Some(format!("{:02x?} instead of {:02x?}", worker.1, pipeline.1));
    }
    pipeline.0.watched_like(&worker.0);
    let differs = |id: &TableId| worker.0.table(*id) != pipeline.0.table(*id);
    TableId::ALL.into_iter().find(differs).map(|id| format!("table {} is not as it should be", id.name()))
}

/// What the table of cases says of the frame alone.
fn expected(case: &Case) -> (World, Outcome) {
    let world = case.router();
    case.apply(&world);
    let outcome = match &case.expect {
        Expect::Forward { frame, device, .. } => {
            Outcome { sent: [(*device, vec![frame.clone()])].into(), ..Outcome::default() }
        }
        Expect::Drop(_) => Outcome::default(),
        _ => Outcome { exceptions: vec![case.frame.clone()], ..Outcome::default() },
    };
    (world, outcome)
}

fn chosen() -> Vec<Case> {
    // Under Miri a case takes seconds.
    let step = if cfg!(miri) { 200 } else { 1 };
    let mut cases = cases::all();
    // Beside what gets here nothing travels, and every frame lies in one buffer.
    cases.retain(|case| case.beside.is_none_or(|beside| beside == Beside::NOTHING));
    cases.retain(|case| case.frame.len() < 3500 || case.router().port(OUT).flags.load() & SINGLE_BUFFER == 0);
    cases.into_iter().step_by(step).collect()
}

#[test]
fn every_case_alone() {
    for case in &chosen() {
        let worker = by_worker(case.router(), &[&case.frame]);
        assert_eq!(difference(&worker, &expected(case)), None, "{}", case.name);
    }
}

/// Each case's router gets the case's frame among those of the next cases, more than a batch of them.
#[test]
fn every_case_in_company() {
    let cases = chosen();
    let frames: Vec<&[u8]> = cases.iter().map(|case| case.frame.as_slice()).collect();
    for (n, case) in cases.iter().enumerate() {
        let company: Vec<&[u8]> = frames.iter().copied().cycle().skip(n).take(1 + COMPANY + n % 7).collect();
        let worker = by_worker(case.router(), &company);
        let pipeline = by_pipeline(case.router(), &company);
        assert_eq!(difference(&worker, &pipeline), None, "{}", case.name);
    }
    println!("{} cases", cases.len());
}
