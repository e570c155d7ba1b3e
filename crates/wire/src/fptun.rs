//! FPTUN: the record behind a packet that says where in Linux's stack it is to go on, for packets of which this cannot be
//! seen any more, because headers were removed.
//!
//! It never leaves the host, so its fields are in the machine's byte order. The last eight bytes are where every version
//! will have them. All of it fits into the metadata that any driver leaves room for before a frame (32 bytes;
//! include/net/xdp.h, `xdp_metalen_invalid`, Linux 6.1).

use crate::view;
use zerocopy::native_endian::{U16, U32, U64};

/// What proves that a record is the fast path's: drawn anew whenever a receiver is set up, and known to nobody else.
pub type Key = [u64; 2];

view! {
    /// The record, 32 bytes.
    Record {
        /// The receiver's key
        key: [U64; 2],
        /// Index of the interface by which the packet enters: a port, a tunnel, or a VRF's own device. It says which VRF
        /// the packet belongs to
        device: U32,
        /// The packet's mark from there on
        mark: U32,
        /// `Record::EGRESS` or nothing
        flags: U16,
        /// `Record::VERSION`
        version: U16,
        /// `Record::MAGIC`
        magic: U32,
    }
}

/// Where a packet enters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// As if the interface had received it
    Ingress(u32),
    /// As if Linux had decided to send it by the interface
    Egress(u32),
}

/// What became of a packet; the index of its counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Outcome {
    /// Entered as received
    Ingress,
    /// Entered as to be sent
    Egress,
    /// Dropped: no record behind it
    NoRecord,
    /// Dropped: the record has another key
    Forged,
    /// Dropped: the record is of another version, or has flags that this one has not
    Unknown,
    /// Dropped: there is no such interface, or no memory
    Undeliverable,
}

impl Outcome {
    /// All of them, by index.
    pub const ALL: [Self; 6] =
        [Self::Ingress, Self::Egress, Self::NoRecord, Self::Forged, Self::Unknown, Self::Undeliverable];

    /// Short name, stable
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::NoRecord => "no-record",
            Self::Forged => "forged",
            Self::Unknown => "unknown",
            Self::Undeliverable => "undeliverable",
        }
    }

    /// What became of the packet, for people
    pub fn text(self) -> &'static str {
        match self {
            Self::Ingress => "entered Linux as received",
            Self::Egress => "entered Linux as to be sent",
            Self::NoRecord => "dropped: no record of the fast path's behind it, or a truncated one",
            Self::Forged => "dropped: its record is not of this fast path",
            Self::Unknown => "dropped: its record is of another version",
            Self::Undeliverable => "dropped: its record names no interface, or there is no memory",
        }
    }

    /// Whether the packet was dropped.
    pub fn is_loss(self) -> bool {
        !matches!(self, Self::Ingress | Self::Egress)
    }
}

impl Record {
    /// The version described here
    pub const VERSION: u16 = 1;
    /// What every record ends with
    pub const MAGIC: u32 = u32::from_ne_bytes(*b"FPTN");
    /// Flag: the packet enters at the interface's egress, not at its ingress
    pub const EGRESS: u16 = 1;

    /// The record for a packet.
    pub fn new(key: Key, entry: Entry, mark: u32) -> Self {
        let (device, flags) = match entry {
            Entry::Ingress(device) => (device, 0),
            Entry::Egress(device) => (device, Self::EGRESS),
        };
        Self {
            key: key.map(U64::new),
            device: device.into(),
            mark: mark.into(),
            flags: flags.into(),
            version: Self::VERSION.into(),
            magic: Self::MAGIC.into(),
        }
    }

    /// The record in these words: memory that is aligned, which some readers need.
    #[inline(always)]
    pub fn over(words: &[u64; 4]) -> &Self {
        zerocopy::transmute_ref!(words)
    }

    /// Where the packet enters; or why it is to be dropped. Keys are compared in a time that does not depend on them.
    #[inline(always)]
    pub fn check(&self, key: Key) -> Result<Entry, Outcome> {
        if self.magic.get() != Self::MAGIC {
            return Err(Outcome::NoRecord);
        }
        if (self.key[0].get() ^ key[0]) | (self.key[1].get() ^ key[1]) != 0 {
            return Err(Outcome::Forged);
        }
        match (self.version.get(), self.flags.get()) {
            (Self::VERSION, 0) => Ok(Entry::Ingress(self.device.get())),
            (Self::VERSION, Self::EGRESS) => Ok(Entry::Egress(self.device.get())),
            _ => Err(Outcome::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    const KEY: Key = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

    #[test]
    fn a_record_says_where_to_enter_and_fits_into_metadata() {
        assert_eq!(size_of::<Record>(), 32);
        for entry in [Entry::Ingress(7), Entry::Egress(u32::MAX)] {
            assert_eq!(Record::new(KEY, entry, 9).check(KEY), Ok(entry));
        }
    }

    #[test]
    fn every_bit_of_the_key_and_of_the_end_counts() {
        let good = Record::new(KEY, Entry::Ingress(7), 9);
        for bit in 0..8 * size_of::<Record>() {
            let mut record = good;
            record.as_mut_bytes()[bit / 8] ^= 1 << (bit % 8);
            let expected = match bit / 8 {
                0..16 => Err(Outcome::Forged),
                16..20 => Ok(Entry::Ingress(record.device.get())),
                20..24 => Ok(Entry::Ingress(7)),
                24 if bit % 8 == 0 && cfg!(target_endian = "little") => Ok(Entry::Egress(7)),
                24..28 => Err(Outcome::Unknown),
                _ => Err(Outcome::NoRecord),
            };
            assert_eq!(record.check(KEY), expected, "bit {bit}");
        }
    }

    #[test]
    fn outcomes_are_listed_by_their_index() {
        assert!(Outcome::ALL.iter().enumerate().all(|(index, outcome)| *outcome as usize == index));
    }
}
