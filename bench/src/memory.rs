//! A router without a kernel, for workers of the user engine: tables on the heap, ports in memory.

use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_tables::backing::Backing;
use towpath_tables::grace::Grace;
use towpath_tables::lpm::Leaf;
use towpath_tables::nexthop::{Action, Header, NexthopIdentity, NexthopValue};
use towpath_tables::record::{Family, port_flags};
use towpath_tables::writer::{MAIN_ROOT, PortValue, TableWriter};

/// An Ethernet frame of 64 bytes, without FCS
pub const FRAME: usize = 60;
/// Bytes from buffer to buffer: an odd number of cache lines, so that frames do not all begin at one place of the cache.
pub const STRIDE: usize = 2048 + 64;
/// Neighbours behind the second port. The last byte of a neighbour's MAC address is its number.
pub const NEXTHOPS: u32 = 64;
/// Interface indices and slots of the ports
pub const INSIDE: u32 = 1;
/// The second port
pub const OUTSIDE: u32 = 2;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The table of an address's family.
pub fn root(address: IpAddr) -> u32 {
    MAIN_ROOT[Family::of(address) as usize]
}

/// Makes a router with two ports and no routes; the leaves of its neighbours.
pub fn router<B: Backing, G: Grace>(writer: &mut TableWriter<B, G>) -> Result<Vec<Leaf>> {
    let mut slots = Vec::new();
    for ifindex in [INSIDE, OUTSIDE] {
        let slot = writer.alloc_port(ifindex)?;
        let flags = port_flags::READY | port_flags::FORWARD_V4 | port_flags::FORWARD_V6;
        writer.set_port(slot, &PortValue { flags, mac: MAC, mtu: 1500, ..PortValue::plain(slot) });
        slots.push(slot);
    }
    let port = slots[1];
    let mut hops = Vec::new();
    for n in 0..NEXTHOPS {
        let gateway = IpAddr::from(Ipv4Addr::from(0xc612_0001 + n));
        let index =
            writer.alloc_nexthop(NexthopIdentity { ifindex: OUTSIDE, gateway: Some(gateway), mtu: 0, reason: None })?;
        let header = Header::new([2, 0, 0, 0, 1, n as u8], MAC, &[]).context("a header")?;
        writer.set_nexthop(index, &NexthopValue { action: Action::Forward(header), port, device: port, mtu: 1500 });
        hops.push(Leaf::nexthop(index).context("a leaf")?);
    }
    Ok(hops)
}

/// A UDP packet for the router.
pub fn frame(destination: IpAddr) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..6].copy_from_slice(&MAC);
    match destination {
        IpAddr::V4(destination) => {
            frame[12..26].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
            frame[26..30].copy_from_slice(&Ipv4Addr::new(198, 18, 1, 1).octets());
            frame[30..34].copy_from_slice(&destination.octets());
            let sum = frame[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
            let sum = (sum & 0xffff) + (sum >> 16);
            frame[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
        }
        IpAddr::V6(destination) => {
            frame[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 6, 59, 64]);
            frame[22..38].copy_from_slice(&Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
            frame[38..54].copy_from_slice(&destination.octets());
        }
    }
    frame
}
