//! `up`, `down`, restarts and instances, with traffic that shows whether the fast path was taken and nothing was lost.

mod common;

use common::{LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};

#[test]
fn up_forwards_fast_and_down_gives_back_to_linux_without_loss() {
    let net = Net::new();
    let clean = net.traces();
    for (destination, from) in [(RIGHT, LEFT), (RIGHT6, LEFT6)] {
        let stream = Stream::start(&net, destination);
        let mut daemon = net.up(&["eth0", "eth1"]);
        assert!(daemon.log().contains("ready: 2 ports, "), "{}", daemon.log());
        net.flows(200);
        assert!(net.ping(&net.right, from), "replies come back");
        let down = net.towpath(&["down"]);
        assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
        assert!(daemon.wait().success());
        assert_eq!(net.traces(), clean);
        stream.finish_complete();
    }
}

#[test]
fn interrupts_end_it_cleanly() {
    // Tests that run under nohup(1) would have the daemon ignore it too.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
    let net = Net::new();
    let clean = net.traces();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let stream = Stream::start(&net, RIGHT);
        let mut daemon = net.up(&["eth0", "eth1"]);
        net.flows(100);
        assert_eq!(daemon.signal(signal).code(), Some(0));
        assert_eq!(net.traces(), clean);
        assert!(net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6), "Linux forwards again");
        stream.finish_complete();
    }
}

#[test]
fn it_outlives_its_terminal_if_asked_to() {
    let net = Net::new();
    let mut command = net.router.command("nohup");
    command.args([env!("CARGO_BIN_EXE_towpath"), "up", "eth0", "eth1"]);
    let mut daemon = net.start(command);
    daemon.await_log("ready: ");
    daemon.send(libc::SIGHUP);
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    assert!(net.json(&["status"])["in_sync"].as_bool().unwrap());
    assert_eq!(daemon.signal(libc::SIGTERM).code(), Some(0));
    stream.finish_complete();
}

#[test]
fn without_names_every_port_that_can_is_served() {
    let net = Net::new();
    let daemon = net.up(&[]);
    assert!(daemon.log().contains("ready: 2 ports, "), "{}", daemon.log());
    let ports = net.json(&["show", "ports"]);
    let modes: Vec<_> = ports["ports"].as_array().unwrap().iter().map(|port| (&port["name"], &port["mode"])).collect();
    assert_eq!(format!("{modes:?}"), r#"[(String("eth0"), String("native")), (String("eth1"), String("native"))]"#);
}

#[test]
fn generic_mode_forwards_if_it_is_asked_for() {
    let net = Net::new();
    let clean = net.traces();
    let modes = || net.ip("-d link").matches("xdpgeneric").count();
    let native = net.up(&["eth0", "eth1"]);
    assert_eq!(modes(), 0);
    assert!(net.towpath(&["down"]).status.success());
    drop(native);
    // A veth so cannot transmit what is redirected in the driver; in generic mode it can.
    for host in [&net.left, &net.right] {
        host.run(["ethtool", "-K", "up0", "gro", "off"]).expect("switched");
    }
    for (destination, from) in [(RIGHT, LEFT), (RIGHT6, LEFT6)] {
        let stream = Stream::start(&net, destination);
        let mut daemon = net.up(&["--generic", "eth0", "eth1"]);
        assert_eq!(modes(), 2);
        assert_eq!(net.json(&["show", "ports"])["ports"][0]["mode"], "generic");
        net.flows(200);
        assert!(net.ping(&net.right, from), "replies come back");
        assert_eq!(daemon.signal(libc::SIGTERM).code(), Some(0));
        assert_eq!(net.traces(), clean);
        stream.finish_complete();
    }
}

#[test]
fn a_restart_in_another_mode_changes_the_mode() {
    let net = Net::new();
    let stream = Stream::start(&net, RIGHT);
    let mut daemon = net.up(&["eth0", "eth1"]);
    for (arguments, generic) in [(&["--generic", "eth0", "eth1"][..], 2), (&["eth0", "eth1"], 0)] {
        daemon.signal(libc::SIGKILL);
        daemon = net.up(arguments);
        assert_eq!(net.json(&["status"])["adopted"], true);
        assert_eq!(net.ip("-d link").matches("xdpgeneric").count(), generic);
        net.flows(200);
    }
    stream.finish_complete();
}

#[test]
fn programs_go_on_after_kill_and_a_new_daemon_reconciles_without_loss() {
    let net = Net::new();
    let stream = Stream::start(&net, RIGHT);
    let mut daemon = net.up(&["eth0", "eth1"]);
    net.flows(100);
    let before = net.forwarded();
    daemon.signal(libc::SIGKILL);
    // Changes that nobody is there to follow.
    net.ip("route add 203.0.113.0/24 via 198.51.100.2");
    net.ip("route add blackhole 203.0.113.128/25");
    stream.advance(300);
    let again = net.up(&["eth0", "eth1"]);
    let after = net.forwarded();
    assert!(after >= before + 250, "forwarding went on while no daemon was there: {before} before, {after} after");
    assert_eq!(net.json(&["status"])["adopted"], true);
    let verdict = |destination: &str| net.json(&["explain", LEFT, destination, "in", "eth0"])["verdict"].clone();
    assert_eq!(verdict("203.0.113.1")["path"], "fast");
    assert_eq!(verdict("203.0.113.129")["reason"], "non-unicast-route");
    net.flows(100);
    drop(again);
    stream.finish_complete();
}

#[test]
fn a_daemon_that_leaves_has_its_programs_go_on() {
    leaves(&["eth0", "eth1"]);
}

/// Of what lies in the rings of workers nothing is lost either.
#[test]
fn so_do_workers() {
    leaves(&["--engine", "user", "eth0", "eth1"]);
}

fn leaves(up: &[&str]) {
    const LEFT: i32 = 75;
    let net = Net::new();
    let stream = Stream::start(&net, RIGHT);
    let mut daemon = net.up(up);
    for _ in 0..5 {
        net.flows(100);
        let before = net.forwarded();
        let linux = net.forwarded_by_linux();
        let leave = net.towpath(&["leave"]);
        assert!(leave.status.success(), "{}", String::from_utf8_lossy(&leave.stderr));
        assert_eq!(daemon.wait().code(), Some(LEFT));
        net.ip("route replace 203.0.113.0/24 via 198.51.100.2");
        stream.advance(300);
        assert_eq!(net.forwarded_by_linux(), linux, "the programs forward while no daemon is there");
        daemon = net.up(up);
        assert_eq!(net.json(&["status"])["adopted"], true);
        assert!(net.forwarded() >= before + 250, "counters go on");
    }
    assert!(net.towpath(&["down"]).status.success());
    assert!(daemon.wait().success());
    stream.finish_complete();
    let again = net.towpath(&["leave"]);
    assert_eq!(again.status.code(), Some(1));
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(said.contains("no towpath runs in this network namespace"), "{said}");
}

#[test]
fn down_removes_what_a_killed_daemon_left() {
    let net = Net::new();
    let clean = net.traces();
    let mut daemon = net.up(&["eth0", "eth1"]);
    assert_ne!(net.traces(), clean);
    daemon.signal(libc::SIGKILL);
    assert_ne!(net.traces(), clean);
    assert!(net.towpath(&["down"]).status.success());
    assert_eq!(net.traces(), clean);
    assert!(net.ping(&net.left, RIGHT));
}

#[test]
fn down_stops_a_daemon_that_is_not_ready_yet() {
    let net = Net::new();
    let clean = net.traces();
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["up", "eth0", "eth1"]);
    let mut daemon = net.start(command);
    eventually("a daemon that starts", || {
        let status = net.towpath(&["status"]);
        let early = String::from_utf8_lossy(&status.stderr).contains("not ready yet");
        (early || status.status.success()).then_some(())
    });
    let down = net.towpath(&["down"]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert!(daemon.wait().success(), "{}", daemon.log());
    assert_eq!(net.traces(), clean);
    assert!(net.ping(&net.left, RIGHT));
}

#[test]
fn a_restart_with_other_ports_changes_the_difference_only() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0"]);
    daemon.signal(libc::SIGKILL);
    let mut daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    daemon.signal(libc::SIGKILL);
    let _daemon = net.up(&["eth1"]);
    assert!(!net.ip("-d link show eth0").contains("xdp"), "eth0 is served no longer");
    assert!(net.ip("-d link show eth1").contains("xdp"));
    stream.finish_complete();
}

#[test]
fn instances_in_two_namespaces_do_not_disturb_each_other() {
    let (one, two) = (Net::new(), Net::new());
    let mut first = one.up(&["eth0", "eth1"]);
    let _second = two.up(&["eth0", "eth1"]);
    let stream = Stream::start(&two, RIGHT);
    two.flows(100);
    one.ip("route add blackhole 203.0.113.0/24");
    assert_eq!(first.signal(libc::SIGTERM).code(), Some(0));
    two.flows(100);
    let explained = two.json(&["explain", LEFT, "203.0.113.1", "in", "eth0"]);
    assert_eq!(explained["verdict"]["reason"], "no-route");
    stream.finish_complete();
}

#[test]
fn a_named_port_that_comes_back_is_served_again() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    net.ip("link delete eth1");
    let port = || net.json(&["show", "ports"])["ports"].as_array().unwrap()[1].clone();
    eventually("eth1 is known to be gone", || port()["ifindex"].is_null().then_some(()));
    net.connect_right();
    eventually("eth1 is served again", || (port()["ready"] == true).then_some(()));
    eventually("the neighbour resolves", || net.ping(&net.left, RIGHT).then_some(()));
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn a_port_whose_peer_cannot_receive_what_is_redirected_is_left_to_linux() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let verdict = || net.json(&["explain", LEFT, RIGHT, "in", "eth0"])["verdict"].clone();
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    let gro = |state| drop(net.right.run(["ethtool", "-K", "up0", "gro", state]).expect("set"));
    gro("off");
    eventually("Linux gets what leaves by eth1", || (verdict()["reason"] == "egress-not-served").then_some(()));
    // What was on its way until then is lost: kernels before 6.3 say nothing before a frame is dropped.
    stream.finish();
    let stream = Stream::start(&net, RIGHT);
    let forwarded = net.forwarded();
    stream.advance(300);
    assert_eq!(net.forwarded(), forwarded);
    gro("on");
    net.flows(100);
    stream.finish_complete();
}

/// What the fast path does when it is left alone for longer than allowed: nothing, and Linux forwards, until it is not alone
/// any more.
fn gives_up(up: &[&str], lossless: bool) {
    let net = Net::new();
    let clean = net.traces();
    let mut daemon = net.up(up);
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    for signal in [libc::SIGKILL, libc::SIGSTOP] {
        let before = net.forwarded_by_linux();
        if signal == libc::SIGKILL {
            daemon.signal(signal);
        } else {
            daemon.send(signal)
        }
        eventually("Linux forwards", || (net.forwarded_by_linux() >= before + 200).then_some(()));
        if signal == libc::SIGKILL {
            daemon = net.up(up);
            assert_eq!(net.json(&["status"])["adopted"], true);
        } else {
            daemon.send(libc::SIGCONT);
        }
        net.flows(200);
        assert!(net.exceptions("unattended") >= 200);
    }
    // A machine that is busy may keep the daemon from looking for as long.
    eventually("it is fast again", || {
        let before = net.forwarded_by_linux();
        net.flows(200);
        (net.forwarded_by_linux() < before + 100).then_some(())
    });
    if lossless {
        stream.finish_complete()
    } else {
        drop(stream.finish())
    }
    assert!(net.towpath(&["down"]).status.success());
    daemon.wait();
    assert_eq!(net.traces(), clean);
}

#[test]
fn a_fast_path_that_is_left_alone_too_long_gives_up_if_asked_to() {
    gives_up(&["--detach-after", "3", "eth0", "eth1"], true);
}

/// What is lost is what lay in the rings of workers that were killed or stopped.
#[test]
fn so_it_does_after_workers() {
    gives_up(&["--detach-after", "3", "--engine", "user", "eth0", "eth1"], false);
}
