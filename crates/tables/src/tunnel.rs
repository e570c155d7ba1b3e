//! Tunnels as values, how they lie in their ports' records, and how they are found by what their packets bear.

use std::net::IpAddr;

use crate::lpm::{self, LpmRead, Word};
use crate::order;
use crate::policy::Obstacle;
use crate::reason::Reason;
use crate::record::{Config, Family, Port, TUNNEL_BUCKETS, TUNNEL_PROBES, Tunnel, tunnel_bucket, tunnel_flags};

/// A GRE tunnel, between two addresses of one family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelValue {
    /// Our end
    pub local: IpAddr,
    /// The other end
    pub remote: IpAddr,
    /// Key of packets to us
    pub input_key: Option<u32>,
    /// Key of packets from us
    pub output_key: Option<u32>,
    /// Whether packets to us bear a checksum
    pub input_checksum: bool,
    /// Whether packets from us bear a checksum
    pub output_checksum: bool,
    /// Time to live of packets from us; 0 to inherit it
    pub ttl: u8,
    /// Their TOS or traffic class; None to inherit it
    pub class: Option<u8>,
    /// Their flow label, if they are IPv6
    pub label: Label,
    /// The encapsulation limit that they bear, if they are IPv6 and do
    pub limit: Option<u8>,
    /// Interface index of their only way out, or 0
    pub link: u32,
    /// Why its packets are exceptions, if they are
    pub policy: Option<Reason>,
}

/// The flow label of packets from us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    /// The label; None to inherit it
    pub fixed: Option<u32>,
    /// Whether one is made where there would be none
    pub made: bool,
}

impl Label {
    /// None at all
    pub const NONE: Self = Self { fixed: Some(0), made: false };
}

/// An address as in `Tunnel`.
fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => zerocopy::transmute!(address.octets()),
    }
}

impl TunnelValue {
    /// Flags, both ends, and the other words in the order of `Tunnel`
    fn words(&self) -> (u32, [[u32; 4]; 2], [u32; 5]) {
        let flag = |set: bool, flag| if set { flag } else { 0 };
        let flags = tunnel_flags::GRE
            | flag(self.remote.is_ipv6(), tunnel_flags::V6)
            | flag(self.class.is_none(), tunnel_flags::INHERIT_CLASS)
            | flag(self.label.fixed.is_none(), tunnel_flags::INHERIT_LABEL)
            | flag(self.label.made, tunnel_flags::MAKE_LABEL)
            | flag(self.limit.is_some(), tunnel_flags::LIMIT)
            | self.label.fixed.unwrap_or(0) << tunnel_flags::LABEL_SHIFT
            | flag(self.input_key.is_some(), tunnel_flags::INPUT_KEY)
            | flag(self.output_key.is_some(), tunnel_flags::OUTPUT_KEY)
            | flag(self.input_checksum, tunnel_flags::INPUT_CHECKSUM)
            | flag(self.output_checksum, tunnel_flags::OUTPUT_CHECKSUM);
        let key = |key: Option<u32>| key.unwrap_or(0).to_be();
        let rest = [
            key(self.input_key),
            key(self.output_key),
            u32::from_le_bytes([self.ttl, self.class.unwrap_or(0), self.limit.unwrap_or(0), 0]),
            self.link,
            Obstacle::word(self.policy.map(Obstacle::new)),
        ];
        (flags, [self.local, self.remote].map(words), rest)
    }

    fn bucket(&self) -> usize {
        let (_, [local, remote], [key, ..]) = self.words();
        tunnel_bucket(local, remote, key)
    }
}

impl Tunnel {
    /// Makes the port this tunnel, or none. Readers see what was, what is, or that it is changing. A tunnel that is another
    /// than before has no way to its other end until `find_way`.
    pub(crate) fn set(&self, value: Option<&TunnelValue>) {
        let (flags, ends, rest) = value.map_or((0, [[0; 4]; 2], [0; 5]), TunnelValue::words);
        let others = [&self.input_key, &self.output_key, &self.ttl_tos, &self.link, &self.policy];
        let fields =
            || self.local.iter().chain(&self.remote).chain(others).zip(ends.as_flattened().iter().chain(&rest));
        let same = self.flags.load() == flags && fields().all(|(field, word)| field.load() == *word);
        // A writer that was killed may have left it as being changed.
        if same && order::begin(&self.sequence).is_some() {
            return;
        }
        order::change(&self.sequence, || {
            self.flags.store(flags);
            fields().for_each(|(field, word)| field.store(*word));
            self.way.store(Word::NONE.0);
        });
    }
}

/// Brings the way to the other end of the tunnel that the port is, if it is one, in line with the routes.
pub fn find_way(routes: &impl LpmRead, port: &Port) {
    let tunnel = &port.tunnel;
    let flags = tunnel.flags.load();
    if flags == 0 {
        return;
    }
    let remote = [0, 1, 2, 3].map(|word: usize| tunnel.remote[word].load());
    let root = |family| port.root[family as usize].load();
    let way = match flags & tunnel_flags::V6 {
        0 => lpm::lookup(routes, root(Family::V4), &remote[0].to_ne_bytes()),
        _ => lpm::lookup::<16>(routes, root(Family::V6), &zerocopy::transmute!(remote)),
    };
    let way = way.unwrap_or(Word::NONE);
    if way.0 != tunnel.way.load() {
        order::publish(&tunnel.way, way.0);
    }
}

/// Makes tunnels found in these slots, and no others. Gives the slots of those for which no place was left: packets to them
/// are not found.
pub(crate) fn index(config: &Config, tunnels: &[(TunnelValue, u32)]) -> Vec<u32> {
    let mut places = [0; TUNNEL_BUCKETS];
    let mut left = Vec::new();
    for (tunnel, slot) in tunnels {
        let mut probes = (0..TUNNEL_PROBES).map(|probe| (tunnel.bucket() + probe) % TUNNEL_BUCKETS);
        match probes.find(|place| places[*place] == 0) {
            Some(place) => places[place] = slot + 1,
            None => left.push(*slot),
        }
    }
    config.tunnels.iter().zip(places).for_each(|(word, value)| order::publish(word, value));
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    const VALUE: TunnelValue = TunnelValue {
        local: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        remote: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2)),
        input_key: Some(7),
        output_key: None,
        input_checksum: false,
        output_checksum: true,
        ttl: 64,
        class: None,
        label: Label::NONE,
        limit: None,
        link: 3,
        policy: Some(Reason::PolicyNetfilter),
    };

    #[test]
    fn a_tunnel_lies_in_its_port_as_it_is_on_the_wire() {
        // SAFETY: a tunnel consists of words, for which zero is a value.
        let tunnel: Tunnel = unsafe { core::mem::zeroed() };
        tunnel.set(Some(&VALUE));
        assert_eq!(tunnel.sequence.load(), 2);
        let flags =
            tunnel_flags::GRE | tunnel_flags::INPUT_KEY | tunnel_flags::OUTPUT_CHECKSUM | tunnel_flags::INHERIT_CLASS;
        assert_eq!(tunnel.flags.load(), flags);
        assert_eq!(tunnel.local[0].load().to_ne_bytes(), [192, 0, 2, 1]);
        assert_eq!(tunnel.remote[0].load().to_ne_bytes(), [198, 51, 100, 2]);
        assert_eq!((tunnel.input_key.load().to_ne_bytes(), tunnel.output_key.load()), ([0, 0, 0, 7], 0));
        assert_eq!((tunnel.ttl_tos.load(), tunnel.link.load()), (0x40, 3));
        assert_eq!(tunnel.policy.load(), 1 + Reason::PolicyNetfilter as u32);
        tunnel.way.store(5);
        tunnel.set(Some(&VALUE));
        assert_eq!((tunnel.sequence.load(), tunnel.way.load()), (2, 5), "nothing is written if it is so already");
        tunnel.set(Some(&TunnelValue { remote: Ipv4Addr::new(198, 51, 100, 3).into(), ..VALUE }));
        assert_eq!((tunnel.sequence.load(), tunnel.way.load()), (4, 0), "the way led to another end");
        tunnel.set(None);
        assert_eq!((tunnel.sequence.load(), tunnel.flags.load(), tunnel.local[0].load()), (6, 0, 0));
    }

    #[test]
    fn a_tunnel_over_ipv6_has_all_words_of_its_ends() {
        let end = |last| Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, last);
        let value = TunnelValue {
            local: end(1).into(),
            remote: end(2).into(),
            class: Some(0xb8),
            label: Label { fixed: Some(0xabcde), made: true },
            limit: Some(4),
            ..VALUE
        };
        // SAFETY: as above.
        let tunnel: Tunnel = unsafe { core::mem::zeroed() };
        tunnel.set(Some(&value));
        let bytes = |words: &[crate::word::W32; 4]| -> Vec<u8> {
            words.iter().flat_map(|word| word.load().to_ne_bytes()).collect()
        };
        assert_eq!((bytes(&tunnel.local), bytes(&tunnel.remote)), (end(1).octets().into(), end(2).octets().into()));
        let flags = tunnel_flags::GRE
            | tunnel_flags::V6
            | tunnel_flags::INPUT_KEY
            | tunnel_flags::OUTPUT_CHECKSUM
            | tunnel_flags::MAKE_LABEL
            | tunnel_flags::LIMIT;
        assert_eq!((tunnel.flags.load(), tunnel.ttl_tos.load()), (flags | 0xabcde << 12, 0x4_b840));
        tunnel.set(Some(&TunnelValue { label: Label { fixed: None, made: false }, limit: None, ..value }));
        let gone = tunnel_flags::MAKE_LABEL | tunnel_flags::LIMIT;
        assert_eq!(tunnel.flags.load(), flags & !gone | tunnel_flags::INHERIT_LABEL);
        tunnel.set(Some(&VALUE));
        assert_eq!(tunnel.local[3].load(), 0);
    }

    #[test]
    fn a_tunnel_whose_writer_was_killed_at_its_last_word_is_set_again() {
        // SAFETY: as above.
        let tunnel: Tunnel = unsafe { core::mem::zeroed() };
        tunnel.set(Some(&VALUE));
        tunnel.sequence.store(1);
        tunnel.set(Some(&VALUE));
        assert_eq!(tunnel.sequence.load(), 2);
    }

    #[test]
    fn places_run_out_for_tunnels_of_one_bucket_only() {
        // SAFETY: as above.
        let config: Config = unsafe { core::mem::zeroed() };
        let same: Vec<_> = (0..u32::MAX)
            .map(|key| TunnelValue { input_key: Some(key), ..VALUE })
            .filter(|tunnel| tunnel.bucket() == TUNNEL_BUCKETS - 1)
            .zip(10..16)
            .collect();
        assert_eq!(index(&config, &same), [14, 15]);
        assert_eq!(config.tunnels[TUNNEL_BUCKETS - 1].load(), 11);
        assert_eq!([0, 1, 2, 3].map(|place: usize| config.tunnels[place].load()), [12, 13, 14, 0]);
        assert_eq!(index(&config, &[]), []);
        assert!(config.tunnels.iter().all(|word| word.load() == 0));
    }
}
