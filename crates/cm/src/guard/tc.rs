//! Traffic control: qdiscs that shape, reorder or drop beyond what a full queue does, filters, and tcx programs.
//!
//! An interface's own queue (noqueue, pfifo_fast, fq_codel, mq over those, …) only matters when it fills, so forwarding
//! past it is what Linux does as long as the device keeps up. Filters at ingress and clsact decide over packets, and so
//! do those on a queue that classifies by them. Changes are announced (RTNLGRP_TC), except for the queue an interface
//! gets by default when it comes up, hence the link notifications, and for tcx programs, which are asked for at every
//! poll while there are programs that it could attach. Sources: net/sched/sch_api.c, cls_api.c, sch_*.c (Linux 6.1),
//! kernel/bpf/tcx.c (6.6).

use super::bpf::{PROG_TYPE_CLASSIFIER, Programs, Tcx};
use super::nl::{self, Message, Netlink, Wakeup, attrs, find, ne32, text_of};
use super::tcx::Asker;
use super::{Finding, POLL, can_be_port, candidates};
use crate::error::CmError;
use crate::watch::{PortIndex, Watcher};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use towpath_fpc::{PolicySource, Scope};
use towpath_tables::Reason;
use towpath_tables::flow::ACCEPT_PROGRAM;
use towpath_tables::mapping::PROGRAMS;

/// RTNLGRP_LINK, RTNLGRP_TC
const GROUPS: [u32; 2] = [1, 4];
const NEWQDISC: u16 = 36;
const GETQDISC: u16 = 38;
const NEWTFILTER: u16 = 44;
const GETTFILTER: u16 = 46;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const BPF_NAME: u16 = 7;
const FQ_FLOW_MAX_RATE: u16 = 7;
/// Parents of the filters of clsact; `ingress` takes the first too.
const AT_INGRESS: u32 = 0xffff_fff2;
const AT_EGRESS: u32 = 0xffff_fff3;

/// Programs of our own: one changes nothing, and what the others do to packets the fast path does, too.
static OWN: [&str; 3] = [ACCEPT_PROGRAM, PROGRAMS[0], PROGRAMS[1]];

/// The watcher of traffic control.
pub struct Tc {
    wakeup: Wakeup,
    netlink: Netlink,
    read: bool,
    findings: Vec<Finding>,
    /// False once the kernel has said that it has no tcx
    has_tcx: bool,
    /// What tcx could attach
    classifiers: Programs,
    asker: Asker,
}

impl Tc {
    /// Watches the thread's network namespace.
    pub fn new() -> Result<Self, CmError> {
        let open = |e| CmError::io("tc: netlink socket", e);
        Ok(Self {
            wakeup: Wakeup::join(NETLINK_ROUTE, &GROUPS).map_err(open)?,
            netlink: Netlink::open(NETLINK_ROUTE).map_err(open)?,
            read: false,
            findings: Vec::new(),
            has_tcx: true,
            classifiers: Programs::of(PROG_TYPE_CLASSIFIER),
            asker: Asker::new(&OWN)?,
        })
    }

    fn refresh(&mut self) -> Result<(), CmError> {
        if !self.wakeup.drain("tc notifications")? && self.read {
            return Ok(());
        }
        self.read = false;
        self.findings.clear();
        let mut asked = BTreeSet::new();
        for qdisc in self.netlink.dump("qdiscs", GETQDISC, &tcmsg(0, 0), qdisc)? {
            if !qdisc.passes {
                let detail = format!("qdisc {} {}", qdisc.kind, handle(qdisc.handle));
                self.findings.push(Finding::new(Scope::Egress(qdisc.ifindex, None), Reason::PolicyTc, detail));
            }
            for (parent, scope) in qdisc.classifies() {
                if asked.insert((qdisc.ifindex, parent)) {
                    let filters = self.filters(&qdisc, parent, scope)?;
                    self.findings.extend(filters);
                }
            }
        }
        self.read = true;
        Ok(())
    }

    /// The filters on a place of the interface, shared blocks included.
    fn filters(&mut self, qdisc: &Qdisc, parent: u32, scope: Scope) -> Result<Option<Finding>, CmError> {
        let what = format!("tc filters of interface {}", qdisc.ifindex);
        let kinds = match self.netlink.dump(&what, GETTFILTER, &tcmsg(qdisc.ifindex, parent), filter) {
            // The interface or qdisc went meanwhile.
            Err(CmError::Kernel { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENODEV | libc::ENOENT)) =>
            {
                return Ok(None);
            }
            result => result?,
        };
        let Some(kind) = kinds.first() else { return Ok(None) };
        let place = match scope {
            Scope::Ingress(..) => "ingress",
            _ => "egress",
        };
        let detail = format!("tc filter {kind} on {} at {place}", qdisc.kind);
        Ok(Some(Finding::new(scope, Reason::PolicyTc, detail)))
    }

    fn tcx(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        if !self.has_tcx || !self.classifiers.may_exist()? {
            return Ok(Vec::new());
        }
        let Some(attached) = self.asker.ask(candidates(ports).map(|port| port.ifindex).collect())? else {
            self.has_tcx = false;
            return Ok(Vec::new());
        };
        let finding = |(ifindex, place, number)| {
            let scope = match place {
                Tcx::Ingress => Scope::Ingress(ifindex, None),
                Tcx::Egress => Scope::Egress(ifindex, None),
            };
            let detail = super::count(number as usize, "BPF program") + " attached by tcx";
            Finding::new(scope, Reason::PolicyTc, detail)
        };
        Ok(attached.into_iter().map(finding).collect())
    }
}

impl Watcher for Tc {
    fn name(&self) -> &'static str {
        "tc"
    }

    fn source(&self) -> PolicySource {
        PolicySource::Tc
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wakeup.fd(), self.asker.fd()]
    }

    fn interval(&self) -> Option<Duration> {
        self.has_tcx.then_some(POLL)
    }

    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError> {
        self.asker.hear();
        self.refresh().inspect_err(|_| self.read = false)?;
        let at_port = |finding: &&Finding| match finding.scope {
            Scope::Ingress(ifindex, _) | Scope::Egress(ifindex, _) => ports.get(ifindex).is_none_or(can_be_port),
            _ => true,
        };
        let mut findings: Vec<_> = self.findings.iter().filter(at_port).cloned().collect();
        findings.extend(self.tcx(ports)?);
        Ok(findings)
    }

    fn has_lost(&mut self) -> bool {
        self.wakeup.take_lost()
    }
}

/// tcmsg: family, three bytes of padding, interface, handle, parent, info.
fn tcmsg(ifindex: u32, parent: u32) -> Vec<u8> {
    [0, ifindex, 0, parent, 0].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// "1:2" as tc writes it.
fn handle(handle: u32) -> String {
    format!(
        "{:x}:{}",
        handle >> 16,
        if handle & 0xffff == 0 { String::new() } else { format!("{:x}", handle & 0xffff) }
    )
}

#[derive(PartialEq, Eq, Debug)]
struct Qdisc {
    ifindex: u32,
    handle: u32,
    kind: String,
    /// Packets pass it as they come while the device keeps up
    passes: bool,
}

impl Qdisc {
    /// The parents whose filters it runs, and what packets they see.
    fn classifies(&self) -> Vec<(u32, Scope)> {
        let (ingress, egress) = (Scope::Ingress(self.ifindex, None), Scope::Egress(self.ifindex, None));
        match self.kind.as_str() {
            "ingress" => vec![(AT_INGRESS, ingress)],
            "clsact" => vec![(AT_INGRESS, ingress), (AT_EGRESS, egress)],
            "fq_codel" if self.handle != 0 => vec![(self.handle, egress)],
            _ => Vec::new(),
        }
    }
}

fn qdisc(message: Message<'_>) -> Result<Option<Qdisc>, CmError> {
    if message.kind != NEWQDISC {
        return Ok(None);
    }
    let (ifindex, handle, attributes) = tc_object("qdiscs", &message)?;
    let kind = find(&attributes, TCA_KIND).map(text_of).unwrap_or_default();
    let options = find(&attributes, TCA_OPTIONS).unwrap_or_default();
    let passes = match kind.as_str() {
        "noqueue" | "noop" | "pfifo_fast" | "pfifo" | "bfifo" | "mq" | "fq_codel" | "ingress" | "clsact" => true,
        // With a rate per flow fq paces what is forwarded too (sch_fq.c).
        "fq" => {
            let rate = find(&attrs("qdiscs", options)?, FQ_FLOW_MAX_RATE).and_then(ne32);
            rate.is_none_or(|rate| rate == u32::MAX)
        }
        _ => false,
    };
    Ok(Some(Qdisc { ifindex, handle, kind, passes }))
}

/// The kind of a filter, unless it is nothing that the fast path does not repeat: programs of our own, and what stands
/// before the programs of a priority, without any options (cls_api.c, tcf_chain_dump).
fn filter(message: Message<'_>) -> Result<Option<String>, CmError> {
    if message.kind != NEWTFILTER {
        return Ok(None);
    }
    let what = "tc filters";
    let (_, _, attributes) = tc_object(what, &message)?;
    let kind = find(&attributes, TCA_KIND).map(text_of).unwrap_or_default();
    if kind == "bpf" {
        let Some(options) = find(&attributes, TCA_OPTIONS) else { return Ok(None) };
        let name = find(&attrs(what, options)?, BPF_NAME).map(text_of);
        if name.is_some_and(|name| OWN.contains(&name.as_str())) {
            return Ok(None);
        }
    }
    Ok(Some(kind))
}

/// Interface, handle and attributes of a qdisc or filter.
fn tc_object<'a>(what: &str, message: &Message<'a>) -> Result<(u32, u32, Vec<(u16, &'a [u8])>), CmError> {
    let short = || CmError::decode(what, "shorter than its header");
    let (header, attributes) = message.payload.split_first_chunk::<20>().ok_or_else(short)?;
    let word = |at: usize| header.get(at..).and_then(nl::ne32).ok_or_else(short);
    Ok((word(4)?, word(8)?, attrs(what, attributes)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: &str, options: &[u8]) -> Vec<u8> {
        let mut payload: Vec<u8> =
            [0u32, 7, 0x8001_0000, 0xffff_ffff, 2].iter().flat_map(|w| w.to_ne_bytes()).collect();
        payload.extend(nl::attr(TCA_KIND, format!("{kind}\0").as_bytes()));
        payload.extend(nl::attr(TCA_OPTIONS, options));
        payload
    }

    fn decoded(kind: &str, options: &[u8]) -> Qdisc {
        qdisc(Message { kind: NEWQDISC, payload: &message(kind, options) }).unwrap().unwrap()
    }

    #[test]
    fn queues_pass_and_shapers_do_not() {
        for kind in ["noqueue", "pfifo_fast", "mq", "fq_codel", "clsact", "fq"] {
            assert!(decoded(kind, &[]).passes, "{kind}");
        }
        for kind in ["tbf", "htb", "netem", "prio", "cake", "from-the-future"] {
            assert!(!decoded(kind, &[]).passes, "{kind}");
        }
        assert!(decoded("fq", &nl::attr(FQ_FLOW_MAX_RATE, &u32::MAX.to_ne_bytes())).passes);
        assert!(!decoded("fq", &nl::attr(FQ_FLOW_MAX_RATE, &1000u32.to_ne_bytes())).passes);
    }

    #[test]
    fn filters_are_looked_for_where_they_can_be() {
        let parents = |kind| decoded(kind, &[]).classifies().iter().map(|(parent, _)| *parent).collect::<Vec<_>>();
        assert_eq!(parents("clsact"), [AT_INGRESS, AT_EGRESS]);
        assert_eq!(parents("fq_codel"), [0x8001_0000]);
        assert_eq!(parents("pfifo_fast"), []);
        assert_eq!(handle(0x8001_0000), "8001:");
        assert_eq!(handle(0x0001_0020), "1:20");
    }

    #[test]
    fn the_program_that_notes_what_is_accepted_is_not_in_the_way() {
        let read = |kind: &str, options: Option<&str>| {
            let mut payload = message(kind, &nl::attr(BPF_NAME, options.unwrap_or_default().as_bytes()));
            payload.truncate(if options.is_some() { payload.len() } else { 20 + nl::attr(TCA_KIND, b"bpf\0").len() });
            filter(Message { kind: NEWTFILTER, payload: &payload }).unwrap()
        };
        assert_eq!(read("bpf", Some("towpath_accept\0")), None);
        assert_eq!(read("bpf", Some("towpath_accept2\0")).as_deref(), Some("bpf"));
        assert_eq!(read("bpf", Some("other\0")).as_deref(), Some("bpf"));
        assert_eq!(read("bpf", None), None, "the head of a priority");
        assert_eq!(read("u32", Some("towpath_accept\0")).as_deref(), Some("u32"));
    }

    #[test]
    fn truncated_messages_are_errors() {
        let payload = message("tbf", &[1, 2, 3, 4]);
        for length in 0..20 {
            assert!(qdisc(Message { kind: NEWQDISC, payload: &payload[..length] }).is_err());
        }
    }
}
