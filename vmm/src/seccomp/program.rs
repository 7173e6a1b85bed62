//! Turns a list of system calls into a filter (Documentation/userspace-api/
//! seccomp_filter.rst of Linux).
//!
//! The kernel runs a new filter once for every system call there is, to learn
//! which ones need no look at their arguments. A search tree makes that short:
//! a chain of comparisons costs each thread a millisecond at its start.

use std::collections::BTreeMap;
use std::io;

use seccompiler::sock_filter;

use super::Allowed;

// linux/bpf_common.h: load a word, return, compare.
const LOAD: u16 = 0x20;
const RETURN: u16 = 0x06;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const X86_64: u32 = 0xc000_003e;
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;

/// What is looked at of a call: nothing, or one argument and its values.
type Condition = Option<(u8, Vec<u32>)>;

/// A filter that lets the calls of `lists` pass and kills the process for any
/// other.
///
/// # Errors
/// The lists contradict each other or are too long.
pub(super) fn compile(lists: &[&[Allowed]]) -> io::Result<Vec<sock_filter>> {
    let mut calls: BTreeMap<u32, Condition> = BTreeMap::new();
    for allowed in lists.iter().copied().flatten() {
        let number = u32::try_from(allowed.call).map_err(io::Error::other)?;
        let new = allowed
            .only
            .map(|(position, values)| (position, values.iter().map(|v| *v as u32).collect()));
        match (calls.get_mut(&number), new) {
            (None, new) => {
                calls.insert(number, new);
            }
            (Some(None), None) => {}
            (Some(Some((position, values))), Some((new_position, more)))
                if *position == new_position =>
            {
                values.extend::<Vec<u32>>(more);
            }
            _ => return Err(io::Error::other("a system call is listed in two ways")),
        }
    }
    let calls: Vec<_> = calls.into_iter().collect();
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE),
        jump(JUMP_EQUAL, X86_64, 1, 0)?,
        instruction(RETURN, KILL_PROCESS),
        instruction(LOAD, NUMBER),
    ];
    program.extend(tree(&calls)?);
    Ok(program)
}

/// Decides about the calls of `calls`, which are in order.
fn tree(calls: &[(u32, Condition)]) -> io::Result<Vec<sock_filter>> {
    match calls {
        [] => Ok(vec![instruction(RETURN, KILL_PROCESS)]),
        [(number, condition)] => leaf(*number, condition),
        _ => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let first_high = high.first().map_or(u32::MAX, |(number, _)| *number);
            let (low, high) = (tree(low)?, tree(high)?);
            let mut program = vec![jump(JUMP_AT_LEAST, first_high, low.len(), 0)?];
            program.extend(low);
            program.extend(high);
            Ok(program)
        }
    }
}

fn leaf(number: u32, condition: &Condition) -> io::Result<Vec<sock_filter>> {
    let mut body = Vec::new();
    if let Some((position, values)) = condition {
        // The low half: all arguments that we look at are ints.
        body.push(instruction(LOAD, ARGUMENTS + 8 * u32::from(*position)));
        for (index, value) in values.iter().enumerate() {
            // To the last instruction, over the comparisons left and the kill.
            body.push(jump(JUMP_EQUAL, *value, values.len() - index, 0)?);
        }
        body.push(instruction(RETURN, KILL_PROCESS));
    }
    body.push(instruction(RETURN, ALLOW));
    let mut program = vec![jump(JUMP_EQUAL, number, 0, body.len())?];
    program.extend(body);
    program.push(instruction(RETURN, KILL_PROCESS));
    Ok(program)
}

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Compares with `k` and skips so many instructions if so, or if not.
fn jump(code: u16, k: u32, if_so: usize, if_not: usize) -> io::Result<sock_filter> {
    let short = |skip| u8::try_from(skip).map_err(io::Error::other);
    Ok(sock_filter {
        code,
        jt: short(if_so)?,
        jf: short(if_not)?,
        k,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{any, only};
    use super::*;

    /// What the kernel would do.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD => {
                    value = match step.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        offset => {
                            assert_eq!((offset - ARGUMENTS) % 8, 0);
                            arguments[(offset - ARGUMENTS) as usize / 8] as u32
                        }
                    };
                }
                RETURN => return step.k,
                JUMP_EQUAL | JUMP_AT_LEAST => {
                    let so = match step.code {
                        JUMP_EQUAL => value == step.k,
                        _ => value >= step.k,
                    };
                    at += usize::from(if so { step.jt } else { step.jf });
                }
                code => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn decides_as_the_lists_say() {
        for count in 0..40 {
            let numbers: Vec<i64> = (0..count).map(|i| 3 + 7 * i).collect();
            let list: Vec<Allowed> = numbers
                .iter()
                .map(|number| match number % 2 {
                    0 => any(*number),
                    _ => only(*number, 2, &[1, 5, 0x8000_0000]),
                })
                .collect();
            let program = compile(&[&list, &[only(3, 2, &[9])]]).unwrap();
            for number in 0..300 {
                for argument in [0, 1, 5, 9, 0x8000_0000, 0x1_0000_0001] {
                    let arguments = [7, 7, argument, 7, 7, 7];
                    let in_list = numbers.contains(&i64::from(number));
                    let argument = argument as u32;
                    let passes = number % 2 == 0 || [1, 5, 0x8000_0000].contains(&argument);
                    let allowed = (in_list && passes) || (number == 3 && argument == 9);
                    let expected = if allowed { ALLOW } else { KILL_PROCESS };
                    assert_eq!(run(&program, X86_64, number, arguments), expected);
                    assert_eq!(run(&program, 3, number, arguments), KILL_PROCESS);
                    let x32 = number | 0x4000_0000;
                    assert_eq!(run(&program, X86_64, x32, arguments), KILL_PROCESS);
                }
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(compile(&[&[any(5)], &[only(5, 1, &[0])]]).is_err());
        assert!(compile(&[&[only(5, 2, &[0])], &[only(5, 1, &[0])]]).is_err());
    }
}
