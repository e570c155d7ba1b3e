//! Clocks that programs and processes have in common: the one by which flows end when nobody looks at Linux's rules any more,
//! and the one of traced packets. And one that counts a thread's work.

use std::time::Duration;

/// CLOCK_MONOTONIC_COARSE in nanoseconds, as XDP programs have it by bpf_ktime_get_coarse_ns. It does not go on while the
/// machine sleeps, as the rules do not.
pub fn now() -> u64 {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

/// CLOCK_MONOTONIC in nanoseconds, as XDP programs have it by bpf_ktime_get_ns.
pub fn exact() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// CLOCK_THREAD_CPUTIME_ID: for how long processors have worked for the calling thread, in the kernel too.
pub fn worked() -> Duration {
    Duration::from_nanos(read(libc::CLOCK_THREAD_CPUTIME_ID))
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, which the call fills.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn waiting_is_no_work() {
        let (worked_before, begin) = (worked(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        assert!((worked() - worked_before) * 2 < begin.elapsed());
        let before = worked();
        assert_ne!(std::hint::black_box((0..1_000_000_u64).map(std::hint::black_box).sum::<u64>()), 0);
        assert!(worked() > before);
    }
}
