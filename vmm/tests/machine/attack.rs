//! What malicious drivers do, and what it costs them: the device, until they
//! reset it.

use std::time::Duration;

use husk_vmm_spec::{ExitReason, Message, Reply, Request};

use crate::driver::{
    Attack, BALLOON, BLOCK, BUFFER, Descriptor, INDIRECT, NEXT, RINGS, RNG, VSOCK, WRITABLE,
    machine, run, switch_on,
};
use crate::harness::{TestMachine, skip};

/// Bytes of entropy.
fn good() -> Attack {
    Attack::chain(&[(BUFFER, 16, WRITABLE, 0)])
}

fn indirect(table: &[Descriptor]) -> Attack {
    let at = BUFFER + 0x1000;
    let mut attack = Attack::chain(&[(at, table.len() as u32 * 16, INDIRECT, 0)]);
    attack.memory.push((at, Attack::table(table)));
    attack
}

/// Makes each attack on the entropy device; what each came to, and that the
/// device then serves again.
fn expect(attacks: &[(&str, Attack, &str)]) {
    if skip() {
        return;
    }
    for slice in attacks.chunks(8) {
        let all: Vec<Attack> = slice.iter().map(|(_, attack, _)| attack.clone()).collect();
        let said = run(RNG, &all, &good());
        for ((name, _, outcomes), said) in slice.iter().zip(said.as_bytes().chunks(2)) {
            let said = String::from_utf8_lossy(said);
            let (bad, then) = said.split_at(1);
            assert!(outcomes.contains(bad), "{name}: {said}");
            assert_eq!(then, "u", "{name}: {said}");
        }
        assert_eq!(said.len(), slice.len() * 2, "{said}");
    }
}

#[test]
fn chains_without_end_need_a_reset() {
    let chain = |count: u16| -> Vec<Descriptor> {
        (0..count)
            .map(|i| (BUFFER, 4, NEXT | WRITABLE, i + 1))
            .collect()
    };
    let turn = |mut chain: Vec<Descriptor>, to: u16| {
        if let Some(last) = chain.last_mut() {
            last.3 = to;
        }
        chain
    };
    expect(&[
        ("its own next", Attack::chain(&turn(chain(1), 0)), "n"),
        ("a loop of two", Attack::chain(&turn(chain(2), 0)), "n"),
        ("a loop of all", Attack::chain(&turn(chain(8), 0)), "n"),
        ("longer than the queue", Attack::chain(&chain(9)), "n"),
        (
            "next is no descriptor",
            Attack::chain(&turn(chain(1), 0xffff)),
            "n",
        ),
        ("a loop in a table", indirect(&turn(chain(4), 0)), "n"),
        ("past the end of a table", indirect(&chain(4)), "n"),
        (
            "a table in a table",
            indirect(&[(BUFFER + 0x1000, 16, INDIRECT, 0)]),
            "n",
        ),
    ]);
}

#[test]
fn buffers_that_are_no_memory_need_a_reset() {
    let buffer = |at: u64, len: u32| Attack::chain(&[(at, len, WRITABLE, 0)]);
    expect(&[
        ("behind memory", buffer(64 << 20, 16), "n"),
        ("over the end of memory", buffer((64 << 20) - 8, 16), "n"),
        ("registers of a device", buffer(0xc000_0000, 16), "n"),
        ("the local APIC", buffer(0xfee0_0000, 16), "n"),
        ("far above", buffer(1 << 46, 16), "n"),
        ("round the end", buffer(u64::MAX - 7, 16), "n"),
        ("to the very end", buffer(u64::MAX - 15, 16), "n"),
        ("all that can be said", buffer(BUFFER, u32::MAX), "n"),
        ("nothing", buffer(BUFFER, 0), "nu"),
        ("nothing, nowhere", buffer(u64::MAX, 0), "nu"),
        (
            "more than its share",
            {
                let half = (BUFFER, 0x8000_0000, NEXT | WRITABLE, 1);
                Attack::chain(&[half, (BUFFER, 0x8000_0000, WRITABLE, 0)])
            },
            "n",
        ),
        (
            "a table behind memory",
            Attack::chain(&[(64 << 20, 16, INDIRECT, 0)]),
            "n",
        ),
        (
            "a table of 4 GiB",
            Attack::chain(&[(BUFFER, u32::MAX, INDIRECT, 0)]),
            "n",
        ),
        (
            "a table of 8 bytes",
            Attack::chain(&[(BUFFER, 8, INDIRECT, 0)]),
            "n",
        ),
        (
            "a table of nothing",
            Attack::chain(&[(BUFFER, 0, INDIRECT, 0)]),
            "nu",
        ),
        (
            "writable before readable",
            { Attack::chain(&[(BUFFER, 4, NEXT | WRITABLE, 1), (BUFFER, 4, 0, 0)]) },
            "n",
        ),
    ]);
}

#[test]
fn rings_that_are_none_need_a_reset() {
    let with = |change: fn(&mut Attack)| {
        let mut attack = good();
        change(&mut attack);
        attack
    };
    expect(&[
        ("an index that jumps", with(|a| a.index = 100), "n"),
        ("an index that jumps back", with(|a| a.index = 0xffff), "n"),
        ("a head that is none", with(|a| a.heads = vec![8]), "n"),
        ("a head far away", with(|a| a.heads = vec![0xffff]), "n"),
        (
            "the same head again and again",
            with(|a| {
                a.heads = vec![0; 8];
                a.index = 8;
            }),
            "u",
        ),
        (
            "all rings in one place",
            with(|a| a.rings = [RINGS[0]; 3]),
            "nut",
        ),
        (
            "used on top of descriptors",
            with(|a| a.rings[2] = RINGS[0]),
            "nut",
        ),
        ("behind memory", with(|a| a.rings[0] = 64 << 20), "n"),
        (
            "over the end of memory",
            with(|a| a.rings[2] = (64 << 20) - 4),
            "n",
        ),
        (
            "registers of a device",
            with(|a| a.rings = [0xc000_0000; 3]),
            "n",
        ),
        ("round the end", with(|a| a.rings[0] = u64::MAX - 15), "n"),
        ("misaligned", with(|a| a.rings[0] += 1), "n"),
        ("a size of 0", with(|a| a.size = 0), "u"),
        ("a size of 3", with(|a| a.size = 3), "u"),
        ("a size of 0x8000", with(|a| a.size = 0x8000), "u"),
    ]);
}

#[test]
fn disks_take_no_nonsense() {
    if skip() {
        return;
    }
    let header = |kind: u32, sector: u64| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header
    };
    let request = |kind, sector, len, flags| {
        let mut attack = Attack::chain(&[
            (BUFFER, 16, NEXT, 1),
            (BUFFER + 0x1000, len, flags | NEXT, 2),
            (BUFFER + 0x100, 1, WRITABLE, 0),
        ]);
        attack.memory.push((BUFFER, header(kind, sector)));
        attack
    };
    let good = request(0, 0, 512, WRITABLE);
    let attacks = [
        // Behind the end, round the end, in halves, of no kind.
        request(0, 2048, 512, WRITABLE),
        request(1, u64::MAX, 512, 0),
        request(1, u64::MAX / 512, 1024, 0),
        request(0, 2047, 1024, WRITABLE),
        request(0, 0, 511, WRITABLE),
        request(u32::MAX, 0, 512, 0),
        // A discard of what is not there.
        request(11, 0, 16, 0),
        // Neither header nor status.
        Attack::chain(&[(BUFFER, 8, 0, 0)]),
        Attack::chain(&[(BUFFER, 16, 0, 0)]),
    ];
    let said = run(BLOCK, &attacks, &good);
    assert_eq!(said, "uuuuuuuuuuuuuununu".replace(' ', ""), "{said}");
}

/// A vsock packet's header (virtio 1.2, 5.10.6).
fn packet(ports: (u32, u32), len: u32, operation: u16, credit: (u32, u32)) -> Vec<u8> {
    let mut packet = 3_u64.to_le_bytes().to_vec();
    packet.extend(2_u64.to_le_bytes());
    packet.extend(ports.0.to_le_bytes());
    packet.extend(ports.1.to_le_bytes());
    packet.extend(len.to_le_bytes());
    packet.extend(1_u16.to_le_bytes());
    packet.extend(operation.to_le_bytes());
    packet.extend([0; 4]);
    packet.extend(credit.0.to_le_bytes());
    packet.extend(credit.1.to_le_bytes());
    packet
}

#[test]
fn packets_for_nobody_cost_nothing() {
    if skip() {
        return;
    }
    // All in the transmit queue, 64 of them at once.
    let flood = |packet: Vec<u8>, payload: u32| {
        let mut attack = Attack::chain(&[(BUFFER, 44, NEXT, 1), (BUFFER + 0x1000, payload, 0, 0)]);
        attack.queue = 1;
        attack.also = vec![0, 2];
        attack.size = 64;
        attack.heads = vec![0; 64];
        attack.index = 64;
        attack.memory.push((BUFFER, packet));
        attack
    };
    let good = flood(packet((1, 7), 0, 3, (0, 0)), 4);
    let operations = (0..10).map(|operation| flood(packet((5, 9), 4, operation, (0, 0)), 4));
    let lies = [
        // More than there is, credit of all kinds.
        packet((5, 9), u32::MAX, 5, (0, 0)),
        packet((5, 9), 0, 6, (u32::MAX, u32::MAX)),
        packet((5, 9), 0, 6, (0, u32::MAX)),
        packet((u32::MAX, u32::MAX), 0, 1, (u32::MAX, 0)),
    ];
    let attacks: Vec<Attack> = operations
        .chain(lies.into_iter().map(|lie| flood(lie, 4)))
        .collect();
    let said = run(VSOCK, &attacks, &good);
    assert_eq!(said.len(), attacks.len() * 2, "{said}");
    for outcome in said.as_bytes().chunks(2) {
        assert!(matches!(outcome, b"uu" | b"nu"), "{said}");
    }
}

#[test]
fn reports_of_pages_take_the_guests_own_alone() {
    if skip() {
        return;
    }
    let report = |pieces: &[Descriptor]| {
        let mut attack = Attack::chain(pieces);
        attack.queue = 2;
        attack.also = vec![0, 1];
        attack.size = 32;
        attack
    };
    let good = report(&[(BUFFER, 0x2000, WRITABLE, 0)]);
    let attacks = [
        // Outside memory, in part, and round the end of addresses.
        report(&[(1 << 40, 4096, WRITABLE, 0)]),
        report(&[(0xc000_0000, 4096, WRITABLE, 0)]),
        report(&[(BUFFER, u32::MAX, WRITABLE, 0)]),
        report(&[(u64::MAX - 4095, 8192, WRITABLE, 0)]),
        // Nothing, less than a page, what may only be read.
        report(&[(BUFFER, 0, WRITABLE, 0)]),
        report(&[(BUFFER + 1, 4095, WRITABLE, 0)]),
        report(&[(BUFFER, 4096, 0, 0)]),
        // The rings themselves.
        report(&[(RINGS[0], 0x3000, WRITABLE, 0)]),
    ];
    let said = run(BALLOON, &attacks, &good);
    assert_eq!(said.len(), attacks.len() * 2, "{said}");
    for (number, outcome) in said.as_bytes().chunks(2).enumerate() {
        let expected: &[u8] = match number {
            0..4 => b"n",
            4..7 => b"u",
            // Whoever gives its rings away finds zeroes there, if it is answered.
            _ => b"ntu",
        };
        assert!(expected.contains(&outcome[0]), "{number}: {said}");
        assert_eq!(outcome[1], b'u', "{number}: {said}");
    }
}

#[test]
fn features_and_queues_stay_once_a_driver_is_ready() {
    if skip() {
        return;
    }
    // The good request again and again, while the registers that made it so are
    // written over.
    let source = format!(
        r#"
        {words}
        {on}
        {good}
        mov dword ptr [r13 + 8], 0
        mov dword ptr [r13 + 12], 0xffffffff
        mov dword ptr [r13 + 8], 1
        mov dword ptr [r13 + 12], 0
        mov word ptr [r13 + 22], 0
        mov word ptr [r13 + 24], 2
        mov dword ptr [r13 + 32], 0xfffff000
        mov dword ptr [r13 + 48], 0xfffff000
        mov word ptr [r13 + 28], 1
        mov word ptr [r13 + 28], 0
        # The next request is used, where the first one was.
        mov edi, {available:#x}
        mov word ptr [rdi + 6], 0
        mov word ptr [rdi + 2], 2
        mov word ptr [r13 + 0x3000], 0
        mov ecx, 100000
    1:  cmp word ptr [r14 + 2], 2
        je 2f
        test byte ptr [r13 + 20], 64
        jnz 3f
        dec ecx
        jnz 1b
    3:  say '-'
        reset
    2:  say '+'
        reset
        "#,
        words = crate::driver::WORDS,
        on = switch_on(RNG),
        good = crate::driver::attack(&good(), "good"),
        available = RINGS[1],
    );
    let mut machine = machine(&source);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "u+");
}

#[test]
fn resets_during_requests_and_storms_of_notifications_end() {
    if skip() {
        return;
    }
    let request = {
        let mut attack = Attack::chain(&[
            (BUFFER, 16, NEXT, 1),
            (BUFFER + 0x1000, 512 << 10, NEXT | WRITABLE, 2),
            (BUFFER + 0x100, 1, WRITABLE, 0),
        ]);
        attack.heads = vec![0; 8];
        attack.index = 8;
        attack.memory.push((BUFFER, vec![0; 16]));
        attack
    };
    let mut source = format!("{}\n{}", crate::driver::WORDS, switch_on(BLOCK));
    // Started, kicked, reset at once, a hundred times.
    let body = crate::driver::attack(&request, "read");
    let (before, rest) = body.split_once("call outcome").unwrap();
    source += &format!(
        r#"
        mov r15d, 100
    storm:
        {before}
        mov byte ptr [r13 + 20], 0
        cmp byte ptr [r13 + 20], 0
        jne lost
        dec r15d
        jnz storm
        {before_again}
        # Of every queue that there may be, wanted or not.
        mov r15d, 5000
    1:  mov word ptr [r13 + 0x3000], 0
        mov dword ptr [r13 + 0x3004], 0xffffffff
        mov byte ptr [r13 + 0x3ffc], 7
        dec r15d
        jnz 1b
        call outcome
        reset
    lost:
        say '-'
        reset
        {rest}
        "#,
        before_again = before,
    );
    let mut machine = machine(&source);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "u");
}

#[test]
fn registers_moved_over_each_other_and_over_memory_answer_once() {
    if skip() {
        return;
    }
    // All BARs where the first one is, then over memory, over the local APIC and
    // over the end; at last back, where the device still works.
    let mut source = format!("{}\n{}", crate::driver::WORDS, switch_on(RNG));
    source += "mov r15, r13\n";
    for place in [
        0xc000_0000_u32,
        0x30_0000,
        0xfee0_0000,
        0xffff_f000,
        0,
        0xfebf_f000,
    ] {
        for slot in 1..=BLOCK {
            source += &format!(
                "config_write {slot}, 4, 6\n config_write {slot}, 0x10, {place:#x}\n\
                 mov eax, {place:#x}\n mov byte ptr [rax + 20], 0\n"
            )
            .replace(
                "mov byte ptr [rax + 20], 0\n",
                match place {
                    // Page tables and code are there.
                    0 => "",
                    _ => "mov byte ptr [rax + 20], 0\n",
                },
            );
        }
    }
    // Apart again.
    for slot in 1..=BLOCK {
        let place = 0xd000_0000_u32 + u32::from(slot) * 0x10_0000;
        source += &format!("config_write {slot}, 0x10, {place:#x}\n");
    }
    source += &format!(
        "mov r13d, {:#x}\n",
        0xd000_0000_u32 + u32::from(RNG) * 0x10_0000
    );
    source += &crate::driver::attack(&good(), "good");
    source += "reset\n";
    let mut machine = machine(&source);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "u");
}

#[test]
fn interrupts_may_be_sent_to_any_address() {
    if skip() {
        return;
    }
    // Every MSI-X entry of the entropy device in turn gets addresses that no
    // local APIC has; requests raise them.
    let mut source = format!("{}\n{}", crate::driver::WORDS, switch_on(RNG));
    source += r#"
        # The MSI-X capability: on.
        config_read 3, 0x34
        movzx ebx, al
    1:  mov eax, ebx
        or eax, 0x80000000 | 3 << 11
        mov dx, 0xcf8
        out dx, eax
        mov dx, 0xcfc
        in eax, dx
        cmp al, 0x11
        je 2f
        movzx ebx, ah
        test ebx, ebx
        jnz 1b
        say '-'
        reset
    2:  or eax, 0x80000000
        out dx, eax
    "#;
    for (number, (low, high, data)) in [
        (0_u32, 0_u32, 0_u32),
        (0x30_0000, 0, 0x41),
        (0xfee0_0000, 0xffff_ffff, 0x41),
        (0xfeef_f00c, 0, 0xffff_ffff),
        (0xffff_fffc, 0xffff_ffff, 0xffff_ffff),
        (0xc000_0000, 0, 0),
    ]
    .into_iter()
    .enumerate()
    {
        source += &format!(
            r#"
            lea rbx, [r13 + 0x4000]
            mov ecx, 4
        1:  mov dword ptr [rbx], {low:#x}
            mov dword ptr [rbx + 4], {high:#x}
            mov dword ptr [rbx + 8], {data:#x}
            mov dword ptr [rbx + 12], 0
            add rbx, 16
            dec ecx
            jnz 1b
            "#
        );
        let request = crate::driver::attack(&good(), &format!("good{number}"));
        // Vector 1 for the queue.
        source += &request.replace(
            "mov word ptr [r13 + 28], 1",
            "mov word ptr [r13 + 26], 1\n mov word ptr [r13 + 28], 1",
        );
    }
    source += "reset\n";
    let mut machine = machine(&source);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    assert_eq!(machine.said(), "uuuuuu");
}

#[test]
fn a_guest_that_faults_without_end_can_be_paused_and_killed() {
    if skip() {
        return;
    }
    // Each undefined instruction leads to the next.
    let mut machine = TestMachine::run(
        r#"
        on_vector 0x6
        ud2
    handler:
        lea rsp, [rip + stack_end]
        inc r9d
        cmp r9d, 10
        jne 1f
        say '+'
    1:  ud2
        "#,
    );
    assert_eq!(machine.next_byte(), b'+');
    std::thread::sleep(Duration::from_millis(50));
    let done = Message::Reply(Ok(Reply::Done));
    assert_eq!(machine.request(&Request::Pause, &[]), done);
    assert_eq!(machine.request(&Request::Resume, &[]), done);
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
}

#[test]
fn a_guest_whose_interrupt_table_is_no_memory_ends() {
    if skip() {
        return;
    }
    let machine = TestMachine::run(
        r#"
        lea rax, [rip + table]
        lidt [rax]
        say '-'
        ud2
        .data
    table:
        .word 4095
        .quad 0xd0000000
        .text
        "#,
    );
    // KVM cannot deliver, or reads all ones there and finds no gate.
    let end = machine.exit_reason();
    let is_told = match &end {
        ExitReason::Reset => true,
        ExitReason::Failed(failure) => failure.message.contains("suberror 3"),
        _ => false,
    };
    assert!(is_told, "{end:?}");
}
