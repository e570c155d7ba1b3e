//! Whether anybody still looks at what Linux decides: see `towpath_tables::mark::PATIENCE`.

use crate::constant::constant;
use crate::maps::MAPS;
use towpath_pipeline::{Entry, Tables, count_exception};
use towpath_tables::Reason;
use towpath_tables::trace::Outcome;

/// What became of the frame (`Outcome::word`) if it is to go to Linux since nobody has looked at Linux for too long; it is
/// counted then. Whoever loads the program puts the time in place of the mark, or 0: then nothing of this remains.
#[inline(always)]
pub fn unattended(ifindex: u32) -> Option<u32> {
    let patience = constant!(const towpath_tables::mark::PATIENCE) as u64;
    (patience != 0 && is_over(patience)).then(|| count(ifindex))
}

#[inline(always)]
fn is_over(patience: u64) -> bool {
    let heartbeat = MAPS.config().map_or(0, |config| config.heartbeat.load());
    MAPS.now().wrapping_sub(heartbeat) > patience
}

#[inline(never)]
fn count(ifindex: u32) -> u32 {
    let Some(entry) = Entry::find(&MAPS, ifindex) else { return Outcome::NotAPort.word() };
    count_exception(&MAPS, entry.slot, Reason::Unattended);
    Outcome::Exception(Reason::Unattended).word()
}
