//! Constants that only whoever loads the program knows.

/// Loads a 64-bit constant of which the compiler knows nothing.
macro_rules! constant {
    ($($operand:tt)*) => {{
        let value: usize;
        // SAFETY: sets a register.
        #[cfg(target_arch = "bpf")]
        unsafe {
            core::arch::asm!("{0} = {1} ll", out(reg) value, $($operand)*, options(pure, nomem, nostack))
        };
        #[cfg(not(target_arch = "bpf"))]
        {
            value = 0;
        }
        value
    }};
}

pub(crate) use constant;
