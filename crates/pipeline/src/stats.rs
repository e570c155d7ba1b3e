//! Counters. Each is written by one CPU only, so a load and a store are enough.

use crate::{Hop, Parsed, Tables};
use towpath_tables::record::{CpuStats, PortStats};
use towpath_tables::word::W64;
use towpath_tables::{Reason, opaque};

/// Counts an exception of a packet that entered by the port in `slot`.
#[inline(always)]
pub fn count_exception<T: Tables>(tables: &T, slot: u32, reason: Reason) {
    count_exceptions(tables, slot, reason, 1);
}

/// As `count_exception`, for so many packets.
#[inline(always)]
pub fn count_exceptions<T: Tables>(tables: &T, slot: u32, reason: Reason, packets: u64) {
    // The compiler knows that a reason is in range and would leave the check out, but the verifier of Linux 6.1 has
    // lost the range by now.
    if let Some(stats) = tables.stats(tables.cpu()).map(|stats| of_port(stats, slot))
        && let Some(counter) = stats.exceptions.get(opaque(reason as usize))
    {
        add(counter, packets);
    }
}

/// Counts a forwarded packet on the port that it entered by and on the one that it leaves by.
#[inline(always)]
pub fn count_forward<T: Tables>(tables: &T, slot: u32, parsed: &Parsed, hop: &Hop) {
    Tally::of(slot, parsed, hop).write(tables);
}

/// Forwarded packets of one pair of ports, to be counted together.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Tally {
    /// Slots of the port that they entered by and of the one that they leave by
    ports: (u32, u32),
    packets: u64,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl Tally {
    #[inline(always)]
    fn of(slot: u32, parsed: &Parsed, hop: &Hop) -> Self {
        let tx_bytes = (hop.link_len() + parsed.packet_len) as u64;
        Self { ports: (slot, hop.port), packets: 1, rx_bytes: parsed.frame_len as u64, tx_bytes }
    }

    #[cfg(any(test, feature = "std"))]
    /// Adds a packet; those of another pair of ports are counted first.
    #[inline(always)]
    pub fn add<T: Tables>(&mut self, tables: &T, slot: u32, parsed: &Parsed, hop: &Hop) {
        let one = Self::of(slot, parsed, hop);
        if self.ports != one.ports {
            self.write(tables);
            *self = Self { ports: one.ports, ..Self::default() };
        }
        self.packets += one.packets;
        self.rx_bytes += one.rx_bytes;
        self.tx_bytes += one.tx_bytes;
    }

    /// Counts them.
    #[inline(always)]
    pub fn write<T: Tables>(&self, tables: &T) {
        if let Some(stats) = tables.stats(tables.cpu()) {
            self.write_to(stats);
        }
    }

    #[inline(always)]
    fn write_to(&self, stats: &CpuStats) {
        received(of_port(stats, self.ports.0), self.packets, self.rx_bytes);
        sent(of_port(stats, self.ports.1), self.packets, self.tx_bytes);
    }
}

/// As `count_forward`, for a packet that came out of the tunnel in slot `from`.
#[inline(always)]
pub(crate) fn count_out_of_tunnel<T: Tables>(tables: &T, slot: u32, packet: &Parsed, hop: &Hop, from: u32) {
    if let Some(stats) = tables.stats(tables.cpu()) {
        Tally::of(slot, packet, hop).write_to(stats);
        received(of_port(stats, from), 1, packet.packet_len as u64);
    }
}

/// Counts a packet of this length that came out of the tunnel in `slot`, and was counted where it was sent.
#[inline(always)]
pub(crate) fn count_received<T: Tables>(tables: &T, slot: u32, packet_len: usize) {
    if let Some(stats) = tables.stats(tables.cpu()) {
        received(of_port(stats, slot), 1, packet_len as u64);
    }
}

/// As `count_forward`, for a packet that was put into the tunnel in slot `into` when its length was `packet_len`.
#[inline(always)]
pub(crate) fn count_into_tunnel<T: Tables>(
    tables: &T,
    slot: u32,
    packet: &Parsed,
    hop: &Hop,
    into: u32,
    packet_len: usize,
) {
    if let Some(stats) = tables.stats(tables.cpu()) {
        Tally::of(slot, packet, hop).write_to(stats);
        sent(of_port(stats, into), 1, packet_len as u64);
    }
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
fn received(port: &PortStats, packets: u64, bytes: u64) {
    add(&port.rx_packets, packets);
    add(&port.rx_bytes, bytes);
}

#[inline(always)]
fn sent(port: &PortStats, packets: u64, bytes: u64) {
    add(&port.tx_packets, packets);
    add(&port.tx_bytes, bytes);
}

#[inline(always)]
fn add(counter: &W64, amount: u64) {
    counter.store(counter.load().wrapping_add(amount));
}
