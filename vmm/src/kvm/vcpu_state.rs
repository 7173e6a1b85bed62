//! A processor's state, read and written in the orders that KVM wants.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::vm::{KvmError, failed};
use crate::bounded::at_most;

/// Most registers that are read or written at once (`MAX_IO_MSRS` of
/// arch/x86/kvm/x86.c is 256).
const MSRS_AT_ONCE: usize = 128;

/// Most registers of one processor; KVM has some 130.
const MSRS_MAX: usize = 1024;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: counts on from the TSC, in the mode of the local APIC.
const TSC_DEADLINE: u32 = 0x6e0;

/// Memory type ranges, which not every KVM counts among what is to be saved:
/// variable, fixed, and the default type, which enables them.
const MEMORY_TYPES: [std::ops::RangeInclusive<u32>; 6] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
];

/// Registers of what no guest of ours has, nested virtualization with VMX and
/// Hyper-V's interfaces: KVM lists them all the same, and would make room for the
/// latter when they are written.
const OF_NOBODY: [std::ops::RangeInclusive<u32>; 2] = [0x480..=0x4ff, 0x4000_0000..=0x4000_01ff];

/// All that a processor knows.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value.
    #[serde(deserialize_with = "at_most::<MSRS_MAX, _, _>")]
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    /// How fast its TSC counts; 0 where KVM does not say.
    pub tsc_khz: u32,
}

/// The registers to save: those that KVM lists for what a guest has, and memory
/// types.
pub fn msrs_to_save(listed: &[u32]) -> Vec<u32> {
    let types = MEMORY_TYPES.into_iter().flatten();
    let mut all: Vec<u32> = listed.iter().copied().chain(types).collect();
    all.retain(|index| !OF_NOBODY.iter().any(|range| range.contains(index)));
    all.sort_unstable();
    all.dedup();
    all
}

/// Reads the state of a processor that is out of the guest and has finished what
/// its last exit began. The others must be out as well.
///
/// # Errors
/// KVM refuses.
pub fn capture(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, KvmError> {
    // First, since reading it takes in start-up messages, which changes the rest.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let events = || fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"));
    // An exception that is pending has its address put into CR2 or DR6 by this, so
    // before these are read.
    events()?;
    let regs = fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    // All there is: states that need more room are only had by who asks for them.
    let xsave = fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
    let xcrs = fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    let debug_regs = fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
    // Before the LAPIC: a timer's deadline that passes in between is saved as well
    // as its interrupt, and neither would be the other way round.
    let msrs = read_msrs(fd, msrs)?;
    let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    // Last: what comes before may add to them.
    let events = events()?;
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        msrs,
        events,
        tsc_khz,
    })
}

/// Gives a new processor, which has its CPUID, the state of another.
///
/// # Errors
/// KVM refuses.
pub fn restore(fd: &VcpuFd, state: &VcpuState) -> Result<(), KvmError> {
    fd.set_mp_state(state.mp_state)
        .map_err(failed("KVM_SET_MP_STATE"))?;
    // Forgets pending exceptions, so before the events.
    fd.set_regs(&state.regs).map_err(failed("KVM_SET_REGS"))?;
    // Moves the local APIC, so before that.
    fd.set_sregs(&state.sregs)
        .map_err(failed("KVM_SET_SREGS"))?;
    // SAFETY: KVM reads no more than the structure has unless the process asked
    // for larger states, which it never does.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&state.xcrs).map_err(failed("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&state.debug_regs)
        .map_err(failed("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&state.lapic)
        .map_err(failed("KVM_SET_LAPIC"))?;
    write_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events)
        .map_err(failed("KVM_SET_VCPU_EVENTS"))
}

fn entries(values: &[(u32, u64)]) -> Result<Msrs, KvmError> {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = values.iter().map(entry).collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Registers)
}

fn read_msrs(fd: &VcpuFd, mut wanted: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let some: Vec<_> = wanted.iter().take(MSRS_AT_ONCE).map(|i| (*i, 0)).collect();
        let mut msrs = entries(&some)?;
        let read = fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        let got = msrs.as_slice().iter().take(read);
        values.extend(got.map(|entry| (entry.index, entry.data)));
        // KVM stops at one that this processor does not have.
        let done = if read < some.len() { read + 1 } else { read };
        wanted = wanted.get(done..).unwrap_or_default();
    }
    Ok(values)
}

fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut values = values.to_vec();
    values.sort_by_key(|(index, _)| match *index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut left = &values[..];
    while !left.is_empty() {
        let some = &left[..left.len().min(MSRS_AT_ONCE)];
        let written = fd
            .set_msrs(&entries(some)?)
            .map_err(failed("KVM_SET_MSRS"))?;
        left = match some.get(written) {
            None => &left[some.len()..],
            // KVM lists some that it reads as zero and does not let be written.
            Some((_, 0)) => &left[written + 1..],
            Some((index, _)) => return Err(KvmError::Register(*index)),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_has_is_saved_once() {
        let all = msrs_to_save(&[TSC, 0x2ff, 0x277, 0x480, 0x4000_0020, 0x4b56_4d01]);
        assert!(!all.contains(&0x480) && !all.contains(&0x4000_0020));
        assert!(all.contains(&0x4b56_4d01));
        assert_eq!(all.iter().filter(|index| **index == 0x2ff).count(), 1);
        assert!(all.contains(&TSC) && all.contains(&0x200) && all.contains(&0x26f));
    }
}
