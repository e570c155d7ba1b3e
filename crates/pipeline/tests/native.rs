//! The packet path, compiled natively, against its table of cases.

use towpath_pipeline::cases::{self, Case, Expect, translate::translations, world::INGRESS};
use towpath_pipeline::packet::Packet;
use towpath_pipeline::{Verdict, process};
use towpath_tables::record::TableId;

/// Bytes in a test run's first buffer: a page without room before and shared info behind.
const FIRST: usize = 4096 - 256 - 320;

/// Runs a case; what is wrong with the outcome, if anything.
fn run(case: &Case, headroom: usize) -> Result<(), String> {
    let (world, wanted) = (case.router(), case.router());
    wanted.watched_like(&world);
    case.apply(&wanted);
    let mut packet = Packet::with_linear(&case.frame, headroom, FIRST);
    if let Some(beside) = case.beside {
        packet = packet.with_beside(beside);
    }
    let verdict = process(&mut packet, &world.slices(), INGRESS);
    let (expected, frame) = match &case.expect {
        Expect::NotAPort => (Verdict::NotAPort, &case.frame),
        Expect::Drop(_) => (Verdict::Drop, &case.frame),
        Expect::Exception(_, reason) => (Verdict::Exception(*reason), &case.frame),
        Expect::Forward { frame, device, .. } => (Verdict::Forward(*device), frame),
    };
    if verdict != expected {
        return Err(format!("{verdict:?} instead of {expected:?}"));
    }
    if packet.bytes() != frame {
        return Err(format!("frame is {:02x?} instead of {frame:02x?}", packet.bytes()));
    }
    match TableId::ALL.into_iter().find(|id| world.table(*id) != wanted.table(*id)) {
        Some(table) => Err(format!("table {} is not as it should be", table.name())),
        None => Ok(()),
    }
}

#[test]
fn every_case() {
    let cases = cases::all();
    let wrong: Vec<_> =
        cases.iter().filter_map(|case| run(case, 256).err().map(|e| format!("{}: {e}", case.name))).collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    println!("{} cases", cases.len());
}

#[test]
fn every_translation() {
    let wrong = translations().into_iter().filter_map(|case| {
        let (world, wanted) = (case.router(), case.router());
        case.apply(&wanted);
        let after = case.run(&world);
        if after != case.after {
            return Some(format!("{}: {after:02x?} instead of {:02x?}", case.name, case.after));
        }
        let stats = TableId::MappingStats;
        (world.table(stats) != wanted.table(stats)).then(|| format!("{}: counters", case.name))
    });
    let wrong: Vec<_> = wrong.collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), translations().len(), wrong.join("\n"));
}

#[test]
fn names_are_unique() {
    let translations = translations().into_iter().map(|case| case.name);
    let mut names: Vec<_> = cases::all().into_iter().map(|case| case.name).chain(translations).collect();
    names.sort();
    let twice: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}
