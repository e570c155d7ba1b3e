//! Disks that are full: a clear message where one can be given, and nothing lost or left behind.

mod common;

use common::{Net, RIGHT, Stream, eventually};
use std::process::Command;

const TOWPATH: &str = env!("CARGO_BIN_EXE_towpath");

/// A command line in the router, with mounts of its own.
fn with_mounts(net: &Net, line: &str) -> Command {
    let mut command = net.router.command("unshare");
    command.args(["--mount", "sh", "-c", line]);
    command
}

#[test]
fn a_daemon_whose_log_finds_no_room_goes_on_and_says_so_later() {
    let net = Net::new();
    let disk = net.folder().join("disk");
    std::fs::create_dir_all(&disk).expect("a folder");
    let disk = disk.display();
    let daemon = net.start(with_mounts(
        &net,
        &format!(
            "mount -t tmpfs -o size=64k tmpfs {disk}; cd {disk}; cat /dev/zero >filler 2>/dev/null; \
             exec {TOWPATH} up eth0 eth1 >log 2>&1"
        ),
    ));
    eventually("it is ready", || net.towpath(&["status"]).status.success().then_some(()));
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    // What it says of this is lost, too.
    net.ip("link set eth1 mtu 1450");
    let mtu = |wanted: u64| {
        eventually("the MTU is known", || (net.json(&["show", "ports"])["ports"][1]["mtu"] == wanted).then_some(()));
    };
    mtu(1450);
    let seen = format!("/proc/{}/root/{disk}", daemon.pid());
    let log = || std::fs::read_to_string(format!("{seen}/log")).expect("the log");
    assert_eq!(log(), "", "there is no room");
    std::fs::remove_file(format!("{seen}/filler")).expect("room");
    net.ip("link set eth1 mtu 1500");
    mtu(1500);
    eventually("what could not be said is told", || {
        let log = log();
        (log.contains("lines before this one could not be written") && log.contains("MTU of port eth1 is 1500"))
            .then_some(())
    });
    net.flows(100);
    stream.finish_complete();
}

/// A start is refused, with these words, where the file system for sockets and locks is made with these options and filled.
fn is_refused(net: &Net, options: &str, words: &[&str]) {
    let clean = net.traces();
    let output = with_mounts(
        net,
        &format!(
            "mkdir -p /run/towpath; mount -t tmpfs -o {options} tmpfs /run/towpath; \
             head -c 4096 /dev/zero >/run/towpath/filler; timeout 20 {TOWPATH} up eth0 eth1; \
             status=$?; find /run/towpath -mindepth 1 ! -name filler; exit $status"
        ),
    )
    .output()
    .expect("unshare");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{options}: {message}");
    for word in [words, &["No space left on device"]].concat() {
        assert!(message.contains(word), "{options}: {word:?} is missing in: {message}");
    }
    assert!(!message.contains("root"), "that is no remedy: {message}");
    let left = String::from_utf8_lossy(&output.stdout);
    assert!(left.lines().all(|line| line.starts_with("ready: ")), "{options}: {left}");
    assert_eq!(net.traces(), clean, "{options}");
}

#[test]
fn without_room_for_lock_or_sockets_nothing_is_begun() {
    let net = Net::new();
    // Blocks; an inode for nothing; for the folder only; for folder and lock.
    is_refused(&net, "size=4k", &["cannot write /run/towpath/", "/lock"]);
    is_refused(&net, "nr_inodes=2,size=4k", &["cannot make /run/towpath/"]);
    is_refused(&net, "nr_inodes=3,size=4k", &["cannot open /run/towpath/", "/lock"]);
    is_refused(&net, "nr_inodes=4,size=64m", &["cannot listen on /run/towpath/", "/control.sock"]);
}

#[test]
fn an_answer_that_finds_no_room_is_a_failure() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    for line in ["status", "status --json", "show routes", "check", "doctor", "top --batch --count 1"] {
        let output = net.output(&["sh", "-c", &format!("{TOWPATH} {line} >/dev/full")]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {message}");
        assert!(message.contains("cannot write to stdout: No space left on device"), "{line}: {message}");
    }
}
