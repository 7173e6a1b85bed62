//! What a processor tells of itself: all that KVM can give, with our topology,
//! without nested virtualization and performance counters.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const POWER: u32 = 0x6;
const MORE_FEATURES: u32 = 0x7;
const COUNTERS: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const EXTENDED_STATE: u32 = 0xd;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_NESTED: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_COUNTERS: u32 = 0x8000_0022;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

// Leaf 1, ECX and EDX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SEVERAL_PROCESSORS: u32 = 1 << 28;

// Leaf 6, EAX.
const TIMER_ALWAYS_RUNS: u32 = 1 << 2;

// Leaf 7, EDX: AMX.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const AMX_STATE: u32 = 0b11 << 17;

// Leaf 8000_0001, ECX.
const SVM: u32 = 1 << 2;
const AMD_CORE_COUNTERS: u32 = 1 << 23;

// Level types of leaf B.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Index of a leaf has a meaning (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
const INDEXED: u32 = 1;

/// The processors that the guest sees: one package of single-threaded cores.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// All cores, those that start offline included.
    pub cores: u8,
}

impl Topology {
    /// Bits of an APIC id that tell cores apart.
    fn core_bits(self) -> u32 {
        u32::from(self.cores).next_power_of_two().trailing_zeros()
    }
}

/// What KVM supports, beside its CPUID.
#[derive(Clone, Copy, Debug)]
pub struct Supported<'a> {
    /// `KVM_GET_SUPPORTED_CPUID`.
    pub cpuid: &'a CpuId,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`.
    pub tsc_deadline: bool,
}

/// The leaves of the processor with this APIC id.
///
/// # Errors
/// More leaves than KVM takes.
pub fn for_vcpu(
    supported: Supported<'_>,
    topology: Topology,
    apic_id: u8,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let host = supported.cpuid.as_slice();
    let amx = host.iter().any(|entry| {
        entry.function == EXTENDED_STATE && entry.index == 0 && entry.eax & AMX_STATE == AMX_STATE
    });
    let mut leaves: Vec<kvm_cpuid_entry2> = host
        .iter()
        .filter(|entry| !is_ours(entry.function))
        .copied()
        .collect();
    for leaf in &mut leaves {
        adapt(leaf, topology, apic_id);
        match leaf.function {
            FEATURES if supported.tsc_deadline => leaf.ecx |= TSC_DEADLINE,
            // Announced by some KVMs although their state was not permitted.
            MORE_FEATURES if leaf.index == 0 && !amx => leaf.edx &= !AMX,
            _ => {}
        }
    }
    leaves.extend(topology_levels(topology, apic_id));
    CpuId::from_entries(&leaves)
}

/// Leaves that are left out or written anew.
fn is_ours(function: u32) -> bool {
    matches!(
        function,
        COUNTERS | TOPOLOGY | TOPOLOGY_V2 | AMD_NESTED | AMD_COUNTERS | AMD_TOPOLOGY_V2
    )
}

fn adapt(leaf: &mut kvm_cpuid_entry2, topology: Topology, apic_id: u8) {
    let cores = u32::from(topology.cores);
    let id = u32::from(apic_id);
    match leaf.function {
        FEATURES => {
            leaf.ebx = leaf.ebx & 0xffff | cores << 16 | id << 24;
            leaf.ecx = leaf.ecx & !VMX | HYPERVISOR;
            leaf.edx &= !SEVERAL_PROCESSORS;
            if cores > 1 {
                leaf.edx |= SEVERAL_PROCESSORS;
            }
        }
        // No cache behind this index.
        CACHES | AMD_CACHES if leaf.eax & 0x1f == 0 => {}
        CACHES => {
            leaf.eax &= 0x3fff;
            leaf.eax |= (sharers(leaf.eax, topology) - 1) << 14;
            leaf.eax |= ((1u32 << topology.core_bits()) - 1).min(0x3f) << 26;
        }
        AMD_CACHES => {
            leaf.eax &= 0x3fff;
            leaf.eax |= (sharers(leaf.eax, topology) - 1) << 14;
        }
        POWER => leaf.eax |= TIMER_ALWAYS_RUNS,
        AMD_FEATURES => leaf.ecx &= !(SVM | AMD_CORE_COUNTERS),
        AMD_SIZES => leaf.ecx = (cores - 1) & 0xff | topology.core_bits() << 12,
        AMD_TOPOLOGY => {
            leaf.eax = id;
            // One thread a core, one node.
            leaf.ebx = id;
            leaf.ecx = 0;
            leaf.edx = 0;
        }
        _ => {}
    }
}

/// Cores that share a cache: levels 1 and 2 are a core's own.
fn sharers(eax: u32, topology: Topology) -> u32 {
    let level = eax >> 5 & 0x7;
    if level >= 3 {
        1 << topology.core_bits()
    } else {
        1
    }
}

fn topology_levels(topology: Topology, apic_id: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, count, level_type| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: INDEXED,
        eax: shift,
        ebx: count,
        ecx: index | level_type,
        edx: u32::from(apic_id),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(
            1,
            topology.core_bits(),
            u32::from(topology.cores),
            LEVEL_CORE,
        ),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn adapted(host: &[kvm_cpuid_entry2], cores: u8, apic_id: u8) -> Vec<kvm_cpuid_entry2> {
        let cpuid = CpuId::from_entries(host).unwrap();
        let supported = Supported {
            cpuid: &cpuid,
            tsc_deadline: true,
        };
        for_vcpu(supported, Topology { cores }, apic_id)
            .unwrap()
            .as_slice()
            .to_vec()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves
            .iter()
            .find(|l| l.function == function && l.index == index)
            .unwrap()
    }

    #[test]
    fn hides_nested_virtualization_and_says_hypervisor() {
        let host = [
            leaf(FEATURES, 0, [0, 0x1234, VMX, 0]),
            leaf(AMD_FEATURES, 0, [0, 0, SVM | 1, 0]),
            leaf(AMD_NESTED, 0, [1, 1, 1, 1]),
            leaf(COUNTERS, 0, [1, 1, 1, 1]),
        ];
        let leaves = adapted(&host, 2, 1);
        let features = find(&leaves, FEATURES, 0);
        assert_eq!(features.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(features.ebx, 1 << 24 | 2 << 16 | 0x1234);
        assert_eq!(features.edx, SEVERAL_PROCESSORS);
        assert_eq!(find(&leaves, AMD_FEATURES, 0).ecx, 1);
        assert!(!leaves.iter().any(|l| l.function == AMD_NESTED));
        assert!(!leaves.iter().any(|l| l.function == COUNTERS));
    }

    #[test]
    fn topology_counts_every_core() {
        let host = [
            leaf(TOPOLOGY, 0, [5, 6, 7, 8]),
            leaf(AMD_SIZES, 0, [0x3030, 0, 63, 0]),
            leaf(AMD_TOPOLOGY, 0, [9, 9, 9, 9]),
        ];
        let leaves = adapted(&host, 6, 5);
        let cores = find(&leaves, TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 5));
        assert_eq!(cores.ecx, LEVEL_CORE | 1);
        assert_eq!(find(&leaves, TOPOLOGY, 0).ecx, LEVEL_THREAD);
        assert_eq!(find(&leaves, AMD_SIZES, 0).ecx, 3 << 12 | 5);
        let amd = find(&leaves, AMD_TOPOLOGY, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (5, 5, 0));
    }

    #[test]
    fn last_level_cache_is_shared_by_all() {
        // Level 1 data and level 3 unified.
        let host = [
            leaf(CACHES, 0, [0xfc00_0000 | 1 << 14 | 1 << 5 | 1, 0, 0, 0]),
            leaf(CACHES, 3, [3 << 5 | 3, 0, 0, 0]),
            leaf(CACHES, 4, [0; 4]),
        ];
        let leaves = adapted(&host, 4, 0);
        assert_eq!(find(&leaves, CACHES, 0).eax, 3 << 26 | 1 << 5 | 1);
        assert_eq!(find(&leaves, CACHES, 3).eax, 3 << 26 | 3 << 14 | 3 << 5 | 3);
        assert_eq!(find(&leaves, CACHES, 4).eax, 0);
    }

    #[test]
    fn amx_needs_its_state() {
        let with = |state| {
            adapted(
                &[
                    leaf(MORE_FEATURES, 0, [0, 0, 0, AMX | 1]),
                    leaf(EXTENDED_STATE, 0, [state, 0, 0, 0]),
                ],
                1,
                0,
            )
        };
        assert_eq!(find(&with(7), MORE_FEATURES, 0).edx, 1);
        assert_eq!(find(&with(7 | AMX_STATE), MORE_FEATURES, 0).edx, AMX | 1);
    }
}
