//! Histories: random commands of `ip` for a plain Linux and for one with Towpath. After each step `towpath check` must find no
//! difference, and frames about everything that steps may change must come out of both alike.
//!
//! TOWPATH_DIFF_STEPS sets the number of steps, TOWPATH_SEED repeats a run. A history that fails is kept in out/test, too.

mod commands;
mod frames;
mod ip;
mod kept;
mod settings;
mod shrink;

use crate::compare::Pair;
use crate::generate::Case;
use crate::normalise::Outputs;
use crate::random::Random;
use crate::router::{NEIGHBOURS_V4, PORT_NAMES, PORTS, Profile};
use crate::{PLAIN, fast, number, seed};
use anyhow::{Context, Result, bail, ensure};
use commands::{Commands, OTHER_TABLES};
use frames::DESTINATIONS;
use ip::Ip;
use kept::KEPT;
use std::collections::HashMap;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use towpath_fpc::Prefix;
use towpath_lab::{Towpath, patience, wait_for};

const PROFILE: Profile = Profile { name: "history", send_redirects: false, ..PLAIN };
/// Steps of one history: its routers are its own.
const LENGTH: usize = 40;
/// Frames sent before the next marker
const BATCH: usize = 64;
/// How long Towpath may be behind.
const LIMIT: Duration = Duration::from_secs(3);
/// How often a history that failed is tried in shorter forms.
const TRIES: usize = 60;

/// What the second router is: another plain Linux, or one with Towpath that was started with these options.
type Second = Option<&'static [&'static str]>;
const LINUX: Second = None;
const XDP: Second = Some(&[]);
const WORKERS: Second = Some(&["--engine", "user", "--cores", "0"]);

/// Two routers that are given the same commands.
struct Trial {
    pair: Pair,
    ip: [Ip; 2],
    /// None if both are plain
    towpath: Option<Towpath>,
    /// What Linux refused, and why
    refusals: Vec<String>,
    /// Nothing that is told now leads to a policy
    unhindered: bool,
    /// Where probes went after the last step
    ways: Ways,
    sums: Sums,
}

/// By which port, and to which MAC address, a probe leaves that entered by a port for a destination; None if it does not.
type Ways = HashMap<(usize, IpAddr), Option<Way>>;
type Way = (usize, [u8; 6]);

/// What histories came to.
#[derive(Clone, Copy, Default)]
struct Sums {
    steps: usize,
    /// Steps that Linux refused
    refused: usize,
    sent: usize,
    received: u64,
    /// Forwarded with nothing but their time to live changed, and by the fast path
    plain: u64,
    fast: u64,
    /// Probes that came out while a command was given
    beside: usize,
    /// Bursts that came out alike only when they were sent again
    late: usize,
}

impl Trial {
    fn new(second: Second) -> Result<Self> {
        let names = ["linux", if second.is_some() { "towpath" } else { "other linux" }];
        let pair = Pair::new("history", names, &PROFILE)?;
        let [plain, other] = &pair.routers;
        let ip = [Ip::start(&plain.node)?, Ip::start(&other.node)?];
        let up = |options: &[&str]| Towpath::up(&other.node, &[options, &PORT_NAMES].concat());
        let towpath = second.map(up).transpose()?;
        other.settle()?;
        Ok(Self {
            pair,
            ip,
            towpath,
            refusals: Vec::new(),
            unhindered: false,
            ways: Ways::new(),
            sums: Sums::default(),
        })
    }

    /// Goes through all steps; an error that says which one fails, and how.
    fn run(&mut self, steps: &[impl AsRef<str>]) -> Result<()> {
        for (at, step) in steps.iter().map(AsRef::as_ref).enumerate() {
            self.step(step).with_context(|| format!("step {at}: {step}"))?;
        }
        (self.sums.plain, self.sums.received) = (self.pair.plain_forwarded, self.pair.received);
        Ok(())
    }

    fn step(&mut self, step: &str) -> Result<()> {
        let mut beside = Vec::new();
        // Between several commands of a step are ways that belong neither before nor after it.
        let atomic = !step.contains("; ") && self.is_atomic(step);
        for command in step.split("; ") {
            let first = self.command(0, command)?;
            let second = match atomic {
                true => self.command_beside_probes(command, &mut beside)?,
                false => self.command(1, command)?,
            };
            let same = first == second || [&first, &second].iter().all(|answer| is_gone(command, answer));
            ensure!(same, "{command}: Linux says {first:?}, with Towpath {second:?}");
            self.sums.refused += usize::from(first.is_some());
            self.refusals.extend(first.map(|why| format!("{command}: {}", why.trim())));
        }
        self.sums.steps += 1;
        self.await_links()?;
        self.check()?;
        if self.unhindered {
            self.await_no_policies()?;
        }
        let (before, fast) = (std::mem::take(&mut self.ways), self.fast()?);
        self.burst(&mut Random::new(
            step.bytes().fold(7, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into())),
        ))?;
        self.sums.fast += self.fast()? - fast;
        self.sums.beside += beside.len();
        for (key, way) in beside {
            let (Some(old), Some(new)) = (before.get(&key), self.ways.get(&key)) else { continue };
            let known = [old, new].into_iter().flatten().any(|known| *known == way);
            ensure!(known, "from eth{} to {}: went by {way:x?}, neither {old:x?} nor {new:x?}", key.0, key.1);
        }
        Ok(())
    }

    /// Frames that the fast path has forwarded so far, probes too
    fn fast(&self) -> Result<u64> {
        self.towpath.as_ref().map_or(Ok(0), fast)
    }

    /// Whether each destination has its way before the command or the one after it, and no third one in between.
    fn is_atomic(&self, command: &str) -> bool {
        self.towpath.is_some() && ["route ", "nexthop ", "neighbor "].iter().any(|kind| command.starts_with(kind))
    }

    /// Gives Towpath's router a command, and probes until the tables are Linux's; where these came out.
    fn command_beside_probes(
        &mut self,
        command: &str,
        out: &mut Vec<((usize, IpAddr), Way)>,
    ) -> Result<Option<String>> {
        let mut probes: [Vec<Vec<u8>>; PORTS] = Default::default();
        for (port, destination) in self.ways.keys() {
            probes[*port].push(frames::probe(*port, *destination, frames::BESIDE).bytes);
        }
        let (router, towpath) = (&self.pair.routers[1], &self.towpath);
        let ip = &mut self.ip[1];
        let (text, succeeded) = std::thread::scope(|scope| {
            // Another thread has the command; what stays here may not be sent to one.
            let thread = scope.spawn(|| -> Result<(String, bool)> {
                let answer = ip.run(command)?;
                towpath.as_ref().map_or(Ok(()), Self::await_tables)?;
                Ok(answer)
            });
            while !thread.is_finished() {
                for (port, probes) in probes.iter().enumerate() {
                    // A queue that is full loses probes, as it may.
                    if let Err(error) = router.send(port, probes) {
                        let cause = error.root_cause().downcast_ref::<std::io::Error>();
                        ensure!(cause.and_then(std::io::Error::raw_os_error) == Some(libc::ENOBUFS), error);
                    }
                }
                let mut outputs = Outputs::default();
                router.collect(&mut outputs)?;
                for (port, frame) in
                    outputs.iter().enumerate().flat_map(|(port, out)| out.iter().map(move |f| (port, f)))
                {
                    let key = frames::forwarded(&frame.bytes, frames::BESIDE);
                    out.extend(
                        key.map(|key| (key, (port, *frame.bytes.first_chunk().expect("a frame has addresses")))),
                    );
                }
            }
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok((!succeeded).then_some(text))
    }

    /// Gives a router a command; what is said if it is refused.
    fn command(&mut self, router: usize, command: &str) -> Result<Option<String>> {
        if let Some(setting) = command.strip_prefix("sysctl ") {
            let (key, value) = setting.split_once('=').context("a sysctl without a value")?;
            let refused = self.pair.routers[router].node.sysctl(key, value).err();
            return Ok(refused.map(|error| error.root_cause().to_string()));
        }
        if ["nft ", "tc ", "ip "].iter().any(|program| command.starts_with(program)) {
            let refused = self.pair.routers[router].node.sh(command).err();
            return Ok(refused.map(|_| "refused".into()));
        }
        let (text, succeeded) = self.ip[router].run(command)?;
        Ok((!succeeded).then_some(text))
    }

    /// Waits until both routers' ports are as their settings say: Linux looks at carriers later.
    fn await_links(&mut self) -> Result<()> {
        for ip in &mut self.ip {
            wait_for(LIMIT, "the ports to be up", || {
                let (links, _) = ip.run("link show").ok()?;
                let mut ports = links.lines().filter(|line| line.contains(": eth"));
                ports.all(|line| !line.contains("UP") || line.contains("state UP")).then_some(())
            })?;
        }
        Ok(())
    }

    /// Waits until the tables are Linux's.
    fn check(&self) -> Result<()> {
        self.towpath.as_ref().map_or(Ok(()), Self::await_tables)
    }

    fn await_tables(towpath: &Towpath) -> Result<()> {
        let mut last = None;
        let waited = wait_for(LIMIT, "`towpath check` to find no difference", || {
            last = towpath.json(&["check"]).err();
            last.is_none().then_some(())
        });
        waited.map_err(|error| last.unwrap_or(error))
    }

    /// Waits until there is no policy: some settings are looked at from time to time only.
    fn await_no_policies(&self) -> Result<()> {
        let Some(towpath) = &self.towpath else { return Ok(()) };
        let policies = || Some(towpath.json(&["status"]).ok()?["policies"].clone());
        let waited = wait_for(LIMIT, "no policy to be left", || (policies()? == serde_json::json!([])).then_some(()));
        waited.with_context(|| format!("policies: {}", policies().unwrap_or_default()))
    }

    /// Sends frames from every port that is up, until they come out of both routers alike.
    fn burst(&mut self, random: &mut Random) -> Result<()> {
        let destinations = self.destinations()?;
        self.ways.clear();
        for (port, mtu) in self.ports_up()? {
            self.pair.passes[port] = self.passes(port)?;
            self.ways.extend(destinations.iter().map(|destination| ((port, *destination), None)));
            for cases in frames::burst(random, port, mtu, &destinations).chunks(BATCH) {
                self.same(cases)?;
            }
        }
        Ok(())
    }

    /// Sends these, again while what comes out differs, for as long as Towpath may be behind.
    fn same(&mut self, cases: &[Case]) -> Result<()> {
        self.sums.sent += cases.len();
        let deadline = Instant::now() + if self.towpath.is_some() { patience(LIMIT) } else { Duration::ZERO };
        let mut late = 0;
        let outputs = loop {
            let difference = match self.pair.exchange(cases)? {
                Ok(outputs) => break outputs,
                Err(difference) => difference,
            };
            if Instant::now() >= deadline {
                let narrow = self.pair.narrow(difference)?;
                bail!("{} differs from {}:\n{narrow}", self.pair.routers[1].name, self.pair.routers[0].name);
            }
            late = 1;
        };
        self.sums.late += late;
        for (port, frame) in outputs.iter().enumerate().flat_map(|(port, out)| out.iter().map(move |f| (port, f))) {
            if let Some(key) = frames::forwarded(&frame.bytes, frames::FIRST) {
                self.ways.insert(key, frame.bytes.first_chunk().map(|mac| (port, *mac)));
            }
        }
        Ok(())
    }

    /// The ports that are up, with their MTUs.
    fn ports_up(&mut self) -> Result<Vec<(usize, usize)>> {
        let (links, _) = self.ip[0].run("link show")?;
        let port = |line: &str| {
            let port = PORT_NAMES.iter().position(|name| line.contains(&format!(": {name}@")))?;
            let mtu = line.split(" mtu ").nth(1)?.split(' ').next()?.parse().ok()?;
            line.contains("state UP").then_some((port, mtu))
        };
        Ok(links.lines().filter_map(port).collect())
    }

    /// Destinations for which the routers need not choose among next hops, since Towpath chooses by a hash of its own.
    fn destinations(&mut self) -> Result<Vec<IpAddr>> {
        let (mut single, by_rules) = (Vec::new(), self.chosen_by_rules()?);
        for text in DESTINATIONS {
            let (route, _) = self.ip[0].run(&format!("route get fibmatch {text}"))?;
            let destination = text.parse()?;
            let within = |prefix: &Prefix| Prefix::new(destination, prefix.prefix_len()) == Some(*prefix);
            if route.matches("nexthop via").count() < 2 && !by_rules.iter().any(within) {
                single.push(destination);
            }
        }
        Ok(single)
    }

    /// Prefixes with several next hops in the tables that rules lead to, for some packets.
    fn chosen_by_rules(&self) -> Result<Vec<Prefix>> {
        let mut chosen = Vec::new();
        for family in ["-4", "-6"] {
            let ask = |table| format!("ip {family} route show table {table} 2>&1 || true;");
            let routes = self.pair.routers[0].node.sh(&OTHER_TABLES.map(ask).concat())?;
            let mut words = "";
            for line in routes.lines() {
                match line.trim_start().starts_with("nexthop") {
                    true => chosen.extend(prefix(words)),
                    false => words = line,
                }
            }
        }
        Ok(chosen)
    }

    /// By which ports plain Linux sends markers that enter by this one.
    fn passes(&mut self, port: usize) -> Result<[bool; PORTS]> {
        let source = Ipv4Addr::from(NEIGHBOURS_V4[port]);
        let mut passes = [false; PORTS];
        for (out, passes) in passes.iter_mut().enumerate() {
            let destination = Ipv4Addr::from(NEIGHBOURS_V4[out]);
            let question = format!("route get {destination} from {source} iif {}", PORT_NAMES[port]);
            let (route, found) = self.ip[0].run(&question)?;
            *passes = found && !route.contains(" via ") && route.contains(&format!("dev {} ", PORT_NAMES[out]));
        }
        Ok(passes)
    }
}

/// Whether a neighbour is gone after a command, whatever came before: Linux forgets those that it could not resolve when it
/// likes, and probes beside commands make one router alone ask for some.
fn is_gone(command: &str, answer: &Option<String>) -> bool {
    command.starts_with("neighbor del ")
        && answer.as_ref().is_none_or(|refused| refused.contains("No such file or directory"))
}

/// The prefix of a route as `ip route` shows it.
fn prefix(route: &str) -> Option<Prefix> {
    let text = route.split_whitespace().next()?;
    let text = match (text, route.contains(':')) {
        ("default", false) => "0.0.0.0/0",
        ("default", true) => "::/0",
        _ => text,
    };
    let (address, length) = text.split_once('/').unwrap_or((text, if text.contains(':') { "128" } else { "32" }));
    Prefix::new(address.parse().ok()?, length.parse().ok()?)
}

/// Whether a history fails, and how; with routers of its own.
fn failure(steps: &[impl AsRef<str>], second: Second, sums: &mut Sums) -> Result<Option<String>> {
    let mut trial = Trial::new(second)?;
    let result = trial.run(steps);
    sums.add(&trial.sums);
    Ok(result.err().map(|error| format!("{error:#}")))
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.steps += other.steps;
        self.refused += other.refused;
        self.sent += other.sent;
        self.received += other.received;
        self.plain += other.plain;
        self.fast += other.fast;
        self.beside += other.beside;
        self.late += other.late;
    }
}

/// A history in a form that can be kept.
fn written(steps: &[String]) -> String {
    let lines: String = steps.iter().map(|step| format!("    \"{step}\",\n")).collect();
    format!("(\"\", &[\n{lines}]),\n")
}

/// A file that has the history as long as it runs, and after it failed, however it did.
struct Kept(PathBuf);

impl Kept {
    fn new(second: Second, seed: u64, steps: &[String]) -> Result<Self> {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../out/test"));
        std::fs::create_dir_all(&folder)?;
        let kind = match second {
            LINUX => "linux",
            Some([]) => "xdp",
            Some(_) => "workers",
        };
        let kept = Self(folder.join(format!("history-{kind}-{seed}.txt")));
        kept.say(&format!("TOWPATH_SEED={seed} TOWPATH_DIFF_STEPS={}\n{}", steps.len(), written(steps)))?;
        Ok(kept)
    }

    fn say(&self, text: &str) -> Result<()> {
        let mut file = std::fs::File::options().create(true).append(true).open(&self.0)?;
        std::io::Write::write_all(&mut file, text.as_bytes()).with_context(|| self.0.display().to_string())
    }

    fn succeeded(self) -> Result<()> {
        std::fs::remove_file(&self.0).with_context(|| self.0.display().to_string())
    }
}

/// Makes a failing history short.
fn shortened(steps: Vec<String>, second: Second, first: &str) -> Result<String> {
    eprintln!("lab: fails, and is made shorter: {first}");
    let (mut why, mut tries, mut failures) = (first.to_owned(), 0, 0);
    let steps = shrink::shrink(steps, TRIES, |steps| {
        let found = failure(steps, second, &mut Sums::default()).unwrap_or_else(|error| Some(format!("{error:#}")));
        tries += 1;
        failures += usize::from(found.is_some());
        found.map(|found| why = found).is_some()
    });
    let mut text = format!("{why}\n{}", written(&steps));
    if failures == 0 {
        writeln!(text, "parts of it did not fail, in {tries} tries: it may depend on what else went on")?;
    }
    if let Some(why) = failure(&steps, LINUX, &mut Sums::default())? {
        writeln!(text, "two plain Linuxes do not agree about it either: {why}")?;
    }
    Ok(text)
}

fn histories(steps: usize, second: Second) -> Result<Sums> {
    let (seed, mut sums) = (seed(), Sums::default());
    eprintln!("lab: histories of {steps} steps together");
    let mut at = 0;
    while sums.steps < steps {
        let seed = seed.wrapping_add(at);
        let mut commands = Commands::new(seed);
        let steps: Vec<String> = (0..LENGTH).map(|_| commands.step()).collect();
        let kept = Kept::new(second, seed, &steps)?;
        let found = failure(&steps, second, &mut sums).unwrap_or_else(|error| Some(format!("{error:#}")));
        if let Some(why) = found {
            kept.say(&format!("{why}\n"))?;
            let text = if second.is_some() { shortened(steps, second, &why)? } else { why };
            kept.say(&text)?;
            bail!("TOWPATH_SEED={seed} ({}): {text}", kept.0.display());
        }
        kept.succeeded()?;
        at += 1;
    }
    let Sums { steps, refused, sent, received, plain, fast, beside, late } = sums;
    eprintln!(
        "lab: {steps} steps ({refused} commands refused), {sent} frames, {received} came out, {plain} plainly forwarded, \
         {fast} by the fast path, {beside} beside commands, {late} times late"
    );
    Ok(sums)
}

fn steps() -> usize {
    number("TOWPATH_DIFF_STEPS").unwrap_or(300) as usize
}

#[test]
fn towpath_agrees_with_linux_throughout_histories() -> Result<()> {
    for (name, steps) in KEPT {
        if let Some(why) = failure(steps, XDP, &mut Sums::default())? {
            bail!("{name}: {why}");
        }
    }
    agrees(steps(), XDP)
}

#[test]
fn workers_agree_with_linux_throughout_histories() -> Result<()> {
    agrees(steps() / 3, WORKERS)
}

fn agrees(steps: usize, second: Second) -> Result<()> {
    let sums = histories(steps, second)?;
    ensure!(sums.fast * 2 > sums.plain, "the fast path forwarded only {} of {}", sums.fast, sums.plain);
    ensure!(sums.plain as usize * 20 > sums.sent, "only {} plain frames were forwarded", sums.plain);
    Ok(())
}

/// The harness itself: two plain Linuxes agree.
#[test]
fn linux_agrees_with_itself_throughout_histories() -> Result<()> {
    histories(steps() / 10, LINUX).map(drop)
}

/// The harness itself: what one router alone was told is found out.
#[test]
fn histories_of_one_router_alone_are_found() -> Result<()> {
    const BURSTS: usize = 20;
    let (mut trial, mut random) = (Trial::new(LINUX)?, Random::new(seed()));
    trial.run(&["route replace 198.18.0.0/24 via 203.0.113.10"])?;
    for (told, untold) in [
        ("route replace 198.18.0.0/24 via 192.0.2.10", "route replace 198.18.0.0/24 via 203.0.113.10"),
        ("route add blackhole 198.18.1.0/26", "route del 198.18.1.0/26"),
        ("link set eth1 mtu 1500", "link set eth1 mtu 1400"),
        (
            "route add 2001:db8:101:8000::1/128 via 2001:db8::10 metric 10",
            "route del 2001:db8:101:8000::1/128 metric 10",
        ),
        ("neighbor replace 198.51.100.11 lladdr 02:00:00:00:00:21 dev eth1", "neighbor del 198.51.100.11 dev eth1"),
    ] {
        trial.command(1, told)?;
        // Not every burst has a packet that it matters to.
        let found = (0..BURSTS).find_map(|_| trial.burst(&mut random).err());
        ensure!(found.is_some_and(|error| error.to_string().contains("differs from linux")), "not found: {told}");
        trial.command(1, untold)?;
    }
    Ok(())
}
