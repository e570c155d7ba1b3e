//! Every target on what is kept for it, on its seeds, and on both with bytes changed, added and cut off.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use towpath_fuzz::{TARGETS, Target};

/// Changed forms of each input
const FORMS: u64 = 8;

/// What is run as it is.
fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let mut inputs = (target.seeds)();
    inputs.extend(target.corpus());
    inputs
}

/// A changed form: a few bytes are others, some are doubled, or the end is missing.
fn changed(input: &[u8], form: u64) -> Vec<u8> {
    let mut counter = 0u64;
    let mut random = |below: usize| {
        let mut hasher = DefaultHasher::new();
        (input, form, counter).hash(&mut hasher);
        counter += 1;
        (hasher.finish() % below.max(1) as u64) as usize
    };
    let mut bytes = input.to_vec();
    for _ in 0..=random(4) {
        let at = random(bytes.len());
        match random(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend_from_within(at..),
            2 => bytes.insert(at, random(256) as u8),
            3 => drop(bytes.drain(at..bytes.len().min(at + 4))),
            4 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random(8)),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = [0, 1, 2, 0x7f, 0x80, 0xff][random(6)]),
        }
    }
    bytes
}

fn try_target(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let inputs = inputs(target);
    assert!(!inputs.is_empty(), "{name}: nothing to begin with");
    for input in &inputs {
        (target.run)(input);
        (0..FORMS).for_each(|form| (target.run)(&changed(input, form)));
    }
}

macro_rules! tests {
    ($($name:ident)*) => { $(#[test] fn $name() { try_target(stringify!($name)); })* };
}
tests!(frames messages manager netlink filters tables);

#[test]
fn every_target_has_a_test() {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names, ["frames", "messages", "manager", "netlink", "filters", "tables"]);
}
