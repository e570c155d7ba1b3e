//! Random programs beside Linux's own run of them, on frames as they arrive and as they leave.

mod support;

use proptest::prelude::*;
use support::{Classic, Xdp, forwarded, udp4, udp6};
use towpath_filter::{Capture, Filter, Layer, instruction, translate};

/// Instructions but for the last, with targets that `program` brings inside.
fn step() -> impl Strategy<Value = (u16, u8, u8, u32)> {
    let place = prop_oneof![4 => 12u32..60, 1 => 0u32..12, 1 => 60u32..2000];
    let width = prop::sample::select(vec![0x00u16, 0x08, 0x10]);
    let number = prop_oneof![0u32..64, Just(0x0800), Just(0x86dd), Just(7001), any::<u32>()];
    let operation = prop::sample::select(vec![0x00u16, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x90, 0xa0]);
    let test = prop::sample::select(vec![0x10u16, 0x20, 0x30, 0x40]);
    prop_oneof![
        4 => (width.clone(), place.clone()).prop_map(|(width, place)| (0x20 | width, 0, 0, place)),
        2 => Just((0x28, 0, 0, 12)),
        2 => Just((0xb1, 0, 0, 14)),
        3 => (width, 0u32..40).prop_map(|(width, k)| (0x40 | width, 0, 0, k)),
        3 => (operation, number.clone(), any::<bool>()).prop_map(|(operation, k, x)| {
            let k = if matches!(operation, 0x60 | 0x70) { k % 32 } else { k.max(1) };
            (0x04 | operation | if x { 8 } else { 0 }, 0, 0, k)
        }),
        6 => (test, number.clone(), any::<(u8, u8)>(), 0u16..4).prop_map(|(test, k, (jt, jf), x)| {
            (0x05 | test | if x == 0 { 8 } else { 0 }, jt % 6, jf % 6, k)
        }),
        1 => prop::sample::select(vec![0x07u16, 0x87, 0x84, 0x80, 0x81]).prop_map(|code| (code, 0, 0, 0)),
        1 => (any::<bool>(), number).prop_map(|(x, k)| (u16::from(x), 0, 0, k)),
        1 => (any::<bool>(), 0u32..4).prop_map(|(x, slot)| (0x02 | u16::from(x), 0, 0, slot)),
        1 => (any::<bool>(), 0u32..4).prop_map(|(x, slot)| (0x60 | u16::from(x), 0, 0, slot)),
        1 => (0u32..2).prop_map(|k| (0x06, 0, 0, k)),
    ]
}

fn program() -> impl Strategy<Value = Vec<u64>> {
    (prop::collection::vec(step(), 1..24), any::<bool>()).prop_map(|(steps, by_a)| {
        let left = |at: usize, jump: u8| jump.min((steps.len() - 1 - at) as u8);
        let mut code: Vec<u64> = (0..4).map(|slot| instruction(0x02, 0, 0, slot)).collect();
        for (at, (operation, jt, jf, k)) in steps.iter().copied().enumerate() {
            code.push(instruction(operation, left(at, jt), left(at, jf), k));
        }
        code.push(if by_a { instruction(0x16, 0, 0, 0) } else { instruction(0x06, 0, 0, 1) });
        code
    })
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let ports = prop_oneof![Just(7001u16), Just(53), any::<u16>()];
    (
        any::<bool>(),
        ports.clone(),
        ports,
        0usize..80,
        prop::collection::vec((14usize..80, any::<u8>()), 0..4),
        0usize..30,
    )
        .prop_map(|(v6, source, destination, payload, changes, padding)| {
            let mut frame = if v6 { udp6(source, destination, payload) } else { udp4(source, destination, payload) };
            let kept = [14, 16, 17, 18, 19, 21, 22];
            for (at, byte) in changes.into_iter().filter(|(at, _)| !kept.contains(at)) {
                frame.get_mut(at).into_iter().for_each(|there| *there = byte);
            }
            frame.resize(frame.len() + padding, 0xee);
            frame
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400)
    ))]

    #[test]
    fn says_what_linux_says(code in program(), frames in prop::collection::vec(frame(), 8)) {
        let Ok(classic) = Classic::new(&code) else { return Ok(()) };
        let filter = Filter::new(Layer::Link, code).expect("what Linux takes can be run");
        let survives = filter.survives_forwarding();
        let runnable = filter.runnable();
        let captures = [Capture { filter, only: None }];
        let xdp = Xdp::load(&translate(&captures).expect("short")).expect("the verifier takes it");
        for frame in frames {
            let (answer, arrived) = (xdp.answer(&frame) == 1, classic.matches(&frame));
            prop_assert_eq!(answer, runnable.matches(&frame), "run here it says the same");
            // A place before the packet may mean anything, so it matches.
            prop_assert!(answer || !arrived, "it matches");
            let left = classic.matches(&forwarded(&frame));
            prop_assert!(!survives || !left || answer, "as it leaves, it matches");
        }
    }
}
