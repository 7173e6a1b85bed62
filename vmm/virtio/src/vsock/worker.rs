//! Moves packets between the queues and the connections.
//!
//! ```text
//!   TX queue ──> on_packet ──> Connection ──> socket (or its backlog)
//!   socket ───> on_ready ────> ready list, round robin ──> RX queue
//! ```
//!
//! A connection is in the ready list while it has something for the guest. It
//! sends one packet and goes to the end of the list, so none waits for another;
//! what a wake-up leaves over is taken up by the next, which the worker asks for
//! itself.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::mem;

use super::connection::{Connection, Outgoing, PAYLOAD_BYTES, Ports, Received};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use super::{EVENT, HostPorts, RX, TX, change_host_ports};
use crate::queue::{Chain, DeviceQueue};
use crate::{ActivateError, Activation, DeviceError, Event, Source, Worker};

/// Most connections at a time, those included of which only the rest of the
/// guest's bytes is still to be written.
const CONNECTIONS: usize = 1024;

/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// RSTs to strangers that wait for a receive buffer; more are dropped.
const RESETS: usize = 256;

/// The vsock device at work.
pub(super) struct VsockWorker {
    cid: u64,
    rx: DeviceQueue,
    tx: DeviceQueue,
    /// Where the driver waits to be told that its connections are gone, until it
    /// is told.
    untold: Option<DeviceQueue>,
    host_ports: HostPorts,

    /// By a number of their own, which is also the token of their socket. Numbers
    /// are not used again, so that an event cannot reach the wrong connection.
    connections: BTreeMap<u32, Slot>,
    next_number: u32,
    /// Connections that the guest knows.
    by_ports: BTreeMap<Ports, u32>,
    /// Connections with something for the guest.
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// Some connection may wait for something else than the loop knows.
    unsettled: bool,
    /// A connection has ended.
    ended: bool,
}

struct Slot {
    connection: Connection,
    /// It is in the ready list.
    listed: bool,
    /// What the loop waits for.
    watched: Option<(bool, bool)>,
}

impl VsockWorker {
    pub(super) fn new(
        cid: u64,
        mut activation: Activation,
        host_ports: &mut HostPorts,
        restored: bool,
    ) -> Result<Self, ActivateError> {
        Ok(Self {
            cid,
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            // A driver without this queue finds out from each connection.
            untold: restored
                .then(|| activation.take_queue(EVENT).ok())
                .flatten(),
            host_ports: mem::take(host_ports),
            connections: BTreeMap::new(),
            next_number: 0,
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            unsettled: false,
            ended: false,
        })
    }

    pub(super) fn into_host_ports(self) -> HostPorts {
        self.host_ports
    }

    /// Tells the driver to end its connections and to read its context id anew
    /// (virtio 1.2, 5.10.6.7).
    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let Some(events) = &mut self.untold else {
            return Ok(());
        };
        events.begin();
        let Some(buffer) = events.pop()? else {
            return Ok(());
        };
        if !buffer.write(0, &TRANSPORT_RESET) {
            return Err(events.chain_error("a buffer has no room for an event"));
        }
        events.add_used(buffer.head(), TRANSPORT_RESET.len() as u32)?;
        events.signal()?;
        self.untold = None;
        Ok(())
    }

    // From the guest.

    fn receive_from_guest(&mut self) -> Result<(), DeviceError> {
        while let Some(packet) = self.tx.pop()? {
            let mut header = [0; HEADER_BYTES];
            if !packet.read(0, &mut header) {
                return Err(self.tx.chain_error("a packet is shorter than its header"));
            }
            self.on_packet(&Header::from_bytes(&header), &packet);
            self.tx.add_used(packet.head(), 0)?;
        }
        self.tx.signal()
    }

    fn on_packet(&mut self, header: &Header, packet: &Chain) {
        if header.src_cid != self.cid {
            return;
        }
        if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            return self.refuse(header);
        }
        let ports = Ports {
            guest: header.src_port,
            host: header.dst_port,
        };
        let op = Op::from_wire(header.op);
        let Some(&number) = self.by_ports.get(&ports) else {
            return match op {
                Some(Op::Request) => self.join(ports, header),
                _ => self.refuse(header),
            };
        };
        let Some(slot) = self.connections.get_mut(&number) else {
            return;
        };
        let connection = &mut slot.connection;
        connection.learn_credit(header);
        let kept = match op {
            Some(Op::Data) => {
                let len = header.len as usize;
                header.len <= PAYLOAD_BYTES
                    && HEADER_BYTES + len <= packet.readable_len()
                    && connection.on_data(packet, len).is_ok()
            }
            Some(Op::Shutdown) => {
                connection.on_shutdown(header.flags);
                !connection.guest_closed()
            }
            Some(Op::CreditRequest) => {
                connection.credit_wanted();
                true
            }
            Some(Op::CreditUpdate) => true,
            Some(Op::Reset | Op::Request | Op::Response) | None => false,
        };
        if !kept {
            // What the guest sent before it closed still goes out.
            connection.detach();
            self.by_ports.remove(&ports);
            self.refuse(header);
        }
        self.settle(number);
    }

    /// Joins the guest to the socket that waits at the port.
    fn join(&mut self, ports: Ports, request: &Header) {
        if self.connections.len() >= CONNECTIONS {
            return self.refuse(request);
        }
        let Some(socket) = self.host_ports.remove(&ports.host) else {
            return self.refuse(request);
        };
        while self.connections.contains_key(&self.next_number) {
            self.next_number = self.next_number.wrapping_add(1);
        }
        let number = self.next_number;
        self.next_number = self.next_number.wrapping_add(1);
        let slot = Slot {
            connection: Connection::new(ports, socket, request),
            listed: false,
            watched: None,
        };
        self.connections.insert(number, slot);
        self.by_ports.insert(ports, number);
        self.settle(number);
    }

    /// Answers with an RST, unless it is one itself.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 && self.resets.len() < RESETS {
            self.resets.push_back(header.reset());
        }
    }

    /// After anything happened to a connection: lists it, watches it, or ends it.
    fn settle(&mut self, number: u32) {
        let Some(slot) = self.connections.get_mut(&number) else {
            return;
        };
        if slot.connection.finished() {
            self.connections.remove(&number);
            self.ended = true;
            return;
        }
        if !slot.listed && slot.connection.outgoing().is_some() {
            slot.listed = true;
            self.ready.push_back(number);
        }
        self.unsettled |= slot.watched != slot.connection.interest();
    }

    // To the guest.

    fn send_to_guest(&mut self) -> Result<(), DeviceError> {
        while !self.resets.is_empty() || !self.ready.is_empty() {
            let Some(buffer) = self.rx.pop()? else {
                break;
            };
            if buffer.writable_len() <= HEADER_BYTES {
                return Err(self.rx.chain_error("a buffer has no room behind a header"));
            }
            let header = match self.resets.pop_front() {
                Some(reset) => Some(reset),
                None => self.next_packet(&buffer),
            };
            let Some(header) = header else {
                self.rx.unpop(buffer);
                continue;
            };
            // It has room, as seen above.
            let _ = buffer.write(0, &header.to_bytes());
            self.rx
                .add_used(buffer.head(), HEADER_BYTES as u32 + header.len)?;
        }
        self.rx.signal()
    }

    /// The next packet of the connection whose turn it is; its payload is in the
    /// buffer then.
    fn next_packet(&mut self, buffer: &Chain) -> Option<Header> {
        let number = self.ready.pop_front()?;
        let slot = self.connections.get_mut(&number)?;
        slot.listed = false;
        let connection = &mut slot.connection;
        let header = loop {
            let Some(outgoing) = connection.outgoing() else {
                break None;
            };
            if outgoing != Outgoing::Data {
                break Some(connection.header(self.cid, outgoing, 0));
            }
            if let Received::Bytes(count) = connection.receive(buffer) {
                break Some(connection.header(self.cid, outgoing, count));
            }
        };
        self.settle(number);
        header
    }
}

impl Worker for VsockWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        self.connections
            .iter()
            .filter_map(|(number, slot)| {
                let (readable, writable) = slot.watched?;
                Some(Source {
                    fd: slot.connection.socket(),
                    token: *number,
                    readable,
                    writable,
                })
            })
            .collect()
    }

    fn sources_changed(&mut self) -> bool {
        let mut changed = mem::take(&mut self.ended);
        if mem::take(&mut self.unsettled) {
            for slot in self.connections.values_mut() {
                let interest = slot.connection.interest();
                changed |= slot.watched != interest;
                slot.watched = interest;
            }
        }
        changed
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        self.tell_reset()?;
        self.rx.begin();
        match event {
            Event::Queue(TX) => {
                self.tx.begin();
                self.receive_from_guest()?;
            }
            Event::Queue(_) => {}
            Event::Ready {
                token,
                readable,
                writable,
                hangup,
            } => {
                if let Some(slot) = self.connections.get_mut(&token) {
                    slot.connection.on_ready(readable, writable, hangup);
                    self.settle(token);
                }
            }
        }
        self.send_to_guest()
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        change_host_ports(&mut self.host_ports, message);
    }

    /// A last try at what the host's sockets had no room for.
    fn quiesce(&mut self) {
        for slot in self.connections.values_mut() {
            slot.connection.flush();
        }
    }
}
