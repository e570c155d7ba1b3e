//! Traffic from the client through the router, counted packet by packet where it is sent and behind the router's links.
//!
//! The router gets frames as from a driver. The floods come from an XDP program that makes them as fast as it can. The
//! steady stream comes from a socket that sends into a veth pair within the client (`FEED`), whose far end relays it.

use crate::network::{Network, SERVER};
use anyhow::{Context, Result, bail};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use towpath_bench::bpf::Object;
use towpath_bench::{ethtool, path, source};
use towpath_lab::{Node, PacketSocket};

/// A paced stream, on while this lives, and the counters of both ends.
pub struct Traffic {
    router: Node,
    client: Node,
    sender: u32,
    source: Mutex<Object>,
    relay: Mutex<Object>,
    feed: PacketSocket,
    frame: Vec<u8>,
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
    /// Of those, packets that found the router's receive ring full
    pub refused: u64,
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
            refused: self.refused - earlier.refused,
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
const FEED: &str = "feed";
const RELAY: &str = "relay";
const TICK: Duration = Duration::from_micros(200);
const MOST_AT_ONCE: usize = 64;

impl Traffic {
    /// Prepares both ends; nothing is sent until `run` runs with a rate.
    pub fn new(network: &Network) -> Result<Traffic> {
        let (router, client) = (network.router.clone(), network.client.clone());
        client.sh(&format!(
            "ip link add {FEED} type veth peer name {RELAY}; ip link set {FEED} up; ip link set {RELAY} up"
        ))?;
        let sender = client.ifindex("eth0")?;
        let mut object = Object::load(1)?;
        client.enter(|| object.set_out(sender))??;
        let template = source::template(router.mac(LAN)?, "198.51.100.2".parse()?);
        let variation = source::variation(&template, SERVER.parse()?);
        object.set_source(&template, 4, false, &[variation])?;
        let mut relay = Object::load(1)?;
        let far_end = client.ifindex(RELAY)?;
        client.enter(|| {
            relay.set_out(sender)?;
            relay.attach("relay", far_end)
        })??;
        let feed = client.packet_socket(FEED)?;
        let frame = frame(&template, variation);
        let mut ends = [Object::load(1)?, Object::load(1)?];
        for (end, port) in ends.iter_mut().zip(["eth1", "eth2"]) {
            let index = network.upstream.ifindex(port)?;
            network.upstream.enter(|| end.attach("absorb", index))??;
        }
        let napi = path::thread_napi(&router, LAN)?;
        run_first(napi)?;
        Ok(Traffic {
            router,
            client,
            sender,
            source: Mutex::new(object),
            relay: Mutex::new(relay),
            feed,
            frame,
            ends: Mutex::new(ends),
            rate: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            napi,
        })
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
        path::pin(0, path::SOURCE_CORE)?;
        let (mut last, mut owed) = (Instant::now(), 0.0);
        while !stop() {
            std::thread::sleep(TICK);
            let rate = self.rate.load(Ordering::Relaxed) as f64;
            owed = if rate > 0.0 { owed + rate * last.elapsed().as_secs_f64() } else { 0.0 };
            last = Instant::now();
            // A veth's ring holds 256 packets: a late tick must not become a burst that overflows it.
            let packets = (owed as usize).min(MOST_AT_ONCE);
            self.feed.send_all(&vec![self.frame.as_slice(); packets])?;
            owed = (owed - packets as f64).min(MOST_AT_ONCE as f64);
        }
        Ok(())
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
        let sent = self.lock(&self.source)?.sent()? + self.lock(&self.relay)?.seen(0)?;
        let refused = self.client.enter(|| ethtool::sum("eth0", "_xdp_xmit_errors", "tx_queue_"))??;
        let arrived = self.arrived()?;
        let statistic = |name| ethtool::sum(LAN, name, "rx_queue_");
        let (taken, redirected) =
            self.router.enter(|| anyhow::Ok((statistic("_xdp_packets")?, statistic("_xdp_redirect")?)))??;
        Ok(Count { sent, refused, arrived, time: path::cpu_time(self.napi)?, taken, redirected })
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

/// The frame that the source would make.
fn frame(template: &[u8; 64], [variation, _]: [u64; 2]) -> Vec<u8> {
    let mut frame = template[..source::FRAME].to_vec();
    let [a, b, c, d, check @ ..] = variation.to_ne_bytes();
    frame[30..34].copy_from_slice(&[a, b, c, d]);
    frame[24..26].copy_from_slice(&check[..2]);
    frame
}

/// Lets a thread run before all others: what else the machine does must not look like packets lost by the router.
fn run_first(thread: u32) -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call, which only reads them.
    if unsafe { libc::sched_setscheduler(thread as i32, libc::SCHED_FIFO, &parameters) } != 0 {
        return Err(std::io::Error::last_os_error()).context("give the router's receiving thread a real-time priority");
    }
    Ok(())
}
