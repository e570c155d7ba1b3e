//! Tunnels as values, how they lie in their ports' records, and how they are found by what their packets bear.

use std::net::Ipv4Addr;

use crate::lpm::{self, LpmRead, Word};
use crate::order;
use crate::policy::Obstacle;
use crate::reason::Reason;
use crate::record::{Config, Family, Port, TUNNEL_BUCKETS, TUNNEL_PROBES, Tunnel, tunnel_bucket, tunnel_flags};

/// A GRE tunnel over IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelValue {
    /// Our end
    pub local: Ipv4Addr,
    /// The other end
    pub remote: Ipv4Addr,
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
    /// Their TOS; with the lowest bit set it is inherited
    pub tos: u8,
    /// Interface index of their only way out, or 0
    pub link: u32,
    /// Why its packets are exceptions, if they are
    pub policy: Option<Reason>,
}

impl TunnelValue {
    fn words(&self) -> (u32, [u32; 7]) {
        let flag = |set: bool, flag| if set { flag } else { 0 };
        let flags = tunnel_flags::GRE
            | flag(self.input_key.is_some(), tunnel_flags::INPUT_KEY)
            | flag(self.output_key.is_some(), tunnel_flags::OUTPUT_KEY)
            | flag(self.input_checksum, tunnel_flags::INPUT_CHECKSUM)
            | flag(self.output_checksum, tunnel_flags::OUTPUT_CHECKSUM);
        let key = |key: Option<u32>| key.unwrap_or(0).to_be();
        let words = [
            u32::from_ne_bytes(self.local.octets()),
            u32::from_ne_bytes(self.remote.octets()),
            key(self.input_key),
            key(self.output_key),
            u32::from(self.ttl) | u32::from(self.tos) << 8,
            self.link,
            Obstacle::word(self.policy.map(Obstacle::new)),
        ];
        (flags, words)
    }

    fn bucket(&self) -> usize {
        let (_, [local, remote, key, ..]) = self.words();
        tunnel_bucket(local, remote, key)
    }
}

impl Tunnel {
    /// Makes the port this tunnel, or none. Readers see what was, what is, or that it is changing. A tunnel that is another
    /// than before has no way to its other end until `find_way`.
    pub(crate) fn set(&self, value: Option<&TunnelValue>) {
        let (flags, words) = value.map_or((0, [0; 7]), TunnelValue::words);
        let fields = [
            &self.local[0],
            &self.remote[0],
            &self.input_key,
            &self.output_key,
            &self.ttl_tos,
            &self.link,
            &self.policy,
        ];
        let same = self.flags.load() == flags && fields.iter().zip(words).all(|(field, word)| field.load() == word);
        // A writer that was killed may have left it as being changed.
        if same && order::begin(&self.sequence).is_some() {
            return;
        }
        order::change(&self.sequence, || {
            self.flags.store(flags);
            fields.iter().zip(words).for_each(|(field, word)| field.store(word));
            self.way.store(Word::NONE.0);
        });
    }
}

/// Brings the way to the other end of the tunnel that the port is, if it is one, in line with the routes.
pub fn find_way(routes: &impl LpmRead, port: &Port) {
    let tunnel = &port.tunnel;
    if tunnel.flags.load() == 0 {
        return;
    }
    let remote = tunnel.remote[0].load().to_ne_bytes();
    let way = lpm::lookup(routes, port.root[Family::V4 as usize].load(), &remote).unwrap_or(Word::NONE);
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

    const VALUE: TunnelValue = TunnelValue {
        local: Ipv4Addr::new(192, 0, 2, 1),
        remote: Ipv4Addr::new(198, 51, 100, 2),
        input_key: Some(7),
        output_key: None,
        input_checksum: false,
        output_checksum: true,
        ttl: 64,
        tos: 1,
        link: 3,
        policy: Some(Reason::PolicyNetfilter),
    };

    #[test]
    fn a_tunnel_lies_in_its_port_as_it_is_on_the_wire() {
        // SAFETY: a tunnel consists of words, for which zero is a value.
        let tunnel: Tunnel = unsafe { core::mem::zeroed() };
        tunnel.set(Some(&VALUE));
        assert_eq!(tunnel.sequence.load(), 2);
        let flags = tunnel_flags::GRE | tunnel_flags::INPUT_KEY | tunnel_flags::OUTPUT_CHECKSUM;
        assert_eq!(tunnel.flags.load(), flags);
        assert_eq!(tunnel.local[0].load().to_ne_bytes(), [192, 0, 2, 1]);
        assert_eq!(tunnel.remote[0].load().to_ne_bytes(), [198, 51, 100, 2]);
        assert_eq!((tunnel.input_key.load().to_ne_bytes(), tunnel.output_key.load()), ([0, 0, 0, 7], 0));
        assert_eq!((tunnel.ttl_tos.load(), tunnel.link.load()), (0x140, 3));
        assert_eq!(tunnel.policy.load(), 1 + Reason::PolicyNetfilter as u32);
        tunnel.way.store(5);
        tunnel.set(Some(&VALUE));
        assert_eq!((tunnel.sequence.load(), tunnel.way.load()), (2, 5), "nothing is written if it is so already");
        tunnel.set(Some(&TunnelValue { remote: Ipv4Addr::new(198, 51, 100, 3), ..VALUE }));
        assert_eq!((tunnel.sequence.load(), tunnel.way.load()), (4, 0), "the way led to another end");
        tunnel.set(None);
        assert_eq!((tunnel.sequence.load(), tunnel.flags.load(), tunnel.local[0].load()), (6, 0, 0));
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
