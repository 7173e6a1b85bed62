//! The control socket's packets, as the VMM reads them, and what it answers, as
//! the shim does. The first byte says how many descriptors come along.
#![no_main]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_vmm::packet::ControlSocket;
use husk_vmm_spec::{Message, Request, ValidVmSpec, VmSpec};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};

fn pair() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    socketpair(family, kind, SocketFlags::CLOEXEC, None).expect("a pair")
}

fuzz_target!(init: husk_fuzz::start(), |data: &[u8]| {
    let Some((count, bytes)) = data.split_first() else {
        return;
    };
    let (shim, vmm) = pair();
    let descriptors: Vec<BorrowedFd<'_>> = vec![shim.as_fd(); usize::from(*count) % 80];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(80))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let bytes = [std::io::IoSlice::new(bytes)];
    if sendmsg(&shim, &bytes, &mut ancillary, SendFlags::DONTWAIT).is_err() {
        return;
    }
    let Ok(Some(packet)) = ControlSocket::new(vmm).receive() else {
        return;
    };
    let count = packet.descriptors.count();
    if let Ok(spec) = packet.parse::<VmSpec>()
        && let Ok(valid) = ValidVmSpec::new(spec, count)
    {
        // What passed can be written, and passes again.
        let bytes = serde_json::to_vec(valid.spec()).expect("it can be written");
        let again = serde_json::from_slice(&bytes).expect("it was written");
        ValidVmSpec::new(again, count).expect("it passed before");
    }
    if let Ok(Request::AddDevice(device)) = packet.parse() {
        let _ = device.check(count);
    }
    if let Ok(Request::AddVfio(group)) = packet.parse() {
        let _ = group.check(count);
    }
    if let Ok(Request::Save(saved)) = packet.parse() {
        let _ = saved.check(count);
    }
    let _ = packet.parse::<Message>();
});
