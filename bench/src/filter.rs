//! What a packet costs that `towpath filter` drops, beside nftables at the ingress hook, and what filters cost the rest.

use crate::beside::{Beside, Unit};
use crate::cost::{Outcome, WINDOW, bars, outcomes, ratio, take_turns};
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, ask, gateway, towpath_binary};
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::Stdio;
use towpath_lab::Node;
use towpath_report::Report;

/// The bare XDP_DROP looks at nothing; the rest find each source among those they drop.
const CONTENDERS: [Contender; 3] = [Contender::Drop, Contender::Linux, Contender::Towpath];
const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const MANY: u32 = 1 << 14;

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("filters: {rounds} rounds of windows of {WINDOW} packets each");
    report.section("Filters").text(
        "What `towpath filter` drops, by source address, beside a set of nftables at the ingress hook with the same \
         addresses and beside a program that only says XDP_DROP: the router's CPU time per packet as above. Then forwarded \
         packets that no filter matches, with and without filters.",
    );
    for count in [1, MANY] {
        println!("{count} filters, all packets dropped:");
        let found = dropped(count, rounds)?;
        let faster = ratio(&found, Contender::Linux)? / ratio(&found, Contender::Towpath)?;
        findings.goal(format!("{count} filters: times faster than nftables"), faster, Aim::AtLeast(1.0));
        report.bars(
            &format!("{count} filters: ns per packet, median, floor to 90th percentile"),
            "ns",
            &bars(&found),
        )?;
        findings.keep(&format!("filters, {count}"), found);
    }
    println!("forwarded packets beside {MANY} filters for others:");
    let found = forwarded(rounds)?;
    found.plot(report, "Forwarded packets, filters for others")?;
    findings.keep("filters for others", found);
    Ok(())
}

fn dropped(count: u32, rounds: usize) -> Result<Vec<Outcome>> {
    let mut arrangement = arrangement(&CONTENDERS)?;
    arrangement.drops = true;
    let router = arrangement.router.clone();
    let port = arrangement.ports()[1].to_owned();
    let all: Vec<String> = sources(11, count).iter().map(Ipv4Addr::to_string).collect();
    feed(
        router.command("nft").args(["-f", "-"]),
        &format!(
            "table netdev t {{ set s {{ type ipv4_addr; elements = {{ {} }}; }};
             chain c {{ type filter hook ingress device {port} priority 0; ip saddr @s drop; }}; }}",
            all.join(", ")
        ),
    )?;
    apply(&router, count)?;
    arrangement.set_sources(&sources(11, count), DESTINATION)?;
    // To warm caches; it is not counted.
    take_turns(&mut arrangement, 1)?;
    let costs = take_turns(&mut arrangement, rounds)?;
    let filters = ask(&router, &["filter", "list"]).context("no list of filters")?;
    let counted: u64 =
        filters["filters"].as_array().into_iter().flatten().filter_map(|row| row["packets"].as_u64()).sum();
    let [_, taken] = arrangement.forwarded_of_taken(None)?.context("Towpath takes no part")?;
    ensure!(counted * 100 >= taken * 99, "Towpath's filters dropped {counted} of {taken} packets");
    outcomes(&CONTENDERS, &costs, Contender::Drop)
}

fn forwarded(rounds: usize) -> Result<Beside> {
    let mut arrangement = arrangement(&[Contender::Towpath])?;
    let router = arrangement.router.clone();
    arrangement.set_sources(&sources(12, MANY), DESTINATION)?;
    let found = Beside::measure(["no filters", "filters for others"], Unit::Nanoseconds, rounds, |condition| {
        apply(&router, [0, MANY][condition])?;
        arrangement.window(0, WINDOW)
    })?;
    arrangement.assert_fast_path()?;
    Ok(found)
}

fn arrangement(contenders: &[Contender]) -> Result<Arrangement> {
    let arrangement = Arrangement::new("filter", contenders, MANY as usize)?;
    arrangement.router.sh(&format!("ip route add 10.0.0.0/8 via {}", gateway(false, 0)))?;
    arrangement.wait_in_sync(&[(Ipv4Addr::new(10, 0, 0, 0).into(), 8)])?;
    Ok(arrangement)
}

/// So many addresses of a network, spread over it.
fn sources(net: u32, count: u32) -> Vec<Ipv4Addr> {
    (0..count).map(|number| Ipv4Addr::from_bits(net << 24 | number.wrapping_mul(0x9e37_79b1) >> 8)).collect()
}

/// Puts so many filters into force in place of those that are.
fn apply(router: &Node, count: u32) -> Result<()> {
    let adds: String = sources(11, count).iter().map(|from| format!("add --from {from}\n")).collect();
    feed(router.command(&towpath_binary()?).args(["filter", "apply", "-"]), &format!("flush\n{adds}"))
}

fn feed(command: &mut std::process::Command, lines: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
    ensure!(child.wait()?.success(), "{command:?} failed");
    Ok(())
}
