//! The firewall is never bypassed: random rule sets, changed while random connections stand, in a plain Linux and in one with
//! Towpath. Whatever comes out is compared, and conntrack's entries.

use crate::compare::{Difference, Pair};
use crate::ends::{End, View};
use crate::generate::Case;
use crate::hosts::{Talk, address, arrivals, describe};
use crate::plan::{Cut, How, Plan, Stage};
use crate::random::Random;
use crate::router::{PORT_NAMES, PORTS, Router};
use crate::rules::own_address;
use crate::{fast, stateful};
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::time::Duration;
use towpath_lab::{Towpath, wait_for};

const LIMIT: Duration = Duration::from_secs(20);
/// Conversations at a time.
const BESIDE: usize = 12;
/// How often a plan that failed is tried again in simpler forms.
const TRIES: u32 = 300;
/// Lines of what was sent that are shown.
const SHOWN: usize = 60;

/// What all plans together came to.
#[derive(Default)]
pub struct Sums {
    pub stages: u64,
    /// Stages in which the fast path took part
    pub fast_stages: u64,
    pub sent: u64,
    pub received: u64,
    pub fast: u64,
    /// Plans about which two plain Linuxes do not agree either: where a translated connection is picked up in its midst,
    /// Linux may choose a port by chance
    pub moot: u64,
}

/// Two routers, of which the second may have Towpath.
pub struct Trial {
    pair: Pair,
    towpath: Option<Towpath>,
    /// Number of the last rule set
    round: u64,
    pub sums: Sums,
    /// What was sent in this plan
    trace: Vec<String>,
    /// Two plain ones, where it is seen what Linux does by chance
    plain: Option<Box<Trial>>,
}

/// Why a plan failed.
enum Failure {
    Packets(usize, Box<Difference>),
    Entries(String),
}

impl Trial {
    pub fn new(options: &[&str]) -> Result<Self> {
        let mut trial = Self::plain("diff-firewall", ["linux", "towpath"])?;
        let router = &trial.pair.routers[1];
        trial.towpath = Some(Towpath::up(&router.node, &[options, &PORT_NAMES].concat())?);
        router.settle()?;
        Ok(trial)
    }

    fn plain(name: &str, names: [&'static str; 2]) -> Result<Self> {
        let pair = Pair::new(name, names, &stateful::TRACKED)?;
        for router in &pair.routers {
            router.node.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
        }
        Ok(Self { pair, towpath: None, round: 0, sums: Sums::default(), trace: Vec::new(), plain: None })
    }

    /// Carries a plan out; an error that shows the simplest form of it that still fails.
    pub fn check(&mut self, plan: Plan) -> Result<()> {
        let seed = plan.seed;
        let Some(failure) = self.fails(&plan).with_context(|| format!("seed {seed}"))? else { return Ok(()) };
        eprintln!("lab: seed {seed} fails, and is made simpler");
        let (plan, failure) = self.simplify(plan, failure)?;
        bail!("seed {seed}:\n{}", self.describe(&plan, &failure))
    }

    /// Whether a plan fails, and not for chance.
    fn fails(&mut self, plan: &Plan) -> Result<Option<Failure>> {
        let Some(failure) = self.run(plan)? else { return Ok(None) };
        let plain = match &mut self.plain {
            Some(plain) => plain,
            none => none.insert(Box::new(Self::plain("same-firewall", ["linux", "other linux"])?)),
        };
        if plain.run(plan)?.is_some() {
            self.sums.moot += 1;
            return Ok(None);
        }
        Ok(Some(failure))
    }

    /// Packets that went by the fast path so far.
    fn fast(&self) -> Result<u64> {
        self.towpath.as_ref().map_or(Ok(0), fast)
    }

    /// Waits until Towpath's status is so.
    fn await_status(&self, what: &str, is: impl Fn(&serde_json::Value) -> Option<()>) -> Result<()> {
        let Some(towpath) = &self.towpath else { return Ok(()) };
        wait_for(LIMIT, what, || is(&towpath.json(&["status"]).ok()?))
    }

    fn run(&mut self, plan: &Plan) -> Result<Option<Failure>> {
        self.forget("nft flush ruleset; conntrack -F 2>/dev/null")?;
        self.trace.clear();
        let mut talks = plan.talks.iter().map(|number| {
            let mut random = Random::new(plan.seed ^ u64::from(*number + 1) << 40);
            (Talk::new(*number, &mut random), random)
        });
        let mut noise = Random::new(!plan.seed);
        let (mut open, mut strays) = (Vec::new(), 0);
        for (at, stage) in plan.stages.iter().enumerate() {
            self.begin(plan, at)?;
            if stage.how == How::Forget && stage.rules.translates() {
                open.clear();
            }
            let before = self.fast()?;
            for turn in 0..stage.turns {
                open.retain(|(talk, _): &(Talk, Random)| !talk.is_over());
                open.extend(talks.by_ref().take(BESIDE - open.len()));
                let mut cases: Vec<Case> = open.iter_mut().map(|(talk, random)| talk.next(random)).collect();
                cases.extend(plan.noise.then(|| stray(strays, &mut noise)));
                strays += 1;
                let mut arrived = Vec::new();
                for port in 0..PORTS {
                    let cases: Vec<Case> = cases.iter().filter(|case| case.port == port).cloned().collect();
                    let line = |case: &Case| format!("stage {at} turn {turn}: {}", describe(case));
                    self.trace.extend(cases.iter().map(line));
                    match self.pair.exchange(&cases)? {
                        Ok(outputs) => arrived.extend(arrivals(&outputs)),
                        Err(difference) => return Ok(Some(Failure::Packets(at, Box::new(difference)))),
                    }
                    self.sums.sent += cases.len() as u64;
                }
                open.iter_mut().for_each(|(talk, _)| talk.hear(&arrived));
            }
            let fast = self.fast()? - before;
            self.sums.stages += 1;
            self.sums.fast_stages += u64::from(fast > 0);
            self.sums.fast += fast;
            self.sums.received = self.pair.received;
        }
        let same = stateful::same_entries(&self.pair, stateful::entries);
        Ok(same.err().map(|error| Failure::Entries(format!("{error:#}"))))
    }

    /// Puts a stage's rules into force, and waits until Towpath knows.
    fn begin(&mut self, plan: &Plan, at: usize) -> Result<()> {
        let Stage { rules, how, patient, .. } = &plan.stages[at];
        if *how == How::Forget {
            return self.forget("conntrack -F 2>/dev/null");
        }
        self.round += 1;
        // A chain of its own name tells that Towpath has read the rules. It goes again: alone it would be in the way.
        let mark = format!(
            "add table inet round\nadd chain inet round r{0} {{ type filter hook forward priority 400; policy accept; }}\n\
             add rule inet round r{0} meta l4proto esp accept\n",
            self.round
        );
        for router in &self.pair.routers {
            let script = match (at.checked_sub(1), how) {
                (Some(before), How::Edits) => rules.edits(&plan.stages[before].rules, handles(router)),
                _ => rules.whole(),
            };
            let script = script + &mark;
            router.node.sh(&format!("nft -f - <<'END'\n{script}\nEND"))?;
        }
        self.await_chain(true)?;
        self.both("nft delete table inet round")?;
        self.await_chain(false)?;
        if *patient {
            self.await_status("the rules to be no longer new", |status| {
                (status["flows"]["gate"] != "opening").then_some(())
            })?;
        }
        Ok(())
    }

    /// Waits until Towpath knows of the round's chain, or knows it no more.
    fn await_chain(&self, known: bool) -> Result<()> {
        let name = format!("chain r{}:", self.round);
        self.await_status("Towpath to know the rules", |status| {
            let mut details = status["policies"].as_array()?.iter().filter_map(|policy| policy["detail"].as_str());
            (details.any(|text| text.contains(&name)) == known).then_some(())
        })
    }

    fn both(&self, command: &str) -> Result<()> {
        self.pair.routers.iter().try_for_each(|router| router.node.sh(command).map(drop))
    }

    /// Runs a command in both routers that ends all connections, and waits until there are no flows.
    fn forget(&self, command: &str) -> Result<()> {
        self.both(command)?;
        self.await_status("the flows to be gone", |status| {
            ["fast", "waiting", "closing"].iter().all(|field| status["flows"][field] == 0).then_some(())
        })
    }

    /// Leaves out of the plan whatever is not needed for it to fail.
    fn simplify(&mut self, mut plan: Plan, mut failure: Failure) -> Result<(Plan, Failure)> {
        let mut tries = TRIES;
        let cuts = plan.cuts();
        // The last one changes nothing: it is for what was sent.
        for cut in cuts.into_iter().chain([Cut::Nothing]) {
            let simpler = plan.without(&cut);
            for _ in 0..2 {
                tries -= 1;
                // What cannot be loaded is no simpler form.
                if let Ok(Some(found)) = self.fails(&simpler) {
                    (plan, failure) = (simpler, found);
                    break;
                }
            }
            if tries < 2 {
                break;
            }
        }
        Ok((plan, failure))
    }

    fn describe(&self, plan: &Plan, failure: &Failure) -> String {
        let skipped = self.trace.len().saturating_sub(SHOWN);
        let sent = self.trace[skipped..].join("\n");
        let what = match failure {
            Failure::Packets(at, difference) => format!("in stage {at} towpath differs from linux:\n{difference}"),
            Failure::Entries(entries) => format!("in the end towpath differs from linux:\n{entries}"),
        };
        format!("{plan}{sent}\n{what}")
    }
}

/// How a router tells rules' handles.
fn handles(router: &Router) -> impl Fn(&str, u32) -> Option<u64> {
    |table, id| {
        let listed = router.node.sh(&format!("nft -a list table {table}")).ok()?;
        let line = listed.lines().find(|line| line.contains(&format!("comment \"r{id}\"")))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// A packet of no conversation: an echo request, or a datagram or segment that nobody expects.
fn stray(number: u16, random: &mut Random) -> Case {
    let (six, port) = (random.percent(40), random.below(PORTS));
    let to = match random.percent(30) {
        true => own_address(six, random).parse().expect("an address"),
        false => address(six, random.below(PORTS), random.below(3)),
    };
    let own = SocketAddr::new(address(six, port, random.below(3)), 40_000 + number);
    let view = View { own, other: SocketAddr::new(to, 7 + number % 7) };
    let end = End { port, view, sequence: 0xffff_0000, expected: 1 };
    let mut bytes = Vec::new();
    match random.below(4) {
        0 if six => end.packet(number).icmpv6_echo_request(number, 1).write(&mut bytes, b"stray").expect("in memory"),
        0 => end.packet(number).icmpv4_echo_request(number, 1).write(&mut bytes, b"stray").expect("in memory"),
        1 => bytes = end.frame(None, number, &[0xff; 40]),
        2 => bytes = end.frame(Some(crate::ends::ACK), number, b"stray"),
        _ => bytes = end.frame(Some(crate::ends::SYN), number, &[]),
    }
    Case { bytes, port, plain: false }
}
