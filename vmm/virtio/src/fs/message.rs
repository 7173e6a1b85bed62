//! Messages of vhost-user, as QEMU's specification of the protocol lays them out.

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the virtio features.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// The server tells how many queues it can have.
pub(super) const PROTOCOL_MQ: u64 = 1 << 0;
/// The server acknowledges requests when asked to.
pub(super) const PROTOCOL_REPLY_ACK: u64 = 1 << 3;

/// Most regions in a SET_MEM_TABLE.
pub(super) const MEMORY_REGIONS: usize = 8;

/// Bytes of a message's header, and of every answer's payload that we ask for.
pub(super) const HEADER_BYTES: usize = 12;
pub(super) const ANSWER_BYTES: usize = 8;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What a message asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub guest_addr: u64,
    pub len: u64,
    pub file_offset: u64,
}

/// A message to the server: header and payload.
pub(super) fn message(request: Request, acknowledge: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if acknowledge { NEED_REPLY } else { 0 };
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    message.extend((request as u32).to_le_bytes());
    message.extend(flags.to_le_bytes());
    message.extend((payload.len() as u32).to_le_bytes());
    message.extend(payload);
    message
}

/// The payload of the server's answer to `request`; `None`: it is another message.
pub(super) fn answer(request: Request, message: &[u8; HEADER_BYTES + ANSWER_BYTES]) -> Option<u64> {
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&message[at..at + 4]);
        u32::from_le_bytes(word)
    };
    let fits = word(0) == request as u32
        && word(4) & !NEED_REPLY == VERSION | REPLY
        && word(8) == ANSWER_BYTES as u32;
    fits.then(|| u64::from(word(12)) | u64::from(word(16)) << 32)
}

/// The payload of SET_MEM_TABLE. The file server knows guest memory by guest
/// addresses only: those of this process are none of its business.
pub(super) fn memory_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend((regions.len() as u32).to_le_bytes());
    payload.extend(0u32.to_le_bytes());
    for region in regions {
        for field in [
            region.guest_addr,
            region.len,
            region.guest_addr,
            region.file_offset,
        ] {
            payload.extend(field.to_le_bytes());
        }
    }
    payload
}

/// The payload of messages about a queue with a number.
pub(super) fn vring_state(index: u16, value: u32) -> Vec<u8> {
    [u32::from(index), value]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// The payload of SET_VRING_ADDR, with guest addresses as in [`memory_table`].
pub(super) fn vring_addr(index: u16, descriptors: u64, used: u64, available: u64) -> Vec<u8> {
    let mut payload = vring_state(index, 0);
    for field in [descriptors, used, available, 0] {
        payload.extend(field.to_le_bytes());
    }
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let sound = [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(
            answer(Request::GetVringBase, &sound),
            Some(0x0807_0605_0403_0201)
        );
        assert_eq!(answer(Request::GetFeatures, &sound), None);
        for (at, value) in [(0, 12), (4, 1), (4, 4), (4, 6), (5, 1), (8, 7), (9, 1)] {
            let mut wrong = sound;
            wrong[at] = value;
            assert_eq!(answer(Request::GetVringBase, &wrong), None, "{at}");
        }
    }
}
