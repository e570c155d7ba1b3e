//! The read commands: ask the daemon, print for people or as JSON.

use crate::cli::{Explain, Output, Routes, Show};
use crate::control::{Client, Packet, Request};
use crate::instance::Instance;
use crate::report::{self, Verdict};
use crate::text::{bytes, or_dash, span, table};
use anyhow::{Context, Result, bail};
use serde::{Serialize, de::DeserializeOwned};
use std::io::Write;

/// A connection to the daemon of this namespace.
pub fn connect() -> Result<Client> {
    let instance = Instance::current()?;
    match Client::connect(&instance.control_socket())? {
        Some(client) => Ok(client),
        None => match instance.holder() {
            Some(pid) => bail!("the daemon (pid {pid}) is not ready yet"),
            None => bail!("no towpath runs in this network namespace; start it with `towpath up`"),
        },
    }
}

/// `towpath status`
pub fn status(output: Output) -> Result<()> {
    print(output, &Request::Status, status_text)
}

/// `towpath show …`
pub fn show(what: &Show) -> Result<()> {
    match what {
        Show::Ports(output) => print(*output, &Request::Ports, |it: &report::Ports| ports_text(&it.ports)),
        Show::Routes(routes) => show_routes(routes),
        Show::Neighbors(output) => print(*output, &Request::Neighbors, neighbors_text),
        Show::Nexthops(output) => print(*output, &Request::Nexthops, nexthops_text),
        Show::Exceptions(output) => print(*output, &Request::Exceptions, exceptions_text),
        Show::Stats(output) => print(*output, &Request::Stats, stats_text),
        Show::Flows(output) => show_flows(*output),
    }
}

/// `towpath explain …`
pub fn explain(explain: &Explain) -> Result<()> {
    let port = match explain.ingress.as_slice() {
        [] => None,
        [word, port] if word == "in" => Some(port.clone()),
        _ => unreachable!("checked with the rest of the command line"),
    };
    let packet = Packet {
        source: explain.source,
        destination: explain.destination,
        port,
        protocol: explain.protocol,
        sport: explain.sport,
        dport: explain.dport,
        length: explain.length,
        ttl: explain.ttl,
    };
    print(explain.output, &Request::Explain(packet), explanation_text)
}

fn print<T: Serialize + DeserializeOwned>(output: Output, request: &Request, text: fn(&T) -> String) -> Result<()> {
    let answer: T = connect()?.ask(request)?;
    write_out(&if output.json { json(&answer)? } else { text(&answer) })
}

pub fn json<T: Serialize>(value: &T) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Writes to stdout; a reader that has seen enough (`| head`) is no failure.
pub fn write_out(text: &str) -> Result<()> {
    write_more(text).map(drop)
}

/// The same, at once; false if the reader has seen enough.
pub fn write_more(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("cannot write to stdout"),
    }
}

fn show_routes(wanted: &Routes) -> Result<()> {
    let ask = |after| Request::Routes { within: wanted.within.clone(), after };
    let routes = all_pages(ask, |page: report::Routes| (page.routes, page.next))?;
    let all = report::Routes { routes, next: None };
    write_out(&if wanted.output.json { json(&all)? } else { routes_text(&all) })
}

fn show_flows(output: Output) -> Result<()> {
    let ask = |after| Request::Flows { after };
    let flows = all_pages(ask, |page: report::Flows| (page.flows, page.next))?;
    let all = report::Flows { flows, next: None };
    write_out(&if output.json { json(&all)? } else { flows_text(&all) })
}

/// Long lists come in pages, so that a million lines never hold up the daemon.
pub fn all_pages<Page: DeserializeOwned, T, Next>(
    ask: impl Fn(Option<Next>) -> Request,
    take: impl Fn(Page) -> (Vec<T>, Option<Next>),
) -> Result<Vec<T>> {
    let mut client = connect()?;
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let (items, next) = take(client.ask(&ask(after))?);
        all.extend(items);
        if next.is_none() {
            return Ok(all);
        }
        after = next;
    }
}

fn status_text(status: &report::Status) -> String {
    let sync = if status.in_sync { "in sync with Linux" } else { "NOT in sync with Linux (resync under way)" };
    let adopted = if status.adopted { ", tables taken over from an earlier daemon" } else { "" };
    let shadow = shadow(status.shadow);
    let mut text = format!(
        "{shadow}engine {}, pid {}, network namespace {}, up for {}{adopted}\n{sync}: {} IPv4 and {} IPv6 routes\n",
        status.engine,
        status.pid,
        status.namespace,
        span(status.up_seconds),
        status.routes.ipv4,
        status.routes.ipv6,
    );
    let resyncs: Vec<_> = status.resyncs_by_cause.iter().filter(|resync| resync.count > 0).collect();
    if !resyncs.is_empty() {
        let counts: Vec<_> = resyncs.iter().map(|resync| format!("{} {}", resync.cause, resync.count)).collect();
        text += &format!("read again since the start, by cause: {}\n", counts.join(", "));
    }
    if let Some(program) = &status.program {
        let verified =
            program.verified_instructions.map_or(String::new(), |count| format!(", {count} instructions verified"));
        text += &format!("program id {}{verified}\n", program.id);
    }
    text += &format!("\n{}", ports_text(&status.ports));
    if let Some(flows) = flow_summary(&status.flows) {
        text += &format!("\n{flows}\n");
    }
    if !status.workers.is_empty() {
        text += &format!("\n{}\n{}", workers_text(&status.workers), entered_text(&status.fptun));
    }
    match status.policies.is_empty() {
        true => text += "\nnothing in Linux's settings keeps traffic from the fast path\n",
        false => {
            text += &format!("\nsettings of Linux that send traffic to Linux:\n{}", policies_text(&status.policies))
        }
    }
    text += &format!("\ntables ({}):\n{}", bytes(status.memory_bytes), tables_text(&status.tables));
    for notice in &status.notices {
        text += &format!("\nnote: {notice}\n");
    }
    text
}

/// A line on connections; None if none are taken.
fn flow_summary(flows: &report::FlowSummary) -> Option<String> {
    let mode = flows.mode.as_ref().map_or(String::new(), |mode| format!(" ({mode})"));
    let opening = if flows.gate == "opening" { " (the rules are new)" } else { "" };
    (flows.capacity > 0).then(|| {
        format!(
            "connections{mode}: {} fast, {} waiting for Linux{opening}, {} closing; room for {}, {} times there was none",
            flows.fast, flows.waiting, flows.closing, flows.capacity, flows.refused
        )
    })
}

fn workers_text(workers: &[report::Worker]) -> String {
    let row = |w: &report::Worker| {
        let queues: Vec<_> = w.queues.iter().map(|queue| format!("{}:{}", queue.port, queue.queue)).collect();
        let counts = [w.rx_packets, w.exceptions, w.rx_lost, w.tx_lost, w.exceptions_lost];
        let queues = if queues.is_empty() { "-".into() } else { queues.join(" ") };
        [w.core.to_string(), queues].into_iter().chain(counts.iter().map(u64::to_string)).collect()
    };
    let head = [">core", "queues", ">forwarded", ">to Linux", ">lost on arrival", ">lost on leaving", ">lost to Linux"];
    table(&head, &workers.iter().map(row).collect::<Vec<_>>())
}

fn entered_text(fptun: &[report::Entered]) -> String {
    let row = |entered: &report::Entered| vec![entered.packets.to_string(), entered.text.clone()];
    table(&[">packets", "sent to Linux (FPTUN)"], &fptun.iter().map(row).collect::<Vec<_>>())
}

fn policies_text(policies: &[report::Policy]) -> String {
    let rows: Vec<_> = policies
        .iter()
        .map(|policy| {
            let scope = match &policy.port {
                Some(port) => format!("{} {port}", policy.scope),
                None => policy.scope.clone(),
            };
            let packets = if policy.filtered { "matching" } else { "all" }.to_owned();
            let (family, reason) = (or_dash(&policy.family), policy.reason.clone());
            vec![policy.source.clone(), scope, family, packets, reason, policy.detail.clone()]
        })
        .collect();
    table(&["source", "touches", "family", "packets", "reason", "detail"], &rows)
}

fn tables_text(tables: &[report::Table]) -> String {
    let row =
        |t: &report::Table| vec![t.name.clone(), t.used.to_string(), t.capacity.to_string(), bytes(t.memory_bytes)];
    table(&["table", ">used", ">capacity", ">memory"], &tables.iter().map(row).collect::<Vec<_>>())
}

fn ports_text(ports: &[report::Port]) -> String {
    let rows: Vec<_> = ports
        .iter()
        .map(|port| {
            let state = match &port.why_not {
                None if port.promiscuous == Some(true) => "ready, promiscuous".to_string(),
                None => "ready".to_string(),
                Some(why) => format!("not ready: {why}"),
            };
            let vrf = port.vrf.as_ref().map_or(String::new(), |vrf| format!(", VRF {}", vrf.name));
            let forwarding = port.forwarding.map_or("-", |f| match (f.ipv4, f.ipv6) {
                (true, true) => "IPv4 IPv6",
                (true, false) => "IPv4",
                (false, true) => "IPv6",
                (false, false) => "none",
            });
            vec![
                port.name.clone(),
                or_dash(&port.ifindex),
                port.mode.clone(),
                or_dash(&port.served_by),
                or_dash(&port.driver),
                or_dash(&port.mac),
                or_dash(&port.mtu),
                forwarding.into(),
                state + &vrf,
            ]
        })
        .collect();
    table(&["port", ">index", "mode", "by", "driver", "MAC", ">MTU", "forwards", "state"], &rows)
}

fn routes_text(routes: &report::Routes) -> String {
    let rows: Vec<_> = routes
        .routes
        .iter()
        .map(|route| {
            let hops: Vec<_> = route.via.iter().map(|hop| hop_text(hop, route.via.len() > 1)).collect();
            let via = match (route.nexthop_object, hops.is_empty()) {
                (Some(id), _) => format!("nexthop object {id} {}", hops.join(", ")).trim_end().to_string(),
                (None, true) => "-".into(),
                (None, false) => hops.join(", "),
            };
            let mark = if route.chosen { "*" } else { "" };
            let (table, metric) = (route.table.to_string(), route.metric.to_string());
            vec![mark.into(), route.prefix.clone(), table, metric, route.protocol.clone(), route.kind.clone(), via]
        })
        .collect();
    table(&["", "prefix", ">table", ">metric", "protocol", "kind", "via"], &rows)
}

fn hop_text(hop: &report::Hop, weighted: bool) -> String {
    let mut words = Vec::new();
    words.extend(hop.gateway.clone());
    words.extend(hop.port.as_ref().map(|port| format!("dev {port}")));
    if weighted {
        words.push(format!("weight {}", hop.weight));
    }
    words.join(" ")
}

fn neighbors_text(neighbors: &report::Neighbors) -> String {
    let row = |n: &report::Neighbor| vec![n.port.clone(), n.address.clone(), or_dash(&n.lladdr), n.state.clone()];
    table(&["port", "address", "MAC", "state"], &neighbors.neighbors.iter().map(row).collect::<Vec<_>>())
}

fn nexthops_text(nexthops: &report::Nexthops) -> String {
    let rows: Vec<_> = nexthops
        .nexthops
        .iter()
        .map(|hop| {
            vec![
                hop.index.to_string(),
                or_dash(&hop.port),
                or_dash(&hop.gateway),
                or_dash(&hop.lladdr),
                or_dash(&hop.mtu),
                if hop.hit { "yes" } else { "no" }.into(),
                hop.reason.as_ref().map_or("fast".into(), |reason| format!("to Linux: {reason}")),
            ]
        })
        .collect();
    table(&[">index", "port", "gateway", "MAC", ">MTU", "hit", "path"], &rows)
}

fn exceptions_text(exceptions: &report::Exceptions) -> String {
    let row = |e: &report::Exception| vec![e.port.clone(), e.packets.to_string(), e.reason.clone(), e.text.clone()];
    let counted =
        table(&["port", ">packets", "reason", "meaning"], &exceptions.exceptions.iter().map(row).collect::<Vec<_>>());
    match exceptions.fptun.is_empty() {
        true => counted,
        false => format!("{counted}\n{}", entered_text(&exceptions.fptun)),
    }
}

/// The line that says what counters mean.
fn shadow(on: bool) -> &'static str {
    if on { "SHADOW: nothing is forwarded; what is counted as such would be, and Linux has it all\n" } else { "" }
}

fn stats_text(stats: &report::Stats) -> String {
    let rows: Vec<_> = stats
        .ports
        .iter()
        .map(|p| {
            let counts = [p.rx_packets, p.rx_bytes, p.tx_packets, p.tx_bytes, p.exceptions];
            std::iter::once(p.port.clone()).chain(counts.iter().map(u64::to_string)).collect()
        })
        .collect();
    let heads = ["port", ">rx packets", ">rx bytes", ">tx packets", ">tx bytes", ">exceptions"];
    shadow(stats.shadow).to_owned() + &table(&heads, &rows)
}

fn flows_text(flows: &report::Flows) -> String {
    let direction = |of: &report::FlowDirection, protocol: &str| {
        let end = |address: &str, port: u16| match address.contains(':') {
            true => format!("[{address}]:{port}"),
            false => format!("{address}:{port}"),
        };
        vec![
            protocol.to_owned(),
            end(&of.source, of.source_port),
            end(&of.destination, of.destination_port),
            of.state.clone(),
            or_dash(&of.r#in),
            or_dash(&of.out),
            of.packets.to_string(),
            of.bytes.to_string(),
        ]
    };
    let rows = |flow: &report::Flow| [direction(&flow.original, &flow.protocol), direction(&flow.reply, "")];
    let heads = ["protocol", "from", "to", "state", "in", "out", ">packets", ">bytes"];
    table(&heads, &flows.flows.iter().flat_map(rows).collect::<Vec<_>>())
}

fn explanation_text(explanation: &report::Explanation) -> String {
    format!("{}=> {}\n", steps_text(&explanation.steps), verdict_text(&explanation.verdict))
}

/// A line for each step.
pub fn steps_text(steps: &[report::Step]) -> String {
    let width = steps.iter().map(|step| step.step.chars().count()).max().unwrap_or(0);
    steps.iter().map(|step| format!("{:<width$}  {}\n", step.step, step.found)).collect()
}

/// What becomes of a packet.
pub fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Fast { port, destination, source } => {
            format!("fast path: out {port} to {destination} from {source}")
        }
        Verdict::Dropped { reason, text, detail } => format!("dropped: {reason}: {text}: {}", or_dash(detail)),
        Verdict::Linux { reason, text, detail: Some(detail) } => format!("Linux: {reason}: {text}: {detail}"),
        Verdict::Linux { reason, text, detail: None } => format!("Linux: {reason}: {text}"),
    }
}
