//! Malicious drivers: payloads that set a virtio device up and then give it
//! rings that no driver would.

use std::fmt::Write as _;
use std::fs::File;

use husk_vmm_spec::{BlockSpec, ExitReason, Message, VsockSpec};

use crate::harness::{Request0, TestMachine};
use crate::payload;

/// Slots of the machine that [`machine`] makes.
pub const RNG: u8 = 3;
pub const BALLOON: u8 = 4;
pub const VSOCK: u8 = 5;
pub const BLOCK: u8 = 6;

/// Descriptors, available ring, used ring of a well-behaved driver.
pub const RINGS: [u64; 3] = [0x30_0000, 0x30_1000, 0x30_2000];
/// Where buffers are.
pub const BUFFER: u64 = 0x31_0000;

/// Where the rings of queues are that stay empty.
const EMPTY_RINGS: u64 = 0x34_0000;

pub const NEXT: u16 = 1;
pub const WRITABLE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// What a driver puts into one queue.
#[derive(Clone)]
pub struct Attack {
    pub queue: u16,
    pub size: u16,
    pub rings: [u64; 3],
    /// From the first descriptor on.
    pub descriptors: Vec<Descriptor>,
    /// What else is in memory.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// Heads in the available ring.
    pub heads: Vec<u16>,
    /// The available ring's index.
    pub index: u16,
    /// Other queues, which are empty and as they should be.
    pub also: Vec<u16>,
}

impl Attack {
    /// One chain of these descriptors in queue 0.
    pub fn chain(descriptors: &[Descriptor]) -> Self {
        Self {
            queue: 0,
            size: 8,
            rings: RINGS,
            descriptors: descriptors.to_vec(),
            memory: Vec::new(),
            heads: vec![0],
            index: 1,
            also: Vec::new(),
        }
    }

    /// Bytes of a table of descriptors.
    pub fn table(descriptors: &[Descriptor]) -> Vec<u8> {
        let bytes = descriptors.iter().flat_map(|&(address, len, flags, next)| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        });
        bytes.collect()
    }
}

/// Words of a driver: r13 is the BAR of the device, in whose common
/// configuration everything happens.
pub const WORDS: &str = r#"
    jmp start

    # Copies ecx bytes from rsi to rdi.
    copy:
        test ecx, ecx
        jz 2f
    1:  mov al, [rsi]
        mov [rdi], al
        inc rsi
        inc rdi
        dec ecx
        jnz 1b
    2:  ret

    # Until FEATURES_OK, with all that is offered in the first 32 bits.
    negotiate:
        mov byte ptr [r13 + 20], 0
        mov byte ptr [r13 + 20], 3
        mov dword ptr [r13], 0
        mov eax, [r13 + 4]
        mov dword ptr [r13 + 8], 0
        mov [r13 + 12], eax
        mov dword ptr [r13 + 8], 1
        mov dword ptr [r13 + 12], 1
        mov byte ptr [r13 + 20], 11
        ret

    # Says 'n' when the device needs a reset, 'u' when it has used something of
    # the ring at r14, 't' when neither comes. A count of zero is no wait.
    outcome:
        mov ecx, 20000
    1:  test byte ptr [r13 + 20], 64
        jnz 2f
        cmp word ptr [r14 + 2], 0
        jne 3f
        dec ecx
        jnz 1b
        say 't'
        ret
    2:  say 'n'
        ret
    3:  say 'u'
        ret
    start:
"#;

/// Assembly that sets slot `slot` on.
pub fn switch_on(slot: u8) -> String {
    format!(
        r#"
        config_read {slot}, 0x10
        mov r13d, eax
        and r13d, 0xfffffff0
        config_write {slot}, 4, 6
        "#
    )
}

/// Assembly of one driver after `words`: sets the device of r13 up, does as
/// `attack` says, and says what came of it.
pub fn attack(attack: &Attack, label: &str) -> String {
    let mut source = String::from("call negotiate\n");
    let [descriptors, available, used] = attack.rings;
    let mut ring = Vec::from([0, 0]);
    ring.extend(attack.index.to_le_bytes());
    ring.extend(attack.heads.iter().flat_map(|head| head.to_le_bytes()));
    let mut memory = vec![
        (used, vec![0; 4]),
        (descriptors, Attack::table(&attack.descriptors)),
        (available, ring),
    ];
    memory.extend(attack.memory.iter().cloned());
    let mut data = String::new();
    for (number, (at, bytes)) in memory.iter().enumerate() {
        // Only what is memory can be written.
        if *at < 64 << 20 {
            let _ = write!(
                source,
                "lea rsi, [rip + data_{label}_{number}]\n mov rdi, {at:#x}\n mov ecx, {}\n \
                 call copy\n",
                bytes.len()
            );
        }
        let _ = writeln!(data, "data_{label}_{number}: .byte 0");
        data.truncate(data.len() - " 0\n".len());
        let list: Vec<String> = bytes.iter().map(u8::to_string).collect();
        let _ = writeln!(
            data,
            " {}",
            if list.is_empty() {
                "0".into()
            } else {
                list.join(", ")
            }
        );
    }
    for queue in &attack.also {
        let at = EMPTY_RINGS + u64::from(*queue) * 0x1_0000;
        set_queue(&mut source, *queue, 8, [at, at + 0x1000, at + 0x2000]);
    }
    set_queue(&mut source, attack.queue, attack.size, attack.rings);
    let looked_at = if used < 64 << 20 { used } else { RINGS[2] };
    let _ = write!(
        source,
        r#"
        mov byte ptr [r13 + 20], 15
        movzx eax, word ptr [r13 + 30]
        shl eax, 2
        mov word ptr [r13 + rax + 0x3000], {queue}
        mov r14, {looked_at:#x}
        call outcome
        .data
        {data}
        .text
        "#,
        queue = attack.queue
    );
    source
}

fn set_queue(source: &mut String, queue: u16, size: u16, rings: [u64; 3]) {
    let _ = writeln!(source, "mov word ptr [r13 + 22], {queue}");
    let _ = writeln!(source, "mov word ptr [r13 + 24], {size}");
    for (field, address) in [32, 40, 48].into_iter().zip(rings) {
        let (low, high) = (address as u32, address >> 32);
        let _ = writeln!(source, "mov dword ptr [r13 + {field}], {low:#x}");
        let _ = writeln!(source, "mov dword ptr [r13 + {field} + 4], {high:#x}");
    }
    source.push_str("mov word ptr [r13 + 28], 1\n");
}

/// A driver of the device in `slot` that makes `attacks` one after another, and
/// between them is as good as can be with `good`; then resets the machine. What
/// it said: the outcome of each attack, followed by that of the good request.
pub fn run(slot: u8, attacks: &[Attack], good: &Attack) -> String {
    let mut source = format!("{WORDS}\n{}", switch_on(slot));
    for (number, bad) in attacks.iter().enumerate() {
        source += &attack(bad, &format!("bad{number}"));
        source += &attack(good, &format!("good{number}"));
    }
    source += "reset\n";
    let mut machine = machine(&source);
    assert_eq!(machine.exit_reason(), ExitReason::Reset);
    let said = machine.said();
    // The VMM's own lines say why a device stopped.
    let lines = said.replace('\n', "\n\0");
    let guest = lines
        .split("husk-vmm: ")
        .map(|part| match part.split_once('\0') {
            Some((_, rest)) => rest,
            None => part,
        });
    guest.collect::<String>().replace('\0', "")
}

/// A machine with console, rng, vsock and a disk, that runs `source`.
pub fn machine(source: &str) -> TestMachine {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    machine_with(source, file)
}

/// One whose disk is `file`.
pub fn machine_with(source: &str, file: File) -> TestMachine {
    let (mut request, console) = Request0::new(payload::build(source));
    let file = request.give(file.into());
    request.spec.blocks.push(BlockSpec {
        id: "disk".into(),
        file,
        read_only: false,
        serial: "disk".into(),
        rate: Default::default(),
    });
    request.spec.vsock = Some(VsockSpec {
        cid: 3,
        host_ports: Vec::new(),
    });
    let machine = TestMachine::start(request, console);
    assert!(matches!(machine.receive(), Message::Started(_)));
    machine
}
