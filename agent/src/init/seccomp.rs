//! The seccomp filter of a spec.

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::InitError;

/// Builds the filter; `None` when it would allow everything.
pub fn build(spec: &LinuxSeccomp) -> Result<Option<ScmpFilterContext>, InitError> {
    let rules = spec.syscalls().iter().flatten();
    let default = action(spec.default_action(), spec.default_errno_ret())?;
    if default == ScmpAction::Allow && rules.clone().next().is_none() {
        return Ok(None);
    }
    let filter = || -> Result<ScmpFilterContext, SeccompError> {
        let mut filter = ScmpFilterContext::new(default)?;
        // The spec says whether, not the library.
        filter.set_ctl_nnp(false)?;
        for architecture in spec.architectures().iter().flatten() {
            if let Some(architecture) = architecture_of(*architecture) {
                filter.add_arch(architecture)?;
            }
        }
        for flag in spec.flags().iter().flatten() {
            match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true)?,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true)?,
                // One thread; nobody is notified.
                _ => &mut filter,
            };
        }
        Ok(filter)
    };
    let mut filter = filter().map_err(InitError::Seccomp)?;
    for rule in rules {
        let action = action(rule.action(), rule.errno_ret())?;
        if action != default {
            add(&mut filter, rule, action)?;
        }
    }
    Ok(Some(filter))
}

fn add(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    action: ScmpAction,
) -> Result<(), InitError> {
    let arguments: Vec<&LinuxSeccompArg> = rule.args().iter().flatten().collect();
    for name in rule.names() {
        // A name that the library doesn't know is one that no rule can hit.
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let added = if arguments.is_empty() {
            filter.add_rule(action, syscall).map(|_| ())
        } else if repeats_an_argument(&arguments) {
            // Conditions on the same argument are alternatives.
            arguments.iter().try_for_each(|argument| {
                let condition = [condition(argument)];
                filter.add_rule_conditional(action, syscall, &condition)?;
                Ok(())
            })
        } else {
            let conditions: Vec<_> = arguments
                .iter()
                .map(|argument| condition(argument))
                .collect();
            filter
                .add_rule_conditional(action, syscall, &conditions)
                .map(|_| ())
        };
        added.map_err(InitError::Seccomp)?;
    }
    Ok(())
}

fn repeats_an_argument(arguments: &[&LinuxSeccompArg]) -> bool {
    let mut seen = [false; 6];
    arguments
        .iter()
        .any(|argument| match seen.get_mut(argument.index()) {
            Some(seen) => std::mem::replace(seen, true),
            None => false,
        })
}

fn condition(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    // An index that doesn't fit is one that the library refuses.
    let index = u32::try_from(argument.index()).unwrap_or(u32::MAX);
    let value = argument.value();
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(value),
            argument.value_two().unwrap_or(0),
        ),
    };
    ScmpArgCompare::new(index, operator, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, InitError> {
    let errno = errno.unwrap_or(libc::EPERM.cast_unsigned()) & 0xffff;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(InitError::Invalid {
                field: "linux.seccomp",
                reason: "SCMP_ACT_NOTIFY needs a listener, which is not in the guest".to_owned(),
            });
        }
    })
}

/// Those a process of this machine can have.
fn architecture_of(architecture: Arch) -> Option<ScmpArch> {
    match architecture {
        Arch::ScmpArchX86 => Some(ScmpArch::X86),
        Arch::ScmpArchX86_64 => Some(ScmpArch::X8664),
        Arch::ScmpArchX32 => Some(ScmpArch::X32),
        _ => None,
    }
}
