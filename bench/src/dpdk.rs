//! DPDK's l3fwd in its FIB mode on net_null ports, as a peer that is measured a window at a time (see bench/dpdk/feed.c and
//! scripts/dpdk.sh).

use anyhow::{Context, Result, bail, ensure};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Where scripts/dpdk.sh leaves the program.
const PROGRAM: &str = "target/dpdk/l3fwd";
/// Options for DPDK without hugepages. l3fwd's two tables are made for many routes and need this much memory.
pub const SMALL_PAGES: &str = "--no-huge -m 4096 --no-pci --no-telemetry --no-shconf";
const HUGE_PAGES: &str = "--in-memory --no-pci --no-telemetry --no-shconf";
/// Hugepages of 2 MiB that it needs.
const HUGEPAGES: usize = 1200;
/// Frames that l3fwd keeps back at most, to be sent together.
const KEPT_BACK: usize = 32;

/// l3fwd between windows. It ends when this is dropped.
pub struct Peer {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    window: usize,
    sent: usize,
    _rules: Rules,
}

/// Files that l3fwd reads; removed when dropped.
pub struct Rules(PathBuf);

impl Rules {
    /// These IPv4 routes, all by the second port.
    pub fn write(name: &str, routes: &[(IpAddr, u8)]) -> Result<Self> {
        let rules = Self(std::env::temp_dir().join(format!("towpath-bench-{}-{name}", std::process::id())));
        std::fs::create_dir_all(&rules.0).with_context(|| format!("cannot make {}", rules.0.display()))?;
        let mut text = String::new();
        for (address, length) in routes {
            writeln!(text, "R{address}/{length} 1")?;
        }
        std::fs::write(rules.path("ipv4"), text)?;
        std::fs::write(rules.path("ipv6"), "R2001:db8::/32 1\n")?;
        Ok(rules)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        // Files in a folder for temporary ones.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Options for l3fwd with two ports on a core.
pub fn l3fwd_options(core: usize, rules: &Rules) -> String {
    format!(
        "-P -p 3 --lookup=fib --parse-ptype --config=(0,0,{core}),(1,0,{core}) --rule_ipv4={} --rule_ipv6={}",
        rules.path("ipv4").display(),
        rules.path("ipv6").display()
    )
}

/// Options for ports on these interfaces by AF_XDP.
pub fn xdp_ports(first: &str, second: &str) -> String {
    format!("--vdev=net_af_xdp0,iface={first} --vdev=net_af_xdp1,iface={second}")
}

/// Whether the peer is there; if not, what to do.
pub fn check() -> Result<()> {
    program().map(drop)
}

/// The path of l3fwd.
pub fn program() -> Result<PathBuf> {
    Path::new(PROGRAM).canonicalize().with_context(|| format!("there is no {PROGRAM}; run: scripts/dpdk.sh"))
}

impl Peer {
    /// Starts it on a core, with these IPv4 routes, for windows of so many of these frames.
    pub fn start(
        core: usize,
        hugepages: bool,
        routes: &[(IpAddr, u8)],
        frames: &[[u8; 60]],
        window: usize,
    ) -> Result<Self> {
        let rules = Rules::write("memory", routes)?;
        let arriving = rules.path("frames");
        std::fs::write(&arriving, frames.as_flattened())?;
        let mut child = Command::new(program()?)
            .args(if hugepages { HUGE_PAGES } else { SMALL_PAGES }.split(' '))
            .args(["-l", &core.to_string(), "--vdev=net_null0,size=60", "--vdev=net_null1,size=60,no-rx=1", "--"])
            .args(l3fwd_options(core, &rules).split(' '))
            .env("TOWPATH_FRAMES", &arriving)
            .env("TOWPATH_WINDOW", window.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {PROGRAM}"))?;
        let commands = child.stdin.take().context("no pipe to l3fwd")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from l3fwd")?);
        let mut peer = Self { child, commands, answers, window, sent: 0, _rules: rules };
        peer.answer("ready")?;
        Ok(peer)
    }

    /// Nanoseconds of processor time a packet, in the next window.
    pub fn window(&mut self) -> Result<f64> {
        self.commands.write_all(b"w").context("l3fwd has ended")?;
        let answer = self.answer("window ")?;
        let (cost, sent) = answer.split_once(' ').with_context(|| format!("l3fwd says {answer}"))?;
        let all = sent.parse::<usize>()?;
        ensure!(
            all + KEPT_BACK >= self.sent + self.window,
            "l3fwd sent {} of {} packets",
            all - self.sent,
            self.window
        );
        self.sent = all;
        Ok(cost.parse()?)
    }

    /// The rest of the next line that begins so.
    fn answer(&mut self, beginning: &str) -> Result<String> {
        let (mut line, mut last) = (String::new(), String::new());
        loop {
            line.clear();
            if self.answers.read_line(&mut line).context("l3fwd writes no text")? == 0 {
                bail!("l3fwd has ended; its last words: {}", last.trim());
            }
            if let Some(rest) = line.trim_end().strip_prefix(beginning) {
                return Ok(rest.to_owned());
            }
            last.clone_from(&line);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // If it has ended already, that is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hugepages for l3fwd, of which there are as many as before when this is dropped.
pub struct Hugepages {
    before: String,
}

const SETTING: &str = "/proc/sys/vm/nr_hugepages";

impl Hugepages {
    /// None if this machine does not grant them.
    pub fn reserve() -> Option<Self> {
        let read = || std::fs::read_to_string(SETTING).ok()?.trim().parse::<usize>().ok();
        let before = read()?;
        let reserved = Self { before: before.to_string() };
        if before < HUGEPAGES {
            std::fs::write(SETTING, HUGEPAGES.to_string()).ok()?;
        }
        (read()? >= HUGEPAGES).then_some(reserved)
    }
}

impl Drop for Hugepages {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(SETTING, &self.before) {
            eprintln!("cannot set {SETTING} to {} again: {error}", self.before);
        }
    }
}
