//! The receiving ring of a packet socket (TPACKET_V3, Documentation/networking/packet_mmap.rst): blocks of frames, each of
//! which the kernel hands over when it is full or some time has passed, and gets back when all of it was seen.

use crate::vnet::Vnet;
use std::mem::{offset_of, size_of};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where in a block's header its fields are.
const HEADER: usize = offset_of!(libc::tpacket_block_desc, hdr);
const STATUS: usize = HEADER + offset_of!(libc::tpacket_hdr_v1, block_status);
const FRAMES: usize = HEADER + offset_of!(libc::tpacket_hdr_v1, num_pkts);
const FIRST: usize = HEADER + offset_of!(libc::tpacket_hdr_v1, offset_to_first_pkt);

/// Where the blocks lie.
#[derive(Clone, Copy)]
pub struct Layout {
    /// The first byte; aligned for a block's header
    pub start: NonNull<u8>,
    /// Bytes of a block, a multiple of 8
    pub size: usize,
    /// Blocks
    pub count: usize,
}

/// A frame in a block.
#[derive(PartialEq, Eq, Debug)]
pub struct Seen<'b> {
    /// What travels beside it
    pub beside: Vnet,
    /// The frame, without the tag
    pub bytes: &'b [u8],
    /// Its outermost VLAN tag, if the kernel keeps it apart: protocol and tag control information
    pub tag: Option<(u16, u16)>,
    /// None of it was cut off
    pub whole: bool,
}

/// The reader of the blocks.
pub struct Blocks {
    layout: Layout,
    /// The block that is read, or will be next
    block: usize,
    /// It is ours
    ours: bool,
    /// Frames of it that were not seen yet
    left: u32,
    /// Where the next one begins
    next: usize,
}

// SAFETY: the memory may be read from any thread.
unsafe impl Send for Blocks {}

impl Blocks {
    /// # Safety
    /// The memory is there for as long as this lives, nobody else reads the blocks, and whoever fills them follows the
    /// protocol.
    pub unsafe fn new(layout: Layout) -> Self {
        Self { layout, block: 0, ours: false, left: 0, next: 0 }
    }

    /// The next frame; None if none has been handed over. What it shows is read until the next call.
    pub fn next(&mut self) -> Option<Seen<'_>> {
        while self.left == 0 {
            if self.ours {
                // Pairs with the kernel's reading the status before it fills the block again.
                self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
                self.block = (self.block + 1) % self.layout.count;
                self.ours = false;
            }
            // Pairs with the kernel's barrier between the block's contents and its status.
            if self.status().load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
                return None;
            }
            self.ours = true;
            self.left = self.word(FRAMES)?;
            self.next = self.word(FIRST)? as usize;
        }
        let at = self.next;
        let frame = self.frame(at);
        let (after, left) = match &frame {
            Some((_, after)) => (at.saturating_add(*after), self.left - 1),
            // No kernel makes such a block: nothing more of it can be found.
            None => (0, 0),
        };
        (self.next, self.left) = (after, left);
        self.frame(at).map(|(seen, _)| seen)
    }

    /// The frame at a place of the block, and how far behind it the next one begins.
    fn frame(&self, at: usize) -> Option<(Seen<'_>, usize)> {
        let block = self.bytes();
        let header = block.get(at..at.checked_add(size_of::<libc::tpacket3_hdr>())?)?;
        // SAFETY: as long as the header, of integers, read unaligned.
        let header = unsafe { header.as_ptr().cast::<libc::tpacket3_hdr>().read_unaligned() };
        let start = at.checked_add(header.tp_mac.into())?;
        let bytes = block.get(start..start.checked_add(header.tp_snaplen as usize)?)?;
        let beside = block.get(start.checked_sub(size_of::<Vnet>())?..start)?;
        // SAFETY: as long as the header, of integers, read unaligned.
        let beside = unsafe { beside.as_ptr().cast::<Vnet>().read_unaligned() };
        let tag = (header.hv1.tp_vlan_tpid, header.hv1.tp_vlan_tci as u16);
        let tag = (header.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(tag);
        let whole = header.tp_snaplen == header.tp_len;
        Some((Seen { beside, bytes, tag, whole }, header.tp_next_offset as usize))
    }

    /// The block that is ours.
    fn bytes(&self) -> &[u8] {
        // SAFETY: the kernel does not write to a block that it has handed over.
        unsafe { std::slice::from_raw_parts(self.place(0), self.layout.size) }
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.bytes().get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of the block's header, which both sides change atomically.
        unsafe { &*self.place(STATUS).cast() }
    }

    fn place(&self, offset: usize) -> *mut u8 {
        // SAFETY: a block's number is below `count`, and callers go no further than its end.
        unsafe { self.layout.start.as_ptr().add(self.block * self.layout.size + offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1024;
    const MAC: usize = 82;

    /// Blocks in memory of the program's own, filled as the kernel does.
    struct Fake(Box<[[u64; SIZE / 8]]>);

    impl Fake {
        fn new(count: usize) -> Self {
            Self(vec![[0; SIZE / 8]; count].into())
        }

        fn blocks(&mut self) -> Blocks {
            let layout = Layout { start: NonNull::from(&mut *self.0).cast(), size: SIZE, count: self.0.len() };
            // SAFETY: tests drop the reader before the memory, and make one.
            unsafe { Blocks::new(layout) }
        }
    }

    fn write<T>(layout: Layout, block: usize, at: usize, value: T) {
        assert!(at + size_of::<T>() <= SIZE);
        // SAFETY: inside the block, which the reader does not look at now.
        unsafe { layout.start.as_ptr().add(block * SIZE + at).cast::<T>().write_unaligned(value) }
    }

    fn status(layout: Layout, block: usize) -> u32 {
        // SAFETY: inside the block.
        unsafe { layout.start.as_ptr().add(block * SIZE + STATUS).cast::<u32>().read() }
    }

    /// Hands over a block with these frames: contents, tag, length before it was cut.
    fn fill(layout: Layout, block: usize, frames: &[(&[u8], Option<(u16, u16)>, usize)]) {
        let mut at = 48;
        write(layout, block, FIRST, at as u32);
        write(layout, block, FRAMES, frames.len() as u32);
        for (bytes, tag, len) in frames {
            // SAFETY: integers, for which zeros are valid.
            let mut header: libc::tpacket3_hdr = unsafe { std::mem::zeroed() };
            header.tp_next_offset = (MAC + bytes.len()).next_multiple_of(16) as u32;
            (header.tp_snaplen, header.tp_len, header.tp_mac) = (bytes.len() as u32, *len as u32, MAC as u16);
            if let Some((protocol, control)) = tag {
                header.tp_status = libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID;
                (header.hv1.tp_vlan_tpid, header.hv1.tp_vlan_tci) = (*protocol, (*control).into());
            }
            let next = at + header.tp_next_offset as usize;
            write(layout, block, at, header);
            write(layout, block, at + MAC - size_of::<Vnet>(), Vnet::partial(bytes.len() as u16, 6));
            bytes.iter().enumerate().for_each(|(n, byte)| write(layout, block, at + MAC + n, *byte));
            at = next;
        }
        write(layout, block, STATUS, libc::TP_STATUS_USER | libc::TP_STATUS_BLK_TMO);
    }

    fn seen(blocks: &mut Blocks) -> Option<(Vec<u8>, Option<(u16, u16)>, bool)> {
        let Seen { beside, bytes, tag, whole } = blocks.next()?;
        assert_eq!(beside, Vnet::partial(bytes.len() as u16, 6));
        Some((bytes.to_vec(), tag, whole))
    }

    #[test]
    fn frames_come_in_order_and_blocks_go_back_when_all_was_seen() {
        let mut fake = Fake::new(4);
        let mut blocks = fake.blocks();
        let layout = blocks.layout;
        assert_eq!(seen(&mut blocks), None);
        // Around the ring more than once, with a block that holds nothing.
        for round in 0..5u8 {
            let [a, b, c] = [0, 1, 2].map(|n| (usize::from(round) * 3 + n) % 4);
            let (one, two, three) = (vec![round; 60], vec![round + 100; 77], vec![round + 200; 14]);
            fill(layout, a, &[(&one, None, 60), (&two, Some((0x8100, 0x6005)), 77)]);
            assert_eq!(seen(&mut blocks), Some((one, None, true)));
            assert_eq!(seen(&mut blocks), Some((two, Some((0x8100, 0x6005)), true)));
            assert_ne!(status(layout, a), libc::TP_STATUS_KERNEL, "its last frame may still be looked at");
            assert_eq!(seen(&mut blocks), None);
            assert_eq!(status(layout, a), libc::TP_STATUS_KERNEL);
            fill(layout, b, &[]);
            assert_eq!(seen(&mut blocks), None);
            assert_eq!(status(layout, b), libc::TP_STATUS_KERNEL);
            fill(layout, c, &[(&three, None, 15)]);
            assert_eq!(seen(&mut blocks), Some((three, None, false)), "one byte was cut off");
            assert_eq!(seen(&mut blocks), None);
        }
    }

    #[test]
    fn a_block_that_no_kernel_makes_is_left() {
        let mut fake = Fake::new(1);
        let mut blocks = fake.blocks();
        let layout = blocks.layout;
        let (mac, len) = (offset_of!(libc::tpacket3_hdr, tp_mac), offset_of!(libc::tpacket3_hdr, tp_snaplen));
        for (at, value) in [(FIRST, u32::MAX), (FIRST, SIZE as u32 - 8), (48 + mac, 0xffff), (48 + len, 2000)] {
            fill(layout, 0, &[(&[7; 60], None, 60), (&[8; 60], None, 60)]);
            write(layout, 0, at, value);
            assert_eq!(seen(&mut blocks), None, "{at}: {value}");
            assert_eq!(seen(&mut blocks), None);
            assert_eq!(status(layout, 0), libc::TP_STATUS_KERNEL);
        }
        fill(layout, 0, &[(&[7; 60], None, 60)]);
        assert!(seen(&mut blocks).is_some(), "whole blocks are read again");
    }
}
