//! Where processor threads learn what to do and say what they do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::vcpu_state::VcpuState;
use super::vm::KvmError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    Paused = 0,
    Running = 1,
    Stopped = 2,
}

/// Shared by the processor threads of a machine and whoever commands them.
pub(super) struct Gate {
    /// A [`Phase`]; changed under the lock of `parked`, read without it.
    phase: AtomicU8,
    parked: Mutex<Parked>,
    changed: Condvar,
}

/// What is known of threads that are out of the guest.
#[derive(Default)]
struct Parked {
    /// How many are, and will be until the phase changes.
    count: usize,
    /// They are asked for their processors' state.
    save: Option<Save>,
}

/// Processors' states, as they come in.
struct Save {
    /// The model-specific registers that are wanted.
    msrs: Arc<[u32]>,
    states: BTreeMap<u8, Result<VcpuState, KvmError>>,
}

impl Gate {
    /// Threads are to begin paused.
    pub(super) fn new() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Paused as u8),
            parked: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Paused,
            1 => Phase::Running,
            _ => Phase::Stopped,
        }
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        let _parked = self.lock();
        self.phase.store(phase as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a thread: waits until the phase is no longer paused. When it is
    /// asked for the state of its processor, `index`, it has `capture` read that.
    pub(super) fn park(&self, index: u8, capture: impl Fn(&[u32]) -> Result<VcpuState, KvmError>) {
        let mut parked = self.lock();
        parked.count += 1;
        self.changed.notify_all();
        while self.phase() == Phase::Paused {
            let asked = parked.save.as_ref();
            let asked = asked.filter(|save| !save.states.contains_key(&index));
            if let Some(msrs) = asked.map(|save| Arc::clone(&save.msrs)) {
                drop(parked);
                let state = capture(&msrs);
                parked = self.lock();
                if let Some(save) = &mut parked.save {
                    save.states.insert(index, state);
                }
                self.changed.notify_all();
                continue;
            }
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        parked.count -= 1;
    }

    /// Asks `count` parked threads for their processors' states.
    pub(super) fn save(&self, count: usize, msrs: &[u32]) -> Result<Vec<VcpuState>, KvmError> {
        let mut parked = self.lock();
        parked.save = Some(Save {
            msrs: msrs.into(),
            states: BTreeMap::new(),
        });
        self.changed.notify_all();
        while parked
            .save
            .as_ref()
            .is_some_and(|save| save.states.len() < count)
        {
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let states = parked.save.take().map(|save| save.states);
        states.unwrap_or_default().into_values().collect()
    }

    /// Called by a thread that ends: it counts as parked for ever.
    pub(super) fn leave(&self) {
        self.lock().count += 1;
        self.changed.notify_all();
    }

    /// Waits until `count` threads are parked.
    pub(super) fn wait_parked(&self, count: usize) {
        let mut parked = self.lock();
        while parked.count < count {
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
