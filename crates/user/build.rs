//! With feature `dpdk`: builds the library that stands between this crate and DPDK.

use std::path::Path;
use std::process::{Command, exit};

const SOURCE: &str = "dpdk/shim.c";

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_DPDK").is_none() {
        return;
    }
    let words = |option: &str| match Command::new("pkg-config").args([option, "libdpdk"]).output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.split_whitespace().map(String::from).collect::<Vec<_>>()
        }
        Ok(output) => fail(&format!("no libdpdk to build with: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => fail(&format!("cannot run pkg-config: {error}")),
    };
    let library = Path::new(&std::env::var_os("OUT_DIR").unwrap_or_default()).join("dpdk.so");
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compiler.args(["-shared", "-fPIC", "-O3", "-Wall", "-Wextra", SOURCE, "-o"]).arg(library);
    match compiler.args(words("--cflags")).args(words("--libs")).status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("the C compiler ended with {status}; its words are above")),
        Err(error) => fail(&format!("cannot run the C compiler: {error}")),
    }
}

fn fail(why: &str) -> ! {
    println!("cargo:warning={why} (scripts/dpdk.sh installs what feature dpdk takes)");
    exit(1);
}
