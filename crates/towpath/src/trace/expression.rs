//! Filters in tcpdump's language, by libpcap. It is loaded when a filter is first asked for, so that the command starts without it.

use anyhow::{Context, Result, anyhow, bail};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use towpath_filter::{Filter, Layer, instruction};

/// Names of the library: the one that its makers give it, and Debian's.
const NAMES: [&CStr; 2] = [c"libpcap.so.1", c"libpcap.so.0.8"];
/// Frames are Ethernet (pcap-linktype(7), `DLT_EN10MB`).
const ETHERNET: c_int = 1;
/// Bytes of a frame that a program says it takes; nobody asks.
const SNAPSHOT: c_int = 262_144;
/// The mask of the network is not known (pcap(3PCAP), `PCAP_NETMASK_UNKNOWN`).
const NO_MASK: u32 = u32::MAX;

/// `struct bpf_insn` (pcap/bpf.h)
#[repr(C)]
struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    operand: u32,
}

/// `struct bpf_program`
#[repr(C)]
struct Program {
    length: u32,
    instructions: *mut Instruction,
}

type OpenDead = unsafe extern "C" fn(c_int, c_int) -> *mut c_void;
type Compile = unsafe extern "C" fn(*mut c_void, *mut Program, *const c_char, c_int, u32) -> c_int;
type GetError = unsafe extern "C" fn(*mut c_void) -> *const c_char;
type FreeCode = unsafe extern "C" fn(*mut Program);
type Close = unsafe extern "C" fn(*mut c_void);

/// The filter's instructions, as `towpath_filter::instruction` encodes them. Errors are libpcap's.
pub fn compile(expression: &str) -> Result<Vec<u64>> {
    let text = CString::new(expression).context("a filter has no zero bytes")?;
    let library = Library::load()?;
    // SAFETY: the functions are libpcap's, of these types (pcap/pcap.h); the handle and the program are closed and freed once,
    // after their last use, and `text` ends with a zero.
    unsafe {
        let open_dead: OpenDead = std::mem::transmute(library.symbol(c"pcap_open_dead")?);
        let compile: Compile = std::mem::transmute(library.symbol(c"pcap_compile")?);
        let error: GetError = std::mem::transmute(library.symbol(c"pcap_geterr")?);
        let free: FreeCode = std::mem::transmute(library.symbol(c"pcap_freecode")?);
        let close: Close = std::mem::transmute(library.symbol(c"pcap_close")?);
        let handle = open_dead(ETHERNET, SNAPSHOT);
        if handle.is_null() {
            bail!("libpcap has no memory");
        }
        let mut program = Program { length: 0, instructions: std::ptr::null_mut() };
        let result = match compile(handle, &raw mut program, text.as_ptr(), 1, NO_MASK) {
            0 => {
                let made = std::slice::from_raw_parts(program.instructions, program.length as usize);
                let code = made.iter().map(|made| instruction(made.code, made.yes, made.no, made.operand)).collect();
                free(&raw mut program);
                Ok(code)
            }
            _ => Err(anyhow!("filter {expression:?}: {}", CStr::from_ptr(error(handle)).to_string_lossy())),
        };
        close(handle);
        result
    }
}

/// A filter from its instructions; an error if the packet path cannot run it.
pub fn filter(code: Vec<u64>) -> Result<Filter> {
    Filter::new(Layer::Link, code).map_err(|why| anyhow!("this filter cannot be run: {why}"))
}

/// A library that stays loaded.
struct Library(*mut c_void);

impl Library {
    fn load() -> Result<Self> {
        // SAFETY: names that end with a zero; what libpcap does when it is loaded is nothing.
        let load = |name: &CStr| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        let handle = NAMES.into_iter().map(load).find(|handle| !handle.is_null());
        handle.map(Self).context(
            "libpcap, which knows the language of filters, is not there; install it (apt install libpcap0.8), or trace without \
             a filter",
        )
    }

    fn symbol(&self, name: &CStr) -> Result<*mut c_void> {
        // SAFETY: a handle of a library that stays loaded, and a name that ends with a zero.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if symbol.is_null() { bail!("libpcap has no {}", name.to_string_lossy()) } else { Ok(symbol) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_become_filters() {
        for expression in ["host 192.0.2.1", "ip6 and tcp port 179", "vlan 100 and udp", "icmp6", "greater 1000"] {
            let code = compile(expression).unwrap();
            filter(code).unwrap_or_else(|error| panic!("{expression}: {error:#}"));
        }
    }

    #[test]
    fn wrong_ones_are_refused_in_libpcap_s_words() {
        for (wrong, words) in [("udp porf 9", "syntax error"), ("port 99999", "port"), ("host x\0", "zero")] {
            let message = format!("{:#}", compile(wrong).unwrap_err());
            assert!(message.contains(words), "{message}");
        }
    }
}
