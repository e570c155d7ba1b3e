//! What travels beside a frame on TAPs and packet sockets that are asked for it: `struct virtio_net_hdr`
//! (include/uapi/linux/virtio_net.h), in the byte order of this machine.

use std::mem::size_of;

/// The transport checksum is to be completed (VIRTIO_NET_HDR_F_NEEDS_CSUM).
const NEEDS_CHECKSUM: u8 = 1;

/// The header. All zero: the frame is complete as it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Vnet {
    flags: u8,
    /// Several packets in one, to be cut (VIRTIO_NET_HDR_GSO_*); 0: one packet
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    /// Where the checksum begins to count
    csum_start: u16,
    /// Where it is to be put, from there on; the sum of the pseudo header is there already
    csum_offset: u16,
}

const _: () = assert!(size_of::<Vnet>() == 10);

impl Vnet {
    /// Of a frame whose checksum is to be counted from one place on, and put `offset` bytes behind it.
    pub fn partial(start: u16, offset: u16) -> Self {
        Self { flags: NEEDS_CHECKSUM, csum_start: start, csum_offset: offset, ..Self::default() }
    }

    /// Whether the frame is several packets in one.
    pub fn is_several(&self) -> bool {
        self.gso_type != 0
    }

    /// Completes the frame's transport checksum, if that was left to the receiver (RFC 1071); false if it cannot be.
    pub fn complete(&self, frame: &mut [u8]) -> bool {
        if self.flags & NEEDS_CHECKSUM == 0 {
            return true;
        }
        let start = usize::from(self.csum_start);
        let Some(counted) = frame.get_mut(start..) else { return false };
        let (pairs, odd) = counted.as_chunks::<2>();
        let sum = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum::<u64>();
        let mut sum = sum + odd.first().map_or(0, |byte| u64::from(*byte) << 8);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let place = usize::from(self.csum_offset);
        let Some(place) = counted.get_mut(place..place + 2) else { return false };
        // Zero would say that there is none (RFC 768); the other zero means the same number.
        let sum = if sum == 0xffff { 0xffff } else { !(sum as u16) };
        place.copy_from_slice(&sum.to_be_bytes());
        true
    }

    /// The same, with so many bytes more before what it speaks of.
    pub fn behind(self, bytes: u16) -> Self {
        let checksum = self.flags & NEEDS_CHECKSUM != 0;
        let csum_start = if checksum { self.csum_start.saturating_add(bytes) } else { self.csum_start };
        let hdr_len = if self.is_several() { self.hdr_len.saturating_add(bytes) } else { self.hdr_len };
        Self { csum_start, hdr_len, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: [u8; 20] = [9, 9, 9, 9, 0x12, 0x34, 0xff, 0xff, 0x0a, 0x0b, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn checksums_are_completed_where_the_header_says() {
        let header = Vnet::partial(4, 6);
        for len in [19, 20] {
            let mut frame = FRAME[..len].to_vec();
            assert!(header.complete(&mut frame));
            assert_eq!(frame[..10], FRAME[..10]);
            assert_eq!(frame[12..], FRAME[12..len]);
            // By another way: in host order, with the carry added as it comes.
            let add = |sum: u16, bytes: &[u8]| {
                let word = u16::from_ne_bytes([bytes[0], bytes.get(1).copied().unwrap_or(0)]);
                let (sum, carry) = sum.overflowing_add(word);
                sum + u16::from(carry)
            };
            let sum = FRAME[4..len].chunks(2).fold(0, add);
            assert_eq!(frame[10..12], (!sum).to_ne_bytes(), "{len} bytes");
        }
    }

    #[test]
    fn zero_is_never_written_and_nothing_is_where_nothing_is_asked_for() {
        let mut frame = [0xff, 0xff, 0, 0];
        assert!(Vnet::partial(0, 2).complete(&mut frame));
        assert_eq!(frame, [0xff; 4]);
        let mut frame = FRAME;
        assert!(Vnet { csum_start: 4, csum_offset: 6, ..Vnet::default() }.complete(&mut frame));
        assert_eq!(frame, FRAME);
        for (csum_start, csum_offset) in [(21, 0), (4, 15), (u16::MAX, u16::MAX)] {
            assert!(!Vnet::partial(csum_start, csum_offset).complete(&mut frame));
            assert_eq!(frame, FRAME);
        }
    }

    #[test]
    fn what_lies_behind_more_is_found_there() {
        let header = Vnet { flags: 1, gso_type: 1, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
        assert_eq!(header.behind(4), Vnet { hdr_len: 58, csum_start: 38, ..header });
        assert_eq!(Vnet::default().behind(4), Vnet::default());
    }
}
