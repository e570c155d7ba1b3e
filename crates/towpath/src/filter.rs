//! `towpath filter`: what the operator has dropped where it comes in, before anything else sees it. Kept by FPM in the tables.

use crate::cli::Output;
use crate::control::{self, Request};
use crate::daemon::Daemon;
use crate::explain::Names;
use crate::nat::plain_prefix;
use crate::read;
use crate::report;
use crate::text::{or_dash, table};
use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use towpath_fpm::{Fault, FilterChange};
use towpath_tables::filters::{self, Action, Block, Decision, FilterValue, Packet};

/// Filters of a list at once.
const PAGE: usize = 4096;

/// `towpath filter`
#[derive(Subcommand)]
pub enum Filter {
    /// Change the filters by one
    #[command(flatten)]
    Change(Change),
    /// Make many changes at once, all or none: a line for each, `add …`, `del …` or `flush` as on the command line
    Apply {
        /// Where the lines are; - for standard input
        file: PathBuf,
        /// Even if it cuts off the session that the command is run in
        #[arg(long)]
        force: bool,
    },
    /// Show the filters, and what each has dropped or passed
    List(Output),
}

/// A change of the filters
#[derive(Subcommand, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Drop what comes from a prefix, or only such of it as is said
    ///
    /// Of the filters that match a packet the one with the longest source prefix decides, then the one with the longest
    /// destination prefix, then the one that asks for more. A filter that asks for ports matches no fragment but the first,
    /// since the others do not tell theirs. tcpdump on the port does not see what is dropped.
    Add(Rule),
    /// End a filter
    Del(Rule),
    /// End all filters
    Flush,
}

/// What a filter asks for
#[derive(Args, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rule {
    /// Only what comes in by this port, in VLANs too
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Source address or prefix; 0.0.0.0/0 or ::/0 for any
    #[arg(long, value_name = "PREFIX")]
    pub from: String,
    /// Destination address or prefix
    #[arg(long, value_name = "PREFIX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// tcp, udp, icmp (ICMPv6 for IPv6), sctp, dccp, udplite, gre, esp, or a number
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Source port
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sport: Option<u16>,
    /// Destination port
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dport: Option<u16>,
    /// Let it pass, in spite of a filter with a shorter prefix: it goes on as without filters
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pass: bool,
    /// Even if it cuts off the session that the command is run in
    #[arg(long)]
    #[serde(skip)]
    pub force: bool,
}

/// Changes to be made, all or none.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Changes {
    changes: Vec<Change>,
    /// A session that is not to be cut off
    session: Option<Session>,
}

/// The TCP connection by which somebody is logged in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Session {
    client: (IpAddr, u16),
    server: (IpAddr, u16),
}

/// A line of a file of changes
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    change: Change,
}

/// Names of protocols, and their numbers.
const PROTOCOLS: [(&str, u8); 8] =
    [("tcp", 6), ("udp", 17), ("sctp", 132), ("dccp", 33), ("udplite", 136), ("gre", 47), ("esp", 50), ("ospf", 89)];
/// Those that begin with ports
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
/// Headers of IPv6 that others follow
const EXTENSIONS: [u8; 4] = [0, 43, 44, 60];

/// `towpath filter …`
pub fn run(filter: &Filter) -> Result<()> {
    match filter {
        Filter::Change(change) => {
            let force = matches!(change, Change::Add(rule) | Change::Del(rule) if rule.force);
            ask(vec![change.clone()], force)
        }
        Filter::Apply { file, force } => ask(changes(&text_of(file)?)?, *force),
        Filter::List(output) => list(*output),
    }
}

fn ask(changes: Vec<Change>, force: bool) -> Result<()> {
    let session = if force { None } else { Session::current() };
    let _: bool = read::connect()?.ask(&Request::FilterChange(Changes { changes, session }))?;
    Ok(())
}

fn text_of(file: &Path) -> Result<String> {
    if file != Path::new("-") {
        return std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read the standard input")?;
    Ok(text)
}

/// The changes that lines say.
fn changes(text: &str) -> Result<Vec<Change>> {
    let mut command = Line::command();
    let mut changes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default();
        if line.trim().is_empty() {
            continue;
        }
        let matches = command.try_get_matches_from_mut(line.split_whitespace());
        let change = matches.and_then(|matches| Line::from_arg_matches(&matches)).map(|line| line.change);
        let change = change.map_err(|error| {
            let text = error.to_string();
            // Usage and hints come behind an empty line.
            let fault: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            anyhow::anyhow!("line {number}: {}", fault.join(" ").trim_start_matches("error: "))
        })?;
        if let Change::Add(rule) | Change::Del(rule) = &change {
            rule.value(0).with_context(|| format!("line {number}"))?;
        }
        changes.push(change);
    }
    Ok(changes)
}

/// All that are in force.
pub fn all() -> Result<Vec<report::Filter>> {
    let ask = |after| Request::FilterList { after };
    read::all_pages(ask, |page: report::Filters| (page.filters, page.next))
}

fn list(output: Output) -> Result<()> {
    let all = report::Filters { filters: all()?, next: None };
    read::write_out(&if output.json { read::json(&all)? } else { text(&all) })
}

fn text(filters: &report::Filters) -> String {
    let row = |filter: &report::Filter| {
        let port = |port: Option<u16>| or_dash(&port.map(|port| port.to_string()));
        vec![
            filter.action.clone(),
            filter.from.clone(),
            or_dash(&filter.to),
            or_dash(&filter.protocol),
            port(filter.sport),
            port(filter.dport),
            or_dash(&filter.port),
            filter.packets.to_string(),
            filter.bytes.to_string(),
        ]
    };
    let heads = ["action", "from", "to", "protocol", "sport", "dport", "port", ">packets", ">bytes"];
    table(&heads, &filters.filters.iter().map(row).collect::<Vec<_>>())
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(rule) => write!(f, "add {rule}"),
            Self::Del(rule) => write!(f, "del {rule}"),
            Self::Flush => f.write_str("flush"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--from {}", self.from)?;
        self.to.iter().try_for_each(|to| write!(f, " --to {to}"))?;
        self.protocol.iter().try_for_each(|protocol| write!(f, " --protocol {protocol}"))?;
        self.sport.iter().try_for_each(|port| write!(f, " --sport {port}"))?;
        self.dport.iter().try_for_each(|port| write!(f, " --dport {port}"))?;
        self.port.iter().try_for_each(|port| write!(f, " --port {port}"))?;
        f.write_str(if self.pass { " --pass" } else { "" })
    }
}

impl Rule {
    /// The filter, of the interface with this index (0: of any).
    fn value(&self, ifindex: u32) -> Result<FilterValue> {
        let source = block(&self.from)?;
        let destination = self.to.as_deref().map(block).transpose()?;
        if let Some(to) = destination.filter(|to| to.first.is_ipv4() != source.first.is_ipv4()) {
            bail!("{} and {}/{} are of two families", self.from, to.first, to.len);
        }
        let protocol = self.protocol.as_deref().map(|name| protocol(name, source.first.is_ipv4())).transpose()?;
        let ports = [self.sport, self.dport];
        if ports != [None; 2] && !protocol.is_some_and(|protocol| WITH_PORTS.contains(&protocol)) {
            bail!("--sport and --dport go with a protocol that has ports: --protocol tcp, udp, sctp, dccp or udplite");
        }
        Ok(FilterValue { source, destination: destination.filter(|to| to.len > 0), protocol, ports, ifindex })
    }

    fn action(&self) -> Action {
        if self.pass { Action::Pass } else { Action::Drop }
    }
}

fn block(text: &str) -> Result<Block> {
    plain_prefix(text).map(|prefix| Block { first: prefix.address(), len: prefix.prefix_len() })
}

fn protocol(name: &str, four: bool) -> Result<u8> {
    let known = PROTOCOLS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let number = match name {
        "icmp" if four => Some(1),
        "icmp" | "icmpv6" | "ipv6-icmp" => Some(58),
        _ => known.or_else(|| name.parse().ok()),
    };
    let number = number.with_context(|| format!("{name:?} is no protocol: tcp, udp, icmp, … or a number below 256"))?;
    if !four && EXTENSIONS.contains(&number) {
        bail!("{name} is a header of IPv6 that others follow: filters look at the last one's protocol");
    }
    Ok(number)
}

fn protocol_name(number: u8) -> String {
    let name = match number {
        1 | 58 => Some("icmp"),
        _ => PROTOCOLS.iter().find(|(_, known)| *known == number).map(|(name, _)| *name),
    };
    name.map_or_else(|| number.to_string(), str::to_owned)
}

impl Session {
    /// That of the process, as sshd tells it: address and port of the client, then of the server.
    fn current() -> Option<Self> {
        Self::read(&std::env::var("SSH_CONNECTION").ok()?)
    }

    fn read(text: &str) -> Option<Self> {
        let [client, client_port, server, server_port] = text.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
        let address = |text: &str| text.split('%').next()?.parse().ok();
        Some(Self {
            client: (address(client)?, client_port.parse().ok()?),
            server: (address(server)?, server_port.parse().ok()?),
        })
    }

    /// The filter that would drop its packets.
    fn cut_off_by<'f>(&self, all: &'f filters::Filters) -> Option<&'f FilterValue> {
        let (protocol, ports) = (Some(6), Some([self.client.1, self.server.1]));
        let packet = Packet { source: self.client.0, destination: self.server.0, protocol, ports, ifindex: 0 };
        let (value, decision) = filters::decide(all, &packet)?;
        (decision.action == Action::Drop).then_some(value)
    }
}

impl Daemon {
    /// Changes the filters; it is in force when this returns. The line that answers.
    pub fn change_filters(&mut self, changes: &Changes) -> String {
        control::answer(self.try_change_filters(changes))
    }

    fn try_change_filters(&mut self, Changes { changes, session }: &Changes) -> Result<bool> {
        let wanted = changes.iter().map(|change| self.filter_change(change).with_context(|| change.to_string()));
        let wanted = wanted.collect::<Result<Vec<_>>>()?;
        let explain = |Fault { at, why }: Fault| match at.and_then(|at| changes.get(at)) {
            Some(change) => anyhow::anyhow!("{change}: {why}"),
            None => why.into(),
        };
        if let Some(session) = session {
            let (before, after) = (self.fpm.traffic_filters(), self.fpm.filters_after(&wanted).map_err(explain)?);
            if session.cut_off_by(before).is_none()
                && let Some(value) = session.cut_off_by(&after)
            {
                let (rule, client) = (self.filter_in_words(value, Action::Drop), session.client.0);
                bail!(
                    "{rule} would drop what comes from {client}, from where you are logged in (SSH_CONNECTION): let that pass \
                     first (filter add --from {client} --pass), or say --force"
                );
            }
        }
        self.fpm.change_filters(&wanted).map_err(explain)?;
        Ok(true)
    }

    fn filter_change(&self, change: &Change) -> Result<FilterChange> {
        let value = |rule: &Rule| {
            let named = |name: &String| self.fpm.interfaces().find(|known| known.name == *name);
            let ifindex = match &rule.port {
                None => 0,
                Some(name) => named(name).with_context(|| format!("there is no port {name}"))?.ifindex,
            };
            rule.value(ifindex)
        };
        Ok(match change {
            Change::Add(rule) => FilterChange::Add(value(rule)?, rule.action()),
            Change::Del(rule) => FilterChange::Remove(value(rule)?, rule.action()),
            Change::Flush => FilterChange::Clear,
        })
    }

    /// `towpath filter list`, a page of it
    pub fn filters_page(&self, after: Option<usize>) -> report::Filters {
        let (all, first) = (self.fpm.traffic_filters(), after.unwrap_or(0));
        let filters = all.iter().skip(first).take(PAGE).map(|(value, decision)| self.filter_row(value, *decision));
        let next = first.saturating_add(PAGE);
        report::Filters { filters: filters.collect(), next: (next < all.len()).then_some(next) }
    }

    fn filter_row(&self, value: &FilterValue, decision: Decision) -> report::Filter {
        let totals = self.fpm.filter_totals(decision);
        let rule = self.rule(value, decision.action);
        report::Filter {
            port: rule.port,
            action: if rule.pass { "pass" } else { "drop" }.into(),
            from: rule.from,
            to: rule.to,
            protocol: rule.protocol,
            sport: rule.sport,
            dport: rule.dport,
            packets: totals.packets,
            bytes: totals.bytes,
        }
    }

    fn rule(&self, value: &FilterValue, action: Action) -> Rule {
        let prefix = |block: Block| format!("{}/{}", block.first, block.len);
        Rule {
            port: (value.ifindex != 0).then(|| self.interface(value.ifindex)),
            from: prefix(value.source),
            to: value.destination.map(prefix),
            protocol: value.protocol.map(protocol_name),
            sport: value.ports[0],
            dport: value.ports[1],
            pass: action == Action::Pass,
            force: false,
        }
    }

    fn filter_in_words(&self, value: &FilterValue, action: Action) -> String {
        self.rule(value, action).to_string()
    }

    /// The filter of a number, in words.
    pub fn filter_numbered(&self, number: u32) -> Option<String> {
        let (value, decision) = self.fpm.traffic_filters().iter().find(|(_, decision)| decision.number == number)?;
        Some(self.filter_in_words(value, decision.action))
    }

    /// What the operator should know of filters.
    pub fn filter_notice(&self) -> Option<String> {
        let count = self.fpm.traffic_filters().len();
        let text = "filters of the operator's drop packets before Linux or tcpdump sees them (towpath filter list)";
        (count > 0).then(|| format!("{count} {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Result<Change, String> {
        let mut all = changes(line).map_err(|error| format!("{error:#}"))?;
        assert_eq!(all.len(), 1, "{line}");
        Ok(all.remove(0))
    }

    #[test]
    fn lines_are_changes_and_say_themselves() {
        for line in [
            "add --from 10.0.0.0/8",
            "add --from 10.0.0.0/8 --to 192.0.2.0/24 --protocol udp --sport 53 --dport 9 --port eth0 --pass",
            "del --from 2001:db8::/32 --protocol icmp",
            "flush",
        ] {
            assert_eq!(one(&format!("  {line}  # why")).expect("right").to_string(), line);
        }
        assert_eq!(changes("\n# nothing\n").expect("right"), []);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (line, why) in [
            ("add", "--from"),
            ("drop --from 10.0.0.0/8", "drop"),
            ("add --from 10.0.0.1/8", "did you mean 10.0.0.0/8?"),
            ("add --from ten", "no address and no prefix"),
            ("add --from 10.0.0.0/8 --to ::/0", "two families"),
            ("add --from 10.0.0.0/8 --dport 53", "--protocol tcp"),
            ("add --from 10.0.0.0/8 --protocol icmp --dport 53", "--protocol tcp"),
            ("add --from 10.0.0.0/8 --protocol 256", "no protocol"),
            ("add --from 10.0.0.0/8 --protocol udp --dport 65536", "65536"),
            ("add --from ::/0 --protocol 44", "others follow"),
        ] {
            let error = one(&format!("flush\n{line}")).expect_err(line);
            assert!(error.starts_with("line 2") && error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn protocols_have_names() {
        for (name, four, number) in [("icmp", true, 1), ("icmp", false, 58), ("tcp", true, 6), ("200", true, 200)] {
            assert_eq!(protocol(name, four).expect(name), number);
            assert_eq!(protocol_name(number), name);
        }
    }

    #[test]
    fn the_session_is_read_as_sshd_writes_it() {
        let session = Session::read("192.0.2.7 50022 198.51.100.1 22").expect("one");
        assert_eq!((session.client.1, session.server), (50022, ("198.51.100.1".parse().expect("an address"), 22)));
        assert!(Session::read("fe80::1%eth0 1 fe80::2%eth0 22").is_some());
        assert!(Session::read("somewhere").is_none());
    }
}
