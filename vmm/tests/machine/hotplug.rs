//! Devices that come and go while the guest runs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use husk_vmm_spec::{
    BlockSpec, DEVICES_MAX, Descriptor, DeviceSpec, ExitReason, FsSpec, Message, Reply, Request,
};

use crate::driver::{
    Attack, BLOCK, BUFFER, NEXT, RNG, WORDS, WRITABLE, attack, machine_with, switch_on,
};
use crate::hang::Hang;
use crate::harness::{TestMachine, skip};

const DONE: Message = Message::Reply(Ok(Reply::Done));

/// Waits for a virtio-blk function in the first free slot, slot 5, gives it
/// addresses and says 'n' and the low byte of its capacity; says 'g' when it is
/// gone; begins anew.
const WATCH: &str = r#"
    say '+'
    watch:
        config_read 5, 0
        cmp eax, 0x10421af4
        jne watch
        config_write 5, 0x10, 0xd0000000
        config_write 5, 4, 6
        say 'n'
        mov ebx, 0xd0002000
        mov al, [rbx]
        mov dx, COM1
        out dx, al
    still:
        config_read 5, 0
        cmp eax, 0xffffffff
        jne still
        # Nobody answers where it was.
        mov eax, [rbx]
        test eax, eax
        jnz bad
        say 'g'
        jmp watch
    bad:
        reset
"#;

fn disk(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    file
}

fn add(machine: &TestMachine, id: &str, files: Vec<OwnedFd>) -> Message {
    let spec = BlockSpec {
        id: id.into(),
        file: Descriptor(0),
        read_only: false,
        serial: id.into(),
        rate: Default::default(),
    };
    machine.request(&Request::AddDevice(DeviceSpec::Block(spec)), &files)
}

#[test]
fn a_disk_comes_and_goes_again_and_again() {
    if skip() {
        return;
    }
    let mut machine = TestMachine::run(WATCH);
    assert_eq!(machine.next_byte(), b'+');
    for round in 1..=20 {
        assert_eq!(add(&machine, "data", vec![disk(round).into()]), DONE);
        assert_eq!(machine.next_byte(), b'n');
        assert_eq!(u64::from(machine.next_byte()), round);
        assert_eq!(
            machine.request(&Request::RemoveDevice("data".into()), &[]),
            DONE
        );
        assert_eq!(machine.next_byte(), b'g');
    }
}

#[test]
fn a_removed_disk_lets_its_file_go() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("1: jmp 1b");
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(writer);
    // What is no disk is refused, and closed.
    assert!(matches!(
        add(&machine, "pipe", vec![reader]),
        Message::Reply(Err(_))
    ));
    let file = disk(8);
    let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&file, lock).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let again = File::open(path).unwrap();
    assert!(rustix::fs::flock(&again, lock).is_err());
    // The lock belongs to the open file; it ends with its last descriptor.
    assert_eq!(add(&machine, "data", vec![file.into()]), DONE);
    assert!(rustix::fs::flock(&again, lock).is_err());
    assert_eq!(
        machine.request(&Request::RemoveDevice("data".into()), &[]),
        DONE
    );
    assert!(rustix::fs::flock(&again, lock).is_ok());
}

#[test]
fn a_silent_file_server_does_not_hold_up_a_running_machine() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("1: jmp 1b");
    let (socket, _silent) = UnixStream::pair().unwrap();
    let spec = FsSpec {
        id: "files".into(),
        socket: Descriptor(0),
        tag: "files".into(),
    };
    let request = Request::AddDevice(DeviceSpec::Fs(spec));
    match machine.request(&request, &[socket.into()]) {
        Message::Reply(Err(failure)) => {
            assert!(failure.message.contains("does not answer"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
}

#[test]
fn wrong_requests_change_nothing() {
    if skip() {
        return;
    }
    let machine = TestMachine::run("1: jmp 1b");
    let refused = |message, with: &str| match message {
        Message::Reply(Err(failure)) => {
            assert!(failure.message.contains(with), "{failure}");
        }
        other => panic!("{other:?}"),
    };
    refused(
        machine.request(&Request::RemoveDevice("ghost".into()), &[]),
        "there is no device \"ghost\"",
    );
    refused(add(&machine, "data", vec![]), "0 came with the packet");
    refused(add(&machine, "a/b", vec![disk(1).into()]), "must be 1 to");
    assert_eq!(add(&machine, "data", vec![disk(1).into()]), DONE);
    refused(
        add(&machine, "data", vec![disk(1).into()]),
        "exists already",
    );
    refused(
        machine.request(&Request::AddHostPorts(vec![]), &[]),
        "no vsock device",
    );
    // One is there. This machine has neither pluggable memory nor vsock.
    for index in 1..DEVICES_MAX + 2 {
        assert_eq!(
            add(&machine, &format!("d{index}"), vec![disk(1).into()]),
            DONE
        );
    }
    refused(
        add(&machine, "d28", vec![disk(1).into()]),
        "all 32 slots of the PCI bus are taken",
    );
    assert_eq!(
        machine.request(&Request::RemoveDevice("d7".into()), &[]),
        DONE
    );
    assert_eq!(add(&machine, "d28", vec![disk(1).into()]), DONE);
    assert_eq!(
        machine.request(&Request::Kill, &[]),
        Message::Exited(ExitReason::Killed)
    );
}

/// What the host reads for the disk doesn't come, and then does.
#[test]
fn a_disk_that_hangs_goes_once_it_answers_and_stops_nobody() {
    if skip() {
        return;
    }
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    if disabled.is_ok_and(|text| text.trim() != "0") {
        println!("skipped: no io_uring here, so disks are waited for");
        return;
    }
    let Some(hang) = Hang::mount() else {
        println!("skipped: no FUSE here");
        return;
    };
    // Its header, zeroes, reads the first sector.
    let disk = Attack::chain(&[
        (BUFFER, 16, NEXT, 1),
        (BUFFER + 0x1000, 512, NEXT | WRITABLE, 2),
        (BUFFER + 0x2000, 1, WRITABLE, 0),
    ]);
    let random = Attack::chain(&[(BUFFER + 0x3000, 64, WRITABLE, 0)]);
    let mut machine = machine_with(
        &[
            WORDS.to_owned(),
            switch_on(BLOCK),
            attack(&disk, "disk"),
            "again:\n".to_owned(),
            switch_on(RNG),
            attack(&random, "random"),
            format!(
                r#"
                config_read {BLOCK}, 0
                cmp eax, 0xffffffff
                jne again
                say 'g'
                1: jmp 1b
                "#
            ),
        ]
        .concat(),
        hang.file(),
    );
    hang.await_reader();
    assert_eq!(machine.next_byte(), b't');
    let remove = Request::RemoveDevice("disk".into());
    let Message::Reply(Err(refused)) = machine.request(&remove, &[]) else {
        panic!("it is gone");
    };
    let words = "device \"disk\": the host has not finished its I/O";
    assert_eq!(refused.message, words);
    assert_eq!(machine.request(&remove, &[]), Message::Reply(Err(refused)));
    // What was said by now is old. Now and then a guest is too fast for a busy host.
    let old = rustix::io::ioctl_fionread(&machine.console).unwrap();
    let mut said: Vec<u8> = (0..old + 100).map(|_| machine.next_byte()).collect();
    let said = said.split_off(old as usize);
    let served = said.iter().filter(|byte| **byte == b'u').count();
    assert!(served > 10, "others are served meanwhile: {served}");
    hang.answer();
    while machine.next_byte() != b'g' {}
    let Message::Reply(Err(gone)) = machine.request(&remove, &[]) else {
        panic!("it was there");
    };
    assert_eq!(gone.message, "there is no device \"disk\"");
}
