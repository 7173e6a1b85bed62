//! Devices that come and go while the guest runs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use husk_vmm_spec::{
    BlockSpec, DEVICES_MAX, Descriptor, DeviceSpec, ExitReason, FsSpec, Message, Reply, Request,
};

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
