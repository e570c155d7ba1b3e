//! Matches and targets of xtables in rules of nftables, as iptables-nft makes them, for packets that go fast.

use super::super::nl::{find, text_of};
use super::bits::{Answer, changing, is};
use super::packet::{Class, TURNS};
use towpath_wire::transport::Tcp;

/// Matches whose answer is the same for all packets of a connection's direction that go fast: they ask for addresses, ports,
/// interfaces, marks and helpers, or are about other protocols. By net/netfilter/xt_*.c and net/ipv{4,6}/netfilter, Linux 6.1.
#[rustfmt::skip]
const FIXED: &[&str] = &[
    "ah", "connlabel", "connmark", "dccp", "esp", "helper", "icmp", "icmp6", "ipcomp", "iprange", "l2tp", "mark", "mh",
    "multiport", "pkttype", "sctp", "udp",
];

/// Matches of which that is true while routes are what they are.
const ROUTED: &[&str] = &["addrtype", "rpfilter"];

/// Matches that leave no trace of the packets they see, though they may answer each differently; all of `FIXED` too.
#[rustfmt::skip]
const READING: &[&str] = &[
    "bpf", "cgroup", "connbytes", "conntrack", "cpu", "dscp", "ecn", "frag", "hl", "ipv6header", "length", "mac", "physdev",
    "policy", "realm", "socket", "state", "string", "tcp", "tcpmss", "time", "tos", "ttl", "u32",
];

/// Matches that take account of each packet they see, for the rule alone.
const COUNTING: &[&str] = &["connlimit", "limit", "quota", "statistic"];

/// Whom it may matter to that a match has seen a packet.
pub enum Account {
    Nothing,
    Rule,
    /// Other rules, too
    Anywhere,
}

/// What a match takes account of that may answer each packet differently.
pub fn account(name: &str) -> Account {
    match name {
        name if READING.contains(&name) || FIXED.contains(&name) => Account::Nothing,
        name if COUNTING.contains(&name) => Account::Rule,
        _ => Account::Anywhere,
    }
}

/// Whether a match asks for routes.
pub fn asks_routes(name: &str) -> bool {
    ROUTED.contains(&name)
}

/// Targets that do nothing to a packet that goes fast; the maximum segment size is in SYNs only.
const NOTHING: &[&str] = &["AUDIT", "IDLETIMER", "LED", "LOG", "NFLOG", "RATEEST", "TCPMSS", "TRACE"];

/// Whether a rule's packets are the same behind this target as before it.
pub fn does_nothing(target: &str) -> bool {
    NOTHING.contains(&target)
}

/// What a match says, given by NFTA_MATCH_*, and its name; None if it asks nothing.
pub fn answer(class: Class, data: &[(u16, &[u8])]) -> Option<(Answer, String)> {
    let name = find(data, 1).map(text_of).unwrap_or_default();
    let info = find(data, 3).unwrap_or_default();
    let revision = find(data, 2).and_then(super::super::nl::be32);
    let answer = match name.as_str() {
        "comment" => return None,
        "conntrack" => conntrack(class, revision, info),
        "state" => info.first_chunk().map(|mask| state(class, u32::from_ne_bytes(*mask))),
        "tcp" => tcp(info),
        // They ask for the interface that a packet comes in by.
        "devgroup" | "rpfilter" | "addrtype" => Some(changing(&[class.by.device()])),
        name if FIXED.contains(&name) => Some(Answer::Fixed),
        _ => None,
    };
    Some((answer.unwrap_or(Answer::Varies), format!("match {name}")))
}

/// XT_CONNTRACK_STATE_BIT(IP_CT_ESTABLISHED), and those for translated sources and destinations.
const ESTABLISHED: u32 = 1 << 1;
const TRANSLATED: u32 = 1 << 6 | 1 << 7;

fn state(class: Class, mask: u32) -> Answer {
    match class.tracked {
        true => is(mask & ESTABLISHED != 0),
        false => Answer::Fixed,
    }
}

/// xt_conntrack_mtinfo2 and 3 (include/uapi/linux/netfilter/xt_conntrack.h). None where one of the others is, or for what
/// changes: the time that is left, and the status.
fn conntrack(class: Class, revision: Option<u32>, info: &[u8]) -> Option<Answer> {
    const FLAGS: usize = 146;
    const STATE: u16 = 1 << 0;
    const CHANGING: u16 = 1 << 6 | 1 << 7;
    const KNOWN: u16 = (1 << 14) - 1;
    let half = |at: usize| info.get(at..)?.first_chunk().map(|half| u16::from_ne_bytes(*half));
    let (flags, inverted, mask) = (half(FLAGS)?, half(FLAGS + 2)?, u32::from(half(FLAGS + 4)?));
    if !matches!(revision, Some(2 | 3)) || flags & (CHANGING | !KNOWN) != 0 {
        return None;
    }
    if flags & STATE == 0 {
        return Some(Answer::Fixed);
    }
    let answer = match state(class, mask) {
        Answer::Never if mask & TRANSLATED != 0 => Answer::Fixed,
        answer => answer.inverted(inverted & STATE != 0),
    };
    // The other things that it asks must hold, too.
    Some(if flags & !STATE & !ALIAS != 0 && answer == Answer::Always { Answer::Fixed } else { answer })
}

/// XT_CONNTRACK_STATE_ALIAS says how the rule was written.
const ALIAS: u16 = 1 << 13;

/// xt_tcp (include/uapi/linux/netfilter/xt_tcpudp.h): ports, an option, flags under a mask; each may be inverted.
fn tcp(info: &[u8]) -> Option<Answer> {
    const INVERTED_FLAGS: u8 = 4;
    let [option, mask, wanted, inverted] = *info.get(8..)?.first_chunk()?;
    let (differs, asked) = ((Tcp::ACK ^ wanted) & mask & TURNS != 0, mask & !TURNS == 0);
    let flags = match differs {
        true => Answer::Never,
        false if asked && wanted & !mask == 0 => Answer::Always,
        false => Answer::Varies,
    };
    Some(match flags.inverted(inverted & INVERTED_FLAGS != 0) {
        Answer::Never => Answer::Never,
        Answer::Varies => Answer::Varies,
        _ if option != 0 => Answer::Varies,
        _ => Answer::Fixed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::nftables::packet::{By, meta};
    use towpath_tables::record::Family;

    const CLASS: Class = Class { family: Family::V4, protocol: 6, tracked: true, by: By::Interface };

    fn said(name: &str, revision: u32, info: &[u8]) -> Option<Answer> {
        let name = format!("{name}\0");
        answer(CLASS, &[(1, name.as_bytes()), (2, &revision.to_be_bytes()), (3, info)]).map(|(answer, _)| answer)
    }

    fn asks(flags: u16, inverted: u16, states: u16) -> Vec<u8> {
        let words = [flags, inverted, states, 0].map(u16::to_ne_bytes).concat();
        [vec![0; 146], words, vec![0; 8]].concat()
    }

    #[test]
    fn states_of_connections_decide() {
        let never = Some(Answer::Never);
        assert_eq!(said("conntrack", 3, &asks(1 | ALIAS, 0, 0b1000)), never, "new");
        assert_eq!(said("conntrack", 3, &asks(1, 0, 0b0110)), Some(Answer::Always), "established, related");
        assert_eq!(said("conntrack", 3, &asks(1, 1, 0b0110)), never, "neither");
        assert_eq!(said("conntrack", 3, &asks(1, 0, 1 << 7)), Some(Answer::Fixed), "translated");
        assert_eq!(said("conntrack", 3, &asks(1 | 4, 0, 0b0010)), Some(Answer::Fixed), "and an address");
        assert_eq!(said("conntrack", 3, &asks(1 << 7, 0, 0)), Some(Answer::Varies), "the time that is left");
        assert_eq!(said("conntrack", 4, &asks(1, 0, 0b1000)), Some(Answer::Varies), "another revision");
        assert_eq!(said("conntrack", 3, &[0; 12]), Some(Answer::Varies));
        assert_eq!(said("state", 0, &8u32.to_ne_bytes()), never);
        assert_eq!(said("state", 0, &2u32.to_ne_bytes()), Some(Answer::Always));
        let raw = Class { tracked: false, ..CLASS };
        assert_eq!(answer(raw, &[(1, b"state\0"), (3, &8u32.to_ne_bytes())]).map(|(a, _)| a), Some(Answer::Fixed));
    }

    #[test]
    fn flags_of_segments_decide() {
        let flags = |mask, wanted, inverted| [vec![0; 8], vec![0, mask, wanted, inverted]].concat();
        assert_eq!(said("tcp", 0, &flags(0x17, 0x02, 0)), Some(Answer::Never), "--syn");
        assert_eq!(said("tcp", 0, &flags(0x17, 0x02, 4)), Some(Answer::Fixed), "! --syn");
        assert_eq!(said("tcp", 0, &flags(0x3f, 0x00, 0)), Some(Answer::Never), "none");
        assert_eq!(said("tcp", 0, &flags(0x18, 0x18, 0)), Some(Answer::Varies), "PSH");
        assert_eq!(said("tcp", 0, &flags(0, 0, 0)), Some(Answer::Fixed), "ports alone");
        assert_eq!(said("tcp", 0, &[[0; 8].as_slice(), &[8, 0, 0, 0]].concat()), Some(Answer::Varies), "an option");
        assert_eq!(said("tcp", 0, &[]), Some(Answer::Varies));
    }

    #[test]
    fn ports_of_a_vrf_differ_before_it_only() {
        let by = |by| Class { by, ..CLASS };
        for name in ["devgroup", "rpfilter", "addrtype"] {
            let said = |class| answer(class, &[(1, name.as_bytes()), (3, &[0; 64])]).map(|(answer, _)| answer);
            let wanted = [Answer::Fixed, Answer::Fixed, Answer::Varies].map(Some);
            assert_eq!([By::Interface, By::Vrf, By::Ports].map(|of| said(by(of))), wanted, "{name}");
        }
        for (key, wanted) in [(4, [0, 0, 1]), (6, [0, 0, 1]), (8, [0, 0, 1]), (21, [0, 0, 1]), (26, [0, 0, 1])]
            .into_iter()
            .chain([(33, [0, 1, 1]), (34, [0, 1, 1]), (5, [0; 3]), (7, [0; 3]), (22, [0; 3])])
        {
            let loaded = |of| meta(by(of), &[(2, &u32::to_be_bytes(key))]).0;
            let said = [By::Interface, By::Vrf, By::Ports].map(|of| u32::from(changing(&loaded(of)) == Answer::Varies));
            assert_eq!(said, wanted, "meta {key}");
        }
    }

    #[test]
    fn what_may_change_or_is_unknown_varies() {
        #[rustfmt::skip]
        let changing = [
            "bpf", "connbytes", "connlimit", "cpu", "dscp", "hashlimit", "length", "limit", "mac", "quota", "recent",
            "set", "socket", "statistic", "string", "time", "ttl", "u32", "from-the-future",
        ];
        for name in changing {
            assert_eq!(said(name, 0, &[0; 64]), Some(Answer::Varies), "{name}");
        }
        assert_eq!(said("comment", 0, &[]), None);
        assert_eq!(said("multiport", 1, &[0; 64]), Some(Answer::Fixed));
    }
}
