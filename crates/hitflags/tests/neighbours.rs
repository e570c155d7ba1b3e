//! Hit flags against a real neighbour table.
//!
//! ```text
//! router (192.0.2.1, 2001:db8::1) eth0 ---- eth0 (.2 and .3 used and idle, likewise ::2 and ::3) host
//! ```

use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};
use towpath_fpc::NeighbourKey;
use towpath_hitflags::{HitFlags, Netlink, Refresh};
use towpath_lab::packet::asks_for;
use towpath_lab::{Lab, Node, wait_for};

const USED: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
const IDLE: [&str; 2] = ["192.0.2.3", "2001:db8::3"];
const LIMIT: Duration = Duration::from_secs(40);

/// REACHABLE lasts 1.25 to 3.75 s, longer than the time in which a use before its end counts, as with Linux's defaults
/// (15 to 45 s and 5 s); otherwise the probe itself would keep idle neighbours busy.
fn lab(name: &str) -> Result<(Lab, Node, Node)> {
    let lab = Lab::new(name)?;
    let (router, host) = (lab.node("router")?, lab.node("host")?);
    lab.link((&router, "eth0"), (&host, "eth0"))?;
    for address in ["192.0.2.1/24", "2001:db8::1/64"] {
        router.run(["ip", "addr", "add", address, "dev", "eth0"])?;
    }
    for address in USED.iter().chain(&IDLE) {
        host.run([
            "ip",
            "addr",
            "add",
            &format!("{address}/{}", if address.contains(':') { 64 } else { 24 }),
            "dev",
            "eth0",
        ])?;
    }
    for family in ["ipv4", "ipv6"] {
        for (key, value) in [
            ("base_reachable_time_ms", "2500"),
            ("delay_first_probe_time", "1"),
            ("gc_stale_time", "60"),
            ("retrans_time_ms", "200"),
        ] {
            router.sysctl(&format!("net.{family}.neigh.eth0.{key}"), value)?;
        }
    }
    Ok((lab, router, host))
}

/// State and flags of a neighbour as `ip` shows them; None if there is none.
fn entry(router: &Node, address: &str) -> Result<Option<serde_json::Value>> {
    let shown = router.json(["ip", "-j", "neigh", "show", "nud", "all", "to", address, "dev", "eth0"])?;
    Ok(shown.as_array().and_then(|entries| entries.first()).cloned())
}

fn state(router: &Node, address: &str) -> Result<String> {
    let entry = entry(router, address)?;
    Ok(entry.and_then(|entry| Some(entry["state"][0].as_str()?.to_owned())).unwrap_or_else(|| "gone".into()))
}

fn key(router: &Node, address: &str) -> Result<NeighbourKey> {
    Ok(NeighbourKey { ifindex: router.ifindex("eth0")?, address: address.parse()? })
}

#[test]
fn used_neighbours_stay_valid_and_idle_ones_age() -> Result<()> {
    let (_lab, router, host) = lab("hitused")?;
    for address in USED.iter().chain(&IDLE) {
        router.run(["ping", "-c1", "-W2", address])?;
    }
    let netlink = router.enter(Netlink::open)??;
    let mut flags = HitFlags::new(netlink, Duration::from_millis(300), Instant::now());
    let used = USED.iter().map(|address| key(&router, address)).collect::<Result<Vec<_>>>()?;
    let mut report = || -> Result<()> { Ok(flags.poll(Instant::now(), || used.clone())?) };
    wait_for(LIMIT, "idle neighbours go stale", || {
        report().ok()?;
        IDLE.iter().all(|address| state(&router, address).is_ok_and(|state| state == "STALE")).then_some(())
    })?;
    let socket = host.packet_socket("eth0")?;
    let mut probes = [0; 4];
    let deadline = Instant::now() + LIMIT;
    // Three probes of each are as many periods gone by.
    while probes[..2].iter().any(|count| *count < 3) {
        ensure!(Instant::now() < deadline, "Linux probes too rarely: {probes:?}");
        report()?;
        if let Some(frame) = socket.receive(Duration::from_millis(100))? {
            for (count, address) in probes.iter_mut().zip(USED.iter().chain(&IDLE)) {
                *count += usize::from(asks_for(&frame.bytes, address.parse()?));
            }
        }
        for address in USED {
            let state = state(&router, address)?;
            ensure!(["REACHABLE", "DELAY", "PROBE", "STALE"].contains(&state.as_str()), "{address} is {state}");
        }
        for address in IDLE {
            let state = state(&router, address)?;
            ensure!(state == "STALE", "idle {address} is {state}");
        }
    }
    ensure!(probes[2..] == [0, 0], "idle neighbours were probed: {probes:?}");
    Ok(())
}

#[test]
fn a_neighbour_that_does_not_answer_fails_as_ever() -> Result<()> {
    let (_lab, router, host) = lab("hitfail")?;
    for address in USED {
        router.run(["ping", "-c1", "-W2", address])?;
        let length = if address.contains(':') { 64 } else { 24 };
        host.run(["ip", "addr", "del", &format!("{address}/{length}"), "dev", "eth0"])?;
    }
    let mut netlink = router.enter(Netlink::open)??;
    let used = USED.iter().map(|address| key(&router, address)).collect::<Result<Vec<_>>>()?;
    wait_for(LIMIT, "neighbours that do not answer fail", || {
        netlink.refresh(&used).ok()?;
        USED.iter()
            .all(|address| state(&router, address).is_ok_and(|state| state == "FAILED" || state == "gone"))
            .then_some(())
    })?;
    netlink.refresh(&used)?;
    for address in USED {
        let state = state(&router, address)?;
        ensure!(state == "FAILED" || state == "gone", "{address} was brought back: {state}");
    }
    Ok(())
}

#[test]
fn entries_that_are_not_ours_to_touch_stay_as_they_are() -> Result<()> {
    let (_lab, router, _host) = lab("hitkeep")?;
    // Nobody has these addresses: what is probed is soon found to be gone.
    for family in ["ipv4", "ipv6"] {
        router.sysctl(&format!("net.{family}.neigh.eth0.delay_first_probe_time"), "60")?;
    }
    let mut netlink = router.enter(Netlink::open)??;
    let add = |address: &str, rest: &[&str]| {
        let arguments = [&["ip", "neigh", "add", address, "dev", "eth0", "lladdr", "02:00:00:00:00:09"], rest].concat();
        router.run(arguments)
    };
    for net in ["192.0.2.", "2001:db8::"] {
        let of = |host: &str| format!("{net}{host}");
        add(&of("10"), &["nud", "permanent"])?;
        add(&of("11"), &["nud", "noarp"])?;
        add(&of("12"), &["nud", "stale", "extern_learn"])?;
        add(&of("14"), &["nud", "stale"])?;
        let keys =
            ["10", "11", "12", "13", "14"].iter().map(|host| key(&router, &of(host))).collect::<Result<Vec<_>>>()?;
        netlink.refresh(&keys)?;
        ensure!(state(&router, &of("10"))? == "PERMANENT" && state(&router, &of("11"))? == "NOARP");
        let learned = entry(&router, &of("12"))?.context("the learned entry is gone")?;
        ensure!(learned.get("extern_learn").is_some(), "{learned}");
        ensure!(state(&router, &of("12"))? != "STALE", "it was not reported as used");
        ensure!(entry(&router, &of("13"))?.is_none(), "an entry was created");
        ensure!(state(&router, &of("14"))? == "DELAY", "it was not reported as used");
    }
    // An interface that is gone is no error.
    netlink.refresh(&[NeighbourKey { ifindex: 9999, address: "192.0.2.1".parse()? }])?;
    router.run(["ip", "link", "del", "eth0"])?;
    if netlink.refresh(&[NeighbourKey { ifindex: 2, address: "192.0.2.14".parse()? }]).is_err() {
        bail!("a neighbour of an interface that is gone is an error");
    }
    Ok(())
}
