//! A wire that is a device of DPDK's: one queue each way, by a small library of ours (dpdk/shim.c) that is loaded when the
//! first such port is opened. DPDK's own libraries are the distribution's, and needed only then.
//!
//! Frames are copied between DPDK's buffers and the worker's. DPDK runs without files of its own and opens no device
//! that it is not told; it takes hugepages if some are free, and does without otherwise.

use crate::device::Device;
use crate::driver::{BATCH, PortDriver};
use crate::engine::usable_cores;
use crate::pool::{Buffer, Pool};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use towpath_tables::record::SOCKET_FRAME;

static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dpdk.so"));

/// MiB of memory where there are no hugepages
const MEMORY: &str = "256";

/// A device cannot be had.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// DPDK is not there, or does not start
    #[error("cannot use DPDK: {0}")]
    Unavailable(String),
    /// It is there, but the device is not
    #[error("cannot {what} (DPDK's {device}): {cause}{remedy}")]
    Device {
        /// As it was asked for
        device: String,
        /// What failed
        what: String,
        /// In the kernel's words
        cause: io::Error,
        /// What may help
        remedy: &'static str,
    },
}

/// What the library offers; see dpdk/shim.c.
struct Library {
    start: Start,
    thread: Thread,
    open: Open,
    close: Close,
    receive: Receive,
    take: Take,
    transmit: Transmit,
    lost: Lost,
    carrier: Carrier,
    set_mtu: SetNumber,
    set_promiscuous: SetNumber,
    set_mac: SetMac,
}

type Start = unsafe extern "C" fn(c_int, *mut *mut c_char) -> c_int;
type Thread = unsafe extern "C" fn();
type Open = unsafe extern "C" fn(*const c_char, *mut u16, *mut *mut c_void, *mut *const c_char) -> c_int;
type Close = unsafe extern "C" fn(u16, *mut c_void);
type Receive = unsafe extern "C" fn(u16, *mut *mut c_void, u16) -> u16;
type Take = unsafe extern "C" fn(*mut c_void, *mut u8, u32) -> c_int;
type Transmit = unsafe extern "C" fn(u16, *mut c_void, *const *const u8, *const u16, u16) -> u16;
type Lost = unsafe extern "C" fn(u16) -> u64;
type Carrier = unsafe extern "C" fn(u16) -> c_int;
type SetNumber = unsafe extern "C" fn(u16, u16) -> c_int;
type SetMac = unsafe extern "C" fn(u16, *const u8) -> c_int;

/// What was found when DPDK was first asked for; it can be started once only.
fn library() -> Result<&'static Library, Error> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let loaded = LIBRARY.get_or_init(|| {
        let library = load()?;
        // It pins the thread that starts it to a core.
        let started = std::thread::scope(|scope| scope.spawn(|| start(&library)).join());
        started.unwrap_or_else(|_| Err("it panicked".into())).map(|()| library)
    });
    loaded.as_ref().map_err(|why| Error::Unavailable(why.clone()))
}

fn load() -> Result<Library, String> {
    let last = |what: &str| format!("{what}: {}", io::Error::last_os_error());
    // SAFETY: a string that ends with a zero.
    let file = unsafe { libc::memfd_create(c"towpath-dpdk".as_ptr(), libc::MFD_CLOEXEC) };
    if file < 0 {
        return Err(last("no memory for a library"));
    }
    // SAFETY: just made, and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    io::Write::write_all(&mut std::fs::File::from(file.try_clone().map_err(|error| error.to_string())?), OBJECT)
        .map_err(|error| error.to_string())?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|error| error.to_string())?;
    // SAFETY: the path ends with a zero. What DPDK's libraries do when they are loaded is to register themselves.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        return Err(format!("{} (is it installed? apt install dpdk)", loader_error()));
    }
    let symbol = |name: &CStr| {
        // SAFETY: a handle of a library that stays loaded, and a name that ends with a zero.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        if symbol.is_null() { Err(loader_error()) } else { Ok(symbol) }
    };
    macro_rules! function {
        ($name:literal, $kind:ty) => {
            // SAFETY: the function of this name in dpdk/shim.c, which was built with this crate, has this type.
            unsafe { std::mem::transmute::<*mut c_void, $kind>(symbol($name)?) }
        };
    }
    Ok(Library {
        start: function!(c"towpath_start", Start),
        thread: function!(c"towpath_thread", Thread),
        open: function!(c"towpath_open", Open),
        close: function!(c"towpath_close", Close),
        receive: function!(c"towpath_receive", Receive),
        take: function!(c"towpath_take", Take),
        transmit: function!(c"towpath_transmit", Transmit),
        lost: function!(c"towpath_lost", Lost),
        carrier: function!(c"towpath_carrier", Carrier),
        set_mtu: function!(c"towpath_set_mtu", SetNumber),
        set_promiscuous: function!(c"towpath_set_promiscuous", SetNumber),
        set_mac: function!(c"towpath_set_mac", SetMac),
    })
}

fn loader_error() -> String {
    // SAFETY: the text, if there is one, stays until this thread asks the loader for something else.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

fn start(library: &Library) -> Result<(), String> {
    let core = usable_cores().ok().and_then(|cores| cores.first().copied()).map_or(0, |core| core.0).to_string();
    // Only devices that are asked for: there is none at this address.
    let mut words = vec!["towpath", "--no-telemetry", "-a", "ffff:ff:1f.7", "-l", &core, "--log-level", "error"];
    if hugepages_are_free() {
        words.push("--in-memory");
    } else {
        words.extend(["--no-huge", "--no-shconf", "-m", MEMORY]);
    }
    let words: Vec<CString> = words.into_iter().filter_map(|word| CString::new(word).ok()).collect();
    let mut pointers: Vec<*mut c_char> = words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    pointers.push(null_mut());
    // SAFETY: so many strings that end with zeros, and a null pointer; DPDK changes their order only.
    match unsafe { (library.start)(words.len() as c_int, pointers.as_mut_ptr()) } {
        0 => Ok(()),
        code => Err(format!("it does not start: {} (its own words are above)", io::Error::from_raw_os_error(-code))),
    }
}

fn hugepages_are_free() -> bool {
    let sizes = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let free = |size: std::fs::DirEntry| std::fs::read_to_string(size.path().join("free_hugepages")).ok();
    let kilobytes = |size: &Path| size.to_string_lossy().rsplit('-').next()?.strip_suffix("kB")?.parse::<u64>().ok();
    let mut free = sizes.filter_map(|size| {
        let each = kilobytes(&size.path())?;
        free(size)?.trim().parse::<u64>().ok().map(|pages| (pages * each) >> 10)
    });
    let wanted = MEMORY.parse().unwrap_or(u64::MAX);
    free.any(|megabytes| megabytes >= wanted)
}

/// Whoever has this is the only one who does more with devices than to move frames.
fn alone() -> MutexGuard<'static, ()> {
    static CONTROL: Mutex<()> = Mutex::new(());
    CONTROL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The wire.
pub struct DpdkPort {
    library: &'static Library,
    port: u16,
    buffers: *mut c_void,
}

// SAFETY: a device's queues may be used by any thread, one at a time, and so may its buffers.
unsafe impl Send for DpdkPort {}

/// The device, for whoever has no frames of it.
pub struct Control {
    library: &'static Library,
    port: u16,
}

impl Device for Control {
    fn lost(&self) -> u64 {
        // SAFETY: a number that DPDK checks.
        unsafe { (self.library.lost)(self.port) }
    }

    fn carrier(&self) -> Option<bool> {
        let _alone = alone();
        // SAFETY: as above.
        match unsafe { (self.library.carrier)(self.port) } {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let mtu = u16::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let _alone = alone();
        // SAFETY: as above.
        done(unsafe { (self.library.set_mtu)(self.port, mtu) })
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let _alone = alone();
        // SAFETY: as above, and six bytes that are copied.
        done(unsafe { (self.library.set_mac)(self.port, mac.as_ptr()) })
    }

    fn set_promiscuous(&self, on: bool) -> io::Result<()> {
        let _alone = alone();
        // SAFETY: as above.
        done(unsafe { (self.library.set_promiscuous)(self.port, on.into()) })
    }
}

fn done(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

impl DpdkPort {
    /// Opens a device, named as for DPDK's options `-a` and `--vdev`: `0000:03:00.0`, `net_tap0,iface=tap1`.
    pub fn open(device: &str) -> Result<Self, Error> {
        let fail =
            |what: &str, cause, remedy| Error::Device { device: device.into(), what: what.into(), cause, remedy };
        let library = library()?;
        let name = CString::new(device).map_err(|_| fail("find the device", io::ErrorKind::InvalidInput.into(), ""))?;
        let (mut port, mut buffers, mut what) = (0, null_mut(), null());
        let _alone = alone();
        // SAFETY: a string that ends with a zero, and places for the answers.
        match unsafe { (library.open)(name.as_ptr(), &mut port, &mut buffers, &mut what) } {
            0 => Ok(Self { library, port, buffers }),
            code => {
                // SAFETY: the library's texts are constants.
                let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
                let remedy = " (it is named as for DPDK's -a or --vdev: 0000:03:00.0, net_tap0,iface=tap1)";
                Err(fail(&what, io::Error::from_raw_os_error(-code), remedy))
            }
        }
    }

    /// The device, as long as this is open.
    pub fn device(&self) -> Control {
        Control { library: self.library, port: self.port }
    }
}

impl Drop for DpdkPort {
    fn drop(&mut self) {
        let _alone = alone();
        // SAFETY: opened by `open`, and nothing of it is in use any more.
        unsafe { (self.library.close)(self.port, self.buffers) };
    }
}

impl PortDriver for DpdkPort {
    fn start(&mut self, _pool: &mut Pool) {
        // SAFETY: of the worker's thread.
        unsafe { (self.library.thread)() };
    }

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let mut arrived = [null_mut(); BATCH];
        // SAFETY: room for so many, of a port that is open.
        let count = unsafe { (self.library.receive)(self.port, arrived.as_mut_ptr(), BATCH as u16) };
        for frame in arrived.into_iter().take(count.into()) {
            let mut buffer = pool.take();
            let place = buffer.as_mut().map_or(&mut [][..], |buffer| buffer.resize(SOCKET_FRAME));
            // SAFETY: each frame is given back once; the place is as large as said.
            let len = unsafe { (self.library.take)(frame, place.as_mut_ptr(), place.len() as u32) };
            match (buffer, usize::try_from(len)) {
                (Some(mut buffer), Ok(len)) => {
                    buffer.resize(len);
                    frames.push(buffer);
                }
                (Some(buffer), Err(_)) => pool.give(buffer),
                (None, _) => {}
            }
        }
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        let (mut places, mut lengths) = ([null(); BATCH], [0; BATCH]);
        for (frame, (place, length)) in frames.iter().zip(places.iter_mut().zip(&mut lengths)) {
            (*place, *length) = (frame.bytes().as_ptr(), frame.bytes().len() as u16);
        }
        let count = frames.len().min(BATCH) as u16;
        // SAFETY: so many frames with their lengths, which are read before this returns.
        let sent =
            unsafe { (self.library.transmit)(self.port, self.buffers, places.as_ptr(), lengths.as_ptr(), count) };
        frames.drain(..usize::from(sent).min(frames.len())).for_each(|frame| pool.give(frame));
    }

    /// A device is asked again and again.
    fn readable<'d>(&'d self, _fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        false
    }

    fn close(self: Box<Self>, _pool: &mut Pool) {}
}
