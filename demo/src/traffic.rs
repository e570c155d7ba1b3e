//! Traffic from the client through the router, counted where it leaves the router's links, packet by packet.

use crate::network::{Network, SERVER};
use anyhow::{Context, Result, bail};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use towpath_bench::bpf::Object;
use towpath_bench::{ethtool, path, source};
use towpath_lab::Node;

/// A paced stream, on while this lives, and the counters of both ends.
pub struct Traffic {
    router: Node,
    client: Node,
    sender: u32,
    source: Mutex<Object>,
    ends: Mutex<[Object; 2]>,
    rate: AtomicU64,
    changes: AtomicU64,
    napi: u32,
}

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    /// Packets sent by the client
    pub sent: u64,
    /// Packets that left the router by up1 and by up2
    pub arrived: [u64; 2],
    /// Nanoseconds that the router's receiving thread has run
    pub time: u64,
    /// Packets that it took
    pub taken: u64,
    /// Of those, packets that an XDP program sent out by another port, as the driver counts them
    pub redirected: u64,
}

impl Count {
    /// What happened since an earlier moment.
    pub fn since(&self, earlier: &Count) -> Count {
        Count {
            sent: self.sent - earlier.sent,
            arrived: [self.arrived[0] - earlier.arrived[0], self.arrived[1] - earlier.arrived[1]],
            time: self.time - earlier.time,
            taken: self.taken - earlier.taken,
            redirected: self.redirected - earlier.redirected,
        }
    }

    /// Packets that arrived by either link.
    pub fn total(&self) -> u64 {
        self.arrived.iter().sum()
    }

    /// Packets sent and not arrived.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.total())
    }

    /// Share of the router's packets that went from driver to driver.
    pub fn fast(&self) -> f64 {
        self.redirected as f64 / self.taken.max(1) as f64
    }

    /// Nanoseconds of the router's core for each packet.
    pub fn cost(&self) -> f64 {
        self.time as f64 / self.taken.max(1) as f64
    }
}

const LAN: &str = "lan";
const TICK: Duration = Duration::from_micros(200);

impl Traffic {
    /// Prepares both ends; nothing is sent until `run` runs with a rate.
    pub fn new(network: &Network) -> Result<Traffic> {
        let (router, client) = (network.router.clone(), network.client.clone());
        let sender = client.ifindex("eth0")?;
        let mut object = Object::load(1)?;
        client.enter(|| object.set_out(sender))??;
        let template = source::template(router.mac(LAN)?, "198.51.100.2".parse()?);
        let variation = source::variation(&template, SERVER.parse()?);
        object.set_source(&template, 4, false, &[variation])?;
        let mut ends = [Object::load(1)?, Object::load(1)?];
        for (end, port) in ends.iter_mut().zip(["eth1", "eth2"]) {
            let index = network.upstream.ifindex(port)?;
            network.upstream.enter(|| end.attach("absorb", index))??;
        }
        let napi = path::thread_napi(&router, LAN)?;
        let (source, ends) = (Mutex::new(object), Mutex::new(ends));
        Ok(Traffic { router, client, sender, source, ends, rate: AtomicU64::new(0), changes: AtomicU64::new(0), napi })
    }

    /// Packets a second from now on.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes with every change of the rate: the stream is steady while it stays the same.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Sends at the rate set until `stop` says so.
    pub fn run(&self, stop: impl Fn() -> bool + Send + Sync) -> Result<()> {
        self.client.enter(|| {
            path::pin(0, path::SOURCE_CORE)?;
            let program = self.lock(&self.source)?.fd("source")?;
            let mut last = Instant::now();
            let mut owed = 0.0;
            while !stop() {
                std::thread::sleep(TICK);
                let rate = self.rate.load(Ordering::Relaxed) as f64;
                owed += rate * last.elapsed().as_secs_f64();
                last = Instant::now();
                // A veth's ring holds 256 packets: a late tick must not become a burst that overflows it.
                let packets = (owed as u32).min(128);
                if packets > 0 {
                    source::send(&program, self.sender, source::FRAME, packets)?;
                }
                owed = (owed - f64::from(packets)).min(128.0);
            }
            Ok(())
        })?
    }

    /// Sends `packets` as fast as they can be handed over, once the stream rests: what became of them. More are sent
    /// than the router can take.
    pub fn flood(&self, packets: u32) -> Result<Count> {
        let before = self.rest()?;
        let program = self.lock(&self.source)?.fd("source")?;
        self.client.enter(|| {
            path::pin(0, path::SOURCE_CORE)?;
            source::send(&program, self.sender, source::FRAME, packets)
        })??;
        Ok(self.rest()?.since(&before))
    }

    /// The counters now.
    pub fn count(&self) -> Result<Count> {
        let sent = self.lock(&self.source)?.sent()?;
        let arrived = self.arrived()?;
        let statistic = |name| ethtool::sum(LAN, name, "rx_queue_");
        let (taken, redirected) =
            self.router.enter(|| anyhow::Ok((statistic("_xdp_packets")?, statistic("_xdp_redirect")?)))??;
        Ok(Count { sent, arrived, time: path::cpu_time(self.napi)?, taken, redirected })
    }

    /// Packets that left the router by each link.
    pub fn arrived(&self) -> Result<[u64; 2]> {
        let mut ends = self.lock(&self.ends)?;
        Ok([ends[0].seen(0)?, ends[1].seen(0)?])
    }

    /// Stops the stream; the counters once nothing is on its way any more.
    pub fn rest(&self) -> Result<Count> {
        self.set_rate(0);
        let mut last = self.count()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.count()?;
            if now.sent == last.sent && now.arrived == last.arrived {
                return Ok(now);
            }
            if Instant::now() > deadline {
                bail!("the traffic does not come to rest");
            }
            last = now;
        }
    }

    fn lock<'a, T>(&self, what: &'a Mutex<T>) -> Result<std::sync::MutexGuard<'a, T>> {
        what.lock().ok().context("a thread of the demo panicked")
    }
}
