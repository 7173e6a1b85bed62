//! The seccomp filter of a spec.

use std::fs::File;
use std::io::{self, Read, Seek};

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::InitError;
use crate::error::Doing;
use crate::oci::{Seccomp, SeccompAction, SeccompArgument, SeccompOperator, SeccompRule};

/// A filter for the kernel to load.
#[derive(Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Subjects this thread to it.
    pub fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: self.program.len().try_into().map_err(io::Error::other)?,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel only reads the program, whose length is told and
        // which outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Builds the filter; `None` when it would allow everything.
pub fn build(spec: &Seccomp) -> Result<Option<Filter>, InitError> {
    let default = action(spec.default_action, spec.default_errno_ret)?;
    if default == ScmpAction::Allow && spec.syscalls.is_empty() {
        return Ok(None);
    }
    let architectures = spec.architectures.iter();
    let architectures: Vec<ScmpArch> = architectures
        .filter_map(|name| architecture_of(name))
        .collect();
    let filter = || -> Result<ScmpFilterContext, SeccompError> {
        let mut filter = ScmpFilterContext::new(default)?;
        for architecture in &architectures {
            filter.add_arch(*architecture)?;
        }
        Ok(filter)
    };
    let mut filter = filter().map_err(InitError::Seccomp)?;
    for rule in &spec.syscalls {
        let action = action(rule.action, rule.errno_ret)?;
        if action != default {
            add(&mut filter, rule, action)?;
        }
    }
    let mut program = Vec::new();
    if denies(default) {
        for (architecture, audit) in [(ScmpArch::X8664, AUDIT_X86_64), (ScmpArch::X86, AUDIT_I386)]
        {
            let is_native = architecture == ScmpArch::X8664;
            if let Some(last) = last_named(spec, architecture)
                && (is_native || architectures.contains(&architecture))
            {
                program.extend(unknown_calls(audit, last));
            }
        }
    }
    program.extend(instructions(&filter)?);
    Ok(Some(Filter {
        program,
        flags: flags_of(spec),
    }))
}

// linux/audit.h
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_I386: u32 = 0x4000_0003;

/// Whether a call that no rule names is refused in a way that programs take for
/// a final answer.
fn denies(default: ScmpAction) -> bool {
    match default {
        ScmpAction::Errno(errno) => errno != libc::ENOSYS,
        ScmpAction::KillThread | ScmpAction::KillProcess | ScmpAction::Trap => true,
        _ => false,
    }
}

/// The newest system call of the profile, as far as the library knows it.
fn last_named(spec: &Seccomp, architecture: ScmpArch) -> Option<u32> {
    let names = spec.syscalls.iter().flat_map(|rule| &rule.names);
    let numbers = names.filter_map(|name| {
        let call = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
        // Negative ones are the library's, not the kernel's.
        u32::try_from(call.as_raw_syscall()).ok()
    });
    numbers.max()
}

/// Calls newer than the profile don't exist for it: a C library that is told
/// so does without, one that is refused gives up. Other runtimes do the same,
/// and profiles are written for that.
fn unknown_calls(audit: u32, last: u32) -> [libc::sock_filter; 6] {
    // Offsets in struct seccomp_data.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    /// The first call of the x32 ABI, which has numbers of its own.
    const X32: u32 = 0x4000_0000;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const ABOVE: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let step = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    [
        step(LOAD, ARCHITECTURE, 0, 0),
        step(EQUAL, audit, 0, 4),
        step(LOAD, NUMBER, 0, 0),
        step(AT_LEAST, X32, 2, 0),
        step(ABOVE, last, 0, 1),
        step(RETURN, answer, 0, 0),
    ]
}

/// The library's program. It writes to files alone.
fn instructions(filter: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, InitError> {
    let file = memfd_create(c"seccomp", MemfdFlags::CLOEXEC).doing("make", "a file")?;
    filter.export_bpf(&file).map_err(InitError::Seccomp)?;
    let mut bytes = Vec::new();
    let mut file = File::from(file);
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .doing("read", "the seccomp filter")?;
    let (steps, _) = bytes.as_chunks::<8>();
    let step = |[c0, c1, jt, jf, k @ ..]: &[u8; 8]| libc::sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes(*k),
    };
    Ok(steps.iter().map(step).collect())
}

fn flags_of(spec: &Seccomp) -> libc::c_ulong {
    let flag = |name: &String| match name.as_str() {
        "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // One thread; nobody is notified.
        _ => 0,
    };
    spec.flags.iter().map(flag).fold(0, |all, flag| all | flag)
}

fn add(
    filter: &mut ScmpFilterContext,
    rule: &SeccompRule,
    action: ScmpAction,
) -> Result<(), InitError> {
    let arguments = &rule.args;
    for name in &rule.names {
        // A name that the library doesn't know is one that no rule can hit.
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let added = if arguments.is_empty() {
            filter.add_rule(action, syscall).map(|_| ())
        } else if repeats_an_argument(arguments) {
            // Conditions on the same argument are alternatives.
            arguments.iter().try_for_each(|argument| {
                let condition = [condition(argument)];
                filter.add_rule_conditional(action, syscall, &condition)?;
                Ok(())
            })
        } else {
            let conditions: Vec<_> = arguments.iter().map(condition).collect();
            filter
                .add_rule_conditional(action, syscall, &conditions)
                .map(|_| ())
        };
        added.map_err(InitError::Seccomp)?;
    }
    Ok(())
}

fn repeats_an_argument(arguments: &[SeccompArgument]) -> bool {
    let mut seen = [false; 6];
    arguments
        .iter()
        .any(|argument| match seen.get_mut(argument.index as usize) {
            Some(seen) => std::mem::replace(seen, true),
            None => false,
        })
}

fn condition(argument: &SeccompArgument) -> ScmpArgCompare {
    let value = argument.value;
    let (operator, value) = match argument.op {
        SeccompOperator::NotEqual => (ScmpCompareOp::NotEqual, value),
        SeccompOperator::Less => (ScmpCompareOp::Less, value),
        SeccompOperator::LessOrEqual => (ScmpCompareOp::LessOrEqual, value),
        SeccompOperator::Equal => (ScmpCompareOp::Equal, value),
        SeccompOperator::GreaterOrEqual => (ScmpCompareOp::GreaterEqual, value),
        SeccompOperator::Greater => (ScmpCompareOp::Greater, value),
        SeccompOperator::MaskedEqual => (ScmpCompareOp::MaskedEqual(value), argument.value_two),
    };
    ScmpArgCompare::new(argument.index, operator, value)
}

fn action(action: SeccompAction, errno: Option<u32>) -> Result<ScmpAction, InitError> {
    let errno = errno.unwrap_or(libc::EPERM.cast_unsigned()) & 0xffff;
    Ok(match action {
        SeccompAction::Kill | SeccompAction::KillThread => ScmpAction::KillThread,
        SeccompAction::KillProcess => ScmpAction::KillProcess,
        SeccompAction::Trap => ScmpAction::Trap,
        SeccompAction::Errno => ScmpAction::Errno(errno.cast_signed()),
        SeccompAction::Trace => ScmpAction::Trace(errno as u16),
        SeccompAction::Log => ScmpAction::Log,
        SeccompAction::Allow => ScmpAction::Allow,
        SeccompAction::Notify => {
            return Err(InitError::Invalid {
                field: "linux.seccomp",
                reason: "SCMP_ACT_NOTIFY needs a listener, which is not in the guest".to_owned(),
            });
        }
    })
}

/// Those a process of this machine can have.
fn architecture_of(architecture: &str) -> Option<ScmpArch> {
    match architecture {
        "SCMP_ARCH_X86" => Some(ScmpArch::X86),
        "SCMP_ARCH_X86_64" => Some(ScmpArch::X8664),
        "SCMP_ARCH_X32" => Some(ScmpArch::X32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;

    const fn errno(errno: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
    }

    /// Runs the few instructions that filters consist of.
    fn answer(filter: &Filter, architecture: u32, number: u32) -> u32 {
        let data = [number, architecture];
        let (mut register, mut at) = (0, 0);
        loop {
            let step = filter.program[at];
            at += 1;
            let mut jump = |taken| at += usize::from(if taken { step.jt } else { step.jf });
            match step.code {
                0x20 => register = data[step.k as usize / 4],
                0x15 => jump(register == step.k),
                0x25 => jump(register > step.k),
                0x35 => jump(register >= step.k),
                0x05 => at += step.k as usize,
                0x06 => return step.k,
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn filter(default: &str) -> Filter {
        let text = format!(
            r#"{{{default},"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":
                [{{"names":["read","openat2","not_yet"],"action":"SCMP_ACT_ALLOW"}}]}}"#
        );
        build(&serde_json::from_str(&text).unwrap())
            .unwrap()
            .unwrap()
    }

    #[test]
    fn calls_newer_than_the_profile_do_not_exist() {
        let filter = filter(r#""defaultAction":"SCMP_ACT_ERRNO""#);
        // openat2 is 437 of both.
        for (architecture, read) in [(AUDIT_X86_64, 0), (AUDIT_I386, 3)] {
            assert_eq!(answer(&filter, architecture, read), ALLOWED);
            assert_eq!(answer(&filter, architecture, 437), ALLOWED);
            assert_eq!(answer(&filter, architecture, 436), errno(libc::EPERM));
            assert_eq!(answer(&filter, architecture, 438), errno(libc::ENOSYS));
            assert_eq!(answer(&filter, architecture, 9999), errno(libc::ENOSYS));
        }
        // Another ABI, and another machine's.
        assert_ne!(
            answer(&filter, AUDIT_X86_64, 0x4000_0000 + 500),
            errno(libc::ENOSYS)
        );
        assert_ne!(answer(&filter, 0xc000_00b7, 9999), errno(libc::ENOSYS));
    }

    #[test]
    fn a_default_that_says_so_itself_stays() {
        let filter_of = |default: &str| answer(&filter(default), AUDIT_X86_64, 9999);
        assert_eq!(
            filter_of(r#""defaultAction":"SCMP_ACT_LOG""#),
            libc::SECCOMP_RET_LOG
        );
        let explicit = r#""defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38"#;
        assert_eq!(filter_of(explicit), errno(libc::ENOSYS));
    }
}
