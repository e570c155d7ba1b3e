//! What it costs to hand packets to a socket in Linux from user space: by FPTUN, beside a TAP, and beside what Linux does by
//! itself with packets that arrive by a veth.

use crate::findings::{Aim, Findings};
use crate::path::{pin, thread_time};
use crate::stats::Summary;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use towpath_fptun::{Entry, Fptun, Kind, Packet};
use towpath_lab::packet::udp;
use towpath_lab::{Lab, Node};
use towpath_report::{Bar, Report};
use towpath_user::Vnet;
use towpath_user::tap::Tap;

const CORE: usize = 0;
/// Packets that are sent before they are received.
const BATCH: usize = 64;
/// Packets of a window
const WINDOW: usize = 512 * BATCH;
/// A frame of 60 bytes
const PAYLOAD: [u8; 18] = [0; 18];
const LIMIT: Duration = Duration::from_secs(1);

/// How packets come to the socket.
struct Way {
    name: &'static str,
    /// Sends one batch
    send: Box<dyn FnMut() -> Result<()> + Send>,
    socket: UdpSocket,
}

#[derive(Clone, Debug, Serialize)]
struct Outcome {
    way: &'static str,
    /// Packets that the socket received per second of CPU time
    rate: Summary,
    /// How many times that is what came by FPTUN in the same round
    to_fptun: Summary,
}

/// Runs the section.
pub fn run(findings: &mut Findings, report: &mut Report, rounds: usize) -> Result<()> {
    println!("exceptions to a socket: {rounds} rounds of windows of {WINDOW} packets each");
    let lab = Lab::new("exceptions")?;
    let (router, host) = (lab.node("router")?, lab.node("host")?);
    lab.link((&router, "eth0"), (&host, "up0"))?;
    router.sh("ip tuntap add dev tap0 mode tap; ip link set tap0 up")?;
    router.sh("ip address add 192.0.2.1/24 dev eth0; ip address add 203.0.113.1/24 dev tap0")?;
    let fptun = router.enter(Fptun::open)??;
    let mut ways = [by_fptun(&router, &fptun)?, by_itself(&router, &host)?, by_tap(&router)?];
    let measured = router.enter(|| measure(&mut ways, rounds))??;
    let outcomes: Option<Vec<_>> =
        ways.iter().zip(&measured).map(|(way, rates)| Outcome::of(way, rates, &measured[0])).collect();
    let outcomes = outcomes.context("no windows")?;
    for outcome in &outcomes {
        let (rate, ratio) = (outcome.rate, outcome.to_fptun);
        println!(
            "  {:28} {:9.0} packets per second of CPU time ({:.0} to {:.0}); {:.2} times FPTUN's ({:.2} to {:.2})",
            outcome.way, rate.median, rate.floor, rate.high, ratio.median, ratio.floor, ratio.high
        );
    }
    for (outcome, aim) in outcomes[1..].iter().zip([0.5, 1.0]) {
        let what = format!("exceptions to a socket: FPTUN's rate to that of {}", outcome.way);
        findings.goal(what, 1.0 / outcome.to_fptun.median, Aim::AtLeast(aim));
    }
    report.section("Exceptions to a socket").text(
        "One core sends 64 frames of 60 bytes and receives their payloads from a UDP socket, again and again: what the sender, \
         Linux's stack and the receiver take together. \"Linux by itself\" are frames sent by the other end of a veth.",
    );
    let bars: Vec<Bar> = outcomes.iter().map(Outcome::bar).collect();
    report.bars("packets per second of CPU time: median, 10th to 90th percentile", "", &bars)?;
    findings.keep("exceptions", outcomes);
    Ok(())
}

impl Outcome {
    fn of(way: &Way, rates: &[f64], fptun: &[f64]) -> Option<Self> {
        let to_fptun: Vec<_> = rates.iter().zip(fptun).map(|(rate, fptun)| rate / fptun).collect();
        Some(Self { way: way.name, rate: Summary::of(rates)?, to_fptun: Summary::of(&to_fptun)? })
    }

    fn bar(&self) -> Bar {
        Bar { label: self.way.into(), value: self.rate.median, low: self.rate.floor, high: self.rate.high }
    }
}

fn by_fptun(router: &Node, fptun: &Fptun) -> Result<Way> {
    let (frame, socket) = target(router, "eth0", Ipv4Addr::new(192, 0, 2, 1))?;
    let entry = Entry::Ingress(router.ifindex("eth0")?);
    let mut sender = router.enter(|| fptun.sender(Kind::Arrived))??;
    let send = move || {
        let lost = sender.send([Packet { entry, mark: 0, frame: &frame }; BATCH]);
        ensure!(lost == 0, "{lost} packets were refused");
        Ok(())
    };
    Ok(Way { name: "FPTUN", send: Box::new(send), socket })
}

fn by_itself(router: &Node, host: &Node) -> Result<Way> {
    let (frame, socket) = target(router, "eth0", Ipv4Addr::new(192, 0, 2, 1))?;
    let wire = host.packet_socket("up0")?;
    Ok(Way { name: "Linux by itself", send: Box::new(move || wire.send_all(&[frame.as_slice(); BATCH])), socket })
}

fn by_tap(router: &Node) -> Result<Way> {
    let tap = router.enter(|| Tap::open("tap0"))??;
    let (frame, socket) = target(router, "tap0", Ipv4Addr::new(203, 0, 113, 1))?;
    let send = move || {
        let sent = (0..BATCH).all(|_| tap.send(&Vnet::default(), [&frame, &[], &[]]));
        sent.then_some(()).context("the TAP takes no frames")
    };
    Ok(Way { name: "a TAP", send: Box::new(send), socket })
}

/// A frame to an address of the router's, and the socket that gets it.
fn target(router: &Node, port: &str, address: Ipv4Addr) -> Result<(Vec<u8>, UdpSocket)> {
    let [a, b, c, _] = address.octets();
    let from = IpAddr::from([a, b, c, 2]);
    let socket = router.enter(|| UdpSocket::bind((address, 0)))??;
    let ports = (1, socket.local_addr()?.port());
    let frame = udp(([2, 0, 0, 0, 0, 2], router.mac(port)?), (from, address.into()), ports, &PAYLOAD);
    Ok((frame, socket))
}

/// Packets per second of CPU time of each window, by way.
fn measure(ways: &mut [Way], rounds: usize) -> Result<Vec<Vec<f64>>> {
    pin(0, CORE)?;
    let mut rates = vec![Vec::new(); ways.len()];
    for _ in 0..rounds {
        for (way, rates) in ways.iter_mut().zip(&mut rates) {
            rates.push(window(way).with_context(|| way.name)?);
        }
    }
    Ok(rates)
}

fn window(way: &mut Way) -> Result<f64> {
    let start = thread_time()?;
    for _ in 0..WINDOW / BATCH {
        (way.send)()?;
        receive(&way.socket)?;
    }
    Ok(WINDOW as f64 / (thread_time()? - start).as_secs_f64())
}

/// Receives a batch.
fn receive(socket: &UdpSocket) -> Result<()> {
    let mut payloads = [[0u8; 64]; BATCH];
    let mut pieces =
        payloads.each_mut().map(|payload| libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: 64 });
    let mut messages = pieces.each_mut().map(|piece| {
        // SAFETY: plain numbers and pointers that nobody follows, for which zeroes are valid.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (piece, 1);
        message
    });
    let (mut count, deadline) = (0, Instant::now() + LIMIT);
    while count < BATCH {
        let rest = &mut messages[count..];
        // SAFETY: headers, vectors and payloads live until after the call, with the lengths given.
        let received = unsafe {
            let length = rest.len() as libc::c_uint;
            libc::recvmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), length, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        count += usize::try_from(received).unwrap_or(0);
        ensure!(Instant::now() < deadline, "{count} of {BATCH} packets arrived");
    }
    Ok(())
}
