//! Model-specific registers that differ from their reset values at the
//! kernel's entry.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// IA32_MISC_ENABLE, and its fast-string bit, which firmware sets.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// IA32_MTRR_DEF_TYPE: MTRRs on, everything is write-back.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// The registers to set on every processor.
///
/// # Errors
/// Never with this few of them; the wrapper bounds their number.
pub fn boot_msrs() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(MISC_ENABLE, FAST_STRINGS),
        entry(MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ])
}
