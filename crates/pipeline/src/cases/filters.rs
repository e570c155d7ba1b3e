//! Cases of the operator's filters.

use super::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_tables::filters::{Action, Block, FilterValue};

/// A filter for sources of so many bits of the address that packets of the cases come from.
fn from(six: bool, len: u8) -> FilterValue {
    let source: IpAddr = if six { Ipv6Addr::from(address6(0, 0, 99)).into() } else { Ipv4Addr::from(SOURCE4).into() };
    FilterValue { source: Block::new(source, len), destination: None, protocol: None, ports: [None; 2], ifindex: 0 }
}

/// Lengths of a source prefix, wider ones first.
fn lengths(six: bool) -> [u8; 3] {
    if six { [32, 64, 128] } else { [16, 24, 32] }
}

fn to(six: bool, len: u8) -> Option<Block> {
    let destination: IpAddr =
        if six { Ipv6Addr::from(address6(1, 0, 7)).into() } else { Ipv4Addr::from(DESTINATION4).into() };
    Some(Block::new(destination, len))
}

fn drop(filters: &[FilterValue]) -> impl Fn(&mut World) + Clone + use<> {
    let filters = filters.to_vec();
    move |world: &mut World| filters.iter().for_each(|filter| world.filter(*filter, Action::Drop))
}

fn plain(six: bool) -> Vec<u8> {
    if six { plain6() } else { plain4() }
}

/// The packet's payload behind IPv6 extension headers: protocol and bytes of each, without the next header's.
fn behind(extensions: &[(u8, &[u8])]) -> Vec<u8> {
    let packet = plain6();
    let mut payload = Vec::new();
    for (place, (_, bytes)) in extensions.iter().enumerate() {
        payload.push(extensions.get(place + 1).map_or(UDP, |next| next.0));
        payload.extend(*bytes);
    }
    payload.extend(&packet[40..]);
    ipv6(address6(0, 0, 99), address6(1, 0, 7), extensions[0].0, &payload)
}

impl Cases {
    /// The frame is dropped by the filter of this number.
    fn dropped(&mut self, name: impl Into<String>, by: u32, set: impl Fn(&mut World) + 'static, frame: Vec<u8>) {
        let filtered = Some((by, frame.len()));
        self.add(format!("filter, {}", name.into()), set, frame, Expect::Drop(IN));
        self.0.last_mut().expect("just added").filtered = filtered;
    }

    /// The packet is forwarded, whether a filter lets it pass or none matches.
    fn let_pass(
        &mut self,
        name: impl Into<String>,
        by: Option<u32>,
        set: impl Fn(&mut World) + 'static,
        packet: &[u8],
    ) {
        let frame = arrive(packet);
        let filtered = by.map(|number| (number, frame.len()));
        let expect = Expect::Forward { frame: forwarded(OUT, &[], packet), from: IN, to: OUT, device: OUT, hop: HOP };
        self.add(format!("filter, {}", name.into()), set, frame, expect);
        self.0.last_mut().expect("just added").filtered = filtered;
    }

    pub(super) fn filters(&mut self) {
        for six in [false, true] {
            self.sources(six);
            self.conditions(six);
            self.wherever(six);
        }
        self.fragments();
        self.headers();
    }

    fn sources(&mut self, six: bool) {
        let (family, packet) = (if six { "IPv6" } else { "IPv4" }, plain(six));
        for len in lengths(six) {
            self.dropped(format!("{family}, /{len}"), 1, drop(&[from(six, len)]), arrive(&packet));
        }
        let [wide, middle, host] = lengths(six).map(|len| from(six, len));
        let other = FilterValue {
            source: Block { len: host.source.len, ..Block::new(wide.source.first, wide.source.len) },
            ..host
        };
        self.let_pass(format!("{family}, another source"), None, drop(&[other]), &packet);
        self.let_pass(
            format!("{family}, passed in a dropped prefix"),
            Some(2),
            move |world| {
                world.filter(wide, Action::Drop);
                world.filter(middle, Action::Pass);
            },
            &packet,
        );
        self.dropped(
            format!("{family}, dropped in a passed prefix"),
            3,
            move |world| {
                world.filter(wide, Action::Drop);
                world.filter(middle, Action::Pass);
                world.filter(host, Action::Drop);
            },
            arrive(&packet),
        );
    }

    fn conditions(&mut self, six: bool) {
        let (family, packet) = (if six { "IPv6" } else { "IPv4" }, plain(six));
        let [wide, middle, _] = lengths(six).map(|len| from(six, len));
        let udp = FilterValue { protocol: Some(UDP), ..middle };
        let whole = if six { 128 } else { 32 };
        let right = [
            ("destination", FilterValue { destination: to(six, whole), ..middle }),
            ("destination prefix", FilterValue { destination: to(six, 13), ..middle }),
            ("protocol", udp),
            ("source port", FilterValue { ports: [Some(1000), None], ..udp }),
            ("destination port", FilterValue { ports: [None, Some(2000)], ..udp }),
            ("both ports", FilterValue { ports: [Some(1000), Some(2000)], ..udp }),
            ("interface", FilterValue { ifindex: INGRESS, ..middle }),
        ];
        let mut elsewhere = to(six, whole).expect("a block");
        elsewhere = Block { first: from(six, whole).source.first, ..elsewhere };
        let wrong = [
            ("destination", FilterValue { destination: Some(elsewhere), ..middle }),
            ("protocol", FilterValue { protocol: Some(TCP), ..middle }),
            ("source port", FilterValue { ports: [Some(2000), None], ..udp }),
            ("destination port", FilterValue { ports: [None, Some(1000)], ..udp }),
            ("one of both ports", FilterValue { ports: [Some(1000), Some(2001)], ..udp }),
            ("protocol with these ports", FilterValue { protocol: Some(TCP), ports: [Some(1000), None], ..middle }),
            ("interface", FilterValue { ifindex: INGRESS + 1, ..middle }),
        ];
        for (what, filter) in right {
            self.dropped(format!("{family}, {what}"), 1, drop(&[filter]), arrive(&packet));
        }
        for (what, filter) in wrong {
            self.let_pass(format!("{family}, another {what}"), None, drop(&[filter]), &packet);
            self.dropped(
                format!("{family}, another {what} in a dropped prefix"),
                1,
                drop(&[wide, filter]),
                arrive(&packet),
            );
        }
        let all: Vec<_> =
            wrong.iter().map(|(_, filter)| *filter).chain([udp]).chain(wrong.map(|wrong| wrong.1)).collect();
        self.dropped(format!("{family}, one among many"), 8, drop(&all), arrive(&packet));
    }

    /// Before anything else is looked at.
    fn wherever(&mut self, six: bool) {
        let (family, packet) = (if six { "IPv6" } else { "IPv4" }, plain(six));
        let filter = from(six, lengths(six)[1]);
        let ethertype = if six { 0x86dd } else { 0x0800 };
        let frame = |tags: &[(u16, u16)], slot: u32| [link(slot, tags, ethertype), packet.clone()].concat();
        for (what, tags) in [
            ("in a VLAN", vec![(0x8100, 100)]),
            ("in a VLAN that nobody has", vec![(0x8100, 999)]),
            ("in a VLAN within a VLAN", vec![(0x88a8, 300), (0x8100, 5)]),
        ] {
            self.dropped(format!("{family}, {what}"), 1, drop(&[filter]), frame(&tags, IN));
        }
        let tags = [(0x88a8, 300), (0x8100, 5), (0x8100, 6)];
        let expect = Expect::Exception(IN_DOUBLE, Reason::UnsupportedEncap);
        self.add(format!("filter, {family}, in three VLANs"), drop(&[filter]), frame(&tags, IN_DOUBLE), expect);
        self.dropped(format!("{family}, not for us"), 1, drop(&[filter]), frame(&[], OUT));
        self.dropped(
            format!("{family}, padded"),
            1,
            drop(&[filter]),
            with(frame(&[], IN), |frame| frame.extend([0; 9])),
        );
        let set = drop(&[filter]);
        self.dropped(
            format!("{family}, port not ready"),
            1,
            move |world| {
                set(world);
                world.unflag(IN, READY);
            },
            frame(&[], IN),
        );
        let set = drop(&[filter]);
        self.add(
            format!("filter, {family}, no port"),
            move |world| {
                set(world);
                world.port(IN).ifindex.store(77);
            },
            frame(&[], IN),
            Expect::NotAPort,
        );
        self.dropped(
            format!("{family}, to the router itself"),
            1,
            drop(&[filter]),
            arrive(&if six { packet6(address6(0, 0, 1), 9) } else { packet4([192, 0, 2, 1], 9) }),
        );
    }

    fn fragments(&mut self) {
        let udp = |six| FilterValue { protocol: Some(UDP), ..from(six, 16) };
        let port = |six| FilterValue { ports: [None, Some(2000)], ..udp(six) };
        for (what, word, later) in [("first", 0x2000u16, false), ("later", 0x2003, true), ("last", 3, true)] {
            let packet = with4(plain4(), |packet| packet[6..8].copy_from_slice(&word.to_be_bytes()));
            self.dropped(format!("IPv4, {what} fragment by protocol"), 1, drop(&[udp(false)]), arrive(&packet));
            if later {
                self.let_pass(format!("IPv4, {what} fragment by port"), None, drop(&[port(false)]), &packet);
            } else {
                self.dropped(format!("IPv4, {what} fragment by port"), 1, drop(&[port(false)]), arrive(&packet));
            }
            let [high, low] = (if later { 24u16 | u16::from(what == "later") } else { 1 }).to_be_bytes();
            let packet = behind(&[(44, &[0, high, low, 1, 2, 3, 4])]);
            self.dropped(format!("IPv6, {what} fragment by protocol"), 1, drop(&[udp(true)]), arrive(&packet));
            if later {
                self.let_pass(format!("IPv6, {what} fragment by port"), None, drop(&[port(true)]), &packet);
            } else {
                self.dropped(format!("IPv6, {what} fragment by port"), 1, drop(&[port(true)]), arrive(&packet));
            }
        }
    }

    fn headers(&mut self) {
        let udp = |six| FilterValue { protocol: Some(UDP), ..from(six, 16) };
        let port = |six| FilterValue { ports: [None, Some(2000)], ..udp(six) };
        let mut options = plain4();
        options.splice(20..20, [1; 8]);
        options[0] = 0x47;
        options[3] += 8;
        fix4(&mut options);
        self.dropped("IPv4, port behind options", 1, drop(&[port(false)]), arrive(&options));
        let long = with4(plain4(), |packet| packet[2] = 3);
        self.dropped("IPv4, longer than the frame", 1, drop(&[from(false, 24)]), arrive(&long));
        for (what, packet) in [
            ("longer than the frame", long),
            ("of another version", with4(plain4(), |packet| packet[0] = 0x55)),
            ("with a short header", with4(plain4(), |packet| packet[0] = 0x44)),
        ] {
            let reason = if what == "longer than the frame" { Reason::Truncated } else { Reason::BadHeader };
            let expect = Expect::Exception(IN, reason);
            self.add(format!("filter, IPv4, {what}, by protocol"), drop(&[udp(false)]), arrive(&packet), expect);
        }
        let wrong = with(plain4(), |packet| packet[10] ^= 1);
        self.dropped("IPv4, wrong checksum", 1, drop(&[port(false)]), arrive(&wrong));
        let option: (u8, &[u8]) = (60, &[0, 1, 4, 0, 0, 0, 0]);
        let authentication: (u8, &[u8]) = (51, &[1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1]);
        self.dropped("IPv6, port behind an extension", 1, drop(&[port(true)]), arrive(&behind(&[option])));
        let several = behind(&[option, option, (43, &[0, 4, 0, 0, 0, 0, 0]), option]);
        self.dropped("IPv6, port behind several extensions", 1, drop(&[port(true)]), arrive(&several));
        let authenticated = behind(&[option, authentication]);
        self.let_pass("IPv6, port behind authentication", None, drop(&[port(true)]), &authenticated);
        let by_number = FilterValue { protocol: Some(51), ..from(true, 64) };
        self.dropped("IPv6, authenticated", 1, drop(&[by_number]), arrive(&authenticated));
        self.let_pass("IPv6, port behind too many extensions", None, drop(&[port(true)]), &behind(&[option; 6]));
        let long = with(plain6(), |packet| packet[4] = 3);
        self.dropped("IPv6, longer than the frame", 1, drop(&[from(true, 64)]), arrive(&long));
        let expect = Expect::Exception(IN, Reason::Truncated);
        self.add("filter, IPv6, longer than the frame, by protocol", drop(&[udp(true)]), arrive(&long), expect);
    }
}
