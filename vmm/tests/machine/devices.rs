//! The PCI bus and what is on it, from the guest's side.

use husk_vmm_spec::ExitReason;

use crate::harness::{TestMachine, skip};

/// Looks for the function with this id; its slot's configuration address goes
/// to r12d, the address of BAR 0 to r13. Jumps to `bad` without one.
/// Then turns memory decoding and bus mastering on.
pub const FIND: &str = r#"
    .macro find id
        mov r12d, 0x80000000
    8:  mov dx, 0xcf8
        mov eax, r12d
        out dx, eax
        mov dx, 0xcfc
        in eax, dx
        cmp eax, \id
        je 7f
        add r12d, 0x800
        cmp r12d, 0x80010000
        jb 8b
        jmp bad
    7:  mov eax, 0x10
        call read_config
        mov r13d, eax
        and r13d, 0xfffffff0
        mov eax, 4
        call address_config
        mov eax, 6
        out dx, eax
    .endm
    jmp start

    # eax: offset; answers in eax.
    read_config:
        call address_config
        in eax, dx
        ret
    address_config:
        or eax, r12d
        mov dx, 0xcf8
        out dx, eax
        mov dx, 0xcfc
        ret
    bad:
        say '-'
        reset
    start:
"#;

fn run(source: &str) -> TestMachine {
    TestMachine::run(&format!("{FIND}\n{source}"))
}

#[test]
fn the_bus_begins_with_a_host_bridge_and_ends_somewhere() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(
        r#"
        config_read 0, 8
        shr eax, 16
        cmp eax, 0x0600
        jne bad
        # No function 1, nobody in the last slot, no bus 1.
        mov esi, 0x80000100
        call nobody
        mov esi, 0x8000f800
        call nobody
        mov esi, 0x80010000
        call nobody
        # Without the enable bit nobody answers.
        xor esi, esi
        call nobody
        say '+'
    bad:
        reset
    nobody:
        mov dx, 0xcf8
        mov eax, esi
        out dx, eax
        mov dx, 0xcfc
        in eax, dx
        cmp eax, 0xffffffff
        jne bad
        ret
        "#,
    );
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "+");
}

#[test]
fn pvpanic_tells_shutdown_from_panic() {
    if skip() {
        return;
    }
    for (event, reason) in [(4, ExitReason::Shutdown), (1, ExitReason::Panic)] {
        let machine = run(&format!(
            r#"
            find 0x00111b36
            cmp byte ptr [r13], 5
            jne bad
            mov byte ptr [r13], {event}
            1: jmp 1b
            "#
        ));
        assert_eq!(machine.exit_reason(), reason);
    }
}

#[test]
fn registers_answer_only_where_the_guest_put_them() {
    if skip() {
        return;
    }
    let mut machine = run(r#"
        find 0x00111b36
        # Elsewhere in the hole, over memory, decoding off, back again.
        mov esi, 0xe0000000
        call move_bar
        cmp byte ptr [rsi], 5
        jne bad
        cmp byte ptr [r13], 0
        jne bad
        mov esi, 0x300000
        mov byte ptr [rsi], 0x77
        call move_bar
        cmp byte ptr [rsi], 0x77
        jne bad
        mov esi, 0xe0000000
        cmp byte ptr [rsi], 0
        jne bad
        call move_bar
        cmp byte ptr [rsi], 5
        jne bad
        mov eax, 4
        call address_config
        xor eax, eax
        out dx, eax
        cmp byte ptr [rsi], 0
        jne bad
        # Off the end of the register: nobody.
        say '+'
        reset
    move_bar:
        mov eax, 0x10
        call address_config
        mov eax, esi
        out dx, eax
        ret
        "#);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "+");
}

#[test]
fn the_entropy_device_interrupts_by_message() {
    if skip() {
        return;
    }
    let mut machine = run(&format!("{RNG_SETUP}\n{RNG}"));
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "i+");
}

/// Has a virtio-rng device ready, whose queue's interrupt goes to `handler`: 8
/// entries at 300000, 301000, 302000; r13: its registers, rbx: the local APIC.
pub const RNG_SETUP: &str = r#"
        find 0x10441af4
        # r13: common configuration; its other pages follow.
        # Local APIC on, through its MSR's page at fee00000.
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff

        on_vector 0x40

        # MSI-X entry 1: address, data, unmasked; then MSI-X on. The table is
        # the BAR's fifth page.
        lea rbx, [r13 + 0x4000]
        mov dword ptr [rbx + 16], 0xfee00000
        mov dword ptr [rbx + 20], 0
        mov dword ptr [rbx + 24], 0x40
        mov dword ptr [rbx + 28], 0
        call find_msix
        or eax, 0x80000000
        out dx, eax

        # Reset, acknowledge, driver, VERSION_1, features ok.
        mov byte ptr [r13 + 20], 0
        mov byte ptr [r13 + 20], 3
        mov dword ptr [r13 + 8], 1
        mov dword ptr [r13 + 12], 1
        mov byte ptr [r13 + 20], 11
        test byte ptr [r13 + 20], 8
        jz bad
        # Queue 0: 8 entries, vector 1, rings at 300000, 301000, 302000.
        mov word ptr [r13 + 22], 0
        mov word ptr [r13 + 24], 8
        mov word ptr [r13 + 26], 1
        mov dword ptr [r13 + 32], 0x300000
        mov dword ptr [r13 + 36], 0
        mov dword ptr [r13 + 40], 0x301000
        mov dword ptr [r13 + 44], 0
        mov dword ptr [r13 + 48], 0x302000
        mov dword ptr [r13 + 52], 0
        mov word ptr [r13 + 28], 1
        mov byte ptr [r13 + 20], 15

        mov ebx, 0xfee00000
        jmp ready

    # Leaves the MSI-X capability addressed; its first dword in eax.
    find_msix:
        mov eax, 0x34
        call read_config
        movzx esi, al
    2:  mov eax, esi
        call read_config
        cmp al, 0x11
        je 3f
        movzx esi, ah
        test esi, esi
        jnz 2b
        jmp bad
    3:  ret
    ready:
"#;

/// One request, and its interrupt.
const RNG: &str = r#"
        # One writable buffer of 8 bytes at 303000.
        mov edi, 0x300000
        mov qword ptr [rdi], 0x303000
        mov dword ptr [rdi + 8], 8
        mov dword ptr [rdi + 12], 2
        mov edi, 0x301000
        mov word ptr [rdi + 4], 0
        mov word ptr [rdi + 2], 1
        # Notify: the BAR's fourth page.
        mov word ptr [r13 + 0x3000], 0
        sti
    wait:
        hlt
        jmp wait

    handler:
        say 'i'
        # The used ring has one entry of 8 bytes, and they are not all zero.
        mov edi, 0x302000
        cmp word ptr [rdi + 2], 1
        jne bad
        cmp dword ptr [rdi + 8], 8
        jne bad
        mov edi, 0x303000
        cmp qword ptr [rdi], 0
        je bad
        say '+'
        reset
"#;
