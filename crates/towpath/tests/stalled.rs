//! What holds while the thread that owns the tables does nothing, as while the kernel verifies a program for it.

mod common;

use common::{Beat, Daemon, Net, RIGHT, eventually};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// More than this after the command is a leak, whatever else the machine does.
const LEAK: Duration = Duration::from_secs(1);
/// Who has heard nothing for so long hears a stream of one packet each millisecond no more.
const SILENCE: Duration = Duration::from_millis(300);

/// A thread stopped by ptrace(2), while others of its process go on; it goes on when this is dropped, by the thread that
/// made it.
struct Stopped(i32);

impl Stopped {
    /// Stops the first thread of a child of this process.
    fn new(pid: u32) -> Self {
        let pid = pid as i32;
        request(libc::PTRACE_SEIZE, pid);
        request(libc::PTRACE_INTERRUPT, pid);
        let mut status = 0;
        // SAFETY: the status outlives the call.
        let stopped = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        assert!(stopped == pid && libc::WIFSTOPPED(status), "{stopped}, {status:#x}");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        request(libc::PTRACE_DETACH, self.0);
    }
}

fn request(what: u32, pid: i32) {
    // SAFETY: none of the requests used reads or writes memory of this process.
    let done = unsafe { libc::ptrace(what, pid, 0, 0) };
    assert_eq!(done, 0, "ptrace({what}): {}", std::io::Error::last_os_error());
}

/// The thread of this name.
fn thread(pid: u32, name: &str) -> u32 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    let mut threads = threads.map(|thread| thread.expect("a thread").path());
    let named =
        |path: &std::path::PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|it| it.trim() == name);
    let path = threads.find(named).expect("a thread of this name");
    path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()).expect("a number")
}

/// A service manager, as far as a daemon sees one.
struct Manager(UnixDatagram, PathBuf);

impl Manager {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("towpath-manager-{}", std::process::id()));
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_nonblocking(true).expect("non-blocking");
        Self(socket, path)
    }

    /// What has come since it was last asked.
    fn heard(&self) -> String {
        let mut buffer = [0; 4096];
        let messages = std::iter::from_fn(|| self.0.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec()));
        messages.map(|message| String::from_utf8(message).expect("UTF-8") + "\n").collect()
    }

    fn hears(&self, word: &str) -> String {
        let mut heard = String::new();
        eventually(word, || {
            heard += &self.heard();
            heard.contains(word).then_some(())
        });
        heard
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.1);
    }
}

/// Sets a policy that drops the stream, which must end in time.
fn drops(net: &Net, beat: &Beat) {
    passes(beat);
    net.router
        .sh("nft 'add table inet t; add chain inet t forward { type filter hook forward priority 0; policy drop; }'")
        .expect("nft");
    let accepted = Instant::now();
    let last = eventually("the stream ends", || beat.last(1).filter(|last| last.elapsed() > SILENCE));
    let after = last.saturating_duration_since(accepted);
    println!("in force after {after:?}");
    assert!(after < LEAK, "packets still passed after {after:?}");
}

fn passes(beat: &Beat) {
    eventually("the stream flows", || beat.last(1).filter(|last| last.elapsed() < SILENCE / 10));
}

/// Stops the daemon's thread, sets and takes back a policy, sets it again, and lets the thread go on.
fn with_stopped(net: &Net, beat: &Beat, daemon: &mut Daemon) {
    let stopped = Stopped::new(daemon.pid());
    drops(net, beat);
    net.exec("nft delete table inet t");
    passes(beat);
    drops(net, beat);
    drop(stopped);
    daemon.await_log("ready: 2 ports, ");
    let policies = || net.json(&["status"])["policies"].as_array().expect("a list").len();
    eventually("the policy is known", || (policies() > 0).then_some(()));
    std::thread::sleep(SILENCE);
    let silent = beat.last(1).expect("arrivals").elapsed();
    assert!(silent > SILENCE, "a packet passed {silent:?} ago");
    net.exec("nft delete table inet t");
    net.flows(50);
    assert_eq!(policies(), 0);
}

#[test]
fn policies_hold_while_the_tables_owner_is_busy() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    let beat = Beat::start(&net, RIGHT);
    net.flows(50);
    with_stopped(&net, &beat, &mut daemon);
}

#[test]
fn policies_hold_while_tables_are_taken_over() {
    let net = Net::new();
    let mut killed = net.up(&["eth0", "eth1"]);
    let beat = Beat::start(&net, RIGHT);
    net.flows(50);
    killed.signal(libc::SIGKILL);
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["up", "eth0", "eth1"]);
    let mut daemon = net.start(command);
    // From then on the tables are watched; the program that takes the place of the old one takes longer to load.
    daemon.await_tables();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!daemon.log().contains("ready"), "{}", daemon.log());
    with_stopped(&net, &beat, &mut daemon);
    assert_eq!(net.json(&["status"])["adopted"], true);
}

#[test]
fn the_service_manager_hears_of_readiness_progress_and_the_end() {
    /// The watchdog's patience: longer than a heartbeat of the cache manager.
    const PATIENCE: Duration = Duration::from_secs(3);
    let net = Net::new();
    let manager = Manager::new();
    let patience = PATIENCE.as_micros().to_string();
    let environment = [("NOTIFY_SOCKET", manager.1.to_str().expect("UTF-8")), ("WATCHDOG_USEC", &patience)];
    let mut daemon = net.up_with(&["eth0", "eth1"], &environment);
    let heard = manager.hears("WATCHDOG=1");
    let ready = heard.find("READY=1\nSTATUS=2 ports, ").expect("it says that it is ready");
    assert!(ready < heard.find("WATCHDOG=1").expect("just heard") && heard.contains("in sync with Linux"), "{heard}");
    let main = daemon.pid();
    for thread in [main, thread(main, "cm")] {
        let stopped = Stopped::new(thread);
        // What was under way, and one heartbeat that was not told of yet.
        std::thread::sleep(PATIENCE / 3 * 2);
        manager.heard();
        std::thread::sleep(PATIENCE);
        let heard = manager.heard();
        assert!(!heard.contains("WATCHDOG"), "without thread {thread}: {heard}");
        drop(stopped);
        manager.hears("WATCHDOG=1");
    }
    net.ip("route add 203.0.113.0/24 via 198.51.100.2");
    manager.hears(&format!("STATUS=2 ports, {} routes", routes(&net)));
    assert!(daemon.signal(libc::SIGTERM).success());
    manager.hears("STOPPING=1");
}

fn routes(net: &Net) -> u64 {
    let status = net.json(&["status"]);
    ["ipv4", "ipv6"].iter().map(|family| status["routes"][family].as_u64().expect("a count")).sum()
}
