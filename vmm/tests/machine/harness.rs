//! A machine in this process, and the shim's end of its control socket.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use husk_vmm::control;
use husk_vmm::packet::ControlSocket;
use husk_vmm::seccomp::Confinement;
use husk_vmm_spec::{
    BootSpec, ConsoleSpec, Descriptor, ExitReason, MemorySpec, Message, PACKET_BYTES, Request,
    StartSpec, VcpuSpec, VmSpec,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// Nothing here takes longer, however loaded the host is.
const DEADLINE: Duration = Duration::from_secs(60);

/// True when tests need not go on: says why.
pub fn skip() -> bool {
    match open_kvm() {
        Ok(_) => false,
        Err(error) => {
            println!("skipped: /dev/kvm: {error}");
            true
        }
    }
}

pub fn open_kvm() -> std::io::Result<File> {
    File::options().read(true).write(true).open("/dev/kvm")
}

/// A spec and the descriptors it speaks of.
pub struct Request0 {
    pub spec: VmSpec,
    pub descriptors: Vec<OwnedFd>,
}

impl Request0 {
    /// One processor, 64 MiB, `kernel`, and a pipe for what it says.
    pub fn new(kernel: File) -> (Self, File) {
        let (reader, writer) = rustix::pipe::pipe_with(
            rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK,
        )
        .unwrap();
        rustix::io::ioctl_fionbio(&reader, false).unwrap();
        let spec = VmSpec {
            kvm: Descriptor(0),
            vcpus: VcpuSpec { boot: 1, max: 1 },
            memory: MemorySpec {
                boot_mib: 64,
                pluggable_mib: 0,
            },
            start: StartSpec::Boot(BootSpec {
                kernel: Descriptor(1),
                initramfs: None,
                command_line: "test".into(),
            }),
            console: Some(ConsoleSpec {
                output: Descriptor(2),
            }),
            vfio: false,
            vsock: None,
            blocks: Vec::new(),
            nets: Vec::new(),
            filesystems: Vec::new(),
        };
        let descriptors = vec![open_kvm().unwrap().into(), kernel.into(), writer];
        (Self { spec, descriptors }, File::from(reader))
    }

    /// Adds a descriptor and names it.
    pub fn give(&mut self, descriptor: OwnedFd) -> Descriptor {
        self.descriptors.push(descriptor);
        Descriptor(self.descriptors.len() as u32 - 1)
    }

    /// Has the kernel find this.
    pub fn give_initramfs(&mut self, file: File) {
        let file = self.give(file.into());
        match &mut self.spec.start {
            StartSpec::Boot(boot) => boot.initramfs = Some(file),
            StartSpec::Restore(_) => panic!("nothing boots"),
        }
    }
}

/// A machine that runs in threads of this process.
pub struct TestMachine {
    shim: Option<OwnedFd>,
    pub console: File,
    server: Option<JoinHandle<()>>,
}

impl TestMachine {
    /// Runs the assembly `source` as the kernel and waits for Started.
    pub fn run(source: &str) -> Self {
        let (request, console) = Request0::new(crate::payload::build(source));
        let machine = Self::start(request, console);
        assert!(matches!(machine.receive(), Message::Started(_)));
        machine
    }

    /// Sends the spec.
    pub fn start(request: Request0, console: File) -> Self {
        let (shim, vmm) = socket_pair();
        let server = thread::spawn(move || {
            control::serve(&ControlSocket::new(vmm), 1, Confinement::None);
        });
        let machine = Self {
            shim: Some(shim),
            console,
            server: Some(server),
        };
        let bytes = serde_json::to_vec(&request.spec).unwrap();
        machine.send_packet(&bytes, &request.descriptors);
        machine
    }

    pub fn request(&self, request: &Request, descriptors: &[OwnedFd]) -> Message {
        self.send_packet(&serde_json::to_vec(request).unwrap(), descriptors);
        self.receive()
    }

    pub fn send_packet(&self, bytes: &[u8], descriptors: &[OwnedFd]) {
        send(self.shim.as_ref().unwrap(), bytes, descriptors);
    }

    pub fn receive(&self) -> Message {
        receive(self.shim.as_ref().unwrap()).expect("the VMM hung up")
    }

    /// The last packet.
    pub fn exit_reason(&self) -> ExitReason {
        match self.receive() {
            Message::Exited(reason) => reason,
            other => panic!("not the end: {other:?}"),
        }
    }

    /// All that the guest says until its end.
    pub fn said(&mut self) -> String {
        let mut said = Vec::new();
        self.console.read_to_end(&mut said).unwrap();
        String::from_utf8_lossy(&said).into_owned()
    }

    /// The next byte that the guest says.
    pub fn next_byte(&mut self) -> u8 {
        let mut byte = [0];
        let mut ready = [PollFd::new(&self.console, PollFlags::IN)];
        let patience = Timespec::try_from(DEADLINE).unwrap();
        let count = rustix::event::poll(&mut ready, Some(&patience)).unwrap();
        assert_eq!(count, 1, "the guest says nothing");
        self.console.read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// Closes the shim's end and waits for the machine's.
    pub fn hang_up(mut self) {
        self.shim = None;
        self.server.take().unwrap().join().unwrap();
    }
}

/// Our end and the VMM's.
pub fn socket_pair() -> (OwnedFd, OwnedFd) {
    let (shim, vmm) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &shim,
        rustix::net::sockopt::Timeout::Recv,
        Some(DEADLINE),
    )
    .unwrap();
    (shim, vmm)
}

pub fn send(shim: &OwnedFd, bytes: &[u8], descriptors: &[OwnedFd]) {
    try_send(shim, bytes, descriptors).unwrap();
}

/// An error when the VMM has hung up.
pub fn try_send(shim: &OwnedFd, bytes: &[u8], descriptors: &[OwnedFd]) -> rustix::io::Result<()> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    rustix::net::sendmsg(
        shim,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .map(drop)
}

/// The next packet; none when the VMM has hung up.
pub fn receive(shim: &OwnedFd) -> Option<Message> {
    let mut bytes = vec![0; PACKET_BYTES];
    let length = loop {
        match rustix::net::recvmsg(
            shim,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut RecvAncillaryBuffer::default(),
            RecvFlags::empty(),
        ) {
            // It has left something unread, and comes before what it said.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
            received => break received.unwrap().bytes,
        }
    };
    (length > 0).then(|| serde_json::from_slice(&bytes[..length]).unwrap())
}
