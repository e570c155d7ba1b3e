//! Answers to the read commands, from what FPM, the tables and the engine know.

use crate::control::{self, Arrival, Packet, Request};
use crate::daemon::Daemon;
use crate::explain::{self, Ingress, Names, mac};
use crate::log;
use crate::report::{self, Families, Forwarding};
use crate::wires::Wire;
use crate::words;
use crate::workers::Workers;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Bound;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use towpath_engine::{Mode, Notice, TransmitSupport};
use towpath_fpc::{NeighbourKey, Policy, Port, PortKind, Prefix, Route, Tunnel, Via};
use towpath_fpm::PortState;
use towpath_pipeline::mapped::Mapped;
use towpath_pipeline::{Entry, SlotSet, accepts, roots};
use towpath_tables::Reason;
use towpath_tables::flows::{self, FlowStates, FlowView};
use towpath_tables::mappings;
use towpath_tables::nexthop::{Action, NexthopIdentity, NexthopValue};
use towpath_tables::record::Family;

/// Routes in one answer, so that it takes a few milliseconds.
const PAGE: usize = 1000;
/// Places in the table of connections that are looked at for one answer.
const FLOW_PAGE: u32 = 1024;
/// What is known of the daemon itself.
pub struct Facts {
    mode: Mode,
    /// Nothing is forwarded
    pub shadow: bool,
    since: u64,
    began: Instant,
    /// The tables were taken over from an earlier daemon
    pub adopted: bool,
    /// What Linux says comes from another host
    pub remote: bool,
    notices: Vec<String>,
}

impl Facts {
    /// Of a daemon that starts now.
    pub fn new(mode: Mode, shadow: bool) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Self { mode, shadow, since, began: Instant::now(), adopted: false, remote: false, notices: Vec::new() }
    }

    /// Whether frames can be redirected to a port. In generic mode the stack sends them, by any device.
    pub fn can_transmit(&self, ifindex: u32) -> towpath_engine::Result<TransmitSupport> {
        match self.mode {
            Mode::Native => towpath_engine::can_transmit(ifindex),
            Mode::Generic => Ok(TransmitSupport::Full),
        }
    }

    /// Whether frames that come in by a port have no mark. In the driver there is none yet; in the stack a frame has what it
    /// got before it was redirected there.
    pub fn is_unmarked(&self) -> bool {
        self.mode == Mode::Native
    }

    /// Tells the user, now and whenever the status is asked for.
    pub fn notice(&mut self, notice: &Notice) {
        let undo = notice.undo.as_ref().map_or(String::new(), |undo| format!(" (undo: {undo})"));
        let text = format!("{}: {}{undo}", notice.port, notice.text);
        log::note(format_args!("note: {text}"));
        self.notices.push(text);
    }
}

/// Packets that came in by a port from one address.
struct Arrived<'t> {
    source: IpAddr,
    /// What they are looked up in
    root: u32,
    entry: Entry<'t>,
    tables: Mapped<'t>,
}

impl Arrived<'_> {
    /// Why those to an address are refused that would leave by the port in a slot.
    fn refused(&self, destination: IpAddr, out: u32) -> Option<Reason> {
        let (IpAddr::V4(source), IpAddr::V4(destination)) = (self.source, destination) else { return None };
        accepts(&self.tables, &self.entry, [source.octets(), destination.octets()], out).err()
    }
}

impl Daemon {
    /// The line that answers a request.
    pub fn answer(&self, request: Request) -> String {
        match request {
            Request::Status => control::answer(self.status()),
            Request::Ports => control::answer(Ok(report::Ports { ports: self.ports() })),
            Request::Routes { within, after } => control::answer(self.routes(within.as_deref(), after.as_deref())),
            Request::Neighbors => control::answer(Ok(self.neighbors())),
            Request::Nexthops => control::answer(Ok(self.nexthops())),
            Request::Exceptions => control::answer(self.exceptions()),
            Request::Stats => control::answer(Ok(self.stats())),
            Request::Flows { after } => control::answer(Ok(self.flows_page(after))),
            Request::Explain(packet) => control::answer(self.explain(&packet)),
            Request::NatList => control::answer(Ok(self.mappings())),
            Request::FilterList { after } => control::answer(Ok(self.filters_page(after))),
            Request::NatAdd(_) | Request::NatDel(_) | Request::FilterChange(_) | Request::Trace(_) => {
                control::answer::<()>(Err(anyhow::anyhow!("not now")))
            }
            Request::Destinations { addresses, arrival } => control::answer(self.destinations(&addresses, arrival)),
            Request::Stop | Request::Leave => control::answer(Ok(true)),
        }
    }

    /// The tables hold all that Linux has told.
    fn is_in_sync(&self) -> bool {
        self.fpm.is_complete() && self.resyncing.is_empty()
    }

    /// How the daemon is, in a line.
    pub fn status_line(&self) -> String {
        let sync = if self.is_in_sync() { "in sync" } else { "NOT in sync" };
        format!("{}, {sync} with Linux", self.extent())
    }

    /// How much there is.
    pub fn extent(&self) -> String {
        let (ports, routes) = (self.wanted.indices().len(), self.route_counts());
        let shadow = if self.facts.shadow { " (shadow: nothing is forwarded)" } else { "" };
        format!("{ports} ports, {} routes{shadow}", routes.ipv4 + routes.ipv6)
    }

    fn status(&self) -> Result<report::Status> {
        let tables = self.fpm.tables().usage();
        let table = |usage: &towpath_tables::writer::TableUsage| report::Table {
            name: usage.table.name().into(),
            used: usage.used as u64,
            capacity: usage.elements as u64,
            memory_bytes: usage.bytes as u64,
        };
        let program = self.engine.program()?;
        Ok(report::Status {
            engine: if self.workers.is_some() { "user" } else { "xdp" }.into(),
            pid: std::process::id(),
            namespace: self.instance.inode,
            since: self.facts.since,
            up_seconds: self.facts.began.elapsed().as_secs(),
            adopted: self.facts.adopted,
            remote: self.facts.remote,
            shadow: self.facts.shadow,
            in_sync: self.is_in_sync(),
            resyncs: self.resyncs,
            resyncs_by_cause: self.causes.report(),
            ports: self.ports(),
            policies: self
                .fpm
                .policies()
                .map(|policy| words::policy(policy, self.fpm.is_filtered(policy), |ifindex| self.interface(ifindex)))
                .collect(),
            routes: self.route_counts(),
            memory_bytes: self.engine.memory()?.iter().map(|(_, bytes)| bytes).sum(),
            tables: tables.iter().map(table).collect(),
            program: Some(report::Program {
                id: program.id,
                verified_instructions: (program.verified_instructions != 0).then_some(program.verified_instructions),
            }),
            workers: self
                .workers
                .iter()
                .flat_map(|workers| workers.report(|ifindex| self.interface(ifindex)))
                .collect(),
            fptun: self.entered()?,
            flows: self.flow_summary(),
            filters: self.fpm.traffic_filters().len() as u64,
            notices: self.notices(),
        })
    }

    fn entered(&self) -> Result<Vec<report::Entered>> {
        self.workers.as_ref().map_or_else(|| Ok(Vec::new()), Workers::entered)
    }

    fn notices(&self) -> Vec<String> {
        let cannot = self.cannot_transmit.iter();
        let cannot = cannot.map(|(i, why)| format!("what leaves by {} goes to Linux: {why}", self.interface(*i)));
        let full = self.fpm.full().map(|full| words::shortage(full, self.fpm.waiting()));
        let flows = self.fpm.refused_flows().full.then(|| self.full_flows());
        self.facts
            .notices
            .iter()
            .cloned()
            .chain(cannot)
            .chain(full)
            .chain(self.captures.notice())
            .chain(self.filter_notice())
            .chain(flows)
            .collect()
    }

    fn flow_summary(&self) -> report::FlowSummary {
        let FlowStates { fast, waiting, closed } = self.fpm.tables().flow_states(self.fpm.passes());
        let wanted = self.flows.wanted;
        report::FlowSummary {
            mode: wanted.mode.map(|mode| mode.to_string()),
            gate: words::gate(self.fpm.flow_phase()).into(),
            fast,
            waiting,
            closing: closed,
            refused: self.fpm.refused_flows().total,
            capacity: wanted.room.into(),
        }
    }

    fn flows_page(&self, after: Option<u32>) -> report::Flows {
        let (view, first) = (self.fpm.tables().view(), after.unwrap_or(0));
        let mut names: HashMap<u32, String> =
            self.fpm.ports().map(|state| (state.slot, state.port.name.clone())).collect();
        let vrf = |(number, ifindex)| Some((number, self.interface_by_index(ifindex)?.name.clone()));
        names.extend(self.fpm.vrfs().filter_map(vrf));
        let name = |slot: u32| names.get(&slot).cloned();
        let passes = self.fpm.passes();
        let direction = |flow: &FlowView, which: usize| {
            let tuple = [flow.connection.original, flow.connection.reply][which];
            let way = flow.accepted[which].filter(|way| !flow.closed && passes(Family::of(tuple.source), *way));
            let state = match (flow.closed, way) {
                (true, _) => "closing",
                (false, Some(_)) => "fast",
                (false, None) => "waiting",
            };
            report::FlowDirection {
                source: tuple.source.to_string(),
                source_port: tuple.source_port,
                destination: tuple.destination.to_string(),
                destination_port: tuple.destination_port,
                state: state.into(),
                packets: flow.totals.packets[which],
                bytes: flow.totals.bytes[which],
                r#in: way.and_then(|(from, _)| name(from)),
                out: way.and_then(|(_, to)| name(to)),
            }
        };
        let last = self.fpm.tables().flow_records().len() as u32;
        let end = first.saturating_add(FLOW_PAGE).min(last);
        let flow = |flow: FlowView| report::Flow {
            protocol: words::transport(flow.connection.original.protocol),
            original: direction(&flow, 0),
            reply: direction(&flow, 1),
        };
        let flows = flows::views_in(&view, first..end).map(flow).collect();
        report::Flows { flows, next: (end < last).then_some(end) }
    }

    /// Routes known, by family.
    pub fn route_counts(&self) -> Families {
        let count = |family| self.fpm.route_count(family) as u64;
        Families { ipv4: count(Family::V4), ipv6: count(Family::V6) }
    }

    /// The ports asked for, present or not, then VLAN sub-interfaces of them.
    fn ports(&self) -> Vec<report::Port> {
        let states: Vec<PortState> = self.fpm.ports().collect();
        let find = |ifindex: u32| states.iter().find(|state| state.port.ifindex == ifindex);
        let mut ports: Vec<_> = self
            .wanted
            .iter()
            .map(|(name, ifindex)| match ifindex.and_then(find) {
                Some(state) => self.port(state),
                None => absent(name, ifindex),
            })
            .collect();
        let asked = self.wanted.indices();
        ports.extend(states.iter().filter(|state| !asked.contains(&state.port.ifindex)).map(|state| self.port(state)));
        ports
    }

    fn port(&self, state: &PortState) -> report::Port {
        let port = state.port;
        let driver = towpath_engine::Interface::query(port.ifindex).map(|interface| interface.driver);
        let served = self.engine.port(port.ifindex);
        let mode = match port.kind {
            PortKind::Vlan { .. } => "vlan",
            PortKind::Tunnel(_) => "tunnel",
            _ if self.workers.as_ref().is_some_and(|workers| workers.serves(port.ifindex)) => "user",
            _ => served.and_then(|served| served.mode).unwrap_or("none"),
        };
        let why_not = why_not(port, state.ready).or_else(|| (mode == "none").then(|| "without the program".into()));
        report::Port {
            name: port.name.clone(),
            ifindex: Some(port.ifindex),
            mode: mode.into(),
            driver: driver.ok(),
            served_by: self.served_by(port.ifindex, mode),
            ready: why_not.is_none(),
            why_not,
            mac: port.mac.map(|bytes: [u8; 6]| mac(Some(bytes.as_slice()))),
            mtu: Some(port.mtu),
            promiscuous: Some(served.map_or(port.promiscuous, |served| served.promiscuous)),
            forwarding: Some(Forwarding { ipv4: port.family[0].forwarding, ipv6: port.family[1].forwarding }),
            vrf: port.vrf.as_ref().map(|vrf| report::Vrf { name: vrf.name.clone(), table: vrf.table }),
        }
    }

    /// By what the frames of a port come and go.
    fn served_by(&self, ifindex: u32, mode: &str) -> Option<String> {
        match mode {
            "user" => Some(self.wanted.wire(ifindex).map_or_else(|| "af_xdp".into(), Wire::to_string)),
            "native" | "generic" => Some("xdp".into()),
            _ => None,
        }
    }

    fn routes(&self, within: Option<&str>, after: Option<&str>) -> Result<report::Routes> {
        if let Some(text) = within.filter(|text| !text.contains('/')) {
            let address: IpAddr = text.parse().with_context(|| format!("{text:?} is no address and no prefix"))?;
            let prefixes = self.fpm.explain(address).prefixes;
            let routes = prefixes.iter().flat_map(|matched| &matched.routes).map(|route| self.route_row(route));
            return Ok(report::Routes { routes: routes.collect(), next: None });
        }
        let [within, after] = [within, after].map(|text| text.map(parse_prefix).transpose());
        let (mut routes, mut next) = (Vec::new(), None);
        for prefix in self.prefixes(within?, after?) {
            if routes.len() >= PAGE {
                next = routes.last().map(|last: &report::Route| last.prefix.clone());
                break;
            }
            routes.extend(self.fpm.routes_for(prefix).iter().map(|route| self.route_row(route)));
        }
        Ok(report::Routes { routes, next })
    }

    /// Prefixes with routes, all or those within one, behind `after` if that is given.
    fn prefixes(&self, within: Option<Prefix>, after: Option<Prefix>) -> impl Iterator<Item = Prefix> {
        let family = |prefix: Prefix| prefix.family();
        let only = within.map(family);
        let begun = after.map(family);
        let families = Family::ALL.into_iter().filter(move |of| only.is_none_or(|only| only == *of));
        let families = families.skip_while(move |of| begun.is_some_and(|begun| begun != *of));
        let start = move |of| match (after.filter(|after| after.family() == of), within) {
            (Some(after), _) => Bound::Excluded(after),
            (None, Some(within)) => Bound::Included(within),
            (None, None) => Bound::Unbounded,
        };
        // What lies within a prefix lies behind it, side by side.
        let inside = move |prefix: &Prefix| within.is_none_or(|within| contains(&within, prefix));
        families.flat_map(move |of| self.fpm.prefixes(of, start(of))).take_while(inside)
    }

    fn route_row(&self, route: &Route) -> report::Route {
        let (hops, object) = match &route.via {
            Via::Hops(hops) => (hops.as_slice(), None),
            Via::Object(id) => ([].as_slice(), Some(*id)),
        };
        let hop = |hop: &towpath_fpc::Hop| report::Hop {
            port: (hop.ifindex != 0).then(|| self.interface(hop.ifindex)),
            gateway: hop.gateway.map(|gateway| gateway.to_string()),
            weight: hop.weight,
        };
        report::Route {
            prefix: route.key.prefix.to_string(),
            table: route.key.table,
            metric: route.key.priority,
            protocol: words::protocol(route.protocol),
            kind: words::route_kind(route.kind),
            via: hops.iter().map(hop).collect(),
            nexthop_object: object,
            chosen: self.fpm.routes_for(route.key.prefix).first().is_some_and(|first| first.key == route.key),
        }
    }

    fn neighbors(&self) -> report::Neighbors {
        let neighbor = |n: &towpath_fpc::Neighbour| report::Neighbor {
            port: self.interface(n.key.ifindex),
            address: n.key.address.to_string(),
            lladdr: n.lladdr.map(|bytes| mac(Some(bytes.as_slice()))),
            state: words::neighbour_state(n.state),
        };
        report::Neighbors { neighbors: self.fpm.neighbours().map(neighbor).collect() }
    }

    fn nexthops(&self) -> report::Nexthops {
        let mut nexthops: Vec<_> = self
            .fpm
            .nexthops()
            .map(|hop| {
                let (lladdr, reason) = does(hop.value);
                report::Nexthop {
                    index: hop.index,
                    port: (hop.identity.ifindex != 0).then(|| self.interface(hop.identity.ifindex)),
                    gateway: hop.identity.gateway.map(|gateway| gateway.to_string()),
                    lladdr: lladdr.map(|bytes| mac(Some(bytes.as_slice()))),
                    mtu: hop.value.map(|value| value.mtu).filter(|mtu| *mtu != 0),
                    reason: reason.map(|reason| reason.name().into()),
                    hit: hop.hit,
                }
            })
            .collect();
        nexthops.sort_by_key(|hop| hop.index);
        report::Nexthops { nexthops }
    }

    fn destinations(&self, addresses: &[IpAddr], arrival: Option<Arrival>) -> Result<report::Destinations> {
        if addresses.len() > control::DESTINATIONS {
            bail!("{} addresses at once are too many: {} at most", addresses.len(), control::DESTINATIONS);
        }
        let arrived = arrival.map(|arrival| self.arrived(arrival)).transpose()?;
        let way = |address, (identity, value): (NexthopIdentity, Option<NexthopValue>)| {
            let (lladdr, reason) = does(value);
            let NexthopIdentity { ifindex, gateway, .. } = identity;
            let refused = || arrived.as_ref()?.refused(address, self.slot(ifindex)?);
            report::Way { ifindex, gateway, lladdr, reason: reason.or_else(refused).map(|reason| reason.name().into()) }
        };
        let leads_to = |address| match &arrived {
            Some(arrived) => self.fpm.leads_to_by(arrived.root, address),
            None => self.fpm.leads_to(address),
        };
        let ways = |address: &IpAddr| match leads_to(*address) {
            Ok(ways) => ways.into_iter().map(|hop| way(*address, hop)).collect(),
            Err(reason) => vec![report::Way { reason: Some(reason.name().into()), ..report::Way::default() }],
        };
        Ok(report::Destinations { destinations: addresses.iter().map(ways).collect() })
    }

    /// Packets that come in by a port from an address.
    fn arrived(&self, Arrival { ifindex, source }: Arrival) -> Result<Arrived<'_>> {
        let view = self.fpm.tables().view();
        let slot = self.slot(ifindex).with_context(|| format!("interface {ifindex} is no port"))?;
        let port = view.ports().get(slot as usize).context("a port without a record")?;
        let family = Family::of(source);
        let tables = Mapped { view, counters: None, transmitters: SlotSet::ALL };
        let root = roots::choose(&tables, port.root[family as usize].load(), || mappings::words(source));
        let root = root.map_err(|reason| anyhow::anyhow!("no root for {source}: {}", reason.text()))?;
        Ok(Arrived { source, root, entry: Entry::new(slot, port), tables })
    }

    fn exceptions(&self) -> Result<report::Exceptions> {
        let mut exceptions: Vec<report::Exception> = Vec::new();
        for state in self.fpm.ports() {
            exceptions.extend(Reason::ALL.iter().zip(state.totals.exceptions).map(|(reason, packets)| {
                report::Exception {
                    port: state.port.name.clone(),
                    reason: reason.name().into(),
                    text: reason.text().into(),
                    packets,
                }
            }));
        }
        exceptions.sort_by_key(|exception| std::cmp::Reverse(exception.packets));
        let fptun = self.entered()?.into_iter().filter(|entered| entered.dropped).collect();
        Ok(report::Exceptions { exceptions, fptun })
    }

    fn stats(&self) -> report::Stats {
        let of = |state: PortState| report::PortStats {
            port: state.port.name.clone(),
            rx_packets: state.totals.rx_packets,
            rx_bytes: state.totals.rx_bytes,
            tx_packets: state.totals.tx_packets,
            tx_bytes: state.totals.tx_bytes,
            exceptions: state.totals.handed_over(),
        };
        report::Stats { shadow: self.facts.shadow, ports: self.fpm.ports().map(of).collect() }
    }

    fn explain(&self, packet: &Packet) -> Result<report::Explanation> {
        if packet.source.is_ipv4() != packet.destination.is_ipv4() {
            bail!("source and destination must be of the same family");
        }
        let (port, because) = match &packet.port {
            Some(name) => (self.port_named(name)?, "as asked".into()),
            None => self.port_towards(packet.source)?,
        };
        // What comes out of a tunnel came in by the port that leads to its other end.
        let (arrival, tunnel) = match port.kind {
            PortKind::Tunnel(tunnel) => (self.port_towards(tunnel.remote)?.0, Some(tunnel)),
            _ => (port, None),
        };
        let (device, tags) = self.underneath(arrival)?;
        let mac = arrival.mac.unwrap_or_default();
        let ingress = Ingress { device, port: port.ifindex, tags, mac, tunnel, because };
        Ok(explain::explain(packet, &ingress, self.fpm.tables().view(), self))
    }

    fn port_named(&self, name: &str) -> Result<&Port> {
        let names: Vec<_> = self.fpm.interfaces().map(|port| (port.name.clone(), port.ifindex)).collect();
        let ifindex = crate::interfaces::index(&names, name)?;
        self.interface_by_index(ifindex).context("the interface has just gone")
    }

    /// The port by which Linux reaches a source, or any if it does not.
    fn port_towards(&self, source: IpAddr) -> Result<(&Port, String)> {
        let explained = self.fpm.explain(source);
        let towards = explained.nexthops.iter().map(|(hop, _)| hop.identity.ifindex).find(|ifindex| *ifindex != 0);
        if let Some(port) = towards.and_then(|ifindex| self.interface_by_index(ifindex)) {
            return Ok((port, format!("by which Linux reaches {source}")));
        }
        let any = self.wanted.indices().into_iter().find_map(|ifindex| self.interface_by_index(ifindex));
        Ok((any.context("there is no port")?, format!("any: Linux has no way back to {source}")))
    }

    /// The interface whose driver receives what comes in by a port, and the tags in front of it.
    fn underneath(&self, port: &Port) -> Result<(u32, Vec<(u16, u16)>)> {
        let (mut port, mut tags) = (port, Vec::new());
        while let PortKind::Vlan { lower, protocol, id } = port.kind {
            tags.insert(0, (protocol, id));
            port = self.interface_by_index(lower).with_context(|| format!("{} has nothing underneath", port.name))?;
            if tags.len() > 2 {
                bail!("more than two VLAN tags are Linux's");
            }
        }
        Ok((port.ifindex, tags))
    }

    fn interface_by_index(&self, ifindex: u32) -> Option<&Port> {
        self.fpm.interfaces().find(|port| port.ifindex == ifindex)
    }
}

/// Where a next hop sends frames, or why it leaves them to Linux; neither if it is a tunnel.
fn does(value: Option<NexthopValue>) -> (Option<[u8; 6]>, Option<Reason>) {
    match value.map(|value| value.action) {
        Some(Action::Forward(header) | Action::Mapped(header)) => (header.bytes().first_chunk().copied(), None),
        Some(Action::Tunnel) => (None, None),
        Some(Action::Exception(reason)) => (None, Some(reason)),
        None => (None, Some(Reason::TableBusy)),
    }
}

impl Daemon {
    /// The prefix of the route that Linux has for a destination, with the route's kind if that is none to other hosts.
    pub fn prefix(&self, destination: IpAddr) -> Option<String> {
        self.deciding_route(destination).as_ref().map(words::prefix)
    }

    fn deciding_route(&self, destination: IpAddr) -> Option<Route> {
        let prefixes = self.fpm.explain(destination).prefixes;
        let deciding = prefixes.iter().find(|matched| matched.decides).or(prefixes.first())?;
        deciding.routes.first().cloned()
    }
}

impl Names for Daemon {
    fn interface(&self, ifindex: u32) -> String {
        self.interface_by_index(ifindex).map_or_else(|| format!("#{ifindex}"), |port| port.name.clone())
    }

    fn route(&self, destination: IpAddr) -> Option<String> {
        let route = &self.deciding_route(destination)?;
        let row = self.route_row(route);
        let hops = row.via.iter().map(|hop| {
            let gateway = hop.gateway.as_ref().map_or(String::new(), |gateway| format!(" via {gateway}"));
            let port = hop.port.as_ref().map_or(String::new(), |port| format!(" dev {port}"));
            format!("{gateway}{port}")
        });
        let hops = hops.collect::<Vec<_>>().join(" or");
        Some(format!("{}{hops}", words::route(route)))
    }

    fn neighbour(&self, ifindex: u32, address: IpAddr) -> Option<String> {
        let key = NeighbourKey { ifindex, address };
        let neighbour = self.fpm.neighbours().find(|neighbour| neighbour.key == key)?;
        let state = words::neighbour_state(neighbour.state);
        Some(match neighbour.lladdr {
            Some(bytes) => format!("{} ({state})", mac(Some(bytes.as_slice()))),
            None => state,
        })
    }

    fn policies(&self) -> Vec<&Policy> {
        self.fpm.policies().filter(|policy| !self.fpm.is_filtered(policy)).collect()
    }

    fn is_about(&self, interface: u32, port: u32) -> bool {
        self.fpm.is_about(interface, port)
    }

    fn filter(&self, number: u32) -> Option<String> {
        self.filter_numbered(number)
    }

    fn filters(&self) -> Vec<&Policy> {
        self.fpm.policies().filter(|policy| self.fpm.is_filtered(policy)).collect()
    }

    fn unsupported(&self, ifindex: u32) -> Option<String> {
        self.interface_by_index(ifindex)?.unsupported.clone()
    }

    fn tunnel(&self, ifindex: u32) -> Option<Tunnel> {
        match self.interface_by_index(ifindex)?.kind {
            PortKind::Tunnel(tunnel) => Some(tunnel),
            _ => None,
        }
    }

    fn cannot_transmit(&self, ifindex: u32) -> Option<String> {
        self.cannot_transmit.get(&ifindex).cloned()
    }

    fn vrf(&self, ifindex: u32) -> Option<String> {
        let vrf = self.interface_by_index(ifindex)?.vrf.as_ref()?;
        Some(format!("the VRF {} (table {})", vrf.name, vrf.table))
    }

    fn why_not(&self, ifindex: u32) -> Option<String> {
        let Some(state) = self.fpm.ports().find(|state| state.port.ifindex == ifindex) else {
            return Some(format!("{} is not served", self.interface(ifindex)));
        };
        why_not(state.port, state.ready).map(|why| format!("{} is {why}", state.port.name))
    }
}

fn absent(name: &str, ifindex: Option<u32>) -> report::Port {
    report::Port {
        name: name.into(),
        ifindex,
        mode: "none".into(),
        driver: None,
        served_by: None,
        ready: false,
        why_not: Some(if ifindex.is_some() { "not in the tables" } else { "no such interface now" }.into()),
        mac: None,
        mtu: None,
        promiscuous: None,
        forwarding: None,
        vrf: None,
    }
}

/// Why packets that come in by a port cannot take the fast path at all.
fn why_not(port: &Port, ready: bool) -> Option<String> {
    let reason = if !port.up {
        "down"
    } else if !port.carrier {
        "without carrier"
    } else if port.master != 0 {
        "enslaved"
    } else if !ready {
        "not served"
    } else if port.family.iter().all(|family| !family.forwarding) {
        "without forwarding in Linux's settings"
    } else {
        return None;
    };
    Some(reason.into())
}

fn parse_prefix(text: &str) -> Result<Prefix> {
    let invalid = || format!("{text:?} is no prefix");
    let (address, length) = text.split_once('/').with_context(invalid)?;
    Prefix::new(address.parse().with_context(invalid)?, length.parse().with_context(invalid)?).with_context(invalid)
}

fn contains(outer: &Prefix, inner: &Prefix) -> bool {
    outer.prefix_len() <= inner.prefix_len() && outer.contains(inner.address())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_contain_longer_ones() {
        let prefix = |text| parse_prefix(text).unwrap();
        assert!(contains(&prefix("192.0.2.0/24"), &prefix("192.0.2.128/25")));
        assert!(contains(&prefix("0.0.0.0/0"), &prefix("192.0.2.128/25")));
        assert!(!contains(&prefix("192.0.2.0/24"), &prefix("192.0.0.0/16")));
        assert!(!contains(&prefix("0.0.0.0/0"), &prefix("2001:db8::/32")));
        assert!(parse_prefix("192.0.2.0/33").is_err() && parse_prefix("x/1").is_err());
    }
}
