//! FUSE requests that are nearly right.

use arbitrary::Arbitrary;
use husk_fs::abi::{InHeader, InitIn};
use vm_memory::ByteValued;

/// A request.
#[derive(Arbitrary, Clone, Debug)]
pub struct Request {
    opcode: u8,
    node: Node,
    ids: (u16, u16),
    body: Vec<Word>,
    /// How much longer the header says that it is.
    lie: i8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Node {
    Small(u8),
    Any(u64),
}

/// What the arguments of a request are made of.
#[derive(Arbitrary, Clone, Debug)]
enum Word {
    Half(u32),
    Small(u8),
    Bit(u8),
    Any(u64),
    Name(u8),
    Bytes(Vec<u8>),
}

const NAMES: [&[u8]; 12] = [
    b"a\0",
    b"b\0",
    b"c\0",
    b"rootfs\0",
    b"..\0",
    b".\0",
    b"\0",
    b"/etc/passwd\0",
    b"a/b\0",
    b"user.a\0",
    b"security.capability\0",
    b"system.posix_acl_access\0",
];

const INIT: u32 = 26;
/// Operations that there are, and a few more.
const OPCODES: u32 = 54;

impl Request {
    /// Header and arguments.
    pub fn bytes(&self, unique: u64) -> Vec<u8> {
        let body: Vec<u8> = self.body.iter().flat_map(Word::bytes).collect();
        let len = (size_of::<InHeader>() + body.len()) as i64 + i64::from(self.lie);
        let header = InHeader {
            len: len as u32,
            opcode: u32::from(self.opcode) % OPCODES,
            unique,
            nodeid: match self.node {
                Node::Small(node) => (node % 8).into(),
                Node::Any(node) => node,
            },
            uid: self.ids.0.into(),
            gid: self.ids.1.into(),
            ..InHeader::default()
        };
        [header.as_slice(), &body].concat()
    }
}

impl Word {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Half(word) => word.to_le_bytes().to_vec(),
            Self::Small(word) => u64::from(*word).to_le_bytes().to_vec(),
            Self::Bit(bit) => (1_u64 << (bit % 64)).to_le_bytes().to_vec(),
            Self::Any(word) => word.to_le_bytes().to_vec(),
            Self::Name(name) => NAMES[usize::from(*name) % NAMES.len()].to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// The request that begins a session, and forgets the one before.
pub fn init() -> Vec<u8> {
    let asked = InitIn {
        major: 7,
        minor: 41,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..InitIn::default()
    };
    let header = InHeader {
        len: (size_of::<InHeader>() + size_of::<InitIn>()) as u32,
        opcode: INIT,
        unique: 1,
        ..InHeader::default()
    };
    [header.as_slice(), asked.as_slice()].concat()
}
