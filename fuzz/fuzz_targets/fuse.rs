//! FUSE requests to the file server, in buffers that are cut anywhere.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use husk_fs::buffers::Buffers;
use husk_fs::server::Server;
use husk_fuzz::file_server::FileServer;
use husk_fuzz::fuse::{self, Request};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

#[derive(Arbitrary, Debug)]
struct Sent {
    request: Request,
    room: u16,
    cut: u8,
}

fn pieces(memory: &mut [u8], cut: u8) -> Buffers<'_> {
    let mut buffers = Buffers::default();
    let (first, second) = memory.split_at_mut(usize::from(cut).min(memory.len()));
    for piece in [first, second] {
        buffers.push(VolatileSlice::from(piece)).expect("two fit");
    }
    buffers
}

fn send(server: &mut Server, mut request: Vec<u8>, room: usize, cut: u8) {
    let mut reply = vec![0; room];
    let used = server.handle(pieces(&mut request, cut), pieces(&mut reply, cut));
    assert!(used <= reply.len());
    if used > 0 {
        let len: [u8; 4] = reply[..4].try_into().expect("four bytes");
        assert_eq!(u32::from_le_bytes(len) as usize, used);
    }
}

static SERVER: LazyLock<FileServer> = LazyLock::new(FileServer::start);

fuzz_target!(init: husk_fuzz::start(), |session: Vec<Sent>| {
    SERVER.run(move |server| {
        send(server, fuse::init(), 4096, 40);
        for (sent, unique) in session.iter().take(128).zip(2..) {
            send(server, sent.request.bytes(unique), sent.room.into(), sent.cut);
        }
        // The end of the session leaves nothing.
        send(server, fuse::init(), 4096, 40);
        assert_eq!(server.counts(), (1, 0, 0));
    });
});
