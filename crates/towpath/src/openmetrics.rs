//! What `status`, `show stats` and `show exceptions` say, as OpenMetrics text.

use crate::report::{Exceptions, Stats, Status};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// Media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PREFIX: &str = "towpath";

/// The answers that the metrics are made from.
#[derive(Debug)]
pub struct Answers {
    /// Of `Request::Status`
    pub status: Status,
    /// Of `Request::Stats`
    pub stats: Stats,
    /// Of `Request::Exceptions`
    pub exceptions: Exceptions,
}

type Labels = Vec<(&'static str, String)>;
type Points = Vec<(Labels, u64)>;

/// A metric of one name.
struct Metric {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    points: Points,
}

/// The text.
pub fn text(answers: Answers) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(answers));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Answers {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for Metric { name, help, unit, kind, points } in self.metrics() {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for (labels, value) in points {
                match kind {
                    MetricType::Info => metric.encode_info(&labels)?,
                    // A metric without labels is written without braces.
                    _ if labels.is_empty() => encode_value(&mut metric, kind, value)?,
                    _ => encode_value(&mut metric.encode_family(&labels)?, kind, value)?,
                }
            }
        }
        Ok(())
    }
}

fn encode_value(metric: &mut prometheus_client::encoding::MetricEncoder, kind: MetricType, value: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        // Gauges have no more than 63 bits.
        _ => metric.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)),
    }
}

impl Answers {
    fn metrics(&self) -> Vec<Metric> {
        [self.daemon(), self.ports(), self.tables(), self.flows(), self.workers()].into_iter().flatten().collect()
    }

    fn daemon(&self) -> Vec<Metric> {
        let status = &self.status;
        let build = vec![("version", env!("CARGO_PKG_VERSION").into()), ("engine", status.engine.clone())];
        let routes = status.routes;
        let policies = status.policies.iter().map(|policy| (&policy.source, &policy.reason));
        let mut kinds: Vec<_> = policies.clone().collect();
        kinds.sort_unstable();
        kinds.dedup();
        let count = |kind: (&String, &String)| policies.clone().filter(|policy| *policy == kind).count() as u64;
        let policy =
            |kind: (&String, &String)| (vec![("source", kind.0.clone()), ("reason", kind.1.clone())], count(kind));
        vec![
            metric("build", "The program that runs", MetricType::Info, vec![(build, 1)]),
            gauge("start_time", "When the daemon started, since 1970-01-01 UTC", one(status.since))
                .in_unit(Unit::Seconds),
            gauge("in_sync", "1 if the tables hold all that Linux has told", one(status.in_sync.into())),
            gauge("shadow", "1 if nothing is forwarded, and counters are predictions", one(status.shadow.into())),
            counter("resyncs", "How often all of Linux's state was read again", one(status.resyncs)),
            counter(
                "resyncs_by_cause",
                "How often Linux's state, or a part of it, was read again",
                status.resyncs_by_cause.iter().map(|one| (vec![("cause", one.cause.clone())], one.count)).collect(),
            ),
            gauge(
                "routes",
                "Routes in the tables",
                vec![(vec![("family", "ipv4".into())], routes.ipv4), (vec![("family", "ipv6".into())], routes.ipv6)],
            ),
            gauge("policies", "Settings of Linux that keep traffic in Linux", kinds.into_iter().map(policy).collect()),
            gauge("notices", "Notes of the status", one(status.notices.len() as u64)),
        ]
    }

    fn ports(&self) -> Vec<Metric> {
        let ready = self
            .status
            .ports
            .iter()
            .map(|port| (vec![("port", port.name.clone()), ("mode", port.mode.clone())], port.ready.into()));
        let each = |value: fn(&crate::report::PortStats) -> u64| -> Points {
            self.stats.ports.iter().map(|port| (vec![("port", port.port.clone())], value(port))).collect()
        };
        let exceptions = self.exceptions.exceptions.iter().map(|exception| {
            let labels = vec![("port", exception.port.clone()), ("reason", exception.reason.clone())];
            (labels, exception.packets)
        });
        vec![
            gauge("port_ready", "1 if packets that come in by the port may take the fast path", ready.collect()),
            counter(
                "port_received_packets",
                "Packets that came in by the port and were forwarded fast",
                each(|p| p.rx_packets),
            ),
            counter("port_received", "Their bytes, Ethernet header included", each(|p| p.rx_bytes))
                .in_unit(Unit::Bytes),
            counter(
                "port_transmitted_packets",
                "Packets that left by the port from the fast path",
                each(|p| p.tx_packets),
            ),
            counter("port_transmitted", "Their bytes, Ethernet header included", each(|p| p.tx_bytes))
                .in_unit(Unit::Bytes),
            counter(
                "port_exceptions",
                "Packets that came in by the port and were handed to Linux",
                exceptions.collect(),
            ),
        ]
    }

    fn tables(&self) -> Vec<Metric> {
        let each = |value: fn(&crate::report::Table) -> u64| -> Points {
            self.status.tables.iter().map(|table| (vec![("table", table.name.clone())], value(table))).collect()
        };
        vec![
            gauge("table_used", "Elements in use of a table", each(|table| table.used)),
            gauge("table_capacity", "Elements that a table has", each(|table| table.capacity)),
            gauge("table_memory", "Memory of a table", each(|table| table.memory_bytes)).in_unit(Unit::Bytes),
        ]
    }

    fn flows(&self) -> Vec<Metric> {
        let flows = &self.status.flows;
        let states = [("fast", flows.fast), ("waiting", flows.waiting), ("closing", flows.closing)];
        let gates = ["open", "opening", "shut"].map(|gate| (gate, u64::from(flows.gate == gate)));
        let points = |label, values: [(&str, u64); 3]| -> Points {
            values.into_iter().map(|(name, value)| (vec![(label, name.to_owned())], value)).collect()
        };
        vec![
            gauge("flows", "Connections that Linux hands over, by state", points("state", states)),
            gauge("flows_capacity", "Room for connections", one(flows.capacity)),
            counter("flows_refused", "How often a connection stayed in Linux for want of room", one(flows.refused)),
            gauge("flow_gate", "1 for the state that holds: whether connections pass rules", points("state", gates)),
        ]
    }

    fn workers(&self) -> Vec<Metric> {
        let each = |value: fn(&crate::report::Worker) -> u64| -> Points {
            self.status.workers.iter().map(|worker| (vec![("core", worker.core.to_string())], value(worker))).collect()
        };
        let lost = [
            ("arrival", each(|worker| worker.rx_lost)),
            ("leaving", each(|worker| worker.tx_lost)),
            ("to_linux", each(|worker| worker.exceptions_lost)),
        ];
        let lost = lost.into_iter().flat_map(|(place, points)| {
            points.into_iter().map(move |(mut labels, value)| {
                labels.push(("place", place.to_owned()));
                (labels, value)
            })
        });
        let entered = self.status.fptun.iter().map(|it| (vec![("outcome", it.outcome.clone())], it.packets));
        vec![
            counter("fptun_packets", "Packets sent to Linux by the device fptun, by whomever", entered.collect()),
            counter("worker_received_packets", "Packets that a worker has forwarded", each(|worker| worker.rx_packets)),
            counter(
                "worker_transmitted_packets",
                "Packets that a worker has counted as sent",
                each(|worker| worker.tx_packets),
            ),
            counter("worker_exceptions", "Packets that a worker has handed to Linux", each(|worker| worker.exceptions)),
            counter("worker_lost_packets", "Packets of a worker that found no room", lost.collect()),
        ]
    }
}

impl Metric {
    /// The same, measured in this; the unit becomes part of the name.
    fn in_unit(self, unit: Unit) -> Self {
        Self { unit: Some(unit), ..self }
    }
}

fn metric(name: &'static str, help: &'static str, kind: MetricType, points: Points) -> Metric {
    Metric { name, help, unit: None, kind, points }
}

/// `_total` becomes part of its name.
fn counter(name: &'static str, help: &'static str, points: Points) -> Metric {
    metric(name, help, MetricType::Counter, points)
}

fn gauge(name: &'static str, help: &'static str, points: Points) -> Metric {
    metric(name, help, MetricType::Gauge, points)
}

/// A single value, without labels.
fn one(value: u64) -> Points {
    vec![(Vec::new(), value)]
}
