//! A machine's beginning, its ends, and what can be asked of it in between.

use std::time::{Duration, Instant};

use husk_vmm_spec::{ExitReason, Message, Reply, Request};

use crate::harness::{Request0, TestMachine, skip};
use crate::payload;

#[test]
fn enters_the_kernel_as_the_boot_protocol_says() {
    if skip() {
        return;
    }
    // rsi: boot_params. Says the first letter of the command line, and whether
    // the header's magic number is there.
    let mut machine = TestMachine::run(
        r#"
        mov ebx, [rsi + 0x228]
        say [rbx]
        cmp dword ptr [rsi + 0x202], 0x53726448
        jne bad
        cmp byte ptr [rsi + 0x1e8], 3
        jne bad
        say '+'
        reset
    bad:
        say '-'
        reset
        "#,
    );
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "t+");
}

#[test]
fn the_initramfs_is_where_boot_params_say() {
    if skip() {
        return;
    }
    let (mut request, console) = Request0::new(payload::build(
        r#"
        mov ebx, [rsi + 0x218]
        mov ecx, [rsi + 0x21c]
        mov dx, COM1
    next:
        mov al, [rbx]
        out dx, al
        inc rbx
        loop next
        reset
        "#,
    ));
    let file = tempfile::tempfile().unwrap();
    rustix::io::write(&file, b"the agent").unwrap();
    request.give_initramfs(file);
    let mut machine = TestMachine::start(request, console);
    assert!(matches!(machine.receive(), Message::Started(_)));
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "the agent");
}

#[test]
fn a_triple_fault_is_a_reset() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("lidt [rip + none]\n ud2\n none: .skip 10");
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
}

#[test]
fn performance_counters_are_not_there() {
    if skip() {
        return;
    }
    // The first of AMD's and of Intel's. A fault without an IDT is a reset.
    for counter in ["0xc0010000", "0xc0010007", "0xc1", "0x186"] {
        let mut machine = TestMachine::run(&format!(
            r#"
            lidt [rip + none]
            say '+'
            mov ecx, {counter}
            rdmsr
            say '-'
            reset
            none: .skip 10
            "#
        ));
        assert_eq!(machine.exit_reason(), ExitReason::Reset);
        let said = machine.said();
        assert!(
            said.starts_with("+husk-vmm: triple fault"),
            "{counter}: {said}"
        );
    }
}

#[test]
fn the_reset_control_register_resets() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("mov dx, 0xcf9\n mov al, 6\n out dx, al\n 1: jmp 1b");
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
}

#[test]
fn ports_and_addresses_of_nobody_are_harmless() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(
        r#"
        mov dx, 0x70
        in eax, dx
        cmp eax, 0xffffffff
        jne bad
        out dx, eax
        mov ebx, 0xd0000000
        mov [rbx], rax
        mov rax, [rbx]
        test rax, rax
        jnz bad
        say '+'
    bad:
        reset
        "#,
    );
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "+");
}

#[test]
fn a_spinning_guest_can_be_killed() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run("say '+'\n 1: jmp 1b");
    assert_eq!(machine.next_byte(), b'+');
    let asked = Instant::now();
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_halted_guest_can_be_killed() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run("say '+'\n cli\n 1: hlt\n jmp 1b");
    assert_eq!(machine.next_byte(), b'+');
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
}

#[test]
fn a_hang_up_ends_the_machine() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run("say '+'\n 1: jmp 1b");
    assert_eq!(machine.next_byte(), b'+');
    machine.hang_up();
}

#[test]
fn a_paused_guest_makes_no_exits_until_it_is_resumed() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("1: in al, 0x80\n jmp 1b");
    let exits = || match machine.request(&Request::Stats, &[]) {
        Message::Reply(Ok(Reply::Stats(stats))) => stats.exits,
        other => panic!("{other:?}"),
    };
    let done = Message::Reply(Ok(Reply::Done));
    for _ in 0..20 {
        assert_eq!(machine.request(&Request::Pause, &[]), done);
        let before = exits();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(exits(), before);
        assert_eq!(machine.request(&Request::Resume, &[]), done);
        let resumed = Instant::now();
        while exits() == before {
            assert!(resumed.elapsed() < Duration::from_secs(10));
        }
    }
}

#[test]
fn several_processors_pause_and_end_together() {
    if skip() {
        return;
    }
    let (mut request, console) = Request0::new(payload::build("say '+'\n 1: jmp 1b"));
    request.spec.vcpus.max = 4;
    let mut machine = TestMachine::start(request, console);
    assert!(matches!(machine.receive(), Message::Started(_)));
    assert_eq!(machine.next_byte(), b'+');
    let done = Message::Reply(Ok(Reply::Done));
    assert_eq!(machine.request(&Request::Pause, &[]), done);
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
}

#[test]
fn nonsense_on_the_control_socket_is_answered() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("1: jmp 1b");
    for nonsense in [&b"{"[..], b"\"dance\"", &[0xff; 100], &[b' '; 70_000]] {
        machine.send_packet(nonsense, &[]);
        assert!(matches!(machine.receive(), Message::Reply(Err(_))));
    }
    assert!(matches!(
        machine.request(&Request::Stats, &[]),
        Message::Reply(Ok(Reply::Stats(_)))
    ));
}

/// What the VMM says to a spec that cannot be.
fn failure(change: impl FnOnce(&mut Request0)) -> String {
    let (mut request, console) = Request0::new(payload::build("1: jmp 1b"));
    change(&mut request);
    let machine = TestMachine::start(request, console);
    match machine.exit_reason() {
        ExitReason::Failed(failure) => failure.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_started_is_said_in_one_sentence() {
    if skip() {
        return;
    }
    let text = tempfile::tempfile().unwrap();
    rustix::io::write(&text, &[b'x'; 1000]).unwrap();
    let said = failure(|request| request.descriptors[1] = text.into());
    assert!(said.contains("it is no uncompressed x86_64 ELF"), "{said}");

    let null = std::fs::File::open("/dev/null").unwrap();
    let said = failure(|request| request.descriptors[0] = null.into());
    assert!(said.contains("is it /dev/kvm?"), "{said}");

    let said = failure(|request| request.spec.memory.boot_mib = 1);
    assert!(said.contains("memory.boot_mib is 1"), "{said}");

    let huge = tempfile::tempfile().unwrap();
    huge.set_len(80 << 20).unwrap();
    let said = failure(|request| request.give_initramfs(huge));
    assert!(said.contains("does not fit into guest memory"), "{said}");
}
