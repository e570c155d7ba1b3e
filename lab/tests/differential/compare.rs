//! Two routers side by side: the same frames into both, and what comes out compared.

use crate::generate::{Case, Generator, depends_on_time, marker_batch, markers};
use crate::normalise::{Limited, Outputs, normalise, sorted};
use crate::random::Random;
use crate::router::{PORTS, Profile, Router};
use anyhow::{Result, bail};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use towpath_lab::packet::checksum;
use towpath_lab::{Frame, Lab};

/// Frames sent before the next marker; with answers they must fit into a veth's queue (256).
const BATCH: usize = 64;
/// Rows of 32 bytes shown of a frame.
const SHOWN_ROWS: usize = 8;
const MARKER_LIMIT: Duration = Duration::from_secs(5);
/// How long a frame that one router has sent may be missing from the other.
const GRACE: Duration = Duration::from_millis(200);

/// Two routers of equal configuration.
pub struct Pair {
    pub routers: [Router; 2],
    limited: [Limited; 2],
    batch: u32,
    /// Through which ports markers come that enter by a port (first index): all, unless the configuration changes
    pub passes: [[bool; PORTS]; PORTS],
    /// Forwarded frames that nothing but routes decided over (each a fast path's own), by the first router.
    pub plain_forwarded: u64,
    pub received: u64,
    _lab: Lab,
}

/// A frame (or, if no single one shows it, a batch) that the routers treat differently.
pub struct Difference {
    pub cases: Vec<Case>,
    pub outputs: [Outputs; 2],
}

impl Pair {
    pub fn new(name: &str, names: [&'static str; 2], profile: &Profile) -> Result<Pair> {
        let lab = Lab::new(name)?;
        let routers = [Router::new(&lab, names[0], profile)?, Router::new(&lab, names[1], profile)?];
        Self::of(lab, routers)
    }

    /// These two, of one lab.
    pub fn of(lab: Lab, routers: [Router; 2]) -> Result<Pair> {
        for router in &routers {
            router.settle()?;
        }
        let passes = [[true; PORTS]; PORTS];
        Ok(Pair { routers, limited: Default::default(), batch: 0, passes, plain_forwarded: 0, received: 0, _lab: lab })
    }

    /// Sends `count` frames from `seed`, and stops at the first difference.
    pub fn run(&mut self, seed: u64, count: u64, profile: &Profile) -> Result<Option<Difference>> {
        let mut generator = Generator::new(seed, profile);
        let mut random = Random::new(!seed);
        let mut sent = 0;
        if let Some(difference) = self.redirect_hosts(profile)? {
            return Ok(Some(difference));
        }
        while sent < count {
            let port = random.below(PORTS);
            let ordered = random.percent(5);
            let cases = if ordered { generator.flow(port, BATCH) } else { generator.batch(port, BATCH) };
            if let Some(difference) = self.difference(&cases, ordered, GRACE)? {
                return Ok(Some(self.narrow(difference)?));
            }
            sent += cases.len() as u64;
        }
        Ok(None)
    }

    /// What the routers do differently with frames that enter by one port, in any order.
    pub fn differs(&mut self, cases: &[Case]) -> Result<Option<Difference>> {
        Ok(self.exchange(cases)?.err())
    }

    /// What comes out of both routers alike when these frames enter by one port, in any order; or how they differ.
    pub fn exchange(&mut self, cases: &[Case]) -> Result<Result<Outputs, Difference>> {
        if cases.is_empty() { Ok(Ok(Outputs::default())) } else { self.outcome(cases, false, GRACE) }
    }

    /// Has every host that markers come from redirected, by a packet alone: which of several is answered first depends on
    /// how a router hands each to Linux.
    fn redirect_hosts(&mut self, profile: &Profile) -> Result<Option<Difference>> {
        let expected = 1 + usize::from(profile.send_redirects);
        for port in 0..PORTS {
            let case = Case { bytes: markers(port, self.batch).swap_remove(2 * port), port, plain: false };
            self.routers.iter().try_for_each(|router| router.send(port, &[&case.bytes]))?;
            let mut raw = [Outputs::default(), Outputs::default()];
            let deadline = Instant::now() + GRACE;
            while raw.iter().any(|outputs| outputs[port].len() < expected) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
                self.collect(&mut raw)?;
            }
            let outputs = [normalise(&raw[0], &mut self.limited[0]), normalise(&raw[1], &mut self.limited[1])];
            if outputs[0] != outputs[1] {
                return Ok(Some(Difference { cases: vec![case], outputs }));
            }
        }
        Ok(None)
    }

    fn difference(&mut self, cases: &[Case], ordered: bool, grace: Duration) -> Result<Option<Difference>> {
        Ok(self.outcome(cases, ordered, grace)?.err())
    }

    /// Sends frames, which enter by one port, through both routers; what comes out of both, or what differs.
    fn outcome(&mut self, cases: &[Case], ordered: bool, grace: Duration) -> Result<Result<Outputs, Difference>> {
        self.batch += 1;
        let mut raw = [Outputs::default(), Outputs::default()];
        self.send(cases)?;
        self.collect_markers(cases.first().map_or(0, |case| case.port), &mut raw)?;
        let deadline = Instant::now() + grace;
        loop {
            let mut limited = self.limited.clone();
            let normal = [normalise(&raw[0], &mut limited[0]), normalise(&raw[1], &mut limited[1])];
            let outputs = if ordered { normal } else { normal.map(sorted) };
            if outputs[0] == outputs[1] {
                self.limited = limited;
                self.received += outputs[0].iter().map(|frames| frames.len() as u64).sum::<u64>();
                self.plain_forwarded += forwarded_plainly(cases, &outputs[0]);
                let [same, _] = outputs;
                return Ok(Ok(same));
            }
            if Instant::now() >= deadline {
                self.limited = limited;
                return Ok(Err(Difference { cases: cases.to_vec(), outputs }));
            }
            std::thread::sleep(Duration::from_millis(1));
            self.collect(&mut raw)?;
        }
    }

    fn send(&self, cases: &[Case]) -> Result<()> {
        let Some(port) = cases.first().map(|case| case.port) else { return Ok(()) };
        let mut frames: Vec<Vec<u8>> = cases.iter().map(|case| case.bytes.clone()).collect();
        frames.extend(markers(port, self.batch));
        self.routers.iter().try_for_each(|router| router.send(port, &frames))
    }

    fn collect(&self, raw: &mut [Outputs; 2]) -> Result<()> {
        self.routers.iter().zip(raw).try_for_each(|(router, outputs)| router.collect(outputs))
    }

    /// Receives until both routers have sent every marker of this batch, which entered by `port`.
    fn collect_markers(&self, port: usize, raw: &mut [Outputs; 2]) -> Result<()> {
        let deadline = Instant::now() + MARKER_LIMIT;
        let missing = |outputs: &Outputs| {
            let mut expected = outputs.iter().zip(self.passes[port]).filter(|(_, passes)| *passes);
            expected.any(|(frames, _)| frames.iter().filter(|f| marker_batch(&f.bytes) == Some(self.batch)).count() < 2)
        };
        loop {
            self.collect(raw)?;
            let Some(late) = raw.iter().position(missing) else { return Ok(()) };
            if Instant::now() >= deadline {
                bail!("{} does not forward the markers of batch {}", self.routers[late].name, self.batch);
            }
            std::thread::yield_now();
        }
    }

    /// The single frame that shows the difference, made as simple as it still shows it.
    pub fn narrow(&mut self, difference: Difference) -> Result<Difference> {
        for case in &difference.cases {
            if let Some(single) = self.difference(std::slice::from_ref(case), false, GRACE)? {
                return self.simplify(single);
            }
        }
        Ok(difference)
    }

    fn simplify(&mut self, mut found: Difference) -> Result<Difference> {
        for cut in [512, 64, 16, 4, 1] {
            while let Some(keep) = found.cases[0].bytes.len().checked_sub(cut).filter(|keep| *keep >= 14) {
                let shorter = found.cases[0].bytes[..keep].to_vec();
                if !self.still_differs(&mut found, shorter)? {
                    break;
                }
            }
        }
        for at in 0..found.cases[0].bytes.len().min(100) {
            let mut simpler = found.cases[0].bytes.clone();
            if std::mem::take(&mut simpler[at]) != 0 {
                self.still_differs(&mut found, simpler)?;
            }
        }
        Ok(found)
    }

    /// Whether these bytes show a difference too, which then becomes what was found.
    fn still_differs(&mut self, found: &mut Difference, bytes: Vec<u8>) -> Result<bool> {
        if depends_on_time(&bytes) {
            return Ok(false);
        }
        let case = Case { bytes, port: found.cases[0].port, plain: false };
        let Some(difference) = self.difference(&[case], false, GRACE / 40)? else { return Ok(false) };
        *found = difference;
        Ok(true)
    }
}

/// How many of the plain cases came out, changed in nothing but the TTL, of another port than they entered.
fn forwarded_plainly(cases: &[Case], outputs: &Outputs) -> u64 {
    let Some(port) = cases.first().map(|case| case.port) else { return 0 };
    let others = outputs.iter().enumerate().filter(|(out, _)| *out != port);
    let packets: HashSet<&[u8]> = others.flat_map(|(_, frames)| frames).map(|f| behind_tag(&f.bytes)).collect();
    let plain = cases.iter().filter(|case| case.plain);
    plain.filter(|case| after_one_hop(behind_tag(&case.bytes)).is_some_and(|p| packets.contains(&p[..]))).count() as u64
}

fn behind_tag(frame: &[u8]) -> &[u8] {
    let at = if frame[12..14] == [0x81, 0] { 18 } else { 14 };
    &frame[at..]
}

/// An ordinary IP packet without padding, one hop later.
fn after_one_hop(packet: &[u8]) -> Option<Vec<u8>> {
    let length = |at| Some(usize::from(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?])));
    if packet.first()? >> 4 == 6 {
        let mut packet = packet.get(..40 + length(4)?)?.to_vec();
        packet[7] -= 1;
        return Some(packet);
    }
    let mut packet = packet.get(..length(2)?)?.to_vec();
    packet[8] -= 1;
    packet[10..12].fill(0);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} frame(s) entering by eth{}:", self.cases.len(), self.cases[0].port)?;
        self.cases.iter().try_for_each(|case| dump(f, "  ", &case.bytes))?;
        for (port, (first, second)) in self.outputs[0].iter().zip(&self.outputs[1]).enumerate() {
            if first == second {
                continue;
            }
            for (name, frames, other) in [("first", first, second), ("second", second, first)] {
                let only: Vec<&Frame> = frames.iter().filter(|f| !other.contains(f)).collect();
                writeln!(
                    f,
                    "  out of eth{port} of the {name} router alone: {} of {} frame(s)",
                    only.len(),
                    frames.len()
                )?;
                for frame in only {
                    dump(f, if frame.partial_checksum { "    (partial checksum) " } else { "    " }, &frame.bytes)?;
                }
            }
        }
        Ok(())
    }
}

fn dump(f: &mut std::fmt::Formatter<'_>, indent: &str, bytes: &[u8]) -> std::fmt::Result {
    writeln!(f, "{indent}{} bytes", bytes.len())?;
    for (row, bytes) in bytes.chunks(32).take(SHOWN_ROWS).enumerate() {
        let hex: Vec<String> = bytes.chunks(2).map(|pair| pair.iter().map(|b| format!("{b:02x}")).collect()).collect();
        writeln!(f, "{indent}{:04x}  {}", row * 32, hex.join(" "))?;
    }
    Ok(())
}
