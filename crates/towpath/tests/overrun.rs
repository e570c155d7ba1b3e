//! Notifications that are lost because whoever is to take them does not come to it: all is read again, is counted by its
//! cause, and no packet of a stream is lost meanwhile.

mod common;

use common::{Daemon, LEFT, Net, RIGHT, Stream, eventually};
use std::net::{IpAddr, Ipv4Addr};

/// Changes routes until Linux has had to drop notifications about them.
fn flood(net: &Net) {
    const NETS: u32 = 4000;
    let mut routes = net.router.route_socket().expect("a socket");
    let gateways: [IpAddr; 2] = [LEFT, RIGHT].map(|address| address.parse().expect("an address"));
    let dropped = || {
        let table = net.exec("cat /proc/net/netlink");
        // Its columns: sk, Eth (the protocol), Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode.
        let column = |line: &str, at| line.split_whitespace().nth(at).map(str::to_owned);
        table.lines().any(|line| {
            column(line, 1).as_deref() == Some("0")
                && column(line, 8).and_then(|drops| drops.parse().ok()).is_some_and(|drops: u64| drops > 0)
        })
    };
    for gateway in gateways.iter().cycle() {
        for number in 0..NETS {
            let prefix = Ipv4Addr::from(0x0a00_0000 + (number << 8));
            routes.replace((prefix.into(), 24), *gateway).expect("replaced");
        }
        routes.flush().expect("taken");
        if dropped() {
            break;
        }
    }
    // The last word is lost, too.
    routes.replace((Ipv4Addr::new(203, 0, 113, 0).into(), 24), gateways[1]).expect("replaced");
    routes.replace((Ipv4Addr::new(10, 0, 1, 0).into(), 24), gateways[1]).expect("replaced");
    routes.delete((Ipv4Addr::new(10, 0, 0, 0).into(), 24)).expect("deleted");
    routes.flush().expect("taken");
}

fn lost(net: &Net) -> u64 {
    let status = net.json(&["status"]);
    let causes = status["resyncs_by_cause"].as_array().expect("causes");
    causes.iter().find(|one| one["cause"] == "routes").expect("a cause")["count"].as_u64().expect("a count")
}

/// Stops a process, which then misses more than it can.
fn outruns(net: &Net, process: &mut Daemon) {
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    assert_eq!(lost(net), 0);
    process.send(libc::SIGSTOP);
    flood(net);
    stream.advance(100);
    process.send(libc::SIGCONT);
    eventually("the loss is counted", || (lost(net) > 0).then_some(()));
    eventually("all is read again", || (net.json(&["status"])["in_sync"] == true).then_some(()));
    for (destination, path) in [("203.0.113.1", "fast"), ("10.0.0.1", "linux"), ("10.0.1.1", "fast")] {
        let verdict = net.json(&["explain", LEFT, destination, "in", "eth0"])["verdict"].take();
        assert_eq!(verdict["path"], path, "{destination}: {verdict}");
    }
    let check = net.towpath(&["check"]);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn a_stopped_daemon_reads_all_again() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    outruns(&net, &mut daemon);
}

#[test]
fn a_stopped_fast_path_manager_has_the_cache_manager_read_all_again() {
    let net = Net::new();
    let start = |arguments: &[&str]| {
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        command.args(arguments);
        net.start(command)
    };
    let mut fpm = start(&["fpm", "eth0", "eth1"]);
    let _cm = start(&["cm"]);
    fpm.await_log("ready: 2 ports, ");
    outruns(&net, &mut fpm);
}
