//! The device rules of a container, as a BPF program on its cgroup.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::error::{Doing, OsError};
use crate::oci::{DeviceKind, DeviceRule};

// linux/bpf.h
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// Which accesses to which devices a rule speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

const ALL: u32 = MKNOD | READ | WRITE;

/// What every container may use, as its `/dev` has it.
const ALWAYS: [(Option<u32>, Option<u32>, u32); 8] = [
    (Some(1), Some(3), ALL),
    (Some(1), Some(5), ALL),
    (Some(1), Some(7), ALL),
    (Some(1), Some(8), ALL),
    (Some(1), Some(9), ALL),
    (Some(5), Some(0), ALL),
    (Some(5), Some(2), ALL),
    (Some(136), None, ALL),
];

const fn allow(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// The filter of a cgroup, as long as it is the one that is attached.
#[derive(Debug)]
pub struct DeviceFilter(OwnedFd);

/// Replaces the cgroup's filter by one for these rules, which have the guest's
/// numbers; `blocks` are the container's own block devices, and no rule opens
/// another. `None` when a cgroup without a filter needs none.
pub fn apply(
    cgroup: &Path,
    rules: &[DeviceRule],
    blocks: &[u64],
    before: Option<&DeviceFilter>,
) -> Result<Option<DeviceFilter>, OsError> {
    let mut parsed: Vec<Rule> = rules
        .iter()
        .filter_map(|rule| Rule::from_spec(rule, blocks))
        .collect();
    let is_open = allows_everything(&parsed);
    if is_open && before.is_none() {
        return Ok(None);
    }
    if !is_open {
        // Making a node is no use of it: who unpacks an image needs that.
        parsed.extend([BLOCK, CHARACTER].map(|kind| allow(kind, None, None, MKNOD)));
        let always = ALWAYS.iter();
        parsed
            .extend(always.map(|(major, minor, access)| allow(CHARACTER, *major, *minor, *access)));
    }
    let program = load(&assemble(&parsed)).doing("load", "the device filter")?;
    let directory = File::open(cgroup).doing("open", cgroup.display())?;
    attach(&program, &directory, before).doing("attach the device filter to", cgroup.display())?;
    Ok(Some(DeviceFilter(program)))
}

impl Rule {
    /// `None` for what says nothing here.
    fn from_spec(rule: &DeviceRule, blocks: &[u64]) -> Option<Self> {
        let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
        let (major, minor) = (number(rule.major), number(rule.minor));
        let any_number = major.is_none() && minor.is_none();
        let access = rule.access.as_deref().unwrap_or("rwm");
        let bits = access.chars().fold(0, |bits, letter| {
            bits | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => 0,
            }
        });
        let access = if access.is_empty() { ALL } else { bits };
        let kind = match rule.kind {
            Some(DeviceKind::Pipe) => return None,
            Some(DeviceKind::Character) => Some(CHARACTER),
            // Of other numbers here are disks of other containers.
            Some(DeviceKind::Block) => match major.zip(minor) {
                Some((major, minor)) if blocks.contains(&rustix::fs::makedev(major, minor)) => {
                    Some(BLOCK)
                }
                None if any_number && !rule.allow => Some(BLOCK),
                _ => return None,
            },
            Some(DeviceKind::All) | None if any_number && (!rule.allow || access == ALL) => None,
            Some(DeviceKind::All) | None => Some(CHARACTER),
        };
        Some(Self {
            allow: rule.allow,
            kind,
            major,
            minor,
            access,
        })
    }

    fn is_for_everything(self) -> bool {
        (self.kind, self.major, self.minor, self.access) == (None, None, None, ALL)
    }
}

/// Whether all rules that count say yes.
fn allows_everything(rules: &[Rule]) -> bool {
    let counting = rules.iter().rev().take_while(|rule| rule.allow);
    counting.into_iter().any(|rule| rule.is_for_everything())
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Source register high, destination low.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

const fn load_word(to: u8, offset: i16) -> Instruction {
    instruction(0x61, to, 1, offset, 0) // BPF_LDX | BPF_MEM | BPF_W
}

const fn copy(to: u8, from: u8) -> Instruction {
    instruction(0xbf, to, from, 0, 0) // BPF_ALU64 | BPF_MOV | BPF_X
}

const fn and(to: u8, value: u32) -> Instruction {
    instruction(0x57, to, 0, 0, value.cast_signed()) // BPF_ALU64 | BPF_AND | BPF_K
}

const fn shift_right(to: u8, value: i32) -> Instruction {
    instruction(0x77, to, 0, 0, value) // BPF_ALU64 | BPF_RSH | BPF_K
}

const fn set(to: u8, value: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, value) // BPF_ALU64 | BPF_MOV | BPF_K
}

const fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0) // BPF_JMP | BPF_EXIT
}

const JUMP_IF_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_UNLESS_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K

// Registers: what is accessed.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 1;

/// The last rule that speaks of all that is asked for decides, as with the
/// lists of cgroup v1; an access none speaks of is refused.
fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load_word(KIND, 0),
        copy(ACCESS, KIND),
        and(KIND, 0xffff),
        shift_right(ACCESS, 16),
        load_word(MAJOR, 4),
        load_word(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let mut body = Vec::new();
        let fields = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        for (register, value) in fields {
            if let Some(value) = value {
                body.push(instruction(
                    JUMP_UNLESS_EQUAL,
                    register,
                    0,
                    0,
                    value.cast_signed(),
                ));
            }
        }
        if rule.access != ALL || !rule.allow {
            body.push(copy(SCRATCH, ACCESS));
            if rule.allow {
                // Not when more is asked for than it allows.
                body.push(and(SCRATCH, ALL & !rule.access));
                body.push(instruction(JUMP_UNLESS_EQUAL, SCRATCH, 0, 0, 0));
            } else {
                // As soon as something is asked for that it forbids.
                body.push(and(SCRATCH, rule.access));
                body.push(instruction(JUMP_IF_EQUAL, SCRATCH, 0, 0, 0));
            }
        }
        body.push(set(0, rule.allow.into()));
        body.push(exit());
        let length = body.len();
        for (at, step) in body.iter_mut().enumerate() {
            if matches!(step.code, JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL) {
                // A rule has ten instructions at most.
                step.offset = (length - at - 1) as i16;
            }
        }
        program.extend(body);
        if rule.allow && rule.is_for_everything() {
            // The kernel refuses instructions that nothing reaches.
            return program;
        }
    }
    program.extend([set(0, 0), exit()]);
    program
}

/// The head of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The head of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(program: &OwnedFd, cgroup: &File, before: Option<&DeviceFilter>) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        // Cgroups below may have filters of their own in addition.
        flags: BPF_F_ALLOW_MULTI | before.map_or(0, |_| BPF_F_REPLACE),
        replaced: before.map_or(0, |filter| filter.0.as_raw_fd().cast_unsigned()),
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(|_| ())
}

fn bpf<T>(command: i32, attributes: &T) -> io::Result<i32> {
    // SAFETY: the struct is the command's, its size is told, and what it points
    // to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the few instructions that `assemble` uses.
    fn run(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u64; 11];
        let mut at = 0;
        loop {
            let step = program[at];
            let (to, from) = (
                usize::from(step.registers & 15),
                usize::from(step.registers >> 4),
            );
            let value = step.immediate as u64;
            at += 1;
            let mut jump = |taken: bool| {
                at += if taken {
                    usize::try_from(step.offset).unwrap()
                } else {
                    0
                }
            };
            match step.code {
                0x61 => registers[to] = context[usize::try_from(step.offset).unwrap() / 4].into(),
                0xbf => registers[to] = registers[from],
                0x57 => registers[to] &= value,
                0x77 => registers[to] >>= value,
                0xb7 => registers[to] = value,
                JUMP_IF_EQUAL => jump(registers[to] == value),
                JUMP_UNLESS_EQUAL => jump(registers[to] != value),
                0x95 => return registers[0] != 0,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
        let own = [rustix::fs::makedev(254, 32)];
        let parsed = rules.iter();
        parsed
            .filter_map(|rule| Rule::from_spec(rule, &own))
            .collect()
    }

    /// As the verifier sees it: every instruction, from some other one.
    fn is_all_reached(program: &[Instruction]) -> bool {
        let mut reached = vec![false; program.len()];
        let mut open = vec![0];
        while let Some(at) = open.pop() {
            let Some(false) = reached.get(at) else {
                continue;
            };
            reached[at] = true;
            let step = program[at];
            if matches!(step.code, JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL) {
                open.push(at + 1 + usize::try_from(step.offset).unwrap());
            }
            if step.code != exit().code {
                open.push(at + 1);
            }
        }
        reached.iter().all(|reached| *reached)
    }

    #[test]
    fn the_last_rule_that_covers_an_access_decides() {
        let program = assemble(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
                {"allow":false,"type":"c","major":1,"minor":3,"access":"w"}]"#,
        ));
        assert!(run(&program, CHARACTER, READ, 1, 3));
        assert!(!run(&program, CHARACTER, WRITE, 1, 3));
        assert!(!run(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(!run(&program, BLOCK, READ, 1, 3));
        assert!(!run(&program, CHARACTER, READ, 10, 200));
    }

    #[test]
    fn rules_open_no_block_device() {
        let program = assemble(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","access":"rwm"},
                {"allow":true,"type":"b","major":254,"minor":16,"access":"rwm"},
                {"allow":true,"type":"p","access":"rwm"},
                {"allow":true,"access":"r"},
                {"allow":true,"major":10,"access":"rwm"}]"#,
        ));
        assert!(!run(&program, BLOCK, READ, 254, 16));
        assert!(!run(&program, BLOCK, READ, 10, 16));
        assert!(run(&program, CHARACTER, READ | WRITE, 10, 200));
        assert!(run(&program, CHARACTER, READ, 11, 200));
        assert!(!run(&program, CHARACTER, WRITE, 11, 200));
    }

    #[test]
    fn rules_open_the_containers_own_block_devices() {
        let program = assemble(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":254,"minor":32,"access":"r"}]"#,
        ));
        assert!(run(&program, BLOCK, READ, 254, 32));
        assert!(!run(&program, BLOCK, READ | WRITE, 254, 32));
        assert!(!run(&program, BLOCK, READ, 254, 33));
    }

    #[test]
    fn what_follows_an_unconditional_answer_is_left_out() {
        for text in [
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","access":"w"}]"#,
            r#"[{"allow":false},{"allow":true},{"allow":false,"type":"c","major":1,"minor":3}]"#,
            r#"[{"allow":false}]"#,
            r#"[{"allow":true}]"#,
            "[]",
        ] {
            let program = assemble(&rules(text));
            assert!(is_all_reached(&program), "{text}");
            let open = text.starts_with(r#"[{"allow":true"#);
            assert_eq!(
                run(&program, CHARACTER, READ, 7, 7),
                open || text.contains("true")
            );
        }
    }

    #[test]
    fn a_filter_that_allows_everything_is_none() {
        assert!(allows_everything(&rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#
        )));
        assert!(!allows_everything(&rules(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","access":"w"}]"#
        )));
        assert!(!allows_everything(&rules(
            r#"[{"allow":true,"type":"c","access":"rwm"}]"#
        )));
    }
}
