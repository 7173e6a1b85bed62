use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::Source;

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(50);

#[derive(Debug, PartialEq, Eq)]
enum Told {
    Event(Event),
    Quiesced,
    Control(u32),
    Time(Duration),
    Failed(String),
}

/// Tells of everything; does what control messages say.
struct Recorder {
    told: Sender<Told>,
    sources: Vec<(u32, UnixStream)>,
    changed: bool,
    fails: bool,
}

enum Order {
    Watch(u32, UnixStream),
    Unwatch,
    Fail,
    Number(u32),
    Time,
    Sleep(Duration),
}

impl Worker for Recorder {
    fn sources(&self) -> Vec<Source<'_>> {
        self.sources
            .iter()
            .map(|(token, stream)| Source {
                fd: stream.as_fd(),
                token: *token,
                readable: true,
                writable: false,
            })
            .collect()
    }

    fn sources_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn handles_queue(&self, queue: u16) -> bool {
        queue != 9
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        if let Event::Ready { token, .. } = event
            && let Some((_, stream)) = self.sources.iter_mut().find(|(t, _)| *t == token)
        {
            let mut data = [0; 16];
            let _ = stream.read(&mut data);
        }
        let _ = self.told.send(Told::Event(event));
        match self.fails {
            true => Err(DeviceError::Chain {
                queue: 0,
                what: "as ordered",
            }),
            false => Ok(()),
        }
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        match *message.downcast().unwrap() {
            Order::Watch(token, stream) => {
                self.sources.push((token, stream));
                self.changed = true;
            }
            Order::Unwatch => {
                self.sources.clear();
                self.changed = true;
            }
            Order::Fail => self.fails = true,
            Order::Time => {
                let _ = self.told.send(Told::Time(thread_time()));
            }
            Order::Sleep(time) => std::thread::sleep(time),
            Order::Number(number) => {
                let _ = self.told.send(Told::Control(number));
            }
        }
    }

    fn quiesce(&mut self) {
        let _ = self.told.send(Told::Quiesced);
    }
}

struct Bench {
    event_loop: Option<EventLoop>,
    handle: LoopHandle,
    id: WorkerId,
    told: Receiver<Told>,
    notify: Arc<EventFd>,
    foreign: Arc<EventFd>,
}

impl Bench {
    fn new() -> Self {
        Self::on(EventLoop::start("test", || Ok(())).unwrap())
    }

    fn take_back(&self) -> Box<dyn Worker> {
        let leaving = self.handle.remove(self.id).unwrap();
        leaving.wait(LONG).unwrap().expect("it rests")
    }

    fn on(event_loop: EventLoop) -> Self {
        let handle = event_loop.handle();
        let (sender, told) = channel();
        let on_failure = {
            let sender = sender.clone();
            Box::new(move |error: &DeviceError| {
                let _ = sender.send(Told::Failed(error.to_string()));
            })
        };
        let worker = Recorder {
            told: sender,
            sources: Vec::new(),
            changed: false,
            fails: false,
        };
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (notify, foreign) = (event(), event());
        let queues = vec![(4, Arc::clone(&notify)), (9, Arc::clone(&foreign))];
        let id = handle.add(Box::new(worker), queues, on_failure).unwrap();
        Self {
            event_loop: Some(event_loop),
            handle,
            id,
            told,
            notify,
            foreign,
        }
    }

    fn order(&self, order: Order) {
        self.handle.control(self.id, Box::new(order)).unwrap();
    }

    fn expect(&self, told: Told) {
        assert_eq!(self.told.recv_timeout(LONG), Ok(told));
    }

    /// Processor time that the loop's thread has used.
    fn time(&self) -> Duration {
        self.order(Order::Time);
        match self.told.recv_timeout(LONG) {
            Ok(Told::Time(time)) => time,
            other => panic!("{other:?}"),
        }
    }

    fn expect_silence(&self) {
        assert_eq!(
            self.told.recv_timeout(SHORT),
            Err(RecvTimeoutError::Timeout)
        );
    }
}

fn ready(token: u32, hangup: bool) -> Told {
    Told::Event(Event::Ready {
        token,
        readable: true,
        writable: false,
        hangup,
    })
}

#[test]
fn wakes_workers_for_their_queues() {
    let bench = Bench::new();
    bench.notify.write(3).unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
    bench.expect_silence();
    bench.notify.write(1).unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
}

#[test]
fn leaves_queues_of_others_alone() {
    let bench = Bench::new();
    bench.foreign.write(1).unwrap();
    bench.expect_silence();
    assert_eq!(bench.foreign.read().unwrap(), 1);
}

#[test]
fn follows_changes_of_sources() {
    let bench = Bench::new();
    let (mut peer, stream) = UnixStream::pair().unwrap();
    bench.order(Order::Watch(7, stream));
    peer.write_all(b"x").unwrap();
    bench.expect(ready(7, false));
    bench.expect_silence();
    let (mut other, stream) = UnixStream::pair().unwrap();
    bench.order(Order::Watch(8, stream));
    other.write_all(b"x").unwrap();
    bench.expect(ready(8, false));
    bench.order(Order::Unwatch);
    bench.order(Order::Number(1));
    bench.expect(Told::Control(1));
    drop(peer);
    bench.expect_silence();
}

#[test]
fn tells_of_hangup() {
    let bench = Bench::new();
    let (peer, stream) = UnixStream::pair().unwrap();
    bench.order(Order::Watch(7, stream));
    drop(peer);
    bench.expect(ready(7, true));
}

/// A descriptor closed here whose duplicate lives elsewhere must neither wake
/// the worker nor keep the thread busy.
#[test]
fn forgets_closed_descriptors_with_duplicates() {
    let bench = Bench::new();
    let (mut peer, stream) = UnixStream::pair().unwrap();
    let duplicate = stream.try_clone().unwrap();
    bench.order(Order::Watch(7, stream));
    bench.order(Order::Unwatch);
    bench.order(Order::Number(1));
    bench.expect(Told::Control(1));
    peer.write_all(b"x").unwrap();
    bench.expect_silence();
    let before = bench.time();
    std::thread::sleep(Duration::from_millis(300));
    let spent = bench.time() - before;
    assert!(
        spent < Duration::from_millis(15),
        "the loop spins: {spent:?}"
    );
    bench.notify.write(1).unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
    drop(duplicate);
}

fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn a_failed_worker_gets_no_more_events() {
    let bench = Bench::new();
    bench.order(Order::Fail);
    bench.order(Order::Number(4));
    bench.expect(Told::Control(4));
    bench.notify.write(1).unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
    bench.expect(Told::Failed("queue 0: as ordered".into()));
    bench.notify.write(1).unwrap();
    bench.expect_silence();
    bench.order(Order::Number(5));
    bench.expect(Told::Control(5));
    let worker = bench.take_back();
    bench.expect(Told::Quiesced);
    drop(worker);
}

#[test]
fn gives_workers_back() {
    let bench = Bench::new();
    let worker = bench.take_back();
    bench.expect(Told::Quiesced);
    bench.notify.write(1).unwrap();
    bench.expect_silence();
    let worker: Box<dyn Any> = worker;
    assert!(worker.is::<Recorder>());
    let again = bench.handle.remove(bench.id).unwrap().wait(LONG);
    assert!(again.is_err(), "it has it no more");
}

/// Rests once somebody has written to its socket.
struct Slow {
    socket: UnixStream,
    rests: bool,
}

impl Worker for Slow {
    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source {
            fd: self.socket.as_fd(),
            token: 1,
            readable: true,
            writable: false,
        }]
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        assert!(
            matches!(event, Event::Ready { .. }),
            "a queue of one that leaves"
        );
        let _ = self.socket.read(&mut [0; 16]);
        self.rests = true;
        Ok(())
    }

    fn quiesce(&mut self) {
        panic!("would wait");
    }

    fn leave(&mut self) {}

    fn is_at_rest(&self) -> bool {
        self.rests
    }
}

#[test]
fn one_that_leaves_slowly_keeps_nobody_waiting() {
    let bench = Bench::new();
    let (mut host, socket) = UnixStream::pair().unwrap();
    let notify = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let slow = Box::new(Slow {
        socket,
        rests: false,
    });
    let queues = vec![(0, Arc::clone(&notify))];
    let id = bench.handle.add(slow, queues, Box::new(|_| {})).unwrap();
    let leaving = bench.handle.remove(id).unwrap();
    assert!(leaving.wait(SHORT).unwrap().is_none());
    notify.write(1).unwrap();
    bench.notify.write(1).unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
    let is_told = || {
        let mut given_back = [PollFd::from_borrowed_fd(
            bench.handle.given_back(),
            PollFlags::IN,
        )];
        poll(&mut given_back, Some(&Timespec::default())).unwrap() == 1
    };
    assert!(!is_told());
    host.write_all(b"done").unwrap();
    let worker: Box<dyn Any> = leaving.wait(LONG).unwrap().expect("it rests");
    assert!(worker.is::<Slow>());
    bench.handle.pause().unwrap();
    assert!(is_told());
    bench.handle.forget_given_back();
    assert!(!is_told());
}

#[test]
fn a_worker_that_does_not_rest_is_not_waited_for() {
    let bench = Bench::new();
    bench.order(Order::Sleep(6 * SHORT));
    let leaving = bench.handle.remove(bench.id).unwrap();
    assert!(leaving.wait(SHORT).unwrap().is_none());
    bench.expect(Told::Quiesced);
    assert!(leaving.wait(LONG).unwrap().is_some());
    // Who gave up hears of it.
    bench.handle.pause().unwrap();
    let mut given_back = [PollFd::from_borrowed_fd(
        bench.handle.given_back(),
        PollFlags::IN,
    )];
    assert_eq!(poll(&mut given_back, Some(&Timespec::default())), Ok(1));
}

#[test]
fn pauses() {
    let bench = Bench::new();
    bench.handle.pause().unwrap();
    bench.expect(Told::Quiesced);
    bench.notify.write(1).unwrap();
    bench.expect_silence();
    bench.order(Order::Number(2));
    bench.expect(Told::Control(2));
    bench.handle.resume().unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
}

#[test]
fn a_pause_that_takes_too_long_is_not_waited_for() {
    let bench = Bench::new();
    bench.order(Order::Sleep(6 * SHORT));
    assert_eq!(bench.handle.pause_within(SHORT), Ok(false));
    bench.expect(Told::Quiesced);
    bench.handle.resume().unwrap();
    assert_eq!(bench.handle.pause_within(LONG), Ok(true));
}

#[test]
fn a_loop_that_starts_paused_waits_for_the_word() {
    let event_loop = EventLoop::start_paused("test", || Ok(())).unwrap();
    let bench = Bench::on(event_loop);
    bench.notify.write(1).unwrap();
    bench.expect_silence();
    bench.order(Order::Number(2));
    bench.expect(Told::Control(2));
    bench.handle.resume().unwrap();
    bench.expect(Told::Event(Event::Queue(4)));
}

#[test]
fn stops_when_dropped() {
    let mut bench = Bench::new();
    bench.event_loop = None;
    bench.expect(Told::Quiesced);
    assert_eq!(
        bench.told.recv_timeout(LONG),
        Err(RecvTimeoutError::Disconnected)
    );
    assert!(matches!(bench.handle.remove(bench.id), Err(LoopGone)));
    assert_eq!(bench.handle.pause(), Err(LoopGone));
}

#[test]
fn stops_while_paused() {
    let mut bench = Bench::new();
    bench.handle.pause().unwrap();
    bench.event_loop = None;
}

#[test]
fn runs_what_comes_first() {
    let error = EventLoop::start("test", || Err(io::ErrorKind::PermissionDenied.into()));
    assert_eq!(
        error.err().map(|error| error.kind()),
        Some(io::ErrorKind::PermissionDenied)
    );
    let (sender, ran) = channel();
    let _loop = EventLoop::start("first", move || {
        let name = std::thread::current().name().map(str::to_owned);
        sender.send(name).map_err(io::Error::other)
    })
    .unwrap();
    assert_eq!(ran.try_recv().unwrap().as_deref(), Some("first"));
}
