//! Tiny kernels in assembly, built with binutils when a test wants them.

use std::fs::{self, File};
use std::process::Command;

/// What payloads have in common: the entry, and words for talking.
const PRELUDE: &str = r#"
    .intel_syntax noprefix
    .set COM1, 0x3f8

    # One byte to the serial port.
    .macro say char
        mov dx, COM1
        mov al, \char
        out dx, al
    .endm

    # Reads / writes a dword of the configuration space of slot \slot.
    .macro config_address slot, offset
        mov dx, 0xcf8
        mov eax, 0x80000000 | (\slot << 11) | (\offset & 0xfc)
        out dx, eax
        mov dx, 0xcfc
    .endm
    .macro config_read slot, offset
        config_address \slot, \offset
        in eax, dx
    .endm
    .macro config_write slot, offset, value
        config_address \slot, \offset
        mov eax, \value
        out dx, eax
    .endm

    # \vector goes to `handler`. Changes rdi and rax.
    .macro on_vector vector
        lea rdi, [rip + idt]
        lea rax, [rip + handler]
        mov [rdi + 16 * \vector], ax
        mov word ptr [rdi + 16 * \vector + 2], 0x10
        mov word ptr [rdi + 16 * \vector + 4], 0x8e00
        shr rax, 16
        mov [rdi + 16 * \vector + 6], ax
        shr rax, 16
        mov [rdi + 16 * \vector + 8], eax
        lea rax, [rip + idt_pointer]
        mov [rax + 2], rdi
        lidt [rax]
    .endm

    # Ends the machine: the keyboard controller pulses the reset line.
    .macro reset
        mov al, 0xfe
        out 0x64, al
    9:  hlt
        jmp 9b
    .endm

    .globl _start
    .text
    _start:
        lea rsp, [rip + stack_end]
"#;

const POSTLUDE: &str = r#"
    .bss
    .balign 16
    stack: .skip 16384
    stack_end:
    idt: .skip 4096
    .data
    idt_pointer:
        .word 4095
        .quad 0
"#;

/// Assembles and links `source` (Intel syntax; falls in at the 64-bit entry of
/// the boot protocol) and opens the ELF file.
pub fn build(source: &str) -> File {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("payload.s"), format!("{PRELUDE}\n{source}\n{POSTLUDE}")).unwrap();
    run(Command::new("as")
        .arg("-o")
        .arg(at("payload.o"))
        .arg(at("payload.s")));
    run(Command::new("ld")
        .args([
            "-static",
            "-nostdlib",
            "-Ttext-segment=0x200000",
            "-e",
            "_start",
        ])
        .args(["-z", "max-page-size=4096", "-z", "noexecstack", "-o"])
        .arg(at("payload"))
        .arg(at("payload.o")));
    File::open(at("payload")).unwrap()
}

fn run(command: &mut Command) {
    let output = command.output().expect("binutils are installed");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
