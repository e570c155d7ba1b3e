//! RTM_NEWLINK, RTM_DELLINK (include/uapi/linux/if_link.h).

use super::{attrs, fixed, int16, int32, split};
use crate::error::CmError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use towpath_fpc::{GreOptions, PortKind, Tunnel};
use towpath_wire::gre::Gre;

const WHAT: &str = "link message";
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_GROUP: u16 = 27;
const IFLA_PROMISCUITY: u16 = 30;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VRF_TABLE: u16 = 1;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_FLAGS: u16 = 2;
const IFLA_VLAN_EGRESS_QOS: u16 = 3;
const IFLA_VLAN_PROTOCOL: u16 = 5;
/// VLAN_FLAG_REORDER_HDR, what a VLAN has unless it was told otherwise
const VLAN_DEFAULT_FLAGS: u32 = 1;

const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_GRE_LINK: u16 = 1;
const IFLA_GRE_IFLAGS: u16 = 2;
const IFLA_GRE_OFLAGS: u16 = 3;
const IFLA_GRE_IKEY: u16 = 4;
const IFLA_GRE_OKEY: u16 = 5;
const IFLA_GRE_LOCAL: u16 = 6;
const IFLA_GRE_REMOTE: u16 = 7;
const IFLA_GRE_TTL: u16 = 8;
const IFLA_GRE_TOS: u16 = 9;
const IFLA_GRE_PMTUDISC: u16 = 10;
const IFLA_GRE_ENCAP_LIMIT: u16 = 11;
const IFLA_GRE_FLOWINFO: u16 = 12;
const IFLA_GRE_FLAGS: u16 = 13;
const IFLA_GRE_ENCAP_TYPE: u16 = 14;
const IFLA_GRE_ENCAP_FLAGS: u16 = 15;
const IFLA_GRE_ENCAP_SPORT: u16 = 16;
const IFLA_GRE_ENCAP_DPORT: u16 = 17;
const IFLA_GRE_COLLECT_METADATA: u16 = 18;
const IFLA_GRE_IGNORE_DF: u16 = 19;
const IFLA_GRE_FWMARK: u16 = 20;

/// IFLA_GRE_FLAGS (include/uapi/linux/ip6_tunnel.h): what is asked for
const IP6_TNL_F_IGN_ENCAP_LIMIT: u32 = 0x1;
const IP6_TNL_F_USE_ORIG_TCLASS: u32 = 0x2;
const IP6_TNL_F_USE_ORIG_FLOWLABEL: u32 = 0x4;
const IP6_TNL_F_RCV_DSCP_COPY: u32 = 0x10;
const IP6_TNL_F_USE_ORIG_FWMARK: u32 = 0x20;
/// That the other end may be this host, which makes no difference; and what Linux has found out of both ends
/// (IP6_TNL_F_CAP_*, include/net/ip6_tunnel.h)
const IP6_TNL_F_WITHOUT_EFFECT: u32 = 0x40 | 0x1_0000 | 0x2_0000 | 0x4_0000;

const ARPHRD_ETHER: u16 = 1;
/// The lowest bit of a tunnel's TOS
const TOS_INHERITED: u8 = 1;
const ARPHRD_IPGRE: u16 = 778;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_LOOPBACK: u16 = 772;
const IF_OPER_UNKNOWN: u8 = 0;
const IF_OPER_UP: u8 = 6;

/// An interface as one message describes it; settings of families come from elsewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Interface index
    pub ifindex: u32,
    /// Name
    pub name: String,
    /// Link-layer address of six bytes
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes
    pub mtu: u32,
    /// What it is
    pub kind: PortKind,
    /// IFF_UP
    pub up: bool,
    /// IFF_LOWER_UP and operational state up (or unknown: the driver does not say)
    pub carrier: bool,
    /// Index of the master or 0
    pub master: u32,
    /// Of a VRF its routing table
    pub vrf_table: Option<u32>,
    /// Of one end of a veth pair the other, if it is in the same namespace
    pub peer: Option<u32>,
    /// The number of the group that it belongs to
    pub group: u32,
    /// Promiscuity count above 0
    pub promiscuous: bool,
    /// A setting of the link that the fast path does not repeat
    pub unsupported: Option<String>,
}

#[derive(Default)]
struct Info<'a> {
    kind: &'a [u8],
    vlan_id: Option<u16>,
    vlan_protocol: Option<u16>,
    tunnel: Option<Tunnel>,
    vrf_table: Option<u32>,
    unsupported: Option<String>,
}

/// The link in a message; None if it speaks of a bridge port or of a family's view of a link.
pub fn parse(payload: &[u8]) -> Result<Option<Link>, CmError> {
    let (header, rest) = split::<16>(WHAT, payload)?;
    let [family, _, t0, t1, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *header;
    if i32::from(family) != libc::AF_UNSPEC {
        return Ok(None);
    }
    let device_type = u16::from_ne_bytes([t0, t1]);
    let flags = i32::from_ne_bytes([f0, f1, f2, f3]);
    let (mut name, mut mac, mut mtu, mut master, mut lower) = (String::new(), None, 0, 0, None);
    let (mut operstate, mut group, mut promiscuity, mut foreign_lower) = (IF_OPER_UNKNOWN, 0, 0, false);
    let mut xdp = false;
    let mut info = Info::default();
    for attr in attrs(WHAT, rest) {
        let (kind, value) = attr?;
        match kind {
            IFLA_IFNAME => name = String::from_utf8_lossy(text(value)).into_owned(),
            IFLA_ADDRESS => mac = value.try_into().ok(),
            IFLA_MTU => mtu = int32(WHAT, value)?,
            IFLA_LINK => lower = Some(int32(WHAT, value)?),
            IFLA_MASTER => master = int32(WHAT, value)?,
            IFLA_OPERSTATE => operstate = u8::from_ne_bytes(fixed(WHAT, value)?),
            IFLA_GROUP => group = int32(WHAT, value)?,
            IFLA_PROMISCUITY => promiscuity = int32(WHAT, value)?,
            IFLA_LINK_NETNSID => foreign_lower = true,
            IFLA_LINKINFO => info = link_info(value)?,
            IFLA_XDP => xdp = has_program(value)?,
            _ => {}
        }
    }
    let kind = match (device_type, info.kind) {
        (ARPHRD_LOOPBACK, _) => PortKind::Loopback,
        (ARPHRD_ETHER, b"") => PortKind::Ethernet,
        (ARPHRD_ETHER, b"veth" | b"tun") => PortKind::Virtual,
        (ARPHRD_ETHER, b"vlan") => match (lower, info.vlan_protocol, info.vlan_id) {
            (Some(lower), Some(protocol), Some(id)) if !foreign_lower => PortKind::Vlan { lower, protocol, id },
            _ => PortKind::Other,
        },
        (ARPHRD_IPGRE, b"gre") | (ARPHRD_IP6GRE, b"ip6gre") => info.tunnel.map_or(PortKind::Other, PortKind::Tunnel),
        _ => PortKind::Other,
    };
    if let PortKind::Tunnel(_) = kind {
        let told = info.unsupported.take();
        info.unsupported = told
            .or_else(|| foreign_lower.then(|| "the tunnel's ends are in another network namespace".into()))
            .or_else(|| xdp.then(|| "an XDP program on a tunnel".into()));
    }
    Ok(Some(Link {
        ifindex: u32::from_ne_bytes([i0, i1, i2, i3]),
        name,
        mac,
        mtu,
        kind,
        up: flags & libc::IFF_UP != 0,
        carrier: flags & libc::IFF_LOWER_UP != 0 && matches!(operstate, IF_OPER_UNKNOWN | IF_OPER_UP),
        master,
        vrf_table: info.vrf_table,
        peer: lower.filter(|_| info.kind == b"veth" && !foreign_lower),
        group,
        promiscuous: promiscuity > 0,
        unsupported: info.unsupported,
    }))
}

fn link_info(bytes: &[u8]) -> Result<Info<'_>, CmError> {
    let mut info = Info::default();
    let mut data: &[u8] = &[];
    for attr in attrs(WHAT, bytes) {
        match attr? {
            (IFLA_INFO_KIND, value) => info.kind = text(value),
            (IFLA_INFO_DATA, value) => data = value,
            _ => {}
        }
    }
    match info.kind {
        b"vlan" => vlan_info(data, &mut info)?,
        b"gre" | b"ip6gre" => gre_info(data, &mut info)?,
        b"vrf" => {
            for attr in attrs(WHAT, data) {
                if let (IFLA_VRF_TABLE, value) = attr? {
                    info.vrf_table = Some(int32(WHAT, value)?);
                }
            }
        }
        _ => {}
    }
    Ok(info)
}

/// Whether a program is attached in any mode.
fn has_program(bytes: &[u8]) -> Result<bool, CmError> {
    for attr in attrs(WHAT, bytes) {
        if let (IFLA_XDP_ATTACHED, value) = attr? {
            let [mode] = fixed(WHAT, value)?;
            return Ok(mode != 0);
        }
    }
    Ok(false)
}

/// ipgre_fill_info (net/ipv4/ip_gre.c, Linux 6.1) and ip6gre_fill_info (net/ipv6/ip6_gre.c). Of a tunnel that takes its other
/// end from routes or sockets (collect_md) nothing is told but that.
fn gre_info(bytes: &[u8], info: &mut Info<'_>) -> Result<(), CmError> {
    let six = info.kind == b"ip6gre";
    let any = if six { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let none = GreOptions::default();
    let mut tunnel = Tunnel {
        local: any,
        remote: any,
        link: 0,
        input: none,
        output: none,
        ttl: 0,
        class: Some(0),
        label: Some(0),
        limit: None,
    };
    let (mut flags, mut keys, mut metadata) = ([0; 2], [0; 2], false);
    let (mut limit, mut flow, mut settings) = (0, 0, IP6_TNL_F_IGN_ENCAP_LIMIT);
    let mut refuse = |what: &str| info.unsupported = info.unsupported.take().or_else(|| Some(what.to_owned()));
    for attr in attrs(WHAT, bytes) {
        match attr? {
            (IFLA_GRE_LINK, value) => tunnel.link = int32(WHAT, value)?,
            (IFLA_GRE_IFLAGS, value) => flags[0] = u16::from_be(int16(WHAT, value)?),
            (IFLA_GRE_OFLAGS, value) => flags[1] = u16::from_be(int16(WHAT, value)?),
            (IFLA_GRE_IKEY, value) => keys[0] = u32::from_be(int32(WHAT, value)?),
            (IFLA_GRE_OKEY, value) => keys[1] = u32::from_be(int32(WHAT, value)?),
            (IFLA_GRE_LOCAL, value) => tunnel.local = end(six, value)?,
            (IFLA_GRE_REMOTE, value) => tunnel.remote = end(six, value)?,
            (IFLA_GRE_TTL, value) => [tunnel.ttl] = fixed(WHAT, value)?,
            (IFLA_GRE_TOS, value) if !six => {
                let [tos] = fixed(WHAT, value)?;
                tunnel.class = (tos & TOS_INHERITED == 0).then_some(tos);
            }
            (IFLA_GRE_ENCAP_LIMIT, value) if six => [limit] = fixed(WHAT, value)?,
            (IFLA_GRE_FLOWINFO, value) if six => flow = u32::from_be(int32(WHAT, value)?),
            (IFLA_GRE_FLAGS, value) if six => settings = int32(WHAT, value)?,
            (IFLA_GRE_PMTUDISC, value) if value == [0] => refuse("GRE with nopmtudisc"),
            (IFLA_GRE_ENCAP_TYPE, value) if int16(WHAT, value)? != 0 => refuse("GRE in UDP"),
            (IFLA_GRE_COLLECT_METADATA, _) => metadata = true,
            (IFLA_GRE_IGNORE_DF, value) if value != [0] => refuse("GRE with ignore-df"),
            (IFLA_GRE_FWMARK, value) if int32(WHAT, value)? != 0 => refuse("GRE with fwmark"),
            (
                IFLA_GRE_PMTUDISC | IFLA_GRE_ENCAP_TYPE | IFLA_GRE_ENCAP_FLAGS | IFLA_GRE_ENCAP_SPORT
                | IFLA_GRE_ENCAP_DPORT | IFLA_GRE_IGNORE_DF | IFLA_GRE_FWMARK,
                _,
            ) => {}
            (other, _) => refuse(&format!("GRE attribute {other}")),
        }
    }
    if settings & IP6_TNL_F_RCV_DSCP_COPY != 0 {
        refuse("GRE with dscp inherit");
    }
    if settings & IP6_TNL_F_USE_ORIG_FWMARK != 0 {
        refuse("GRE with fwmark inherit");
    }
    let known = IP6_TNL_F_IGN_ENCAP_LIMIT
        | IP6_TNL_F_USE_ORIG_TCLASS
        | IP6_TNL_F_USE_ORIG_FLOWLABEL
        | IP6_TNL_F_RCV_DSCP_COPY
        | IP6_TNL_F_USE_ORIG_FWMARK
        | IP6_TNL_F_WITHOUT_EFFECT;
    if settings & !known != 0 {
        refuse(&format!("GRE with flags {:#x}", settings & !known));
    }
    if six {
        let without = |flag| settings & flag == 0;
        tunnel.class = without(IP6_TNL_F_USE_ORIG_TCLASS).then_some((flow >> 20) as u8);
        tunnel.label = without(IP6_TNL_F_USE_ORIG_FLOWLABEL).then_some(flow & 0xf_ffff);
        tunnel.limit = without(IP6_TNL_F_IGN_ENCAP_LIMIT).then_some(limit);
    }
    for flags in flags.into_iter().filter(|flags| Gre::len(*flags).is_none()) {
        refuse(&format!("GRE flags {flags:#x}"));
    }
    let [input, output] = [0, 1].map(|at: usize| GreOptions {
        key: (flags[at] & Gre::KEY != 0).then_some(keys[at]),
        checksum: flags[at] & Gre::CHECKSUM != 0,
        sequence: flags[at] & Gre::SEQUENCE != 0,
    });
    info.tunnel = (!metadata).then_some(Tunnel { input, output, ..tunnel });
    Ok(())
}

/// One end of a tunnel.
fn end(six: bool, value: &[u8]) -> Result<IpAddr, CmError> {
    Ok(if six { IpAddr::from(fixed::<16>(WHAT, value)?) } else { IpAddr::from(fixed::<4>(WHAT, value)?) })
}

fn vlan_info(bytes: &[u8], info: &mut Info<'_>) -> Result<(), CmError> {
    for attr in attrs(WHAT, bytes) {
        match attr? {
            (IFLA_VLAN_ID, value) => info.vlan_id = Some(int16(WHAT, value)?),
            (IFLA_VLAN_PROTOCOL, value) => info.vlan_protocol = Some(u16::from_be(int16(WHAT, value)?)),
            // struct ifla_vlan_flags: flags, mask
            (IFLA_VLAN_FLAGS, value) => {
                let (flags, _) = split::<4>(WHAT, value)?;
                let flags = u32::from_ne_bytes(*flags);
                if flags != VLAN_DEFAULT_FLAGS {
                    info.unsupported = Some(format!("VLAN flags {flags:#x}"));
                }
            }
            (IFLA_VLAN_EGRESS_QOS, value) if !value.is_empty() => {
                info.unsupported = Some("VLAN egress-qos-map".to_owned());
            }
            _ => {}
        }
    }
    Ok(())
}

/// A string attribute without its terminating zero.
fn text(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == 0).next().unwrap_or_default()
}
