//! Daemons that find what another version, or nobody that they know, has left: new tables are built beside what is there,
//! whose programs go on meanwhile, and take its place without loss.

mod common;
#[path = "upgrade/killed.rs"]
mod killed;
#[path = "upgrade/other.rs"]
mod other;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;
#[path = "upgrade/world.rs"]
mod world;

use common::{Net, RIGHT, RIGHT6, Stream, bpf};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use towpath_tables::record::{Config, LAYOUT_VERSION, MAGIC};

const OBJ_PIN: i64 = 6;
const OBJ_GET: i32 = 7;
const MAP_CREATE: i32 = 0;

/// Opens a pin.
fn open(path: &Path) -> OwnedFd {
    let path = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let address = path.as_ptr() as u64;
    bpf(OBJ_GET, &mut [address as u32, (address >> 32) as u32, 0, 0])
}

/// Changes what tables that nobody writes to say of themselves.
fn change_config(net: &Net, change: impl Fn(&Config)) {
    let table = open(&net.pins().join("config"));
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let bytes = size_of::<Config>();
    // SAFETY: a new mapping of the table, which is one such record of atomic words, until the end of the call.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, table.as_raw_fd(), 0);
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        change(&*start.cast());
        libc::munmap(start, bytes);
    }
}

/// Puts a map of another size in the place of a table.
fn replace_table(net: &Net, name: &str, bytes: u32, flags: u32) {
    const ARRAY: u32 = 2;
    let path = net.pins().join(name);
    let map = bpf(MAP_CREATE, &mut [ARRAY, 4, bytes, 1, flags]);
    std::fs::remove_file(&path).expect("a pin");
    pin(&path, map.as_raw_fd());
}

/// The tables are Linux's, as the build says that runs now; older ones have no such command.
fn check(net: &Net) {
    const NO_COMMAND: i32 = 2;
    let check = net.towpath(&["check"]);
    assert!([Some(0), Some(NO_COMMAND)].contains(&check.status.code()), "{}", String::from_utf8_lossy(&check.stdout));
}

/// Pinning gives no descriptor.
fn pin(path: &Path, fd: i32) {
    let path = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let address = path.as_ptr() as u64;
    let attribute = [address as u32, (address >> 32) as u32, fd as u32, 0];
    // SAFETY: attribute and path outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, OBJ_PIN, attribute.as_ptr(), size_of_val(&attribute)) };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

/// Kills the daemon, changes what it left, and starts another while packets flow: it says these words and forwards fast, and
/// nothing is lost or left over.
fn replaces(spoil: impl Fn(&Net), words: &[&str]) {
    let net = Net::new();
    let clean = net.traces();
    let mut daemon = net.up(&["eth0", "eth1"]);
    for destination in [RIGHT, RIGHT6] {
        let stream = Stream::start(&net, destination);
        net.flows(100);
        let left = net.traces();
        daemon.signal(libc::SIGKILL);
        spoil(&net);
        let linux = net.forwarded_by_linux();
        stream.advance(100);
        daemon = net.up(&["eth0", "eth1"]);
        net.flows(100);
        assert!(net.forwarded_by_linux() - linux < 50, "the fast path went on");
        for word in words {
            assert!(daemon.log().contains(word), "{word:?} is missing in: {}", daemon.log());
        }
        assert_eq!(net.json(&["status"])["adopted"], false);
        assert!(net.towpath(&["check"]).status.success());
        assert_eq!(net.traces().matches("prog/xdp").count(), left.matches("prog/xdp").count());
        assert_eq!(net.traces().split("], ").last(), left.split("], ").last(), "as many pins as before");
        stream.finish_complete();
    }
    assert!(net.towpath(&["down"]).status.success());
    daemon.wait();
    assert_eq!(net.traces(), clean);
}

#[test]
fn tables_of_a_later_version_are_replaced_without_loss() {
    let words = ["tables of a former daemon are replaced", "layout version is 0x3e7", "this program's is"];
    replaces(|net| change_config(net, |config| config.version.store(999)), &words);
}

#[test]
fn tables_of_an_earlier_version_are_replaced_without_loss() {
    let earlier = LAYOUT_VERSION - 1;
    replaces(
        |net| change_config(net, |config| config.version.store(earlier)),
        &[&format!("layout version is {earlier:#x}")],
    );
}

#[test]
fn tables_of_an_earlier_version_and_other_sizes_are_replaced_without_loss() {
    const MMAPABLE: u32 = 1 << 10;
    let earlier = |config: &Config| {
        config.magic.store(MAGIC);
        config.version.store(LAYOUT_VERSION - 1);
    };
    let spoil = |net: &Net| {
        replace_table(net, "config", 512, MMAPABLE);
        change_config(net, earlier);
    };
    replaces(
        spoil,
        &["tables of a former daemon are replaced", &format!("layout version is {:#x}", LAYOUT_VERSION - 1)],
    );
}

#[test]
fn tables_of_other_records_are_replaced_without_loss() {
    replaces(|net| change_config(net, |config| config.layout.store(1)), &["layout hash is 0x1"]);
}

#[test]
fn tables_of_somebody_else_are_replaced_without_loss() {
    replaces(|net| change_config(net, |config| config.magic.store(!MAGIC)), &["magic number"]);
}

#[test]
fn truncated_tables_are_replaced_without_loss() {
    let words = ["does not hold a complete instance", "take over table nodes", "wanted one of records of 64 bytes"];
    replaces(|net| replace_table(net, "nodes", 7, 0), &words);
}

#[test]
fn tables_of_which_one_is_missing_are_replaced_without_loss() {
    let remove = |net: &Net| std::fs::remove_file(net.pins().join("groups")).expect("a pin");
    replaces(remove, &["does not hold a complete instance", "open groups"]);
}
