//! `towpath doctor`: what the fast path depends on, with or without a running instance. Linux is asked anew, by the same
//! code that `towpath up` goes by, and nothing is changed.

mod checks;
mod machine;
mod port;
mod settings;

use crate::cli;
use crate::control::{Client, Request};
use crate::filter;
use crate::instance::Instance;
use crate::interfaces;
use crate::ports::unservable;
use crate::read::{json, write_out};
use crate::report::{self, Doctor, Finding, State};
use crate::text::table;
use anyhow::{Result, bail};
use checks::{Check, finding};
use towpath_cm::{PortIndex, survey};
use towpath_fpc::Port;

/// Looks, prints, and fails if something stops the fast path.
pub fn run(wanted: &cli::Doctor) -> Result<()> {
    let status = running()?;
    let doctor = examine(&wanted.ports, status.as_ref())?;
    write_out(&if wanted.output.json { json(&doctor)? } else { text(&doctor) })?;
    if doctor.stopped {
        bail!("something stops the fast path");
    }
    Ok(())
}

/// How the instance of this namespace is doing, if one runs.
fn running() -> Result<Option<report::Status>> {
    let client = Client::connect(&Instance::current()?.control_socket())?;
    client.map(|mut client| client.ask(&Request::Status)).transpose()
}

fn examine(named: &[String], status: Option<&report::Status>) -> Result<Doctor> {
    let flows = status.and_then(|status| status.flows.mode.as_ref()?.parse().ok()).unwrap_or_default();
    let interfaces = interfaces::all()?;
    named.iter().try_for_each(|name| interfaces::index(&interfaces, name).map(drop))?;
    let mut findings = machine::look()?;
    let all = survey::ports()?;
    let served: Vec<String> = status.map(served).unwrap_or_default();
    let asked = if named.is_empty() { &served } else { named };
    let ports = ports(&all, asked);
    findings.extend(none(&ports));
    findings.extend(status.and_then(shadow));
    findings.extend(status.map(filters).transpose()?.flatten());
    findings.extend(ports.iter().flat_map(|port| port::look(port)));
    let wires = status.is_some_and(|status| status.ports.iter().any(has_wire));
    findings.extend(self::settings(settings::Look { all: &all, ports: &ports, flows, wires }));
    findings.extend(machine::user_engine());
    let ports: Vec<_> = ports.iter().map(|port| port.name.clone()).collect();
    let stopped = stopped(&findings, &ports, !asked.is_empty());
    let pid = status.map(|status| status.pid);
    Ok(Doctor { kernel: towpath_engine::release(), pid, flows: flows.to_string(), ports, stopped, findings })
}

/// Ports that an instance serves by their own drivers.
fn served(status: &report::Status) -> Vec<String> {
    devices(status).filter(|port| !has_wire(port)).map(|port| port.name.clone()).collect()
}

/// Ports that frames come in by, of which others may be part.
fn devices(status: &report::Status) -> impl Iterator<Item = &report::Port> {
    let of_others = |port: &report::Port| ["vlan", "tunnel"].contains(&port.mode.as_str());
    status.ports.iter().filter(move |port| port.ifindex.is_some() && !of_others(port))
}

/// Whether workers take its frames from a wire, past all XDP programs.
fn has_wire(port: &report::Port) -> bool {
    port.served_by.as_ref().is_some_and(|by| by.contains(':'))
}

/// Those of these names, or every one that could be served.
fn ports<'a>(all: &'a PortIndex, names: &[String]) -> Vec<&'a Port> {
    match names {
        [] => all.iter().filter(|port| unservable(port.kind).is_none() && port.master == 0).collect(),
        names => names.iter().filter_map(|name| all.by_name(name)).collect(),
    }
}

/// Of the instance that runs.
fn filters(status: &report::Status) -> Result<Option<Finding>> {
    let in_force = filter::all()?.len();
    let wired = devices(status).filter(|port| has_wire(port));
    let wired = wired.map(|port| format!("{} ({})", port.name, port.served_by.as_deref().unwrap_or_default()));
    let run = [("by XDP", served(status)), ("by workers", wired.collect())];
    let run = run.iter().filter(|(_, on)| !on.is_empty()).map(|(by, on)| format!(", run {by} on {}", on.join(" ")));
    let found = format!("{in_force} in force{}", run.collect::<String>());
    let finding = finding(Check::Filters, "settings", State::Slower, found);
    Ok((in_force > 0).then(|| finding.with("towpath filter list")))
}

fn shadow(status: &report::Status) -> Option<Finding> {
    let finding = finding(Check::Shadow, "settings", State::Slower, "nothing is forwarded");
    let again = format!("towpath down && towpath up {}", served(status).join(" "));
    status.shadow.then(|| finding.with(again))
}

fn none(ports: &[&Port]) -> Option<Finding> {
    let found = "no interface could be one";
    ports.is_empty().then(|| finding(Check::Ports, "settings", State::Stops, found).with("ip -d link"))
}

fn settings(look: settings::Look<'_>) -> Vec<Finding> {
    look.findings()
        .unwrap_or_else(|error| vec![finding(Check::Policy, "settings", State::Unknown, format!("{error:#}"))])
}

/// Whether something stops the fast path: at any port, if these are to be served, or else at every one.
fn stopped(findings: &[Finding], ports: &[String], all: bool) -> bool {
    let stops = |finding: &&Finding| finding.state == State::Stops;
    let at = |port: &String| findings.iter().filter(stops).any(|finding| finding.about == *port);
    let elsewhere = findings.iter().filter(stops).any(|finding| !ports.contains(&finding.about));
    elsewhere || if all { ports.iter().any(at) } else { ports.iter().all(at) }
}

fn text(doctor: &Doctor) -> String {
    let instance = doctor.pid.map_or_else(|| "no towpath runs here".into(), |pid| format!("towpath runs, pid {pid}"));
    let ports = doctor.ports.join(" ");
    let mut text =
        format!("kernel {}; {instance}; connections by --flows {}; ports: {ports}\n", doctor.kernel, doctor.flows);
    let row = |finding: &Finding| {
        let Finding { about, check, found, .. } = finding;
        vec![word(finding.state).into(), about.clone(), check.clone(), found.clone()]
    };
    text += &table(&["state", "about", "what", "found"], &doctor.findings.iter().map(row).collect::<Vec<_>>());
    for Finding { about, check, effect, remedy, .. } in doctor.findings.iter().filter(|f| f.state != State::Well) {
        text += &format!("\n{about}, {check}: {effect}\n");
        text += &remedy.as_ref().map_or_else(String::new, |remedy| format!("    {remedy}\n"));
    }
    text
}

fn word(state: State) -> &'static str {
    match state {
        State::Well => "well",
        State::Unknown => "unknown",
        State::Slower => "slower",
        State::Stops => "STOPS",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_were_not_asked_for_stop_the_fast_path_only_together() {
        let of = |about, state| finding(Check::PortState, about, state, "");
        let ports = ["a".to_owned(), "b".to_owned()];
        let one = [of("a", State::Stops), of("b", State::Slower)];
        assert!(stopped(&one, &ports, true) && !stopped(&one, &ports, false));
        assert!(stopped(&[of("a", State::Stops), of("b", State::Stops)], &ports, false));
        assert!(stopped(&[of("settings", State::Stops)], &ports, false));
        assert!(!stopped(&[of("settings", State::Slower), of("b", State::Unknown)], &ports, true));
    }
}
