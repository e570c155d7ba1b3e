//! The tc program on a port's egress hook that notes what Linux transmits of flows: put on, replaced without a gap, taken
//! off. From Linux 6.6 on it is in a link (tcx), which is pinned as XDP's links are. Before, it is a filter of a clsact qdisc
//! (net/sched/cls_bpf.c); a marker beside the pins says that there is one, and another that the qdisc came with it.

use crate::bpffs::PinDir;
use crate::error::{Error, Result};
use crate::netlink::{HEADER, Socket, attributes, word16, word32};
use crate::program::NAME_ACCEPT;
use crate::sys::{self, AttachType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Puts the program on an interface, in place of an older one. Nothing is done if the interface is gone.
pub(crate) fn put_on(dir: &PinDir, program: BorrowedFd<'_>, index: u32) -> Result<()> {
    let failed = |e| Error::privileged(format!("put the tc program on interface {index}"), "CAP_NET_ADMIN", e);
    if let Ok(link) = sys::get_pinned(&dir.pin(&link_pin(index))) {
        return ignore_gone(sys::link_update(link.as_fd(), program)).map_err(failed);
    }
    if !dir.pin(&filter_mark(index)).is_dir() {
        match sys::link_create(program, index, AttachType::TcxEgress, 0) {
            Ok(link) => {
                return sys::pin(link.as_fd(), &dir.pin(&link_pin(index)))
                    .map_err(|e| Error::io(format!("pin the link of the tc program on interface {index}"), e));
            }
            // Linux before 6.6 does not know what it is to be attached to.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return ignore_gone(Err(e)).map_err(failed),
        }
    }
    ignore_gone(put_filter_on(dir, program, index)?).map_err(failed)
}

/// Whether a program was put on an interface.
pub(crate) fn is_on(dir: &PinDir, index: u32) -> bool {
    dir.pin(&filter_mark(index)).is_dir() || sys::get_pinned(&dir.pin(&link_pin(index))).is_ok()
}

/// Takes the program off an interface, if it is there.
pub(crate) fn take_off(dir: &PinDir, index: u32) -> Result<()> {
    let failed = |e| Error::privileged(format!("take the tc program off interface {index}"), "CAP_NET_ADMIN", e);
    if let Ok(link) = sys::get_pinned(&dir.pin(&link_pin(index))) {
        ignore_gone(sys::link_detach(link.as_fd())).map_err(failed)?;
        dir.remove(&link_pin(index))?;
    }
    if dir.pin(&filter_mark(index)).is_dir() {
        ignore_gone(change(DELETE_FILTER, 0, &Message::filter(index, None))).map_err(failed)?;
        dir.remove(&filter_mark(index))?;
    }
    if dir.pin(&qdisc_mark(index)).is_dir() {
        // What somebody has added since stays, and the qdisc with it.
        if has_no_filter(index).map_err(failed)? {
            ignore_gone(change(DELETE_QDISC, 0, &Message::clsact(index))).map_err(failed)?;
        }
        dir.remove(&qdisc_mark(index))?;
    }
    Ok(())
}

/// As a filter. Markers come first, so that nothing is left behind unknown.
fn put_filter_on(dir: &PinDir, program: BorrowedFd<'_>, index: u32) -> Result<io::Result<()>> {
    if !dir.pin(&filter_mark(index)).is_dir() {
        match change(NEW_QDISC, CREATE | EXCLUSIVE, &Message::clsact(index)) {
            Ok(()) => dir.mark(&qdisc_mark(index))?,
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => return Ok(Err(e)),
        }
        dir.mark(&filter_mark(index))?;
    }
    Ok(change(NEW_FILTER, CREATE | REPLACE, &Message::filter(index, Some(program))))
}

/// The interface went away and took the program with it.
fn ignore_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV | libc::ENOENT)) => Ok(()),
        done => done,
    }
}

fn link_pin(index: u32) -> String {
    format!("accept_{index}")
}

fn filter_mark(index: u32) -> String {
    format!("acceptfilter_{index}")
}

fn qdisc_mark(index: u32) -> String {
    format!("clsact_{index}")
}

// linux/rtnetlink.h, linux/netlink.h
const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const DUMP: u16 = 0x300;

// linux/pkt_sched.h: the qdisc clsact, and its two hooks
const CLSACT: u32 = 0xffff_fff1;
const INGRESS_HOOK: u32 = 0xffff_fff2;
const EGRESS_HOOK: u32 = 0xffff_fff3;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Ours among the filters: priority, and ETH_P_ALL as on the wire
const FILTER_INFO: u32 = 0x7470 << 16 | 3u16.to_be() as u32;
const FILTER_HANDLE: u32 = 1;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_cls.h
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const DIRECT_ACTION: u32 = 1;

/// `struct tcmsg` and attributes.
struct Message(Vec<u8>);

impl Message {
    fn new(index: u32, handle: u32, parent: u32, info: u32) -> Self {
        Self([0, index, handle, parent, info].map(u32::to_ne_bytes).concat())
    }

    fn clsact(index: u32) -> Self {
        Self::new(index, CLSACT_HANDLE, CLSACT, 0).with(TCA_KIND, b"clsact\0")
    }

    /// Our filter, with a program that it is to run.
    fn filter(index: u32, program: Option<BorrowedFd<'_>>) -> Self {
        let message = Self::new(index, FILTER_HANDLE, EGRESS_HOOK, FILTER_INFO).with(TCA_KIND, b"bpf\0");
        let Some(program) = program else { return message };
        let options = Self(Vec::new())
            .with(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes())
            .with(TCA_BPF_NAME, format!("{NAME_ACCEPT}\0").as_bytes())
            .with(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
        message.with(TCA_OPTIONS, &options.0)
    }

    fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        let len = 4 + payload.len();
        self.0.extend([len as u16, kind].map(u16::to_ne_bytes).as_flattened());
        self.0.extend(payload);
        self.0.resize(self.0.len() + len.next_multiple_of(4) - len, 0);
        self
    }
}

fn ask(kind: u16, flags: u16, message: &Message) -> io::Result<Vec<Vec<u8>>> {
    let len = (HEADER + message.0.len()) as u32;
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend([kind, flags | REQUEST].map(u16::to_ne_bytes).as_flattened());
    // Sequence number and port: this socket asks one thing at a time.
    bytes.extend([0; 8]);
    bytes.extend(&message.0);
    Socket::open(netlink_sys::protocols::NETLINK_ROUTE)?.request(&bytes)
}

fn change(kind: u16, flags: u16, message: &Message) -> io::Result<()> {
    ask(kind, flags | ACKNOWLEDGE, message).map(drop)
}

/// Whether the qdisc clsact of an interface has no filters on either hook.
fn has_no_filter(index: u32) -> io::Result<bool> {
    for hook in [INGRESS_HOOK, EGRESS_HOOK] {
        let answers = match ask(GET_FILTER, DUMP, &Message::new(index, 0, hook, 0)) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => return Ok(false),
            answers => answers?,
        };
        let is_filter = |answer: &Vec<u8>| {
            let rest = answer.get(HEADER + 20..).unwrap_or_default();
            word16(answer, 4) == NEW_FILTER
                && word32(answer, HEADER + 4) == index
                && attributes(rest).any(|(kind, _)| kind == TCA_KIND)
        };
        if answers.iter().any(is_filter) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpffs::netns_inode;

    /// A program that says TC_ACT_UNSPEC.
    fn program() -> std::os::fd::OwnedFd {
        const CODE: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
        sys::prog_load(NAME_ACCEPT, c"Dual MIT/GPL", AttachType::TcxEgress, &CODE, &mut []).expect("a program")
    }

    fn filters() -> usize {
        let answers = ask(GET_FILTER, DUMP, &Message::new(1, 0, EGRESS_HOOK, 0)).unwrap_or_default();
        let ours = |answer: &&Vec<u8>| {
            let text = NAME_ACCEPT.as_bytes();
            word32(answer, HEADER + 16) == FILTER_INFO && answer.windows(text.len()).any(|window| window == text)
        };
        answers.iter().filter(ours).count()
    }

    fn has_qdisc() -> bool {
        change(NEW_QDISC, REPLACE, &Message::clsact(1)).is_ok()
    }

    /// As with Linux before 6.6, in a network namespace of this thread's own.
    #[test]
    fn a_filter_is_replaced_and_goes_with_the_qdisc_that_came_with_it() {
        // SAFETY: gives this thread a network namespace of its own, and changes nothing else.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
        let mut dir = PinDir::find(netns_inode().unwrap()).unwrap();
        dir.create().unwrap();
        for _ in 0..3 {
            put_filter_on(&dir, program().as_fd(), 1).unwrap().unwrap();
            assert_eq!(filters(), 1);
        }
        take_off(&dir, 1).unwrap();
        assert!(!has_qdisc(), "it came with the filter");
        assert_eq!(dir.names().unwrap(), [""; 0]);
        take_off(&dir, 1).unwrap();

        change(NEW_QDISC, CREATE | EXCLUSIVE, &Message::clsact(1)).unwrap();
        put_filter_on(&dir, program().as_fd(), 1).unwrap().unwrap();
        take_off(&dir, 1).unwrap();
        assert!(has_qdisc() && filters() == 0, "it was there before");
        change(DELETE_QDISC, 0, &Message::clsact(1)).unwrap();

        put_filter_on(&dir, program().as_fd(), 1).unwrap().unwrap();
        let theirs = program();
        let other = Message::new(1, 2, INGRESS_HOOK, 5 << 16 | u32::from(3u16.to_be())).with(TCA_KIND, b"bpf\0");
        let options = Message(Vec::new())
            .with(TCA_BPF_FD, &theirs.as_raw_fd().to_ne_bytes())
            .with(TCA_BPF_NAME, b"other\0")
            .with(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
        change(NEW_FILTER, CREATE | EXCLUSIVE, &other.with(TCA_OPTIONS, &options.0)).unwrap();
        take_off(&dir, 1).unwrap();
        assert!(has_qdisc() && filters() == 0, "somebody uses it");
        assert!(!has_no_filter(1).unwrap());
        put_filter_on(&dir, program().as_fd(), 99_999).unwrap().unwrap_err();
        dir.remove_all().unwrap();
    }
}
