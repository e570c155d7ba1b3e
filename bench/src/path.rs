//! The measured arrangement: one router, one sink, and for each contender a source and a port of its own.
//!
//! ```text
//! source ns (one a contender)      router ns                        sink ns
//! [out] ---- veth ---- [i<n>]  forwarding by contender n  [o] ---- veth ---- [in]
//! core 0               its NAPI: a thread on core 1                counts and drops
//! ```
//!
//! All contenders use the same routes and neighbours of the same router, so only the forwarding differs. The sink's
//! NAPI runs in the router's thread, as soft interrupt, for every contender alike.

use crate::bpf::Object;
use crate::ethtool;
use crate::source::{self, FRAME};
use anyhow::{Context, Result, bail};
use aya::programs::ProgramFd;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::time::{Duration, Instant};
use towpath_lab::{Lab, Node, PacketSocket, Process};

/// Core of the traffic source.
pub const SOURCE_CORE: usize = 0;
/// Core of the router.
pub const ROUTER_CORE: usize = 1;
/// The router's port towards the sink.
pub const OUT: &str = "o";

/// How a port's packets are forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contender {
    /// XDP_DROP in the router
    Drop,
    /// XDP_PASS, and Linux behind it
    Pass,
    /// Bare XDP_REDIRECT to the other port
    Redirect,
    /// The same of frames counted down, with other MAC addresses: what any router has to do
    Rewrite,
    /// A minimal program on bpf_fib_lookup, stand-in for xdp-forward
    FibForward,
    /// Linux
    Linux,
    /// Towpath
    Towpath,
}

impl Contender {
    /// Name in tables and plots.
    pub fn name(self) -> &'static str {
        match self {
            Contender::Drop => "XDP_DROP",
            Contender::Pass => "Linux behind XDP_PASS",
            Contender::Redirect => "bare XDP_REDIRECT",
            Contender::Rewrite => "XDP_REDIRECT, rewritten",
            Contender::FibForward => "bpf_fib_lookup program",
            Contender::Linux => "Linux",
            Contender::Towpath => "Towpath",
        }
    }
}

/// The arrangement, ready to carry traffic.
pub struct Arrangement {
    /// The router's namespace
    pub router: Node,
    /// Whether nothing of what is sent is to arrive
    pub drops: bool,
    sink: Object,
    entries: Vec<Entry>,
    _towpath: Option<Process>,
    _lab: Lab,
}

/// A contender's port and its source.
pub struct Entry {
    /// Who forwards
    pub contender: Contender,
    source: Node,
    object: Object,
    feed: PacketSocket,
    _program: Option<Object>,
    sender: u32,
    port: String,
    napi: u32,
    length: usize,
}

/// Windows tried before giving up.
const TRIES: usize = 20;
/// The same for a load over a span of time.
const LOAD_TRIES: usize = 5;
/// Gateways' MAC addresses but for the last byte, which is the gateway's number; the sink takes all.
pub const GATEWAY_MAC: &str = "02:00:00:00:02";
const PORT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// Gateways on the sink's side.
pub const GATEWAYS: usize = 4;

/// Address of a gateway.
pub fn gateway(ipv6: bool, number: usize) -> String {
    let host = number % GATEWAYS + 2;
    if ipv6 { format!("2001:db8:ffff::{host}") } else { format!("198.19.255.{host}") }
}

impl Arrangement {
    /// Sets up the router and its contenders; `variations` bounds the number of destinations.
    pub fn new(name: &str, contenders: &[Contender], variations: usize) -> Result<Arrangement> {
        Self::with_sink(name, contenders, variations, "sink", &[])
    }

    /// The same, with more options for Towpath.
    pub fn with_options(
        name: &str,
        contenders: &[Contender],
        variations: usize,
        options: &[&str],
    ) -> Result<Arrangement> {
        Self::with_sink(name, contenders, variations, "sink", options)
    }

    /// The same with a sink that notes latencies and changes of the gateway.
    pub fn observed(name: &str, contenders: &[Contender], variations: usize) -> Result<Arrangement> {
        Self::with_sink(name, contenders, variations, "observe", &[])
    }

    fn with_sink(
        name: &str,
        contenders: &[Contender],
        variations: usize,
        program: &str,
        options: &[&str],
    ) -> Result<Arrangement> {
        let lab = Lab::new(name)?;
        let router = lab.node("router")?;
        let sink_node = lab.node("sink")?;
        lab.link((&router, OUT), (&sink_node, "in"))?;
        router.forward()?;
        router.sh("ip address add 198.19.255.1/24 dev o; ip address add 2001:db8:ffff::1/64 dev o nodad")?;
        for number in 0..GATEWAYS {
            let mac = format!("{GATEWAY_MAC}:{number:02x}");
            for ipv6 in [false, true] {
                router.run(["ip", "neigh", "add", &gateway(ipv6, number), "lladdr", &mac, "dev", OUT])?;
            }
        }
        let mut sink = Object::load(1)?;
        let sink_index = sink_node.ifindex("in")?;
        sink_node.enter(|| sink.attach(program, sink_index))??;
        let mut entries = Vec::new();
        for (number, contender) in contenders.iter().enumerate() {
            entries.push(Entry::new(&lab, &router, *contender, number, variations)?);
        }
        let towpath = entries.iter().find(|entry| entry.contender == Contender::Towpath).map(|entry| {
            let (binary, ports) = (towpath_binary()?, [&entry.port as &str, OUT]);
            let mut process = router.spawn([&[&binary as &str, "up"], options, &ports].concat())?;
            process.wait_for_output(Duration::from_secs(120), "ready")?;
            anyhow::Ok(process)
        });
        let mut arrangement =
            Arrangement { router, drops: false, sink, entries, _towpath: towpath.transpose()?, _lab: lab };
        // With one processor there is nothing to bind to, and all is counted together.
        let processors = std::thread::available_parallelism()?.get();
        for entry in arrangement.entries.iter_mut().filter(|_| processors > 1) {
            entry.napi = thread_napi(&arrangement.router, &entry.port)?;
        }
        Ok(arrangement)
    }

    /// Adds routes to the router, spread over the gateways.
    pub fn add_routes(&self, routes: &[(IpAddr, u8)]) -> Result<()> {
        let mut child = self.router.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
        let mut text = std::io::BufWriter::new(child.stdin.take().context("stdin of ip")?);
        for (number, (prefix, length)) in routes.iter().enumerate() {
            writeln!(text, "route add {prefix}/{length} via {}", gateway(prefix.is_ipv6(), number))?;
        }
        drop(text);
        if !child.wait()?.success() {
            bail!("ip -batch could not add the routes");
        }
        Ok(())
    }

    /// What every source sends from now on: one packet to each destination in turn, over and over.
    pub fn set_destinations(&mut self, destinations: &[IpAddr], stamped: bool) -> Result<()> {
        self.entries.iter_mut().try_for_each(|entry| entry.set_destinations(destinations, stamped))
    }

    /// What every source sends from now on: one packet from each address in turn, over and over, to one destination.
    pub fn set_sources(&mut self, sources: &[Ipv4Addr], destination: Ipv4Addr) -> Result<()> {
        let template = source::to(PORT_MAC, destination);
        let variations: Vec<_> = sources.iter().map(|from| source::variation(&template, (*from).into())).collect();
        self.entries.iter_mut().try_for_each(|entry| {
            entry.length = FRAME;
            entry.object.set_source(&template, 4 | source::SOURCES, false, &variations)
        })
    }

    /// What every source sends from now on: this IPv4 packet, in a frame of this VLAN.
    pub fn set_tagged(&mut self, destination: Ipv4Addr, vlan: u16) -> Result<()> {
        let template = source::template(PORT_MAC, "198.51.100.2".parse()?);
        self.set_frame(&source::tagged(&template, destination, vlan))
    }

    /// What every source sends from now on: an IPv4 packet in GRE from one address to another.
    pub fn set_tunnelled(&mut self, destination: Ipv4Addr, outer: [Ipv4Addr; 2]) -> Result<()> {
        self.set_frame(&source::tunnelled(PORT_MAC, ["198.51.100.2".parse()?, destination], outer))
    }

    fn set_frame(&mut self, frame: &[u8; 64]) -> Result<()> {
        self.entries.iter_mut().try_for_each(|entry| {
            entry.length = frame.len();
            entry.object.set_source(frame, 0, false, &[[0; 2]])
        })
    }

    /// Waits until Towpath, if it takes part, has these routes and sends packets to the last of them.
    pub fn wait_in_sync(&self, routes: &[(IpAddr, u8)]) -> Result<()> {
        match self.entries.iter().find(|entry| entry.contender == Contender::Towpath) {
            Some(entry) => self.wait_for_route(routes, &entry.port),
            None => Ok(()),
        }
    }

    /// The same for packets that enter by the port or VLAN sub-interface of this name.
    pub fn wait_for_route(&self, routes: &[(IpAddr, u8)], port: &str) -> Result<()> {
        let Some((prefix, _)) = routes.last() else { return Ok(()) };
        let source = if prefix.is_ipv6() { "2001:db8:fffe::2" } else { "198.51.100.2" };
        let (family, address) = (if prefix.is_ipv6() { "ipv6" } else { "ipv4" }, prefix.to_string());
        // The last may be there before others: if Linux's announcements were lost, all are read again in another order.
        towpath_lab::wait_for(Duration::from_secs(120), "Towpath to have the routes", || {
            let status = ask(&self.router, &["status"])?;
            let all = status["in_sync"] == true && status["routes"][family].as_u64()? >= routes.len() as u64;
            let fast =
                all && ask(&self.router, &["explain", source, &address, "in", port])?["verdict"]["path"] == "fast";
            fast.then_some(())
        })
    }

    /// Fails unless Towpath, if it takes part, forwarded what it was sent (by its own counters).
    pub fn assert_fast_path(&self) -> Result<()> {
        self.assert_fast_path_by(None)
    }

    /// The same where packets enter by a VLAN sub-interface.
    pub fn assert_fast_path_by(&self, vlan: Option<&str>) -> Result<()> {
        match self.forwarded_of_taken(vlan)? {
            Some([fast, taken]) if fast * 100 < taken * 99 => {
                bail!("Towpath forwarded only {fast} of {taken} packets")
            }
            _ => Ok(()),
        }
    }

    /// Packets that Towpath, if it takes part, forwarded by its own counters (as what came in by a VLAN sub-interface, if
    /// one is named), and those that its port has taken from its rings.
    pub fn forwarded_of_taken(&self, vlan: Option<&str>) -> Result<Option<[u64; 2]>> {
        let Some(entry) = self.entries.iter().find(|entry| entry.contender == Contender::Towpath) else {
            return Ok(None);
        };
        let stats = ask(&self.router, &["show", "stats"]).context("no statistics")?;
        let ports = stats["ports"].as_array().context("show stats has no ports")?;
        let port =
            ports.iter().find(|port| port["port"] == vlan.unwrap_or(&entry.port)).context("the port is not shown")?;
        Ok(Some([port["rx_packets"].as_u64().unwrap_or(0), entry.taken(&self.router)?]))
    }

    /// Packets that arrived at the sink so far.
    pub fn arrived(&mut self) -> Result<u64> {
        self.sink.seen(0)
    }

    /// The router's ports towards the sources.
    pub fn ports(&self) -> Vec<&str> {
        self.entries.iter().map(|entry| entry.port.as_str()).collect()
    }

    /// The contenders, in order.
    pub fn contenders(&self) -> Vec<Contender> {
        self.entries.iter().map(|entry| entry.contender).collect()
    }

    /// Sends `packets` through the numbered contender at once.
    pub fn send(&mut self, number: usize, packets: u32) -> Result<()> {
        self.entries[number].send(packets)
    }

    /// Sends through the numbered contender at `rate` packets a second until `stop` says so.
    pub fn pace(&self, number: usize, rate: f64, stop: impl Fn() -> bool) -> Result<()> {
        const TICK: Duration = Duration::from_micros(50);
        // A veth's ring holds 256 packets: a late tick must not become a burst that overflows it.
        const MOST: f64 = 64.0;
        pin(0, SOURCE_CORE)?;
        let entry = &self.entries[number];
        let (mut last, mut owed) = (Instant::now(), 0.0);
        while !stop() {
            std::thread::sleep(TICK);
            owed = (owed + rate * last.elapsed().as_secs_f64()).min(MOST);
            last = Instant::now();
            // The program at the feed's far end makes each of them the next frame of the sequence.
            entry.feed.send_all(&vec![[0u8; FRAME]; owed as usize])?;
            owed -= owed.floor();
        }
        Ok(())
    }

    /// Sends at `rate` for `span`, busily, so that the times are kept exactly: packets a second that the router took, and
    /// the share of a core that its thread needed. If other work kept the source from its core, it is tried again.
    pub fn load(&mut self, number: usize, rate: f64, span: Duration) -> Result<(f64, f64)> {
        let mut last = (0.0, 0.0);
        for _ in 0..LOAD_TRIES {
            self.sink.take_latencies()?;
            let entry = &mut self.entries[number];
            let (sent, taken) = (entry.object.sent()?, entry.taken(&self.router)?);
            let (time, begin) = (cpu_time(entry.napi)?, Instant::now());
            entry.send_for(rate, span)?;
            let took = begin.elapsed();
            let taken = entry.settle(&self.router)? - taken;
            let sent = entry.object.sent()? - sent;
            last = (taken as f64 / took.as_secs_f64(), (cpu_time(entry.napi)? - time) as f64 / took.as_nanos() as f64);
            if sent as f64 >= 0.95 * rate * span.as_secs_f64() {
                return Ok(last);
            }
        }
        println!("  (other work on the machine keeps the source from sending {rate:.0} packets a second)");
        Ok(last)
    }

    /// Takes the latencies noted so far: for each unit of 100 ns, packets.
    pub fn take_latencies(&mut self) -> Result<Vec<u64>> {
        self.sink.take_latencies()
    }

    /// Times (CLOCK_MONOTONIC, ns) at which packets began to go to another gateway, and its number.
    pub fn changes_seen(&mut self) -> Result<Vec<(u64, u64)>> {
        self.sink.changes()
    }

    /// Sends `packets` through the numbered contender: nanoseconds that the router's NAPI thread ran for each packet it
    /// took. A window in which other work kept that thread from its core is tried again.
    pub fn window(&mut self, number: usize, packets: u32) -> Result<f64> {
        for _ in 0..TRIES {
            if let Some(cost) = self.try_window(number, packets)? {
                return Ok(cost);
            }
        }
        let contender = self.entries[number].contender.name();
        bail!("{contender}: in {TRIES} windows nearly nothing of {packets} packets reached the router")
    }

    fn try_window(&mut self, number: usize, packets: u32) -> Result<Option<f64>> {
        let seen = self.sink.seen(0)?;
        let entry = &mut self.entries[number];
        let (taken, time) = (entry.taken(&self.router)?, cpu_time(entry.napi)?);
        entry.send(packets)?;
        let processed = entry.settle(&self.router)? - taken;
        let time = cpu_time(entry.napi)? - time;
        if processed < u64::from(packets) / 100 {
            return Ok(None);
        }
        let arrived = self.sink.seen(0)? - seen;
        let wanted = if self.drops || entry.contender == Contender::Drop { 0 } else { processed };
        if arrived.abs_diff(wanted) > processed / 50 + 512 {
            bail!("{}: the router took {processed} packets and {arrived} arrived", entry.contender.name());
        }
        Ok(Some(time as f64 / processed as f64))
    }
}

impl Entry {
    fn new(lab: &Lab, router: &Node, contender: Contender, number: usize, variations: usize) -> Result<Entry> {
        // The kernel's NAPI threads are told apart by the name of their interface.
        let port = format!("i{number}x{:x}", std::process::id() & 0xffff);
        let source = lab.node(&format!("source{number}"))?;
        lab.link((&source, "out"), (router, &port))?;
        let mac = PORT_MAC.map(|byte| format!("{byte:02x}")).join(":");
        router.run(["ip", "link", "set", &port, "address", &mac])?;
        router.sh(&format!(
            "ip address add 198.18.{number}.1/24 dev {port}; ip address add 2001:db8:{number}::1/64 dev {port} nodad"
        ))?;
        source.sh("ip link add feed type veth peer name relay; ip link set feed up; ip link set relay up")?;
        let mut object = Object::load(variations as u32)?;
        let (sender, relay) = (source.ifindex("out")?, source.ifindex("relay")?);
        source.enter(|| {
            object.set_out(sender)?;
            object.attach("source", relay)
        })??;
        let feed = source.packet_socket("feed")?;
        let program = Self::program(router, contender, &port)?;
        Ok(Entry { contender, source, object, feed, _program: program, sender, port, napi: 0, length: FRAME })
    }

    fn program(router: &Node, contender: Contender, port: &str) -> Result<Option<Object>> {
        let name = match contender {
            Contender::Drop => "discard",
            Contender::Pass => "pass",
            Contender::Redirect => "redirect",
            Contender::Rewrite => "rewrite",
            Contender::FibForward => "fib_forward",
            Contender::Linux | Contender::Towpath => return Ok(None),
        };
        let mut object = Object::load(1)?;
        let (port, out) = (router.ifindex(port)?, router.ifindex(OUT)?);
        router.enter(|| {
            object.set_out(out)?;
            object.add_port(out)?;
            object.attach(name, port)
        })??;
        Ok(Some(object))
    }

    fn set_destinations(&mut self, destinations: &[IpAddr], stamped: bool) -> Result<()> {
        let first = destinations.first().context("no destinations")?;
        let source: IpAddr = if first.is_ipv6() { "2001:db8:fffe::2".parse()? } else { "198.51.100.2".parse()? };
        let template = source::template(PORT_MAC, source);
        let variations: Vec<_> = destinations.iter().map(|to| source::variation(&template, *to)).collect();
        self.length = source::frame_length(*first);
        self.object.set_source(&template, if first.is_ipv6() { 6 } else { 4 }, stamped, &variations)
    }

    /// Sends at once.
    pub fn send(&mut self, packets: u32) -> Result<()> {
        let program: ProgramFd = self.object.fd("source")?;
        let (sender, length) = (self.sender, self.length);
        self.source.enter(|| {
            pin(0, SOURCE_CORE)?;
            source::send(&program, sender, length, packets)
        })?
    }

    /// Sends at `rate` packets a second for `span`.
    fn send_for(&mut self, rate: f64, span: Duration) -> Result<()> {
        if rate == 0.0 {
            std::thread::sleep(span);
            return Ok(());
        }
        self.object.set_pace((1e9 / rate) as u64, crate::sync::monotonic())?;
        let program = self.object.fd("paced")?;
        let (sender, length) = (self.sender, self.length);
        self.source.enter(|| {
            pin(0, SOURCE_CORE)?;
            first_in_line(0);
            source::send_for(&program, sender, length, span)
        })?
    }

    /// Packets that the port's NAPI has taken from its rings (veth counts them so with a program and without).
    fn taken(&self, router: &Node) -> Result<u64> {
        router.enter(|| ethtool::sum(&self.port, "_xdp_packets", "rx_queue_"))?
    }

    /// Waits until the router has taken all there is.
    fn settle(&self, router: &Node) -> Result<u64> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut count = self.taken(router)?;
        loop {
            std::thread::sleep(Duration::from_millis(2));
            let now = self.taken(router)?;
            if now == count {
                return Ok(count);
            }
            if Instant::now() > deadline {
                bail!("{}: traffic does not end", self.port);
            }
            count = now;
        }
    }
}

/// What the command under test answers, if it does.
pub fn ask(router: &Node, arguments: &[&str]) -> Option<serde_json::Value> {
    let binary = towpath_binary().ok()?;
    let words = [&[binary.as_str()], arguments, &["--json"]].concat();
    serde_json::from_str(&router.run(words).ok()?).ok()
}

/// The command under test, for command lines.
pub fn towpath_binary() -> Result<String> {
    Ok(towpath_lab::towpath_binary()?.to_string_lossy().into_owned())
}

/// Gives the interface's NAPI threads of their own and returns the id of the one that serves `SOURCE_CORE`'s packets.
pub fn thread_napi(node: &Node, port: &str) -> Result<u32> {
    // The name does not tell interfaces of different namespaces apart.
    let before = napi_threads(port)?;
    node.sh(&format!("echo 1 > /sys/class/net/{port}/threaded"))?;
    // One NAPI a queue, made in the order of the queues; a veth's sender takes the queue of its core.
    let mut threads = napi_threads(port)?;
    threads.retain(|thread| !before.contains(thread));
    threads.sort_unstable();
    for thread in &threads {
        pin(*thread, ROUTER_CORE)?;
        first_in_line(*thread);
    }
    threads.get(SOURCE_CORE).copied().with_context(|| format!("no new kernel thread 'napi/{port}-*': it has no NAPI"))
}

/// Kernel threads of interfaces of this name.
fn napi_threads(port: &str) -> Result<Vec<u32>> {
    let wanted = format!("napi/{port}-");
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|text| text.parse().ok()) else { continue };
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.starts_with(&wanted)) {
            threads.push(id);
        }
    }
    Ok(threads)
}

/// Binds a thread (0: the calling one) to a core.
pub fn pin(thread: u32, core: usize) -> Result<()> {
    // SAFETY: an all-zero CPU set is valid; the call reads it and no more.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(thread as i32, size_of_val(&set), &set)
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("bind thread {thread} to core {core}"));
    }
    Ok(())
}

/// CPU time of this thread, with what the kernel does in its place.
pub fn thread_time() -> Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is written to a variable of this function.
    match unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } {
        0 => Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32)),
        _ => Err(std::io::Error::last_os_error()).context("read this thread's CPU time"),
    }
}

/// Lets a thread (0: the calling one) go before others.
fn first_in_line(thread: u32) {
    // SAFETY: plain integers; a failure only leaves the thread's share of the core to chance.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, -19) };
}

/// Nanoseconds the thread has run (Documentation/scheduler/sched-stats.rst).
pub fn cpu_time(thread: u32) -> Result<u64> {
    let path = format!("/proc/{thread}/schedstat");
    let text = fs::read_to_string(&path).with_context(|| format!("read the thread's CPU time from {path}"))?;
    text.split(' ').next().and_then(|field| field.parse().ok()).context("schedstat")
}
