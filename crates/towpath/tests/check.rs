//! `towpath check`: silent while the tables say what Linux says, and precise when they do not.

mod common;

use common::{LEFT, Net, eventually};
use serde_json::Value;
use std::process::Command;

/// The audit, and whether it found no difference.
fn check(net: &Net) -> (Value, bool) {
    let output = net.towpath(&["check", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{errors}")), output.status.success())
}

fn about(audit: &Value) -> Vec<&str> {
    let differences = audit["differences"].as_array().expect("differences");
    differences.iter().map(|difference| difference["about"].as_str().expect("what it is about")).collect()
}

#[test]
fn tables_that_have_fallen_behind_linux_are_found_out() {
    let net = Net::new();
    let mut fpm = net.start(net.with_only("-all,+bpf,+net_admin,+perfmon", &["fpm", "eth0", "eth1"]));
    let mut cm = net.start(net.with_only("-all,+net_admin,+sys_admin", &["cm"]));
    fpm.await_log("ready: 2 ports, ");
    for command in [
        "route add 203.0.113.0/24 via 198.51.100.2",
        "nexthop add id 7 via 198.51.100.2 dev eth1",
        "route add 10.0.0.0/8 nhid 7",
        "route add 10.1.0.0/16 via 192.0.2.2",
        "route add blackhole 10.2.0.0/16",
        "route add unreachable 10.3.0.0/16",
    ] {
        net.ip(command);
    }
    eventually("the tables to be as Linux's", || (check(&net).0["forwarded"].as_u64()? >= 4).then_some(()));
    let (audit, same) = check(&net);
    assert!(same && about(&audit).is_empty(), "{audit}");
    assert!(audit["left_to_linux"]["non-unicast-route"].as_u64() >= Some(4), "{audit}");

    // Nobody tells the fast path of what happens now.
    cm.send(libc::SIGSTOP);
    net.ip("route del 203.0.113.0/24");
    net.ip("route replace blackhole 10.1.0.0/16");
    net.ip("neigh replace 198.51.100.2 lladdr 02:00:00:00:00:99 dev eth1");
    let (audit, same) = check(&net);
    assert!(!same, "{audit}");
    let found = about(&audit);
    for address in ["203.0.113.0", "203.0.113.255", "10.1.0.0", "10.1.255.255", "10.0.0.0", "198.51.100.2"] {
        assert!(found.contains(&address), "{address} in {audit}");
    }
    assert!(!found.contains(&"10.2.0.0") && !found.contains(&"10.3.0.0"), "{audit}");

    cm.send(libc::SIGCONT);
    eventually("the fast path to follow", || check(&net).1.then_some(()));
}

#[test]
fn a_port_without_the_program_is_found_out() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    daemon.await_log("ready: 2 ports, ");
    assert!(check(&net).1);
    let index = net.router.ifindex("eth1").expect("eth1");
    let pin = format!("/sys/fs/bpf/towpath/{}/link_{index}", net.inode());
    let detached = Command::new("bpftool").args(["link", "detach", "pinned", &pin]).status().expect("bpftool");
    assert!(detached.success());
    let (audit, same) = check(&net);
    assert!(!same && about(&audit) == ["port eth1"], "{audit}");
    assert_eq!(audit["differences"][0]["linux"], "runs no XDP program");
}

#[test]
fn where_rules_are_repeated_the_tables_are_compared() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    daemon.await_log("ready: 2 ports, ");
    net.ip("route add 10.0.0.0/8 via 198.51.100.2");
    net.ip("route add 203.0.113.0/24 via 198.51.100.2");
    net.ip("rule add from 10.9.0.0/16 lookup 100");
    net.ip("rule add to 203.0.113.0/24 lookup 100");
    let counts = || {
        let (audit, same) = check(&net);
        assert!(same, "{audit}");
        Some((audit["forwarded"].as_u64()?, audit["left_to_linux"]["policy-rule"].as_u64().unwrap_or(0)))
    };
    eventually("both ends of a rule's destinations to be left to Linux, and others not", || {
        counts().filter(|(forwarded, ruled)| *forwarded >= 2 && *ruled == 2)
    });
    // More sources than the tables have room for.
    for n in 0..9 {
        net.ip(&format!("rule add from 10.{n}.0.0/16 lookup 100"));
    }
    eventually("the others to be left to Linux", || counts().filter(|(_, ruled)| *ruled > 2));
}

/// The way back meets the rules as well: here one that has none.
#[test]
fn a_source_that_linux_refuses_is_no_difference() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    net.ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0");
    net.ip("route add 10.0.0.0/8 via 192.0.2.2");
    net.router.sysctl("net/ipv4/conf/eth1/rp_filter", "1").expect("set");
    let forwarded = || {
        let (audit, same) = check(&net);
        let mut rows = audit["arrivals"].as_array()?.iter();
        let row = rows.find(|row| row["port"] == "eth1" && row["from"] == "198.51.100.2")?;
        row["forwarded"].as_u64().filter(|_| same)
    };
    net.ip("rule add iif eth0 priority 103 unreachable");
    let few = eventually("the rule to be followed", forwarded);
    net.ip("rule del iif eth0 priority 103");
    net.ip("rule add iif eth0 priority 103 lookup 100");
    eventually("sources to be accepted", || (forwarded()? > few).then_some(()));
}

/// Once what is local comes last, routes lead to the loopback net, which stays martian wherever packets come in.
#[test]
fn the_loopback_net_is_compared_for_no_port() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    for command in [
        "neigh replace 198.51.100.77 lladdr 02:00:00:00:00:77 dev eth1",
        "route add default via 198.51.100.77",
        "rule add iif eth0 priority 100 lookup 100",
        "rule add priority 40000 lookup local",
        "rule del priority 0 lookup local",
    ] {
        net.ip(command);
    }
    let explained = eventually("the default route to be followed", || {
        let (audit, same) = check(&net);
        let mut arrivals = audit["arrivals"].as_array()?.iter();
        let forwarded = arrivals.find(|arrival| arrival["port"] == "eth0")?["forwarded"].as_u64()?;
        (same && forwarded > 0).then(|| net.json(&["explain", LEFT, "127.0.0.1", "in", "eth0"]))
    });
    assert_eq!(explained["verdict"]["reason"], "martian-destination", "{explained}");
}

#[test]
fn what_rules_lead_to_is_compared_by_port_and_source() {
    let net = Net::new();
    let mut fpm = net.start(net.with_only("-all,+bpf,+net_admin,+perfmon", &["fpm", "eth0", "eth1"]));
    let mut cm = net.start(net.with_only("-all,+net_admin,+sys_admin", &["cm"]));
    fpm.await_log("ready: 2 ports, ");
    for command in [
        "neigh replace 198.51.100.77 lladdr 02:00:00:00:00:77 dev eth1",
        "neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0",
        "route add 10.0.0.0/8 via 192.0.2.2",
        "route add 10.1.0.0/16 via 198.51.100.77 table 100",
        "rule add from 10.9.0.0/16 iif eth0 lookup 100",
        "neigh replace 2001:db8:2::77 lladdr 02:00:00:00:00:77 dev eth1",
        "-6 route add 2001:db8:a::/48 via 2001:db8:2::77 table 100",
        "-6 rule add from 2001:db8:9::/48 iif eth0 lookup 100",
    ] {
        net.ip(command);
    }
    let arrival = |audit: &Value, from: &str| {
        let arrivals = audit["arrivals"].as_array()?.iter();
        arrivals.clone().find(|arrival| arrival["port"] == "eth0" && arrival["from"] == from)?["forwarded"].as_u64()
    };
    // From another host: the two ends of 10.0.0.0/8. By the rule also those of 10.1.0.0/16.
    eventually("the rule to be followed", || {
        let (audit, same) = check(&net);
        assert!(same, "{audit}");
        let found = ["10.9.0.1", "192.0.2.2", "2001:db8:9::1"].map(|from| arrival(&audit, from));
        (found[0]? >= 4 && found[1]? >= 2 && found[2]? >= 2).then_some(())
    });

    // Nobody tells the fast path of what happens now.
    cm.send(libc::SIGSTOP);
    net.ip("route replace 10.1.0.0/16 via 192.0.2.2 table 100");
    let (audit, same) = check(&net);
    assert!(!same, "{audit}");
    let ends = ["10.1.0.0", "10.1.255.255"].map(|end| format!("{end} from 10.9.0.1 in by eth0"));
    assert_eq!(about(&audit), ends, "{audit}");

    cm.send(libc::SIGCONT);
    eventually("the fast path to follow", || check(&net).1.then_some(()));
}
