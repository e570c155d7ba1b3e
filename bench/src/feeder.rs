//! Gives connection tracking established connections by ctnetlink, many in each system call: `conntrack -R` gives some ten
//! thousand a second, since it waits for an answer to each.

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use std::io;
use std::time::{Duration, Instant};
use towpath_cm::conntrack::entry::{self, status};
use towpath_tables::flow::{Connection, Tuple};

/// NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW, and NLM_F_REQUEST, _EXCL and _CREATE (include/uapi/linux/netfilter/
/// nfnetlink_conntrack.h, include/uapi/linux/netlink.h).
const NEW: u16 = 0x100;
const CREATE: u16 = 0x1 | 0x200 | 0x400;
const NLMSG_ERROR: u16 = 2;
const CTA_TUPLE_REPLY: u16 = 2;
const NESTED: u16 = 0x8000;
const HEADER: usize = 16;
/// How long they last, in seconds.
const LIFE: u32 = 3600;
/// Connections in a system call.
const BATCH: u32 = 128;
const TICK: Duration = Duration::from_millis(1);

/// Gives so many connections from this tuple on, whose destinations count up, at a rate; those that were taken in a second.
/// To be called in the namespace.
pub fn feed(first: Tuple, count: u32, rate: f64) -> Result<f64> {
    let mut socket = Socket::new(NETLINK_NETFILTER).context("a netlink socket")?;
    socket.bind_auto()?;
    let (begin, mut done) = (Instant::now(), 0);
    while done < count {
        let due = ((begin.elapsed().as_secs_f64() * rate) as u32).min(count);
        while done < due {
            let until = due.min(done + BATCH);
            let messages: Vec<u8> = (done..until).flat_map(|number| message(&first, number)).collect();
            socket.send_to(&messages, &SocketAddr::new(0, 0), 0).context("giving connections")?;
            done = until;
        }
        refusal(&socket)?;
        std::thread::sleep(TICK);
    }
    Ok(f64::from(count) / begin.elapsed().as_secs_f64())
}

fn message(first: &Tuple, number: u32) -> Vec<u8> {
    let destination = match first.destination {
        std::net::IpAddr::V4(address) => std::net::Ipv4Addr::from_bits(address.to_bits() + number).into(),
        std::net::IpAddr::V6(address) => std::net::Ipv6Addr::from_bits(address.to_bits() + u128::from(number)).into(),
    };
    let original = Tuple { destination, ..*first };
    let known = Connection::new(original, original.inverse()).expect("one protocol and family");
    let mut body = entry::named(&known.original);
    let mut reply = entry::named(&known.reply).split_off(4);
    reply[2..4].copy_from_slice(&(CTA_TUPLE_REPLY | NESTED).to_ne_bytes());
    body.extend(reply);
    body.extend(entry::with_status(status::SEEN_REPLY | status::ASSURED | status::CONFIRMED));
    body.extend(entry::timeout(LIFE));
    let length = (HEADER + body.len()) as u32;
    let header = [&length.to_ne_bytes()[..], &NEW.to_ne_bytes(), &CREATE.to_ne_bytes(), &[0; 8]].concat();
    [header, body].concat()
}

/// Without a request for answers, the kernel answers refusals only.
fn refusal(socket: &Socket) -> Result<()> {
    let mut bytes = Vec::with_capacity(4096);
    match socket.recv(&mut bytes, libc::MSG_DONTWAIT) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        received => drop(received.context("answers of connection tracking")?),
    }
    let kind = bytes.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    ensure!(kind == Some(NLMSG_ERROR), "an answer that nobody asked for");
    let code = bytes.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    bail!("a connection was refused: {}", io::Error::from_raw_os_error(-code.unwrap_or_default()))
}
