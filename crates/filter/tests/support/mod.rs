//! Filters run by Linux itself, both kinds: as a socket's filter, and translated as an XDP program.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use towpath_filter::instruction;

/// `struct sock_filter`
#[repr(C)]
struct SockFilter {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// A socket with a filter of classic BPF, which Linux runs on what is sent to it.
pub struct Classic {
    sender: UnixDatagram,
    receiver: UnixDatagram,
}

impl Classic {
    /// Fails if Linux does not take the program.
    pub fn new(code: &[u64]) -> io::Result<Self> {
        let (sender, receiver) = UnixDatagram::pair()?;
        receiver.set_nonblocking(true)?;
        let raw = |raw: &u64| SockFilter {
            code: (raw >> 48) as u16,
            jt: (raw >> 40) as u8,
            jf: (raw >> 32) as u8,
            k: *raw as u32,
        };
        let mut code: Vec<SockFilter> = code.iter().map(raw).collect();
        let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr().cast() };
        // SAFETY: the option's value is the program, which outlives the call.
        let done = unsafe {
            let (value, length) = ((&raw const program).cast(), size_of_val(&program) as u32);
            libc::setsockopt(receiver.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, length)
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { sender, receiver }) }
    }

    /// Whether the filter lets a packet through.
    pub fn matches(&self, packet: &[u8]) -> bool {
        self.sender.send(packet).expect("sent");
        self.receiver.recv(&mut [0; 1]).is_ok()
    }
}

/// A translated filter, loaded as an XDP program.
pub struct Xdp(OwnedFd);

const PROG_LOAD: i32 = 5;
const PROG_TEST_RUN: i32 = 10;
const TYPE_XDP: u32 = 6;
const XDP_HAS_FRAGS: u32 = 1 << 5;

impl Xdp {
    pub fn load(code: &[u64]) -> io::Result<Self> {
        let license = c"Dual MIT/GPL";
        let mut log = vec![0u8; 1 << 16];
        let mut attribute = [0u64; 16];
        attribute[0] = u64::from(TYPE_XDP) | (code.len() as u64) << 32;
        attribute[1] = code.as_ptr() as u64;
        attribute[2] = license.as_ptr() as u64;
        attribute[5] = u64::from(XDP_HAS_FRAGS) << 32;
        match bpf(PROG_LOAD, &mut attribute) {
            // SAFETY: the kernel gives a new descriptor.
            Ok(fd) => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            Err(error) => {
                attribute[3] = 1 | (log.len() as u64) << 32;
                attribute[4] = log.as_mut_ptr() as u64;
                let again = bpf(PROG_LOAD, &mut attribute);
                assert!(again.is_err(), "refused once only: {error}");
                let log = String::from_utf8_lossy(&log);
                let lines: Vec<&str> = log.split('\0').next().unwrap_or_default().lines().collect();
                Err(io::Error::other(format!("{error}: {}", lines[lines.len().saturating_sub(9)..].join("\n"))))
            }
        }
    }

    /// What it answers for a frame.
    pub fn answer(&self, frame: &[u8]) -> u32 {
        let mut attribute = [0u64; 16];
        attribute[0] = self.0.as_raw_fd() as u64;
        attribute[1] = frame.len() as u64;
        attribute[2] = frame.as_ptr() as u64;
        attribute[4] = 1;
        bpf(PROG_TEST_RUN, &mut attribute).expect("a test run");
        (attribute[0] >> 32) as u32
    }
}

fn bpf(command: i32, attribute: &mut [u64]) -> io::Result<i32> {
    // SAFETY: the attribute and what it points to outlive the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_mut_ptr(), size_of_val(attribute)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}

/// What `tcpdump -dd` says of an expression, for an Ethernet port.
pub fn compiled(expression: &str) -> Vec<u64> {
    let output = std::process::Command::new("tcpdump").args(["-y", "EN10MB", "-dd", expression]).output();
    let output = output.expect("tcpdump is installed");
    let text = String::from_utf8(output.stdout).expect("text");
    let code: Vec<u64> = text.lines().map(parsed).collect();
    assert!(!code.is_empty(), "{expression}: {}", String::from_utf8_lossy(&output.stderr));
    code
}

/// `{ 0x28, 0, 0, 0x0000000c },`
fn parsed(line: &str) -> u64 {
    let number = |word: &str| match word.trim().strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).expect("a number"),
        None => word.trim().parse().expect("a number"),
    };
    let fields = line.trim_matches(|c: char| "{}, ".contains(c)).split(',').map(number);
    let [code, jt, jf, k] = fields.collect::<Vec<_>>().try_into().expect("four numbers");
    instruction(code as u16, jt as u8, jf as u8, k)
}

pub const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

/// A UDP packet in an Ethernet frame with so many bytes behind its header.
pub fn udp4(source: u16, destination: u16, payload: usize) -> Vec<u8> {
    let mut frame = [&MACS[..], &[0x08, 0x00]].concat();
    frame.extend([0x45, 0]);
    frame.extend((28 + payload as u16).to_be_bytes());
    frame.extend([0x12, 0x34, 0, 0, 64, 17, 0xab, 0xcd, 192, 0, 2, 2, 198, 51, 100, 2]);
    frame.extend(transport(source, destination, payload));
    frame
}

/// As `udp4`, IPv6.
pub fn udp6(source: u16, destination: u16, payload: usize) -> Vec<u8> {
    let mut frame = [&MACS[..], &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend((8 + payload as u16).to_be_bytes());
    frame.extend([17, 64]);
    frame.extend([0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    frame.extend([0x20, 1, 0xd, 0xb8, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    frame.extend(transport(source, destination, payload));
    frame
}

fn transport(source: u16, destination: u16, payload: usize) -> Vec<u8> {
    let ports = [source.to_be_bytes(), destination.to_be_bytes(), (8 + payload as u16).to_be_bytes(), [0, 0]];
    ports.into_iter().flatten().chain((0..payload).map(|at| (at * 7) as u8)).collect()
}

/// What forwarding makes of an IP frame: other addresses of the link, a hop less, no padding.
pub fn forwarded(frame: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[..12].copy_from_slice(&[2, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 4]);
    if frame[12] == 0x08 {
        out[22] -= 1;
        out[24] = out[24].wrapping_add(1);
        out.truncate(14 + usize::from(u16::from_be_bytes([frame[16], frame[17]])));
    } else {
        out[21] -= 1;
        out.truncate(54 + usize::from(u16::from_be_bytes([frame[18], frame[19]])));
    }
    out
}
