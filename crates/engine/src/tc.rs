//! tc programs on interfaces: the one that notes what Linux transmits of flows, and those that translate addresses. Put
//! on, replaced without a gap, taken off. From Linux 6.6 on it is in a link (tcx), which is pinned as XDP's links are.
//! Before, it is a filter of a clsact qdisc (net/sched/cls_bpf.c); a marker beside the pins says that there is one, and
//! another that the qdisc came with one of them.

use crate::bpffs::PinDir;
use crate::error::{Error, Result};
use crate::netlink::ask;
use crate::sys::{self, AttachType};
use RouteNetlinkMessage::{
    DelQueueDiscipline, DelTrafficFilter, GetTrafficFilter, NewQueueDiscipline, NewTrafficFilter,
};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use towpath_tables::flow::ACCEPT_PROGRAM;
use towpath_tables::mapping::PROGRAMS;

/// One of the programs, and where it stands on an interface.
#[derive(Debug)]
pub(crate) struct Hook {
    /// Its name, in the object and in the kernel
    pub(crate) name: &'static str,
    /// What its pins and markers are called
    pin: &'static str,
    tcx: AttachType,
    /// Of the qdisc clsact: `TcHandle::MIN_INGRESS` or `MIN_EGRESS`
    minor: u16,
    /// Among the filters of the hook
    priority: u32,
}

/// Notes what Linux transmits of flows.
pub(crate) static ACCEPT: Hook = Hook {
    name: ACCEPT_PROGRAM,
    pin: "accept",
    tcx: AttachType::TcxEgress,
    minor: TcHandle::MIN_EGRESS,
    priority: 0x7470,
};

/// Translate what Linux transmits, and what it receives: by `Way`. As in links, they come before filters of others: one that ends
/// with a verdict would get packets around them. They are not put on where somebody has this priority already.
pub(crate) static TRANSLATE: [Hook; 2] = [
    Hook { name: PROGRAMS[0], pin: "natout", tcx: AttachType::TcxEgress, minor: TcHandle::MIN_EGRESS, priority: 1 },
    Hook { name: PROGRAMS[1], pin: "natin", tcx: AttachType::TcxIngress, minor: TcHandle::MIN_INGRESS, priority: 1 },
];

/// Puts the program on an interface, in place of an older one. Nothing is done if the interface is gone.
pub(crate) fn put_on(dir: &PinDir, hook: &Hook, program: BorrowedFd<'_>, index: u32) -> Result<()> {
    let failed = |e| Error::privileged(format!("put the tc program on interface {index}"), "CAP_NET_ADMIN", e);
    if let Ok(link) = sys::get_pinned(&dir.pin(&hook.link(index))) {
        match sys::link_update(link.as_fd(), program) {
            // That interface is gone; there may be another one of this index.
            Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => dir.remove(&hook.link(index))?,
            done => return done.map_err(failed),
        }
    }
    if !dir.pin(&hook.filter(index)).is_dir() {
        match sys::link_create(program, index, hook.tcx, 0) {
            Ok(link) => {
                return sys::pin(link.as_fd(), &dir.pin(&hook.link(index)))
                    .map_err(|e| Error::io(format!("pin the link of the tc program on interface {index}"), e));
            }
            // Linux before 6.6 does not know what it is to be attached to.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return ignore_gone(Err(e)).map_err(failed),
        }
    }
    ignore_gone(put_filter_on(dir, hook, program, index)?).map_err(failed)
}

/// Whether a program was put on an interface.
pub(crate) fn is_on(dir: &PinDir, hook: &Hook, index: u32) -> bool {
    dir.pin(&hook.filter(index)).is_dir() || sys::get_pinned(&dir.pin(&hook.link(index))).is_ok()
}

/// Whether it still runs there: not if the interface that it was put on is gone, or somebody took it off.
pub(crate) fn runs_on(dir: &PinDir, hook: &Hook, index: u32) -> bool {
    if let Ok(link) = sys::get_pinned(&dir.pin(&hook.link(index))) {
        return sys::link_info(link.as_fd()).is_ok_and(|info| info.ifindex == index);
    }
    let ours = |filter: &TcMessage| filter.header.info == hook.info();
    dir.pin(&hook.filter(index)).is_dir() && filters(index, hook.minor).is_ok_and(|all| all.iter().any(ours))
}

/// Takes the program off an interface, if it is there.
pub(crate) fn take_off(dir: &PinDir, hook: &Hook, index: u32) -> Result<()> {
    let failed = |e| Error::privileged(format!("take the tc program off interface {index}"), "CAP_NET_ADMIN", e);
    if let Ok(link) = sys::get_pinned(&dir.pin(&hook.link(index))) {
        ignore_gone(sys::link_detach(link.as_fd())).map_err(failed)?;
        dir.remove(&hook.link(index))?;
    }
    if dir.pin(&hook.filter(index)).is_dir() {
        match change(0, DelTrafficFilter(filter(hook, index, None))) {
            // The qdisc is gone.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            done => ignore_gone(done).map_err(failed)?,
        }
        dir.remove(&hook.filter(index))?;
    }
    let others = [&ACCEPT].into_iter().chain(&TRANSLATE).any(|hook| dir.pin(&hook.filter(index)).is_dir());
    if !others && dir.pin(&qdisc_mark(index)).is_dir() {
        // What somebody has added since stays, and the qdisc with it.
        if has_no_filter(index).map_err(failed)? {
            ignore_gone(change(0, DelQueueDiscipline(clsact(index)))).map_err(failed)?;
        }
        dir.remove(&qdisc_mark(index))?;
    }
    Ok(())
}

/// As a filter. Markers come first, so that nothing is left behind unknown.
fn put_filter_on(dir: &PinDir, hook: &Hook, program: BorrowedFd<'_>, index: u32) -> Result<io::Result<()>> {
    if !dir.pin(&hook.filter(index)).is_dir() {
        match change(NLM_F_CREATE | NLM_F_EXCL, NewQueueDiscipline(clsact(index))) {
            Ok(()) => dir.mark(&qdisc_mark(index))?,
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => return Ok(Err(e)),
        }
        dir.mark(&hook.filter(index))?;
    }
    Ok(change(NLM_F_CREATE | NLM_F_REPLACE, NewTrafficFilter(filter(hook, index, Some(program)))))
}

/// The interface went away and took the program with it.
fn ignore_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV | libc::ENOENT)) => Ok(()),
        done => done,
    }
}

impl Hook {
    fn link(&self, index: u32) -> String {
        format!("{}_{index}", self.pin)
    }

    fn filter(&self, index: u32) -> String {
        format!("{}filter_{index}", self.pin)
    }

    /// The interface on which this pin or marker says that the program is.
    pub(crate) fn index(&self, name: &str) -> Option<u32> {
        let rest = name.strip_prefix(self.pin)?;
        rest.strip_prefix("filter").unwrap_or(rest).strip_prefix('_')?.parse().ok()
    }

    /// Ours among the filters: priority, and ETH_P_ALL as on the wire
    const fn info(&self) -> u32 {
        self.priority << 16 | 3u16.to_be() as u32
    }
}

fn qdisc_mark(index: u32) -> String {
    format!("clsact_{index}")
}

const FILTER_HANDLE: u32 = 1;

/// One of the hooks of the qdisc clsact: `TcHandle::MIN_INGRESS` or `MIN_EGRESS`.
fn place(minor: u16) -> TcHandle {
    TcHandle { minor, ..TcHandle::CLSACT }
}

fn message(index: u32, handle: u32, parent: TcHandle, info: u32, attributes: Vec<TcAttribute>) -> TcMessage {
    let header = TcHeader { index: index as i32, handle: handle.into(), parent, info, ..TcHeader::default() };
    TcMessage::from_parts(header, attributes)
}

fn clsact(index: u32) -> TcMessage {
    let kind = TcAttribute::Kind("clsact".into());
    message(index, u32::from(TcHandle::CLSACT.major) << 16, TcHandle::CLSACT, 0, vec![kind])
}

/// Our filter, with a program that it is to run.
fn filter(hook: &Hook, index: u32, program: Option<BorrowedFd<'_>>) -> TcMessage {
    let mut attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.into())];
    attributes.extend(program.map(|program| runs(program, hook.name)));
    message(index, FILTER_HANDLE, place(hook.minor), hook.info(), attributes)
}

fn runs(program: BorrowedFd<'_>, name: &str) -> TcAttribute {
    TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ])
}

fn change(flags: u16, message: RouteNetlinkMessage) -> io::Result<()> {
    ask(message, NLM_F_ACK | flags).map(drop)
}

/// Whether the qdisc clsact of an interface has no filters on either hook. What cannot be read counts as one.
fn has_no_filter(index: u32) -> io::Result<bool> {
    for minor in [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS] {
        match filters(index, minor) {
            Ok(filters) if filters.is_empty() => {}
            Err(e)
                if !matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL))
                    && e.kind() != io::ErrorKind::InvalidData =>
            {
                return Err(e);
            }
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn filters(index: u32, minor: u16) -> io::Result<Vec<TcMessage>> {
    let answers = ask(GetTrafficFilter(message(index, 0, place(minor), 0, Vec::new())), NLM_F_DUMP)?;
    let filters = answers.into_iter().filter_map(|answer| match answer {
        NewTrafficFilter(filter) if filter.header.index == index as i32 => Some(filter),
        _ => None,
    });
    Ok(filters.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpffs::netns_inode;

    /// A program that says TC_ACT_UNSPEC.
    fn program() -> std::os::fd::OwnedFd {
        const CODE: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
        sys::prog_load(ACCEPT.name, c"Dual MIT/GPL", AttachType::TcxEgress, &CODE, None, &mut []).expect("a program")
    }

    fn ours() -> usize {
        let found = filters(1, TcHandle::MIN_EGRESS).unwrap_or_default();
        let name = TcOption::Bpf(TcFilterBpfOption::ProgName(ACCEPT.name.into()));
        let named = |a: &TcAttribute| matches!(a, TcAttribute::Options(options) if options.contains(&name));
        found.iter().filter(|f| f.header.info == ACCEPT.info() && f.attributes.iter().any(named)).count()
    }

    fn has_qdisc() -> bool {
        change(NLM_F_REPLACE, NewQueueDiscipline(clsact(1))).is_ok()
    }

    /// As with Linux before 6.6, in a network namespace of this thread's own.
    #[test]
    fn a_filter_is_replaced_and_goes_with_the_qdisc_that_came_with_it() {
        // SAFETY: gives this thread a network namespace of its own, and changes nothing else.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
        let mut dir = PinDir::find(netns_inode().unwrap()).unwrap();
        dir.create().unwrap();
        for _ in 0..3 {
            put_filter_on(&dir, &ACCEPT, program().as_fd(), 1).unwrap().unwrap();
            assert_eq!(ours(), 1);
        }
        take_off(&dir, &ACCEPT, 1).unwrap();
        assert!(!has_qdisc(), "it came with the filter");
        assert_eq!(dir.names().unwrap(), [""; 0]);
        take_off(&dir, &ACCEPT, 1).unwrap();

        change(NLM_F_CREATE | NLM_F_EXCL, NewQueueDiscipline(clsact(1))).unwrap();
        put_filter_on(&dir, &ACCEPT, program().as_fd(), 1).unwrap().unwrap();
        take_off(&dir, &ACCEPT, 1).unwrap();
        assert!(has_qdisc() && ours() == 0, "it was there before");
        change(0, DelQueueDiscipline(clsact(1))).unwrap();

        put_filter_on(&dir, &ACCEPT, program().as_fd(), 1).unwrap().unwrap();
        let theirs = program();
        let attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.into()), runs(theirs.as_fd(), "other")];
        let info = 5 << 16 | u32::from(3u16.to_be());
        let other = message(1, 2, place(TcHandle::MIN_INGRESS), info, attributes);
        change(NLM_F_CREATE | NLM_F_EXCL, NewTrafficFilter(other)).unwrap();
        take_off(&dir, &ACCEPT, 1).unwrap();
        assert!(has_qdisc() && ours() == 0, "somebody uses it");
        assert!(!has_no_filter(1).unwrap());
        put_filter_on(&dir, &ACCEPT, program().as_fd(), 99_999).unwrap().unwrap_err();
        dir.remove_all().unwrap();
    }
}
