//! Clocks that programs and processes have in common: the one by which flows end when nobody looks at Linux's rules any more,
//! and the one of traced packets.

/// CLOCK_MONOTONIC_COARSE in nanoseconds, as XDP programs have it by bpf_ktime_get_coarse_ns. It does not go on while the
/// machine sleeps, as the rules do not.
pub fn now() -> u64 {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

/// CLOCK_MONOTONIC in nanoseconds, as XDP programs have it by bpf_ktime_get_ns.
pub fn exact() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, which the call fills.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
