//! FRR inside a node: zebra and routing daemons with files of their own.

use crate::{Node, Process, wait_for};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

const DAEMONS: &str = "/usr/lib/frr";

/// zebra and routing daemons of one node; they end when this is dropped.
pub struct Frr {
    node: Node,
    folder: PathBuf,
    daemons: Vec<Process>,
}

impl Frr {
    /// Starts zebra and bgpd with a configuration (`router bgp …`), and waits until they answer.
    pub fn start(node: &Node, bgpd: &str) -> Result<Frr> {
        Self::start_daemons(node, &[("bgpd", bgpd)])
    }

    /// The same with ospfd (`router ospf …`).
    pub fn start_ospf(node: &Node, ospfd: &str) -> Result<Frr> {
        Self::start_daemons(node, &[("ospfd", ospfd)])
    }

    /// Starts zebra and these daemons (bgpd, ospfd, bfdd), each with its configuration, and waits until they answer.
    pub fn start_daemons(node: &Node, daemons: &[(&str, &str)]) -> Result<Frr> {
        let folder = node.folder("frr");
        std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // The daemons give up root for the user that their package made; their sockets and pid files go here.
        node.run(["chown", "frr:frr", &folder.display().to_string()])?;
        let mut frr = Frr { node: node.clone(), folder, daemons: Vec::new() };
        frr.start_daemon("zebra", "")?;
        wait_for(Duration::from_secs(20), "zebra's socket", || frr.folder.join("zserv").exists().then_some(()))
            .with_context(|| frr.daemons[0].log())?;
        for (daemon, configuration) in daemons {
            frr.start_daemon(daemon, configuration)?;
            let question = match *daemon {
                "ospfd" => "show ip ospf json",
                "bfdd" => "show bfd peers json",
                _ => "show bgp summary json",
            };
            wait_for(Duration::from_secs(20), &format!("{daemon}'s terminal"), || frr.vtysh(question).ok())
                .with_context(|| frr.daemons.iter().map(Process::log).collect::<String>())?;
        }
        Ok(frr)
    }

    fn start_daemon(&mut self, daemon: &str, configuration: &str) -> Result<()> {
        let file = |name: &str| self.folder.join(name).display().to_string();
        std::fs::write(self.folder.join(format!("{daemon}.conf")), configuration)?;
        let program = format!("{DAEMONS}/{daemon}");
        let (configuration, pid) = (file(&format!("{daemon}.conf")), file(&format!("{daemon}.pid")));
        // Without the TCP terminal: nothing here needs it.
        let (own, socket, control) = (self.folder.display().to_string(), file("zserv"), file("bfdd.sock"));
        let mut arguments = vec![&program as &str, "-f", &configuration, "-i", &pid];
        arguments.extend(["-P", "0", "-z", &socket, "--vty_socket", &own]);
        if daemon == "bfdd" {
            arguments.extend(["--bfdctl", &control]);
        }
        self.daemons.push(self.node.spawn(arguments)?);
        Ok(())
    }

    /// Runs commands in vtysh, one after the other, and gives what they wrote.
    pub fn vtysh_all(&self, commands: &[&str]) -> Result<String> {
        let folder = self.folder.display().to_string();
        let commands = commands.iter().flat_map(|c| ["-c", c]);
        self.node.run(["vtysh", "--vty_socket", &folder].into_iter().chain(commands))
    }

    /// Runs one `show … json` command.
    pub fn vtysh(&self, command: &str) -> Result<Value> {
        let text = self.vtysh_all(&[command])?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Waits until the session with `peer` is established.
    pub fn wait_established(&self, peer: &str, limit: Duration) -> Result<()> {
        let command = format!("show bgp neighbors {peer} json");
        wait_for(limit, &format!("BGP session with {peer} in node {}", self.node.name()), || {
            (self.vtysh(&command).ok()?[peer]["bgpState"] == "Established").then_some(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lab;

    #[test]
    fn a_route_travels_by_bgp() -> Result<()> {
        // upstream 192.0.2.1 eth0 ---- eth0 192.0.2.2 router
        let lab = Lab::new("frr")?;
        let (upstream, router) = (lab.node("upstream")?, lab.node("router")?);
        lab.link((&upstream, "eth0"), (&router, "eth0"))?;
        upstream.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "eth0"])?;
        router.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "eth0"])?;
        upstream.run(["ip", "route", "add", "blackhole", "203.0.113.0/24"])?;
        let open = "no bgp ebgp-requires-policy\n no bgp network import-check\n timers bgp 1 3";
        let _upstream = Frr::start(
            &upstream,
            &format!("router bgp 64496\n {open}\n neighbor 192.0.2.2 remote-as 64497\n network 203.0.113.0/24\n"),
        )?;
        let frr = Frr::start(
            &router,
            &format!(
                "router bgp 64497\n {open}\n neighbor 192.0.2.1 remote-as 64496\n neighbor 192.0.2.1 timers connect 1\n"
            ),
        )?;
        frr.wait_established("192.0.2.1", Duration::from_secs(30))?;
        wait_for(Duration::from_secs(20), "the route in the kernel", || {
            let routes = router.run(["ip", "route", "show", "203.0.113.0/24"]).ok()?;
            routes.contains("via 192.0.2.1 dev eth0 proto bgp").then_some(())
        })
    }
}
