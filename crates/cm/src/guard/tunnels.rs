//! What decides over tunnels' packets and is no setting of an interface.
//!
//! - A path MTU that Linux has learned for a tunnel's other end: it limits what goes into the tunnel (ip_tunnel.c,
//!   tnl_update_pmtu; ip6_tunnel.c, ip6_tnl_xmit), unlike what is only forwarded. Linux tells what it would do with a packet to
//!   there, and that what it knows will expire (rt_fill_info, net/ipv4/route.c, and rt6_fill_node, net/ipv6/route.c, Linux 6.1).
//! - Sequence numbers: the last one sent and the next one wanted are in Linux's memory (o_seqno and i_seqno of struct ip_tunnel,
//!   include/net/ip_tunnels.h), and no interface tells or sets them. Linux sends from there what is its own, and drops what
//!   comes in with a number below (ip_tunnel_rcv): so both directions can have one writer only. This the descriptions of
//!   interfaces say, too, and that decides; here it is put into words.
//! - Raw sockets for GRE, which see its packets beside the tunnels (raw_local_deliver, net/ipv4/raw.c; raw6_local_deliver,
//!   net/ipv6/raw.c).
//! - `net.ipv6.max_dst_opts_number` and `max_dst_opts_length`: by less than one option of eight bytes Linux drops what bears an
//!   encapsulation limit, by a number below 0 as well, since it does not know that option (ip6_parse_tlv, net/ipv6/exthdrs.c).
//!
//! Nothing announces the first and the last two; all are read at every poll, while there are tunnels.

use super::nl::{self, Netlink, attrs, find, ne32};
use super::proc::ProcNet;
use super::{Finding, POLL, is_tunnel};
use crate::error::CmError;
use crate::sysctl::Setting;
use crate::watch::{PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::net::IpAddr;
use std::time::Duration;
use towpath_fpc::{PolicySource, Port, PortKind, Scope, Tunnel};
use towpath_tables::Reason;
use towpath_tables::record::Family;
use towpath_wire::transport::protocol::GRE;

const GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_METRICS: u16 = 8;
const RTA_CACHEINFO: u16 = 12;
const RTAX_MTU: u16 = 2;
const RTMSG: usize = 12;
/// rta_cacheinfo: after two words
const EXPIRES: usize = 8;

/// The watcher of what Linux knows about tunnels.
pub struct Tunnels {
    netlink: Netlink,
    raw: [ProcNet; 2],
    options: [(&'static str, i64, Setting); 2],
}

impl Tunnels {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        Ok(Self {
            netlink: Netlink::open(NETLINK_ROUTE).map_err(|e| CmError::io("tunnels: netlink socket", e))?,
            raw: [ProcNet::new(c"raw", c"ipv4")?, ProcNet::new(c"raw6", c"ipv6")?],
            options: [("max_dst_opts_number", 1), ("max_dst_opts_length", 8)]
                .map(|(name, least)| (name, least, Setting::new(&format!("ipv6/{name}")))),
        })
    }

    /// The path MTU to a tunnel's other end, if Linux knows another than the route's.
    fn learned(&mut self, tunnel: &Tunnel) -> Result<Option<u32>, CmError> {
        let Some(request) = request(tunnel) else { return Ok(None) };
        match self.netlink.ask("route to a tunnel's other end", GETROUTE, &request) {
            Ok((_, payload)) => expiring_mtu(&payload),
            // No route, or no such address of ours: nothing goes into the tunnel.
            Err(CmError::Kernel { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Why what bears an encapsulation limit does not come in, if so.
    fn refused_limit(&mut self) -> Option<String> {
        self.options.iter_mut().find_map(|(name, least, setting)| {
            let value = setting.read().filter(|value| value < least)?;
            Some(format!("net.ipv6.{name} is {value}: packets with an encapsulation limit are dropped"))
        })
    }

    /// Raw sockets of a family for GRE.
    fn listeners(&mut self, family: Family) -> Result<usize, CmError> {
        let list = self.raw[family as usize].read()?.unwrap_or_default();
        Ok(list.lines().filter(|line| protocol(line) == Some(GRE.into())).count())
    }
}

impl Watcher for Tunnels {
    fn name(&self) -> &'static str {
        "tunnels"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Tunnels
    }

    fn interval(&self) -> Option<Duration> {
        Some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        let mut findings = Vec::new();
        let tunnels: Vec<_> = ports.iter().filter(|port| is_tunnel(port)).collect();
        let over =
            |family| tunnels.iter().any(|port| matches!(port.kind, PortKind::Tunnel(of) if of.family() == family));
        let mut listeners = [0; 2];
        for family in Family::ALL.into_iter().filter(|family| over(*family)) {
            listeners[family as usize] = self.listeners(family)?;
        }
        let refused = if over(Family::V6) { self.refused_limit() } else { None };
        for port in tunnels {
            let PortKind::Tunnel(tunnel) = port.kind else { continue };
            let listeners = listeners[tunnel.family() as usize];
            if let Some(mtu) = self.learned(&tunnel)? {
                let detail = format!("Linux has learned a path MTU of {mtu} to {}", tunnel.remote);
                findings.push(Finding::new(Scope::Egress(port.ifindex, None), Reason::Tunnel, detail));
            }
            findings.extend(numbered(port, &tunnel));
            if let Some(detail) = refused.clone().filter(|_| tunnel.family() == Family::V6) {
                findings.push(Finding::new(Scope::Ingress(port.ifindex, None), Reason::PolicySysctl, detail));
            }
            if listeners > 0 {
                let detail = format!("{} for GRE", super::count(listeners, "raw socket"));
                findings.push(Finding::new(Scope::Ingress(port.ifindex, None), Reason::PolicyCapture, detail));
            }
        }
        Ok(findings)
    }
}

/// What is told of a tunnel whose packets bear numbers.
fn numbered(port: &Port, tunnel: &Tunnel) -> Vec<Finding> {
    let name = &port.name;
    let finding = |scope, detail: String| Finding::new(scope, Reason::TunnelSequence, detail);
    let sent = finding(Scope::Egress(port.ifindex, None), format!("{name} numbers what it sends (oseq)"));
    let wanted = finding(Scope::Ingress(port.ifindex, None), format!("{name} wants numbers in order (iseq)"));
    [(tunnel.output.sequence, sent), (tunnel.input.sequence, wanted)]
        .into_iter()
        .filter(|(is, _)| *is)
        .map(|(_, f)| f)
        .collect()
}

/// rtmsg and attributes: where would a packet of the tunnel go?
fn request(tunnel: &Tunnel) -> Option<Vec<u8>> {
    let Tunnel { local, remote, .. } = *tunnel;
    if Family::of(local) != Family::of(remote) {
        return None;
    }
    let (family, len) = if remote.is_ipv4() { (libc::AF_INET, 32) } else { (libc::AF_INET6, 128) };
    let mut request = vec![family as u8, len, if local.is_unspecified() { 0 } else { len }];
    request.resize(RTMSG, 0);
    let mut address = |kind, address| match address {
        IpAddr::V4(address) => request.extend(nl::attr(kind, &address.octets())),
        IpAddr::V6(address) => request.extend(nl::attr(kind, &address.octets())),
    };
    address(RTA_DST, remote);
    if !local.is_unspecified() {
        address(RTA_SRC, local);
    }
    if tunnel.link != 0 {
        request.extend(nl::attr(RTA_OIF, &tunnel.link.to_ne_bytes()));
    }
    Some(request)
}

/// The MTU in a route's message, if it expires.
fn expiring_mtu(payload: &[u8]) -> Result<Option<u32>, CmError> {
    let what = "route to a tunnel's other end";
    let attributes = attrs(what, payload.get(RTMSG..).unwrap_or_default())?;
    let expires = find(&attributes, RTA_CACHEINFO).and_then(|info| ne32(info.get(EXPIRES..)?)).unwrap_or(0);
    if expires == 0 {
        return Ok(None);
    }
    let metrics = attrs(what, find(&attributes, RTA_METRICS).unwrap_or_default())?;
    Ok(find(&metrics, RTAX_MTU).and_then(ne32))
}

/// The protocol of a raw socket, which stands where ports do: "  47: 00000000:002F 00000000:0000 07 …".
fn protocol(line: &str) -> Option<u32> {
    let (_, protocol) = line.split_whitespace().nth(1)?.split_once(':')?;
    u32::from_str_radix(protocol, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::super::nl::attr;
    use super::*;

    #[test]
    fn an_mtu_counts_only_while_it_lasts() {
        let message = |expires: u32, mtu: Option<u32>| {
            let info: Vec<u8> = [0, 0, expires, 0, 0, 0, 0, 0].iter().flat_map(|w: &u32| w.to_ne_bytes()).collect();
            let metrics: Vec<u8> = mtu.iter().flat_map(|mtu| attr(RTAX_MTU, &mtu.to_ne_bytes())).collect();
            [vec![0; RTMSG], attr(RTA_CACHEINFO, &info), attr(RTA_METRICS, &metrics)].concat()
        };
        assert_eq!(expiring_mtu(&message(50_000, Some(1400))).unwrap(), Some(1400));
        assert_eq!(expiring_mtu(&message(0, Some(1400))).unwrap(), None, "the route's own");
        assert_eq!(expiring_mtu(&message(0, None)).unwrap(), None);
        assert_eq!(expiring_mtu(&[0; RTMSG]).unwrap(), None);
    }

    #[test]
    fn raw_sockets_of_both_families_are_told_alike() {
        let line =
            "   47: 00000000000000000000000000000000:002F 00000000000000000000000000000000:0000 07 00000000:00000000";
        assert_eq!(protocol(line), Some(GRE.into()));
    }

    #[test]
    fn a_raw_sockets_protocol_stands_where_ports_do() {
        let line = "   47: 00000000:002F 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 1 2 0 0";
        assert_eq!(protocol(line), Some(GRE.into()));
        let heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout";
        assert_eq!(protocol(heading), None);
    }
}
