//! The demo's network.
//!
//!     client                      router                         upstream                 server
//!     198.51.100.2/24 eth0 -- lan 198.51.100.1/24
//!                                 up1 192.0.2.1/30 ------- eth1 192.0.2.2/30
//!                                 up2 192.0.2.5/30 ------- eth2 192.0.2.6/30
//!                                                          eth0 203.0.113.1/24 --- eth0 203.0.113.10/24
//!
//! Router (AS 64497) and upstream (AS 64496) speak BGP over both links; the upstream announces the server's network and
//! a thousand more. up1 is preferred while its session stands.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;
use towpath_lab::{Frr, Lab, Node, wait_for};

/// Networks that the upstream announces besides the server's.
pub const NETWORKS: usize = 1000;
/// Where the traffic goes.
pub const SERVER: &str = "203.0.113.10";

/// The nodes and their routing daemons.
pub struct Network {
    /// Where traffic comes from
    pub client: Node,
    /// The router that is made faster
    pub router: Node,
    /// The provider
    pub upstream: Node,
    /// The router's routing daemons
    pub router_frr: Frr,
    /// The upstream's
    _upstream_frr: Frr,
    _server: Node,
    _lab: Lab,
}

impl Network {
    /// Makes the nodes, starts BGP and waits until the router knows all networks.
    pub fn start() -> Result<Network> {
        let lab = Lab::new("demo")?;
        let (client, router) = (lab.node("client")?, lab.node("router")?);
        let (upstream, server) = (lab.node("upstream")?, lab.node("server")?);
        lab.link((&client, "eth0"), (&router, "lan"))?;
        lab.link((&router, "up1"), (&upstream, "eth1"))?;
        lab.link((&router, "up2"), (&upstream, "eth2"))?;
        lab.link((&upstream, "eth0"), (&server, "eth0"))?;
        router.forward()?;
        upstream.forward()?;
        client.sh("ip address add 198.51.100.2/24 dev eth0; ip route add default via 198.51.100.1")?;
        router.sh("ip address add 198.51.100.1/24 dev lan; ip address add 192.0.2.1/30 dev up1; \
             ip address add 192.0.2.5/30 dev up2")?;
        upstream.sh("ip address add 192.0.2.2/30 dev eth1; ip address add 192.0.2.6/30 dev eth2; \
             ip address add 203.0.113.1/24 dev eth0")?;
        server.sh("ip address add 203.0.113.10/24 dev eth0; ip route add default via 203.0.113.1")?;
        let upstream_frr = Frr::start(&upstream, &upstream_configuration()?)?;
        let router_frr = Frr::start(&router, ROUTER_CONFIGURATION)?;
        let network =
            Network { client, router, upstream, router_frr, _upstream_frr: upstream_frr, _server: server, _lab: lab };
        for peer in ["192.0.2.2", "192.0.2.6"] {
            network.router_frr.wait_established(peer, Duration::from_secs(60))?;
        }
        wait_for(Duration::from_secs(60), "the upstream's networks in the router's kernel", || {
            (network.bgp_routes().ok()?.len() > NETWORKS && network.way_out().ok()? == "up1").then_some(())
        })?;
        // The upstream learns the way back by BGP, too.
        wait_for(Duration::from_secs(30), "an answer from the server", || {
            network.client.run(["ping", "-c", "1", "-W", "1", SERVER]).ok()
        })?;
        Ok(network)
    }

    /// Routes that BGP has put into the router's kernel, each in words.
    pub fn bgp_routes(&self) -> Result<BTreeSet<String>> {
        let routes = self.router.json(["ip", "-j", "route", "show", "proto", "bgp"])?;
        let routes = routes.as_array().context("ip gives no list of routes")?;
        Ok(routes.iter().map(|r| route(&r["dst"], &r["nhid"], &r["gateway"], &r["dev"])).collect())
    }

    /// The port by which the router's kernel reaches the server now.
    pub fn way_out(&self) -> Result<String> {
        let route = self.router.json(["ip", "-j", "route", "get", SERVER])?;
        Ok(route[0]["dev"].as_str().context("no route to the server")?.to_owned())
    }

    /// Shuts the preferred BGP session down or lets it come up again, and waits until Linux has the other way.
    pub fn prefer(&self, port: &str) -> Result<()> {
        let change = if port == "up1" { "no neighbor 192.0.2.2 shutdown" } else { "neighbor 192.0.2.2 shutdown" };
        self.router_frr.vtysh_all(&["configure terminal", "router bgp 64497", change])?;
        wait_for(Duration::from_secs(60), &format!("the route by {port}"), || {
            (self.way_out().ok()? == port).then_some(())
        })
    }
}

/// A route as Linux and Towpath both tell it: by its nexthop object if it has one.
pub fn route(prefix: &Value, object: &Value, gateway: &Value, port: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let via =
        object.as_u64().map_or_else(|| format!("via {} dev {}", text(gateway), text(port)), |id| format!("nhid {id}"));
    format!("{} {via}", text(prefix))
}

/// eBGP without import and export policies, and with timers short enough for a demo.
const OPEN: &str = "no bgp ebgp-requires-policy\n no bgp network import-check\n timers bgp 1 3\n";

const ROUTER_CONFIGURATION: &str = "router bgp 64497\n no bgp ebgp-requires-policy\n timers bgp 1 3\n \
    neighbor 192.0.2.2 remote-as 64496\n neighbor 192.0.2.2 timers connect 1\n \
    neighbor 192.0.2.6 remote-as 64496\n neighbor 192.0.2.6 timers connect 1\n \
    address-family ipv4 unicast\n  network 198.51.100.0/24\n  maximum-paths 1\n  neighbor 192.0.2.2 weight 200\n \
    exit-address-family\n";

fn upstream_configuration() -> Result<String> {
    let mut text = format!("router bgp 64496\n {OPEN}");
    for peer in ["192.0.2.1", "192.0.2.5"] {
        writeln!(text, " neighbor {peer} remote-as 64497\n neighbor {peer} timers connect 1")?;
    }
    writeln!(text, " address-family ipv4 unicast\n  network 203.0.113.0/24")?;
    for number in 0..NETWORKS {
        writeln!(text, "  network 198.18.{}.{}/26", number / 4, number % 4 * 64)?;
    }
    writeln!(text, " exit-address-family")?;
    Ok(text)
}
