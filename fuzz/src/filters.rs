//! Filters of packet sockets: whatever a socket may have attached is refused or translated.

use crate::take;
use towpath_filter::{Capture, Filter, Layer, instruction, translate};

/// First the layer, then instructions of eight bytes.
pub fn run(mut bytes: &[u8]) {
    let Some([layer]) = take(&mut bytes) else { return };
    let layer = if layer & 1 == 0 { Layer::Link } else { Layer::Network };
    let code: Vec<u64> =
        bytes.chunks_exact(8).filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?))).collect();
    let Ok(filter) = Filter::new(layer, code) else { return };
    filter.survives_forwarding();
    filter.matches_everything();
    let captures = [Capture { filter: filter.clone(), only: None }, Capture { filter, only: Some(1) }];
    let _ = translate(&captures);
}

pub fn seeds() -> Vec<Vec<u8>> {
    // `tcpdump -d` of these.
    let port_80 = [
        (0x28, 0, 0, 12),
        (0x15, 0, 8, 0x800),
        (0x30, 0, 0, 23),
        (0x15, 0, 6, 6),
        (0x28, 0, 0, 20),
        (0x45, 4, 0, 0x1fff),
        (0xb1, 0, 0, 14),
        (0x48, 0, 0, 16),
        (0x15, 0, 1, 80),
        (0x06, 0, 0, 262_144),
        (0x06, 0, 0, 0),
    ];
    let longer_than_a_sum = [
        (0x80, 0, 0, 0),
        (0x02, 0, 0, 1),
        (0x00, 0, 0, 7),
        (0x07, 0, 0, 0),
        (0x60, 0, 0, 1),
        (0x1c, 0, 0, 0),
        (0x16, 0, 0, 0),
    ];
    let seed = |code: &[(u16, u8, u8, u32)]| {
        let words = code.iter().flat_map(|(code, yes, no, k)| instruction(*code, *yes, *no, *k).to_le_bytes());
        [0].into_iter().chain(words).collect()
    };
    vec![seed(&port_80), seed(&longer_than_a_sum)]
}
