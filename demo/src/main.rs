//! The demo, `make demo`: a router with BGP, made faster while it runs.

mod network;
mod report;
mod scenes;
mod traffic;
mod view;

use anyhow::{Context, Result};
use network::Network;
use scenes::Stage;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use traffic::Traffic;
use view::View;

const REPORT: &str = "out/demo.html";
const INTRODUCTION: &str = "\
This demo makes four network namespaces (client, router, upstream, server) with links between them and starts FRR in
two of them, which speak real BGP. It sends traffic through the router, first by Linux alone, then with Towpath, while
routes and a firewall rule change and the daemon is killed. It takes about a minute, touches nothing but its own
namespaces and removes them at the end (Ctrl-C ends it early). It needs root.
";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

fn main() -> ExitCode {
    println!("{INTRODUCTION}");
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every promise was kept.
fn run() -> Result<bool> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, interrupt as *const () as libc::sighandler_t) };
    }
    println!("Making the network and waiting for BGP …");
    let network = Network::start()?;
    let traffic = Traffic::new(&network)?;
    let view = View::new();
    let played = play(&network, &traffic, &view);
    view.close();
    let (outcomes, costs) = played?;
    report::write(Path::new(REPORT), &outcomes, &costs, &view.samples())?;
    println!("\n{}", summary(&report::rows(&outcomes)));
    let broken = outcomes.iter().filter(|outcome| outcome.kept == Some(false)).count();
    let promised = outcomes.iter().filter(|outcome| outcome.kept.is_some()).count();
    println!("{} of {promised} promises kept; report with plots: {REPORT}", promised - broken);
    Ok(broken == 0)
}

/// Plays the scenes while the stream and the view run beside.
fn play(network: &Network, traffic: &Traffic, view: &View) -> Result<(Vec<scenes::Outcome>, Vec<scenes::Cost>)> {
    let over = AtomicBool::new(false);
    let stop = || over.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| traffic.run(stop));
        let watch = scope.spawn(|| view.watch(traffic, stop));
        let mut stage = Stage::new(network, traffic, view, &interrupted);
        let played = stage.play();
        over.store(true, Ordering::Relaxed);
        for (thread, what) in [(stream, "the stream"), (watch, "the view")] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context(what)?;
        }
        played.map(|()| (stage.outcomes, stage.costs))
    })
}

/// The rows in columns.
fn summary(rows: &[[String; 3]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    let line = |[what, found, kept]: &[String; 3]| format!("{what:<first$}  {found:<second$}  {kept}\n");
    rows.iter().map(line).collect()
}
