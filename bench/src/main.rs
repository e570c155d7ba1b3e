//! Towpath's benchmarks: `make bench`. Every figure is a ratio to a peer measured in the same run.

use anyhow::{Context, Result};
use clap::Parser;

use std::path::PathBuf;
use towpath_bench::findings::Findings;
use towpath_bench::{
    capture, connections, cost, exceptions, filter, findings, groups, instructions, latency, left, nat, scrape,
    sockets, stalls, sync, tcp, user,
};
use towpath_report::Report;

/// Measures Towpath beside its peers and writes a report.
#[derive(Parser)]
struct Arguments {
    /// Sections to run; all of them if none is named
    sections: Vec<Section>,
    /// Rounds in which the contenders' windows alternate
    #[arg(long, default_value_t = 25)]
    rounds: usize,
    /// Where the report goes; the figures go beside it as JSON
    #[arg(long, default_value = "out/bench.html")]
    report: PathBuf,
    /// End with status 1 if an aim is missed
    #[arg(long)]
    judge: bool,
    /// Numbers of connections for `nat`, powers of two
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1 << 10, 1 << 15, 1 << 20])]
    connections: Vec<usize>,
    /// What `instructions` starts inside a virtual machine
    #[arg(long, hide = true)]
    inside: Option<instructions::Half>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Section {
    /// Nanoseconds a packet, by contender and table size
    Cost,
    /// Nanoseconds a packet of masqueraded connections
    Nat,
    /// Many connections: how soon they are known, memory, what it costs to look at them
    Connections,
    /// What a capture that matches nothing costs the rest
    Capture,
    /// What a packet costs that is left to Linux
    Left,
    /// What a packet costs that `towpath filter` drops
    Filter,
    /// What a group of next hops costs over one next hop
    Groups,
    /// What the metrics endpoint costs packets
    Scrape,
    /// TCP through a gateway
    Tcp,
    /// Start with full tables, memory, idle CPU
    Start,
    /// Route changes: delay, bursts
    Changes,
    /// Latency and CPU against load
    Latency,
    /// A worker of the user engine over ports in memory
    User,
    /// A worker's pauses while tables change
    Stalls,
    /// The user engine over AF_XDP on veth, beside DPDK
    Sockets,
    /// Packets handed to a socket in Linux
    Exceptions,
    /// Instructions a packet, in the virtual machine
    Instructions,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(half) = arguments.inside {
        return instructions::inside(half);
    }
    let wanted = |section| arguments.sections.is_empty() || arguments.sections.contains(&section);
    let mut findings = Findings::default();
    let mut report = Report::new("Towpath benchmarks");
    if wanted(Section::Cost) {
        cost::run(&mut findings, &mut report, arguments.rounds, &[1, 1_000, 10_000, 100_000, 1_000_000])?;
    }
    if wanted(Section::Nat) {
        nat::run(&mut findings, &mut report, arguments.rounds, &arguments.connections)?;
    }
    if wanted(Section::Connections) {
        connections::run(&mut findings, &mut report, &[1 << 20, 1 << 21])?;
    }
    if wanted(Section::Capture) {
        capture::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Left) {
        left::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Filter) {
        filter::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Groups) {
        groups::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Scrape) {
        scrape::run(&mut findings, &mut report, arguments.rounds.min(9))?;
    }
    if wanted(Section::Tcp) {
        tcp::run(&mut findings, &mut report, arguments.rounds.min(9))?;
    }
    if wanted(Section::Start) {
        sync::start(&mut findings, &mut report, 5)?;
    }
    if wanted(Section::Changes) {
        sync::changes(&mut findings, &mut report)?;
    }
    if wanted(Section::Latency) {
        latency::run(&mut findings, &mut report, 5)?;
    }
    if wanted(Section::User) {
        user::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Stalls) {
        stalls::run(&mut findings, &mut report, 5)?;
    }
    if wanted(Section::Sockets) {
        sockets::run(&mut findings, &mut report, 7)?;
    }
    if wanted(Section::Exceptions) {
        exceptions::run(&mut findings, &mut report, arguments.rounds)?;
    }
    if wanted(Section::Instructions) {
        instructions::run(&mut findings, &mut report)?;
    }
    report.section("Aims");
    let rows: Vec<_> = findings.goals.iter().map(findings::Goal::row).collect();
    report.table(&["figure", "found", "aim", ""], &rows);
    report.write(&arguments.report)?;
    let figures = serde_json::json!({ "goals": findings.goals, "figures": findings.figures });
    let json = arguments.report.with_extension("json");
    std::fs::write(&json, serde_json::to_string_pretty(&figures)?).with_context(|| json.display().to_string())?;
    println!("report: {}", arguments.report.display());
    let missed = findings.goals.iter().filter(|goal| !goal.met).count();
    anyhow::ensure!(!arguments.judge || missed == 0, "{missed} aims missed");
    Ok(())
}
