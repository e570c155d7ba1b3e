//! TAPs, from the side of whoever holds them (Documentation/networking/tuntap.rst): what Linux sends by the interface is
//! read, what is written Linux receives by the interface.
//!
//! Linux is told that we can neither cut packets nor complete checksums (TUNSETOFFLOAD), so it does both before a frame
//! gets here, and a VLAN tag is in the frame. The other way frames may have a header that leaves either to Linux.

use crate::driver::{BATCH, PortDriver};
use crate::pool::{Buffer, Pool};
use crate::vnet::Vnet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use towpath_tables::record::SOCKET_FRAME;

/// A TAP could not be opened.
#[derive(thiserror::Error, Debug)]
#[error("cannot open TAP {name}: {cause}{remedy}")]
pub struct Error {
    name: String,
    cause: io::Error,
    remedy: String,
}

/// The side of a TAP that is not Linux's interface. The interface has a carrier while this exists.
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Opens an interface of this thread's network namespace that is a TAP. It stays what it is otherwise, also when this is
    /// closed, if it is one that lasts (`ip tuntap add`).
    pub fn open(name: &str) -> Result<Self, Error> {
        let fail = |cause: io::Error, remedy: &str| Error { name: name.into(), cause, remedy: remedy.into() };
        let absent = || {
            let remedy = format!(" (make it with: ip tuntap add dev {name} mode tap)");
            Error { name: name.into(), cause: io::Error::from_raw_os_error(libc::ENODEV), remedy }
        };
        let text = CString::new(name).ok().filter(|text| text.count_bytes() < libc::IFNAMSIZ).ok_or_else(absent)?;
        // The kernel would make an interface that is not there.
        // SAFETY: a string that ends with a zero.
        if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
            return Err(absent());
        }
        let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a string that ends with a zero.
        let fd = unsafe { libc::open(c"/dev/net/tun".as_ptr(), flags) };
        if fd < 0 {
            let remedy = " (this kernel has no TUN/TAP: CONFIG_TUN, or modprobe tun)";
            return Err(fail(io::Error::last_os_error(), remedy));
        }
        // SAFETY: just opened, and nobody else's.
        let tap = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } };
        // SAFETY: integers and bytes, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(text.to_bytes()) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        tap.control(libc::TUNSETIFF, (&raw const request) as libc::c_ulong).map_err(|cause| {
            let remedy = match cause.raw_os_error() {
                Some(libc::EBUSY) => " (another program has it open)",
                Some(libc::EINVAL) => " (it is no TAP, or one with several queues)",
                Some(libc::EPERM) => " (it takes CAP_NET_ADMIN)",
                _ => "",
            };
            fail(cause, remedy)
        })?;
        let header = size_of::<Vnet>() as libc::c_int;
        tap.control(libc::TUNSETVNETHDRSZ, (&raw const header) as libc::c_ulong).map_err(|cause| fail(cause, ""))?;
        // Whoever had it before may have asked for more.
        tap.control(libc::TUNSETOFFLOAD, 0).map_err(|cause| fail(cause, ""))?;
        Ok(tap)
    }

    fn control(&self, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
        // SAFETY: callers give a number, or the address of what the request reads, which lives across the call.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Says whether the interface has a carrier; it has one when it was opened. Since Linux 4.20.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        let on = libc::c_int::from(on);
        self.control(libc::TUNSETCARRIER, (&raw const on) as libc::c_ulong)
    }

    /// Gives the interface this MTU, whatever its name is by now.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        // SAFETY: integers and bytes, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        self.control(libc::TUNGETIFF, (&raw mut request) as libc::c_ulong)?;
        request.ifr_ifru.ifru_mtu = mtu.cast_signed();
        // SAFETY: the address of what it reads, which lives across the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw const request) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts the next frame that Linux has sent into the buffer; false if there is none.
    pub fn receive(&self, buffer: &mut Buffer) -> bool {
        loop {
            let mut header = Vnet::default();
            // One byte more than is taken shows what is longer.
            let frame = buffer.resize(SOCKET_FRAME + 1);
            let room = frame.len();
            let pieces = [
                libc::iovec { iov_base: (&raw mut header).cast(), iov_len: size_of::<Vnet>() },
                libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: room },
            ];
            // SAFETY: the pieces and what they name live across the call and are as long as said; any bytes make a header.
            let read = unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), 2) };
            let Some(len) = usize::try_from(read).ok().and_then(|read| read.checked_sub(size_of::<Vnet>())) else {
                return false;
            };
            // Neither can be: see `TUNSETOFFLOAD`, and whoever opens it looks at the MTU.
            if len < room && !header.is_several() && header.complete(buffer.resize(len)) {
                return true;
            }
        }
    }

    /// Has Linux receive a frame, given in pieces; false if it does not take it (the interface is down).
    pub fn send(&self, header: &Vnet, pieces: [&[u8]; 3]) -> bool {
        let piece = |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let first = libc::iovec { iov_base: (&raw const *header).cast_mut().cast(), iov_len: size_of::<Vnet>() };
        let [a, b, c] = pieces.map(piece);
        let pieces = [first, a, b, c];
        // SAFETY: the pieces and what they name live across the call and are as long as said; they are only read.
        unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), 4) >= 0 }
    }

    /// Has Linux receive a complete frame; false if it does not take it.
    pub fn send_frame(&self, frame: &Buffer) -> bool {
        self.send(&Vnet::default(), [frame.bytes(), &[], &[]])
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A port whose wire is a TAP: whoever is behind the interface (a namespace, a bridge) is the neighbour.
pub struct TapPort(pub Tap);

impl PortDriver for TapPort {
    fn start(&mut self, _pool: &mut Pool) {}

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        while frames.len() < BATCH
            && let Some(mut buffer) = pool.take()
        {
            if !self.0.receive(&mut buffer) {
                return pool.give(buffer);
            }
            frames.push(buffer);
        }
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let sent = frames.iter().take_while(|frame| self.0.send_frame(frame)).count();
        frames.drain(..sent).for_each(|frame| pool.give(frame));
    }

    fn readable<'d>(&'d self, fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        fds.push(self.0.as_fd());
        true
    }

    fn close(self: Box<Self>, _pool: &mut Pool) {}
}
