//! Following Linux: messages into the tables, ports that come and go, and what of it is worth a line in the log.

use crate::daemon::{Daemon, Event};
use crate::explain::Names;
use crate::resyncs::Cause;
use crate::source::Peer;
use crate::wires::LARGEST_MTU;
use crate::words;
use crate::workers::Opened;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use towpath_engine::{Changed, Request, TransmitSupport};
use towpath_fpc::codec::Packet;
use towpath_fpc::{Feedback, Message, NeighbourKey, Policy, Port, Snapshot};
use towpath_fpm::{Progress, Transmit};
use towpath_hitflags::{Netlink, Refresh, RefreshError};
use towpath_tables::record::TableId;

/// Batches taken together before the tables are brought in line.
const BATCHES: usize = 8;
/// Work on routes between two looks for alarms.
const SLICE: Duration = Duration::from_millis(5);

impl Daemon {
    /// Takes in a batch and those already waiting behind it, then brings the tables in line.
    pub fn follow(&mut self, messages: Vec<Message>) {
        self.take(messages);
        for _ in 1..BATCHES {
            match self.inbox.try_recv() {
                Ok(Event::Messages(messages)) => self.take(messages),
                Ok(other) => {
                    self.pending = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        self.sync();
        if std::mem::take(&mut self.unmapped) {
            self.follow_mappings();
        }
        self.serve_arrivals();
    }

    /// Tells FPM, and notes which ports are concerned.
    pub fn take(&mut self, messages: Vec<Message>) {
        for message in messages {
            match &message {
                Message::Port(port) if self.running => self.port_described(port),
                Message::PortDelete(ifindex) if self.running => self.port_gone(*ifindex),
                Message::SnapshotBegin(class) => self.described_anew(*class),
                Message::SnapshotEnd(class) => drop(self.resyncing.remove(class)),
                Message::Lost(listener) => self.causes.count(Cause::Lost(*listener)),
                _ => {}
            }
            self.fpm.apply(message);
        }
        if self.lost && self.resyncing.is_empty() {
            self.lost = false;
            self.fpm.follow_rules(true);
        }
    }

    fn described_anew(&mut self, class: Snapshot) {
        if self.resyncing.insert(class) && self.running {
            tracing::debug!("reading again: {class:?}");
        }
        // Interfaces are described as a whole only with everything else.
        if self.running && class == Snapshot::Ports {
            self.resyncs += 1;
            if self.lost {
                self.causes.count(Cause::CacheManager);
            }
        }
    }

    fn port_described(&mut self, port: &Port) {
        let ifindex = port.ifindex;
        if self.wanted.appears(port) {
            tracing::info!("port {} has come back", port.name);
            self.fpm.serve(ifindex, true);
            self.check_abilities(&[ifindex]);
            self.arrivals.insert(ifindex);
        }
        if self.wanted.indices().contains(&ifindex) && !self.arrivals.contains(&ifindex) {
            self.tell_engine(port);
        }
    }

    /// Lets the engine act on what Linux changed about a port's device.
    pub fn tell_engine(&mut self, port: &Port) {
        let (ifindex, name) = (port.ifindex, &port.name);
        self.workers.iter().for_each(|workers| workers.told(ifindex));
        let now = Told { up: port.up && port.carrier, mtu: port.mtu, promiscuous: port.promiscuous };
        // As the engine takes a port to be before it is told.
        let before = self.told.insert(ifindex, now).unwrap_or(Told { up: true, mtu: now.mtu, promiscuous: false });
        if now.up != before.up {
            tracing::info!("port {name} is {}", if now.up { "up" } else { "down" });
            self.check_abilities(&[ifindex]);
            self.ask(Request::PortState { ifindex, up: now.up });
            // While it is down, nothing can leave by its sockets. A wire stays: its being open is the carrier in Linux.
            match self.wanted.wire(ifindex) {
                Some(_) => {}
                None if now.up => self.give_to_workers(ifindex),
                None => self.take_from_workers(ifindex),
            }
        }
        if now.mtu != before.mtu {
            tracing::info!("the MTU of port {name} is {}, and was {}", now.mtu, before.mtu);
            if self.wanted.wire(ifindex).is_some() && now.mtu as usize > LARGEST_MTU {
                tracing::warn!("packets of more than {LARGEST_MTU} bytes that Linux sends by {name} are lost");
            }
            self.ask(Request::Mtu { ifindex, mtu: now.mtu });
            self.check_abilities(&[ifindex]);
        }
        if now.promiscuous != before.promiscuous {
            let state = if now.promiscuous { "promiscuous" } else { "no longer promiscuous" };
            tracing::info!("port {name} is {state}");
            self.ask(Request::Promiscuous { ifindex, on: now.promiscuous });
        }
    }

    fn port_gone(&mut self, ifindex: u32) {
        self.told.remove(&ifindex);
        self.cannot_transmit.remove(&ifindex);
        self.arrivals.remove(&ifindex);
        self.unmapped |= self.fpm.mapped_ports().contains(&ifindex);
        if self.wanted.vanishes(ifindex) {
            tracing::info!("port with index {ifindex} is gone");
            self.take_from_workers(ifindex);
            self.fpm.serve(ifindex, false);
            self.ask(Request::RemovePort { ifindex });
        }
    }

    /// Asks the engine what it can do with the ports, and lets FPM know.
    pub fn check_abilities(&mut self, ports: &[u32]) {
        for &ifindex in ports.iter().filter(|ifindex| self.wanted.indices().contains(ifindex)) {
            if self.wanted.wire(ifindex).is_some() {
                // Workers send by it, and nothing travels beside what they have received.
                self.fpm.set_transmit(ifindex, Transmit::Any);
                self.fpm.set_beside(ifindex, true);
                self.fpm.set_unmarked(ifindex, true);
                continue;
            }
            let (transmit, why) = match self.facts.can_transmit(ifindex) {
                Ok(TransmitSupport::Full) => (Transmit::Any, None),
                Ok(TransmitSupport::SingleBuffer) => (Transmit::SingleBuffer, None),
                Ok(TransmitSupport::None(why)) => (Transmit::Nothing, Some(why)),
                Err(error) => (Transmit::Nothing, Some(error.to_string())),
            };
            let name = self.interface(ifindex);
            let before = self.cannot_transmit.get(&ifindex).cloned();
            match &why {
                Some(why) if before.as_ref() != Some(why) => {
                    tracing::warn!("what leaves by {name} goes to Linux: {why}");
                    self.cannot_transmit.insert(ifindex, why.clone());
                }
                None if self.cannot_transmit.remove(&ifindex).is_some() => tracing::info!("{name} can transmit now"),
                _ => {}
            }
            self.fpm.set_transmit(ifindex, transmit);
            self.fpm.set_beside(ifindex, self.engine.sees_beside(ifindex).unwrap_or(false));
            self.fpm.set_unmarked(ifindex, self.facts.is_unmarked());
        }
    }

    /// Asks again what the ports can do of which that may have changed.
    pub fn transmit_changed(&mut self, changed: Changed) {
        let mut ports = match changed {
            Changed::These(ports) => ports,
            Changed::Any => {
                tracing::warn!("announcements of what devices can do with XDP were lost: all ports are asked again");
                self.causes.count(Cause::Abilities);
                self.wanted.indices().into_iter().collect()
            }
        };
        ports.extend(self.cannot_transmit.keys());
        self.check_abilities(&ports);
        self.sync();
    }

    /// Tries again what found no room.
    fn retry(&mut self) {
        const TIMES: usize = 4;
        for _ in 0..TIMES {
            if !self.fpm.retry() {
                return;
            }
            self.sync();
            self.serve_arrivals();
            if !self.fpm.finds_room() {
                return;
            }
        }
    }

    /// Attaches to ports that have come back, as soon as the tables have a place for them.
    fn serve_arrivals(&mut self) {
        let placed: Vec<_> =
            self.arrivals.iter().filter_map(|ifindex| Some((*ifindex, self.slot(*ifindex)?))).collect();
        for (ifindex, slot) in placed {
            self.arrivals.remove(&ifindex);
            if self.wanted.wire(ifindex).is_none() {
                self.ask(Request::AddPort { ifindex, slot });
            }
            self.give_to_workers(ifindex);
            let port = self.fpm.interfaces().find(|port| port.ifindex == ifindex).cloned();
            if let Some(port) = port {
                self.tell_engine(&port);
            }
        }
    }

    /// Opens sockets on a port, or its wire, for the workers, if there are any and do not serve it yet.
    fn give_to_workers(&mut self, ifindex: u32) {
        let (name, slot) = (self.interface(ifindex), self.slot(ifindex));
        let (Some(workers), Some(slot)) = (&mut self.workers, slot) else { return };
        if workers.serves(ifindex) {
            return;
        }
        match workers.open(ifindex, &name, self.wanted.wire(ifindex)) {
            Ok(opened) => self.hand_to_workers(slot, opened),
            Err(error) => self.warn_without_workers(ifindex, &error),
        }
    }

    /// Has the workers serve a port.
    pub fn hand_to_workers(&mut self, slot: u32, opened: Opened) {
        let ifindex = opened.ifindex();
        if let Some(workers) = &mut self.workers
            && let Err(error) = workers.serve(slot, opened)
        {
            self.warn_without_workers(ifindex, &error);
        }
    }

    fn warn_without_workers(&self, ifindex: u32, error: &anyhow::Error) {
        let name = self.interface(ifindex);
        match self.wanted.wire(ifindex) {
            Some(wire) => tracing::warn!("{name} has lost its wire {wire}: {error:#}"),
            None => tracing::warn!("the XDP program serves {name} without workers: {error:#}"),
        }
    }

    fn take_from_workers(&mut self, ifindex: u32) {
        if let Some(workers) = &mut self.workers {
            workers.leave(ifindex);
        }
    }

    fn ask(&self, request: Request) {
        if let Err(error) = self.engine.apply(request) {
            tracing::warn!("{error}");
        }
    }

    /// Makes the tables say what Linux says.
    pub fn sync(&mut self) {
        loop {
            self.take_alarms();
            let end = Instant::now() + SLICE;
            let progress = self.fpm.publish_while(|| Instant::now() < end);
            self.sentry.settle();
            match progress {
                Progress::More => {}
                Progress::Nothing | Progress::Done(_) => break,
            }
        }
        self.sentry.in_line(!self.lost);
        self.log_shortages();
        self.log_policies();
    }

    /// Tells FPM of policies that were just found. They hold with the next slice of `sync`.
    pub fn take_alarms(&mut self) {
        for alarm in self.sentry.take() {
            self.fpm.apply(Message::Alarm(alarm));
        }
    }

    fn log_shortages(&mut self) {
        let now: BTreeSet<TableId> = self.fpm.full().map(|full| full.table).collect();
        for full in self.fpm.full().filter(|full| !self.shortages.contains(&full.table)) {
            tracing::warn!("{}", words::shortage(full, self.fpm.waiting()));
        }
        for table in self.shortages.difference(&now) {
            tracing::info!("table {} has room for everything again", table.name());
        }
        self.shortages = now;
    }

    fn log_policies(&mut self) {
        // What has just changed is no setting that stands.
        let now: BTreeSet<Policy> = self.fpm.policies().filter(|policy| !policy.momentary).cloned().collect();
        for policy in now.difference(&self.policies) {
            tracing::info!("to Linux: {} ({})", policy.detail, policy.reason.name());
        }
        for policy in self.policies.difference(&now) {
            tracing::info!("no longer in the way: {} ({})", policy.detail, policy.reason.name());
        }
        self.policies = now;
    }

    /// When there is something to do even if nothing happens.
    pub fn due(&self) -> Instant {
        let others = [self.captures.due(), self.fpm.flows_due(), self.manager.due()];
        others.into_iter().flatten().fold(self.hits.due(), Instant::min)
    }

    /// Keeps neighbours in use alive in Linux, tries again what found no room, and tells the service manager, once a period;
    /// and does what is due for captures and connections.
    pub fn tick(&mut self) {
        self.follow_captures();
        self.follow_flows();
        if Instant::now() >= self.hits.due() {
            self.retry();
            self.manager.status(self.status_line());
        }
        let heartbeat = self.source.peer.is_none().then(|| self.sentry.last_heartbeat());
        self.manager.works(Instant::now(), heartbeat);
        if let Err(error) = self.hits.poll(Instant::now(), || self.fpm.take_hits()) {
            tracing::warn!("{error}");
        }
    }
}

/// What the engine was told of a port's device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Told {
    up: bool,
    mtu: u32,
    promiscuous: bool,
}

/// Who tells Linux which neighbours are in use.
pub enum Keeper {
    /// This process
    Local(Netlink),
    /// The cache manager at the other end of a socket
    Remote(Peer),
}

impl Refresh for Keeper {
    fn refresh(&mut self, neighbours: &[NeighbourKey]) -> Result<(), RefreshError> {
        match self {
            Keeper::Local(netlink) => netlink.refresh(neighbours),
            Keeper::Remote(peer) => {
                peer.send(Packet::Feedback(Feedback::Hits(neighbours.to_vec())));
                Ok(())
            }
        }
    }
}
