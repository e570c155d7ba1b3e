//! `towpath top`: rates, live on a terminal or in batches for scripts.

mod rates;
mod sample;
mod view;

use crate::cli;
use crate::control::{Client, Request};
use crate::read::{connect, write_out};
use crate::report::{Top, TopPrefixes};
use crate::text::table;
use anyhow::Result;
use rates::{Reading, rate};
use sample::Sampler;
use std::io::IsTerminal;
use std::time::Duration;

/// How long packets are counted before a sample of them is drawn.
const FIRST_LOOK: Duration = Duration::from_millis(200);

/// Shows rates until told to stop, or as often as asked.
pub fn run(wanted: &cli::Top) -> Result<()> {
    let interval = Duration::from_secs_f64(wanted.delay.0);
    if wanted.batch || wanted.json || wanted.count.is_some() || !std::io::stdout().is_terminal() {
        return batch(wanted, interval);
    }
    view::run(interval, wanted.prefixes)
}

/// One block for each interval: an error of the daemon's ends it.
fn batch(wanted: &cli::Top, interval: Duration) -> Result<()> {
    let mut client = connect()?;
    let mut before = read(&mut client)?;
    let mut sampler = wanted.prefixes.then(Sampler::default);
    if let Some(sampler) = &mut sampler {
        std::thread::sleep(FIRST_LOOK);
        let now = read(&mut client)?;
        sampler.begin(&now.since(&before))?;
        before = read(&mut client)?;
    }
    for number in 0.. {
        if wanted.count.is_some_and(|count| number >= count) {
            break;
        }
        std::thread::sleep(interval);
        let now = read(&mut client)?;
        let mut top = now.since(&before);
        if let Some(sampler) = &mut sampler {
            sampler.add(&mut top)?;
        }
        before = now;
        let separator = if number == 0 { "" } else { "\n" };
        write_out(&match wanted.json {
            true => serde_json::to_string(&top)? + "\n",
            false => format!("{separator}{}", text(&top)),
        })?;
    }
    Ok(())
}

fn read(client: &mut Client) -> Result<Reading> {
    let (status, stats) = (client.ask(&Request::Status)?, client.ask(&Request::Stats)?);
    Ok(Reading::new(status, stats, client.ask(&Request::Exceptions)?))
}

fn text(top: &Top) -> String {
    let ports = table(&PORT_HEADS, &port_rows(top));
    let exceptions = match top.exceptions.is_empty() {
        true => String::new(),
        false => format!("\n{}", table(&EXCEPTION_HEADS, &exception_rows(top))),
    };
    let prefixes = top.prefixes.as_ref().map_or(String::new(), |prefixes| {
        format!("\n{}\n{}", sample(prefixes), table(&PREFIX_HEADS, &prefix_rows(prefixes)))
    });
    format!("{}\n{ports}{exceptions}{prefixes}", summary(top))
}

/// What the numbers of prefixes rest on.
fn sample(prefixes: &TopPrefixes) -> String {
    let missed = match prefixes.missed {
        0 => String::new(),
        missed => format!(", {missed} more left out"),
    };
    format!("busiest prefixes, estimated: 1 packet in {} was drawn, {} seen{missed}", prefixes.one_in, prefixes.seen)
}

/// What is so of the whole instance.
fn summary(top: &Top) -> String {
    let sync = if top.in_sync { "in sync with Linux" } else { "NOT in sync with Linux" };
    let flows = &top.flows;
    let connections = match flows.capacity {
        0 => String::new(),
        _ => format!("; connections: {} fast, {} waiting, {} closing", flows.fast, flows.waiting, flows.closing),
    };
    let shadow = if top.shadow { "SHADOW, nothing is forwarded: these are predictions; " } else { "" };
    format!("{shadow}{sync}; {} settings keep traffic in Linux{connections}", top.policies)
}

const PORT_HEADS: [&str; 7] = ["port", ">in/s", ">in bit/s", ">out/s", ">out bit/s", ">to Linux/s", ">fast"];
const EXCEPTION_HEADS: [&str; 4] = ["port", ">to Linux/s", "reason", "meaning"];

const PREFIX_HEADS: [&str; 5] = ["prefix", ">~in/s", ">~in bit/s", ">fast", ">seen"];

fn port_rows(top: &Top) -> Vec<Vec<String>> {
    let row = |port: &crate::report::TopPort| {
        let rates = [port.rx_packets, port.rx_bits, port.tx_packets, port.tx_bits, port.exceptions].map(rate);
        let fast = port.fast.map_or_else(|| "-".into(), |fast| format!("{:.0} %", fast * 100.0));
        std::iter::once(port.port.clone()).chain(rates).chain([fast]).collect()
    };
    top.ports.iter().map(row).collect()
}

fn exception_rows(top: &Top) -> Vec<Vec<String>> {
    let row = |e: &crate::report::TopException| vec![e.port.clone(), rate(e.packets), e.reason.clone(), e.text.clone()];
    top.exceptions.iter().map(row).collect()
}

fn prefix_rows(prefixes: &TopPrefixes) -> Vec<Vec<String>> {
    let row = |prefix: &crate::report::TopPrefix| {
        let name = prefix.prefix.clone().unwrap_or_else(|| "no route".into());
        let fast = format!("{:.0} %", prefix.fast * 100.0);
        vec![name, rate(prefix.packets), rate(prefix.bits), fast, prefix.seen.to_string()]
    };
    prefixes.busiest.iter().map(row).collect()
}
