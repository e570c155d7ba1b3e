//! Random filters and packets: the tables, as their writer makes them, decide as going through all filters does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_pipeline::cases::frames::{ipv4, ipv6, link, udp};
use towpath_pipeline::mapped::Mapped;
use towpath_pipeline::packet::Packet as Frame;
use towpath_pipeline::{SlotSet, Verdict, process};
use towpath_tables::Reason;
use towpath_tables::backing::{HeapBacking, initial_elements};
use towpath_tables::filters::{Action, Block, Decision, FilterValue, Filters, Packet, decide, totals};
use towpath_tables::grace::NoReaders;
use towpath_tables::mix;
use towpath_tables::record::FILTER_STEPS;
use towpath_tables::writer::{TableWriter, port_totals};

const INTERFACES: [u32; 2] = [1, 2];

struct Random(mix::Random);

impl Random {
    fn chance(&mut self, percent: u32) -> bool {
        self.0.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.below(from.len() as u32) as usize]
    }

    /// Few different ones, so that filters meet packets and each other.
    fn address(&mut self, six: bool) -> IpAddr {
        let mut byte = || self.pick(&[0u8, 1, 2, 0x80, 0xff]);
        if six {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
            [4, 6, 7, 8, 15].into_iter().for_each(|at| bytes[at] = byte());
            Ipv6Addr::from(bytes).into()
        } else {
            Ipv4Addr::new(10 + byte() % 2, byte(), byte(), byte()).into()
        }
    }

    fn block(&mut self, six: bool) -> Block {
        let lengths = if six { [0, 32, 40, 56, 61, 64, 72, 128] } else { [0, 8, 13, 16, 22, 24, 30, 32] };
        Block::new(self.address(six), self.pick(&lengths))
    }

    fn filter(&mut self) -> FilterValue {
        let six = self.chance(50);
        let protocol = self.chance(40).then(|| self.pick(&[6, 17]));
        let mut port = |_| (protocol.is_some() && self.chance(40)).then(|| self.pick(&[53, 80]));
        let ports = [port(0), port(1)];
        FilterValue {
            source: self.block(six),
            destination: self.chance(30).then(|| self.block(six)).filter(|block| block.len > 0),
            protocol,
            ports,
            ifindex: if self.chance(20) { self.pick(&INTERFACES) } else { 0 },
        }
    }

    fn packet(&mut self) -> Packet {
        let six = self.chance(50);
        Packet {
            source: self.address(six),
            destination: self.address(six),
            protocol: Some(self.pick(&[6, 17, 1])),
            ports: Some([self.pick(&[53, 80, 9]), self.pick(&[53, 80, 9])]),
            ifindex: self.pick(&INTERFACES),
        }
    }
}

fn frame(packet: &Packet) -> Vec<u8> {
    let (protocol, ports) = (packet.protocol.expect("known"), packet.ports.expect("known"));
    let payload = udp(ports[0], ports[1], &[0; 12]);
    match (packet.source, packet.destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            [link(1, &[], 0x0800), ipv4(from.octets(), to.octets(), protocol, &payload)].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            [link(1, &[], 0x86dd), ipv6(from.octets(), to.octets(), protocol, &payload)].concat()
        }
        _ => unreachable!("one family"),
    }
}

#[test]
fn tables_decide_as_going_through_all_filters_does() {
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x0066_696c_7465_7273);
    println!("seed {seed} (TOWPATH_SEED)");
    let mut random = Random(mix::Random(seed));
    let mut writer = TableWriter::create(HeapBacking::new(initial_elements(2)), NoReaders).expect("tables");
    for ifindex in INTERFACES {
        writer.alloc_port(ifindex).expect("a slot");
    }
    let (mut all, mut number, mut outcomes) = (Filters::new(), 0, [0u64; 3]);
    for round in 0..300 {
        let before = all.clone();
        for _ in 0..random.pick(&[1, 3, 40]) {
            number += 1;
            let action = if random.chance(30) { Action::Pass } else { Action::Drop };
            all.entry(random.filter()).or_insert(Decision { number, action });
        }
        let keep = random.pick(&[100, 95, 40, 0]);
        all.retain(|_, _| random.chance(keep));
        if writer.set_filters(&all).is_err() {
            all = before;
            println!("round {round}: more than {FILTER_STEPS} for a packet");
        }
        assert_eq!(writer.filters().as_ref(), Some(&all), "round {round}");
        if random.chance(10) {
            writer = TableWriter::adopt(writer.into_backing(), NoReaders).expect("what was written can be taken over");
            assert_eq!(writer.filters().as_ref(), Some(&all), "round {round}");
        }
        for _ in 0..200 {
            let packet = random.packet();
            let wanted = decide(&all, &packet).map(|(_, decision)| *decision);
            let view = writer.view();
            let tables = Mapped { view, counters: Some(1), transmitters: SlotSet::ALL };
            let mut frame = Frame::new(&frame(&packet), 256);
            let (before, len) = (wanted.map(|wanted| totals(&view, wanted.number)), frame.bytes().len() as u64);
            let slot = writer.ports().find(|(_, ifindex)| *ifindex == packet.ifindex).expect("a port").0;
            let filtered = || port_totals(&view, slot).exceptions[Reason::Filtered as usize];
            let dropped = filtered();
            let verdict = process(&mut frame, &tables, packet.ifindex);
            let drop = wanted.is_some_and(|wanted| wanted.action == Action::Drop);
            assert_eq!(
                verdict == Verdict::Drop,
                drop,
                "seed {seed}, round {round}: {packet:?} by {wanted:?}: {verdict:?}"
            );
            assert_eq!(filtered() - dropped, u64::from(drop));
            if let (Some(wanted), Some(before)) = (wanted, before) {
                let after = totals(&view, wanted.number);
                assert_eq!((after.packets, after.bytes), (before.packets + 1, before.bytes + len));
            }
            outcomes[wanted.map_or(0, |wanted| 1 + usize::from(wanted.action == Action::Pass))] += 1;
        }
    }
    println!("{outcomes:?} packets met no filter, were dropped, passed");
    assert!(outcomes.iter().all(|packets| *packets > 3000), "{outcomes:?}");
}
