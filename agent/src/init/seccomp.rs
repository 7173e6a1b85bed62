//! The seccomp filter of a spec.

use super::InitError;
use crate::oci::{Seccomp, SeccompAction, SeccompArgument, SeccompOperator, SeccompRule};
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};

/// Builds the filter; `None` when it would allow everything.
pub fn build(spec: &Seccomp) -> Result<Option<ScmpFilterContext>, InitError> {
    let rules = spec.syscalls.iter();
    let default = action(spec.default_action, spec.default_errno_ret)?;
    if default == ScmpAction::Allow && rules.clone().next().is_none() {
        return Ok(None);
    }
    let filter = || -> Result<ScmpFilterContext, SeccompError> {
        let mut filter = ScmpFilterContext::new(default)?;
        // The spec says whether, not the library.
        filter.set_ctl_nnp(false)?;
        for architecture in &spec.architectures {
            if let Some(architecture) = architecture_of(architecture) {
                filter.add_arch(architecture)?;
            }
        }
        for flag in &spec.flags {
            match flag.as_str() {
                "SECCOMP_FILTER_FLAG_LOG" => filter.set_ctl_log(true)?,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => filter.set_ctl_ssb(true)?,
                // One thread; nobody is notified.
                _ => &mut filter,
            };
        }
        Ok(filter)
    };
    let mut filter = filter().map_err(InitError::Seccomp)?;
    for rule in rules {
        let action = action(rule.action, rule.errno_ret)?;
        if action != default {
            add(&mut filter, rule, action)?;
        }
    }
    Ok(Some(filter))
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
