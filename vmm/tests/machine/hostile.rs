//! Guests that do anything but what they should.

use husk_vmm_spec::{ExitReason, Message};

use crate::harness::{Request0, TestMachine, skip};
use crate::payload;

/// Accesses at random: the configuration ports, the functions' registers, ports
/// of nobody. Says '.' and resets when it is through.
fn random(seed: u64) -> String {
    format!(
        r#"
        mov r8, {seed}
        # xorshift64: next number in rax.
        .macro next
            mov rax, r8
            shl rax, 13
            xor r8, rax
            mov rax, r8
            shr rax, 7
            xor r8, rax
            mov rax, r8
            shl rax, 17
            xor r8, rax
            mov rax, r8
        .endm
        # First, decode every function, and start some devices.
        mov r9d, 0x80000804
    decode:
        mov dx, 0xcf8
        mov eax, r9d
        out dx, eax
        mov dx, 0xcfc
        mov eax, 6
        out dx, eax
        add r9d, 0x800
        cmp r9d, 0x80004000
        jb decode

        mov r10d, 2000
    again:
        next
        mov r11, rax
        and eax, 7
        cmp eax, 1
        jb config
        cmp eax, 2
        jb ports
        # Registers of virtio functions: dword, word or byte; writes mostly
        # to the common configuration.
        mov rbx, r11
        shr rbx, 8
        mov ecx, ebx
        and ebx, 0x2ffff
        test ecx, 0x100000
        jz wide
        and ebx, 0x3803f
    wide:
        add ebx, 0xc0008000
        next
        test r11d, 0x100
        jz read
        test r11d, 0x200
        jz write_byte
        test r11d, 0x400
        jz write_word
        mov [rbx], eax
        jmp done
    write_word:
        and eax, 0x1f
        mov [rbx], ax
        jmp done
    write_byte:
        mov [rbx], al
        jmp done
    read:
        mov rax, [rbx]
        jmp done
    config:
        # Any register of slots 2 to 5; addresses are left alone half the time.
        mov eax, r11d
        shr eax, 8
        and eax, 0x18ff
        add eax, 0x80001000
        mov dx, 0xcf8
        out dx, eax
        next
        mov ecx, eax
        and ecx, 3
        lea edx, [rcx + 0xcfc]
        test r11d, 0x40000000
        jz config_read
        out dx, al
        jmp done
    config_read:
        in eax, dx
        jmp done
    ports:
        # Not those that reset.
        mov rdx, r11
        shr rdx, 16
        or edx, 0x8000
        in eax, dx
        out dx, al
    done:
        dec r10d
        jnz again
        say '.'
        reset
        "#
    )
}

#[test]
fn accesses_at_random_harm_only_the_guest() {
    if skip() {
        return;
    }
    for seed in [1, 0x9e37_79b9, u64::MAX / 3] {
        let (mut request, console) = Request0::new(payload::build(&random(seed)));
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let file = request.give(file.into());
        request.spec.blocks.push(husk_vmm_spec::BlockSpec {
            id: "disk".into(),
            file,
            read_only: false,
            serial: "disk".into(),
            rate: Default::default(),
        });
        request.spec.vsock = Some(husk_vmm_spec::VsockSpec {
            cid: 3,
            host_ports: Vec::new(),
        });
        let mut machine = TestMachine::start(request, console);
        assert!(matches!(machine.receive(), Message::Started(_)));
        assert_eq!(machine.exit_reason(), ExitReason::Reset, "seed {seed:#x}");
        let said = machine.said();
        assert!(said.ends_with('.'), "seed {seed:#x}: {said}");
    }
}

#[test]
fn a_device_with_nonsense_for_queues_needs_a_reset_and_gets_it() {
    if skip() {
        return;
    }
    // The entropy device, slot 3: rings outside memory; then status must say
    // NEEDS_RESET (64), and 0 after a reset.
    let mut machine = TestMachine::run(
        r#"
        config_read 3, 0x10
        mov ebx, eax
        and ebx, 0xfffffff0
        config_write 3, 4, 6
        mov byte ptr [rbx + 20], 0
        mov byte ptr [rbx + 20], 3
        mov dword ptr [rbx + 8], 1
        mov dword ptr [rbx + 12], 1
        mov byte ptr [rbx + 20], 11
        mov word ptr [rbx + 22], 0
        mov dword ptr [rbx + 32], 0xfffff000
        mov dword ptr [rbx + 36], 0xffffffff
        mov dword ptr [rbx + 40], 0xfffff000
        mov dword ptr [rbx + 48], 0xfffff000
        mov word ptr [rbx + 28], 1
        mov byte ptr [rbx + 20], 15
        test byte ptr [rbx + 20], 64
        jz bad
        say '+'
        mov byte ptr [rbx + 20], 0
        cmp byte ptr [rbx + 20], 0
        jne bad
        say '+'
    bad:
        reset
        "#,
    );
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    let said = machine.said();
    assert!(said.starts_with("husk-vmm: device rng: "), "{said}");
    assert!(said.ends_with("++"), "{said}");
}
