//! The watchers against the real kernel: each setting made by its own tool in a fresh network namespace, seen to appear
//! as a policy and to go again; and settings that must not be in the way. Needs root. What a kernel lacks is said and
//! passed over there; the same tests run in the virtual machine, whose kernel has it.
//!
//! ```text
//!   one namespace:  g0 ===veth=== g1     (g0, g1: ports with addresses 192.0.2.1/24, 2001:db8::1/64 on g0)
//! ```

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use towpath_cm::guard::{Capture, Nftables, POLL, Rules, Sysctl, Tc, Xfrm, Xtables, sysctl::HashPolicies, watchers};
use towpath_cm::{Finding, FlowMode, Moved, PortIndex, Watcher};
use towpath_fpc::{Port, PortFamily, PortKind, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family::{V4, V6};

/// Nothing here takes this long, even in an emulated machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(20);

/// The thread's own network namespace, with two ports.
struct Lab {
    ports: PortIndex,
    g0: u32,
    g1: u32,
}

impl Lab {
    fn new() -> Self {
        // SAFETY: the call takes a number only and concerns the calling thread.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "a network namespace needs root");
        run("ip link set lo up");
        run("ip link add g0 type veth peer name g1");
        run("ip link set g0 up");
        run("ip link set g1 up");
        run("ip address add 192.0.2.1/24 dev g0");
        run("ip address add 2001:db8::1/64 dev g0 nodad");
        run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let mut ports = PortIndex::default();
        let [g0, g1] = ["g0", "g1"].map(|name| {
            ports.insert(port(name));
            index(name)
        });
        Self { ports, g0, g1 }
    }
}

fn index(name: &str) -> u32 {
    let name = CString::new(name).unwrap();
    // SAFETY: the name is a string with its NUL that lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "no interface {name:?}");
    index
}

fn port(name: &str) -> Port {
    Port {
        ifindex: index(name),
        name: name.into(),
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
        kind: PortKind::Virtual,
        up: true,
        carrier: true,
        master: 0,
        vrf: None,
        promiscuous: false,
        family: [PortFamily { forwarding: true, ignore_linkdown: false }; 2],
        send_redirects: true,
        rp_filter: 0,
        route_localnet: false,
        unsupported: None,
    }
}

/// Runs a command line, which must succeed.
fn run(command: &str) {
    assert!(works(command), "{command} failed");
}

/// Runs a command line; false if it fails.
fn works(command: &str) -> bool {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    if !output.status.success() {
        eprintln!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    output.status.success()
}

/// What a test needs and this kernel has not. Where nothing may be passed over, that is a failure.
fn lacks(what: &str) {
    assert!(std::env::var_os("TOWPATH_NO_SKIP").is_none(), "{what}: must not be lacking here");
    println!("lacking here, passed over: {what}");
}

/// Whether the command line works at all here.
fn offers(command: &str) -> bool {
    let works = works(command);
    if !works {
        lacks(command);
    }
    works
}

/// Whether the kernel is of this version or later.
fn kernel_since(version: (u32, u32)) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= version
}

/// A watcher with what it told last.
struct Watched {
    watcher: Box<dyn Watcher>,
    policies: Vec<Finding>,
}

impl Watched {
    fn new(watcher: impl Watcher + 'static, ports: &PortIndex) -> Self {
        let mut watcher: Box<dyn Watcher> = Box::new(watcher);
        let policies = watcher.findings(ports).unwrap();
        Self { watcher, policies }
    }

    /// Waits as CM's loop does, then polls once.
    fn turn(&mut self, ports: &PortIndex) {
        let mut fds: Vec<_> = self
            .watcher
            .fds()
            .iter()
            .map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 })
            .collect();
        let timeout = self.watcher.interval().unwrap_or(Duration::from_millis(500)).as_millis() as i32;
        // SAFETY: the array lives through the call and its length is given.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        self.policies = self.watcher.findings(ports).unwrap();
    }

    fn wait(&mut self, what: &str, ports: &PortIndex, done: impl Fn(&[Finding]) -> bool) -> Duration {
        let start = Instant::now();
        while !done(&self.policies) {
            assert!(start.elapsed() < DEADLINE, "{what}: still {:#?}", self.policies);
            self.turn(ports);
        }
        start.elapsed()
    }

    /// `command` brings exactly these policies; then `undo` takes all away. Says how long each took.
    fn comes_and_goes(&mut self, ports: &PortIndex, command: &str, expected: &[(Scope, Reason)], undo: &str) {
        assert_eq!(self.policies, [], "before {command}");
        let expected: BTreeSet<_> = expected.iter().copied().collect();
        run(command);
        let came = self.wait(command, ports, |p| {
            p.iter().map(|policy| (policy.scope, policy.reason)).collect::<BTreeSet<_>>() == expected
        });
        let detail = self.policies.first().map(|policy| policy.detail.clone()).unwrap_or_default();
        run(undo);
        let went = self.wait(undo, ports, |p| p.is_empty());
        println!("{:8.2} ms, gone {:8.2} ms  {command}: {detail}", came.as_secs_f64() * 1e3, went.as_secs_f64() * 1e3);
    }

    /// `command` brings no policy. To know that it has been seen, `marker` (which does) follows, and is taken back.
    fn is_harmless(&mut self, ports: &PortIndex, command: &str, undo: &str, marker: &str, unmark: &str) {
        run(command);
        self.turn(ports);
        assert_eq!(self.policies, [], "after {command}");
        run(marker);
        self.wait(marker, ports, |p| !p.is_empty());
        run(unmark);
        self.wait(unmark, ports, |p| p.is_empty());
        run(undo);
        self.turn(ports);
        assert_eq!(self.policies, [], "after {undo}");
    }
}

const fn family(family: towpath_tables::record::Family, reason: Reason) -> (Scope, Reason) {
    (Scope::Family(family), reason)
}

const NETFILTER: Reason = Reason::PolicyNetfilter;
const CONNTRACK: Reason = Reason::PolicyConntrack;

#[test]
fn nft_rules_on_the_way() {
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    let both = [family(V4, NETFILTER), family(V6, NETFILTER)];
    let flush = "nft flush ruleset";
    for hook in ["prerouting", "forward", "postrouting"] {
        let rule = format!(
            "nft 'add table inet t; add chain inet t c {{ type filter hook {hook} priority 0; }}; \
                            add rule inet t c counter'"
        );
        nft.comes_and_goes(&lab.ports, &rule, &both, flush);
    }
    for (name, scope) in [("ip", V4), ("ip6", V6)] {
        let drop = format!(
            "nft 'add table {name} t; add chain {name} t c {{ type filter hook forward priority 0; \
                            policy drop; }}'"
        );
        nft.comes_and_goes(&lab.ports, &drop, &[family(scope, NETFILTER)], flush);
    }
    let ingress = "nft 'add table netdev t; add chain netdev t c { type filter hook ingress device g1 priority 0; }; \
                   add rule netdev t c counter'";
    nft.comes_and_goes(&lab.ports, ingress, &[(Scope::Ingress(lab.g1, None), NETFILTER)], flush);
    let inet_ingress = "nft 'add table inet t; add chain inet t c { type filter hook ingress device g0 priority 0; }; \
                        add rule inet t c counter'";
    nft.comes_and_goes(&lab.ports, inet_ingress, &[(Scope::Ingress(lab.g0, None), NETFILTER)], flush);
    let egress = "nft 'add table netdev t; add chain netdev t c { type filter hook egress devices = { g0, g1 } \
                  priority 0; }; add rule netdev t c counter'";
    let both_ports = [(Scope::Egress(lab.g0, None), NETFILTER), (Scope::Egress(lab.g1, None), NETFILTER)];
    if offers(egress) {
        run(flush);
        nft.wait(flush, &lab.ports, |p| p.is_empty());
        nft.comes_and_goes(&lab.ports, egress, &both_ports, flush);
    }
}

#[test]
fn nft_connection_tracking_anywhere() {
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    let both = [family(V4, CONNTRACK), family(V6, CONNTRACK)];
    let flush = "nft flush ruleset";
    let input = |rule: &str| {
        format!(
            "nft 'add table inet t; add chain inet t c {{ type filter hook input priority 0; }}; \
                 add rule inet t c {rule}'"
        )
    };
    nft.comes_and_goes(&lab.ports, &input("ct state established accept"), &both, flush);
    nft.comes_and_goes(&lab.ports, &input("ct mark 1 counter"), &both, flush);
    let nowhere = "nft 'add table inet t; add chain inet t unused; add rule inet t unused ct state new'";
    nft.comes_and_goes(&lab.ports, nowhere, &both, flush);
    let helper = "nft 'add table ip t; add ct helper ip t h { type \"ftp\" protocol tcp; }'";
    if offers(helper) {
        run(flush);
        nft.wait(flush, &lab.ports, |p| p.is_empty());
        nft.comes_and_goes(&lab.ports, helper, &[family(V4, CONNTRACK)], flush);
    }
    let masquerade = "nft 'add table ip t; add chain ip t c { type nat hook postrouting priority 100; }; \
                      add rule ip t c masquerade'";
    nft.comes_and_goes(&lab.ports, masquerade, &[family(V4, NETFILTER), family(V4, CONNTRACK)], flush);
    let limit = "nft 'add table ip t; add set ip t s { type ipv4_addr; flags dynamic; }; \
                 add chain ip t c { type filter hook input priority 0; }; \
                 add rule ip t c add @s { ip saddr ct count 20 }'";
    if offers(limit) {
        run(flush);
        nft.wait(flush, &lab.ports, |p| p.is_empty());
        nft.comes_and_goes(&lab.ports, limit, &[family(V4, CONNTRACK)], flush);
    }
}

#[test]
fn nft_flowtables() {
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    let flowtable = "nft 'add table inet t; add flowtable inet t f { hook ingress priority 0; devices = { g0, g1 }; }'";
    if !offers(flowtable) {
        return;
    }
    run("nft flush ruleset; nft delete flowtable inet t f 2>/dev/null; nft delete table inet t 2>/dev/null; true");
    nft.wait("flush", &lab.ports, |p| p.is_empty());
    let expected = [(Scope::Ingress(lab.g0, None), CONNTRACK), (Scope::Ingress(lab.g1, None), CONNTRACK)];
    nft.comes_and_goes(&lab.ports, flowtable, &expected, "nft delete table inet t");
}

#[test]
fn nft_that_is_not_in_the_way() {
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    let (mark, unmark) = (
        "nft 'add table ip6 m; add chain ip6 m c { type filter hook forward priority 0; policy drop; }'",
        "nft delete table ip6 m",
    );
    let mut harmless = |command: &str| nft.is_harmless(&lab.ports, command, "nft flush ruleset", mark, unmark);
    harmless("nft 'add table inet t; add chain inet t c { type filter hook forward priority 0; }'");
    harmless("nft 'add table ip t; add chain ip t c { type nat hook postrouting priority 100; }'");
    harmless(
        "nft 'add table inet t; add chain inet t c { type filter hook input priority 0; policy drop; }; \
              add rule inet t c tcp dport 22 accept'",
    );
    harmless("nft 'add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c counter'");
    harmless(
        "nft 'add table inet t { flags dormant; }; add chain inet t c { type filter hook forward priority 0; \
              policy drop; }; add rule inet t c counter'",
    );
    harmless(
        "nft 'add table arp t; add chain arp t c { type filter hook input priority 0; }; add rule arp t c counter'",
    );
    harmless("nft 'add table inet t; add set inet t s { type ipv4_addr; }; add element inet t s { 192.0.2.7 }'");
    harmless("iptables-nft -L; iptables-nft -t nat -L; iptables-nft -P INPUT DROP");
}

#[test]
fn iptables_nft() {
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    for (tool, scope) in [("iptables-nft", V4), ("ip6tables-nft", V6)] {
        let only = |reason| [family(scope, reason)];
        let undo = |table: &str| format!("{tool} -t {table} -F");
        nft.comes_and_goes(
            &lab.ports,
            &format!("{tool} -A FORWARD -p tcp --dport 25 -j DROP"),
            &only(NETFILTER),
            &undo("filter"),
        );
        nft.comes_and_goes(
            &lab.ports,
            &format!("{tool} -P FORWARD DROP"),
            &only(NETFILTER),
            &format!("{tool} -P FORWARD ACCEPT"),
        );
        nft.comes_and_goes(
            &lab.ports,
            &format!("{tool} -A INPUT -m conntrack --ctstate NEW -j ACCEPT"),
            &only(CONNTRACK),
            &undo("filter"),
        );
        nft.comes_and_goes(
            &lab.ports,
            &format!("{tool} -t nat -A POSTROUTING -o g1 -j MASQUERADE"),
            &[family(scope, NETFILTER), family(scope, CONNTRACK)],
            &undo("nat"),
        );
        nft.comes_and_goes(
            &lab.ports,
            &format!("{tool} -t mangle -A PREROUTING -j MARK --set-mark 1"),
            &only(NETFILTER),
            &undo("mangle"),
        );
    }
}

/// What of the rules no connection may pass, in the words behind the place; without the family.
fn barriers(ports: &PortIndex) -> BTreeSet<String> {
    let found = Nftables::new(FlowMode::Established).unwrap().findings(ports).unwrap();
    let no = found.iter().filter_map(|finding| finding.detail.strip_suffix(" (no connection may pass)"));
    no.map(|detail| detail.rsplit_once(": ").map_or(detail, |(_, what)| what).to_owned()).collect()
}

/// Makes a table of chains, which may lead to `c1`; false if the kernel lacks something.
fn forwarding(chains: &str) -> bool {
    run("nft flush ruleset");
    let text = format!("table inet t {{ {chains}\n}}");
    offers(&format!("nft -f - <<'END'\n{text}\nEND"))
}

fn forward(rules: &str) -> bool {
    forwarding(&format!("chain c {{ type filter hook forward priority 0; {rules}; }}"))
}

#[test]
fn no_connection_passes_a_rule_that_may_answer_each_packet_differently() {
    let lab = Lab::new();
    for (rule, what) in [
        ("limit rate 5/second accept", "limit"),
        ("udp dport 53 limit rate over 5/second drop", "limit"),
        ("quota over 10 mbytes drop", "quota"),
        ("ct count over 10 drop", "connlimit"),
        ("numgen random mod 10 < 3 drop", "numgen"),
        ("numgen inc mod 10 vmap { 0 : drop, 1 : accept }", "numgen"),
        ("meta time > \"2020-01-01 00:00:00\" drop", "meta time"),
        ("meta day \"Monday\" drop", "meta day"),
        ("meta hour \"08:00\"-\"17:00\" drop", "meta hour"),
        ("meta random < 1000 drop", "meta random"),
        ("meta cpu 0 drop", "meta cpu"),
        ("meta length > 1000 drop", "meta length"),
        ("meta priority 1:1 drop", "meta priority"),
        ("ct bytes > 1000 drop", "ct bytes"),
        ("ct original packets > 10 drop", "ct packets"),
        ("ct avgpkt > 1000 drop", "ct avgpkt"),
        ("ct expiration < 10s drop", "ct expiration"),
        ("ct status assured drop", "ct status"),
        ("ip dscp cs1 drop", "payload (network header, byte 1)"),
        ("ip ttl < 5 drop", "payload (network header, byte 8)"),
        ("ip length > 100 drop", "payload (network header, byte 2)"),
        ("ip6 hoplimit < 5 drop", "payload (network header, byte 7)"),
        ("ether saddr 02:00:00:00:00:01 drop", "payload (link header, byte 6)"),
        ("tcp flags psh drop", "payload (transport header, byte 13)"),
        ("tcp window < 10 drop", "payload (transport header, byte 14)"),
        ("udp length > 100 drop", "payload (transport header, byte 4)"),
        ("@th,64,32 0x1 drop", "payload (transport header, byte 8)"),
        ("tcp option sack-perm exists drop", "exthdr"),
        ("meta mark set ip dscp map { cs1 : 1 }", "payload (network header, byte 1)"),
        ("ct mark set meta length", "meta length"),
        ("limit rate 5/second meta mark set 1", "limit"),
        ("limit rate 5/second jump { ip saddr 192.0.2.1 drop; }", "limit"),
        ("rt ip nexthop 192.0.2.1 drop", "rt"),
        ("symhash mod 2 0 drop", "hash"),
        ("jhash ip saddr . ip length mod 2 0 drop", "payload (network header, byte 2)"),
        ("ct state established limit rate 5/second accept; ct state established accept", "limit"),
        ("ct state established ip saddr 192.0.2.1 accept; limit rate 5/second accept", "limit"),
        ("meta l4proto tcp ct state established accept; limit rate 5/second accept", "limit"),
        ("iifname vmap { g0 : accept }; limit rate 5/second accept", "limit"),
        ("limit rate 5/second ct state new accept", "limit"),
        ("limit rate 5/second ct state vmap { new : accept }", "limit"),
        ("limit rate 5/second tcp flags syn log ct mark set 1", "limit"),
        ("meta l4proto tcp numgen inc mod 16 0 ct state new ct mark set 2", "numgen"),
        ("quota until 10 mbytes ct state new accept", "quota"),
        ("ct count over 10 ct state new drop", "connlimit"),
    ] {
        if forward(rule) {
            assert_eq!(
                barriers(&lab.ports),
                BTreeSet::from([format!("{what} may answer each packet differently")]),
                "{rule}"
            );
        }
    }
    for (chains, what) in [
        ("set s { type ipv4_addr; flags timeout; }; @ip saddr @s drop", "set s"),
        ("set s { type ipv4_addr; flags dynamic; size 9; }; @ip saddr @s drop", "set s"),
        ("set s { type ipv4_addr; flags dynamic; size 9; }; @add @s { ip saddr }", "dynset"),
        (
            "set s { type ipv4_addr; flags dynamic; size 9; }; @add @s { ip saddr limit rate over 5/second } drop",
            "dynset",
        ),
        ("set s { type ipv4_addr; limit rate 5/second; }; @ip saddr @s drop", "set s"),
        ("quota q { over 10 mbytes; }; @quota name q drop", "quota"),
        ("limit l { rate 5/second; }; @limit name l drop", "limit"),
        ("quota q { over 10 mbytes; }; @quota name q ct state new drop", "quota"),
        ("quota q { over 10 mbytes; }; @quota name q counter", "quota"),
        ("set s { type ipv4_addr; limit rate 5/second; }; @ip saddr @s counter", "set s"),
        ("map m { type ipv4_addr : quota; }; @quota name ip saddr map @m drop", "quota"),
        ("map m { type ipv4_addr : verdict; flags timeout; }; @ip saddr vmap @m", "set m"),
        ("chain d { limit rate 5/second drop; }; @goto d", "limit"),
        ("chain d { limit rate 5/second drop; }; @tcp dport vmap { 80 : jump d }", "limit"),
        ("chain d { limit rate 5/second drop; }; @tcp dport vmap { 80-90 : jump d }", "limit"),
        ("map m { type inet_service : verdict; }; chain d { limit rate 5/second drop; }; @tcp dport vmap @m", "limit"),
        ("chain d { return; limit rate 1/day accept; }; @jump d; limit rate 5/second accept", "limit"),
    ] {
        let (sets, rules) = chains.split_once('@').unwrap();
        if forwarding(&format!("{sets} chain c {{ type filter hook forward priority 0; {rules}; }}")) {
            assert_eq!(
                barriers(&lab.ports),
                BTreeSet::from([format!("{what} may answer each packet differently")]),
                "{chains}"
            );
        }
    }
    for priority in [-300, -200] {
        let rules = "ct state established accept; limit rate 5/second accept";
        assert!(forwarding(&format!("chain c {{ type filter hook prerouting priority {priority}; {rules}; }}")));
        assert_eq!(barriers(&lab.ports).len(), 1, "nothing is tracked yet");
    }
    let raw = "chain r { type filter hook prerouting priority raw; udp dport 53 notrack; };";
    let rules = "ct state established accept; limit rate 5/second accept";
    assert!(forwarding(&format!("{raw} chain c {{ type filter hook forward priority 0; {rules}; }}")));
    assert_eq!(barriers(&lab.ports).len(), 1, "some are not tracked");
}

#[test]
fn connections_pass_rules_that_answer_all_their_packets_the_same_or_that_they_never_meet() {
    let lab = Lab::new();
    for rules in [
        "ct state established,related accept; limit rate 5/second accept",
        "ct state { established, related } accept; limit rate 5/second accept",
        "ct state vmap { invalid : drop, established : accept, related : accept }; limit rate 5/second accept",
        "ct state != new accept; quota over 10 mbytes drop",
        "ct state new limit rate 5/second accept",
        "ct state { new, untracked } limit rate 5/second accept",
        "ct status seen-reply accept; limit rate 5/second accept",
        "tcp flags syn limit rate 5/second accept",
        "tcp flags & (fin | syn | rst | ack) == syn limit rate 5/second accept",
        "tcp flags & (fin | syn | rst | psh | ack | urg) == 0x0 limit rate 5/second drop",
        "tcp flags syn tcp option maxseg size set rt mtu",
        "tcp option maxseg size set 1400",
        "icmp type echo-request limit rate 5/second accept",
        "meta l4proto { icmp, ipv6-icmp } limit rate 5/second accept",
        "ip frag-off & 0x1fff != 0 limit rate 5/second drop",
        "limit rate 5/second log prefix \"seen\"",
        "meta length > 1000 counter",
        "limit rate 5/second counter",
        "limit rate 5/second ct state new log",
        "numgen random mod 10 < 3 ct state new drop",
        "meta length > 1000 ct state vmap { new : drop }",
        "ip saddr 192.0.2.1 tcp dport 80 iifname g0 oifname g1 meta mark 1 ct mark 2 accept",
        "ip saddr . tcp dport { 192.0.2.1 . 80, 192.0.2.2 . 81 } accept",
        "ip6 daddr 2001:db8::/32 udp sport 1-1023 drop",
        "ct direction reply ct original ip saddr 192.0.2.1 ct status dnat accept",
        "meta mark set tcp dport map { 80 : 1, 443 : 2 }",
        "meta mark set jhash ip saddr . ip daddr mod 4",
        "ct mark set meta mark and 0xff; meta mark set ct mark",
        "ct label 1 drop",
        "ct label set 1",
        "iifgroup 1 oifgroup 2 drop",
        "fib saddr . iif oif missing drop",
        "fib daddr . mark oifname \"g1\" accept",
        "fib saddr type { local, broadcast } drop",
        "tcp dport vmap { 80 : accept, 443 : drop }",
        "ip saddr 192.0.2.1 drop; accept; limit rate 5/second drop",
        "meta pkttype broadcast limit rate 5/second drop",
        "meta nfproto vmap { ipv4 : accept, ipv6 : accept }; limit rate 5/second drop",
        "jump { ct state established accept; }; limit rate 5/second accept",
        "goto { ip saddr 192.0.2.1 drop; }; limit rate 5/second accept",
    ] {
        if forward(rules) {
            assert_eq!(barriers(&lab.ports), BTreeSet::new(), "{rules}");
        }
    }
    for chains in [
        "set s { type ipv4_addr; counter; }; chain c { type filter hook forward priority 0; ip saddr @s drop; }",
        "chain c { type nat hook postrouting priority 100; limit rate 5/second masquerade; }",
        "chain c { type filter hook input priority 0; limit rate 5/second accept; }",
        "chain c { type filter hook output priority 0; limit rate 5/second accept; }",
        "chain c { limit rate 5/second accept; }",
        "chain d { limit rate 5/second accept; }; chain c { type filter hook forward priority 0; ct state vmap { new : jump d }; }",
        "chain d { limit rate 5/second drop; }; chain e { udp dport 53 accept; }; \
         chain c { type filter hook forward priority 0; meta l4proto vmap { icmp : jump d, tcp : jump e }; }",
        "chain d { udp dport 53 accept; }; chain e { limit rate 5/second drop; }; \
         chain c { type filter hook forward priority 0; iifname vmap { g0 : jump d, g1 : return }; }",
        "flags dormant; chain c { type filter hook forward priority 0; limit rate 5/second accept; }",
        "counter n { }; chain c { type filter hook forward priority 0; counter name n; }",
    ] {
        if forwarding(chains) {
            assert_eq!(barriers(&lab.ports), BTreeSet::new(), "{chains}");
        }
    }
    assert!(forwarding("chain c { type filter hook forward priority 0; meta nfproto ipv4 limit rate 5/second drop; }"));
    let found = Nftables::new(FlowMode::Established).unwrap().findings(&lab.ports).unwrap();
    let passed = |family| found.iter().filter(|f| f.scope == Scope::Family(family)).all(|f| f.flows.is_some());
    assert_eq!((passed(V4), passed(V6)), (false, true), "{found:#?}");
    let in_flowtables = Nftables::new(FlowMode::Flowtable).unwrap().findings(&lab.ports).unwrap();
    assert!(!in_flowtables.iter().any(|found| found.detail.contains("differently")), "Linux's own go past it, too");
}

/// What a watcher says that no connection may pass now, by family.
fn stops(nft: &mut Nftables, ports: &PortIndex) -> [BTreeSet<String>; 2] {
    let found = nft.findings(ports).unwrap();
    for finding in &found {
        assert_eq!(finding.momentary, finding.detail.contains("just changed"), "{finding:?}");
    }
    [V4, V6].map(|of| {
        let of = found.iter().filter(|finding| finding.scope == Scope::Family(of));
        of.filter_map(|finding| finding.detail.strip_suffix(" (no connection may pass)").map(str::to_owned)).collect()
    })
}

#[test]
fn connections_pass_rules_that_ask_for_routes_and_interfaces_while_these_stand() {
    let lab = Lab::new();
    if !forward("fib saddr . iif oif missing drop") {
        return;
    }
    let says = |what: &str| BTreeSet::from([format!("nft table inet t, chain c: fib asks for routes, which {what}")]);
    let mut nft = Nftables::new(FlowMode::Established).unwrap();
    let nothing = || [BTreeSet::new(), BTreeSet::new()];
    assert_eq!(stops(&mut nft, &lab.ports), nothing());
    let quiet = |nft: &mut Nftables| {
        let begin = Instant::now();
        while stops(nft, &lab.ports) != nothing() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", stops(nft, &lab.ports));
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for (of, expected) in
        [(V4, [says("have just changed"), BTreeSet::new()]), (V6, [BTreeSet::new(), says("have just changed")])]
    {
        assert!(nft.moved(Moved::routes_of(of), [false; 2]), "it must be polled");
        assert_eq!(stops(&mut nft, &lab.ports), expected);
        assert!(!nft.moved(Moved::routes_of(of), [false; 2]), "it stands in the way already");
        quiet(&mut nft);
    }
    assert!(nft.moved(Moved { links: true, routes: [false; 2] }, [false; 2]));
    let links = BTreeSet::from(["the name or group of an interface has just changed".to_owned()]);
    assert_eq!(stops(&mut nft, &lab.ports), [links.clone(), links]);
    quiet(&mut nft);
    assert!(nft.moved(Moved::default(), [false, true]));
    assert_eq!(stops(&mut nft, &lab.ports), [BTreeSet::new(), says("may answer each packet differently")]);
    assert!(!nft.moved(Moved::default(), [false, true]));
    assert!(nft.moved(Moved::default(), [false; 2]));
    assert_eq!(stops(&mut nft, &lab.ports), nothing());

    // Who does not ask does not mind, nor who asks where no packet of a connection gets.
    for rules in ["ip saddr 192.0.2.1 accept", "ct state established accept; fib saddr . iif oif missing drop"] {
        assert!(forward(rules));
        nft.moved(Moved::ROUTES, [true; 2]);
        assert_eq!(stops(&mut nft, &lab.ports), nothing(), "{rules}");
    }
    // What is in a flowtable goes past them in Linux, too.
    let mut flowtable = Nftables::new(FlowMode::Flowtable).unwrap();
    assert!(!flowtable.moved(Moved::ROUTES, [true; 2]));
}

#[test]
fn iptables_nft_rules_that_may_answer_each_packet_differently() {
    let lab = Lab::new();
    for (rules, what) in [
        ("-m limit --limit 5/s -j ACCEPT", Some("limit")),
        ("-m time --timestart 08:00 -j DROP", Some("match time")),
        ("-m recent --name r --set -j DROP", Some("match recent")),
        ("-m connbytes --connbytes 1000 --connbytes-dir both --connbytes-mode bytes -j DROP", Some("match connbytes")),
        ("-m connlimit --connlimit-above 5 -j DROP", Some("match connlimit")),
        ("-m hashlimit --hashlimit-name h --hashlimit-above 5/s -j DROP", Some("match hashlimit")),
        ("-m statistic --mode random --probability 0.5 -j DROP", Some("match statistic")),
        ("-m quota --quota 1000 -j DROP", Some("match quota")),
        ("-m quota --quota 1000 -m conntrack --ctstate NEW -j DROP", Some("match quota")),
        ("-m recent --name r --set", Some("match recent")),
        ("-m length --length 100: -m conntrack --ctstate NEW -j DROP", None),
        ("-m length --length 100: -j DROP", Some("match length")),
        ("-m ttl --ttl-lt 5 -j DROP", Some("match ttl")),
        ("-m conntrack --ctexpire 1:10 -j DROP", Some("match conntrack")),
        ("-m conntrack --ctstate ESTABLISHED -s 192.0.2.1 -j ACCEPT\n-m limit --limit 5/s -j ACCEPT", Some("limit")),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-m limit --limit 5/s -j ACCEPT", None),
        ("-m state --state RELATED,ESTABLISHED -j ACCEPT\n-m recent --name r --set -j DROP", None),
        ("-m conntrack --ctstate NEW -m recent --name r --set -j DROP", None),
        ("-m conntrack ! --ctstate ESTABLISHED -m recent --name r --set -j DROP", None),
        ("-p tcp --syn -m hashlimit --hashlimit-name h --hashlimit-above 5/s -j DROP", None),
        ("-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu", None),
        ("-p icmp -m limit --limit 5/s -j ACCEPT", None),
        ("-m limit --limit 5/s -j LOG", None),
        ("-p udp -m multiport --dports 53,54 -m comment --comment x -m mark --mark 1 -j DROP", None),
        ("-m conntrack --ctstate DNAT -j ACCEPT", None),
        ("-m addrtype --dst-type LOCAL -j DROP", None),
        ("-m devgroup --src-group 1 -j DROP", None),
        ("-m mac --mac-source 02:00:00:00:00:01 -j DROP", Some("match mac")),
    ] {
        run("nft flush ruleset");
        if rules.lines().all(|rule| offers(&format!("iptables-nft -A FORWARD {rule}"))) {
            let expected = what.map(|what| format!("{what} may answer each packet differently"));
            let found = barriers(&lab.ports);
            // Some versions translate what others leave as it is.
            let found: BTreeSet<_> = found.into_iter().map(|text| text.replace("match limit", "limit")).collect();
            assert_eq!(found, expected.into_iter().collect(), "{rules}");
        }
    }
}

#[test]
fn iptables_legacy() {
    let lab = Lab::new();
    let mut xtables = Watched::new(Xtables::new().unwrap(), &lab.ports);
    for (tool, scope) in [("iptables-legacy", V4), ("ip6tables-legacy", V6)] {
        if !offers(&format!("{tool} -L -n")) {
            continue;
        }
        let only = |reason| [family(scope, reason)];
        let undo = |table: &str| format!("{tool} -t {table} -F");
        let mut case = |rule: &str, reason: Reason, undo: &str| {
            xtables.comes_and_goes(&lab.ports, &format!("{tool} {rule}"), &only(reason), undo);
        };
        case("-A FORWARD -p tcp --dport 25 -j DROP", NETFILTER, &undo("filter"));
        // The table keeps its size and number of entries.
        case("-P FORWARD DROP", NETFILTER, &format!("{tool} -P FORWARD ACCEPT"));
        case("-A INPUT -m conntrack --ctstate NEW -j ACCEPT", CONNTRACK, &undo("filter"));
        case("-A OUTPUT -m state --state NEW -j ACCEPT", CONNTRACK, &undo("filter"));
        case("-t mangle -A PREROUTING -j MARK --set-mark 1", NETFILTER, &undo("mangle"));
        case("-t raw -A PREROUTING -p udp -j ACCEPT", NETFILTER, &undo("raw"));
        case("-t nat -A POSTROUTING -j MASQUERADE", NETFILTER, &undo("nat"));
        case(
            "-t nat -A OUTPUT -d ::/0 -j REDIRECT".replace("::/0", if scope == V4 { "0/0" } else { "::/0" }).as_str(),
            CONNTRACK,
            &undo("nat"),
        );
        // A rule replaced by another of the same size in a chain that does not matter.
        run(&format!("{tool} -A INPUT -p tcp --dport 25 -j DROP"));
        xtables.is_harmless(
            &lab.ports,
            &format!("{tool} -R INPUT 1 -p tcp --dport 26 -j DROP"),
            &format!("{tool} -F; {tool} -P INPUT DROP; {tool} -P INPUT ACCEPT"),
            &format!("{tool} -P FORWARD DROP"),
            &format!("{tool} -P FORWARD ACCEPT"),
        );
    }
}

#[test]
fn iptables_legacy_tables_are_not_made_by_looking() {
    let lab = Lab::new();
    let mut xtables = Watched::new(Xtables::new().unwrap(), &lab.ports);
    xtables.turn(&lab.ports);
    for names in ["ip_tables_names", "ip6_tables_names"] {
        let tables = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        assert_eq!(tables, "");
    }
}

#[test]
fn xfrm_policies() {
    let lab = Lab::new();
    let mut xfrm = Watched::new(Xfrm::new().unwrap(), &lab.ports);
    let reason = Reason::PolicyXfrm;
    for direction in ["out", "fwd"] {
        let policy = format!("src 198.51.100.0/24 dst 203.0.113.0/24 dir {direction}");
        let add = format!("ip xfrm policy add {policy} tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel");
        xfrm.comes_and_goes(&lab.ports, &add, &[family(V4, reason)], &format!("ip xfrm policy delete {policy}"));
    }
    let six = "ip xfrm policy add src 2001:db8:1::/48 dst 2001:db8:2::/48 dir fwd action block";
    xfrm.comes_and_goes(&lab.ports, six, &[family(V6, reason)], "ip xfrm policy flush");
    let both = [family(V4, reason), family(V6, reason)];
    let (block, accept) = ("ip xfrm policy setdefault fwd block", "ip xfrm policy setdefault fwd accept");
    xfrm.comes_and_goes(&lab.ports, block, &both, accept);
    xfrm.is_harmless(
        &lab.ports,
        "ip xfrm policy add src 198.51.100.0/24 dst 203.0.113.0/24 dir in action block",
        "ip xfrm policy flush",
        block,
        accept,
    );
}

#[test]
fn routing_rules() {
    let mut lab = Lab::new();
    let mut rules = Watched::new(Rules::new().unwrap(), &lab.ports);
    let reason = Reason::PolicyRule;
    for (tool, scope, prefix) in [("ip", V4, "198.51.100.0/24"), ("ip -6", V6, "2001:db8:1::/48")] {
        for rule in [
            format!("from {prefix} lookup 100"),
            "fwmark 1 lookup 100".into(),
            "iif g0 lookup 100".into(),
            "lookup main suppress_prefixlength 0 pref 100".into(),
            "dport 25 ipproto tcp blackhole".into(),
            "lookup 100 pref 40000".into(),
        ] {
            let (add, delete) = (format!("{tool} rule add {rule}"), format!("{tool} rule delete {rule}"));
            rules.comes_and_goes(&lab.ports, &add, &[family(scope, reason)], &delete);
        }
        let swap = format!(
            "{tool} rule add pref 32766 lookup local; {tool} rule add pref 32767 lookup local; \
                            {tool} rule delete pref 0"
        );
        let back = format!(
            "{tool} rule add pref 0 lookup local; while {tool} rule delete pref 32766 lookup local; do :; \
                            done; {tool} rule delete pref 32767 lookup local"
        );
        rules.comes_and_goes(&lab.ports, &swap, &[family(scope, reason)], &back);
        let (add, delete) = (format!("{tool} rule add l3mdev pref 1000"), format!("{tool} rule del pref 1000"));
        rules.comes_and_goes(&lab.ports, &add, &[family(scope, reason)], &delete);
        rules.is_harmless(
            &lab.ports,
            &format!("{tool} rule add pref 500 lookup local; {tool} rule del pref 0"),
            &format!("{tool} rule add pref 0 lookup local; {tool} rule del pref 500"),
            &format!("{tool} rule add lookup 100 pref 5"),
            &format!("{tool} rule delete lookup 100 pref 5"),
        );
    }
    // What comes from the same namespace may have a mark.
    lab.ports.set_peer(lab.g0, Some(lab.g1));
    let ingress = |port| (Scope::Ingress(port, Some(V4)), reason);
    let (add, delete) = ("ip rule add fwmark 1 lookup 100", "ip rule delete fwmark 1 lookup 100");
    rules.comes_and_goes(&lab.ports, add, &[family(V4, reason), ingress(lab.g0), ingress(lab.g1)], delete);
}

#[test]
fn qdiscs() {
    let lab = Lab::new();
    let mut tc = Watched::new(Tc::new().unwrap(), &lab.ports);
    let egress = [(Scope::Egress(lab.g0, None), Reason::PolicyTc)];
    let undo = "tc qdisc delete dev g0 root";
    let mut tried = 0;
    for qdisc in [
        "tbf rate 1mbit burst 10k latency 50ms",
        "htb",
        "netem delay 1ms",
        "prio",
        "sfq",
        "cake",
        "red limit 1m avpkt 1000",
        "fq maxrate 1mbit",
    ] {
        let add = format!("tc qdisc add dev g0 root {qdisc}");
        if offers(&add) {
            run(undo);
            tc.wait(undo, &lab.ports, |p| p.is_empty());
            tc.comes_and_goes(&lab.ports, &add, &egress, undo);
            tried += 1;
        }
    }
    assert!(tried >= 2, "tbf and htb at least");
    let (mark, unmark) = ("tc qdisc add dev g1 root tbf rate 1mbit burst 10k latency 50ms", "tc qdisc del dev g1 root");
    for qdisc in ["root pfifo limit 100", "root bfifo limit 10000", "root fq_codel", "root fq", "clsact", "ingress"] {
        let add = format!("tc qdisc add dev g0 {qdisc}");
        let undo = format!("tc qdisc delete dev g0 {}", qdisc.split(' ').next().unwrap());
        if offers(&add) {
            run(&undo);
            tc.turn(&lab.ports);
            tc.is_harmless(&lab.ports, &add, &undo, mark, unmark);
        }
    }
}

#[test]
fn child_qdiscs_below_a_queue_for_each_ring() {
    let lab = Lab::new();
    run("ip link add g2 numtxqueues 2 type veth peer name g3 numrxqueues 2");
    run("ip link set g2 up");
    let mut tc = Watched::new(Tc::new().unwrap(), &lab.ports);
    if !offers("tc qdisc replace dev g2 root handle 1: mq") {
        return;
    }
    tc.comes_and_goes(
        &lab.ports,
        "tc qdisc add dev g2 parent 1:1 tbf rate 1mbit burst 10k latency 50ms",
        &[(Scope::Egress(index("g2"), None), Reason::PolicyTc)],
        "tc qdisc delete dev g2 parent 1:1",
    );
}

#[test]
fn tc_filters() {
    let lab = Lab::new();
    let mut tc = Watched::new(Tc::new().unwrap(), &lab.ports);
    let reason = Reason::PolicyTc;
    run("tc qdisc add dev g0 clsact; tc qdisc add dev g1 ingress");
    let matching = "protocol ip pref 1 u32 match ip dst 192.0.2.9/32 action drop";
    let plain = "protocol ip pref 1 u32 match ip dst 192.0.2.9/32 classid 1:1";
    let filter = if offers(&format!("tc filter add dev g0 egress {matching}")) { matching } else { plain };
    run("tc filter delete dev g0 egress 2>/dev/null; true");
    tc.wait("delete", &lab.ports, |p| p.is_empty());
    for (at, place, scope) in [
        ("g0", "ingress", Scope::Ingress(lab.g0, None)),
        ("g0", "egress", Scope::Egress(lab.g0, None)),
        ("g1", "ingress", Scope::Ingress(lab.g1, None)),
    ] {
        tc.comes_and_goes(
            &lab.ports,
            &format!("tc filter add dev {at} {place} {filter}"),
            &[(scope, reason)],
            &format!("tc filter delete dev {at} {place}"),
        );
    }
    run("tc qdisc delete dev g0 clsact; tc qdisc delete dev g1 ingress");
    run("tc qdisc add dev g0 ingress_block 7 clsact; tc qdisc add dev g1 ingress_block 7 ingress");
    tc.comes_and_goes(
        &lab.ports,
        &format!("tc filter add block 7 {filter}"),
        &[(Scope::Ingress(lab.g0, None), reason), (Scope::Ingress(lab.g1, None), reason)],
        "tc filter delete block 7",
    );
}

#[test]
fn a_default_qdisc_that_shapes_is_seen_when_the_interface_comes_up() {
    let lab = Lab::new();
    let mut tc = Watched::new(Tc::new().unwrap(), &lab.ports);
    // The setting is the whole machine's, hence this runs only where the machine is ours, and is taken back at once.
    if std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim() != "towpath-vm" {
        return lacks("a machine of our own (net.core.default_qdisc is the whole machine's)");
    }
    let default = |qdisc: &str| run(&format!("nsenter -t 1 -n sysctl -qw net.core.default_qdisc={qdisc}"));
    run("modprobe ifb numifbs=0; ip link add i0 type ifb");
    default("sfq");
    run("ip link set i0 up");
    default("pfifo_fast");
    let i0 = index("i0");
    tc.wait("default qdisc", &lab.ports, |p| p.iter().any(|p| p.scope == Scope::Egress(i0, None)));
    run("ip link delete i0");
    tc.wait("delete", &lab.ports, |p| p.is_empty());
}

/// bpf(2) with the attribute's bytes; gives the descriptor made, if any.
fn bpf(command: i32, attribute: &[u8]) -> std::io::Result<OwnedFd> {
    // SAFETY: the bytes live through the call and their number is given; pointers in them are the caller's.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), attribute.len()) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Loads a program of the type that returns `result` at once, and links it: what follows the program's descriptor in
/// the link's attribute is `link`. None if the kernel knows no such thing.
fn bpf_link(name: &str, program_type: u32, attach_type: u32, result: i32, link: &[u32]) -> Option<OwnedFd> {
    // mov64 r0, result; exit
    let instructions = [0xb7 | (result as u32 as u64) << 32, 0x95];
    let license = c"GPL";
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let mut load = words(&[program_type, 2]);
    load.extend((instructions.as_ptr().expose_provenance() as u64).to_ne_bytes());
    load.extend((license.as_ptr().expose_provenance() as u64).to_ne_bytes());
    load.resize(48, 0);
    load.extend(name.bytes());
    load.resize(68, 0);
    load.extend(attach_type.to_ne_bytes());
    let linked = bpf(5, &load).and_then(|program| {
        let mut attribute = words(&[program.as_raw_fd() as u32]);
        attribute.extend(words(link));
        bpf(28, &attribute)
    });
    linked.inspect_err(|e| lacks(&format!("BPF link of type {attach_type}: {e}"))).ok()
}

#[test]
fn tcx_programs() {
    if !kernel_since((6, 6)) {
        return; // no tcx yet
    }
    let lab = Lab::new();
    let mut tc = Watched::new(Tc::new().unwrap(), &lab.ports);
    let (classifier, next) = (3, -1);
    for (attach_type, scope) in [(46, Scope::Ingress(lab.g1, None)), (47, Scope::Egress(lab.g0, None))] {
        let ifindex = if attach_type == 46 { lab.g1 } else { lab.g0 };
        let Some(link) = bpf_link("other", classifier, attach_type, next, &[ifindex, attach_type, 0]) else { return };
        let is = |p: &[Finding]| matches!(p, [p] if p.scope == scope && p.reason == Reason::PolicyTc);
        // The program that notes what Linux lets through stays on beside it, and is not counted.
        let ours = bpf_link("towpath_accept", classifier, attach_type, next, &[ifindex, attach_type, 0]);
        assert!(ours.is_some());
        let came = tc.wait("tcx", &lab.ports, is);
        drop(link);
        let went = tc.wait("tcx", &lab.ports, |p| p.is_empty());
        println!("{:8.2} ms, gone {:8.2} ms  tcx", came.as_secs_f64() * 1e3, went.as_secs_f64() * 1e3);
    }
}

#[test]
fn bpf_programs_in_netfilter_hooks() {
    if !kernel_since((6, 4)) {
        return; // no such links yet
    }
    let lab = Lab::new();
    let mut nft = Watched::new(Nftables::new(FlowMode::Flowtable).unwrap(), &lab.ports);
    let (netfilter, attach_type, accept) = (32, 45, 1);
    let (forward, input, priority) = (2, 1, 7);
    let v6 = 10;
    let link = |hook| bpf_link("other", netfilter, attach_type, accept, &[0, attach_type, 0, v6, hook, priority, 0]);
    let Some(harmless) = link(input) else { return };
    nft.turn(&lab.ports);
    assert_eq!(nft.policies, []);
    let link = link(forward).unwrap();
    nft.wait(
        "BPF in netfilter",
        &lab.ports,
        |p| matches!(p, [p] if p.scope == Scope::Family(V6) && p.reason == NETFILTER),
    );
    drop((harmless, link));
    nft.wait("BPF in netfilter", &lab.ports, |p| p.is_empty());
}

/// A capture that runs until dropped.
struct Tcpdump(Child);

impl Tcpdump {
    fn start(arguments: &[&str]) -> Self {
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.args(["-n", "-w", "/dev/null"]).args(arguments);
        Self(tcpdump.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn captures() {
    let lab = Lab::new();
    let mut capture = Watched::new(Capture::new().unwrap(), &lab.ports);
    assert_eq!(capture.policies, []);
    let scopes = |ifindex| [Scope::Ingress(ifindex, None), Scope::Egress(ifindex, None)];
    let is = |expected: &[Scope]| {
        let expected: BTreeSet<_> = expected.iter().copied().collect();
        move |p: &[Finding]| {
            p.iter().all(|p| p.reason == Reason::PolicyCapture)
                && p.iter().map(|p| p.scope).collect::<BTreeSet<_>>() == expected
        }
    };
    let one = Tcpdump::start(&["-i", "g0"]);
    capture.wait("tcpdump -i g0", &lab.ports, is(&scopes(lab.g0)));
    let any = Tcpdump::start(&["-i", "any"]);
    capture.wait("tcpdump -i any", &lab.ports, is(&[scopes(lab.g0), scopes(lab.g1)].concat()));
    drop(any);
    capture.wait("one is left", &lab.ports, is(&scopes(lab.g0)));
    drop(one);
    capture.wait("none is left", &lab.ports, |p| p.is_empty());
}

/// A packet socket, bound to an interface and protocol.
struct PacketSocket(i32);

impl PacketSocket {
    fn open(ifindex: u32, protocol: u16) -> Self {
        // SAFETY: the call takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0);
        // SAFETY: an address of zeros is a valid one.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = ifindex as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives through the call and its size is given.
        assert_eq!(unsafe { libc::bind(fd, (&raw const address).cast(), length) }, 0);
        Self(fd)
    }
}

impl Drop for PacketSocket {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this socket's own and is not used again.
        unsafe { libc::close(self.0) };
    }
}

#[test]
fn captures_of_single_protocols() {
    let lab = Lab::new();
    let mut capture = Watched::new(Capture::new().unwrap(), &lab.ports);
    for protocol in [0x0003, 0x0800, 0x86dd, 0x8100] {
        let socket = PacketSocket::open(lab.g1, protocol);
        let came = capture.wait("packet socket", &lab.ports, |p| p.len() == 2);
        drop(socket);
        capture.wait("closed", &lab.ports, |p| p.is_empty());
        println!("{:8.2} ms  protocol {protocol:#06x}", came.as_secs_f64() * 1e3);
    }
    let lldp = PacketSocket::open(0, 0x88cc);
    capture.turn(&lab.ports);
    assert_eq!(capture.policies, []);
    let pppoe = PacketSocket::open(lab.g0, 0x8864);
    capture.turn(&lab.ports);
    assert_eq!(capture.policies, []);
    drop((lldp, pppoe));
}

#[test]
fn a_capture_elsewhere_is_not_ours() {
    let lab = Lab::new();
    let mut capture = Watched::new(Capture::new().unwrap(), &lab.ports);
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        let _elsewhere = Lab::new();
        let _socket = PacketSocket::open(0, 3);
        ready.send(()).unwrap();
        let _ = ended.recv();
    });
    is_ready.recv().unwrap();
    capture.turn(&lab.ports);
    assert_eq!(capture.policies, []);
    drop(end);
    other.join().unwrap();
}

#[test]
fn sysctls() {
    let mut lab = Lab::new();
    let mut sysctl = Watched::new(Sysctl::new().unwrap(), &lab.ports);
    let reason = Reason::PolicySysctl;
    let set = |name: &str, value: &str| format!("sysctl -qw {name}={value}");
    let both = |ifindex, family| {
        [(Scope::Ingress(ifindex, Some(family)), reason), (Scope::Egress(ifindex, Some(family)), reason)]
    };
    for (name, on, off, scope) in [
        ("net.ipv4.ip_forward_use_pmtu", "1", "0", V4),
        ("net.ipv4.fib_multipath_use_neigh", "1", "0", V4),
        ("net.ipv4.fib_multipath_hash_policy", "2", "1", V4),
        ("net.ipv6.fib_multipath_hash_policy", "3", "0", V6),
        ("net.ipv6.conf.all.proxy_ndp", "1", "0", V6),
    ] {
        if std::fs::exists(format!("/proc/sys/{}", name.replace('.', "/"))).unwrap() {
            sysctl.comes_and_goes(&lab.ports, &set(name, on), &[family(scope, reason)], &set(name, off));
        }
    }
    let name = "net.ipv6.conf.g0.disable_ipv6";
    sysctl.comes_and_goes(&lab.ports, &set(name, "1"), &both(lab.g0, V6), &set(name, "0"));
    let egress = [(Scope::Egress(lab.g1, Some(V6)), reason)];
    let name = "net.ipv6.conf.g1.mtu";
    sysctl.comes_and_goes(&lab.ports, &set(name, "1400"), &egress, &set(name, "1500"));
    let egress = [(Scope::Egress(lab.g1, Some(V4)), reason)];
    let (on, off) = (
        "sysctl -qw net.ipv4.conf.all.accept_redirects=1 net.ipv4.conf.g1.accept_redirects=1 \
                      net.ipv4.conf.g0.accept_redirects=0",
        "sysctl -qw net.ipv4.conf.all.accept_redirects=0",
    );
    sysctl.comes_and_goes(&lab.ports, on, &egress, off);
    // Where the port itself does not forward, either says that it accepts them.
    lab.ports.insert(Port { family: [PortFamily::default(); 2], ..port("g1") });
    let name = "net.ipv4.conf.all.accept_redirects";
    run("sysctl -qw net.ipv4.conf.g1.accept_redirects=0");
    sysctl.comes_and_goes(&lab.ports, &set(name, "1"), &egress, &set(name, "0"));
    lab.ports.insert(port("g1"));
    let egress = [(Scope::Egress(lab.g1, Some(V6)), reason)];
    let name = "net.ipv6.conf.g1.forwarding";
    run("sysctl -qw net.ipv6.conf.g1.accept_redirects=1 net.ipv6.conf.g0.accept_redirects=0");
    sysctl.comes_and_goes(&lab.ports, &set(name, "0"), &egress, &set(name, "1"));
    let small = "ip link set g1 mtu 1000";
    sysctl.comes_and_goes(&lab.ports, small, &both(lab.g1, V6), "ip link set g1 mtu 1500");
    sysctl.is_harmless(
        &lab.ports,
        "sysctl -qw net.ipv4.fib_multipath_hash_policy=1 net.ipv4.conf.g0.accept_local=1 net.ipv4.conf.all.log_martians=1 \
         net.ipv4.conf.all.proxy_arp=1 net.ipv4.conf.all.src_valid_mark=1",
        "sysctl -qw net.ipv4.conf.g0.accept_local=0",
        "sysctl -qw net.ipv4.ip_forward_use_pmtu=1",
        "sysctl -qw net.ipv4.ip_forward_use_pmtu=0",
    );
}

#[test]
fn sysctls_that_the_description_of_a_port_lacks_yet() {
    let mut lab = Lab::new();
    lab.ports.insert(Port { send_redirects: false, route_localnet: true, ..port("g1") });
    run(
        "sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.g1.send_redirects=0 net.ipv4.conf.g1.route_localnet=1",
    );
    let mut sysctl = Watched::new(Sysctl::new().unwrap(), &lab.ports);
    let expected = [(Scope::Ingress(lab.g1, Some(V4)), Reason::PolicySysctl)];
    for (name, to, back) in [("send_redirects", 1, 0), ("route_localnet", 0, 1)] {
        let set = |value| format!("sysctl -qw net.ipv4.conf.g1.{name}={value}");
        sysctl.comes_and_goes(&lab.ports, &set(to), &expected, &set(back));
    }
}

#[test]
fn sysctls_follow_a_renamed_interface() {
    let mut lab = Lab::new();
    let mut sysctl = Watched::new(Sysctl::new().unwrap(), &lab.ports);
    run("ip link set g0 down; ip link set g0 name g9; ip link set g9 up");
    lab.ports.insert(port("g9"));
    sysctl.turn(&lab.ports);
    let egress = [(Scope::Egress(lab.g0, Some(V6)), Reason::PolicySysctl)];
    let set = |value| format!("sysctl -qw net.ipv6.conf.g9.mtu={value}");
    sysctl.comes_and_goes(&lab.ports, &set(1300), &egress, &set(1500));
}

#[test]
fn hash_policies_are_read() {
    let _lab = Lab::new();
    let mut policies = HashPolicies::default();
    assert_eq!(policies.read().unwrap(), [0, 0]);
    run("sysctl -qw net.ipv4.fib_multipath_hash_policy=1");
    let v6 = works("sysctl -qw net.ipv6.fib_multipath_hash_policy=1");
    assert_eq!(policies.read().unwrap(), [1, u32::from(v6)]);
}

/// CPU time of the thread so far.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the record in, which lives through it.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn watching_an_idle_router_costs_next_to_nothing() {
    let lab = Lab::new();
    // Rules that concern the router's own traffic only, for something to be read.
    let legacy = works("for p in 1 2 3 4 5 6 7 8; do iptables-legacy -A INPUT -p tcp --dport $p -j DROP; done");
    run("nft 'add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c counter'");
    let mut all: Vec<_> =
        watchers(FlowMode::Flowtable).unwrap().into_iter().map(|watcher| (watcher, Duration::ZERO)).collect();
    for (watcher, _) in &mut all {
        assert_eq!(watcher.findings(&lab.ports).unwrap(), [], "{}", watcher.name());
    }
    let start = Instant::now();
    let before = cpu_time();
    for turn in 0..100 {
        std::thread::sleep((start + turn * POLL).saturating_duration_since(Instant::now()));
        for (watcher, spent) in &mut all {
            if watcher.interval().is_some() {
                let before = cpu_time();
                assert_eq!(watcher.findings(&lab.ports).unwrap(), [], "{}", watcher.name());
                *spent += cpu_time() - before;
            }
        }
    }
    let percent = |time: Duration| time.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    let all_of_it = percent(cpu_time() - before);
    println!("iptables-legacy with rules: {legacy}");
    for (watcher, spent) in &all {
        println!("{:10} {:.4} % of a core", watcher.name(), percent(*spent));
    }
    println!("all, with waking up: {all_of_it:.4} % of a core");
    assert!(all_of_it < 20.0, "far from what it should cost: {all_of_it:.2} % of a core");
}
