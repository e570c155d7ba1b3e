//! Instructions a packet costs the router, counted in the test virtual machine, where one nanosecond of the guest's
//! clock is one instruction (QEMU's -icount). These figures repeat to about one percent whatever else the machine does.
//!
//! One processor does everything, so what the source, the first veth and the sink cost is measured alone (the router
//! drops by XDP) and subtracted. What remains is the router with its way to the sink.

use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, OUT, towpath_binary};
use crate::stats::Summary;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::time::Instant;
use towpath_report::{Bar, Report};

const PACKETS: u32 = 200_000;
const ROUNDS: usize = 5;

/// What the guest prints: instructions per packet by contender.
#[derive(Serialize, Deserialize)]
struct Counted(BTreeMap<String, f64>);

const FLOWTABLE: &str = "netfilter flowtable";

/// Runs the section: starts the virtual machine and this program in it.
pub fn run(findings: &mut Findings, report: &mut Report) -> Result<()> {
    println!("instructions per packet, router alone, in the virtual machine");
    let this = std::env::current_exe()?;
    let output = Command::new("lab/vm")
        .args([
            "--icount",
            "--append",
            "mitigations=off init_on_alloc=0",
            "--modules",
            "veth,nft_flow_offload,nf_flow_table_inet,nf_conntrack",
            "--",
        ])
        .arg(&this)
        .arg("--inside")
        .env("TOWPATH_BIN", towpath_binary()?)
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("start lab/vm (run the benchmarks in the project's folder)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("the virtual machine ended with {}: {text}", output.status);
    }
    let line = text.lines().find(|line| line.starts_with('{')).with_context(|| format!("no figures in: {text}"))?;
    let Counted(counted) = serde_json::from_str(line)?;
    for (contender, instructions) in &counted {
        println!("  {contender:24} {instructions:7.0}");
    }
    let of = |name: &str| counted.get(name).copied().with_context(|| format!("{name} was not counted"));
    let towpath = of(Contender::Towpath.name())?;
    findings.goal("instructions: Towpath over the flowtable", towpath / of(FLOWTABLE)?, Aim::AtMost(0.5));
    findings.goal("instructions: Linux over Towpath", of(Contender::Linux.name())? / towpath, Aim::AtLeast(2.0));
    let bars: Vec<Bar> = counted
        .iter()
        .map(|(label, value)| Bar { label: label.clone(), value: *value, low: *value, high: *value })
        .collect();
    report.section("Instructions per packet").text(
        "Counted in a virtual machine with a distribution's kernel, router alone: one processor, one guest nanosecond \
         per instruction; what source and sink cost is subtracted; mitigations=off init_on_alloc=0.",
    );
    report.bars("Instructions per packet, one route", "", &bars)?;
    findings.keep("instructions", counted);
    Ok(())
}

/// What runs inside the guest.
pub fn inside() -> Result<()> {
    let contenders =
        [Contender::Drop, Contender::Redirect, Contender::FibForward, Contender::Linux, Contender::Towpath];
    let mut counted = count("instr", &contenders, false)?;
    let flowtable = count("instrft", &[Contender::Drop, Contender::Linux], true)?;
    let through = flowtable.get(Contender::Linux.name()).context("Linux was not counted")?;
    counted.insert(FLOWTABLE.to_owned(), *through);
    println!("{}", serde_json::to_string(&Counted(counted))?);
    Ok(())
}

fn count(name: &str, contenders: &[Contender], flowtable: bool) -> Result<BTreeMap<String, f64>> {
    let mut arrangement = Arrangement::new(name, contenders, 1)?;
    let routes: [(IpAddr, u8); 1] = [("203.0.113.0".parse()?, 24)];
    arrangement.add_routes(&routes)?;
    arrangement.wait_in_sync(&routes)?;
    arrangement.set_destinations(&["203.0.113.9".parse()?], false)?;
    if flowtable {
        arrangement.offload()?;
    }
    let mut rounds = vec![Vec::new(); contenders.len()];
    for round in 0..=ROUNDS {
        for (number, rounds) in rounds.iter_mut().enumerate() {
            let before = arrangement.arrived()?;
            let begin = Instant::now();
            arrangement.send(number, PACKETS)?;
            let time = begin.elapsed().as_nanos() as f64;
            let arrived = (arrangement.arrived()? - before) as f64;
            if contenders[number] != Contender::Drop && arrived < f64::from(PACKETS) * 0.9 {
                bail!("{}: {arrived} of {PACKETS} packets arrived", contenders[number].name());
            }
            if round > 0 {
                rounds.push((time, arrived));
            }
        }
    }
    arrangement.assert_fast_path()?;
    let median = |values: Vec<f64>| Summary::of(&values).context("no rounds").map(|summary| summary.median);
    let base = median(rounds[0].iter().map(|(time, _)| *time).collect())?;
    // A packet that found a ring full cost the source, but not the router.
    let cost = |rounds: &[(f64, f64)]| median(rounds.iter().map(|(time, arrived)| (time - base) / arrived).collect());
    contenders[1..].iter().zip(&rounds[1..]).map(|(who, rounds)| Ok((who.name().to_owned(), cost(rounds)?))).collect()
}

impl Arrangement {
    /// Hands every UDP flow through the router to a flowtable, in the words of an administrator.
    fn offload(&self) -> Result<()> {
        let mut devices: Vec<&str> = self.ports();
        devices.push(OUT);
        let rules = format!(
            "table inet fast {{ flowtable f {{ hook ingress priority 0; devices = {{ {} }}; }};\n\
             chain forward {{ type filter hook forward priority 0; meta l4proto udp flow add @f; }}; }}",
            devices.join(", ")
        );
        self.router.run(["nft", &rules])?;
        Ok(())
    }
}
