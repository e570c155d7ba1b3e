//! The bpf(2) commands, with the kernel's own error. aya-obj parses and relocates the program; aya itself would write
//! zeros over the global data of a program that is loaded against tables in use, and fall back to other ways of
//! attaching.

use aya_obj::generated::{
    bpf_attr, bpf_cmd, bpf_func_info, bpf_insn, bpf_link_info, bpf_map_info, bpf_map_type, bpf_prog_info, bpf_prog_type,
};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `BPF_F_MMAPABLE`: the array's values can be mapped (include/uapi/linux/bpf.h, since 5.5).
pub const MMAPABLE: u32 = 1 << 10;
/// `BPF_F_XDP_HAS_FRAGS`: the program handles frames of several buffers (since 5.18).
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// What a program is for (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug)]
pub enum AttachType {
    /// `BPF_XDP_DEVMAP`: for an entry of a map of devices
    Devmap = 33,
    /// `BPF_XDP`: for an interface
    Xdp = 37,
    /// `BPF_TCX_EGRESS`: a tc program, for what an interface is to transmit (since 6.6)
    TcxEgress = 47,
    /// `BPF_TCX_INGRESS`: as `TcxEgress`, for what it has received
    TcxIngress = 46,
}
/// `BPF_F_TEST_XDP_LIVE_FRAMES`: a test run whose verdicts are carried out (since 5.18).
const TEST_LIVE_FRAMES: u32 = 1 << 1;

fn attr() -> bpf_attr {
    // SAFETY: bpf_attr is a union of plain integers, for which all zeroes is the kernel's "not given".
    unsafe { std::mem::zeroed() }
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: attr is a valid bpf_attr of the size passed; pointers inside it refer to objects the callers in this
    // file keep alive across the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, cmd, attr as *mut bpf_attr, size_of::<bpf_attr>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn bpf_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(cmd, attr)?;
    // SAFETY: these commands return a new descriptor (close-on-exec) that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// What a map is to be.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec<'a> {
    /// Kind
    pub kind: bpf_map_type,
    /// Name in the kernel; cut to 15 bytes
    pub name: &'a str,
    /// Bytes of one value
    pub value_size: u32,
    /// Number of elements
    pub max_entries: u32,
    /// `BPF_F_*`
    pub flags: u32,
}

/// Creates a map with 32-bit keys, or a ring. `inner` is the template of an array of maps.
pub fn map_create(spec: MapSpec<'_>, inner: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_MAP_CREATE; the union is zeroed.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = spec.kind as u32;
    create.key_size = if spec.kind == bpf_map_type::BPF_MAP_TYPE_RINGBUF { 0 } else { 4 };
    create.value_size = spec.value_size;
    create.max_entries = spec.max_entries;
    create.map_flags = spec.flags;
    create.inner_map_fd = inner.map_or(0, raw);
    for (to, from) in create.map_name.iter_mut().take(15).zip(spec.name.bytes()) {
        *to = from as _;
    }
    bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// What the kernel is told of a program's functions. One with global linkage it verifies once, by itself and for whatever
/// its arguments may be; without, or without being told, anew for each call that it comes to
/// (Documentation/bpf/verifier.rst and kernel/bpf/verifier.c, `do_check_subprogs`, Linux 6.1).
pub struct Functions<'a> {
    /// What `btf_load` gave
    pub types: BorrowedFd<'a>,
    /// Each function's place and type, in the order of places
    pub list: &'a [bpf_func_info],
}

/// Gives the kernel types (BTF).
pub fn btf_load(types: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_BTF_LOAD; the types outlive the call.
    let load = unsafe { &mut attr.__bindgen_anon_7 };
    (load.btf, load.btf_size) = (types.as_ptr() as u64, types.len() as u32);
    bpf_fd(bpf_cmd::BPF_BTF_LOAD, &mut attr)
}

/// How an instruction may be written: as the kernel's structure or as its 64-bit encoding.
pub trait Instruction {}
impl Instruction for bpf_insn {}
impl Instruction for u64 {}
const _: () = assert!(size_of::<bpf_insn>() == size_of::<u64>());

/// Loads a tc program, or an XDP program that handles frames of several buffers. If the kernel refuses it, the verifier's words are in
/// `log`. They are asked for only then, since writing them takes longer than verifying.
pub fn prog_load<I: Instruction>(
    name: &str,
    license: &CStr,
    attach: AttachType,
    code: &[I],
    functions: Option<&Functions<'_>>,
    log: &mut [u8],
) -> io::Result<OwnedFd> {
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_PROG_LOAD; code, license, functions and log outlive the calls.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    // The kernel asks a tc program what it is for only when it is attached.
    let (kind, attach, flags) = match attach {
        AttachType::TcxEgress | AttachType::TcxIngress => (bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, 0, 0),
        xdp => (bpf_prog_type::BPF_PROG_TYPE_XDP, xdp as u32, XDP_HAS_FRAGS),
    };
    load.prog_type = kind as u32;
    load.expected_attach_type = attach;
    load.prog_flags = flags;
    load.insns = code.as_ptr() as u64;
    load.insn_cnt = code.len() as u32;
    load.license = license.as_ptr() as u64;
    if let Some(Functions { types, list }) = functions {
        load.prog_btf_fd = raw(*types);
        load.func_info = list.as_ptr() as u64;
        load.func_info_cnt = list.len() as u32;
        load.func_info_rec_size = size_of::<bpf_func_info>() as u32;
    }
    for (to, from) in load.prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from as _;
    }
    match bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Err(e) if e.raw_os_error() != Some(libc::EPERM) && !log.is_empty() => {}
        other => return other,
    }
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    (load.log_level, load.log_size, load.log_buf) = (1, log.len() as u32, log.as_mut_ptr() as u64);
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Loads an XDP program that only says XDP_PASS.
pub fn load_pass() -> io::Result<OwnedFd> {
    /// `r0 = XDP_PASS; exit`
    const CODE: [u64; 2] = [0xb7 | 2 << 32, 0x95];
    prog_load("towpath_pass", c"Dual MIT/GPL", AttachType::Xdp, &CODE, None, &mut [])
}

/// Stores the plain value `value` at `key`. The value must have the map's value size.
pub fn map_update<V: Copy>(map: BorrowedFd<'_>, key: u32, value: &V) -> io::Result<()> {
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_MAP_UPDATE_ELEM; key and value outlive the call.
    let elem = unsafe { &mut attr.__bindgen_anon_2 };
    elem.map_fd = raw(map);
    elem.key = &raw const key as u64;
    elem.__bindgen_anon_1.value = value as *const V as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Reads the plain value at `key`; None if there is none. `V` must have the map's value size.
pub fn map_lookup<V: Copy + Default>(map: BorrowedFd<'_>, key: u32) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_MAP_LOOKUP_ELEM; key and value outlive the call.
    let elem = unsafe { &mut attr.__bindgen_anon_2 };
    elem.map_fd = raw(map);
    elem.key = &raw const key as u64;
    elem.__bindgen_anon_1.value = &raw mut value as u64;
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Removes `key`; not an error if it is absent.
pub fn map_delete(map: BorrowedFd<'_>, key: u32) -> io::Result<()> {
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_MAP_DELETE_ELEM; key outlives the call.
    let elem = unsafe { &mut attr.__bindgen_anon_2 };
    elem.map_fd = raw(map);
    elem.key = &raw const key as u64;
    match bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(drop),
    }
}

/// Gives the object a name in a bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = attr();
    // SAFETY: the members written are those of BPF_OBJ_PIN; the path outlives the call.
    let obj = unsafe { &mut attr.__bindgen_anon_4 };
    obj.pathname = path.as_ptr() as u64;
    obj.bpf_fd = raw(object);
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pinned object.
pub fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = attr();
    // SAFETY: the member written is that of BPF_OBJ_GET; the path outlives the call.
    let obj = unsafe { &mut attr.__bindgen_anon_4 };
    obj.pathname = path.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Attaches a program to an interface of this namespace; the program stays until the link's last descriptor and
/// pin are gone. `flags` are `XDP_FLAGS_*` for an XDP program, 0 otherwise.
pub fn link_create(program: BorrowedFd<'_>, ifindex: u32, attach: AttachType, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = ifindex;
    // SAFETY: plain integers of the BPF_LINK_CREATE member.
    let create = unsafe { &mut attr.link_create };
    create.attach_type = attach as u32;
    create.flags = flags;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Replaces the program of a link by another, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = attr();
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    // SAFETY: plain integers of the BPF_LINK_UPDATE member.
    unsafe { &mut attr.link_update }.link_fd = raw(link);
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link although descriptors or pins of it remain.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = attr();
    // SAFETY: a plain integer of the BPF_LINK_DETACH member.
    unsafe { &mut attr.link_detach }.link_fd = raw(link);
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// # Safety
/// `T` must be the `bpf_*_info` of the kind of object that `object` is.
unsafe fn info<T: Copy>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = attr();
    // SAFETY: plain integers of the BPF_OBJ_GET_INFO_BY_FD member; `info` outlives the call and has the length given.
    let by_fd = unsafe { &mut attr.info };
    by_fd.bpf_fd = raw(object);
    by_fd.info_len = size_of::<T>() as u32;
    by_fd.info = info as *mut T as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What the kernel says about a map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<bpf_map_info> {
    // SAFETY: plain integers, all zeroes is valid; the type is the one for maps.
    unsafe {
        let mut out = std::mem::zeroed();
        info::<bpf_map_info>(map, &mut out).map(|()| out)
    }
}

/// What the kernel says about a program.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<bpf_prog_info> {
    // SAFETY: plain integers, all zeroes is valid (no buffers given); the type is the one for programs.
    unsafe {
        let mut out = std::mem::zeroed();
        info::<bpf_prog_info>(program, &mut out).map(|()| out)
    }
}

/// Identifiers of the maps a program uses.
pub fn program_map_ids(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; program_info(program)?.nr_map_ids as usize];
    // SAFETY: plain integers, all zeroes is valid; map_ids points to nr_map_ids words that outlive the call.
    unsafe {
        let mut out: bpf_prog_info = std::mem::zeroed();
        out.nr_map_ids = ids.len() as u32;
        out.map_ids = ids.as_mut_ptr() as u64;
        info(program, &mut out)?;
    }
    Ok(ids)
}

/// What an XDP link is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct XdpLinkInfo {
    /// The program in it
    pub program_id: u32,
    /// Interface index, 0 if the interface is gone
    pub ifindex: u32,
}

/// What the kernel says about an XDP or a tcx link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<XdpLinkInfo> {
    // SAFETY: plain integers, all zeroes is valid; the type is the one for links, and every link here is an XDP or a tcx
    // link, whose parts of the union begin with the same integer.
    unsafe {
        let mut out: bpf_link_info = std::mem::zeroed();
        info(link, &mut out)?;
        Ok(XdpLinkInfo { program_id: out.prog_id, ifindex: out.__bindgen_anon_1.xdp.ifindex })
    }
}

/// Opens a program by its identifier.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    bpf_fd(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)
}

/// Runs an XDP program once on `frame` and carries out its verdict, as if the interface `ifindex` had received it.
pub fn run_live(program: BorrowedFd<'_>, frame: &[u8], ifindex: u32) -> io::Result<()> {
    /// `struct xdp_md`
    #[repr(C)]
    struct Context {
        data: u32,
        data_end: u32,
        data_meta: u32,
        ingress_ifindex: u32,
        rx_queue_index: u32,
        egress_ifindex: u32,
    }
    let context = Context {
        data: 0,
        data_end: frame.len() as u32,
        data_meta: 0,
        ingress_ifindex: ifindex,
        rx_queue_index: 0,
        egress_ifindex: 0,
    };
    let mut attr = attr();
    // SAFETY: plain integers of the BPF_PROG_TEST_RUN member; frame and context outlive the call.
    let test = unsafe { &mut attr.test };
    test.prog_fd = raw(program);
    test.data_in = frame.as_ptr() as u64;
    test.data_size_in = frame.len() as u32;
    test.ctx_in = &raw const context as u64;
    test.ctx_size_in = size_of::<Context>() as u32;
    test.repeat = 1;
    test.flags = TEST_LIVE_FRAMES;
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr).map(drop)
}
