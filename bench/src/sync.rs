//! How long it takes until the tables are in step with Linux: at start, and after changes.

use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender, GATEWAYS, OUT, ask, gateway, towpath_binary};
use crate::routes;
use crate::stats::Summary;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::HashSet;
use std::io::Write;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};
use towpath_lab::Node;
use towpath_report::Report;

#[derive(Serialize)]
struct Start {
    routes: usize,
    start_seconds: Summary,
    ip_route_show_seconds: Summary,
    ratio: Summary,
    memory_bytes: u64,
    idle_share_of_a_core: f64,
}

/// Start to in-sync with full tables beside `ip route show` of the same tables; memory and idle cost on the way.
pub fn start(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    let all: Vec<(IpAddr, u8)> = routes::ipv4(1_000_000).into_iter().chain(routes::ipv6(250_000)).collect();
    println!("start to in-sync with {} routes, {rounds} rounds, each beside `ip route show`", all.len());
    let arrangement = Arrangement::new("start", &[Contender::Linux], 1)?;
    fill(&arrangement.router, &all)?;
    let router = &arrangement.router;
    let (mut starts, mut shows, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut memory, mut idle) = (0, 0.0);
    for round in 0..rounds {
        let begin = Instant::now();
        router.sh("ip -4 route show >/dev/null; ip -6 route show >/dev/null")?;
        let show = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let mut towpath = router.spawn([&towpath_binary()?, "up", OUT])?;
        towpath.wait_for_output(Duration::from_secs(120), "ready")?;
        let start = begin.elapsed().as_secs_f64();
        if round + 1 == rounds {
            let pid = towpath.pid();
            memory = memory_of(pid)? + table_memory(router)?;
            idle = idle_share(pid)?;
        }
        towpath.stop(Duration::from_secs(30))?;
        println!("  in sync after {start:.2} s, ip route show took {show:.2} s");
        starts.push(start);
        shows.push(show);
        ratios.push(start / show);
    }
    let ratio = Summary::of(&ratios).context("no rounds")?;
    findings.goal("start to in-sync over `ip route show`, 1,250,000 routes", ratio.median, Aim::AtMost(1.5));
    findings.goal("memory with 1,250,000 routes, MiB", memory as f64 / f64::from(1 << 20), Aim::AtMost(512.0));
    findings.goal("idle daemon, percent of a core", idle * 100.0, Aim::AtMost(0.5));
    let figures = Start {
        routes: all.len(),
        start_seconds: Summary::of(&starts).context("no rounds")?,
        ip_route_show_seconds: Summary::of(&shows).context("no rounds")?,
        ratio,
        memory_bytes: memory,
        idle_share_of_a_core: idle,
    };
    report.section("Start with full tables").text(&format!(
        "From the command to its readiness notice with {} routes: {:.2} s in the median of {rounds} rounds; \
         ip route show of the same tables takes {:.2} s. Resident memory of the daemon and of the tables together: \
         {} MiB. Idle, the daemon takes {:.2} % of a core.",
        figures.routes,
        figures.start_seconds.median,
        figures.ip_route_show_seconds.median,
        memory >> 20,
        idle * 100.0
    ));
    findings.keep("start", figures);
    Ok(())
}

#[derive(Serialize)]
struct Changes {
    linux_ms: Summary,
    towpath_ms: Summary,
    changes_a_second: f64,
    paced: Burst,
    flood: Burst,
}

/// How long after Linux's own a change takes effect, at 1,000 changes a second; and whether a burst is kept up with.
pub fn changes(findings: &mut Findings, report: &mut Report) -> Result<()> {
    println!("effect of route changes, 1,000 a second");
    let (linux, rate) = effect(Contender::Linux)?;
    let (towpath, _) = effect(Contender::Towpath)?;
    for (who, found) in [("Linux", &linux), ("Towpath", &towpath)] {
        println!("  {who}: median {:.2} ms, 10th percentile {:.2}, 90th {:.2}", found.median, found.floor, found.high);
    }
    findings.goal(
        "route change: Towpath after Linux, ms in the median",
        towpath.median - linux.median,
        Aim::AtMost(10.0),
    );
    let paced = burst(105_000.0, 5)?;
    println!("  at a fixed rate: {}", serde_json::to_string(&paced)?);
    findings.goal("changes a second given to the kernel, thousands", paced.changes_a_second / 1e3, Aim::AtLeast(100.0));
    // Whoever has to read everything again has not kept up.
    findings.goal("times that notifications were lost at that rate", paced.losses as f64, Aim::AtMost(0.0));
    findings.goal("in step after the last of them, ms", paced.in_step_after_ms, Aim::AtMost(100.0));
    findings.goal("routes that differ from Linux's afterwards", paced.differences as f64, Aim::AtMost(0.0));
    let flood = burst(f64::INFINITY, 5)?;
    println!("  as fast as the kernel: {}", serde_json::to_string(&flood)?);
    findings.goal("routes that differ from Linux's after a flood", flood.differences as f64, Aim::AtMost(0.0));
    report.section("Route changes").text(&format!(
        "A route's gateway changes {rate:.0} times a second while packets flow to it; the sink notes when packets begin to \
         go to the new gateway. After the change was given to the kernel this took {:.2} ms with Linux and {:.2} ms with \
         Towpath in the median (90th percentile {:.2} and {:.2} ms). At {:.0} changes a second Towpath was in step {:.1} ms \
         after the last of {}; at {:.0} a second, which is all that the kernel takes, {:.0} ms.",
        linux.median,
        towpath.median,
        linux.high,
        towpath.high,
        paced.changes_a_second,
        paced.in_step_after_ms,
        paced.changes,
        flood.changes_a_second,
        flood.in_step_after_ms
    ));
    findings.keep("changes", Changes { linux_ms: linux, towpath_ms: towpath, changes_a_second: rate, paced, flood });
    Ok(())
}

/// Changes one route a thousand times a second while packets flow; milliseconds from each change to its effect.
fn effect(contender: Contender) -> Result<(Summary, f64)> {
    const CHANGES: usize = 2_000;
    let mut arrangement = Arrangement::observed("change", &[contender], 1)?;
    let destination: IpAddr = "203.0.113.9".parse()?;
    arrangement.add_routes(&[(destination, 32)])?;
    if contender == Contender::Towpath {
        in_step(&arrangement.router, destination)?;
    }
    arrangement.set_destinations(&[destination], true)?;
    let router = arrangement.router.clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let given = std::thread::scope(|scope| {
        let sender = scope.spawn(|| arrangement.pace(0, 100_000.0, || stop.load(std::sync::atomic::Ordering::Relaxed)));
        let given = change_often(&router, CHANGES);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        given
    })?;
    let seen = arrangement.changes_seen()?;
    let mut delays = Vec::new();
    let mut later = seen.iter().peekable();
    for (time, gateway) in &given {
        while later.next_if(|(seen, _)| seen < time).is_some() {}
        if let Some((seen, found)) = later.peek()
            && usize::try_from(*found)? == *gateway
        {
            delays.push((seen - time) as f64 / 1e6);
        }
    }
    if delays.len() < given.len() / 2 {
        bail!("{}: only {} of {} changes were seen at the sink", contender.name(), delays.len(), given.len());
    }
    let span = given.last().context("no changes")?.0 - given[0].0;
    Ok((Summary::of(&delays).context("no changes")?, given.len() as f64 / (span as f64 / 1e9)))
}

/// Moves the route from gateway to gateway by one `ip -batch` fed a line a millisecond; the time just before each line
/// was written, and the gateway.
fn change_often(router: &Node, changes: usize) -> Result<Vec<(u64, usize)>> {
    let mut child = router.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("stdin of ip")?;
    let mut given = Vec::new();
    let begin = Instant::now();
    for number in 0..changes {
        let due = begin + Duration::from_millis(number as u64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let to = number % GATEWAYS;
        given.push((monotonic(), to));
        writeln!(input, "route replace 203.0.113.9/32 via {}", gateway(false, to))?;
        input.flush()?;
    }
    drop(input);
    if !child.wait()?.success() {
        bail!("ip -batch could not change the route");
    }
    Ok(given)
}

/// CLOCK_MONOTONIC, which bpf_ktime_get_ns reads too.
pub(crate) fn monotonic() -> u64 {
    // SAFETY: an all-zero timespec is valid; the call fills it.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }
}

/// Adds routes, spread over the gateways.
fn fill(router: &Node, routes: &[(IpAddr, u8)]) -> Result<()> {
    let mut socket = router.route_socket()?;
    for (number, route) in routes.iter().enumerate() {
        socket.replace(*route, gateway(route.0.is_ipv6(), number).parse()?)?;
    }
    socket.flush()
}

/// What a stream of changes at a fixed rate did.
#[derive(Serialize)]
struct Burst {
    changes: usize,
    changes_a_second: f64,
    in_step_after_ms: f64,
    losses: usize,
    differences: usize,
}

/// Moves 200,000 routes from gateway to gateway, `rate` changes a second, until every one was moved `turns` times: how
/// long after the last change Towpath is in step, and in how many routes it then differs from Linux.
fn burst(rate: f64, turns: usize) -> Result<Burst> {
    const TICK: Duration = Duration::from_millis(1);
    let arrangement = Arrangement::new("burst", &[], 1)?;
    let router = &arrangement.router;
    let all = routes::ipv4(200_000);
    let last: (IpAddr, u8) = ("203.0.113.0".parse()?, 24);
    fill(router, &all)?;
    let mut towpath = router.spawn([&towpath_binary()?, "up", OUT])?;
    towpath.wait_for_output(Duration::from_secs(120), "ready")?;
    let mut socket = router.route_socket()?;
    let begin = Instant::now();
    let mut done = 0usize;
    let changes = all.len() * turns;
    while done < changes {
        let due = ((begin.elapsed().as_secs_f64() * rate) as usize).min(changes);
        for number in done..due {
            let (route, turn) = (number % all.len(), number / all.len());
            socket.replace(all[route], gateway(false, route + turn + 1).parse()?)?;
        }
        socket.flush()?;
        done = due;
        std::thread::sleep(TICK);
    }
    let took = begin.elapsed();
    socket.replace(last, gateway(false, 0).parse()?)?;
    socket.flush()?;
    let end = Instant::now();
    in_step(router, last.0)?;
    let lag = end.elapsed();
    let losses = towpath.log().matches("notifications were lost").count();
    let burst = Burst {
        changes,
        changes_a_second: changes as f64 / took.as_secs_f64(),
        in_step_after_ms: lag.as_secs_f64() * 1e3,
        losses,
        differences: differences(router)?,
    };
    towpath.stop(Duration::from_secs(30))?;
    Ok(burst)
}

/// Waits until Towpath shows a route for the address, and is in sync.
fn in_step(router: &Node, address: IpAddr) -> Result<()> {
    towpath_lab::wait_for(Duration::from_secs(60), "Towpath to be in step", || {
        let routes = ask(router, &["show", "routes", &address.to_string()])?;
        let there = routes["routes"].as_array()?.iter().any(|route| route["prefix"] != "0.0.0.0/0");
        (there && ask(router, &["status"])?["in_sync"] == true).then_some(())
    })
}

/// Routes of table main that Linux and Towpath show with different gateways, or only one of them shows.
fn differences(router: &Node) -> Result<usize> {
    let binary = towpath_binary()?;
    let linux: serde_json::Value = serde_json::from_str(&router.run(["ip", "-j", "-4", "route", "show"])?)?;
    let towpath: serde_json::Value = serde_json::from_str(&router.run([&binary, "show", "routes", "--json"])?)?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let linux = linux.as_array().context("ip shows no routes")?.iter().map(|route| {
        let prefix = text(&route["dst"]);
        let whole = if prefix.contains('/') { prefix } else { prefix + "/32" };
        (whole, text(&route["gateway"]))
    });
    let towpath = towpath["routes"].as_array().context("towpath shows no routes")?.iter();
    let main = towpath.filter(|route| route["table"] == 254 && !text(&route["prefix"]).contains(':'));
    let towpath = main.map(|route| (text(&route["prefix"]), text(&route["via"][0]["gateway"])));
    let (linux, towpath): (HashSet<_>, HashSet<_>) = (linux.collect(), towpath.collect());
    Ok(linux.symmetric_difference(&towpath).count())
}

/// Anonymous resident memory of a process; the tables are counted apart.
pub(crate) fn memory_of(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
    Ok(line.split_whitespace().nth(1).context("RssAnon")?.parse::<u64>()? * 1024)
}

/// Memory of the tables, as `status` says it.
pub(crate) fn table_memory(router: &Node) -> Result<u64> {
    let status: serde_json::Value = serde_json::from_str(&router.run([&towpath_binary()?, "status", "--json"])?)?;
    status["memory_bytes"].as_u64().context("status shows no memory")
}

/// The share of a core that a process takes in the next ten seconds.
pub(crate) fn idle_share(pid: u32) -> Result<f64> {
    let time = || -> Result<u64> {
        let mut sum = 0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let id = task.file_name().to_string_lossy().parse()?;
            sum += crate::path::cpu_time(id)?;
        }
        Ok(sum)
    };
    let (before, begin) = (time()?, Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    Ok((time()? - before) as f64 / begin.elapsed().as_nanos() as f64)
}
