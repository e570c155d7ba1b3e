//! What the metrics endpoint costs packets while it is scraped every second.

use crate::beside::{Beside, Unit};
use crate::cost::DESTINATIONS;
use crate::findings::{Aim, Findings};
use crate::path::{Arrangement, Contender};
use crate::routes;
use anyhow::{Result, ensure};
use std::time::Duration;
use towpath_lab::Node;
use towpath_report::Report;

/// Seconds of packets, so that a scrape or two fall into each window
const WINDOW: u32 = 8_000_000;
const ENDPOINT: &str = "127.0.0.1:9475";
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("scrapes: {rounds} rounds of windows of {WINDOW} packets each, with a scrape every second and without");
    let metrics = format!("--metrics={ENDPOINT}");
    let mut arrangement = Arrangement::with_options("scrape", &[Contender::Towpath], DESTINATIONS, &[&metrics])?;
    let all = routes::ipv4(1_000);
    arrangement.add_routes(&all)?;
    arrangement.wait_in_sync(&all)?;
    arrangement.set_destinations(&routes::destinations(&all, DESTINATIONS), false)?;
    let router = arrangement.router.clone();
    let found =
        Beside::measure(["without", "scraped every second"], Unit::Nanoseconds, rounds, |condition| match condition {
            0 => arrangement.window(0, WINDOW),
            _ => while_scraped(&router, || arrangement.window(0, WINDOW)),
        })?;
    arrangement.assert_fast_path()?;
    findings.goal("metrics scraped every second: cost of packets", found.ratio.median, Aim::AtMost(1.01));
    report.section("Metrics").text(
        "The cost of a packet while curl reads the metrics every second, beside the cost without: the router's CPU time per \
         packet as above, in windows that alternate. The daemon and curl run on the source's core.",
    );
    found.plot(report, "Metrics")?;
    findings.keep("scrape", found);
    Ok(())
}

fn while_scraped(router: &Node, window: impl FnOnce() -> Result<f64>) -> Result<f64> {
    let scrape =
        format!("while curl -sS -o /dev/null -w '%{{http_code}}\\n' http://{ENDPOINT}/metrics; do sleep 1; done");
    let mut scraper = router.spawn(["sh", "-c", &scrape])?;
    scraper.wait_for_output(PATIENCE, "200")?;
    let cost = window()?;
    ensure!(scraper.ended()?.is_none(), "the metrics could not be read any more");
    scraper.signal(libc::SIGTERM);
    scraper.wait(PATIENCE)?;
    Ok(cost)
}
