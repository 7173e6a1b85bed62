//! Lists the processors for a kernel without ACPI (Intel MultiProcessor
//! Specification 1.4). There is no I/O APIC: every interrupt is a message.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const FLOATING_POINTER_BYTES: u64 = 16;
const TABLE_HEADER_BYTES: usize = 44;
const SPEC_REVISION: u8 = 4;

// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;

/// Version of an integrated local APIC.
const APIC_VERSION: u8 = 0x14;

/// Family 6 with an APIC and an FPU: kernels read CPUID instead.
const PROCESSOR_SIGNATURE: u32 = 0x600;
const PROCESSOR_FEATURES: u32 = 0x201;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const ALL_APICS: u8 = 0xff;

/// Writes the floating pointer and the table for `vcpus` processors, whose APIC
/// ids count from 0.
///
/// # Errors
/// The BIOS area is not in guest memory.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), GuestMemoryError> {
    let table = table(vcpus);
    let address = layout::MP_TABLE + FLOATING_POINTER_BYTES;
    memory.write_slice(
        &floating_pointer(address as u32),
        GuestAddress(layout::MP_TABLE),
    )?;
    memory.write_slice(&table, GuestAddress(address))
}

fn floating_pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // Length in paragraphs, revision, checksum, no default configuration, no IMCR.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for apic_id in 0..vcpus {
        let boot = if apic_id == 0 { PROCESSOR_BOOT } else { 0 };
        entries.extend([PROCESSOR, apic_id, APIC_VERSION, PROCESSOR_ENABLED | boot]);
        entries.extend(PROCESSOR_SIGNATURE.to_le_bytes());
        entries.extend(PROCESSOR_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, 0]);
    entries.extend(*b"PCI   ");
    // Linux takes a table without this for a broken one and makes up 16 of its
    // own. It says that the bridge's pin goes to an I/O APIC that is not there.
    entries.extend([IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, 0, 0, ALL_APICS, 0]);
    // NMI on every processor's LINT1; flags 0: as the bus has it.
    entries.extend([LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let length = (TABLE_HEADER_BYTES + entries.len()) as u16;
    let entry_count = u16::from(vcpus) + 3;
    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(*b"HUSK    ");
    table.extend(*b"VM          ");
    // No OEM table.
    table.extend([0; 6]);
    table.extend(entry_count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    // No extended entries.
    table.extend([0; 4]);
    table.extend(entries);
    set_checksum(&mut table, 7);
    table
}

fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn bytes_add_up_to_zero() {
        assert_eq!(sum(&floating_pointer(0xf_0010)), 0);
        assert_eq!(sum(&table(1)), 0);
        assert_eq!(sum(&table(240)), 0);
    }

    #[test]
    fn the_table_has_the_length_it_says() {
        for vcpus in [1, 2, 240] {
            let table = table(vcpus);
            let said = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(said), table.len());
            assert_eq!(table.len(), 44 + 20 * usize::from(vcpus) + 8 + 8 + 8);
            assert_eq!(
                &table[28..36],
                b"\0\0\0\0\0\0"
                    .iter()
                    .chain(&(u16::from(vcpus) + 3).to_le_bytes())
                    .copied()
                    .collect::<Vec<_>>()
                    .as_slice()
            );
            assert_eq!(table[36..40], layout::LOCAL_APIC.to_le_bytes());
        }
    }

    #[test]
    fn the_largest_table_stays_in_the_bios_area() {
        let end = layout::MP_TABLE + FLOATING_POINTER_BYTES + table(240).len() as u64;
        assert!(end <= layout::MP_TABLE_END);
    }
}
