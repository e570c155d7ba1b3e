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
/// Megabytes that l3fwd takes without hugepages: its two tables are made for many routes.
const MEGABYTES: &str = "4096";
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
    _files: Files,
}

/// What l3fwd reads; removed when dropped.
struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        // Files in a folder for temporary ones.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether the peer is there; if not, what to do.
pub fn check() -> Result<()> {
    ensure!(Path::new(PROGRAM).exists(), "there is no {PROGRAM}; run: scripts/dpdk.sh");
    Ok(())
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
        check()?;
        let files = Files(std::env::temp_dir().join(format!("towpath-bench-{}", std::process::id())));
        std::fs::create_dir_all(&files.0).with_context(|| format!("cannot make {}", files.0.display()))?;
        let (four, six, arriving) = (files.0.join("ipv4"), files.0.join("ipv6"), files.0.join("frames"));
        std::fs::write(&four, rules(routes)?)?;
        std::fs::write(&six, "R2001:db8::/32 1\n")?;
        std::fs::write(&arriving, frames.as_flattened())?;
        let memory: &[&str] = if hugepages { &["--in-memory"] } else { &["--no-huge", "-m", MEGABYTES] };
        let mut child = Command::new(PROGRAM)
            .args(memory)
            .args(["--no-pci", "--no-telemetry", "--no-shconf", "-l", &core.to_string()])
            .args(["--vdev=net_null0,size=60", "--vdev=net_null1,size=60,no-rx=1", "--"])
            .args(["-P", "-p", "3", "--lookup=fib", "--parse-ptype"])
            .arg(format!("--config=(0,0,{core}),(1,0,{core})"))
            .arg(format!("--rule_ipv4={}", four.display()))
            .arg(format!("--rule_ipv6={}", six.display()))
            .env("TOWPATH_FRAMES", &arriving)
            .env("TOWPATH_WINDOW", window.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {PROGRAM}"))?;
        let commands = child.stdin.take().context("no pipe to l3fwd")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from l3fwd")?);
        let mut peer = Self { child, commands, answers, window, sent: 0, _files: files };
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

/// All by the second port.
fn rules(routes: &[(IpAddr, u8)]) -> Result<String> {
    let mut text = String::new();
    for (address, length) in routes {
        writeln!(text, "R{address}/{length} 1")?;
    }
    Ok(text)
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
