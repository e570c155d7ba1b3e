//! `towpath trace`: what becomes of packets, and why.

mod dissect;
mod expression;
mod serve;

pub use serve::{Traces, stream};

use crate::cli;
use crate::control::{Request, Wanted};
use crate::log;
use crate::read::{connect, steps_text, verdict_text, write_more};
use crate::report::{Became, TraceBegun, TraceLine, TracedPacket};
use crate::signals::Termination;
use crate::text::suggestion;
use anyhow::{Result, bail};
use std::net::Shutdown;
use towpath_tables::Reason;

/// Shows packets until told to stop, or as many as asked.
pub fn run(trace: &cli::Trace) -> Result<()> {
    let request = Request::Trace(wanted(trace)?);
    let termination = Termination::block()?;
    let mut client = connect()?;
    let TraceBegun {} = client.ask(&request)?;
    log::note("tracing; end with Ctrl-C");
    let leave = client.hang_up()?;
    let signalled = leave.try_clone()?;
    crate::source::thread("signals", move || {
        termination.wait();
        let _ = signalled.shutdown(Shutdown::Write);
    })?;
    let (mut shown, mut missed) = (0, 0);
    loop {
        let line: TraceLine = client.next()?;
        match &line {
            TraceLine::Packet(_) if trace.count == Some(shown) => continue,
            TraceLine::Packet(packet) => {
                shown += 1;
                let text = if trace.output.json { json(&line)? } else { packet_text(packet, &mut missed) };
                if !write_more(&text)? {
                    return Ok(());
                }
                if trace.count == Some(shown) {
                    leave.shutdown(Shutdown::Write)?;
                }
            }
            TraceLine::Drawn(_) => {}
            TraceLine::End { matched, missed } => {
                if trace.output.json {
                    write_more(&json(&line)?)?;
                }
                log::note(format_args!(
                    "{matched} packets matched, {missed} of them were more than is shown at once (--rate)"
                ));
                return Ok(());
            }
        }
    }
}

/// What to ask for.
fn wanted(trace: &cli::Trace) -> Result<Wanted> {
    let reason = trace.reason.as_deref().map(known).transpose()?;
    let expression = trace.filter.join(" ");
    let filter = match expression.is_empty() {
        true => None,
        false => Some(expression::compile(&expression)?),
    };
    if let Some(code) = &filter {
        expression::filter(code.clone())?;
    }
    Ok(Wanted { filter, exceptions: trace.exceptions, reason, rate: trace.rate, one_in: None })
}

/// The name of a reason, if it is one.
fn known(name: &str) -> Result<String> {
    let names: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
    match names.contains(&name) {
        true => Ok(name.into()),
        false => bail!("{name:?} is no reason{}; `towpath show exceptions` has all", suggestion(&names, name)),
    }
}

fn json(line: &TraceLine) -> Result<String> {
    Ok(serde_json::to_string(line)? + "\n")
}

fn packet_text(packet: &TracedPacket, missed: &mut u64) -> String {
    let gap = match packet.missed - (*missed).min(packet.missed) {
        0 => String::new(),
        more => format!("({more} packets more than are shown at once)\n"),
    };
    *missed = packet.missed;
    let what = packet.packet.as_deref().unwrap_or("no IP packet");
    let head = format!("{} {} {what}, {} bytes\n", time(packet.time_ns), packet.port, packet.length);
    let verdict = verdict_text(&packet.explanation.verdict);
    let became = match (&packet.became, packet.agrees) {
        (_, true) => format!("=> {verdict}"),
        (Became::Fast { port }, false) => format!("=> fast path: out {port}; by the tables as they are now: {verdict}"),
        (Became::Linux { reason, text }, false) => {
            format!("=> Linux: {reason}: {text}; by the tables as they are now: {verdict}")
        }
    };
    let rest = format!("{}{became}\n", steps_text(&packet.explanation.steps));
    let indented: String = rest.lines().map(|line| format!("  {line}\n")).collect();
    format!("{gap}{head}{indented}")
}

/// Time of the day (UTC).
fn time(since_1970_ns: u64) -> String {
    let (seconds, micros) = (since_1970_ns / 1_000_000_000 % 86_400, since_1970_ns / 1000 % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_of_the_day() {
        assert_eq!(time(0), "00:00:00.000000Z");
        assert_eq!(time((86_400 + 3600 * 23 + 59 * 60 + 7) * 1_000_000_000 + 1_234_999), "23:59:07.001234Z");
    }

    #[test]
    fn reasons_have_names() {
        assert_eq!(known("no-route").unwrap(), "no-route");
        let message = known("no-ruote").unwrap_err().to_string();
        assert!(message.contains("no-ruote") && message.contains("no-route"), "{message}");
    }
}
