//! Device settings by the ethtool ioctl (include/uapi/linux/ethtool.h), in this thread's network namespace.

use std::ffi::c_char;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const GDRVINFO: u32 = 0x03;
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const GFLAGS: u32 = 0x25;
const SFLAGS: u32 = 0x26;
const GGRO: u32 = 0x2b;
const SGRO: u32 = 0x2c;
const GSSET_INFO: u32 = 0x37;
const GFEATURES: u32 = 0x3a;
const GCHANNELS: u32 = 0x3c;
/// `ETH_SS_STATS`
const SET_STATS: u32 = 1;
/// `ETH_SS_FEATURES`
const SET_FEATURES: u32 = 4;
/// `ETH_FLAG_RXVLAN`
const FLAG_RX_VLAN: u32 = 1 << 8;
/// `ETH_GSTRING_LEN`
const STRING_LEN: usize = 32;

/// Numbers of queues: of those that do one thing, and of those that do both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queues {
    /// That only receive
    pub receiving: u32,
    /// That only transmit
    pub transmitting: u32,
    /// That do both
    pub combined: u32,
}

/// The queues of an interface (`ethtool -l`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Channels {
    /// In use
    pub now: Queues,
    /// That there may be
    pub most: Queues,
}

/// An interface and a socket to speak about it.
pub struct Ethtool {
    socket: OwnedFd,
    name: [c_char; libc::IFNAMSIZ],
}

impl Ethtool {
    /// For the interface called `name`.
    pub fn open(name: &str) -> io::Result<Self> {
        // SAFETY: no pointers; a non-negative result is a new descriptor that nobody else owns.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let mut bytes = [0 as c_char; libc::IFNAMSIZ];
        for (to, from) in bytes.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = from as c_char;
        }
        Ok(Self { socket, name: bytes })
    }

    /// Passes `data`, whose first word is the command, to the driver.
    fn call(&self, data: &mut [u32]) -> io::Result<()> {
        // SAFETY: ifreq is plain data, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name = self.name;
        request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        // SAFETY: the request and the data outlive the call; the callers give as many words as the command's
        // structure has, including what the kernel appends.
        let ret = unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn value(&self, command: u32) -> io::Result<u32> {
        let mut data = [command, 0];
        self.call(&mut data)?;
        Ok(data[1])
    }

    /// Name of the driver.
    pub fn driver(&self) -> io::Result<String> {
        let mut data = [0u32; 49]; // struct ethtool_drvinfo, 196 bytes
        data[0] = GDRVINFO;
        self.call(&mut data)?;
        Ok(text(&bytes_of(&data[1..9])))
    }

    /// Generic receive offload.
    pub fn gro(&self) -> io::Result<bool> {
        Ok(self.value(GGRO)? != 0)
    }

    /// Switches generic receive offload.
    pub fn set_gro(&self, on: bool) -> io::Result<()> {
        self.call(&mut [SGRO, on.into()])
    }

    /// Whether received VLAN tags are cut off the frame into its descriptor.
    pub fn rx_vlan(&self) -> io::Result<bool> {
        Ok(self.value(GFLAGS)? & FLAG_RX_VLAN != 0)
    }

    /// Switches the receive VLAN offload.
    pub fn set_rx_vlan(&self, on: bool) -> io::Result<()> {
        let flags = self.value(GFLAGS)?;
        let flags = if on { flags | FLAG_RX_VLAN } else { flags & !FLAG_RX_VLAN };
        self.call(&mut [SFLAGS, flags])
    }

    /// Numbers of queues that receive and that transmit.
    pub fn queues(&self) -> io::Result<(u32, u32)> {
        let Channels { now, .. } = self.channels()?;
        Ok((now.receiving + now.combined, now.transmitting + now.combined))
    }

    /// Its channels, and how many there may be.
    pub fn channels(&self) -> io::Result<Channels> {
        // struct ethtool_channels: the command, then receiving, transmitting, other and combined ones: limits first
        let mut data = [0u32; 9];
        data[0] = GCHANNELS;
        self.call(&mut data)?;
        let [_, limits @ .., receiving, transmitting, _, combined] = data;
        let [most_receiving, most_transmitting, _, most_combined] = limits;
        let most = Queues { receiving: most_receiving, transmitting: most_transmitting, combined: most_combined };
        Ok(Channels { now: Queues { receiving, transmitting, combined }, most })
    }

    /// Whether an offload is on, by the name that `ethtool -k` gives it (net/ethtool/common.c, `netdev_features_strings`);
    /// the kernel may know no such.
    pub fn feature(&self, name: &str) -> io::Result<bool> {
        let names = self.strings(SET_FEATURES)?;
        // struct ethtool_gfeatures: the command, how many blocks, and for 32 features each those that can be changed, are
        // wanted, are on, and never change
        let blocks = names.len().div_ceil(32);
        let mut data = vec![0u32; 2 + blocks * 4];
        data[..2].copy_from_slice(&[GFEATURES, blocks as u32]);
        self.call(&mut data)?;
        let place = names.iter().position(|feature| feature == name);
        let on = |place: usize| data.get(2 + place / 32 * 4 + 2).is_some_and(|word| word >> (place % 32) & 1 != 0);
        Ok(place.is_some_and(on))
    }

    /// The driver's own counters, by name.
    pub fn statistics(&self) -> io::Result<Vec<(String, u64)>> {
        let names = self.strings(SET_STATS)?;
        let mut values = vec![0u32; 2 + names.len() * 2];
        values[..2].copy_from_slice(&[GSTATS, names.len() as u32]);
        self.call(&mut values)?;
        let values = bytes_of(&values[2..]);
        let values = values.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes));
        Ok(names.into_iter().zip(values).collect())
    }

    /// The strings of a set.
    fn strings(&self, set: u32) -> io::Result<Vec<String>> {
        let mut info = [GSSET_INFO, 0, 1 << set, 0, 0]; // cmd, reserved, 64-bit mask, one length
        self.call(&mut info)?;
        let count = if info[2] & (1 << set) != 0 { info[4] as usize } else { 0 };
        let mut strings = vec![0u32; 3 + count * STRING_LEN / 4];
        strings[..3].copy_from_slice(&[GSTRINGS, set, count as u32]);
        self.call(&mut strings)?;
        Ok(bytes_of(&strings[3..]).chunks(STRING_LEN).map(text).collect())
    }
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
