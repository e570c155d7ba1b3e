//! The target that `TOWPATH_FUZZ` names, guided by libFuzzer.
#![no_main]

use std::sync::LazyLock;
use towpath_fuzz::Target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("TOWPATH_FUZZ").expect("TOWPATH_FUZZ names a target");
    towpath_fuzz::target(&name).unwrap_or_else(|| panic!("there is no target {name}"))
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (TARGET.run)(bytes));
