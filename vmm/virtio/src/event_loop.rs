//! A thread that runs the working halves of devices.
//!
//! Workers belong to the thread. Whoever has a [`LoopHandle`] gives it workers
//! and takes them back; the thread tells of a worker's failure and otherwise
//! leaves the rest of the machine alone.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{DeviceError, Event, Worker};

/// Events taken from the kernel at once. Commands are looked at in between.
const BATCH: usize = 32;

/// The serial of the descriptor that announces commands; workers' descriptors
/// have higher ones.
const WAKE: u64 = 0;

/// Called on the loop's thread, once, when a worker fails.
pub type OnFailure = Box<dyn FnOnce(&DeviceError) + Send>;

/// A running thread. Stops when dropped; workers left in it are then quiesced
/// and dropped.
pub struct EventLoop {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a thread called `name` that runs `at_start` before all else: the
    /// place to install its seccomp filter.
    ///
    /// # Errors
    /// The thread could not be had, or `at_start` failed.
    pub fn start(
        name: &str,
        at_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let this = Self::start_paused(name, at_start)?;
        // The thread is there: it has answered.
        let _ = this.handle.resume();
        Ok(this)
    }

    /// As [`EventLoop::start`], for a machine that does not run yet: no worker is
    /// called before [`LoopHandle::resume`], but for control messages.
    ///
    /// # Errors
    /// As for [`EventLoop::start`].
    pub fn start_paused(
        name: &str,
        at_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, commands) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let given_back = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut state = State::new(commands, Arc::clone(&wake), Arc::clone(&given_back))?;
        let (started, outcome) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let result = at_start();
                let failed = result.is_err();
                if started.send(result).is_ok() && !failed {
                    state.run();
                }
            })?;
        outcome
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended as it began")))?;
        Ok(Self {
            handle: LoopHandle {
                sender,
                wake,
                given_back,
                next_id: Arc::new(AtomicU64::new(1)),
            },
            thread: Some(thread),
        })
    }

    /// A way to talk to the thread.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let _ = self.handle.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Names a worker in its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerId(u64);

/// The loop has stopped, and the worker with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event loop has stopped")]
pub struct LoopGone;

/// Talks to a loop's thread.
#[derive(Clone)]
pub struct LoopHandle {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
    given_back: Arc<EventFd>,
    next_id: Arc<AtomicU64>,
}

impl LoopHandle {
    /// Gives a worker to the loop, which waits for `queues` on its behalf. Does
    /// not wait for the loop; a failure to begin goes to `on_failure` as well.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn add(
        &self,
        worker: Box<dyn Worker>,
        queues: Vec<(u16, Arc<EventFd>)>,
        on_failure: OnFailure,
    ) -> Result<WorkerId, LoopGone> {
        let id = WorkerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        self.send(Command::Add {
            id,
            slot: Box::new(Slot {
                worker,
                queues,
                on_failure: Some(on_failure),
                leaving: None,
                watched: Vec::new(),
            }),
        })?;
        Ok(id)
    }

    /// Has the loop quiesce a worker and give it back, which is waited for with
    /// [`Leaving::wait`].
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn remove(&self, id: WorkerId) -> Result<Leaving, LoopGone> {
        let (reply, worker) = mpsc::sync_channel(1);
        self.send(Command::Remove { id, reply })?;
        Ok(Leaving { worker })
    }

    /// Readable after a worker was given back, for whom nobody may have waited so long.
    pub fn given_back(&self) -> BorrowedFd<'_> {
        // SAFETY: it stays open as long as this does, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.given_back.as_raw_fd()) }
    }

    /// Has [`LoopHandle::given_back`] readable no more.
    pub fn forget_given_back(&self) {
        // It may not have been.
        let _ = self.given_back.read();
    }

    /// Hands a message to a worker.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn control(&self, id: WorkerId, message: Box<dyn Any + Send>) -> Result<(), LoopGone> {
        self.send(Command::Control { id, message })
    }

    /// Quiesces every worker. When this returns, none of them touches guest
    /// memory until [`LoopHandle::resume`]. Workers can come and go meanwhile.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn pause(&self) -> Result<(), LoopGone> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Pause { reply })?;
        answer.recv().map_err(|_| LoopGone)
    }

    /// Like [`LoopHandle::pause`], but gives up after `limit`: what a worker began may
    /// hang with the host's disk. Returns whether all have come to rest.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn pause_within(&self, limit: Duration) -> Result<bool, LoopGone> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Command::Pause { reply })?;
        match answer.recv_timeout(limit) {
            Ok(()) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(LoopGone),
        }
    }

    /// Lets the workers work again.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn resume(&self) -> Result<(), LoopGone> {
        self.send(Command::Resume)
    }

    fn send(&self, command: Command) -> Result<(), LoopGone> {
        self.sender.send(command).map_err(|_| LoopGone)?;
        // Fails only when the counter is full, and then the loop wakes anyway.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// A worker on its way back from the loop.
#[derive(Debug)]
pub struct Leaving {
    worker: Receiver<Box<dyn Worker>>,
}

impl Leaving {
    /// The worker once it is at rest: nothing of it runs or will be called any more.
    /// Nothing if it is not by `limit`: what it began may hang with the host's disk.
    /// It can be waited for again.
    ///
    /// # Errors
    /// The loop has stopped, or never had this worker.
    pub fn wait(&self, limit: Duration) -> Result<Option<Box<dyn Worker>>, LoopGone> {
        match self.worker.recv_timeout(limit) {
            Ok(worker) => Ok(Some(worker)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(LoopGone),
        }
    }
}

enum Command {
    Add {
        id: WorkerId,
        slot: Box<Slot>,
    },
    Remove {
        id: WorkerId,
        reply: SyncSender<Box<dyn Worker>>,
    },
    Control {
        id: WorkerId,
        message: Box<dyn Any + Send>,
    },
    Pause {
        reply: SyncSender<()>,
    },
    Resume,
    Stop,
}

/// A worker and what the loop does for it.
struct Slot {
    worker: Box<dyn Worker>,
    queues: Vec<(u16, Arc<EventFd>)>,
    /// Gone once the worker has failed, or leaves.
    on_failure: Option<OnFailure>,
    /// To whom it goes once it is at rest.
    leaving: Option<SyncSender<Box<dyn Worker>>>,
    watched: Vec<Watched>,
}

/// A descriptor in the epoll set.
struct Watched {
    fd: RawFd,
    events: EventSet,
    target: Target,
    serial: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Target {
    Queue(u16),
    Source(u32),
}

/// What the thread owns.
struct State {
    epoll: Epoll,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    given_back: Arc<EventFd>,
    slots: HashMap<WorkerId, Slot>,
    /// Where an event goes. Serials are never used twice, so an event of a
    /// descriptor that is no longer watched finds nobody.
    targets: HashMap<u64, (WorkerId, Target)>,
    next_serial: u64,
    paused: bool,
    stopping: bool,
}

impl State {
    fn new(
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        given_back: Arc<EventFd>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, WAKE),
        )?;
        Ok(Self {
            epoll,
            commands,
            wake,
            given_back,
            slots: HashMap::new(),
            targets: HashMap::new(),
            next_serial: WAKE + 1,
            paused: true,
            stopping: false,
        })
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::default(); BATCH];
        while !self.stopping {
            if self.paused {
                match self.commands.recv() {
                    Ok(command) => self.command(command),
                    Err(_) => self.stopping = true,
                }
                continue;
            }
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Nothing else can happen to a set that exists.
                Err(_) => break,
            };
            // Commands come last: a worker taken away by one is not called for
            // what is left of this batch, and pausing holds from then on.
            let events = &events[..count];
            let woken = events.iter().any(|event| event.data() == WAKE);
            let stale = events
                .iter()
                .any(|event| event.data() != WAKE && !self.targets.contains_key(&event.data()));
            for event in events {
                self.dispatch(event.data(), event.event_set());
            }
            if stale && !self.rebuild() {
                break;
            }
            if woken {
                let _ = self.wake.read();
                while let Ok(command) = self.commands.try_recv() {
                    self.command(command);
                }
            }
        }
        for slot in self.slots.values_mut() {
            slot.worker.quiesce();
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Add { id, slot } => {
                self.slots.insert(id, *slot);
                if let Err(error) = self.watch(id) {
                    self.fail(id, &error);
                }
            }
            Command::Remove { id, reply } => {
                if let Some(slot) = self.slots.get_mut(&id)
                    && slot.leaving.is_none()
                {
                    slot.worker.leave();
                    slot.queues.clear();
                    slot.on_failure = None;
                    slot.leaving = Some(reply);
                    let rests = slot.worker.is_at_rest();
                    // One that had failed is not waited for yet.
                    if rests || self.watch(id).is_err() {
                        // The loop itself may have been late to hear of it.
                        self.give_back_late(id);
                    }
                }
            }
            Command::Control { id, message } => {
                if let Some(slot) = self.slots.get_mut(&id) {
                    slot.worker.control(message);
                    self.refresh(id);
                }
            }
            Command::Pause { reply } => {
                self.paused = true;
                for slot in self.slots.values_mut() {
                    slot.worker.quiesce();
                }
                let ids: Vec<_> = self.slots.keys().copied().collect();
                for id in ids {
                    self.give_back_at_rest(id);
                }
                let _ = reply.send(());
            }
            Command::Resume => {
                self.paused = false;
                self.resume_workers();
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn resume_workers(&mut self) {
        let ids: Vec<_> = self.slots.keys().copied().collect();
        for id in ids {
            if let Some(slot) = self.slots.get_mut(&id)
                && slot.on_failure.is_some()
                && let Err(error) = slot.worker.resume()
            {
                self.fail(id, &error);
            }
        }
    }

    fn dispatch(&mut self, serial: u64, set: EventSet) {
        let Some(&(id, target)) = self.targets.get(&serial) else {
            return;
        };
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        let event = match target {
            Target::Queue(queue) => {
                if let Some((_, notify)) = slot.queues.iter().find(|(q, _)| *q == queue) {
                    let _ = notify.read();
                }
                Event::Queue(queue)
            }
            Target::Source(token) => Event::Ready {
                token,
                readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                writable: set.contains(EventSet::OUT),
                hangup: set.intersects(EventSet::HANG_UP | EventSet::ERROR),
            },
        };
        match slot.worker.process(event) {
            Ok(()) => self.refresh(id),
            Err(error) => self.fail(id, &error),
        }
        self.give_back_at_rest(id);
    }

    /// Gives a worker back that leaves and has come to rest.
    fn give_back_at_rest(&mut self, id: WorkerId) {
        let slot = self.slots.get(&id);
        if slot.is_some_and(|slot| slot.leaving.is_some() && slot.worker.is_at_rest()) {
            self.give_back_late(id);
        }
    }

    fn give_back_late(&mut self, id: WorkerId) {
        self.give_back(id);
        // Whoever is to read it does not mind how often.
        let _ = self.given_back.write(1);
    }

    fn give_back(&mut self, id: WorkerId) {
        self.unwatch(id);
        if let Some(slot) = self.slots.remove(&id)
            && let Some(reply) = slot.leaving
        {
            // Whoever asked may have given up; the worker goes then.
            let _ = reply.send(slot.worker);
        }
    }

    /// Looks at a worker's sources again if it says that they changed.
    fn refresh(&mut self, id: WorkerId) {
        let changed = self
            .slots
            .get_mut(&id)
            .is_some_and(|slot| slot.worker.sources_changed() && slot.is_watched());
        if changed && let Err(error) = self.watch(id) {
            self.fail(id, &error);
        }
    }

    /// The worker gets no more events; it stays until it is taken back.
    fn fail(&mut self, id: WorkerId, error: &DeviceError) {
        if self
            .slots
            .get(&id)
            .is_some_and(|slot| slot.leaving.is_some())
        {
            // Of what is in flight nothing will be heard.
            return self.give_back_late(id);
        }
        self.unwatch(id);
        if let Some(on_failure) = self
            .slots
            .get_mut(&id)
            .and_then(|slot| slot.on_failure.take())
        {
            on_failure(error);
        }
    }

    /// Makes the epoll set agree with what the worker waits for.
    fn watch(&mut self, id: WorkerId) -> Result<(), DeviceError> {
        let Some(slot) = self.slots.get_mut(&id) else {
            return Ok(());
        };
        let wanted = slot.wanted();
        let mut old: HashMap<_, _> = mem::take(&mut slot.watched)
            .into_iter()
            .map(|watched| ((watched.fd, watched.target), watched))
            .collect();
        let mut changes = Vec::new();
        for (fd, events, target) in wanted {
            let serial = match old.remove(&(fd, target)) {
                Some(known) => {
                    if known.events != events {
                        changes.push((ControlOperation::Modify, fd, events, known.serial));
                    }
                    known.serial
                }
                None => {
                    let serial = self.next_serial;
                    self.next_serial += 1;
                    self.targets.insert(serial, (id, target));
                    changes.push((ControlOperation::Add, fd, events, serial));
                    serial
                }
            };
            slot.watched.push(Watched {
                fd,
                events,
                target,
                serial,
            });
        }
        for watched in old.values() {
            self.targets.remove(&watched.serial);
            forget(&self.epoll, watched.fd);
        }
        for (operation, fd, events, serial) in changes {
            self.epoll
                .ctl(operation, fd, EpollEvent::new(events, serial))
                .map_err(|source| DeviceError::Host {
                    what: "waiting for a descriptor",
                    source,
                })?;
        }
        Ok(())
    }

    fn unwatch(&mut self, id: WorkerId) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        for watched in slot.watched.drain(..) {
            self.targets.remove(&watched.serial);
            forget(&self.epoll, watched.fd);
        }
    }

    /// A descriptor that a worker closed while somebody else holds a duplicate
    /// stays in the epoll set and cannot be named any more. So that it does not
    /// wake the thread for ever, begins with an empty set.
    fn rebuild(&mut self) -> bool {
        let Ok(epoll) = Epoll::new() else {
            return false;
        };
        let wake = EpollEvent::new(EventSet::IN, WAKE);
        if epoll
            .ctl(ControlOperation::Add, self.wake.as_raw_fd(), wake)
            .is_err()
        {
            return false;
        }
        self.epoll = epoll;
        self.targets.clear();
        let ids: Vec<_> = self.slots.keys().copied().collect();
        for id in ids {
            if let Some(slot) = self.slots.get_mut(&id)
                && slot.is_watched()
            {
                slot.watched.clear();
                if let Err(error) = self.watch(id) {
                    self.fail(id, &error);
                }
            }
        }
        true
    }
}

/// Takes a descriptor out of the set. Closing it has done so already.
fn forget(epoll: &Epoll, fd: RawFd) {
    let nothing = EpollEvent::new(EventSet::empty(), 0);
    let _ = epoll.ctl(ControlOperation::Delete, fd, nothing);
}

impl Slot {
    fn is_watched(&self) -> bool {
        self.on_failure.is_some() || self.leaving.is_some()
    }

    /// What the worker waits for now.
    fn wanted(&self) -> Vec<(RawFd, EventSet, Target)> {
        let queues = self
            .queues
            .iter()
            .filter(|(queue, _)| self.worker.handles_queue(*queue))
            .map(|(queue, notify)| (notify.as_raw_fd(), EventSet::IN, Target::Queue(*queue)));
        let sources = self.worker.sources();
        let sources = sources.iter().map(|source| {
            let mut events = EventSet::empty();
            if source.readable {
                events |= EventSet::IN | EventSet::READ_HANG_UP;
            }
            if source.writable {
                events |= EventSet::OUT;
            }
            (source.fd.as_raw_fd(), events, Target::Source(source.token))
        });
        queues.chain(sources).collect()
    }
}

#[cfg(test)]
mod tests;
