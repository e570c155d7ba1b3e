//! What is shown, scene by scene, and what is promised in each.

use crate::network::{Network, SERVER};
use crate::traffic::{Count, Traffic};
use crate::view::{View, thousands};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use towpath_lab::{Towpath, towpath_binary, wait_for};

/// Packets a second of the steady stream: few enough for Linux alone, with room for a busy machine.
const RATE: u64 = 20_000;
/// Packets of one flood, and how many floods make a figure.
const FLOOD: u32 = 100_000;
const FLOODS: usize = 20;
/// How long the stream runs before and after something happens to it.
const MOMENT: Duration = Duration::from_secs(2);
/// Within this Towpath honours what Linux was told.
const AT_ONCE: Duration = Duration::from_millis(100);
/// Least gain that is promised, on a machine that may be busy otherwise; the benchmarks hold the exact figure.
const TIMES: f64 = 1.5;
const PORTS: [&str; 3] = ["lan", "up1", "up2"];
const RULE: &str = "table inet demo { chain forward { type filter hook forward priority 0; udp dport 9 drop; }; }";

/// Something found, and whether it was as promised (None: nothing was promised).
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Scene in which it was found
    pub scene: String,
    /// What was looked at
    pub what: String,
    /// What it was
    pub found: String,
    /// Whether that keeps the promise
    pub kept: Option<bool>,
}

/// Nanoseconds of the router's core a packet, over several floods.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Who forwarded
    pub label: String,
    /// 10th percentile: what else the machine does only adds
    pub floor: f64,
    /// Half of the floods cost less
    pub median: f64,
    /// 90th percentile
    pub high: f64,
}

/// Where the scenes are played.
pub struct Stage<'a> {
    network: &'a Network,
    traffic: &'a Traffic,
    view: &'a View,
    interrupted: &'a (dyn Fn() -> bool + Sync),
    towpath: Option<Towpath>,
    scene: String,
    /// What was found so far
    pub outcomes: Vec<Outcome>,
    /// What a packet costs, in order of measurement
    pub costs: Vec<Cost>,
}

impl<'a> Stage<'a> {
    /// A stage; `interrupted` says that the user wants to end.
    pub fn new(
        network: &'a Network,
        traffic: &'a Traffic,
        view: &'a View,
        interrupted: &'a (dyn Fn() -> bool + Sync),
    ) -> Stage<'a> {
        Stage {
            network,
            traffic,
            view,
            interrupted,
            towpath: None,
            scene: String::new(),
            outcomes: Vec::new(),
            costs: Vec::new(),
        }
    }

    /// Plays all scenes.
    pub fn play(&mut self) -> Result<()> {
        self.linux_alone()?;
        self.up()?;
        self.bgp()?;
        self.firewall()?;
        self.kill()?;
        self.down()
    }

    fn linux_alone(&mut self) -> Result<()> {
        self.begin("1 Linux alone");
        self.view.say(&format!("{} packets a second go from the client to the server.", thousands(RATE as f64)));
        self.reach()?;
        self.counted("steady stream, Linux", None, |stage| stage.pause(MOMENT))?;
        self.view.say("BGP: the preferred session is shut and comes back; the kernel's routes follow.");
        self.counted("BGP moves traffic and back, Linux", None, Self::move_and_back)?;
        self.measure("Linux")?;
        Ok(())
    }

    fn up(&mut self) -> Result<()> {
        self.begin("2 towpath up");
        self.view.say("'towpath up lan up1 up2' in the router, while the stream runs.");
        self.counted("towpath up under traffic", Some(0), |stage| {
            stage.pause(MOMENT)?;
            stage.start()?;
            stage.pause(MOMENT)
        })?;
        self.fast("share of the fast path")?;
        self.reach()?;
        let gain = self.gain("Towpath", "Linux")?;
        self.promise(gain >= TIMES, "cost of a packet", format!("{gain:.1} times less than Linux"));
        Ok(())
    }

    fn bgp(&mut self) -> Result<()> {
        self.begin("3 BGP");
        self.in_step()?;
        self.view.say("The preferred session is shut: every network is reached by up2 now. Then it comes back.");
        self.counted("BGP moves traffic and back, Towpath", Some(0), Self::move_and_back)?;
        self.in_step()?;
        self.fast("share of the fast path afterwards")
    }

    fn firewall(&mut self) -> Result<()> {
        self.begin("4 A firewall rule");
        self.traffic.set_rate(RATE);
        self.pause(MOMENT)?;
        let exceptions = self.exceptions()?;
        self.view.say(&format!("nft: {RULE}"));
        let asked = Instant::now();
        self.network.router.run(["nft", RULE])?;
        let took = asked.elapsed();
        let (passed, last) = self.still_passing()?;
        self.promise(
            last <= AT_ONCE,
            "firewall rule honoured",
            format!(
                "{:.1} ms after nft returned, which took {:.1} ms; {passed} packets passed meanwhile",
                last.as_secs_f64() * 1e3,
                took.as_secs_f64() * 1e3
            ),
        );
        self.pause(MOMENT)?;
        let grown = self.exceptions()?.into_iter().filter_map(|(reason, packets)| {
            let more = packets - exceptions.get(&reason).copied().unwrap_or(0).min(packets);
            (more > 0).then(|| format!("{reason} {more}"))
        });
        let grown: Vec<String> = grown.collect();
        self.view.say(&format!("Handed to Linux meanwhile, by reason: {}", grown.join(", ")));
        let handed = grown.iter().any(|text| text.starts_with("policy-netfilter "));
        self.promise(handed, "its packets go to Linux", grown.join(", "));
        self.explain("linux")?;
        self.view.say("The rule is removed.");
        self.network.router.run(["nft", "delete", "table", "inet", "demo"])?;
        let removed = Instant::now();
        let before = self.traffic.count()?.redirected;
        wait_for(Duration::from_secs(10), "the stream to take the fast path again", || {
            (self.traffic.count().ok()?.redirected > before).then_some(())
        })?;
        self.note(
            "fast again after the rule's removal",
            format!("after {:.0} ms", removed.elapsed().as_secs_f64() * 1e3),
        );
        self.counted("stream after the rule's removal", Some(0), |stage| stage.pause(MOMENT))?;
        self.fast("share of the fast path afterwards")
    }

    fn kill(&mut self) -> Result<()> {
        self.begin("5 kill -9");
        let mut towpath = self.towpath.take().context("towpath is not up")?;
        self.view.say("The daemon is killed. Its programs stay and go on by the last state.");
        self.counted("daemon killed", Some(0), |stage| {
            stage.pause(MOMENT)?;
            towpath.process.kill()?;
            stage.pause(MOMENT)
        })?;
        self.fast("share of the fast path without daemon")?;
        self.view.say("'towpath up' again: the new daemon takes over what it finds.");
        self.counted("new daemon under traffic", Some(0), |stage| {
            stage.pause(MOMENT)?;
            stage.start()?;
            stage.pause(MOMENT)
        })?;
        let adopted = self.ask(&["status"])?["adopted"] == true;
        self.promise(adopted, "the tables are adopted", if adopted { "yes" } else { "no" }.into());
        self.in_step()?;
        self.fast("share of the fast path afterwards")
    }

    fn down(&mut self) -> Result<()> {
        self.begin("6 towpath down");
        let mut towpath = self.towpath.take().context("towpath is not up")?;
        self.view.say("'towpath down': Linux forwards again.");
        self.counted("towpath down under traffic", Some(0), |stage| {
            stage.pause(MOMENT)?;
            stage.network.router.run([towpath_binary()?.as_os_str(), "down".as_ref()])?;
            let status = towpath.process.wait(Duration::from_secs(10))?;
            if !status.success() {
                bail!("the daemon ended with {status}:\n{}", towpath.process.log());
            }
            stage.pause(MOMENT)
        })?;
        let span = self.span(MOMENT)?;
        self.promise(span.redirected == 0, "share of Linux", format!("{:.1} %", (1.0 - span.fast()) * 100.0));
        self.reach()?;
        let gain = self.gain("Linux again", "Towpath")?;
        self.note("cost of a packet", format!("{:.1} times that with Towpath", 1.0 / gain));
        Ok(())
    }

    fn begin(&mut self, title: &str) {
        self.scene = title.to_owned();
        self.view.scene(title);
    }

    fn promise(&mut self, kept: bool, what: &str, found: String) {
        self.view.judge(kept, &format!("{what}: {found}"));
        self.outcome(what, found, Some(kept));
    }

    fn note(&mut self, what: &str, found: String) {
        self.view.say(&format!("{what}: {found}"));
        self.outcome(what, found, None);
    }

    fn outcome(&mut self, what: &str, found: String, kept: Option<bool>) {
        self.outcomes.push(Outcome { scene: self.scene.clone(), what: what.to_owned(), found, kept });
    }

    /// Lets the stream run on.
    fn pause(&self, span: Duration) -> Result<()> {
        let end = Instant::now() + span;
        while Instant::now() < end {
            if (self.interrupted)() {
                bail!("interrupted");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Counts every packet of the stream while `action` runs; `most` may be lost.
    fn counted(&mut self, what: &str, most: Option<u64>, action: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let before = self.traffic.rest()?;
        self.view.count_from(Some(before), 0);
        self.traffic.set_rate(RATE);
        action(self)?;
        let found = self.traffic.rest()?.since(&before);
        self.view.count_from(None, found.lost());
        self.traffic.set_rate(RATE);
        if found.sent == 0 {
            bail!("{what}: nothing was sent");
        }
        let mut text = format!("{} of {} packets lost", found.lost(), found.sent);
        if found.refused > 0 {
            text += &format!(", {} before the router: its receive ring was full", found.refused);
        }
        match most {
            // More arrived than sent would be as wrong.
            Some(most) => self.promise(found.lost() <= most && found.total() <= found.sent, what, text),
            None => self.note(what, text),
        }
        Ok(())
    }

    /// The stream over a span.
    fn span(&self, span: Duration) -> Result<Count> {
        let before = self.traffic.count()?;
        self.pause(span)?;
        Ok(self.traffic.count()?.since(&before))
    }

    /// The stream must take the fast path, by the driver's counters, and Towpath's must agree.
    fn fast(&mut self, what: &str) -> Result<()> {
        let (before, own_before) = (self.traffic.rest()?, self.forwarded()?);
        self.traffic.set_rate(RATE);
        self.pause(MOMENT)?;
        let span = self.traffic.rest()?.since(&before);
        let own = self.forwarded()?.zip(own_before).map(|(after, before)| after - before);
        self.traffic.set_rate(RATE);
        let share = span.fast() > 0.99;
        let mut text = format!("{:.1} % by the driver's count", span.fast() * 100.0);
        if let Some(own) = own {
            text += &format!(" ({} packets; {own} by Towpath's)", span.redirected);
        }
        self.promise(share && own.is_none_or(|own| own == span.redirected), what, text);
        Ok(())
    }

    /// Packets from the client that the fast path has forwarded by its own count; None without a daemon to ask.
    fn forwarded(&self) -> Result<Option<u64>> {
        if self.towpath.is_none() {
            return Ok(None);
        }
        let answer = self.ask(&["show", "stats"])?;
        let ports = answer["ports"].as_array().context("show stats gives no ports")?;
        let port = ports.iter().find(|port| port["port"] == PORTS[0]).context("show stats lacks the port")?;
        Ok(Some(port["rx_packets"].as_u64().context("show stats gives no packets")?))
    }

    /// Floods the router again and again to find what a packet costs it.
    fn measure(&mut self, label: &str) -> Result<Cost> {
        self.view.say(&format!("A flood, {FLOODS} times, to find what a packet costs the router's core."));
        let mut costs = Vec::new();
        for _ in 0..FLOODS * 3 {
            self.pause(Duration::ZERO)?;
            let found = self.traffic.flood(FLOOD)?;
            // Other work kept the router's thread from its core, or the traffic went elsewhere.
            if found.taken > u64::from(FLOOD) / 50 && found.total().abs_diff(found.taken) < found.taken / 50 + 64 {
                costs.push(found.cost());
            }
            if costs.len() == FLOODS {
                break;
            }
        }
        self.traffic.set_rate(RATE);
        if costs.len() < FLOODS {
            bail!("most floods did not pass the router");
        }
        costs.sort_by(f64::total_cmp);
        let part = |tenths: usize| costs[(costs.len() - 1) * tenths / 10];
        let cost = Cost { label: label.to_owned(), floor: part(1), median: part(5), high: part(9) };
        self.note(
            &format!("cost of a packet, {label}"),
            format!("{:.0} ns at the floor, {:.0} ns in the median", cost.floor, cost.median),
        );
        self.costs.push(cost.clone());
        Ok(cost)
    }

    /// How many times less a packet costs now than by an earlier measurement.
    fn gain(&mut self, label: &str, earlier: &str) -> Result<f64> {
        let now = self.measure(label)?;
        let earlier = self.costs.iter().find(|cost| cost.label == earlier).context("nothing to compare with")?;
        Ok(earlier.floor / now.floor)
    }

    fn start(&mut self) -> Result<()> {
        self.towpath = Some(Towpath::up(&self.network.router, &PORTS)?);
        self.view.say("Towpath is ready.");
        Ok(())
    }

    fn move_and_back(&mut self) -> Result<()> {
        for port in ["up2", "up1"] {
            self.pause(MOMENT)?;
            self.network.prefer(port)?;
            self.view.say(&format!("Linux routes to the server by {port}."));
            let number = usize::from(port == "up2");
            let before = self.traffic.arrived()?[number];
            wait_for(Duration::from_secs(5), &format!("the stream to leave by {port}"), || {
                (self.traffic.arrived().ok()?[number] > before).then_some(())
            })?;
        }
        self.pause(MOMENT)
    }

    /// The hosts answer each other, and hop limits are honoured on the way: as ping and traceroute see it.
    fn reach(&mut self) -> Result<()> {
        let mut hops = Vec::new();
        for ttl in ["1", "2", "64"] {
            let mut ping = self.network.client.command("ping");
            let output = ping.args(["-n", "-c", "1", "-W", "2", "-t", ttl, SERVER]).output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let answer = text.lines().find(|line| line.to_lowercase().contains("from "));
            let by = answer.and_then(|line| {
                line.split_whitespace()
                    .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
            });
            hops.push(by.unwrap_or("*").trim_end_matches(':').to_owned());
        }
        let right = hops[0] == "198.51.100.1" && hops[1].starts_with("192.0.2.") && hops[2] == SERVER;
        self.promise(right, "client to server, hop by hop", hops.join(" > "));
        Ok(())
    }

    /// Towpath has BGP's routes, and no others, as the kernel has them.
    fn in_step(&mut self) -> Result<()> {
        let kernel = self.network.bgp_routes()?;
        let same = wait_for(Duration::from_secs(5), "Towpath to have the kernel's routes", || {
            (self.fast_routes().ok()? == kernel).then_some(())
        });
        let own = self.fast_routes()?;
        self.promise(
            same.is_ok() && kernel.len() > crate::network::NETWORKS,
            "BGP's routes in step",
            format!(
                "{} in Linux, {} in Towpath, {} differ",
                kernel.len(),
                own.len(),
                kernel.symmetric_difference(&own).count()
            ),
        );
        Ok(())
    }

    fn fast_routes(&self) -> Result<BTreeSet<String>> {
        let answer = self.ask(&["show", "routes"])?;
        let routes = answer["routes"].as_array().context("show routes gives no routes")?;
        let bgp = routes.iter().filter(|route| route["protocol"] == "bgp" && route["chosen"] == true);
        Ok(bgp
            .map(|route| {
                let hop = &route["via"][0];
                crate::network::route(&route["prefix"], &route["nexthop_object"], &hop["gateway"], &hop["port"])
            })
            .collect())
    }

    /// After a rule was made: packets that still pass, and the time at which the last of them did.
    fn still_passing(&self) -> Result<(u64, Duration)> {
        const QUIET: Duration = Duration::from_millis(500);
        let begin = Instant::now();
        let first: u64 = self.traffic.arrived()?.iter().sum();
        let (mut passed, mut last) = (0, Duration::ZERO);
        while begin.elapsed() < last + QUIET && begin.elapsed() < 10 * QUIET {
            let now = self.traffic.arrived()?.iter().sum::<u64>() - first;
            if now != passed {
                (passed, last) = (now, begin.elapsed());
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok((passed, last))
    }

    /// Packets handed to Linux so far on the client's port, by reason.
    fn exceptions(&self) -> Result<BTreeMap<String, u64>> {
        let answer = self.ask(&["show", "exceptions"])?;
        let exceptions = answer["exceptions"].as_array().context("show exceptions gives no exceptions")?;
        let on_port = exceptions.iter().filter(|exception| exception["port"] == PORTS[0]);
        Ok(on_port
            .filter_map(|exception| Some((exception["reason"].as_str()?.to_owned(), exception["packets"].as_u64()?)))
            .collect())
    }

    /// `towpath explain` must give this path for the stream's packets.
    fn explain(&mut self, path: &str) -> Result<()> {
        let question = ["explain", "198.51.100.2", SERVER, "in", PORTS[0]];
        let binary = towpath_binary()?.display().to_string();
        let text = self.network.router.run([binary.as_str()].iter().chain(&question))?;
        self.view.say(&format!("towpath {}", question.join(" ")));
        self.view.show(&text);
        let verdict = &self.ask(&question)?["verdict"];
        let found = ["path", "reason", "detail"].map(|field| verdict[field].as_str().unwrap_or("-")).join(", ");
        self.promise(verdict["path"] == path, "towpath explain says so", found);
        Ok(())
    }

    fn ask(&self, question: &[&str]) -> Result<Value> {
        self.towpath.as_ref().context("towpath is not up")?.json(question)
    }
}
