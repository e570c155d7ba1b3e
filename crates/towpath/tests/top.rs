//! `towpath top`: batches for scripts, and the live view on a terminal of its own.

mod common;

use common::{Net, RIGHT, Stream, eventually};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

#[test]
fn batches_tell_rates_and_reasons() {
    let net = Net::new();
    assert!(net.refused(&["top", "-n", "1"]).contains("no towpath runs"));
    let _daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    net.flows(50);
    let mut pings =
        net.left.command("ping").args(["-i", "0.05", "-q", "192.0.2.1"]).stdout(Stdio::null()).spawn().expect("ping");
    let top = net.towpath(&["top", "-n", "2", "-d", "1", "--json"]);
    let text = net.towpath(&["top", "-b", "-n", "1", "-d", "0.5"]);
    pings.kill().expect("ended");
    pings.wait().expect("ended");
    stream.finish_complete();

    assert!(top.status.success(), "{top:?}");
    let lines: Vec<Value> = String::from_utf8(top.stdout)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number: {line}"));
        assert!(number(&line["seconds"]) >= 1.0 && line["in_sync"] == true, "{line}");
        let [left, right] = line["ports"].as_array().expect("ports").as_slice() else { panic!("two ports: {line}") };
        assert_eq!((&left["port"], &right["port"]), (&"eth0".into(), &"eth1".into()));
        assert!(number(&left["rx_packets"]) > 10.0 && number(&right["tx_packets"]) > 10.0, "{line}");
        // An Ethernet, an IPv4 and a UDP header, and a number of eight bytes.
        let bits = number(&left["rx_bits"]) / number(&left["rx_packets"]);
        assert!((bits - 8.0 * 50.0).abs() < 1.0, "{bits} bits a packet: {line}");
        let (fast, exceptions) = (number(&left["rx_packets"]), number(&left["exceptions"]));
        assert!((number(&left["fast"]) - fast / (fast + exceptions)).abs() < 1e-9, "{line}");
        let local = |row: &&Value| row["port"] == "eth0" && row["reason"] == "local-destination";
        let row =
            line["exceptions"].as_array().expect("exceptions").iter().find(local).expect("pings are the router's own");
        assert!(number(&row["packets"]) > 1.0 && row["text"] == "the router's own address", "{line}");
    }
    let text = String::from_utf8(text.stdout).expect("text");
    for word in
        ["in sync with Linux; 0 settings", "to Linux/s", "eth0", "local-destination", "the router's own address"]
    {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
    let wrong = net.towpath(&["top", "-n", "0"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[test]
fn the_busiest_prefixes_are_estimated_from_a_sample() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let traced = || net.ip("-d link show eth0").contains("towpath_traced");
    let stream = Stream::start(&net, RIGHT);
    net.flows(50);
    let mut pings =
        net.left.command("ping").args(["-i", "0.02", "-q", "192.0.2.1"]).stdout(Stdio::null()).spawn().expect("ping");
    let plain = net.towpath(&["top", "-n", "1", "--json"]);
    let top = net.towpath(&["top", "--prefixes", "-n", "4", "--json"]);
    let text = net.towpath(&["top", "-p", "-n", "1"]);
    pings.kill().expect("ended");
    pings.wait().expect("ended");
    stream.finish_complete();
    eventually("the program without traces returns", || (!traced()).then_some(()));

    let plain: Value = serde_json::from_slice(&plain.stdout).expect("JSON");
    assert!(plain["prefixes"].is_null(), "{plain}");
    assert!(top.status.success(), "{top:?}");
    let (mut counted, mut estimated, mut own) = (0.0, 0.0, 0);
    for line in String::from_utf8(top.stdout).expect("text").lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let (sample, seconds) = (&line["prefixes"], line["seconds"].as_f64().expect("a number"));
        let busiest = sample["busiest"].as_array().expect("prefixes");
        let number = |value: &Value| value.as_f64().expect("a number");
        let seen: f64 = busiest.iter().map(|prefix| number(&prefix["seen"])).sum();
        assert!(number(&sample["one_in"]) >= 1.0 && number(&sample["seen"]) == seen && seen > 0.0, "{line}");
        let first = &busiest[0];
        assert_eq!((&first["prefix"], &first["fast"]), (&"198.51.100.0/24".into(), &1.0.into()), "{line}");
        assert!((number(&first["bits"]) / number(&first["packets"]) - 400.0).abs() < 1e-6, "{line}");
        counted += number(&line["ports"][0]["rx_packets"]) * seconds;
        estimated += number(&first["packets"]) * seconds;
        let local = busiest.iter().find(|prefix| prefix["prefix"] == "local 192.0.2.1/32");
        own += local.map_or(0, |prefix| prefix["seen"].as_u64().expect("a number"));
        assert!(local.is_none_or(|prefix| prefix["fast"] == 0.0), "{line}");
    }
    assert!(own > 0, "pings are the router's own");
    // Of some thousand packets one in three or so was seen: chance is off by some hundredths.
    assert!((estimated / counted - 1.0).abs() < 0.4, "{estimated} packets of {counted}");
    let text = String::from_utf8(text.stdout).expect("text");
    for word in ["busiest prefixes, estimated: 1 packet in ", "198.51.100.0/24", "100 %"] {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

/// `towpath top` on a terminal.
struct Live {
    master: File,
    slave: File,
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
    before: Vec<u32>,
}

impl Live {
    fn start(net: &Net, arguments: &[&str]) -> Self {
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: 40, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the two descriptors are filled in and owned by nobody else; no name and no settings are given.
        let (master, slave) = unsafe {
            let opened = libc::openpty(&mut master, &mut slave, std::ptr::null_mut(), std::ptr::null(), &size);
            assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
            (File::from_raw_fd(master), File::from_raw_fd(slave))
        };
        let before = settings(&slave);
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        let command = command.args(["top", "-d", "0.2"]).args(arguments).env("TERM", "xterm");
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("started");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (heard, mut reader) = (said.clone(), master.try_clone().expect("a descriptor"));
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut chunk) {
                heard.lock().expect("heard").extend_from_slice(&chunk[..length]);
            }
        });
        Self { master, slave, child, said, before }
    }

    fn await_words(&self, words: &str) {
        eventually(&format!("{words:?} on the terminal"), || self.has_said(words).then_some(()));
    }

    fn has_said(&self, words: &str) -> bool {
        String::from_utf8_lossy(&self.said.lock().expect("said")).contains(words)
    }

    /// It must have ended well, and have left the terminal as it was.
    fn ended(mut self) {
        let status = eventually("top ends", || self.child.try_wait().expect("waited"));
        assert!(status.success(), "{status}");
        self.await_words(LEAVE_SCREEN);
        self.await_words(SHOW_CURSOR);
        assert_eq!(settings(&self.slave), self.before, "the terminal's settings");
    }
}

const ENTER_SCREEN: &str = "\x1b[?1049h";
const LEAVE_SCREEN: &str = "\x1b[?1049l";
const SHOW_CURSOR: &str = "\x1b[?25h";

/// A terminal's modes.
fn settings(terminal: &File) -> Vec<u32> {
    // SAFETY: plain data, for which zeroes are valid, and which the call fills.
    let modes = unsafe {
        let mut modes: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut modes), 0);
        modes
    };
    vec![modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
}

#[test]
fn the_live_view_ends_on_q_and_restores_the_terminal() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    let mut live = Live::start(&net, &["--prefixes"]);
    for words in [ENTER_SCREEN, "in sync with Linux", "eth0", "100 %", "q quits", "busiest prefixes, estimated"] {
        live.await_words(words);
    }
    assert_ne!(settings(&live.slave), live.before, "keys come one by one");
    stream.finish_complete();
    // It lives on without a daemon, and with the next one.
    assert!(daemon.signal(libc::SIGTERM).success());
    // Of "no towpath runs in this network namespace; …" that is where "the daemon is stopping" cannot have stood before.
    live.await_words("namespace;");
    assert!(live.child.try_wait().expect("waited").is_none());
    live.said.lock().expect("said").clear();
    let _daemon = net.up(&["eth0", "eth1"]);
    live.await_words("eth1");
    assert!(!live.has_said(LEAVE_SCREEN));
    live.master.write_all(b"xq").expect("typed");
    live.ended();
}

#[test]
fn the_live_view_ends_on_a_signal_and_restores_the_terminal() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let live = Live::start(&net, &[]);
        live.await_words("eth0");
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(live.child.id() as i32, signal) }, 0);
        live.ended();
    }
    let live = Live::start(&net, &[]);
    live.await_words("eth0");
    (&live.master).write_all(b"\x03").expect("Ctrl-C");
    live.ended();
    assert!(net.json(&["status"])["in_sync"] == true, "the daemon goes on");
}
