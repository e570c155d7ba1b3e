//! Counters. Each is written by one CPU only, so a load and a store are enough.

use crate::{Hop, Parsed, Tables};
use towpath_tables::record::{CpuStats, PortStats};
use towpath_tables::word::W64;
use towpath_tables::{Reason, opaque};

/// Counts an exception of a packet that entered by the port in `slot`.
#[inline(always)]
pub fn count_exception<T: Tables>(tables: &T, slot: u32, reason: Reason) {
    // The compiler knows that a reason is in range and would leave the check out, but the verifier of Linux 6.1 has
    // lost the range by now.
    if let Some(stats) = tables.stats(tables.cpu()).map(|stats| of_port(stats, slot))
        && let Some(counter) = stats.exceptions.get(opaque(reason as usize))
    {
        add(counter, 1);
    }
}

/// Counts a forwarded packet on the port that it entered by and on the one that it leaves by.
#[inline(always)]
pub fn count_forward<T: Tables>(tables: &T, slot: u32, parsed: &Parsed, hop: &Hop) {
    let Some(stats) = tables.stats(tables.cpu()) else { return };
    let port = of_port(stats, slot);
    add(&port.rx_packets, 1);
    add(&port.rx_bytes, parsed.frame_len as u64);
    let port = of_port(stats, hop.port);
    add(&port.tx_packets, 1);
    add(&port.tx_bytes, (hop.link_len() + parsed.packet_len) as u64);
}

/// Counts packets that were forwarded by the interface in `slot` and found no room in its ring.
#[inline(always)]
pub fn count_tx_lost<T: Tables>(tables: &T, slot: u32, packets: u64) {
    if let Some(stats) = tables.stats(tables.cpu()).map(|stats| of_port(stats, slot)) {
        add(&stats.tx_lost, packets);
    }
}

/// Counts exceptions of the interface in `slot` that could not be handed to Linux.
#[inline(always)]
pub fn count_exceptions_lost<T: Tables>(tables: &T, slot: u32, packets: u64) {
    if let Some(stats) = tables.stats(tables.cpu()).map(|stats| of_port(stats, slot)) {
        add(&stats.exceptions_lost, packets);
    }
}

/// A slot is less than the number of slots; the remainder says it to the verifier.
#[inline(always)]
fn of_port(stats: &CpuStats, slot: u32) -> &PortStats {
    &stats[opaque(slot as usize) % stats.len()]
}

#[inline(always)]
fn add(counter: &W64, amount: u64) {
    counter.store(counter.load().wrapping_add(amount));
}
