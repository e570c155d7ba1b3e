//! `towpath nat`: mappings of addresses and of their ports, asked for by the operator and kept by FPM in the tables. What
//! goes by Linux is translated by tc programs on the ports, so those come before a port's first mapping and go after its last.

use crate::cli::{Nat, NatMapping, Output, Protocol};
use crate::control::{self, Request};
use crate::daemon::Daemon;
use crate::explain::Names;
use crate::read;
use crate::report;
use crate::text::table;
use crate::words;
use anyhow::{Context, Result, bail};
use std::net::{IpAddr, SocketAddr};
use towpath_fpc::Prefix;
use towpath_fpm::Mapping;
use towpath_tables::mappings::Ports;

/// `towpath nat …`
pub fn run(nat: &Nat) -> Result<()> {
    match nat {
        Nat::Add(mapping) => change(Request::NatAdd(mapping.clone())),
        Nat::Del(mapping) => change(Request::NatDel(mapping.clone())),
        Nat::List(output) => list(*output),
    }
}

fn change(request: Request) -> Result<()> {
    let _: bool = read::connect()?.ask(&request)?;
    Ok(())
}

fn list(output: Output) -> Result<()> {
    let mappings: report::Mappings = read::connect()?.ask(&Request::NatList)?;
    read::write_out(&if output.json { read::json(&mappings)? } else { text(&mappings) })
}

fn text(mappings: &report::Mappings) -> String {
    let row = |mapping: &report::Mapping| {
        let way = |of: &report::MappingWay| [of.packets, of.bytes, of.dropped].map(|number| number.to_string());
        let protocol = mapping.protocol.map_or_else(String::new, |protocol| words::transport(protocol.number()));
        let names = [&mapping.port, &protocol, &mapping.inside, &mapping.outside].map(String::clone);
        [&names[..], &way(&mapping.out), &way(&mapping.r#in)].concat()
    };
    let ways = [">out packets", ">bytes", ">dropped", ">in packets", ">bytes", ">dropped"];
    let heads = [&["port", "protocol", "inside", "outside"], &ways[..]].concat();
    table(&heads, &mappings.mappings.iter().map(row).collect::<Vec<_>>())
}

/// A prefix, or an address for the prefix that is it alone.
fn prefix(text: &str) -> Result<Prefix> {
    if text.parse::<SocketAddr>().is_ok() {
        bail!("{text} is of a port: say which with --protocol tcp or --protocol udp");
    }
    plain_prefix(text)
}

/// As `prefix`, where ports are told otherwise.
pub fn plain_prefix(text: &str) -> Result<Prefix> {
    let invalid = || format!("{text:?} is no address and no prefix");
    let (address, len) = text.split_once('/').unzip();
    let address: IpAddr = address.unwrap_or(text).parse().with_context(invalid)?;
    let len = match len {
        Some(len) => len.parse().with_context(invalid)?,
        None if address.is_ipv4() => 32,
        None => 128,
    };
    let prefix = Prefix::new(address, len).with_context(invalid)?;
    if prefix.address() != address {
        bail!("{text} has bits set behind its length; did you mean {prefix}?");
    }
    Ok(prefix)
}

/// An address, for the prefix that is it alone, and a port.
fn address_and_port(text: &str) -> Result<(Prefix, u16)> {
    let read: Option<SocketAddr> = text.parse().ok();
    let plain = read.map(|read| SocketAddr::new(read.ip(), read.port())).filter(|plain| Some(*plain) == read);
    let invalid =
        || format!("{text:?} is no address and port: with --protocol write ADDRESS:PORT, or [ADDRESS]:PORT for IPv6");
    let plain = plain.with_context(invalid)?;
    Ok((prefix(&plain.ip().to_string())?, plain.port()))
}

/// The prefixes inside and outside, and the ports.
fn ends(NatMapping { protocol, inside, outside, .. }: &NatMapping) -> Result<([Prefix; 2], Option<Ports>)> {
    let Some(protocol) = protocol else { return Ok(([prefix(inside)?, prefix(outside)?], None)) };
    let (inside, outside) = (address_and_port(inside)?, address_and_port(outside)?);
    let ports = Ports { protocol: protocol.number(), numbers: [inside.1, outside.1] };
    Ok(([inside.0, outside.0], Some(ports)))
}

impl Daemon {
    /// Adds or ends a mapping; it is in force when this returns. The line that answers.
    pub fn change_mapping(&mut self, request: &Request) -> String {
        control::answer(match request {
            Request::NatAdd(mapping) => self.add_mapping(mapping),
            Request::NatDel(mapping) => self.end_mapping(mapping),
            _ => Err(anyhow::anyhow!("this changes no mapping")),
        })
    }

    fn add_mapping(&mut self, mapping: &NatMapping) -> Result<bool> {
        let mapping = self.mapping(mapping)?;
        let first = !self.fpm.mapped_ports().contains(&mapping.ifindex);
        self.fpm.add_mapping(mapping).with_context(|| self.interface(mapping.ifindex))?;
        if first && let Err(error) = self.engine.translate(mapping.ifindex, true) {
            self.fpm.remove_mapping(&mapping)?;
            return Err(error.into());
        }
        self.sync();
        Ok(true)
    }

    fn end_mapping(&mut self, mapping: &NatMapping) -> Result<bool> {
        let mapping = self.mapping(mapping)?;
        self.fpm.remove_mapping(&mapping).with_context(|| self.interface(mapping.ifindex))?;
        self.sync();
        self.follow_mappings();
        Ok(true)
    }

    fn mapping(&self, mapping: &NatMapping) -> Result<Mapping> {
        let found = self.fpm.interfaces().find(|known| known.name == mapping.port);
        let ifindex = found.with_context(|| format!("there is no port {}", mapping.port))?.ifindex;
        let ([inside, outside], ports) = ends(mapping)?;
        Ok(Mapping { ifindex, inside, outside, ports })
    }

    /// Puts the tc programs on all ports with mappings, this binary's in place of a former daemon's, and takes them off
    /// others. Where they cannot be put on, the mappings end.
    pub fn take_up_mappings(&mut self) {
        for ifindex in self.fpm.mapped_ports() {
            if let Err(error) = self.engine.translate(ifindex, true) {
                tracing::error!("the mappings of {} are ended: {error}", self.interface(ifindex));
                self.fpm.keep_mappings(|of| of != ifindex);
            }
        }
        self.sync();
        self.follow_mappings();
    }

    /// Takes the tc programs off ports without mappings.
    pub fn follow_mappings(&self) {
        let mapped = self.fpm.mapped_ports();
        let left = self.engine.translated().map(|all| all.difference(&mapped).copied().collect::<Vec<_>>());
        let off = left.and_then(|left| left.into_iter().try_for_each(|ifindex| self.engine.translate(ifindex, false)));
        if let Err(error) = off {
            tracing::warn!("{error}");
        }
    }

    /// `towpath nat list`
    pub fn mappings(&self) -> report::Mappings {
        let mapping = |(mapping, totals): (Mapping, towpath_tables::mappings::MappingTotals)| {
            let way = |way: usize| report::MappingWay {
                packets: totals.packets[way],
                bytes: totals.bytes[way],
                dropped: totals.dropped[way],
            };
            report::Mapping {
                port: self.interface(mapping.ifindex),
                protocol: mapping.ports.and_then(|ports| Protocol::of_number(ports.protocol)),
                inside: mapping.inside().to_string(),
                outside: mapping.outside().to_string(),
                out: way(0),
                r#in: way(1),
            }
        };
        report::Mappings { mappings: self.fpm.mappings().map(mapping).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_addresses_with_or_without_a_length() {
        let read = |text: &str| prefix(text).map(|prefix| prefix.to_string()).map_err(|error| error.to_string());
        assert_eq!(read("192.0.2.1"), Ok("192.0.2.1/32".into()));
        assert_eq!(read("2001:db8::/32"), Ok("2001:db8::/32".into()));
        assert_eq!(read("2001:db8::1"), Ok("2001:db8::1/128".into()));
        assert!(read("192.0.2.1/24").unwrap_err().contains("did you mean 192.0.2.0/24?"));
        for wrong in ["", "eth0", "192.0.2.0/33", "192.0.2.0/", "192.0.2.0/-1", "2001:db8::/129"] {
            assert!(read(wrong).unwrap_err().contains("no address and no prefix"), "{wrong}");
        }
    }
}
