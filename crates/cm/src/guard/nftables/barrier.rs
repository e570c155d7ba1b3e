//! Rules that no connection may pass, though Linux handed it over.
//!
//! What a rule decides, it decides for a connection's first packets: that is the flowtable's contract. Some rules do more
//! than decide. They take packets out of the kernel, say to which of several tables of connections a packet belongs,
//! change what is told of entries or how long they last: no flow can stand for those. Others change each packet. A
//! flowtable's connections do not meet these in Linux either; those that are handed over by mark or because they are
//! established would, as they would meet rules that answer each packet differently (`super::meet`).

use super::super::netfilter::xt_passes;
use super::super::nl::{attrs, be32, find, text_of};
use crate::conntrack::FlowMode;
use crate::error::CmError;

/// NFT_CT_ZONE, NFT_CT_EVENTMASK (include/uapi/linux/netfilter/nf_tables.h, Linux 6.1)
const CT_ZONE: u32 = 17;
const CT_EVENTMASK: u32 = 18;
/// NFT_OBJECT_CT_TIMEOUT, NFT_OBJECT_SYNPROXY
const CT_TIMEOUT: u32 = 7;
const SYNPROXY: u32 = 10;
/// TCPOPT_MAXSEG, in SYNs only
pub const MAXSEG: u8 = 2;

/// Whether a named object may make timeouts other than the system's, or answer for others.
pub fn object_is_barrier(kind: Option<u32>) -> bool {
    !matches!(kind, Some(kind) if kind <= SYNPROXY && ![CT_TIMEOUT, SYNPROXY].contains(&kind))
}

/// The first of a rule's expressions that no connection may pass.
pub fn barrier(what: &str, list: &[u8], flows: FlowMode) -> Result<Option<String>, CmError> {
    for (_, expression) in attrs(what, list)? {
        let expression = attrs(what, expression)?;
        let name = find(&expression, 1).map(text_of).unwrap_or_default();
        let data = attrs(what, find(&expression, 2).unwrap_or_default())?;
        if let Some(barrier) = judge(&name, &data, flows) {
            return Ok(Some(barrier));
        }
    }
    Ok(None)
}

fn judge(name: &str, data: &[(u16, &[u8])], flows: FlowMode) -> Option<String> {
    let number = |kind| find(data, kind).and_then(be32);
    let given = |kind| find(data, kind).is_some();
    let changes = match name {
        // Decisions, and what they are made of; address translation is the connection's own.
        "bitwise" | "byteorder" | "cmp" | "connlimit" | "counter" | "dynset" | "fib" | "flow_offload" | "hash"
        | "immediate" | "inner" | "last" | "limit" | "log" | "lookup" | "masq" | "match" | "meta" | "nat"
        | "notrack" | "numgen" | "objref" | "osf" | "quota" | "range" | "redir" | "reject" | "rt" | "socket"
        | "tunnel" | "xfrm" => false,
        "ct" if !given(4) => false,
        "ct" => match number(2) {
            Some(CT_ZONE) => return Some("ct zone set".to_owned()),
            Some(CT_EVENTMASK) => return Some("ct event set".to_owned()),
            _ => false,
        },
        "target" => {
            let extension = find(data, 1).map(text_of).unwrap_or_default();
            return (!xt_passes(&extension, flows == FlowMode::Flowtable)).then_some(extension);
        }
        "payload" => given(5),
        "exthdr" => given(7) && find(data, 2) != Some(&[MAXSEG]),
        "dup" | "fwd" => true,
        // queue, synproxy, tproxy, and whatever is unknown
        _ => return Some(name.to_owned()),
    };
    (changes && flows != FlowMode::Flowtable).then(|| format!("{name} changes packets"))
}

#[cfg(test)]
mod tests {
    use super::super::super::nl::attr;
    use super::*;

    const ESTABLISHED: FlowMode = FlowMode::Established;

    fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
        attr(1, &[attr(1, format!("{name}\0").as_bytes()), attr(2, &data.concat())].concat())
    }

    fn found(name: &str, data: &[Vec<u8>], flows: FlowMode) -> Option<String> {
        let list = [expression("cmp", &[]), expression(name, data)].concat();
        barrier("test", &list, flows).unwrap()
    }

    #[test]
    fn decisions_can_be_passed() {
        for name in ["immediate", "lookup", "masq", "nat", "flow_offload", "limit", "notrack"] {
            assert_eq!(found(name, &[], ESTABLISHED), None, "{name}");
        }
        let ct = |key: u32, set: bool| [attr(2, &key.to_be_bytes()), if set { attr(4, &[0; 4]) } else { Vec::new() }];
        for (key, set) in [(0, false), (CT_ZONE, false), (3, true), (13, true)] {
            assert_eq!(found("ct", &ct(key, set), ESTABLISHED), None, "{key} {set}");
        }
        assert_eq!(found("ct", &ct(CT_ZONE, true), FlowMode::Flowtable).as_deref(), Some("ct zone set"));
        assert_eq!(found("ct", &ct(CT_EVENTMASK, true), FlowMode::Flowtable).as_deref(), Some("ct event set"));
    }

    #[test]
    fn what_takes_packets_away_and_what_is_unknown_cannot() {
        for name in ["queue", "tproxy", "synproxy", "from-the-future"] {
            assert_eq!(found(name, &[], FlowMode::Flowtable).as_deref(), Some(name));
        }
        let target = |name: &str| [attr(1, format!("{name}\0").as_bytes())];
        assert_eq!(found("target", &target("MASQUERADE"), ESTABLISHED), None);
        for name in ["NFQUEUE", "CT", "from-the-future"] {
            assert_eq!(found("target", &target(name), FlowMode::Flowtable).as_deref(), Some(name));
        }
    }

    #[test]
    fn changes_of_packets_cannot_be_passed_outside_of_a_flowtable() {
        let maxseg = [attr(2, &[MAXSEG]), attr(7, &[0; 4])];
        assert_eq!(found("exthdr", &maxseg, ESTABLISHED), None);
        assert_eq!(found("payload", &[attr(1, &[0; 4])], ESTABLISHED), None, "it only reads");
        let timestamps = [attr(2, &[8]), attr(7, &[0; 4])];
        for (name, data) in [("payload", vec![attr(5, &[0; 4])]), ("exthdr", timestamps.to_vec()), ("dup", vec![])] {
            assert!(found(name, &data, ESTABLISHED).is_some(), "{name}");
            assert_eq!(found(name, &data, FlowMode::Flowtable), None, "{name}");
        }
        let target = [attr(1, b"DSCP\0")];
        assert_eq!(found("target", &target, ESTABLISHED).as_deref(), Some("DSCP"));
        assert_eq!(found("target", &target, FlowMode::Flowtable), None);
    }

    #[test]
    fn objects_that_change_timeouts_are_barriers() {
        for kind in [1, 2, 3, 5, 9] {
            assert!(!object_is_barrier(Some(kind)), "{kind}");
        }
        for kind in [Some(7), Some(10), Some(11), None] {
            assert!(object_is_barrier(kind), "{kind:?}");
        }
    }
}
