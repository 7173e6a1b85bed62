//! What the shim shall hear without having asked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;

use crate::lock::lock;

/// Events that nobody has fetched yet. More of them tell nothing new.
const BACKLOG: usize = 1024;

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The kernel killed a process of this container for want of memory.
    OutOfMemory {
        /// Which container.
        container_id: String,
    },
}

/// Where events are told; cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::Sender<Event>,
    kills: Arc<Mutex<HashMap<String, u64>>>,
}

/// Where they are heard.
pub type EventQueue = tokio::sync::Mutex<mpsc::Receiver<Event>>;

impl Events {
    /// Both ends.
    pub fn new() -> (Self, EventQueue) {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let kills = Arc::default();
        (Self { sender, kills }, tokio::sync::Mutex::new(receiver))
    }

    /// Takes note of a container's count of memory kills; tells once a rise.
    pub fn oom_kills(&self, container_id: &str, count: u64) {
        let mut kills = lock(&self.kills);
        let known = kills.get(container_id).copied().unwrap_or(0);
        if count <= known {
            return;
        }
        kills.insert(container_id.to_owned(), count);
        let event = Event::OutOfMemory {
            container_id: container_id.to_owned(),
        };
        if self.sender.try_send(event).is_err() {
            log::warn!("{container_id}: out of memory, and nobody listens");
        }
    }

    /// A deleted container's id may come again.
    pub fn forget(&self, container_id: &str) {
        let mut kills = lock(&self.kills);
        kills.remove(container_id);
    }
}
