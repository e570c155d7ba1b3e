//! The prime rule from end to end: what Linux is told to do with forwarded packets by its own tools holds for the
//! packets of a stream in full flow, and the fast path carries them again once it is taken back.
//!
//! Times are measured at the receiving host: when the last packet arrived that should not have, counted from the end of
//! the command. A busy machine may delay them, so only a full second fails; what was seen is printed.

mod common;

use common::{Beat, DEADLINE, Net, RIGHT, RIGHT6, eventually};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// More than this after the command is a leak, whatever else the machine does.
const LEAK: Duration = Duration::from_secs(1);
/// How often each setting is measured after it was tried once: three times, or as TOWPATH_ROUNDS says (the virtual
/// machine is slow).
fn rounds() -> usize {
    std::env::var("TOWPATH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3)
}

/// What a setting does to the stream.
#[derive(Clone, Copy, PartialEq)]
enum Effect {
    /// Nothing arrives
    Drops,
    /// Little arrives
    Throttles,
    /// Everything arrives, by Linux
    Passes,
}

/// A setting: the commands in the router that make it and take it back, and how it must show.
struct Setting {
    name: &'static str,
    /// What has to be there before; no policy yet
    before: &'static str,
    set: &'static str,
    unset: &'static str,
    effect: Effect,
    reason: &'static str,
    /// Words in what `status` says, whatever their case; none if the setting is part of what the tables repeat
    names: &'static [&'static str],
}

const SETTING: Setting = Setting {
    name: "",
    before: "true",
    set: "",
    unset: "",
    effect: Effect::Drops,
    reason: "policy-netfilter",
    names: &[],
};

/// Runs the settings one after the other against a stream to `destination`.
fn prove(destination: &str, settings: &[Setting]) {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let beat = Beat::start(&net, destination);
    let mut times = Vec::new();
    for setting in settings {
        let taken_back = || net.router.sh(setting.unset).expect(setting.name);
        if net.router.sh(&format!("{}; {}", setting.before, setting.set)).is_err() {
            println!("SKIP: {}: not on this kernel: {}", setting.name, setting.set);
            assert!(std::env::var_os("TOWPATH_NO_SKIP").is_none(), "{} is required here", setting.name);
            let _ = net.router.sh(setting.unset);
            continue;
        }
        taken_back();
        let mut own: Vec<_> = (0..rounds())
            .map(|_| {
                let after = comes_into_force(&net, &beat, setting);
                taken_back();
                after
            })
            .collect();
        own.sort();
        println!("{:45} {own:?}", setting.name);
        if setting.effect != Effect::Passes {
            times.extend(own);
        }
    }
    carried_fast(&net);
    times.sort();
    if let Some(longest) = times.last() {
        println!("in force after: median {:?}, longest {longest:?}, of {}", times[times.len() / 2], times.len());
    }
}

/// Waits until nothing is in the way and the fast path carries the stream.
fn carried_fast(net: &Net) {
    eventually("no policy is left", || (net.json(&["status"])["policies"] == serde_json::json!([])).then_some(()));
    net.flows(50);
}

/// Sets it while the stream is carried fast, and sees it through; gives the time it took, which for a setting that lets
/// the packets pass includes that of the commands that ask.
fn comes_into_force(net: &Net, beat: &Beat, setting: &Setting) -> Duration {
    let name = setting.name;
    net.router.sh(setting.before).expect(name);
    carried_fast(net);
    let counted = net.exceptions(setting.reason);
    net.router.sh(setting.set).expect(name);
    let set = Instant::now();
    let mut seen = None;
    eventually(name, || (net.exceptions(setting.reason) > counted).then(|| seen = Some(set.elapsed())));
    // Two watchers may see the same setting; the one that names it may be the later.
    let expected: Vec<_> = setting.names.iter().chain((!setting.names.is_empty()).then_some(&setting.reason)).collect();
    eventually(&format!("{name}: status to say {expected:?}"), || {
        let policies = net.json(&["status"])["policies"].to_string().to_lowercase();
        expected.iter().all(|word| policies.contains(&word.to_lowercase())).then_some(())
    });
    let (forwarded, counted) = (net.forwarded(), net.exceptions(setting.reason));
    eventually(name, || (net.exceptions(setting.reason) >= counted + 100).then_some(()));
    assert_eq!(net.forwarded(), forwarded, "{name}: nothing is forwarded fast");
    let dense = match setting.effect {
        Effect::Drops => 1,
        Effect::Throttles => 5,
        Effect::Passes => {
            let last = beat.last(1).expect("arrivals");
            assert!(last > set, "{name}: Linux forwards");
            return seen.unwrap_or(DEADLINE);
        }
    };
    let after = beat.last(dense).map_or(Duration::ZERO, |last| last.saturating_duration_since(set));
    assert!(after < LEAK, "{name}: packets still passed {after:?} after the command");
    after
}

const NFT: &str = "nft add table inet t";

#[test]
fn netfilter_holds_for_the_stream() {
    prove(
        RIGHT,
        &[
            Setting {
                name: "nftables, forward",
                before: NFT,
                set: "nft 'add chain inet t forward { type filter hook forward priority 0; }; add rule inet t forward udp dport 7000 drop'",
                unset: "nft delete table inet t",
                names: &["nft table", "chain forward"],
                ..SETTING
            },
            Setting {
                name: "nftables, forward by policy",
                before: NFT,
                set: "nft 'add chain inet t forward { type filter hook forward priority 0; policy drop; }'",
                unset: "nft delete table inet t",
                names: &["nft table", "chain forward"],
                ..SETTING
            },
            Setting {
                name: "nftables, prerouting",
                set: "nft 'add table ip t; add chain ip t prerouting { type filter hook prerouting priority -300; }; \
                  add rule ip t prerouting udp dport 7000 drop'",
                unset: "nft delete table ip t",
                names: &["nft table", "chain prerouting"],
                ..SETTING
            },
            Setting {
                name: "nftables, postrouting",
                set: "nft 'add table ip t; add chain ip t postrouting { type filter hook postrouting priority 0; }; \
                  add rule ip t postrouting oifname eth1 drop'",
                unset: "nft delete table ip t",
                names: &["nft table", "chain postrouting"],
                ..SETTING
            },
            Setting {
                name: "nftables, ingress of a port",
                set: "nft 'add table netdev t; add chain netdev t ingress { type filter hook ingress device eth0 priority 0; }; \
                  add rule netdev t ingress udp dport 7000 drop'",
                unset: "nft delete table netdev t",
                names: &["nft table", "chain ingress"],
                ..SETTING
            },
            Setting {
                name: "nftables, connection tracking for input",
                set: "nft 'add table ip t; add chain ip t input { type filter hook input priority 0; }; \
                  add rule ip t input ct state established accept'",
                unset: "nft delete table ip t",
                effect: Effect::Passes,
                reason: "policy-conntrack",
                names: &["nft table", "chain input"],
                ..SETTING
            },
            Setting {
                name: "iptables-nft",
                set: "iptables-nft -A FORWARD -p udp -j DROP",
                unset: "iptables-nft -F; nft delete table ip filter",
                names: &["FORWARD"],
                ..SETTING
            },
            Setting {
                name: "iptables-legacy",
                set: "iptables-legacy -A FORWARD -p udp -j DROP",
                unset: "iptables-legacy -F",
                names: &["iptables-legacy", "forward"],
                ..SETTING
            },
            Setting {
                name: "iptables-legacy, policy",
                set: "iptables-legacy -P FORWARD DROP",
                unset: "iptables-legacy -P FORWARD ACCEPT",
                names: &["iptables-legacy", "forward"],
                ..SETTING
            },
            Setting {
                name: "iptables-legacy, raw table",
                set: "iptables-legacy -t raw -A PREROUTING -p udp -j DROP",
                unset: "iptables-legacy -t raw -F",
                names: &["iptables-legacy", "raw"],
                ..SETTING
            },
        ],
    );
}

#[test]
fn netfilter_holds_for_ipv6() {
    prove(
        RIGHT6,
        &[
            Setting {
                name: "nftables for both families, IPv6",
                set: "nft 'add table inet t; add chain inet t forward { type filter hook forward priority 0; policy drop; }'",
                unset: "nft delete table inet t",
                names: &["nft table", "chain forward"],
                ..SETTING
            },
            Setting {
                name: "ip6tables-legacy",
                set: "ip6tables-legacy -A FORWARD -p udp -j DROP",
                unset: "ip6tables-legacy -F",
                names: &["ip6tables-legacy", "forward"],
                ..SETTING
            },
            Setting {
                name: "XFRM policy, IPv6",
                set: "ip xfrm policy add dir fwd src ::/0 dst ::/0 action block",
                unset: "ip xfrm policy deleteall",
                reason: "policy-xfrm",
                names: &["XFRM"],
                ..SETTING
            },
            Setting {
                name: "rule, IPv6",
                set: "ip -6 rule add to 2001:db8:2::/64 blackhole",
                unset: "ip -6 rule delete to 2001:db8:2::/64 blackhole",
                reason: "policy-rule",
                names: &["IPv6 rule"],
                ..SETTING
            },
            Setting {
                name: "IPv6 MTU of a port",
                set: "sysctl -qw net.ipv6.conf.eth1.mtu=1280",
                unset: "sysctl -qw net.ipv6.conf.eth1.mtu=1500",
                effect: Effect::Passes,
                reason: "policy-sysctl",
                names: &["net.ipv6.conf.eth1.mtu"],
                ..SETTING
            },
            Setting {
                name: "IPv6 redirects accepted by a port that does not forward",
                before: "sysctl -qw net.ipv6.conf.eth1.accept_redirects=1",
                set: "sysctl -qw net.ipv6.conf.eth1.forwarding=0",
                unset: "sysctl -qw net.ipv6.conf.eth1.forwarding=1",
                effect: Effect::Passes,
                reason: "policy-sysctl",
                names: &["net.ipv6.conf.eth1.accept_redirects"],
            },
            Setting {
                name: "IPv6 forwarding off",
                set: "sysctl -qw net.ipv6.conf.all.forwarding=0",
                unset: "sysctl -qw net.ipv6.conf.all.forwarding=1",
                reason: "port-not-ready",
                ..SETTING
            },
        ],
    );
}

#[test]
fn policies_queues_and_rules_hold_for_the_stream() {
    prove(
        RIGHT,
        &[
            Setting {
                name: "XFRM policy, fwd",
                set: "ip xfrm policy add dir fwd src 0.0.0.0/0 dst 198.51.100.0/24 action block",
                unset: "ip xfrm policy deleteall",
                reason: "policy-xfrm",
                names: &["XFRM"],
                ..SETTING
            },
            Setting {
                name: "XFRM policy, out",
                set: "ip xfrm policy add dir out src 0.0.0.0/0 dst 198.51.100.0/24 action block",
                unset: "ip xfrm policy deleteall",
                reason: "policy-xfrm",
                names: &["XFRM"],
                ..SETTING
            },
            Setting {
                name: "rule",
                set: "ip rule add to 198.51.100.0/24 blackhole",
                unset: "ip rule delete to 198.51.100.0/24 blackhole",
                reason: "policy-rule",
                names: &["IPv4 rule"],
                ..SETTING
            },
            Setting {
                name: "rule for packets without a mark",
                before: "ip route replace blackhole 198.51.100.0/24 table 100",
                set: "ip rule add not fwmark 7 lookup 100",
                unset: "ip rule delete not fwmark 7 lookup 100",
                reason: "non-unicast-route",
                ..SETTING
            },
            Setting {
                name: "tbf on the way out",
                set: "tc qdisc replace dev eth1 root tbf rate 8kbit burst 200 latency 1ms",
                unset: "tc qdisc delete dev eth1 root",
                effect: Effect::Throttles,
                reason: "policy-tc",
                names: &["tbf", "eth1"],
                ..SETTING
            },
            Setting {
                name: "htb on the way out",
                set: "tc qdisc add dev eth1 root handle 1: htb default 1 && \
                  tc class add dev eth1 parent 1: classid 1:1 htb rate 8kbit burst 200 cburst 200",
                unset: "tc qdisc delete dev eth1 root",
                effect: Effect::Throttles,
                reason: "policy-tc",
                names: &["htb", "eth1"],
                ..SETTING
            },
            Setting {
                name: "tc filter at ingress",
                before: "tc qdisc add dev eth0 ingress",
                set: "tc filter add dev eth0 ingress bpf bytecode '1,6 0 0 4294967295' classid 1:1",
                unset: "tc qdisc delete dev eth0 ingress",
                reason: "policy-tc",
                effect: Effect::Passes,
                names: &["filter bpf", "eth0"],
            },
            Setting {
                name: "clsact, filter at egress",
                before: "tc qdisc add dev eth1 clsact",
                set: "tc filter add dev eth1 egress bpf bytecode '1,6 0 0 4294967295' classid 1:1",
                unset: "tc qdisc delete dev eth1 clsact",
                reason: "policy-tc",
                effect: Effect::Passes,
                names: &["filter bpf", "eth1"],
            },
        ],
    );
}

#[test]
fn sysctls_hold_for_the_stream() {
    prove(
        RIGHT,
        &[
            Setting {
                name: "path MTUs for forwarded packets",
                set: "sysctl -qw net.ipv4.ip_forward_use_pmtu=1",
                unset: "sysctl -qw net.ipv4.ip_forward_use_pmtu=0",
                effect: Effect::Passes,
                reason: "policy-sysctl",
                names: &["ip_forward_use_pmtu"],
                ..SETTING
            },
            Setting {
                name: "redirects accepted",
                before: "sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv4.conf.eth1.accept_redirects=1",
                set: "sysctl -qw net.ipv4.conf.all.accept_redirects=1",
                unset: "sysctl -qw net.ipv4.conf.all.accept_redirects=0",
                effect: Effect::Passes,
                reason: "policy-sysctl",
                names: &["accept_redirects", "eth1"],
            },
            Setting {
                name: "redirects accepted by a port that does not forward",
                before: "sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv4.conf.eth1.accept_redirects=1",
                set: "sysctl -qw net.ipv4.conf.eth1.forwarding=0",
                unset: "sysctl -qw net.ipv4.conf.eth1.forwarding=1",
                effect: Effect::Passes,
                reason: "policy-sysctl",
                names: &["accept_redirects", "eth1"],
            },
            Setting {
                name: "forwarding off on a port",
                set: "sysctl -qw net.ipv4.conf.eth0.forwarding=0",
                unset: "sysctl -qw net.ipv4.conf.eth0.forwarding=1",
                reason: "port-not-ready",
                ..SETTING
            },
            Setting {
                name: "forwarding off",
                set: "sysctl -qw net.ipv4.ip_forward=0",
                unset: "sysctl -qw net.ipv4.ip_forward=1",
                reason: "port-not-ready",
                ..SETTING
            },
            Setting {
                name: "strict reverse path filter",
                before: "ip route replace 192.0.2.2/32 dev eth1",
                set: "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
                unset: "ip route delete 192.0.2.2/32 dev eth1; sysctl -qw net.ipv4.conf.eth0.rp_filter=0",
                reason: "rp-filter",
                ..SETTING
            },
        ],
    );
}

#[test]
fn a_capture_sees_forwarded_packets_on_either_port() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let _beat = Beat::start(&net, RIGHT);
    for port in ["eth0", "eth1"] {
        carried_fast(&net);
        let counted = net.exceptions("policy-capture");
        let words = ["tcpdump", "-i", port, "-n", "-l", "-c", "1000", "udp port 7000"];
        let mut capture = net.router.spawn(words).expect("tcpdump");
        capture.wait_for_output(DEADLINE, "198.51.100.2.7000").expect("a forwarded packet");
        // An alarm comes before the policy that it is about.
        eventually("the policy is told", || {
            let policies = net.json(&["status"])["policies"].to_string();
            (policies.contains("packet socket") && policies.contains(port)).then_some(())
        });
        capture.wait(DEADLINE).expect("1000 forwarded packets");
        assert!(net.exceptions("policy-capture") >= counted + 500, "{port}");
    }
    carried_fast(&net);
}

/// A packet socket of the router for frames that are never forwarded.
fn lldp_socket(net: &Net) -> OwnedFd {
    const ETH_P_LLDP: u16 = 0x88cc;
    let open = || {
        // SAFETY: the call takes numbers and gives a new descriptor or an error.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, ETH_P_LLDP.to_be().into());
            assert!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        }
    };
    net.router.enter(open).expect("in the router")
}

#[test]
fn what_does_not_concern_forwarding_leaves_it_fast() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let _beat = Beat::start(&net, RIGHT);
    let _lldp = lldp_socket(&net);
    for line in [
        "nft 'add table inet t; add chain inet t f { type filter hook forward priority 0; policy accept; }'",
        "nft 'add chain inet t i { type filter hook input priority 0; }; add rule inet t i tcp dport 22 accept'",
        "iptables-legacy -A INPUT -p tcp --dport 22 -j ACCEPT",
        "tc qdisc replace dev eth1 root fq_codel",
        "tc qdisc replace dev eth1 root pfifo_fast",
        "sysctl -qw net.ipv4.conf.all.accept_local=1 net.ipv4.conf.all.log_martians=1 net.ipv4.conf.eth0.proxy_arp=1",
        "sysctl -qw net.ipv4.conf.eth0.rp_filter=1 net.ipv4.conf.eth1.rp_filter=2",
        "ip rule add fwmark 7 prohibit; ip rule add not fwmark 0x100/0x100 lookup 100",
    ] {
        if let Err(error) = net.router.sh(line) {
            println!("SKIP: not on this kernel: {line}: {error:#}");
            continue;
        }
        // Twice the time within which a policy must have taken effect.
        std::thread::sleep(Duration::from_millis(200));
        let policies = &net.json(&["status"])["policies"];
        assert_eq!(*policies, serde_json::json!([]), "{line}");
        net.flows(50);
    }
}

#[test]
fn where_packets_may_have_marks_rules_for_them_are_linuxs() {
    let net = Net::new();
    net.router
        .sh("ip link add near0 type veth peer name near1; ip link set near0 up; ip link set near1 up")
        .expect("a pair");
    let _daemon = net.up(&["eth0", "eth1", "near0"]);
    let reason = |port: &str| {
        let explained = net.json(&["explain", "192.0.2.2", RIGHT, "in", port]);
        explained["verdict"]["reason"].as_str().unwrap_or("fast").to_owned()
    };
    eventually("both take the fast path", || (reason("near0") == "fast" && reason("eth0") == "fast").then_some(()));
    net.ip("rule add fwmark 7 prohibit");
    eventually("what is near is Linux's", || (reason("near0") == "policy-rule").then_some(()));
    eventually("what is far is not", || (reason("eth0") == "fast").then_some(()));
    let policies = net.json(&["status"])["policies"].to_string();
    assert!(policies.contains("near0") && policies.contains("marks"), "{policies}");
    net.ip("rule delete fwmark 7 prohibit");
    eventually("it takes the fast path again", || (reason("near0") == "fast").then_some(()));
}
