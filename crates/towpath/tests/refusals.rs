//! Bad input: a clear message, exit status 1 (2 for wrong usage), and nothing changed.

mod common;

use common::{Net, RIGHT};

/// `arguments` fail with all of `words` in the message, and leave no trace.
fn refuses(net: &Net, arguments: &[&str], words: &[&str]) {
    let before = net.traces();
    let message = net.refused(arguments);
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
    assert_eq!(net.traces(), before, "nothing changed");
    assert!(net.ping(&net.left, RIGHT), "Linux goes on");
}

#[test]
fn unknown_ports_are_named_with_their_nearest() {
    let net = Net::new();
    refuses(&net, &["up", "eth0", "eht1"], &["eht1", "did you mean", "eth1"]);
}

#[test]
fn interfaces_that_cannot_be_ports_are_named() {
    let net = Net::new();
    net.ip("link add br0 type bridge");
    refuses(&net, &["up", "eth0", "br0"], &["br0", "driver"]);
    refuses(&net, &["up", "lo"], &["lo", "driver"]);
}

#[test]
fn a_foreign_xdp_program_is_left_alone() {
    let net = Net::new();
    let _foreign = net.attach_foreign_program("eth1");
    let before = net.ip("-d link show eth1");
    let id = before.split("prog/xdp id ").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("a program");
    refuses(&net, &["up", "eth0", "eth1"], &["eth1", "XDP", &format!("id {id}")]);
    assert_eq!(net.ip("-d link show eth1"), before);
}

#[test]
fn a_second_daemon_is_told_of_the_first() {
    let net = Net::new();
    let daemon = net.up(&["eth0", "eth1"]);
    refuses(&net, &["up", "eth0"], &["already", &format!("pid {}", daemon.pid())]);
    assert!(net.json(&["status"])["in_sync"].as_bool().unwrap());
}

#[test]
fn missing_privileges_are_named() {
    let net = Net::new();
    let binary = env!("CARGO_BIN_EXE_towpath");
    for (dropped, named) in [("-net_admin", "CAP_NET_ADMIN"), ("-bpf", "CAP_BPF")] {
        let output = net.output(&["setpriv", "--bounding-set", dropped, binary, "up", "eth0"]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(named), "{message}");
    }
    assert!(!net.ip("-d link").contains("xdp"));
}

#[test]
fn the_user_engine_is_not_in_this_build() {
    let net = Net::new();
    refuses(&net, &["up", "--engine", "user", "eth0"], &["user", "--engine xdp"]);
}

#[test]
fn read_commands_without_a_daemon_say_so() {
    let net = Net::new();
    let all: [&[&str]; 4] =
        [&["status"], &["show", "routes"], &["show", "stats", "--json"], &["explain", "192.0.2.2", RIGHT]];
    for arguments in all {
        refuses(&net, arguments, &["no towpath runs", "towpath up"]);
    }
}

#[test]
fn down_with_nothing_there_is_no_failure() {
    let net = Net::new();
    assert!(net.towpath(&["down"]).status.success());
}

#[test]
fn wrong_usage_has_status_two() {
    let net = Net::new();
    let all: [&[&str]; 5] = [
        &[],
        &["sideways"],
        &["up", "--engine", "steam"],
        &["explain", "192.0.2.1", "2001:db8::1"],
        &["explain", "192.0.2.1", "192.0.2.2", "out", "eth0"],
    ];
    for arguments in all {
        let output = net.towpath(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_bad_client_does_no_harm() {
    use std::io::{Read, Write};
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let path = format!("/run/towpath/{}/control.sock", net.inode());
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.write_all(b"{\"request\":\"explain\",\"source\":\"x\"}\n").unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"{\"error\":\"");
    assert!(net.json(&["status"])["in_sync"].as_bool().unwrap());
}
