//! Rates, from what the counters say at two times.

use crate::report::{Exceptions, PortStats, Stats, Status, Top, TopException, TopPort};
use std::time::Instant;

/// The counters at a time.
pub struct Reading {
    at: Instant,
    status: Status,
    stats: Stats,
    exceptions: Exceptions,
}

impl Reading {
    /// What the daemon has just answered.
    pub fn new(status: Status, stats: Stats, exceptions: Exceptions) -> Self {
        Self { at: Instant::now(), status, stats, exceptions }
    }

    /// The rates since an earlier reading. What was counted anew since then counts as nothing.
    pub fn since(&self, before: &Self) -> Top {
        let seconds = (self.at - before.at).as_secs_f64();
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let port = |now: &PortStats| {
            let known = before.stats.ports.iter().find(|port| port.port == now.port);
            let since = |of: fn(&PortStats) -> u64| rate(of(now), known.map_or(of(now), of));
            let (fast, exceptions) = (since(|port| port.rx_packets), since(|port| port.exceptions));
            let all = fast + exceptions;
            TopPort {
                port: now.port.clone(),
                rx_packets: fast,
                rx_bits: since(|port| port.rx_bytes) * 8.0,
                tx_packets: since(|port| port.tx_packets),
                tx_bits: since(|port| port.tx_bytes) * 8.0,
                exceptions,
                fast: (all > 0.0).then(|| fast / all),
            }
        };
        Top {
            seconds,
            shadow: self.status.shadow,
            in_sync: self.status.in_sync,
            policies: self.status.policies.len() as u64,
            ports: self.stats.ports.iter().map(port).collect(),
            exceptions: self.exceptions_since(before, rate),
            flows: self.status.flows.clone(),
            prefixes: None,
        }
    }

    /// Those that occurred, the most frequent first.
    fn exceptions_since(&self, before: &Self, rate: impl Fn(u64, u64) -> f64) -> Vec<TopException> {
        let mut all: Vec<_> = self
            .exceptions
            .exceptions
            .iter()
            .filter_map(|now| {
                let same = |e: &&crate::report::Exception| e.port == now.port && e.reason == now.reason;
                let known = before.exceptions.exceptions.iter().find(same)?;
                let packets = rate(now.packets, known.packets);
                let (port, reason, text) = (now.port.clone(), now.reason.clone(), now.text.clone());
                (packets > 0.0).then_some(TopException { port, reason, text, packets })
            })
            .collect();
        all.sort_by(|a, b| b.packets.total_cmp(&a.packets));
        all
    }
}

/// A rate in a few digits.
pub fn rate(rate: f64) -> String {
    match rate {
        ..999.5 => format!("{rate:.0}"),
        ..999_950.0 => format!("{:.1}k", rate / 1e3),
        ..999_950_000.0 => format!("{:.1}M", rate / 1e6),
        _ => format!("{:.1}G", rate / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Exception;
    use std::time::Duration;

    fn reading(at: Instant, rx: u64, exceptions: u64) -> Reading {
        let status = serde_json::from_value(serde_json::json!({
            "engine": "xdp", "pid": 1, "namespace": 1, "since": 0, "adopted": false, "shadow": false, "in_sync": true, "ports": [],
            "policies": [], "routes": {"ipv4": 0, "ipv6": 0}, "tables": [], "memory_bytes": 0, "program": null, "notices": []
        }));
        let port = "eth0".to_owned();
        let exception = |reason: &str, packets| Exception {
            port: port.clone(),
            reason: reason.into(),
            text: String::new(),
            packets,
        };
        Reading {
            at,
            status: status.unwrap(),
            stats: Stats {
                shadow: false,
                ports: vec![PortStats {
                    port: port.clone(),
                    rx_packets: rx,
                    rx_bytes: rx * 100,
                    tx_packets: 0,
                    tx_bytes: 0,
                    exceptions,
                }],
            },
            exceptions: Exceptions {
                exceptions: vec![exception("a", exceptions), exception("b", 7)],
                fptun: Vec::new(),
            },
        }
    }

    #[test]
    fn rates_are_differences_by_time() {
        let begin = Instant::now();
        let top = reading(begin + Duration::from_secs(2), 500, 110).since(&reading(begin, 200, 10));
        let [port] = top.ports.as_slice() else { panic!("one port") };
        assert_eq!((port.rx_packets, port.rx_bits, port.exceptions, port.fast), (150.0, 120_000.0, 50.0, Some(0.75)));
        let [exception] = top.exceptions.as_slice() else { panic!("only what occurred") };
        assert_eq!((exception.reason.as_str(), exception.packets), ("a", 50.0));
        // Tables that are new count from nothing.
        let top = reading(begin + Duration::from_secs(2), 5, 0).since(&reading(begin, 200, 10));
        assert_eq!((top.ports[0].rx_packets, top.ports[0].fast, top.exceptions.len()), (0.0, None, 0));
    }

    #[test]
    fn rates_are_short() {
        let words = [0.0, 999.4, 999.6, 1234.0, 999_960.0, 14_880_000.0, 9_999_999_999.0].map(rate);
        assert_eq!(words, ["0", "999", "1.0k", "1.2k", "1.0M", "14.9M", "10.0G"]);
    }
}
