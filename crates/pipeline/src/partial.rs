//! Recognises packets whose transport checksum a local sender left to the device (CHECKSUM_PARTIAL), for engines that do
//! not see what travels beside a frame (`Beside`). Over veth and TAP they arrive so, and what says how to complete them is
//! not in the frame: only Linux can pass them on.
//!
//! The sender has put the folded sum of the pseudo header, not complemented, where the checksum belongs (6.1,
//! net/ipv4/{tcp_ipv4,udp}.c: `~tcp_v4_check`, `~csum_tcpudp_magic`); with segmentation offload too, over the whole
//! length. SCTP leaves zero (net/sctp/output.c). A right checksum looks like this once in 65536 packets, which then
//! only takes the slow way. Linux completes checksums before it fragments or encrypts, so fragments and ESP are
//! complete.

use crate::Frame;
use crate::network::{Network, Part};
use towpath_tables::Reason;
use towpath_wire::ethernet;
use towpath_wire::gre::Gre;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::transport::{Sctp, Tcp, Udp, protocol};

/// UDP ports of encapsulations that can carry a partial checksum inside while their own is complete or absent:
/// L2TP, GTP-U, VXLAN (IANA's and Linux's old one), VXLAN-GPE, Geneve.
const ENCAPSULATIONS: [u16; 6] = [1701, 2152, 4789, 8472, 4790, 6081];

/// Fails with `PartialChecksum` unless the packet's transport checksum is certainly complete.
#[cfg_attr(target_arch = "bpf", inline(always))]
#[cfg_attr(not(target_arch = "bpf"), inline(never))]
pub fn check<N: Network, F: Frame>(frame: &F, header: &N, offset: usize, packet_len: usize) -> Result<(), Reason> {
    if is_complete(frame, header, offset, packet_len)? {
        return Ok(());
    }
    match header.gre(frame, offset) {
        Some(gre) if tunnelled(frame, gre, offset + packet_len)? => Ok(()),
        _ => Err(Reason::PartialChecksum),
    }
}

/// Whether the checksum of what is in a GRE packet is certainly complete, and GRE's own. The latter covers all of the
/// packet, as it will be when what is inside is complete (gre_build_header, include/net/gre.h, Linux 6.1); so if it is right,
/// nothing is left to do.
#[inline(always)]
fn tunnelled<F: Frame>(frame: &F, place: usize, end: usize) -> Result<bool, Reason> {
    let gre = frame.get::<Gre>(place).ok_or(Reason::Truncated)?;
    let flags = gre.flags.get();
    let Some(len) = Gre::len(flags) else { return Ok(false) };
    if flags & Gre::CHECKSUM != 0 {
        return Ok(frame.sum(place, end.wrapping_sub(place)).is_some_and(|sum| sum.folds_to(0xffff)));
    }
    let place = place + len;
    if place > end {
        return Ok(false);
    }
    match gre.protocol.get() {
        ethernet::IPV4 => is_inner_complete::<Ipv4, F>(frame, place, end),
        ethernet::IPV6 => is_inner_complete::<Ipv6, F>(frame, place, end),
        _ => Ok(false),
    }
}

#[inline(always)]
fn is_inner_complete<N: Network, F: Frame>(frame: &F, place: usize, end: usize) -> Result<bool, Reason> {
    let header = frame.get::<N>(place).ok_or(Reason::Truncated)?;
    match header.packet_len(end.wrapping_sub(place)) {
        Ok(packet_len) => is_complete(frame, header, place, packet_len),
        Err(_) => Ok(false),
    }
}

#[inline(always)]
fn is_complete<N: Network, F: Frame>(frame: &F, header: &N, offset: usize, packet_len: usize) -> Result<bool, Reason> {
    if header.part() == Part::Later {
        return Ok(true);
    }
    let place = offset + size_of::<N>();
    let len = packet_len - size_of::<N>();
    Ok(match header.protocol() {
        protocol::TCP if len >= size_of::<Tcp>() => {
            let tcp = frame.get::<Tcp>(place).ok_or(Reason::Truncated)?;
            !is_seed(header, len, tcp.checksum.get())
        }
        protocol::UDP if len >= size_of::<Udp>() => {
            let udp = frame.get::<Udp>(place).ok_or(Reason::Truncated)?;
            let checksum = udp.checksum.get();
            checksum != 0 && !is_seed(header, len, checksum) && !ENCAPSULATIONS.contains(&udp.ports.destination.get())
        }
        protocol::SCTP if len >= size_of::<Sctp>() => {
            frame.get::<Sctp>(place).ok_or(Reason::Truncated)?.checksum.get() != 0
        }
        // Too short to have a checksum
        protocol::TCP | protocol::UDP | protocol::SCTP => true,
        protocol::ICMP | protocol::ICMPV6 | protocol::ESP | protocol::OSPF | protocol::NO_NEXT => true,
        // Tunnels and extension headers: what is inside may be partial
        _ => false,
    })
}

/// Whether this is what a sender leaves in the checksum field.
#[inline(always)]
fn is_seed<N: Network>(header: &N, len: usize, checksum: u16) -> bool {
    header.address_sum().number(header.protocol().into()).number(len as u16).folds_to(checksum)
}
