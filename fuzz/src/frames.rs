//! The packet path: any frame, in any of the routers of the table of cases.

use crate::take;
use std::cell::RefCell;
use std::collections::HashMap;
use towpath_pipeline::cases::world::{INGRESS, World};
use towpath_pipeline::cases::{self, Case};
use towpath_pipeline::packet::Packet;
use towpath_pipeline::{Beside, Verdict, process};
use towpath_tables::clock;
use towpath_tables::record::PORT_SLOTS;

/// Room before a frame, as in drivers
const HEADROOM: usize = 256;

/// A case's router. Making one takes long, so it is used again: frames leave counters and the states of flows behind.
struct Router {
    world: World,
    states: Vec<u32>,
}

impl Router {
    fn of(case: &Case) -> Self {
        let world = case.router();
        let states = world.flows().iter().map(|flow| flow.state.load()).collect();
        Self { world, states }
    }

    /// As no frame has found it, but for counters.
    fn fresh(&self) -> &World {
        self.world.flows().iter().zip(&self.states).for_each(|(flow, state)| flow.state.store(*state));
        self.world.config().heartbeat.store(clock::now());
        &self.world
    }
}

thread_local! {
    static CASES: Vec<Case> = cases::all();
    static ROUTERS: RefCell<HashMap<usize, Router>> = RefCell::default();
}

fn in_router(number: u16, test: impl FnOnce(&World)) {
    CASES.with(|cases| {
        let number = usize::from(number) % cases.len();
        ROUTERS.with_borrow_mut(|routers| {
            test(routers.entry(number).or_insert_with(|| Router::of(&cases[number])).fresh());
        });
    });
}

/// First the number of a case, then a byte that says how the frame lies in buffers and what travels beside it.
pub fn run(mut bytes: &[u8]) {
    let (Some(case), Some([how])) = (take(&mut bytes), take(&mut bytes)) else { return };
    let first = match how >> 4 {
        0 => bytes.len(),
        some => usize::from(some) * 8,
    };
    let beside = match how & 15 {
        1 => Beside::UNKNOWN,
        2 => Beside { partial: Some(true), tag: None },
        3 => Beside { partial: Some(false), tag: Some((0x8100, 10)) },
        _ => Beside::NOTHING,
    };
    in_router(u16::from_le_bytes(case), |world| forward(world, bytes, first, beside));
}

fn forward(world: &World, bytes: &[u8], first: usize, beside: Beside) {
    let mut packet = Packet::with_linear(bytes, HEADROOM, first).with_beside(beside);
    let before = counted(world);
    let verdict = process(&mut packet, &world.slices(), INGRESS);
    let after = counted(world);
    let more = (after.0 - before.0, after.1 - before.1);
    match verdict {
        Verdict::NotAPort => assert_eq!(more, (0, 0), "a frame that is not looked at is not counted"),
        Verdict::Exception(reason) => {
            assert_eq!(packet.bytes(), bytes, "{reason:?}: Linux gets the frame as it came");
            assert_eq!(more, (1, 0), "{reason:?}");
        }
        Verdict::Drop => {
            assert_eq!(packet.bytes(), bytes, "nothing is written before a frame is dropped");
            assert_eq!(more, (1, 0), "it is counted");
        }
        Verdict::Forward(device) => {
            assert!(device < PORT_SLOTS, "device {device}");
            assert_eq!(more, (0, 1), "{:02x?}", packet.bytes());
        }
    }
}

/// Frames counted as exceptions, and as sent by interfaces that are no tunnels.
fn counted(world: &World) -> (u64, u64) {
    let slots = || (0..PORT_SLOTS).map(|slot| world.stats(slot));
    let exceptions = slots().flat_map(|stats| &stats.exceptions).map(|count| count.load()).sum();
    let sent = (0..PORT_SLOTS).filter(|slot| world.port(*slot).tunnel.flags.load() == 0);
    (exceptions, sent.map(|slot| world.stats(slot).tx_packets.load()).sum())
}

pub fn seeds() -> Vec<Vec<u8>> {
    let seed = |(case, frame): (usize, &[u8])| [&(case as u16).to_le_bytes()[..], &[0], frame].concat();
    CASES.with(|cases| cases.iter().enumerate().map(|(number, case)| seed((number, &case.frame))).collect())
}
