//! What a compiler may not know, so that a verifier can.

/// The number itself. For BPF, of which a compiler then knows nothing: it would leave out comparisons and masks that follow
/// from what it knows, but the verifier needs them (that of Linux 6.1 forgets a number's range when its bytes are
/// swapped). Costs no instruction; natively it is not there.
#[inline(always)]
pub fn opaque(number: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    let number = {
        let mut number = number;
        // SAFETY: does nothing.
        unsafe { core::arch::asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack)) };
        number
    };
    number
}
