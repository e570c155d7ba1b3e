//! Cases of what Linux receives and transmits by a port with mappings.

use super::nat::{FAMILIES, addresses, bare, icmp, packet_of_ports as packet};
use super::*;
use crate::nat::{Fate, Held, Passing, changed, translate};
use std::net::IpAddr;
use towpath_tables::mapping::Way;
use towpath_wire::{Change, View};

/// One case: a packet passes `INGRESS`.
pub struct Translation {
    /// What it shows
    pub name: String,
    /// Changes the router from what `World::new` makes
    pub configure: Box<dyn Fn(&mut World)>,
    /// Whether it leaves or comes in
    pub way: Way,
    /// The frame
    pub frame: Vec<u8>,
    /// It is of a VLAN, as what lies beside it says
    pub tagged: bool,
    /// The frame afterwards; None if it is dropped
    pub after: Option<Vec<u8>>,
    /// The mapping that counts it
    pub counts: Option<u32>,
}

impl Translation {
    /// The router as the packet finds it.
    pub fn router(&self) -> World {
        let mut world = World::new();
        (self.configure)(&mut world);
        world
    }

    /// Writes into the router the counters that must be found afterwards.
    pub fn apply(&self, world: &World) {
        let Some(number) = self.counts else { return };
        let (counters, way) = (&world.mapping_stats()[number as usize], self.way as usize);
        if self.after.is_none() {
            return counters.dropped[way].store(1);
        }
        counters.packets[way].store(1);
        counters.bytes[way].store(self.frame.len() as u64 - 14);
    }

    /// Runs it natively: the frame afterwards, None if it is dropped.
    pub fn run(&self, world: &World) -> Option<Vec<u8>> {
        let mut packet = Memory { frame: self.frame.clone(), tagged: self.tagged };
        match translate(&mut packet, &world.slices(), self.way) {
            Fate::Pass => Some(packet.frame),
            Fate::Drop => None,
        }
    }
}

/// A packet in memory, with a complete checksum.
struct Memory {
    frame: Vec<u8>,
    tagged: bool,
}

impl Memory {
    fn change(&mut self, offset: usize, change: Change, zero_is_none: bool) -> bool {
        let Some(old) = self.load::<[u8; 2]>(offset) else { return false };
        let new = changed(u16::from_ne_bytes(old.0), change, zero_is_none);
        self.store(offset, &new.to_ne_bytes())
    }
}

impl Passing for Memory {
    fn load<T: View>(&self, offset: usize) -> Option<Held<T>> {
        let (view, _) = T::read_from_prefix(self.frame.get(14 + offset..)?).ok()?;
        Some(Held(view))
    }
    fn store<T: View>(&mut self, offset: usize, bytes: &T) -> bool {
        self.frame.get_mut(14 + offset..).is_some_and(|place| bytes.write_to_prefix(place).is_ok())
    }
    fn cover(&mut self, offset: usize, change: Change, zero_is_none: bool) -> bool {
        self.change(offset, change, zero_is_none)
    }
    fn set_port(&mut self, offset: usize, port: u16, checksum: usize, zero_is_none: bool) -> bool {
        let Some(old) = self.load::<[u8; 2]>(offset) else { return false };
        let change = Change::default().word(u16::from_ne_bytes(old.0).into(), port.into());
        self.change(checksum, change, zero_is_none) && self.store(offset, &port.to_ne_bytes())
    }
    fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.frame[12], self.frame[13]])
    }
    fn is_tagged(&self) -> bool {
        self.tagged
    }
    fn interface(&self) -> u32 {
        INGRESS
    }
    fn segments(&self) -> u64 {
        1
    }
}

/// All cases.
pub fn translations() -> Vec<Translation> {
    let mut all = Translations { all: Vec::new(), six: false, way: Way::In };
    for (_, six) in FAMILIES {
        for way in [Way::In, Way::Out] {
            all = Translations { six, way, ..all };
            all.whole();
            all.errors();
            all.fragments();
            all.left_alone();
        }
    }
    all.extension_headers();
    all.all
}

/// Ports of the host that is mapped, inside and outside, and of the one it talks to.
const INSIDE: u16 = 80;
const OUTSIDE: u16 = 8080;
const PEER: u16 = 4000;

struct Translations {
    all: Vec<Translation>,
    six: bool,
    way: Way,
}

/// A packet of a conversation: from or to the mapped host.
#[derive(Clone, Copy)]
struct Talk {
    mapped: (IpAddr, u16),
    peer: (IpAddr, u16),
    from_peer: bool,
}

impl Talk {
    fn packet(self, protocol: u8, at: Option<usize>) -> Vec<u8> {
        let (from, to) = if self.from_peer { (self.peer, self.mapped) } else { (self.mapped, self.peer) };
        packet(from, to, protocol, at)
    }
}

impl Translations {
    /// The mapped host inside and outside, and its peer.
    fn hosts(&self) -> [IpAddr; 3] {
        let [_, _, outside, inside] = addresses(self.six);
        let peer = if self.six { "2001:db8:5::1" } else { "192.0.2.77" };
        [inside, outside, peer.parse().expect("an address")]
    }

    /// A packet of the conversation as it comes to the port, and as it goes on: with the port of the mapping, or of another
    /// number that is kept.
    fn talks(&self, kept: Option<u16>) -> [Talk; 2] {
        let [inside, outside, peer] = self.hosts();
        let from_peer = self.way == Way::In;
        let talk = |mapped| Talk { mapped, peer: (peer, PEER), from_peer };
        let [inside, outside] = [talk((inside, kept.unwrap_or(INSIDE))), talk((outside, kept.unwrap_or(OUTSIDE)))];
        if from_peer { [outside, inside] } else { [inside, outside] }
    }

    fn add(
        &mut self,
        name: &str,
        configure: impl Fn(&mut World) + 'static,
        packet: &[u8],
        after: Option<&[u8]>,
        counts: Option<u32>,
    ) {
        let family = if self.six { "IPv6" } else { "IPv4" };
        self.all.push(Translation {
            name: format!("{family}, {:?}: {name}", self.way),
            configure: Box::new(configure),
            way: self.way,
            frame: arrive(packet),
            tagged: false,
            after: after.map(arrive),
            counts,
        });
    }

    /// Number 0: the host's port, of UDP; number 1: of TCP; number 2: another port of TCP, that of another host inside.
    fn ports(&self) -> impl Fn(&mut World) + Clone + 'static {
        let ([inside, outside, _], six) = (self.hosts(), self.six);
        let other: IpAddr = if six { "2001:db8:1::99" } else { "198.51.100.99" }.parse().expect("an address");
        move |world: &mut World| {
            world.map_port(IN, UDP, (inside, INSIDE), (outside, OUTSIDE));
            world.map_port(IN, TCP, (inside, INSIDE), (outside, OUTSIDE));
            world.map_port(IN, TCP, (other, INSIDE), (outside, OUTSIDE + 1));
        }
    }

    /// Number 0: the host's address.
    fn address(&self) -> impl Fn(&mut World) + Clone + 'static {
        let ([inside, outside, _], six) = (self.hosts(), self.six);
        move |world: &mut World| world.map(IN, inside, outside, if six { 128 } else { 32 })
    }

    fn whole(&mut self) {
        let [before, after] = self.talks(None);
        for (name, number, protocol, at) in
            [("UDP", 0, UDP, Some(6)), ("TCP", 1, TCP, Some(16)), ("UDP without checksum", 0, UDP, None)]
        {
            let [before, after] = [before, after].map(|talk| talk.packet(protocol, at));
            self.add(&format!("port, {name}"), self.ports(), &before, Some(&after), Some(number));
        }
        let [before, after] = self.talks(Some(INSIDE));
        for (name, protocol, at) in [("TCP", TCP, Some(16)), ("ESP", 50, None), ("UDP without checksum", UDP, None)] {
            let [before, after] = [before, after].map(|talk| talk.packet(protocol, at));
            self.add(&format!("address, {name}"), self.address(), &before, Some(&after), Some(0));
        }
    }

    /// Errors about packets that went the other way.
    fn errors(&mut self) {
        let [before, after] = self.talks(None).map(|talk| Talk { from_peer: !talk.from_peer, ..talk });
        let kind = if self.six { 1 } else { 3 };
        let host_and_peer = |talk: Talk| (talk.mapped.0, talk.peer.0);
        let error = |about: Talk, quote: &[u8]| {
            let (host, peer) = host_and_peer(about);
            if about.from_peer { icmp(host, peer, kind, quote) } else { icmp(peer, host, kind, quote) }
        };
        let header = if self.six { 40 } else { 20 };
        for (name, number, protocol, at) in
            [("UDP", 0, UDP, Some(6)), ("TCP", 1, TCP, Some(16)), ("UDP without checksum", 0, UDP, None)]
        {
            let quotes = [before, after].map(|talk| talk.packet(protocol, at));
            for (what, len) in [("whole", quotes[0].len()), ("its first eight bytes", header + 8)] {
                let name = format!("port, an error about {name}, {what}");
                let [old, new] = [error(before, &quotes[0][..len]), error(after, &quotes[1][..len])];
                self.add(&name, self.ports(), &old, Some(&new), Some(number));
            }
        }
        // About what the host has sent or got by a router on its way.
        let quotes = [before, after].map(|talk| talk.packet(UDP, Some(6)));
        let router: IpAddr = if self.six { "2001:db8:6::6" } else { "192.0.2.66" }.parse().expect("an address");
        if self.way == Way::Out {
            let peer = before.peer.0;
            let [old, new] = [icmp(router, peer, kind, &quotes[0]), icmp(router, peer, kind, &quotes[1])];
            self.add("port, a router's error", self.ports(), &old, Some(&new), Some(0));
        }
        let another = Talk { mapped: (before.mapped.0, 9999), ..before };
        let other = error(another, &another.packet(UDP, Some(6)));
        self.add("port, an error about another one", self.ports(), &other, Some(&other), None);
        let later = self.fragment(&before.packet(UDP, None), UDP, 185, false);
        self.add("port, an error about a later fragment", self.ports(), &error(before, &later), None, Some(0));
        let first = self.fragment(&before.packet(UDP, None), UDP, 0, true);
        let first_after = self.fragment(&after.packet(UDP, None), UDP, 0, true);
        let (old, new) = (error(before, &first), error(after, &first_after));
        self.add("port, an error about a first fragment", self.ports(), &old, Some(&new), Some(0));
        let [before, after] = self.talks(Some(INSIDE)).map(|talk| Talk { from_peer: !talk.from_peer, ..talk });
        let quotes = [before, after].map(|talk| talk.packet(TCP, Some(16)));
        let (old, new) = (error(before, &quotes[0]), error(after, &quotes[1]));
        self.add("address, an error", self.address(), &old, Some(&new), Some(0));
    }

    /// A packet as a fragment, with an offset in eight bytes.
    fn fragment(&self, packet: &[u8], protocol: u8, offset: u16, more: bool) -> Vec<u8> {
        if self.six {
            let mut fragment = packet[..40].to_vec();
            fragment[6] = 44;
            fragment[5] += 8;
            let place = (offset << 3 | u16::from(more)).to_be_bytes();
            fragment.extend([protocol, 0, place[0], place[1], 0, 0, 0, 7]);
            fragment.extend(&packet[40..]);
            return fragment;
        }
        with(packet.to_vec(), |packet| {
            let place = offset | if more { 0x2000 } else { 0 };
            packet[6..8].copy_from_slice(&place.to_be_bytes());
            fix4(packet);
        })
    }

    fn fragments(&mut self) {
        for (name, offset, more) in [("first", 0, true), ("later", 185, true), ("last", 185, false)] {
            let [before, _] = self.talks(None).map(|talk| talk.packet(UDP, None));
            let fragment = self.fragment(&before, UDP, offset, more);
            self.add(&format!("port, {name} fragment"), self.ports(), &fragment, None, Some(0));
            let ping = self.fragment(&before, if self.six { 58 } else { 1 }, offset, more);
            let ping = if self.six { ping } else { with4(ping, |packet| packet[9] = 1) };
            if offset > 0 {
                let name = format!("port, {name} fragment of another protocol");
                self.add(&name, self.ports(), &ping, Some(&ping), None);
            }
            let [before, after] = self.talks(Some(INSIDE)).map(|talk| talk.packet(UDP, None));
            let [before, after] = [before, after].map(|packet| self.fragment(&packet, UDP, offset, more));
            self.add(&format!("address, {name} fragment"), self.address(), &before, Some(&after), Some(0));
        }
        let [before, _] = self.talks(None);
        let (from, to) = match self.way {
            Way::In => (before.peer.0, before.mapped.0),
            Way::Out => (before.mapped.0, before.peer.0),
        };
        let short = bare(from, to, UDP, &[0]);
        self.add("port, cut off in front of its port", self.ports(), &short, None, Some(0));
        let unchecked = bare(from, to, TCP, &before.packet(TCP, None)[if self.six { 40 } else { 20 }..][..10]);
        self.add("port, cut off in front of its checksum", self.ports(), &unchecked, None, Some(1));
    }

    fn left_alone(&mut self) {
        let [before, _] = self.talks(Some(9999));
        for (name, protocol) in [("another port", TCP), ("another protocol", 136)] {
            let packet = before.packet(protocol, Some(if protocol == TCP { 16 } else { 6 }));
            self.add(&format!("port, {name}"), self.ports(), &packet, Some(&packet), None);
        }
        let [before, _] = self.talks(None);
        let packet = before.packet(TCP, Some(16));
        self.add("port, of a VLAN beside it", self.ports(), &packet, Some(&packet), None);
        self.all.last_mut().expect("just added").tagged = true;
        self.add("port, of a VLAN within it", self.ports(), &packet, Some(&packet), None);
        let frame = [link(IN, &[(0x8100, 100)], if self.six { 0x86dd } else { 0x0800 }), packet].concat();
        let last = self.all.last_mut().expect("just added");
        (last.frame, last.after) = (frame.clone(), Some(frame));
    }

    fn extension_headers(&mut self) {
        const HEADERS: [u8; 7] = [0, 60, 43, 60, 135, 60, 60];
        self.six = true;
        for way in [Way::In, Way::Out] {
            self.way = way;
            let talks = self.talks(None).map(|talk| talk.packet(TCP, Some(16)));
            for count in 1..=7 {
                // `count` headers of eight bytes, each naming the next.
                let behind = |packet: &[u8]| {
                    let next = HEADERS[1..count].iter().chain(&[TCP]);
                    let headers = next.flat_map(|next| [*next, 0, 1, 4, 0, 0, 0, 0]);
                    let mut packet = [&packet[..40], &headers.collect::<Vec<_>>(), &packet[40..]].concat();
                    packet[5] += 8 * count as u8;
                    packet[6] = HEADERS[0];
                    packet
                };
                let [before, after] = [behind(&talks[0]), behind(&talks[1])];
                // Where the sixth leads to is not looked at any more.
                let (after, counts) = if count < 6 { (Some(&after[..]), 1) } else { (None, 0) };
                self.add(&format!("port, {count} extension headers"), self.ports(), &before, after, Some(counts));
            }
            let error = |talk: Talk| {
                let (host, peer) = (talk.mapped.0, talk.peer.0);
                let (from, to) = if way == Way::Out { (host, peer) } else { (peer, host) };
                let quoted = Talk { from_peer: !talk.from_peer, ..talk }.packet(UDP, Some(6));
                let mut quoted = [&quoted[..40], &[UDP, 0, 1, 4, 0, 0, 0, 0], &quoted[40..]].concat();
                quoted[5] += 8;
                quoted[6] = 60;
                icmp(from, to, 1, &quoted)
            };
            let [before, after] = self.talks(None).map(error);
            self.add("port, an error about a packet with options", self.ports(), &before, Some(&after), Some(0));
        }
    }
}
