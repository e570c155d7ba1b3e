//! A router between two hosts, and the command run in the router.
//!
//!     left 192.0.2.2, 2001:db8:1::2 -- eth0 [router] eth1 -- right 198.51.100.2, 2001:db8:2::2
//!          .1 and ::1 are the router's
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use towpath_lab::{Lab, Node, PacketSocket, Process, wait_for};
use towpath_tables::record::TableId;

pub const LEFT: &str = "192.0.2.2";
pub const RIGHT: &str = "198.51.100.2";
pub const LEFT6: &str = "2001:db8:1::2";
pub const RIGHT6: &str = "2001:db8:2::2";

/// How long to wait for anything before the test fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` gives something.
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_for(DEADLINE, what, condition).expect("in time")
}

pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().expect("an address"), port)
}

/// A socket for datagrams that waits for each as long as anything is waited for.
pub fn datagrams(node: &Node, address: &str, port: u16) -> UdpSocket {
    let socket = node.enter(|| UdpSocket::bind(at(address, port))).expect("in the node").expect("bound");
    socket.set_read_timeout(Some(DEADLINE)).expect("set");
    socket
}

/// The words of a command line.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The three nodes.
pub struct Net {
    pub router: Node,
    pub left: Node,
    pub right: Node,
    lab: Lab,
    /// The command that is run
    binary: Mutex<PathBuf>,
}

/// The command that was built with the tests, with their features; or the one that TOWPATH_COMMAND names.
pub fn built() -> PathBuf {
    std::env::var_os("TOWPATH_COMMAND").map_or(env!("CARGO_BIN_EXE_towpath").into(), PathBuf::from)
}

impl Net {
    /// The hosts, the router, and Linux forwarding between them.
    pub fn new() -> Self {
        let lab = Lab::new("towpath").expect("a lab");
        let node = |name| lab.node(name).expect("a node");
        let net = Self::of(node("router"), node("left"), node("right"), lab);
        net.router.forward().expect("forwarding");
        net.connect_left();
        net.connect_right();
        for (from, to) in [(&net.left, RIGHT), (&net.right, LEFT), (&net.left, RIGHT6), (&net.right, LEFT6)] {
            eventually("the hosts reach each other through Linux", || net.ping(from, to).then_some(()));
        }
        net
    }

    /// As `new`, but what Linux decides, it decides on another host, which is given too. Ports of the same name and MAC address
    /// are one port: the router hands whatever comes in by one to the other, as it is.
    ///
    ///     left -- eth0 [router] eth1 -- right
    ///               |  |     |  |
    ///              c0  ctl  c1          ctl: 198.18.0.1 of the router's, 198.18.0.2 of the other's
    ///               |  |     |
    ///             eth0 ctl eth1
    ///               [decider]   192.0.2.1, 198.51.100.1, ...
    pub fn apart() -> (Self, Node) {
        let lab = Lab::new("towpath").expect("a lab");
        let node = |name| lab.node(name).expect("a node");
        let net = Self::of(node("router"), node("left"), node("right"), lab);
        let decider = net.lab.node("decider").expect("a node");
        decider.forward().expect("forwarding");
        net.router.sh("sysctl -q net.ipv6.conf.default.disable_ipv6=1").expect("no packets of its own");
        let link = |a, b| net.lab.link(a, b).expect("a link");
        link((&net.router, "ctl"), (&decider, "ctl"));
        for (node, address) in [(&net.router, "198.18.0.1/30"), (&decider, "198.18.0.2/30")] {
            node.run(["ip", "address", "add", address, "dev", "ctl"]).expect("an address");
        }
        for (host, port, cable) in [(&net.left, "eth0", "c0"), (&net.right, "eth1", "c1")] {
            link((&net.router, cable), (&decider, port));
            link((&net.router, port), (host, "up0"));
            net.take_address(&decider, port);
            for (from, to) in [(port, cable), (cable, port)] {
                net.exec(&format!("tc qdisc add dev {from} clsact"));
                let all = "ingress protocol all u32 match u32 0 0 action mirred egress redirect dev";
                net.exec(&format!("tc filter add dev {from} {all} {to}"));
            }
        }
        net.address_of(&decider, &net.left, "eth0", "192.0.2", "2001:db8:1");
        net.address_of(&decider, &net.right, "eth1", "198.51.100", "2001:db8:2");
        for (from, to) in [(&net.left, RIGHT), (&net.right, LEFT), (&net.left, RIGHT6), (&net.right, LEFT6)] {
            eventually("the hosts reach each other through Linux", || net.ping(from, to).then_some(()));
        }
        (net, decider)
    }

    fn of(router: Node, left: Node, right: Node, lab: Lab) -> Self {
        Self { router, left, right, lab, binary: Mutex::new(built()) }
    }

    /// A router with the port lan0 instead of eth0, which is to have the wire tap0, a TAP.
    pub fn wired() -> Self {
        let net = Self::new();
        net.ip("link delete eth0");
        for device in ["lan0", "tap0"] {
            net.ip(&format!("tuntap add dev {device} mode tap"));
        }
        net.ip("link set lan0 up");
        net.ip("address add 192.0.2.1/24 dev lan0");
        net.ip("address add 2001:db8:1::1/64 dev lan0 nodad");
        net
    }

    /// Makes tap0, which the daemon has opened, left's interface.
    pub fn connect_tap(&self) {
        self.ip(&format!("link set tap0 netns {}", self.left.netns()));
        self.left
            .sh("ip link set tap0 up; ip address add 192.0.2.2/24 dev tap0; \
                 ip address add 2001:db8:1::2/64 dev tap0 nodad; ip route replace default via 192.0.2.1; \
                 ip -6 route replace default via 2001:db8:1::1")
            .expect("left's interface");
        let reached = || (self.ping(&self.left, RIGHT) && self.ping(&self.left, RIGHT6)).then_some(());
        eventually("left is reached", reached);
    }

    /// Has another build of the command be run from now on.
    pub fn set_binary(&self, path: &Path) {
        *self.binary.lock().expect("lock") = path.into();
    }

    fn binary(&self) -> PathBuf {
        self.binary.lock().expect("lock").clone()
    }

    /// Gives the router's port the MAC address that the other host's has.
    pub fn take_address(&self, decider: &Node, port: &str) {
        let mac = decider.mac(port).expect("a MAC address").map(|byte| format!("{byte:02x}")).join(":");
        self.ip(&format!("link set {port} address {mac}"));
    }

    /// The lab's own folder.
    pub fn folder(&self) -> &Path {
        self.lab.folder()
    }

    /// A packet socket at each host.
    pub fn packet_sockets(&self) -> [PacketSocket; 2] {
        [&self.left, &self.right].map(|host| host.packet_socket("up0").expect("a packet socket"))
    }

    /// (host, router) on the left, and on the right.
    pub fn macs(&self) -> [([u8; 6], [u8; 6]); 2] {
        let mac = |node: &Node, port| node.mac(port).expect("a MAC address");
        [(&self.left, "eth0"), (&self.right, "eth1")].map(|(host, port)| (mac(host, "up0"), mac(&self.router, port)))
    }

    pub fn connect_left(&self) {
        self.connect(&self.left, "eth0", "192.0.2", "2001:db8:1");
    }

    pub fn connect_right(&self) {
        self.connect(&self.right, "eth1", "198.51.100", "2001:db8:2");
    }

    /// One more host, behind one more port of the router's.
    pub fn add_host(&self, name: &str, port: &str, v4: &str, v6: &str) -> Node {
        let host = self.lab.node(name).expect("a node");
        self.connect(&host, port, v4, v6);
        host
    }

    fn connect(&self, host: &Node, port: &str, v4: &str, v6: &str) {
        self.lab.link((&self.router, port), (host, "up0")).expect("a link");
        self.address(host, port, v4, v6);
    }

    /// As `connect_right`, over an interface of this index.
    pub fn connect_right_by_index(&self, index: u32) {
        self.connect_right_with(&format!("index {index}"), "");
    }

    /// As `connect_right`, over a link with these options at its two ends.
    pub fn connect_right_with(&self, here: &str, there: &str) {
        self.ip(&format!("link add eth1 {here} type veth peer name up0 netns {} {there}", self.right.netns()));
        for (node, device) in [(&self.router, "eth1"), (&self.right, "up0")] {
            node.run(["ip", "link", "set", device, "up"]).expect("up");
        }
        for (node, device) in [(&self.router, "eth1"), (&self.right, "up0")] {
            node.run(["ethtool", "-K", device, "gro", "on", "tx", "off", "txvlan", "off"]).expect("as in a lab");
        }
        self.address(&self.right, "eth1", "198.51.100", "2001:db8:2");
    }

    fn address(&self, host: &Node, port: &str, v4: &str, v6: &str) {
        self.address_of(&self.router, host, port, v4, v6);
    }

    fn address_of(&self, router: &Node, host: &Node, port: &str, v4: &str, v6: &str) {
        for (node, device, number) in [(router, port, 1), (host, "up0", 2)] {
            node.sh(&format!("ip address add {v4}.{number}/24 dev {device}")).expect("an address");
            node.sh(&format!("ip address add {v6}::{number}/64 dev {device} nodad")).expect("an address");
        }
        host.sh(&format!("ip route add default via {v4}.1; ip route add default via {v6}::1")).expect("routes");
    }

    /// `ip` in the router.
    pub fn ip(&self, arguments: &str) -> String {
        self.exec(&format!("ip {arguments}"))
    }

    /// A command in the router that must succeed.
    pub fn exec(&self, line: &str) -> String {
        self.router.run(words(line)).expect(line)
    }

    pub fn ping(&self, from: &Node, to: &str) -> bool {
        from.run(["ping", "-c1", "-W1", "-q", to]).is_ok()
    }

    /// Runs a program in the router to its end.
    pub fn output(&self, words: &[&str]) -> Output {
        self.router.command(words[0]).args(&words[1..]).stdin(Stdio::null()).output().expect("ip netns exec")
    }

    /// Runs `towpath` to its end.
    pub fn towpath(&self, arguments: &[&str]) -> Output {
        self.output(&[&[self.binary().to_str().expect("a path of text")], arguments].concat())
    }

    /// Runs `towpath up`, which must end with this status, say these words, and leave nothing that was not there.
    pub fn up_refused(&self, arguments: &[&str], status: i32, words: &[&str]) {
        let clean = self.traces();
        let output = self.output(&[&["timeout", "20", env!("CARGO_BIN_EXE_towpath"), "up"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{word:?} is missing in: {message}");
        }
        assert_eq!(self.traces(), clean, "{arguments:?}");
    }

    /// Runs a read command and gives its JSON.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.towpath(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Runs a command that must fail with status 1; gives its message.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.towpath(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{message}");
        message
    }

    /// Starts the daemon and waits until it is ready.
    pub fn up(&self, ports: &[&str]) -> Daemon {
        self.up_with(ports, &[])
    }

    /// Starts the daemon.
    pub fn start_up(&self, ports: &[&str]) -> Daemon {
        let mut command = self.router.command(self.binary());
        command.arg("up").args(ports);
        self.start(command)
    }

    /// As `up`, with environment variables.
    pub fn up_with(&self, ports: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let mut command = self.router.command(self.binary());
        command.arg("up").args(ports).envs(environment.iter().copied());
        let mut daemon = self.start(command);
        daemon.await_log("ready: ");
        daemon
    }

    /// Starts a command (see `Node::command`, `with_only`) that goes on running.
    pub fn start(&self, command: Command) -> Daemon {
        Daemon(self.router.start(command).expect("started"))
    }

    /// `towpath` in the router's network with these capabilities only (as setpriv writes them), and with the mounts of
    /// the machine, which `ip netns exec` would hide and not everyone may look for elsewhere.
    pub fn with_only(&self, capabilities: &str, arguments: &[&str]) -> Command {
        with_only(&self.router, capabilities, arguments)
    }

    /// Attaches an XDP program of another party that passes everything; it goes with the descriptor.
    pub fn attach_foreign_program(&self, port: &str) -> OwnedFd {
        let ifindex = self.router.ifindex(port).expect("index");
        let attach = || {
            // r0 = XDP_PASS; exit
            let code: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
            let (code, license) = (code.as_ptr() as u64, c"GPL".as_ptr() as u64);
            let mut load = [6, 2, code as u32, (code >> 32) as u32, license as u32, (license >> 32) as u32];
            let program = bpf(5, &mut load);
            const BPF_XDP: u32 = 37;
            const DRIVER_MODE: u32 = 4;
            bpf(28, &mut [program.as_raw_fd() as u32, ifindex, BPF_XDP, DRIVER_MODE])
        };
        self.router.enter(attach).expect("in the router")
    }

    /// Packets forwarded by the fast path.
    pub fn forwarded(&self) -> u64 {
        let stats = self.json(&["show", "stats"]);
        stats["ports"].as_array().expect("ports").iter().map(|port| port["rx_packets"].as_u64().expect("count")).sum()
    }

    /// Waits until the fast path has forwarded `more` packets beyond those it has now.
    pub fn flows(&self, more: u64) {
        let before = self.forwarded();
        eventually("the fast path forwards the stream", || (self.forwarded() >= before + more).then_some(()));
    }

    /// Packets handed to Linux for `reason`, over all ports.
    pub fn exceptions(&self, reason: &str) -> u64 {
        let all = self.json(&["show", "exceptions"]);
        let rows = all["exceptions"].as_array().expect("exceptions");
        rows.iter().filter(|row| row["reason"] == reason).map(|row| row["packets"].as_u64().expect("count")).sum()
    }

    /// What `show ports` says of a port; null if it does not.
    pub fn port(&self, name: &str) -> serde_json::Value {
        let ports = self.json(&["show", "ports"]);
        let all = ports["ports"].as_array().expect("ports");
        all.iter().find(|port| port["name"] == name).cloned().unwrap_or_default()
    }

    /// Inode of the router's namespace, which names its instance.
    pub fn inode(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(format!("/run/netns/{}", self.router.netns())).expect("a namespace").ino()
    }

    /// Packets that Linux has forwarded in the router.
    pub fn forwarded_by_linux(&self) -> u64 {
        let text = self.exec("cat /proc/net/snmp");
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: ")).map(words);
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let place = names.iter().position(|name| *name == "ForwDatagrams").expect("a counter");
        values[place].parse().expect("a number")
    }

    /// Folder of the router's pins.
    pub fn pins(&self) -> PathBuf {
        format!("/sys/fs/bpf/towpath/{}", self.inode()).into()
    }

    /// What a towpath leaves in the router: programs on interfaces, an interface of its own, and pins.
    pub fn traces(&self) -> String {
        let links: Vec<_> = self
            .ip("-d link")
            .lines()
            .filter(|line| line.contains("xdp") || line.contains(" fptun:"))
            .map(str::to_string)
            .collect();
        let pins = std::fs::read_dir(self.pins()).map_or(0, Iterator::count);
        format!("{links:?}, {pins} pins")
    }
}

/// As `Net::with_only`, in any node's network.
pub fn with_only(node: &Node, capabilities: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", node.netns()));
    command.args(["setpriv", "--inh-caps=-all", &format!("--bounding-set={capabilities}")]);
    command.arg(env!("CARGO_BIN_EXE_towpath")).args(arguments);
    command
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.towpath(&["down"]);
    }
}

/// bpf(2) with an attribute of 32-bit words; the commands used give descriptors.
pub fn bpf(command: i32, attribute: &mut [u32]) -> OwnedFd {
    // SAFETY: the attribute and what it points to outlive the call; the kernel gives a new descriptor or an error.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, attribute.as_mut_ptr(), size_of_val(attribute));
        assert!(fd >= 0, "bpf({command}): {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// A running `towpath up`.
pub struct Daemon(Process);

impl Daemon {
    /// One that was started by hand.
    pub fn of(process: Process) -> Self {
        Self(process)
    }

    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Waits until it has found the tables that another left.
    pub fn await_tables(&self) {
        let maps = || std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("maps");
        eventually("the tables are found", || (maps().matches("bpf-map").count() >= TableId::ALL.len()).then_some(()));
    }

    /// Waits until it has said this.
    pub fn await_log(&mut self, text: &str) {
        self.0.wait_for_output(DEADLINE, text).expect("words in the log");
    }

    pub fn send(&mut self, signal: i32) {
        self.0.signal(signal);
    }

    /// Sends a signal and waits for the end.
    pub fn signal(&mut self, signal: i32) -> ExitStatus {
        self.send(signal);
        self.wait()
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.0.wait(DEADLINE).expect("an end")
    }
}

/// Within this time a throttled stream delivers next to nothing, and a free one some ten packets.
const WINDOW: Duration = Duration::from_millis(15);
/// Arrivals that are remembered: what comes in some seconds.
const REMEMBERED: usize = 4096;

/// A socket of the right host at `destination`, port 7000, and one of the left host. A process that another test is just
/// starting holds copies of an earlier socket until it executes its program, so the port may not be free at once.
fn udp_ends(net: &Net, destination: &str) -> (UdpSocket, UdpSocket) {
    let destination: IpAddr = destination.parse().expect("an address");
    let any: IpAddr = if destination.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let bind = |node: &Node, address, port| node.enter(|| UdpSocket::bind((address, port))).expect("in the node");
    let inbound = eventually("port 7000 is free", || bind(&net.right, destination, 7000).ok());
    (inbound, bind(&net.left, any, 0).expect("bound"))
}

/// A stream of one packet each millisecond, and when they last arrived.
pub struct Beat {
    stop: Arc<AtomicBool>,
    arrivals: Arc<Mutex<VecDeque<Instant>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Beat {
    pub fn start(net: &Net, destination: &str) -> Self {
        let (inbound, outbound) = udp_ends(net, destination);
        inbound.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        let target = inbound.local_addr().expect("bound");
        let stop = Arc::new(AtomicBool::new(false));
        let arrivals = Arc::new(Mutex::new(VecDeque::new()));
        let (stopped, noted) = (stop.clone(), arrivals.clone());
        let receive = move || {
            while !stopped.load(Ordering::Relaxed) {
                if inbound.recv(&mut [0; 8]).is_ok() {
                    let mut noted = noted.lock().expect("arrivals");
                    if noted.len() == REMEMBERED {
                        noted.pop_front();
                    }
                    noted.push_back(Instant::now());
                }
            }
        };
        let stopped = stop.clone();
        let send = move || {
            while !stopped.load(Ordering::Relaxed) {
                // A refusal that comes back by ICMP is an error of the next call.
                let _ = outbound.send_to(&[0; 8], target);
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        Self { stop, arrivals, threads: vec![std::thread::spawn(receive), std::thread::spawn(send)] }
    }

    /// When the last packet arrived that was no trickle: `dense` or more within `WINDOW`.
    pub fn last(&self, dense: usize) -> Option<Instant> {
        let arrivals = self.arrivals.lock().expect("arrivals");
        let windows = (dense - 1..arrivals.len()).rev().map(|last| (arrivals[last + 1 - dense], arrivals[last]));
        windows.into_iter().find(|(first, last)| *last - *first < WINDOW).map(|(_, last)| last)
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// A paced stream of numbered packets from left to right, at most one each millisecond.
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<bool>>,
    inbound: UdpSocket,
}

impl Stream {
    pub fn start(net: &Net, destination: &str) -> Self {
        let (inbound, outbound) = udp_ends(net, destination);
        inbound.set_read_timeout(Some(DEADLINE)).expect("timeout");
        enlarge_buffer(&inbound);
        outbound.connect(inbound.local_addr().expect("bound")).expect("connected");
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), sent.clone());
        let receiving = inbound.try_clone().expect("a second descriptor");
        Self {
            stop,
            sent,
            sender: std::thread::spawn(move || send_paced(&outbound, &stopped, &count)),
            receiver: std::thread::spawn(move || receive_all(&receiving)),
            inbound,
        }
    }

    /// Packets sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until this many more packets have been sent.
    pub fn advance(&self, more: u64) {
        let before = self.sent.load(Ordering::Relaxed);
        eventually("the stream goes on", || (self.sent.load(Ordering::Relaxed) >= before + more).then_some(()));
    }

    /// Ends the stream; nothing of it may have been lost.
    pub fn finish_complete(self) {
        let late = self.inbound.try_clone().expect("a second descriptor");
        let (sent, lost) = self.finish();
        assert!(
            sent > 0 && lost.is_empty(),
            "{} of {sent} lost, {} of all that came because the receiver was too slow: {lost:?}",
            lost.len(),
            dropped(&late)
        );
    }

    /// Ends the stream; how many packets it had, and those lost.
    pub fn finish(self) -> (u64, Vec<u64>) {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().expect("sender");
        let seen = self.receiver.join().expect("receiver");
        let sent = self.sent.load(Ordering::Relaxed);
        (sent, (0..sent).filter(|number| !seen.get(*number as usize).copied().unwrap_or(false)).collect())
    }
}

/// Has the deciding Linux hold the neighbour RIGHT for reachable for a short time only.
pub fn shorten_reachability(decider: &Node) {
    // So that probing does not itself keep the entry in use, it is reachable (2 to 6 s) for longer than it is delayed.
    for (name, value) in [("base_reachable_time_ms", "4000"), ("delay_first_probe_time", "1")] {
        decider.sysctl(&format!("net/ipv4/neigh/eth1/{name}"), value).expect("set");
    }
    // An entry made before would go by the times of then.
    decider.sh("ip neigh flush dev eth1").expect("flushed");
}

/// Sees the deciding Linux probe the neighbour RIGHT because the fast path has packets for it, none of which is an exception.
pub fn sees_a_neighbour_in_use_probed(net: &Net, decider: &Node) {
    let reachable = |wanted| {
        let entry = || decider.sh(&format!("ip neigh show {RIGHT} dev eth1")).expect("neighbours");
        let what = format!("whether the neighbour is reachable becomes {wanted}");
        eventually(&what, || (entry().contains("REACHABLE") == wanted).then_some(()));
    };
    // Nobody but the fast path uses the entry, and that one-way: without it, Linux would leave it stale for ever.
    reachable(false);
    let stream = Stream::start(net, RIGHT);
    net.flows(100);
    let before = net.exceptions("no-neighbour");
    for wanted in [true, false, true] {
        reachable(wanted);
    }
    assert_eq!(net.exceptions("no-neighbour"), before);
    stream.finish_complete();
}

/// Makes room for what comes while the receiver waits for a processor: a frame that was redirected counts as a page, of
/// which the default holds not fifty.
pub fn enlarge_buffer(socket: &UdpSocket) {
    let bytes: libc::c_int = 64 << 20;
    // SAFETY: the option is an integer, which outlives the call; the socket is open.
    let result = unsafe {
        let (value, length) = ((&raw const bytes).cast(), size_of_val(&bytes) as u32);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, length)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Packets that came and found no room in the socket.
fn dropped(socket: &UdpSocket) -> u32 {
    const SO_MEMINFO: i32 = 55;
    const SK_MEMINFO_DROPS: usize = 8;
    let mut info = [0u32; 9];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: pointer and length describe `info`, which lives across the call.
    let ret = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut length)
    };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
    info[SK_MEMINFO_DROPS]
}

/// Sends numbers until told to stop, at most one each millisecond. A sender that had to wait for a processor does not make up
/// for it: a burst may overflow a ring, which says nothing about the router.
pub fn paced(stop: &AtomicBool, sent: &AtomicU64, mut send: impl FnMut(u64)) {
    let mut due = Instant::now();
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        send(number);
        number += 1;
        sent.store(number, Ordering::Relaxed);
        due = (due + Duration::from_millis(1)).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Sends numbers until told to stop, then the end mark.
fn send_paced(socket: &UdpSocket, stop: &AtomicBool, sent: &AtomicU64) {
    let send = |number: u64| assert_eq!(socket.send(&number.to_be_bytes()).expect("sent"), 8);
    paced(stop, sent, send);
    std::thread::sleep(Duration::from_millis(50));
    send(u64::MAX);
}

/// Receives until the end mark, or silence; gives which numbers came.
fn receive_all(socket: &UdpSocket) -> Vec<bool> {
    let mut seen = Vec::new();
    let mut buffer = [0; 8];
    while let Ok(length) = socket.recv(&mut buffer) {
        assert_eq!(length, 8, "a packet of the stream");
        let number = u64::from_be_bytes(buffer);
        if number == u64::MAX {
            break;
        }
        let index = number as usize;
        seen.resize(seen.len().max(index + 1), false);
        seen[index] = true;
    }
    seen
}
