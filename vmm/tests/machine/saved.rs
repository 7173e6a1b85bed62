//! Machines that are saved, and others that go on from there.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use husk_vmm_spec::{
    Descriptor, ExitReason, Message, Reply, Request, SavedSpec, StartSpec, VcpuSpec,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::devices::{FIND, RNG_SETUP};
use crate::harness::{Request0, TestMachine, skip};
use crate::payload;

const DONE: Message = Message::Reply(Ok(Reply::Done));
const ORIGIN: &str = "test build";

/// Where payloads keep what they look at.
const COUNTER: u64 = 0x30_0000;

/// What `Save` fills.
pub struct Saved {
    pub state: File,
    pub memory: File,
}

impl Saved {
    /// Files as the shim makes them.
    pub fn empty() -> Self {
        let file = |name: &str| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            File::from(memfd_create(name, flags).unwrap())
        };
        let memory = file("saved-memory");
        memory.set_len(64 << 20).unwrap();
        Self {
            state: file("saved-state"),
            memory,
        }
    }

    pub fn request() -> Request {
        Request::Save(SavedSpec {
            state: Descriptor(0),
            memory: Descriptor(1),
            origin: ORIGIN.into(),
        })
    }

    pub fn descriptors(&self) -> [OwnedFd; 2] {
        [&self.state, &self.memory].map(|file| file.try_clone().unwrap().into())
    }

    pub fn seal(&self) {
        for file in [&self.state, &self.memory] {
            let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            fcntl_add_seals(file, all).unwrap();
        }
    }

    /// A machine of one processor and 64 MiB that goes on.
    pub fn restore(&self) -> (Request0, File) {
        let state = self.state_bytes();
        self.restore_from(&state)
    }

    fn restore_from(&self, state: &[u8]) -> (Request0, File) {
        let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(state).unwrap();
        let (mut request, console) = Request0::new(file);
        let memory = request.give(self.memory.try_clone().unwrap().into());
        request.spec.start = StartSpec::Restore(SavedSpec {
            state: Descriptor(1),
            memory,
            origin: ORIGIN.into(),
        });
        (request, console)
    }

    fn state_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.state.metadata().unwrap().len() as usize];
        self.state.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn counter(&self) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, COUNTER).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// Pauses and saves a machine; it stays paused.
fn save(machine: &TestMachine) -> Saved {
    assert_eq!(machine.request(&Request::Pause, &[]), DONE);
    let saved = Saved::empty();
    assert_eq!(
        machine.request(&Saved::request(), &saved.descriptors()),
        DONE
    );
    saved.seal();
    saved
}

fn go_on(saved: &Saved) -> TestMachine {
    let (request, console) = saved.restore();
    started(TestMachine::start(request, console))
}

fn started(machine: TestMachine) -> TestMachine {
    match machine.receive() {
        Message::Started(_) => machine,
        other => panic!("{other:?}"),
    }
}

fn failure(request: Request0, console: File) -> String {
    match TestMachine::start(request, console).exit_reason() {
        ExitReason::Failed(failure) => failure.message,
        other => panic!("{other:?}"),
    }
}

/// Says the low byte of a counter in memory, for ever. The register `r15` counts
/// as well.
const COUNT: &str = r#"
        xor r15d, r15d
        mov edi, 0x300000
    next:
        inc qword ptr [rdi]
        inc r15
        cmp r15, [rdi]
        jne bad
        say [rdi]
        mov ecx, 200
    1:  pause
        loop 1b
        jmp next
    bad:
        say '-'
        reset
"#;

/// The last byte that a paused machine has said, `before` if it has said nothing
/// since.
fn last_byte(machine: &TestMachine, before: u8) -> u8 {
    let mut said = Vec::new();
    rustix::io::ioctl_fionbio(&machine.console, true).unwrap();
    let _ = (&machine.console).read_to_end(&mut said);
    rustix::io::ioctl_fionbio(&machine.console, false).unwrap();
    said.last().copied().unwrap_or(before)
}

fn counts_on(machine: &mut TestMachine, from: u8, count: u8) {
    for step in 1..=count {
        assert_eq!(machine.next_byte(), from.wrapping_add(step), "step {step}");
    }
}

#[test]
fn two_machines_go_on_from_one_point_each_in_memory_of_its_own() {
    if skip() {
        return;
    }
    let mut first = TestMachine::run(COUNT);
    counts_on(&mut first, 0, 50);
    let saved = save(&first);
    let last = last_byte(&first, 50);
    let counter = saved.counter();
    // It has counted, and may not have said so.
    assert!([0, 1].contains(&(counter as u8).wrapping_sub(last)));

    let mut one = go_on(&saved);
    counts_on(&mut one, last, 100);
    let mut other = go_on(&saved);
    counts_on(&mut other, last, 50);
    assert_eq!(saved.counter(), counter, "the file is as it was");
    counts_on(&mut one, last.wrapping_add(100), 50);

    // The one that was saved goes on as well.
    assert_eq!(first.request(&Request::Resume, &[]), DONE);
    counts_on(&mut first, last, 100);

    // One that was restored can be saved.
    let again = save(&other);
    let last = last_byte(&other, last.wrapping_add(50));
    drop(other);
    counts_on(&mut go_on(&again), last, 50);
}

#[test]
fn an_access_under_way_is_finished_before_it_is_saved() {
    if skip() {
        return;
    }
    // Pauses meet the guest in port and memory accesses more often than not. Some
    // KVMs have it read again what was read, which nobody here would see; those
    // that write to a port again are caught by guests that count as well.
    let mut machine = TestMachine::run(
        r#"
        mov edi, 0xd0000000
    next:
        mov eax, 0x55
        in al, 0x80
        cmp al, 0xff
        jne bad
        mov rax, 0x55
        mov rax, [rdi]
        test rax, rax
        jnz bad
        say '+'
        jmp next
    bad:
        say '-'
        reset
        "#,
    );
    for _ in 0..10 {
        for _ in 0..10 {
            assert_eq!(machine.next_byte(), b'+');
        }
        let saved = save(&machine);
        machine = go_on(&saved);
    }
}

#[test]
fn registers_are_as_they_were() {
    if skip() {
        return;
    }
    // General, flags, debug, control, SSE and model-specific registers; the TSC
    // never goes back. Says '+' each time that all are right.
    let mut machine = TestMachine::run(
        r#"
        mov rax, cr4
        or eax, 0x600
        mov cr4, rax
        lea rsi, [rip + vector]
        movdqu xmm3, [rsi]
        movdqu xmm15, [rsi + 16]
        mov rax, 0x1122334455667788
        mov cr2, rax
        mov dr0, rax
        mov rbp, rax
        mov r8, 0x8080808080808080
        mov r14, 0xe0e0e0e0e0e0e0e0
        # KERNEL_GS_BASE, LSTAR, PAT.
        mov ecx, 0xc0000102
        mov eax, 0x12345678
        mov edx, 0x7fff
        wrmsr
        mov ecx, 0xc0000082
        wrmsr
        mov ecx, 0x277
        mov eax, 0x00070106
        mov edx, 0x00070106
        wrmsr
        xor r9d, r9d
    next:
        rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, r9
        jb bad
        mov r9, rax
        lea rdi, [rip + room]
        movdqu [rdi], xmm3
        movdqu [rdi + 16], xmm15
        mov rax, [rdi]
        cmp rax, [rsi]
        jne bad
        mov rax, [rdi + 24]
        cmp rax, [rsi + 24]
        jne bad
        mov rax, cr2
        cmp rax, rbp
        jne bad
        mov rax, dr0
        cmp rax, rbp
        jne bad
        mov rax, 0x8080808080808080
        cmp rax, r8
        jne bad
        mov rax, 0xe0e0e0e0e0e0e0e0
        cmp rax, r14
        jne bad
        mov ecx, 0xc0000102
        call check
        mov ecx, 0xc0000082
        call check
        mov ecx, 0x277
        rdmsr
        cmp edx, 0x00070106
        jne bad
        say '+'
        jmp next
    check:
        rdmsr
        cmp eax, 0x12345678
        jne bad
        cmp edx, 0x7fff
        jne bad
        ret
    bad:
        say '-'
        reset
        .data
    vector:
        .quad 0x0123456789abcdef, 0xfedcba9876543210
        .quad 0x1111111122222222, 0x3333333344444444
    room:
        .skip 32
        .text
        "#,
    );
    for _ in 0..5 {
        for _ in 0..20 {
            assert_eq!(machine.next_byte(), b'+');
        }
        let saved = save(&machine);
        // Its processor would have counted from zero.
        machine = go_on(&saved);
    }
    assert_eq!(machine.next_byte(), b'+');
}

/// Starts the local APIC's timer as `start` does, says 's', and 't' when it is
/// through. It takes a second or two.
fn timer(start: &str) -> String {
    format!(
        r#"
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        on_vector 0x41
        {start}
        say 's'
        sti
    1:  hlt
        jmp 1b
    handler:
        say 't'
        reset
        "#
    )
}

/// One shot, divided by one: KVM's local APICs count nanoseconds.
const ONE_SHOT: &str = r#"
        mov dword ptr [rbx + 0x3e0], 0xb
        mov dword ptr [rbx + 0x320], 0x41
        mov dword ptr [rbx + 0x380], 1500000000
"#;

/// When the TSC reaches so many more.
const DEADLINE: &str = r#"
        mov dword ptr [rbx + 0x320], 0x40041
        rdtsc
        shl rdx, 32
        or rax, rdx
        mov rcx, 4000000000
        add rax, rcx
        mov rdx, rax
        shr rdx, 32
        mov ecx, 0x6e0
        wrmsr
"#;

#[test]
fn a_timer_that_was_pending_fires() {
    if skip() {
        return;
    }
    for start in [ONE_SHOT, DEADLINE] {
        let mut machine = TestMachine::run(&timer(start));
        assert_eq!(machine.next_byte(), b's');
        let saved = save(&machine);
        drop(machine);
        let mut machine = go_on(&saved);
        assert_eq!(machine.next_byte(), b't', "{start}");
        assert_eq!(machine.exit_reason(), ExitReason::Reset);
    }
}

/// Asks for 8 random bytes, waits for the interrupt, says the first of them, and
/// again.
fn entropy() -> String {
    format!(
        r#"
        {FIND}
        {RNG_SETUP}
        xor r14d, r14d
    ask:
        # The same buffer in every slot of the available ring.
        mov edi, 0x300000
        mov qword ptr [rdi], 0x303000
        mov dword ptr [rdi + 8], 8
        mov dword ptr [rdi + 12], 2
        mov edi, 0x303000
        mov qword ptr [rdi], 0
        inc r14d
        and r14d, 0xffff
        mov edi, 0x301000
        mov [rdi + 2], r14w
        mov word ptr [r13 + 0x3000], 0
    wait:
        mov edi, 0x302000
        cmp word ptr [rdi + 2], r14w
        je answered
        sti
        hlt
        jmp wait
    handler:
        # Gives up the frame instead of returning by it.
        lea rsp, [rip + stack_end]
        mov dword ptr [rbx + 0xb0], 0
        jmp wait
    answered:
        cli
        mov edi, 0x303000
        cmp qword ptr [rdi], 0
        je bad
        say [rdi]
        jmp ask
        "#
    )
}

#[test]
fn a_device_goes_on_with_its_driver() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(&entropy());
    for _ in 0..8 {
        for _ in 0..10 {
            machine.next_byte();
        }
        let saved = save(&machine);
        let mut other = go_on(&saved);
        machine = go_on(&saved);
        // From different bytes at once: the host's, not those of the memory file.
        let bytes = |machine: &mut TestMachine| -> Vec<u8> {
            (0..16).map(|_| machine.next_byte()).collect()
        };
        let (one, another) = (bytes(&mut machine), bytes(&mut other));
        assert_ne!(one[1..], another[1..]);
    }
}

#[test]
fn several_processors_go_on() {
    if skip() {
        return;
    }
    let (mut request, console) = Request0::new(payload::build(COUNT));
    request.spec.vcpus = VcpuSpec { boot: 1, max: 4 };
    let mut machine = started(TestMachine::start(request, console));
    let said = machine.next_byte();
    let saved = save(&machine);
    let last = last_byte(&machine, said);
    let (mut request, console) = saved.restore();
    request.spec.vcpus = VcpuSpec { boot: 1, max: 4 };
    let mut machine = started(TestMachine::start(request, console));
    counts_on(&mut machine, last, 20);

    let (request, console) = saved.restore();
    let said = failure(request, console);
    assert!(said.contains("another number of processors"), "{said}");
}

#[test]
fn new_devices_come_after_the_saved_ones() {
    if skip() {
        return;
    }
    // Slots 0 to 4 are those of every machine here. Says '-' until the next one is
    // taken, and what is in it and behind it.
    let mut machine = TestMachine::run(
        r#"
    next:
        config_read 5, 0
        cmp eax, 0xffffffff
        jne found
        say '-'
        jmp next
    found:
        cmp eax, 0x10581af4
        jne none
        say 'm'
        config_read 6, 0
        cmp eax, 0x10421af4
        jne none
        say 'b'
    none:
        reset
        "#,
    );
    assert_eq!(machine.next_byte(), b'-');
    let saved = save(&machine);
    let (mut request, console) = saved.restore();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let file = request.give(disk.into());
    request.spec.blocks.push(husk_vmm_spec::BlockSpec {
        id: "data".into(),
        file,
        read_only: false,
        serial: "data".into(),
        rate: Default::default(),
    });
    request.spec.memory.pluggable_mib = 128;
    let mut machine = started(TestMachine::start(request, console));
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    let said = machine.said();
    assert_eq!(said.trim_start_matches('-'), "mb");
}

#[test]
fn only_what_can_be_saved_is() {
    if skip() {
        return;
    }
    let refused = |machine: &TestMachine| {
        let saved = Saved::empty();
        match machine.request(&Saved::request(), &saved.descriptors()) {
            Message::Reply(Err(failure)) => failure.message,
            other => panic!("{other:?}"),
        }
    };
    let machine = TestMachine::run(COUNT);
    let said = refused(&machine);
    assert!(said.contains("not paused"), "{said}");

    let (mut request, console) = Request0::new(payload::build(COUNT));
    request.spec.memory.pluggable_mib = 128;
    let machine = started(TestMachine::start(request, console));
    assert_eq!(machine.request(&Request::Pause, &[]), DONE);
    let said = refused(&machine);
    assert!(said.contains("device \"memory\" cannot be saved"), "{said}");

    // A file of another size.
    let mut machine = TestMachine::run(COUNT);
    let said = machine.next_byte();
    assert_eq!(machine.request(&Request::Pause, &[]), DONE);
    let last = last_byte(&machine, said);
    let saved = Saved::empty();
    saved.memory.set_len(1 << 20).unwrap();
    match machine.request(&Saved::request(), &saved.descriptors()) {
        Message::Reply(Err(failure)) => {
            assert!(failure.message.contains("not as long"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    // It is none the worse for it.
    assert_eq!(machine.request(&Request::Resume, &[]), DONE);
    counts_on(&mut machine, last, 20);
}

#[test]
fn what_does_not_fit_is_refused() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(COUNT);
    machine.next_byte();
    let saved = save(&machine);
    drop(machine);
    let said = |change: &dyn Fn(&mut Request0)| {
        let (mut request, console) = saved.restore();
        change(&mut request);
        failure(request, console)
    };
    let origin = said(&|request| match &mut request.spec.start {
        StartSpec::Restore(saved) => saved.origin = "another build".into(),
        StartSpec::Boot(_) => panic!("it is restored"),
    });
    assert!(origin.contains("saved from \"test build\""), "{origin}");
    let size = said(&|request| request.spec.memory.boot_mib = 128);
    assert!(size.contains("not as long as boot_mib"), "{size}");
    let open = said(&|request| {
        let last = request.descriptors.len() - 1;
        request.descriptors[last] = Saved::empty().memory.into();
    });
    assert!(open.contains("can write to the file"), "{open}");
    let console = said(&|request| request.spec.console = None);
    assert!(console.contains("PCI slots"), "{console}");
    let vsock = said(&|request| {
        request.spec.vsock = Some(husk_vmm_spec::VsockSpec {
            cid: 3,
            host_ports: Vec::new(),
        });
    });
    assert!(vsock.contains("PCI slots"), "{vsock}");

    let state = saved.state_bytes();
    for (bytes, what) in [
        (&state[..0], "nothing"),
        (&state[..state.len() - 1], "cut off"),
        (&[&state[..], &[0]].concat(), "too long"),
        (
            &[b"husk-vm\0\xff\0\0\0", &state[12..]].concat(),
            "of another version",
        ),
    ] {
        let (request, console) = saved.restore_from(bytes);
        let said = failure(request, console);
        assert!(said.contains("holds no saved machine"), "{what}: {said}");
    }
}

#[test]
fn a_damaged_state_is_no_more_than_a_failure() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(&entropy());
    machine.next_byte();
    let saved = save(&machine);
    drop(machine);
    let state = saved.state_bytes();
    // Each part of it, and a little of everything.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..60 {
        let mut bytes = state.clone();
        for _ in 0..3 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = (random >> 8) as usize % bytes.len();
            bytes[at] = random as u8;
        }
        let (request, console) = saved.restore_from(&bytes);
        let machine = TestMachine::start(request, console);
        match machine.receive() {
            Message::Started(_) => {
                thread::sleep(Duration::from_millis(2));
                machine.hang_up();
            }
            Message::Exited(_) => {}
            Message::Reply(reply) => panic!("{reply:?}"),
        }
    }
}

#[test]
fn a_start_from_saved_state_is_quick() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(COUNT);
    machine.next_byte();
    let saved = save(&machine);
    drop(machine);
    let best = |start: &dyn Fn() -> (Request0, File)| {
        let one = |_| {
            let (request, console) = start();
            let machine = TestMachine::start(request, console);
            match machine.receive() {
                Message::Started(timeline) => timeline.entered_ns - timeline.spec_ns,
                other => panic!("{other:?}"),
            }
        };
        (0..20).map(one).min().unwrap() / 1000
    };
    let cold = best(&|| Request0::new(payload::build(COUNT)));
    let warm = best(&|| saved.restore());
    println!(
        "spec to entered: boot {cold} us, restore {warm} us; state {} bytes, memory {} KiB",
        saved.state_bytes().len(),
        std::os::unix::fs::MetadataExt::blocks(&saved.memory.metadata().unwrap()) / 2
    );
    assert!(warm < 1_000_000, "{warm} us");
}
