//! Buffers for frames: fixed in size, from one piece of memory, never shared.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use towpath_pipeline::{Beside, Frame};
use towpath_wire::View;

/// Room that drivers leave before a frame, for tags to be added.
pub const HEADROOM: u16 = 256;
/// Memory is aligned to this, and a multiple of it: huge pages fit, and so do the pages that AF_XDP asks for.
const ALIGN: usize = 2 << 20;
/// Buffers begin at multiples of a cache line.
const LINE: usize = 64;

/// A buffer with a frame in it, which nobody else can reach. It came from a `Pool` and is to go back there.
#[derive(Debug)]
pub struct Buffer {
    chunk: NonNull<u8>,
    start: u16,
    len: u16,
    room: u16,
}

// SAFETY: a buffer owns its chunk of the pool's memory, which stays until every buffer has come back.
unsafe impl Send for Buffer {}

impl Buffer {
    /// The frame.
    #[inline(always)]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: start + len never exceed the chunk, whose bytes are initialised and this buffer's own.
        unsafe { core::slice::from_raw_parts(self.place(0), self.len.into()) }
    }

    /// Makes the frame `len` bytes, as many as there is room for, from where it begins, and gives them to be written.
    #[inline(always)]
    pub fn resize(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(usize::from(self.room - self.start)) as u16;
        // SAFETY: as for `bytes`, and `self` is borrowed for as long as the slice lives.
        unsafe { core::slice::from_raw_parts_mut(self.place(0), self.len.into()) }
    }

    #[inline(always)]
    fn place(&self, offset: usize) -> *mut u8 {
        // SAFETY: callers go no further than the chunk's end.
        unsafe { self.chunk.as_ptr().add(usize::from(self.start) + offset) }
    }

    #[inline(always)]
    fn holds<T>(&self, offset: usize) -> bool {
        offset.saturating_add(size_of::<T>()) <= usize::from(self.len)
    }
}

impl Frame for Buffer {
    #[inline(always)]
    fn get<T: View>(&self, offset: usize) -> Option<&T> {
        // SAFETY: inside the frame, whose bytes are initialised and this buffer's own; any bytes make a `T`, unaligned.
        self.holds::<T>(offset).then(|| unsafe { &*self.place(offset).cast() })
    }

    #[inline(always)]
    fn get_mut<T: View>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as for `get`, and `self` is borrowed for as long as the view lives.
        self.holds::<T>(offset).then(|| unsafe { &mut *self.place(offset).cast() })
    }

    #[inline(always)]
    fn first_len(&self) -> usize {
        self.len.into()
    }

    #[inline(always)]
    fn total_len(&self) -> usize {
        self.len.into()
    }

    /// Where an engine knows where to look, the XDP program has looked: only frames with nothing beside them get here.
    #[inline(always)]
    fn beside(&self) -> Beside {
        Beside::NOTHING
    }

    #[inline(always)]
    fn move_head(&mut self, by: i32) -> bool {
        let (start, len) = (i32::from(self.start) + by, i32::from(self.len) - by);
        let fits = start >= 0 && len > 0 && start + len <= i32::from(self.room);
        if fits {
            (self.start, self.len) = (start as u16, len as u16);
        }
        fits
    }

    #[inline(always)]
    fn trim(&mut self, by: u32) -> bool {
        match u32::from(self.len).checked_sub(by) {
            Some(len) => {
                self.len = len as u16;
                true
            }
            None => false,
        }
    }
}

/// A pool's memory, to be told to a kernel or device. It gives no right to touch it: only buffers that were lent do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// Address of the first byte
    pub start: usize,
    /// Length
    pub bytes: usize,
    /// Bytes from buffer to buffer
    pub stride: usize,
    /// Buffers
    pub count: usize,
}

/// A worker's buffers. The last one given back is the first one taken: it is likely still in the cache.
#[derive(Debug)]
pub struct Pool {
    memory: NonNull<u8>,
    layout: Layout,
    stride: usize,
    count: usize,
    free: Vec<NonNull<u8>>,
}

// SAFETY: the pool owns its memory, and the free chunks in it are nobody else's.
unsafe impl Send for Pool {}

impl Pool {
    /// `count` buffers whose chunks lie `stride` bytes apart: a multiple of 64, more than `HEADROOM` and below 65536.
    /// Strides that are odd multiples of 64 spread the beginnings of frames over the cache.
    ///
    /// # Panics
    /// For strides other than those.
    pub fn new(count: usize, stride: usize) -> Self {
        let fits = stride > HEADROOM.into() && stride <= u16::MAX.into() && stride.is_multiple_of(LINE);
        assert!(fits && count > 0, "{count} buffers of {stride} bytes cannot be");
        let align = if cfg!(miri) { 4096 } else { ALIGN };
        let layout = Layout::from_size_align((count * stride).next_multiple_of(align), align).expect("buffers fit");
        // SAFETY: the size is not zero.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        advise(memory, layout.size(), true);
        // SAFETY: each lies inside the allocation.
        let free = (0..count).rev().map(|n| unsafe { memory.add(n * stride) }).collect();
        Self { memory, layout, stride, count, free }
    }

    /// An empty buffer with room before it; None if all are in use.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Buffer> {
        let chunk = self.free.pop()?;
        Some(Buffer { chunk, start: HEADROOM, len: 0, room: self.stride as u16 })
    }

    /// Takes a buffer back.
    ///
    /// # Panics
    /// If it came from another pool.
    #[inline(always)]
    pub fn give(&mut self, buffer: Buffer) {
        self.offset(&buffer);
        // There are never more than `count`, so this does not allocate.
        self.free.push(buffer.chunk);
    }

    /// Where the memory lies, for drivers whose kernel or device puts frames there itself.
    pub fn area(&self) -> Area {
        Area { start: self.memory.as_ptr() as usize, bytes: self.layout.size(), stride: self.stride, count: self.count }
    }

    /// Gives a buffer away as a place in the pool and as an offset of its frame in the memory.
    ///
    /// # Panics
    /// If it came from another pool.
    #[inline(always)]
    pub(crate) fn lend(&self, buffer: Buffer) -> (usize, u64) {
        let offset = self.offset(&buffer);
        (offset / self.stride, offset as u64 + u64::from(buffer.start))
    }

    /// Place in the pool of the buffer that holds this offset.
    #[inline(always)]
    pub(crate) fn place_of(&self, offset: u64) -> usize {
        offset as usize / self.stride
    }

    /// The buffer that was lent and holds this offset, with a frame of so many bytes from there on, as many as fit.
    ///
    /// # Safety
    /// It was lent, and nobody has it.
    #[inline(always)]
    pub(crate) unsafe fn lent(&self, offset: u64, len: u32) -> Buffer {
        let (place, start) = (offset as usize / self.stride, offset as usize % self.stride);
        // SAFETY: a buffer that was lent lies in the memory.
        let chunk = unsafe { self.memory.add(place * self.stride) };
        let room = self.stride as u16;
        Buffer { chunk, start: start as u16, len: len.min(u32::from(room) - start as u32) as u16, room }
    }

    /// Where a buffer's chunk lies.
    ///
    /// # Panics
    /// If it came from another pool.
    #[inline(always)]
    fn offset(&self, buffer: &Buffer) -> usize {
        let offset = (buffer.chunk.as_ptr() as usize).wrapping_sub(self.memory.as_ptr() as usize);
        assert!(offset < self.layout.size(), "a buffer came back to another pool");
        offset
    }

    /// Buffers that nobody has.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All buffers.
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Drop for Pool {
    /// While a buffer is out, its memory must stay.
    fn drop(&mut self) {
        if self.free.len() == self.count {
            advise(self.memory, self.layout.size(), false);
            // SAFETY: allocated with this layout, and no buffer is out.
            unsafe { dealloc(self.memory.as_ptr(), self.layout) };
        }
    }
}

/// Says that the memory is, or no longer is, a pool's: in huge pages there are fewer translations of addresses, and a child
/// process has no use for it, while pages that a kernel or device knows would be copied for it, all of them. The kernel
/// may ignore it.
fn advise(memory: NonNull<u8>, bytes: usize, pool: bool) {
    let advice =
        if pool { [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] } else { [libc::MADV_NOHUGEPAGE, libc::MADV_DOFORK] };
    // SAFETY: the range is one allocation, aligned to pages; the advice changes no contents.
    let _ = advice.map(|advice| unsafe { cfg!(miri) || libc::madvise(memory.as_ptr().cast(), bytes, advice) == 0 });
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_wire::ethernet::Ethernet;

    #[test]
    fn buffers_are_handed_out_once_and_come_back() {
        let mut pool = Pool::new(3, 512);
        let mut buffers: Vec<Buffer> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((buffers.len(), pool.free()), (3, 0));
        for (n, buffer) in buffers.iter_mut().enumerate() {
            buffer.resize(1000).fill(n as u8);
        }
        for (n, buffer) in buffers.iter().enumerate() {
            assert_eq!(
                buffer.bytes(),
                [n as u8; 512 - HEADROOM as usize],
                "they do not overlap and end where they end"
            );
        }
        let last = buffers.last().map(|buffer| buffer.chunk);
        buffers.into_iter().for_each(|buffer| pool.give(buffer));
        assert_eq!(pool.free(), pool.count());
        let again = pool.take().unwrap();
        assert_eq!((Some(again.chunk), again.bytes()), (last, [].as_slice()));
        pool.give(again);
    }

    #[test]
    fn a_frame_ends_where_it_ends_and_moves_within_its_buffer() {
        let mut pool = Pool::new(1, 512);
        let mut frame = pool.take().unwrap();
        frame.resize(14).copy_from_slice(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        assert!(frame.get::<Ethernet>(0).is_some());
        assert!(frame.get::<Ethernet>(1).is_none() && frame.get_mut::<Ethernet>(usize::MAX).is_none());
        assert!(frame.move_head(4));
        assert_eq!(frame.bytes(), [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        assert!(frame.trim(2) && !frame.trim(9));
        assert!(frame.move_head(-4));
        assert_eq!(frame.bytes(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "what was removed is as it was");
        assert!(!frame.move_head(-257) && !frame.move_head(12) && frame.move_head(-256));
        assert_eq!((frame.first_len(), frame.total_len()), (268, 268));
        pool.give(frame);
    }

    #[test]
    #[should_panic(expected = "another pool")]
    fn a_buffer_of_another_pool_is_refused() {
        let (mut one, mut other) = (Pool::new(1, 512), Pool::new(1, 512));
        one.give(other.take().unwrap());
    }

    #[test]
    fn memory_stays_while_a_buffer_is_out() {
        let mut pool = Pool::new(2, 512);
        let mut buffer = pool.take().unwrap();
        drop(pool);
        buffer.resize(3).fill(7);
        assert_eq!(buffer.bytes(), [7; 3]);
        // What it occupies is lost, which is what is tested.
    }
}
