//! The virtual machine: what KVM must be able to do, memory slots, interrupt
//! controllers.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::x86_64::layout;

/// The API version of every KVM since 2007.
const API_VERSION: i32 = 12;

/// What we cannot do without, and what the operator should know it by.
const REQUIRED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_ANY_LENGTH"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Registers of counters: the first and how many, 64 at most. asm/msr-index.h:
/// `MSR_K7_EVNTSEL0` and the counters behind them, `MSR_F15H_PERF_CTL`,
/// `MSR_IA32_PERFCTR0`, `MSR_P6_EVNTSEL0`.
const COUNTERS: [(u32, u32); 4] = [(0xc001_0000, 8), (0xc001_0200, 12), (0xc1, 2), (0x186, 2)];

/// A KVM that will not serve.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not KVM, or not the one we know.
    #[error(
        "the descriptor given as kvm answers API version {0}, not {API_VERSION}: is it /dev/kvm?"
    )]
    Version(i32),
    /// KVM is too old or built without something.
    #[error("the host's KVM lacks {0}")]
    Lacks(&'static str),
    /// More processors than KVM has.
    #[error("{asked} vCPUs were asked for; the host's KVM has at most {most}")]
    Vcpus {
        /// As asked.
        asked: u8,
        /// As KVM says.
        most: usize,
    },
    /// More registers than KVM takes.
    #[error("more model-specific registers than KVM takes")]
    Registers,
    /// A register does not take the value it had.
    #[error("model-specific register {0:#x} does not take the value that was saved")]
    Register(u32),
    /// A call failed.
    #[error("{call}")]
    Ioctl {
        /// The ioctl.
        call: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Names the ioctl that failed.
pub(super) fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl {
        call,
        source: source.into(),
    }
}

/// A virtual machine with memory and local APICs, without processors.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
}

impl Vm {
    /// Makes a machine of `memory` for up to `vcpus` processors.
    ///
    /// # Errors
    /// `kvm` is no KVM, lacks something or refuses.
    pub fn new(kvm: OwnedFd, memory: &GuestMemoryMmap, vcpus: u8) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open and from here on owned by `kvm` alone.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        check(&kvm, vcpus)?;
        let fd = Arc::new(create(&kvm)?);
        let vm = Self { kvm, fd };
        // Before anything that makes a memory slot: a filter set after one waits
        // some 12 ms for a grace period.
        vm.disable_counters()?;
        vm.set_up_interrupts()?;
        vm.add_memory(memory)?;
        Ok(vm)
    }

    /// The descriptor, for irqfd, ioeventfd and routing.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The CPUID leaves that KVM can give a guest.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Whether local APICs can count in units of the TSC.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Makes a processor.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn create_vcpu(&self, apic_id: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(apic_id))
            .map_err(failed("KVM_CREATE_VCPU"))
    }

    /// The model-specific registers that KVM would have saved.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list();
        let list = list.map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    /// The guest's clock (kvm-clock), in nanoseconds.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock = self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        Ok(clock.clock)
    }

    /// Has the guest's clock go on from so many nanoseconds.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_clock(&self, clock: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }

    /// Local APICs alone: there is no PIC, no I/O APIC and no timer but theirs.
    fn set_up_interrupts(&self) -> Result<(), KvmError> {
        // Both are needed on Intel only, and harmless elsewhere.
        self.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        self.fd
            .set_tss_address(layout::KVM_TSS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            // No pins of a userspace I/O APIC.
            args: [0; 4],
            ..Default::default()
        };
        self.fd
            .enable_cap(&split)
            .map_err(failed("KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP"))
    }

    /// Performance counters tell a guest about its neighbours. CPUID does not
    /// announce them, but AMD's old ones need no announcement, and KVM notes a
    /// guest that tries them in the node's log: they fault instead.
    fn disable_counters(&self) -> Result<(), KvmError> {
        let disable = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            args: [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0],
            ..Default::default()
        };
        let _unsupported_before_5_18 = self.fd.enable_cap(&disable);
        if !self.kvm.check_extension(Cap::X86MsrFilter) {
            // Before 5.10.
            return Ok(());
        }
        // A register whose bit is clear is denied.
        let ranges = COUNTERS.map(|(base, msr_count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            // KVM reads whole words.
            bitmap: &[0; 8],
        });
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(failed("KVM_X86_SET_MSR_FILTER"))
    }

    fn add_memory(&self, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
        for (slot, region) in memory.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is as long as the slot and outlives the
            // machine: every thread that enters the guest holds guest memory.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}

fn check(kvm: &Kvm, vcpus: u8) -> Result<(), KvmError> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::Version(version));
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    let most = kvm.get_max_vcpus();
    if usize::from(vcpus) > most {
        return Err(KvmError::Vcpus { asked: vcpus, most });
    }
    Ok(())
}

/// A signal may interrupt the call, and it then wants to be made again.
fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(failed("KVM_CREATE_VM")),
        }
    }
}
