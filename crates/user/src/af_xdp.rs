//! Ports by AF_XDP: a socket on each queue, with the pool as its memory. The kernel copies frames into our buffers and out
//! of them, or the driver uses them as they are where it can (the kernel chooses). The interface stays Linux's.
//!
//! Each socket registers the whole pool as memory of its own. So a frame goes from one port to another without a copy of
//! ours, and sockets come and go without regard to each other.

use crate::driver::{BATCH, PortDriver};
use crate::mapping::{Mapping, set_option};
use crate::pool::{Area, Buffer, Pool};
use crate::ring::{Consumer, Place, Producer};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a pool's buffers for AF_XDP: a page, as the kernel asks for a power of two.
pub const STRIDE: usize = 4096;
/// Elements of each ring.
const RING: u32 = 512;
/// Memory of frames that were sent and are still somewhere in the kernel, where it copies them.
const SEND_BYTES: libc::c_int = 4 << 20;
/// Times that the kernel is asked to send before what remains is left for the next turn; it sends 32 frames each time
/// (net/xdp/xsk.c 6.1, TX_BATCH_SIZE).
const KICKS: u32 = RING / 32;

/// A socket that was closed keeps its queue until the kernel has got round to it (net/xdp/xsk_buff_pool.c 6.1,
/// `xp_put_pool` leaves that to a work queue), which takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the kernel refused.
#[derive(thiserror::Error, Debug)]
#[error("cannot {what} of queue {queue} of interface {ifindex}: {cause}{remedy}")]
pub struct Error {
    what: &'static str,
    ifindex: u32,
    queue: u32,
    cause: io::Error,
    remedy: &'static str,
}

/// A socket on one queue.
pub struct XdpPort {
    received: Consumer<libc::xdp_desc>,
    sending: Producer<libc::xdp_desc>,
    /// Buffers for frames to come
    filling: Producer<u64>,
    /// Buffers of frames that were sent
    sent: Consumer<u64>,
    send_flags: NonNull<AtomicU32>,
    fill_flags: NonNull<AtomicU32>,
    area: Area,
    /// Buffers that the kernel has, by place in the pool
    lent: Lent,
    /// Frames given to the kernel whose buffers have not come back
    in_flight: usize,
    _rings: [Mapping; 4],
    socket: OwnedFd,
}

// SAFETY: the flags lie in mappings that belong to the value.
unsafe impl Send for XdpPort {}

/// A set of buffers.
struct Lent(Vec<u64>);

impl Lent {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    #[inline]
    fn insert(&mut self, place: usize) {
        if let Some(word) = self.0.get_mut(place / 64) {
            *word |= 1 << (place % 64);
        }
    }

    /// False if it was not there.
    #[inline]
    fn remove(&mut self, place: usize) -> bool {
        let Some(word) = self.0.get_mut(place / 64) else { return false };
        let there = *word >> (place % 64) & 1 != 0;
        *word &= !(1 << (place % 64));
        there
    }

    fn take_first(&mut self) -> Option<usize> {
        let at = self.0.iter().position(|word| *word != 0)?;
        let place = at * 64 + self.0[at].trailing_zeros() as usize;
        self.remove(place);
        Some(place)
    }
}

impl XdpPort {
    /// Opens a socket on a queue of an interface of this thread's network namespace, for a worker whose pool has this
    /// memory, with buffers of `STRIDE` bytes. Frames come once it is in a program's map of sockets; what comes before the
    /// worker has it would be lost.
    pub fn open(area: Area, ifindex: u32, queue: u32) -> Result<Self, Error> {
        let fail = |what| move |cause| Error { what, ifindex, queue, cause, remedy: "" };
        let socket = socket().map_err(fail("open an AF_XDP socket"))?;
        register(&socket, area).map_err(|cause| {
            let remedy = match cause.raw_os_error() {
                Some(libc::ENOBUFS) => " (raise the limit of locked memory: ulimit -l unlimited)",
                _ => "",
            };
            Error { what: "register memory for the socket", ifindex, queue, cause, remedy }
        })?;
        for ring in [libc::XDP_RX_RING, libc::XDP_TX_RING, libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING] {
            set(&socket, ring, &RING).map_err(fail("make a ring for the socket"))?;
        }
        // The default holds some hundred frames that a receiver has not taken off a veth yet. It needs CAP_NET_ADMIN; without
        // it there is less room.
        let _ = set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BYTES);
        let port = Self::map(socket, area).map_err(fail("map the rings of the socket"))?;
        port.bind(ifindex, queue).map_err(|cause| {
            let remedy = match cause.raw_os_error() {
                Some(libc::EBUSY) => " (another socket has this queue)",
                Some(libc::EINVAL) => " (is there such a queue? see ethtool -l)",
                _ => "",
            };
            Error { what: "bind a socket to the receive and transmit rings", ifindex, queue, cause, remedy }
        })?;
        Ok(port)
    }

    fn map(socket: OwnedFd, area: Area) -> io::Result<Self> {
        // SAFETY: integers, for which zeros are valid.
        let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&offsets) as libc::socklen_t;
        // SAFETY: `offsets` is as long as said.
        let done = unsafe {
            let value = (&raw mut offsets).cast();
            libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, libc::XDP_MMAP_OFFSETS, value, &mut length)
        };
        if done != 0 || (length as usize) < size_of_val(&offsets) {
            return Err(io::Error::last_os_error());
        }
        let (rx, tx, fr, cr) = (offsets.rx, offsets.tx, offsets.fr, offsets.cr);
        let (received, a) = map_ring::<libc::xdp_desc>(&socket, libc::XDP_PGOFF_RX_RING as u64, &rx)?;
        let (sending, b) = map_ring::<libc::xdp_desc>(&socket, libc::XDP_PGOFF_TX_RING as u64, &tx)?;
        let (filling, c) = map_ring::<u64>(&socket, libc::XDP_UMEM_PGOFF_FILL_RING, &fr)?;
        let (sent, d) = map_ring::<u64>(&socket, libc::XDP_UMEM_PGOFF_COMPLETION_RING, &cr)?;
        // SAFETY: inside the mappings, where the kernel says.
        let flags = |ring: &Mapping, offset: u64| unsafe { ring.start().add(offset as usize).cast() };
        // SAFETY: the rings were just mapped, and are kept as long as their ends; the kernel is the other side of each.
        unsafe {
            Ok(Self {
                received: Consumer::new(received),
                sending: Producer::new(sending),
                filling: Producer::new(filling),
                sent: Consumer::new(sent),
                send_flags: flags(&b, tx.flags),
                fill_flags: flags(&c, fr.flags),
                area,
                lent: Lent::new(area.count),
                in_flight: 0,
                _rings: [a, b, c, d],
                socket,
            })
        }
    }

    fn bind(&self, ifindex: u32, queue: u32) -> io::Result<()> {
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: libc::XDP_USE_NEED_WAKEUP,
            sxdp_ifindex: ifindex,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        let length = size_of_val(&address) as libc::socklen_t;
        let deadline = Instant::now() + PATIENCE;
        loop {
            // SAFETY: `address` is as long as said.
            if unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), length) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives the kernel buffers for frames to come.
    #[inline]
    fn fill(&mut self, pool: &mut Pool) {
        assert!(pool.area() == self.area, "the kernel knows another pool's memory");
        let room = self.filling.room(RING);
        if room < BATCH as u32 {
            return;
        }
        for _ in 0..room {
            let Some(buffer) = pool.take() else { break };
            let (place, offset) = pool.lend(buffer);
            self.lent.insert(place);
            self.filling.put(offset);
        }
        self.filling.publish();
        if wants_call(self.fill_flags) {
            // SAFETY: no pointers. What it may say comes again with the next frame.
            unsafe {
                libc::recvfrom(self.socket.as_raw_fd(), null_mut(), 0, libc::MSG_DONTWAIT, null_mut(), null_mut())
            };
        }
    }

    /// Takes buffers of sent frames back.
    #[inline]
    fn reap(&mut self, pool: &mut Pool) {
        while let Some(offset) = self.sent.take() {
            if let Some(buffer) = self.retake(pool, offset, 0) {
                self.in_flight -= 1;
                pool.give(buffer);
            }
        }
        self.sent.release();
    }

    /// A buffer comes back from the kernel; None if it did not have it.
    #[inline]
    fn retake(&mut self, pool: &Pool, offset: u64, len: u32) -> Option<Buffer> {
        let place = pool.place_of(offset);
        // SAFETY: it was lent and is lent no more, so it is ours alone.
        self.lent.remove(place).then(|| unsafe { pool.lent(offset, len) })
    }

    /// Has the kernel send what is in the ring.
    #[inline]
    fn kick(&mut self) {
        for _ in 0..KICKS {
            if self.sending.waiting() == 0 || !wants_call(self.send_flags) {
                return;
            }
            // SAFETY: no pointers.
            let sent = unsafe { libc::sendto(self.socket.as_raw_fd(), null(), 0, libc::MSG_DONTWAIT, null(), 0) };
            // EAGAIN says that there is more to send, EBUSY that the device dropped a frame (net/xdp/xsk.c 6.1,
            // `__xsk_generic_xmit`); after any other error it is tried again the next turn.
            let error = (sent < 0).then(io::Error::last_os_error).and_then(|error| error.raw_os_error());
            if !matches!(error, None | Some(libc::EAGAIN | libc::EBUSY)) {
                return;
            }
        }
    }
}

impl AsFd for XdpPort {
    /// The socket, for a program's map.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl PortDriver for XdpPort {
    /// # Panics
    /// If the pool is not the one whose memory the kernel was told.
    fn start(&mut self, pool: &mut Pool) {
        self.fill(pool);
    }

    /// # Panics
    /// As `start`.
    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        if self.in_flight != 0 {
            self.reap(pool);
            self.kick();
        }
        while frames.len() < BATCH {
            let Some(frame) = self.received.take() else { break };
            frames.extend(self.retake(pool, frame.addr, frame.len));
        }
        self.received.release();
        self.fill(pool);
    }

    /// # Panics
    /// As `start`.
    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        assert!(pool.area() == self.area, "the kernel knows another pool's memory");
        let room = self.sending.room(frames.len() as u32) as usize;
        for frame in frames.drain(..room.min(BATCH).min(frames.len())) {
            let len = frame.bytes().len() as u32;
            let (place, addr) = pool.lend(frame);
            self.lent.insert(place);
            self.sending.put(libc::xdp_desc { addr, len, options: 0 });
            self.in_flight += 1;
        }
        self.sending.publish();
        self.kick();
    }

    /// By the program, before frames come here.
    fn filtered(&self) -> bool {
        true
    }

    /// While frames wait to be sent, or the kernel is short of buffers, there is something to do now and then.
    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        fds.push(self.socket.as_fd());
        self.sending.unread() == 0 && self.filling.unread() >= BATCH as u32
    }

    fn close(mut self: Box<Self>, pool: &mut Pool) {
        self.kick();
        let Self { socket, mut lent, area, .. } = *self;
        // The kernel uses the memory no more when this is closed.
        drop(socket);
        while let Some(place) = lent.take_first() {
            // SAFETY: it was lent, and nobody uses it any more.
            let buffer = unsafe { pool.lent((place * area.stride) as u64, 0) };
            pool.give(buffer);
        }
    }
}

/// Several queues of one interface, as one port. The first one's socket sends.
pub struct XdpQueues {
    queues: Vec<XdpPort>,
    /// Which one is asked first the next time
    next: usize,
}

impl XdpQueues {
    /// The sockets of these queues.
    pub fn new(queues: Vec<XdpPort>) -> Self {
        Self { queues, next: 0 }
    }
}

impl PortDriver for XdpQueues {
    fn start(&mut self, pool: &mut Pool) {
        self.queues.iter_mut().for_each(|queue| queue.start(pool));
    }

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let (before, first) = self.queues.split_at_mut(self.next);
        first.iter_mut().chain(before).for_each(|queue| queue.receive(pool, frames));
        self.next = (self.next + 1) % self.queues.len().max(1);
    }

    fn filtered(&self) -> bool {
        self.queues.iter().all(PortDriver::filtered)
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        if let Some(queue) = self.queues.first_mut() {
            queue.transmit(pool, frames);
        }
    }

    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        let only_asking_tells = self.queues.iter().filter(|queue| !queue.readable(fds)).count();
        only_asking_tells == 0
    }

    fn close(self: Box<Self>, pool: &mut Pool) {
        self.queues.into_iter().for_each(|queue| Box::new(queue).close(pool));
    }
}

/// Fails if the kernel has no AF_XDP, or does not let us use it.
pub fn check() -> Result<(), Unavailable> {
    socket().map(drop).map_err(Unavailable)
}

/// There are no AF_XDP sockets.
#[derive(thiserror::Error, Debug)]
#[error(
    "cannot open an AF_XDP socket: {0} ({remedy})",
    remedy = match .0.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => "this kernel is built without CONFIG_XDP_SOCKETS; --engine xdp does without",
        _ => "it takes CAP_NET_RAW",
    }
)]
pub struct Unavailable(io::Error);

/// Frames that a socket's queue has lost since it was opened: for want of buffers, of room in its ring, or because they
/// were too long.
pub fn lost(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: integers, for which zeros are valid.
    let mut statistics: libc::xdp_statistics = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: `statistics` is as long as said.
    let done = unsafe {
        let value = (&raw mut statistics).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, libc::XDP_STATISTICS, value, &mut length)
    };
    if done == 0 { Ok(statistics.rx_dropped + statistics.rx_ring_full) } else { Err(io::Error::last_os_error()) }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: just opened, and nobody else's.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// Whether the kernel wants to be called about a ring (XDP_RING_NEED_WAKEUP).
#[inline]
fn wants_call(flags: NonNull<AtomicU32>) -> bool {
    // SAFETY: the flags of a ring that is mapped.
    unsafe { flags.as_ref() }.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
}

fn register(socket: &OwnedFd, area: Area) -> io::Result<()> {
    let memory = libc::xdp_umem_reg {
        addr: area.start as u64,
        len: area.bytes as u64,
        chunk_size: area.stride as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set(socket, libc::XDP_UMEM_REG, &memory)
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    set_option(socket, libc::SOL_XDP, option, value)
}

fn map_ring<T>(socket: &OwnedFd, page: u64, offsets: &libc::xdp_ring_offset) -> io::Result<(Place<T>, Mapping)> {
    let bytes = offsets.desc as usize + RING as usize * size_of::<T>();
    let mapping = Mapping::of(socket, page, bytes)?;
    // SAFETY: inside the mapping, where the kernel says.
    let at = |offset: u64| unsafe { mapping.start().add(offset as usize) };
    let place = Place {
        producer: at(offsets.producer).cast(),
        consumer: at(offsets.consumer).cast(),
        elements: at(offsets.desc).cast(),
        count: RING,
    };
    Ok((place, mapping))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_comes_back_once() {
        let mut lent = Lent::new(130);
        for place in [0, 63, 64, 129] {
            lent.insert(place);
        }
        assert!(lent.remove(63) && !lent.remove(63) && !lent.remove(5) && !lent.remove(100_000));
        assert_eq!(std::iter::from_fn(|| lent.take_first()).collect::<Vec<_>>(), [0, 64, 129]);
    }
}
