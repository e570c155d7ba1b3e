//! Filters as people write them, and odd ones made by hand: taken or refused, and what they say of frames, beside Linux's
//! own run of them.

mod support;

use support::{Classic, Xdp, compiled, forwarded, udp4, udp6};
use towpath_filter::{
    Capture, Filter, Layer, MAX_FILTERS, MAX_INSTRUCTIONS, TooLong, Unsupported, instruction, one_in, translate,
};

fn everywhere(filter: Filter) -> Capture {
    Capture { filter, only: None }
}

fn link(code: &[u64]) -> Filter {
    Filter::new(Layer::Link, code.to_vec()).expect("a filter that can be run")
}

fn translated(filters: &[Filter]) -> Xdp {
    let captures: Vec<_> = filters.iter().cloned().map(everywhere).collect();
    Xdp::load(&translate(&captures).expect("short enough")).expect("the verifier takes it")
}

/// Frames of all kinds: short ones, long ones of several buffers, fragments, with padding, not IP at all.
fn frames() -> Vec<Vec<u8>> {
    let mut frames = vec![udp4(1, 2, 0), udp6(1, 2, 0)];
    for payload in [0, 5, 100, 1400, 5000] {
        for (source, destination) in [(5000, 7001), (7001, 5000), (53, 53), (0xffff, 0)] {
            frames.extend([udp4(source, destination, payload), udp6(source, destination, payload)]);
        }
    }
    let mut fragment = udp4(7001, 7001, 50);
    fragment[21] = 7;
    let mut options = udp4(7001, 7001, 50);
    options[14] = 0x47;
    let mut padded = udp4(5000, 7001, 0);
    padded.resize(60, 0);
    let mut tcp = udp4(5000, 80, 50);
    (tcp[23], tcp[46]) = (6, 0x50);
    tcp[54..58].copy_from_slice(b"GET ");
    let mut arp = udp4(0, 0, 30);
    arp[13] = 6;
    let mut tagged = udp4(5000, 7001, 30);
    tagged.splice(12..12, [0x81, 0, 0, 100]);
    frames.extend([fragment, options, padded, tcp, arp, tagged, vec![0; 14], vec![0xff; 20]]);
    frames
}

/// The translation says of every frame what Linux says, and so does the filter run here.
fn agrees(name: &str, code: &[u64]) {
    let (classic, xdp, runnable) = (Classic::new(code).expect(name), translated(&[link(code)]), link(code).runnable());
    for frame in frames() {
        let matches = classic.matches(&frame);
        assert_eq!(xdp.answer(&frame), u32::from(matches), "{name}: {frame:02x?}");
        assert_eq!(runnable.matches(&frame), matches, "{name}, run here: {frame:02x?}");
    }
}

#[test]
fn filters_of_tcpdump_say_what_they_say_in_linux() {
    let survive = [
        "udp port 7001",
        "port 53",
        "tcp",
        "ip",
        "ip6",
        "arp",
        "host 192.0.2.2",
        "ip6 host 2001:db8:1::2",
        "net 198.51.100.0/24 and not port 7001",
        "udp[8:2] = 7",
        "tcp[tcpflags] & tcp-syn != 0",
        "tcp port 80 and tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420",
        "icmp or icmp6",
        "portrange 5000-6000",
        "ip[6:2] & 0x1fff != 0",
        "(udp port 7001 and src net 192.0.2.0/24) or (ip6 and dst port 5000)",
    ];
    let change = [
        "ether src 02:00:00:00:00:02",
        "ether host 02:00:00:00:00:02 and udp",
        "ip[8] > 10",
        "ip[10:2] = 0xabcd",
        "ip6[7] = 64",
        "greater 200",
        "less 100",
        "ether[0] & 1 != 0",
    ];
    for (expressions, survives) in [(&survive[..], true), (&change[..], false)] {
        for expression in expressions {
            let code = compiled(expression);
            assert_eq!(link(&code).survives_forwarding(), survives, "{expression}");
            agrees(expression, &code);
        }
    }
}

#[test]
fn what_survives_says_the_same_of_the_frame_that_leaves() {
    for expression in ["udp port 7001", "tcp[((tcp[12:1] & 0xf0) >> 2):4] = 0x47455420", "ip[6:2] & 0x1fff != 0", "ip6"]
    {
        let classic = Classic::new(&compiled(expression)).expect("a filter");
        for frame in frames().iter().filter(|frame| frame.len() > 34 && matches!(frame[12..14], [8, 0] | [0x86, 0xdd]))
        {
            assert!(!classic.matches(&forwarded(frame)) || classic.matches(frame), "{expression}: {frame:02x?}");
        }
    }
}

#[test]
fn vlan_tags_beside_the_packet_are_absent_from_what_is_forwarded() {
    let filter = link(&compiled("vlan 100"));
    assert!(filter.survives_forwarding());
    let xdp = translated(&[filter]);
    assert_eq!(xdp.answer(&udp4(1, 2, 30)), 0);
}

#[test]
fn sockets_without_link_header_count_from_the_network_header() {
    // As tcpdump does on all interfaces: the protocol from beside the packet.
    let code = [
        instruction(0x28, 0, 0, 0xffff_f000),
        instruction(0x15, 0, 4, 0x0800),
        instruction(0xb1, 0, 0, 0),
        instruction(0x48, 0, 0, 2),
        instruction(0x15, 0, 1, 7001),
        instruction(0x06, 0, 0, 0x40000),
        instruction(0x06, 0, 0, 0),
    ];
    let filter = Filter::new(Layer::Network, code.to_vec()).expect("a filter");
    assert!(filter.survives_forwarding());
    let xdp = translated(&[filter]);
    assert_eq!([udp4(1, 7001, 9), udp4(7001, 1, 9), udp6(1, 7001, 9)].map(|frame| xdp.answer(&frame)), [1, 0, 0]);
}

/// Instructions that no compiler makes.
#[test]
fn odd_programs_say_what_they_say_in_linux() {
    let ret_a = instruction(0x16, 0, 0, 0);
    let ret = |k| instruction(0x06, 0, 0, k);
    let set = |k| instruction(0x00, 0, 0, k);
    let set_x = |k| instruction(0x01, 0, 0, k);
    let mut programs: Vec<(String, Vec<u64>)> = vec![
        ("nothing".into(), vec![ret(0)]),
        ("everything".into(), vec![ret(1)]),
        ("A to begin with".into(), vec![ret_a]),
        ("X to begin with".into(), vec![instruction(0x87, 0, 0, 0), ret_a]),
        ("length".into(), vec![instruction(0x80, 0, 0, 0), instruction(0x25, 0, 1, 100), ret(0), ret(1)]),
        ("length in X".into(), vec![instruction(0x81, 0, 0, 0), set(300), instruction(0x3d, 0, 1, 0), ret(1), ret(0)]),
        (
            "memory".into(),
            vec![
                instruction(0x30, 0, 0, 23),
                instruction(0x02, 0, 0, 15),
                set(0),
                instruction(0x61, 0, 0, 15),
                instruction(0x87, 0, 0, 0),
                instruction(0x14, 0, 0, 17),
                ret_a,
            ],
        ),
        (
            "X in memory".into(),
            vec![
                set_x(9),
                instruction(0x03, 0, 0, 0),
                instruction(0x60, 0, 0, 0),
                instruction(0x15, 0, 1, 9),
                ret(1),
                ret(0),
            ],
        ),
        ("a jump".into(), vec![instruction(0x05, 0, 0, 1), ret(0), ret(1)]),
        ("by zero".into(), vec![set(5), instruction(0x3c, 0, 0, 0), ret(1)]),
        ("remainder by zero".into(), vec![set(5), instruction(0x9c, 0, 0, 0), ret(1)]),
        ("negated".into(), vec![set(1), instruction(0x84, 0, 0, 0), instruction(0x15, 0, 1, u32::MAX), ret(1), ret(0)]),
        (
            "header length".into(),
            vec![instruction(0xb1, 0, 0, 14), instruction(0x87, 0, 0, 0), instruction(0x15, 0, 1, 20), ret(1), ret(0)],
        ),
        (
            "to X and back".into(),
            vec![
                set(7),
                instruction(0x07, 0, 0, 0),
                set(0),
                instruction(0x87, 0, 0, 0),
                instruction(0x15, 0, 1, 7),
                ret(1),
                ret(0),
            ],
        ),
    ];
    for k in [0, 13, 41, 4000, 0x6fff, 0x7001, 0xffff, 0x10000, 0x7fff_fff0] {
        for code in [0x20, 0x28, 0x30] {
            programs.push((format!("load {k:#x}"), vec![instruction(code, 0, 0, k), ret(1)]));
            let indexed = instruction(code + 0x20, 0, 0, k);
            programs.push((format!("load X + {k:#x}"), vec![set_x(3), indexed, ret(1)]));
        }
    }
    for (a, b) in [(7u32, 3u32), (0xffff_ffff, 2), (0x8000_0001, 31), (5, 0xffff_fffe), (1, 1)] {
        for operation in [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x90, 0xa0] {
            let shift = matches!(operation, 0x60 | 0x70);
            let b = if shift { b & 31 } else { b };
            for wanted in [0, 1, 4, 10, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe] {
                let tail = [instruction(0x15, 0, 1, wanted), ret(1), ret(0)];
                let by_k = [&[set(a), instruction(0x04 | operation, 0, 0, b)][..], &tail].concat();
                let by_x = [&[set_x(b), set(a), instruction(0x0c | operation, 0, 0, 0)][..], &tail].concat();
                programs.extend([by_k, by_x].map(|code| (format!("{a:#x} {operation:#x} {b:#x}"), code)));
            }
        }
        for test in [0x10, 0x20, 0x30, 0x40] {
            let code = |own: u16| instruction(own, 1, 0, b);
            let by_k = vec![set(a), code(0x05 | test), ret(0), ret(1)];
            let by_x = vec![set_x(b), set(a), code(0x0d | test), ret(0), ret(1)];
            programs.extend([by_k, by_x].map(|code| (format!("{a:#x} {test:#x} {b:#x}?"), code)));
        }
    }
    // Linux is asked about all, and the translation a few at a time.
    let frames = [udp4(5000, 7001, 20), udp6(5000, 7001, 5000)];
    for (name, code) in &programs {
        let (classic, xdp) = (Classic::new(code).expect(name), translated(&[link(code)]));
        for frame in &frames {
            assert_eq!(xdp.answer(frame), u32::from(classic.matches(frame)), "{name}");
        }
    }
}

/// A number that is known beside one that is not: the verifier of Linux 6.1 went the way that no frame goes, too. It believed of X
/// to be at least 0x800 and at most 60 there, took the place that X says for anything, and refused to load from it.
#[test]
fn a_way_that_no_frame_goes_is_taken_by_the_verifier() {
    let again = instruction(0x20, 0, 0, 12);
    let code = [
        vec![instruction(0x00, 0, 0, 7001), instruction(0x54, 0, 0, 0x800), instruction(0xb1, 0, 0, 14)],
        vec![instruction(0x2d, 1, 0, 0), again, instruction(0x40, 0, 0, 0), again, instruction(0x06, 0, 0, 1)],
    ];
    agrees("found by chance", &code.concat());
}

#[test]
fn places_before_the_packet_match() {
    let code = [instruction(0x01, 0, 0, 2), instruction(0x50, 0, 0, -3i32 as u32), instruction(0x06, 0, 0, 0)];
    assert_eq!(translated(&[link(&code)]).answer(&udp4(1, 2, 0)), 1);
    // Not before, but counted from behind it.
    let code = [instruction(0x01, 0, 0, 20), instruction(0x50, 0, 0, -6i32 as u32), instruction(0x16, 0, 0, 0)];
    assert_eq!(translated(&[link(&code)]).answer(&udp4(1, 2, 0)), 1);
}

#[test]
fn several_filters_match_if_one_does() {
    let xdp = translated(&["udp port 7001", "udp port 7002", "ip6 and udp port 53"].map(|text| link(&compiled(text))));
    let answers = [udp4(1, 7001, 9), udp4(1, 7002, 9), udp4(1, 53, 9), udp6(1, 53, 9), udp6(7002, 1, 9)];
    assert_eq!(answers.map(|frame| xdp.answer(&frame)), [1, 1, 0, 1, 1]);
}

#[test]
fn the_longest_program_is_taken_and_a_longer_one_is_not() {
    // Asks for one port again and again, and at last for another.
    let long = |length: usize| {
        let mut code = vec![instruction(0xb1, 0, 0, 14), instruction(0x48, 0, 0, 16)];
        let again = [instruction(0x48, 0, 0, 16), instruction(0x15, 0, 0, 53)];
        code.extend(again.into_iter().cycle().take(length - 5));
        code.extend([instruction(0x15, 0, 1, 7001), instruction(0x06, 0, 0, 1), instruction(0x06, 0, 0, 0)]);
        code
    };
    let xdp = translated(&[link(&long(MAX_INSTRUCTIONS))]);
    assert_eq!([udp4(1, 7001, 50), udp4(7001, 1, 50)].map(|frame| xdp.answer(&frame)), [1, 0]);
    let refused = Filter::new(Layer::Link, long(MAX_INSTRUCTIONS + 1));
    assert_eq!(refused, Err(Unsupported::Long(MAX_INSTRUCTIONS + 1)));
    let half = everywhere(link(&long(MAX_INSTRUCTIONS / 2 + 1)));
    assert_eq!(translate(&[half.clone(), half]), Err(TooLong));
    let many = vec![everywhere(link(&long(5))); MAX_FILTERS + 1];
    assert_eq!(translate(&many), Err(TooLong));
}

#[test]
fn what_cannot_be_run_is_refused_with_its_place() {
    let refused = |code: &[u64]| Filter::new(Layer::Link, code.to_vec()).expect_err("refused");
    let ret = instruction(0x06, 0, 0, 1);
    let ancillary = |k: i32| [ret, instruction(0x20, 0, 0, k as u32), ret];
    for k in [-0x1000 + 4, -0x1000 + 8, -0x1000 + 40, -0x10_0000, -0x20_0000, i32::MIN] {
        assert_eq!(refused(&ancillary(k)), Unsupported::Ancillary(1), "{k:#x}");
    }
    let malformed = [
        (vec![], 0),
        (vec![instruction(0x00, 0, 0, 0)], 0),
        (vec![instruction(0x05, 0, 0, 1), ret], 0),
        (vec![instruction(0x05, 0, 0, u32::MAX), ret], 0),
        (vec![instruction(0x15, 0, 1, 0), ret], 0),
        (vec![instruction(0x34, 0, 0, 0), ret], 0),
        (vec![instruction(0x94, 0, 0, 0), ret], 0),
        (vec![instruction(0x64, 0, 0, 32), ret], 0),
        (vec![instruction(0x02, 0, 0, 16), ret], 0),
        (vec![ret, instruction(0xff, 0, 0, 0), ret], 1),
        (vec![instruction(0x104, 0, 0, 0), ret], 0),
    ];
    for (code, at) in malformed {
        assert_eq!(refused(&code), Unsupported::Malformed(at), "{code:x?}");
    }
}

#[test]
fn a_sample_is_drawn_at_random() {
    for number in [1, 4, 100] {
        const FRAMES: u32 = 20_000;
        let sample = one_in(number.try_into().expect("not zero")).expect("short");
        let xdp = Xdp::load(&sample).expect("the verifier takes it");
        let frame = udp4(1, 2, 0);
        let drawn: u32 = (0..FRAMES).map(|_| xdp.answer(&frame)).sum();
        let wanted = FRAMES / number;
        // Six standard deviations, for which chance takes longer than any machine lasts.
        let off = 6.0 * f64::from(wanted).sqrt() * (1.0 - 1.0 / f64::from(number)).sqrt();
        assert!((f64::from(drawn) - f64::from(wanted)).abs() <= off, "1 in {number}: {drawn} of {FRAMES}");
    }
}
