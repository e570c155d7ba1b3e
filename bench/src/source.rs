//! The traffic source: an XDP program run by BPF_PROG_TEST_RUN with live frames (kernel 5.18), which writes each frame
//! anew and redirects it into a veth. Its packets cost the receiving side what a driver's would: they are XDP frames
//! when they arrive, not socket buffers.

use anyhow::{Context, Result};
use aya::programs::ProgramFd;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Frames are this long, without FCS.
pub const FRAME: usize = 60;
/// Beside an address family: the source address is what varies (IPv4 only), as the program's `SOURCES`.
pub const SOURCES: u32 = 1 << 9;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 2;

/// First 64 bytes of every frame; the destination address is written over it.
pub fn template(destination_mac: [u8; 6], source: IpAddr) -> [u8; 64] {
    let mut frame = [0u8; 64];
    frame[..6].copy_from_slice(&destination_mac);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let udp = match source {
        IpAddr::V4(address) => {
            frame[12..14].copy_from_slice(&[0x08, 0x00]);
            frame[14..26].copy_from_slice(&[0x45, 0, 0, (FRAME - 14) as u8, 0, 0, 0x40, 0, 64, 17, 0, 0]);
            frame[26..30].copy_from_slice(&address.octets());
            34
        }
        IpAddr::V6(address) => {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, (FRAME - 54 + 4) as u8, 17, 64]);
            frame[22..38].copy_from_slice(&address.octets());
            54
        }
    };
    // UDP, discard port to discard port; the IPv6 frame is four bytes longer, so that the UDP header fits. A frame without
    // a UDP checksum would be an exception on veth (a tunnel's inner checksum may be partial behind it). That of IPv6 is
    // arbitrary: nothing on the way verifies it.
    frame[udp..udp + 6].copy_from_slice(&[0, 9, 0, 9, 0, (frame_length(source) - udp) as u8]);
    frame[udp + 6..udp + 8].copy_from_slice(&[0x5a, 0x5a]);
    frame
}

/// The template (IPv4) of frames whose sources vary, to a destination: checksums are the same either way.
pub fn to(destination_mac: [u8; 6], destination: Ipv4Addr) -> [u8; 64] {
    let mut frame = template(destination_mac, destination.into());
    frame.copy_within(26..30, 30);
    frame
}

/// Length of a frame with addresses of this family.
pub fn frame_length(address: IpAddr) -> usize {
    if address.is_ipv4() { FRAME } else { FRAME + 4 }
}

/// The words a `Variation` of the source program holds for a destination.
pub fn variation(template: &[u8; 64], destination: IpAddr) -> [u64; 2] {
    match destination {
        IpAddr::V4(address) => {
            let mut packet = [0u8; FRAME - 14];
            packet.copy_from_slice(&template[14..FRAME]);
            packet[16..20].copy_from_slice(&address.octets());
            packet[26..28].fill(0);
            let header = checksum(&packet[..20]);
            // RFC 768: addresses, protocol and length are summed as well; the length stands in the header already.
            let pseudo = [0, packet[9], packet[24], packet[25]];
            let udp = checksum(&[&packet[12..], &pseudo[..]].concat());
            let word = |sum: u16| u64::from(u16::from_ne_bytes(sum.to_be_bytes()));
            [u64::from(u32::from_ne_bytes(address.octets())) | word(header) << 32 | word(udp) << 48, 0]
        }
        IpAddr::V6(address) => {
            let octets = address.octets();
            let mut words = [0; 2];
            for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(8)) {
                *word = bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            }
            words
        }
    }
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The IPv4 frame to a destination behind a tag (802.1Q) for this VLAN.
pub fn tagged(template: &[u8; 64], destination: Ipv4Addr, vlan: u16) -> [u8; 64] {
    let [word, _] = variation(template, destination.into());
    let bytes = word.to_ne_bytes();
    let mut plain = *template;
    plain[30..34].copy_from_slice(&bytes[..4]);
    plain[24..26].copy_from_slice(&bytes[4..6]);
    plain[40..42].copy_from_slice(&bytes[6..8]);
    let mut frame = [0; 64];
    frame[..12].copy_from_slice(&plain[..12]);
    frame[12..14].copy_from_slice(&[0x81, 0x00]);
    frame[14..16].copy_from_slice(&vlan.to_be_bytes());
    frame[16..].copy_from_slice(&plain[12..FRAME]);
    frame
}

/// An IPv4 packet from and to `inner` in GRE from and to `outer`. It is one of ESP, of which six bytes find room: whatever
/// has a checksum would have to be longer.
pub fn tunnelled(destination_mac: [u8; 6], inner: [Ipv4Addr; 2], outer: [Ipv4Addr; 2]) -> [u8; 64] {
    let header = |protocol, length, [source, destination]: [Ipv4Addr; 2]| {
        let mut header = [0x45, 0, 0, length, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        header[12..16].copy_from_slice(&source.octets());
        header[16..].copy_from_slice(&destination.octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    };
    let mut frame = [0; 64];
    frame[..14].copy_from_slice(&template(destination_mac, inner[0].into())[..14]);
    frame[14..34].copy_from_slice(&header(47, 50, outer));
    frame[34..38].copy_from_slice(&[0, 0, 8, 0]);
    frame[38..58].copy_from_slice(&header(50, 26, inner));
    frame
}

/// Sends `packets` frames by running the source program that often; returns when all were handed to the device.
/// Must be called in the namespace of the interface `ifindex`.
pub fn send(program: &ProgramFd, ifindex: u32, length: usize, packets: u32) -> Result<()> {
    run(program, ifindex, length, packets, 64).context("BPF_PROG_TEST_RUN with live frames (kernel 5.18 or later)")
}

/// Runs the program over and over for `span`, which sends what is due.
/// Must be called in the namespace of the interface `ifindex`.
pub fn send_for(program: &ProgramFd, ifindex: u32, length: usize, span: Duration) -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the handler does nothing; without SA_RESTART the signal ends the call below.
    let thread = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        if libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error()).context("set a handler for SIGUSR1");
        }
        libc::pthread_self()
    };
    let done = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(span);
            // More than once: the first may come before the call.
            while !done.load(Relaxed) {
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        // More than fit into any span.
        let result = run(program, ifindex, length, u32::MAX >> 1, 16);
        done.store(true, Relaxed);
        result
    });
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::Interrupted => Err(error).context("send at a given rate"),
        _ => Ok(()),
    }
}

/// Runs the program `repeat` times, each time with a frame that it may redirect; `batch` of them are handed over at once.
fn run(program: &ProgramFd, ifindex: u32, length: usize, repeat: u32, batch: u32) -> std::io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct TestRun {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }
    const BPF_PROG_TEST_RUN: libc::c_long = 10;
    let data = [0u8; 64];
    let context = [0u32, length as u32, 0, ifindex, 0, 0];
    let attribute = TestRun {
        prog_fd: program.as_fd().as_raw_fd() as u32,
        data_size_in: length as u32,
        data_in: data.as_ptr() as u64,
        repeat,
        ctx_size_in: size_of_val(&context) as u32,
        ctx_in: context.as_ptr() as u64,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        batch_size: batch,
        ..TestRun::default()
    };
    // SAFETY: the attribute is laid out as the kernel's union for this command and outlives the call, as do the two
    // buffers it points to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &attribute, size_of::<TestRun>()) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right() {
        let template = template([2; 6], "198.51.100.2".parse().unwrap());
        let destination = std::net::Ipv4Addr::new(203, 0, 113, 9);
        let [word, _] = variation(&template, destination.into());
        let bytes = word.to_ne_bytes();
        let mut packet = template[14..FRAME].to_vec();
        packet[16..20].copy_from_slice(&bytes[..4]);
        packet[10..12].copy_from_slice(&bytes[4..6]);
        packet[26..28].copy_from_slice(&bytes[6..]);
        assert_eq!(packet[16..20], destination.octets());
        assert_eq!(checksum(&packet[..20]), 0, "IPv4 header");
        let pseudo = [0, 17, 0, (FRAME - 34) as u8];
        assert_eq!(checksum(&[&packet[12..], &pseudo].concat()), 0, "UDP");
    }
}
