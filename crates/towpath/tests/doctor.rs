//! `towpath doctor`: things broken one by one are found with what helps, and are gone when that was done.

mod common;

use common::{Net, eventually};
use serde_json::Value;

/// Runs it, which must change nothing; gives what it says and whether its status is 0.
fn doctor(net: &Net, ports: &[&str]) -> (Value, bool) {
    let before = (net.traces(), net.ip("-d link"));
    let output = net.towpath(&[&["doctor", "--json"], ports].concat());
    assert_eq!((net.traces(), net.ip("-d link")), before, "nothing changed");
    let said = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (said, output.status.success())
}

fn findings(said: &Value) -> &[Value] {
    said["findings"].as_array().expect("findings")
}

/// What was found of this check about this, where it is not well.
fn trouble<'a>(said: &'a Value, about: &str, check: &str) -> Vec<&'a Value> {
    let of = |finding: &&Value| finding["about"] == about && finding["check"] == check && finding["state"] != "well";
    findings(said).iter().filter(of).collect()
}

/// That which stops the fast path, as (about, check).
fn stops(said: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let stops = findings(said).iter().filter(|finding| finding["state"] == "stops");
    stops.map(|finding| (text(&finding["about"]), text(&finding["check"]))).collect()
}

/// Whether this kernel tells what devices can do with XDP (from 6.3 on).
fn tells_features(said: &Value) -> bool {
    trouble(said, "kernel", "xdp-features").is_empty()
}

/// The port's driver has native XDP, or the kernel does not tell.
fn may_have_native(said: &Value, port: &str) {
    let trouble = trouble(said, port, "native-xdp");
    match tells_features(said) {
        true => assert!(trouble.is_empty(), "{said:#}"),
        false => assert!(trouble.iter().all(|finding| finding["state"] == "unknown"), "{said:#}"),
    }
}

const PORTS: [&str; 2] = ["eth0", "eth1"];

#[test]
fn a_router_where_nothing_is_in_the_way_is_well_with_and_without_an_instance() {
    let net = Net::new();
    let (said, good) = doctor(&net, &[]);
    assert!(good && said["stopped"] == false && stops(&said).is_empty(), "{said:#}");
    assert_eq!((&said["pid"], &said["flows"]), (&Value::Null, &"flowtable".into()));
    assert_eq!(said["ports"], serde_json::json!(PORTS));
    for (about, check) in [("kernel", "kernel-feature"), ("process", "capability"), ("settings", "policy")] {
        let well =
            |finding: &Value| finding["about"] == about && finding["check"] == check && finding["state"] == "well";
        assert!(findings(&said).iter().any(well), "{about} {check}: {said:#}");
    }
    for port in PORTS {
        let tcp = trouble(&said, port, "tcp-aggregation");
        assert!(tcp[0]["effect"].as_str().unwrap().contains("lose to Linux"), "{said:#}");
        may_have_native(&said, port);
    }
    let daemon = net.up(&["--flows", "established", "eth0"]);
    let (said, good) = doctor(&net, &[]);
    assert!(good, "{said:#}");
    assert_eq!((&said["pid"], &said["flows"]), (&daemon.pid().into(), &"established".into()));
    assert_eq!(said["ports"], serde_json::json!(["eth0"]), "those that are served");
    let program = findings(&said).iter().find(|finding| finding["check"] == "native-xdp").expect("native-xdp");
    for port in PORTS {
        let cost = doctor(&net, &[port]).0;
        let told = trouble(&cost, port, "attaching").iter().any(|it| it["found"].as_str().unwrap().contains("TSO"));
        assert!(told, "served or not, what TCP of containers pays: {cost:#}");
    }
    assert!(program["state"] == "well" && program["found"].as_str().unwrap().contains("program towpath"), "{program}");
}

/// Something broken, and how it shows.
struct Trouble {
    set: &'static str,
    about: &'static str,
    check: &'static str,
    state: &'static str,
    /// Words in what was found
    found: &'static str,
    /// The command that is to be told
    remedy: &'static str,
    /// What mends it, if that is not the remedy
    unset: Option<&'static str>,
}

const TROUBLES: &[Trouble] = &[
    Trouble {
        set: "ip link set eth1 down",
        about: "eth1",
        check: "port-state",
        state: "stops",
        found: "down",
        remedy: "ip link set eth1 up",
        unset: None,
    },
    Trouble {
        set: "ip link add br0 type bridge && ip link set eth1 master br0",
        about: "eth1",
        check: "port-state",
        state: "stops",
        found: "enslaved",
        remedy: "ip link set eth1 nomaster",
        unset: None,
    },
    Trouble {
        set: "nft 'add table inet t; add chain inet t forward { type filter hook forward priority 0; }; add rule inet t forward udp dport 7 drop'",
        about: "settings",
        check: "netfilter",
        state: "stops",
        found: "nft table inet t, chain forward",
        remedy: "towpath up --flows established eth0 eth1",
        unset: Some("nft delete table inet t"),
    },
    Trouble {
        // No connection passes what changes packets outside of a flowtable.
        set: "nft 'add table ip t; add chain ip t forward { type filter hook forward priority 0; }; add rule ip t forward ip dscp set 1'",
        about: "settings",
        check: "netfilter",
        state: "stops",
        found: "(all ipv4)",
        remedy: "nft list ruleset",
        unset: Some("nft delete table ip t"),
    },
    Trouble {
        set: "sysctl -w net.ipv4.ip_forward_use_pmtu=1",
        about: "settings",
        check: "policy",
        state: "stops",
        found: "net.ipv4.ip_forward_use_pmtu is on (all ipv4)",
        remedy: "sysctl -w net.ipv4.ip_forward_use_pmtu=0",
        unset: None,
    },
    Trouble {
        set: "sysctl -w net.ipv6.conf.eth0.mtu=1400",
        about: "eth0",
        check: "policy",
        state: "stops",
        found: "below the interface's 1500 (egress ipv6)",
        remedy: "sysctl -w net.ipv6.conf.eth0.mtu=1500",
        unset: None,
    },
    Trouble {
        set: "tc qdisc add dev eth1 root tbf rate 1mbit burst 10k latency 10ms",
        about: "eth1",
        check: "policy",
        state: "stops",
        found: "tbf",
        remedy: "tc qdisc show dev eth1; tc filter show dev eth1 ingress",
        unset: Some("tc qdisc del dev eth1 root"),
    },
    Trouble {
        set: "ip rule add from 192.0.2.0/24 lookup 100",
        about: "settings",
        check: "policy",
        state: "slower",
        found: "rules: ",
        remedy: "ip rule; ip -6 rule",
        unset: Some("ip rule del from 192.0.2.0/24 lookup 100"),
    },
    Trouble {
        // The last, since only IPv4 is mended.
        set: "sysctl -w net.ipv4.conf.eth1.forwarding=0 net.ipv6.conf.all.forwarding=0",
        about: "eth1",
        check: "forwarding",
        state: "stops",
        found: "forwards nothing",
        remedy: "sysctl -w net/ipv4/conf/eth1/forwarding=1",
        unset: None,
    },
];

#[test]
fn what_is_broken_is_found_and_gone_when_it_is_mended() {
    let net = Net::new();
    let run = |line: &str| net.router.sh(line).unwrap_or_else(|error| panic!("{line}: {error:#}"));
    for Trouble { set, about, check, state, found, remedy, unset } in TROUBLES {
        run(set);
        let (said, good) = doctor(&net, &PORTS);
        let found_now = trouble(&said, about, check);
        let is = |finding: &&&Value| finding["found"].as_str().unwrap().contains(found);
        let finding = found_now.iter().find(is).unwrap_or_else(|| panic!("{set}: {said:#}"));
        assert_eq!((&finding["state"], &finding["remedy"]), (&(*state).into(), &(*remedy).into()), "{set}");
        let stops = *state == "stops";
        assert_eq!((good, &said["stopped"]), (!stops, &stops.into()), "{set}: {said:#}");
        run(unset.unwrap_or(remedy));
        let (said, good) = doctor(&net, &PORTS);
        assert!(good && trouble(&said, about, check).is_empty(), "{set}, mended: {said:#}");
    }
}

#[test]
fn what_a_device_cannot_do_is_found_and_gone_when_it_is_mended() {
    let net = Net::new();
    net.ip("link add eth2 numtxqueues 2 numrxqueues 2 type veth peer name far2 numtxqueues 4 numrxqueues 4");
    net.router.sh("ip link set eth2 up; ip link set far2 up; ethtool -K far2 gro on").expect("eth2");
    let ports = ["eth0", "eth2"];
    let (said, good) = doctor(&net, &ports);
    if tells_features(&said) {
        let native = trouble(&said, "eth2", "native-xdp");
        assert!(!good && native[0]["state"] == "stops", "{said:#}");
        assert!(native[0]["found"].as_str().unwrap().contains("transmit queues"), "{said:#}");
        assert_eq!(native[0]["remedy"], "towpath up --generic eth2");
    }
    net.exec("ethtool -L far2 tx 1");
    let (said, good) = doctor(&net, &ports);
    may_have_native(&said, "eth2");
    assert!(good, "{said:#}");

    net.exec("ethtool -L eth2 rx 1");
    let (said, good) = doctor(&net, &ports);
    let queues = trouble(&said, "eth2", "queues");
    assert!(good && queues[0]["found"].as_str().unwrap().starts_with("1 of at most 2"), "{said:#}");
    net.exec(queues[0]["remedy"].as_str().expect("a command"));
    assert!(trouble(&doctor(&net, &ports).0, "eth2", "queues").is_empty());

    net.exec("ethtool -K far2 gro off");
    let (said, good) = doctor(&net, &ports);
    let transmit = trouble(&said, "eth2", "transmit");
    assert!(!good && transmit[0]["state"] == "stops", "{said:#}");
    net.router.sh(&transmit[0]["remedy"].as_str().expect("a command").replace("PEER", "far2")).expect("mended");
    let (said, good) = doctor(&net, &ports);
    // Before 6.3 no kernel redirects frames of several buffers.
    let slower = trouble(&said, "eth2", "transmit").iter().all(|finding| finding["state"] == "slower");
    assert!(good && slower, "{said:#}");
}

#[test]
fn others_that_use_the_port_are_found() {
    let net = Net::new();
    let foreign = net.attach_foreign_program("eth1");
    let (said, good) = doctor(&net, &PORTS);
    let program = trouble(&said, "eth1", "native-xdp");
    assert!(!good && program[0]["state"] == "stops" && program[0]["remedy"] == "bpftool net show dev eth1", "{said:#}");
    drop(foreign);
    let capture = net.router.packet_socket("eth0").expect("a packet socket");
    let (said, good) = doctor(&net, &PORTS);
    let policy = trouble(&said, "eth0", "policy");
    assert!(!good && policy[0]["found"].as_str().unwrap().starts_with("capture: "), "{said:#}");
    may_have_native(&said, "eth1");
    drop(capture);
    let (said, good) = doctor(&net, &PORTS);
    assert!(good && stops(&said).is_empty(), "{said:#}");
}

#[test]
fn filters_in_force_are_told() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let told = || {
        let said = doctor(&net, &[]).0;
        trouble(&said, "settings", "filters")
            .iter()
            .map(|it| it["found"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert!(told().is_empty());
    for source in ["203.0.113.0/24", "2001:db8:f::/48"] {
        assert!(net.towpath(&["filter", "add", "--from", source]).status.success());
    }
    assert_eq!(told(), ["2 in force, run by XDP on eth0 eth1"]);
    assert!(net.towpath(&["filter", "flush"]).status.success());
    assert!(told().is_empty());
}

#[test]
fn with_wires_it_is_told_who_runs_which_filters() {
    let net = Net::new();
    for device in ["lan0", "tap0"] {
        net.ip(&format!("tuntap add dev {device} mode tap"));
    }
    net.ip("link set lan0 up");
    let _daemon = net.up(&["--engine", "user", "lan0=tap:tap0", "eth1"]);
    assert!(net.towpath(&["filter", "add", "--from", "203.0.113.0/24"]).status.success());
    let (said, _) = doctor(&net, &[]);
    let found = trouble(&said, "settings", "filters")[0]["found"].clone();
    assert_eq!(found, "1 in force, run by XDP on eth1, run by workers on lan0 (tap:tap0)");
    let mut tcpdump = net.router.command("tcpdump");
    tcpdump.args(["-i", "eth1", "-n", "-w", "/dev/null", "udp port 9"]);
    let mut tcpdump = net.start(tcpdump);
    tcpdump.await_log("listening on");
    eventually("the capture is found, and why its filter is of no use", || {
        let said = doctor(&net, &[]).0;
        let why = "its filter is not run, because some ports have wires";
        let told = |finding: &&Value| finding["found"].as_str().is_some_and(|found| found.contains(why));
        (trouble(&said, "eth1", "policy").into_iter().find(told)?["state"] == "stops").then_some(())
    });
}

#[test]
fn rules_that_connections_pass_make_it_slower_but_do_not_stop_it() {
    let net = Net::new();
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    net.router
        .sh("nft 'add table inet t; add chain inet t forward { type filter hook forward priority 0; policy drop; }; \
             add rule inet t forward ct state established accept'")
        .expect("rules");
    eventually("the rules are followed", || (net.json(&["status"])["flows"]["gate"] == "open").then_some(()));
    let (said, good) = doctor(&net, &[]);
    let rules = trouble(&said, "settings", "netfilter");
    assert!(good && !rules.is_empty(), "{said:#}");
    assert!(rules.iter().all(|finding| finding["state"] == "slower"), "{said:#}");
}

#[test]
fn only_ports_that_were_asked_for_stop_it_alone() {
    let net = Net::new();
    net.ip("link add eth2 type veth peer name far2");
    let (said, good) = doctor(&net, &[]);
    assert!(good && stops(&said).contains(&("eth2".into(), "port-state".into())), "{said:#}");
    assert!(!doctor(&net, &["eth0", "eth2"]).1);
}

#[test]
fn bad_input_and_missing_privileges_are_named() {
    let net = Net::new();
    let message = net.refused(&["doctor", "eth0", "eht1"]);
    assert!(message.contains("eht1") && message.contains("did you mean eth1"), "{message}");
    net.ip("link add br0 type bridge");
    let (said, good) = doctor(&net, &["eth0", "br0"]);
    assert!(!good && trouble(&said, "br0", "port-kind")[0]["state"] == "stops", "{said:#}");
    let output = net.with_only("-all,+net_admin,+bpf", &["doctor", "--json", "eth0"]).output().expect("run");
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let capability = trouble(&said, "process", "capability");
    assert_eq!(capability.len(), 1, "{said:#}");
    assert!(capability[0]["found"].as_str().unwrap().starts_with("CAP_PERFMON"), "{said:#}");
    let raw = trouble(&said, "user engine", "raw-sockets");
    assert!(raw.len() == 1 && raw[0]["found"].as_str().unwrap().contains("CAP_NET_RAW"), "{said:#}");
    assert_eq!(output.status.code(), Some(1));
}
