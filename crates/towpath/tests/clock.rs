//! Clocks that jump. Only in the lab's virtual machine, whose clock nobody else goes by.

mod common;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::Net;
use support::Asker;

const YEAR: i64 = 365 * 86400;

/// Sets CLOCK_REALTIME forth or back when it is made, and the other way when it goes.
struct Jump(i64);

impl Jump {
    fn new(seconds: i64) -> Self {
        jump(seconds);
        Self(seconds)
    }
}

impl Drop for Jump {
    fn drop(&mut self) {
        jump(-self.0);
    }
}

fn jump(seconds: i64) {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls take a pointer to a timespec of ours, which outlives them.
    let result = unsafe {
        libc::clock_gettime(libc::CLOCK_REALTIME, &mut time);
        time.tv_sec += seconds;
        libc::clock_settime(libc::CLOCK_REALTIME, &time)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Connections stay fast, nothing is lost, and nobody takes the daemon for dead or for ages old.
fn goes_on(net: &Net, asker: &Asker) {
    let packets = || {
        let flow = support::flow(net, asker.port()).expect("it is known");
        assert!(support::is_fast(&flow), "{flow}");
        support::fast_packets(&flow)
    };
    let before = packets();
    asker.ask(100);
    let after = packets();
    assert!((0..2).all(|way| after[way] >= before[way] + 100), "{before:?} {after:?}");
    let status = net.json(&["status"]);
    assert_eq!(status["in_sync"], true);
    assert!(status["up_seconds"].as_u64().expect("a number") < 3600, "{}", status["up_seconds"]);
    let text = String::from_utf8(net.towpath(&["status"]).stdout).expect("text");
    let up = text.lines().next().expect("a line");
    assert!(!up.contains(" d "), "{up}");
    for reason in ["unattended", "flow-unwatched"] {
        assert_eq!(net.exceptions(reason), 0, "{reason}");
    }
}

#[test]
fn a_clock_that_jumps_changes_nothing() {
    let cmdline = std::fs::read_to_string("/proc/cmdline").expect("/proc");
    if !cmdline.contains("towpath.run=") {
        return println!("SKIP: this machine's clock is not ours to set (lab/vm has one of its own)");
    }
    let net = support::firewall();
    let arguments = ["--flows", "established", "--detach-after", "5", "eth0", "eth1"];
    let mut daemon = net.up(&arguments);
    let asker = Asker::start(&net, 7002);
    asker.becomes_fast(&net);
    goes_on(&net, &asker);
    for years in [30, -50] {
        let _jump = Jump::new(years * YEAR);
        goes_on(&net, &asker);
        // A daemon that starts then is none the worse.
        daemon.signal(libc::SIGKILL);
        daemon = net.up(&arguments);
        asker.becomes_fast(&net);
        goes_on(&net, &asker);
    }
    goes_on(&net, &asker);
}
