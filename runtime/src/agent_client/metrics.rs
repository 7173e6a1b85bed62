//! A container's counters, cut to what containerd may make time series of.

use husk_protocol::metrics::{Metrics, PSIStats};
use protobuf::{Message, MessageField};

/// Most entries of a list: disks, page sizes, interfaces.
const ENTRIES: usize = 64;

/// Longest name in an entry, characters.
const NAME: usize = 64;

/// The counters without what we do not know, serialized again.
///
/// # Errors
/// They are none.
pub fn checked(metrics: &[u8]) -> Result<Vec<u8>, protobuf::Error> {
    let mut metrics = Metrics::parse_from_bytes(metrics)?;
    strip(&mut metrics);
    strip_in(&mut metrics.pids);
    strip_in(&mut metrics.cpu);
    strip_in(&mut metrics.memory);
    strip_in(&mut metrics.memory_events);
    strip_in(&mut metrics.io);
    if let Some(cpu) = metrics.cpu.as_mut() {
        strip_pressure(&mut cpu.psi);
    }
    if let Some(memory) = metrics.memory.as_mut() {
        strip_pressure(&mut memory.psi);
    }
    if let Some(io) = metrics.io.as_mut() {
        strip_pressure(&mut io.psi);
        cut(&mut io.usage);
    }
    cut(&mut metrics.hugetlb);
    for entry in &mut metrics.hugetlb {
        entry.pagesize = name(&entry.pagesize);
    }
    cut(&mut metrics.network);
    for entry in &mut metrics.network {
        entry.name = name(&entry.name);
    }
    metrics.write_to_bytes()
}

fn strip(message: &mut impl Message) {
    message.mut_unknown_fields().clear();
}

fn strip_in(field: &mut MessageField<impl Message>) {
    if let Some(message) = field.as_mut() {
        strip(message);
    }
}

fn strip_pressure(pressure: &mut MessageField<PSIStats>) {
    strip_in(pressure);
    if let Some(pressure) = pressure.as_mut() {
        strip_in(&mut pressure.some);
        strip_in(&mut pressure.full);
    }
}

fn cut<T: Message>(entries: &mut Vec<T>) {
    entries.truncate(ENTRIES);
    for entry in entries {
        strip(entry);
    }
}

fn name(text: &str) -> String {
    let printable = text.chars().filter(char::is_ascii_graphic);
    printable.take(NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_protocol::metrics::{HugeTlbStat, IOEntry, IOStat, PidsStat};

    #[test]
    fn keeps_what_is_known_and_bounded() {
        let mut metrics = Metrics {
            pids: MessageField::some(PidsStat {
                current: 3,
                ..PidsStat::default()
            }),
            ..Metrics::default()
        };
        let disk = |major| IOEntry {
            major,
            rbytes: 1,
            ..IOEntry::default()
        };
        metrics.io = MessageField::some(IOStat {
            usage: (0..100_000).map(disk).collect(),
            ..IOStat::default()
        });
        metrics.hugetlb = vec![HugeTlbStat {
            pagesize: format!("2MB\n{}", "x".repeat(1 << 20)),
            ..HugeTlbStat::default()
        }];
        metrics
            .mut_unknown_fields()
            .add_length_delimited(99, vec![0; 1 << 20]);
        if let Some(io) = metrics.io.as_mut() {
            io.usage[0].mut_unknown_fields().add_varint(99, 1);
        }
        let bytes = checked(&metrics.write_to_bytes().unwrap()).unwrap();
        assert!(bytes.len() < 4096, "{}", bytes.len());
        let kept = Metrics::parse_from_bytes(&bytes).unwrap();
        assert_eq!(kept.pids.current, 3);
        assert_eq!(kept.io.usage.len(), ENTRIES);
        assert_eq!(kept.io.usage[0], disk(0));
        assert!(kept.hugetlb[0].pagesize.starts_with("2MBxxx"));
        assert!(checked(&[0xff]).is_err());
    }
}
