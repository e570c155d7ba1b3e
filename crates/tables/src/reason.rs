//! Why a packet left the fast path. One list, from which the enum, its texts and the counters' size follow.

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal, $text:literal;)*) => {
        /// Why a packet was handed to Linux (an *exception*). The value is the index of its counter.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])* #[doc = $text] $variant = $value,)*
        }

        impl Reason {
            /// Every reason, in counter order.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The short name used in counters and JSON.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }

            /// One line of text for people.
            pub const fn text(self) -> &'static str {
                match self { $(Reason::$variant => $text,)* }
            }

            /// The reason with this counter index, if there is one.
            pub const fn from_index(index: u8) -> Option<Reason> {
                match index { $($value => Some(Reason::$variant),)* _ => None }
            }
        }
    };
}

/// Counters kept per port and CPU; every `Reason` is below it.
pub const REASONS: usize = 56;

reasons! {
    PortNotReady = 0, "port-not-ready", "the port is not (yet) served: unknown, down, enslaved or without forwarding";
    NotForUs = 1, "not-for-us", "the destination MAC address is not the port's";
    L2Multicast = 2, "l2-multicast", "broadcast or multicast frame";
    UnsupportedEncap = 3, "unsupported-encap", "EtherType or VLAN tag that the fast path does not serve";
    Truncated = 4, "truncated", "frame shorter than its headers say";
    BadHeader = 5, "bad-header", "malformed IP header";
    BadChecksum = 6, "bad-checksum", "IPv4 header checksum is wrong";
    IpOptions = 7, "ip-options", "IPv4 options";
    ExtensionHeader = 8, "extension-header", "IPv6 extension header that the router itself must look at";
    Fragment = 9, "fragment", "fragment that needs care";
    TtlExpired = 10, "ttl-expired", "TTL or hop limit exhausted";
    MartianSource = 11, "martian-source", "source address that Linux does not accept on this port";
    MartianDestination = 12, "martian-destination", "destination address that is never forwarded";
    RpFilter = 13, "rp-filter", "reverse path filter does not accept the source on this port";
    Multicast = 14, "multicast", "IP multicast destination";
    Broadcast = 15, "broadcast", "IP broadcast destination";
    LinkLocal = 16, "link-local", "IPv6 link-local or other scoped address";
    LocalDestination = 17, "local-destination", "the router's own address";
    NoRoute = 18, "no-route", "no route to the destination";
    NonUnicastRoute = 19, "non-unicast-route", "route type other than unicast (blackhole, unreachable, prohibit, throw, nat)";
    UnsupportedRoute = 20, "unsupported-route", "route attribute that the fast path does not repeat (lwtunnel, tos, metrics)";
    NoNeighbour = 21, "no-neighbour", "next hop's link-layer address is not known; Linux resolves it";
    NexthopDown = 22, "nexthop-down", "the route's port is down or without carrier";
    EgressNotServed = 23, "egress-not-served", "the route leaves by an interface that the fast path does not serve";
    MtuExceeded = 24, "mtu-exceeded", "packet larger than the MTU of its way out";
    Redirect = 25, "redirect", "leaves by the port it came in by: Linux may send an ICMP redirect";
    PolicyNetfilter = 26, "policy-netfilter", "netfilter rules are on the packet's way";
    PolicyConntrack = 27, "policy-conntrack", "connection tracking is on the packet's way";
    PolicyXfrm = 28, "policy-xfrm", "XFRM policies may apply";
    PolicyRule = 29, "policy-rule", "policy routing rules may apply";
    PolicyTc = 30, "policy-tc", "a qdisc or tc filter that shapes or classifies";
    PolicyCapture = 31, "policy-capture", "a packet socket captures on the port";
    PolicySysctl = 32, "policy-sysctl", "a sysctl that the fast path does not repeat";
    PartialChecksum = 33, "partial-checksum", "transport checksum left to the device (looks partial): only Linux knows how it is to be completed";
    TableBusy = 34, "table-busy", "a table record was being changed while it was read";
    TableFull = 35, "table-full", "a table had no room for the entry this packet needs";
    Internal = 36, "internal", "an index in the tables was out of range";
    PolicyUnknown = 37, "policy-unknown", "a kernel setting could not be read, so nothing is assumed about it";
    Tunnel = 38, "tunnel", "a tunnel's packet with something that only Linux does (ECN, a wrong checksum, …)";
    FlowNew = 39, "flow-new", "rules or connection tracking are on the packet's way, and it is of no connection that Linux handed over";
    FlowWaiting = 40, "flow-waiting", "Linux has not accepted a packet of this connection, direction and way since the rules changed";
    FlowClosing = 41, "flow-closing", "TCP FIN, RST or SYN of a connection, or a packet after its FIN or RST";
    FlowUnwatched = 42, "flow-unwatched", "nobody has looked at Linux's rules for seconds: towpath has died or is stopped";
    Mapped = 43, "mapped", "a port with mappings (towpath nat) is on the packet's way, and it is one that is translated in Linux (an ICMP error, …)";
    Filtered = 44, "filtered", "dropped, not handed to Linux: the operator has a filter for it (towpath filter)";
    Unattended = 45, "unattended", "nobody has looked at Linux's settings for longer than --detach-after allows: towpath has died or is stopped";
    TunnelSequence = 46, "tunnel-sequence", "a tunnel that numbers its packets: Linux counts them, for its own as well, and tells nobody";
}

const _: () = assert!(Reason::ALL.len() <= REASONS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_dense_and_round_trip() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(Reason::from_index(index as u8), Some(*reason));
        }
        assert_eq!(Reason::from_index(Reason::ALL.len() as u8), None);
    }
}
