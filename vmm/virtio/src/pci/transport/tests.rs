use std::any::Any;
use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::queue::{DeviceQueue, FEATURES};
use crate::testing::{
    ACKNOWLEDGE, Buffer, DRIVER, DRIVER_OK, Driver, FEATURES_OK, HOLE, NEEDS_RESET, wait_until,
};
use crate::{DeviceError, Event, Source, Worker};

const SHORT: Duration = Duration::from_millis(50);

/// Writes what it reads, and fails at a chain without readable bytes.
#[derive(Default)]
struct Echo {
    told: Arc<Mutex<Vec<(&'static str, u32)>>>,
    /// Does not come to rest while somebody has this.
    hang: Arc<Mutex<()>>,
}

struct EchoWorker {
    queues: Vec<DeviceQueue>,
    told: Arc<Mutex<Vec<(&'static str, u32)>>>,
    hang: Arc<Mutex<()>>,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn offered_features(&self) -> u64 {
        FEATURES | 1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0..).zip(data) {
            *byte = (offset + i) as u8;
        }
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        let number = *message.downcast().unwrap();
        self.told.lock().unwrap().push(("device", number));
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, ActivateError> {
        Ok(Box::new(EchoWorker {
            queues: vec![activation.take_queue(0)?, activation.take_queue(1)?],
            told: Arc::clone(&self.told),
            hang: Arc::clone(&self.hang),
        }))
    }

    fn reset(&mut self, worker: Box<dyn Worker>) {
        let worker: Box<dyn Any> = worker;
        assert!(worker.is::<EchoWorker>());
        self.told.lock().unwrap().push(("reset", 0));
    }
}

impl Worker for EchoWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        let Event::Queue(queue) = event else {
            unreachable!("there are no sources");
        };
        let queue = &mut self.queues[usize::from(queue)];
        queue.begin();
        while let Some(chain) = queue.pop()? {
            if chain.readable_len() == 0 {
                return Err(queue.chain_error("nothing to read"));
            }
            let len = chain.readable_len().min(chain.writable_len());
            let mut data = vec![0; len];
            assert!(chain.read(0, &mut data));
            assert!(chain.write(0, &data));
            queue.add_used(chain.head(), len as u32)?;
        }
        queue.signal()
    }

    fn control(&mut self, message: Box<dyn Any + Send>) {
        let number = *message.downcast().unwrap();
        self.told.lock().unwrap().push(("worker", number));
    }

    fn quiesce(&mut self) {
        drop(self.hang.lock().unwrap());
    }
}

fn echo(driver: &mut Driver, queue: &mut crate::testing::DriverQueue, data: &[u8]) {
    let request = driver.allocate_with(data);
    let answer = driver.allocate(data.len());
    let head = queue.add(&[request, Buffer::writable(answer, data.len() as u32)]);
    driver.notify(queue.index);
    driver.wait_queue(queue.index);
    assert_eq!(queue.pop_used(), Some((head.into(), data.len() as u32)));
    assert_eq!(driver.read(answer, data.len()), data);
}

#[test]
fn serves_a_driver() {
    for features in [u64::MAX, 0] {
        let mut driver = Driver::new(Echo::default());
        let mut queues = driver.start(features);
        assert_eq!(queues.len(), 2);
        assert_eq!((queues[0].size, queues[1].size), (64, 16));
        for text in [&b"first"[..], b"second", b"third"] {
            echo(&mut driver, &mut queues[0], text);
            echo(&mut driver, &mut queues[1], text);
        }
        assert_eq!(driver.isr(), 1);
        assert_eq!(driver.isr(), 0);
        assert_eq!(driver.device_config(5), [5, 6, 7]);
        assert!(driver.reports.lock().unwrap().is_empty());
    }
}

#[test]
fn says_what_it_is() {
    let mut driver = Driver::new(Echo::default());
    assert_eq!(driver.config(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(driver.config::<1>(8), [1]);
    assert_eq!(driver.offered_features(), FEATURES | 1 | 1 << 32);
}

#[test]
fn can_be_reset_and_started_again() {
    let mut driver = Driver::new(Echo::default());
    for _ in 0..3 {
        let mut queues = driver.start(u64::MAX);
        echo(&mut driver, &mut queues[0], b"again");
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.set_common(0x16, &[0, 0]);
        assert_eq!(driver.common(0x1c), [0, 0], "the queue is disabled again");
        assert_eq!(driver.common(0x1a), [0xff, 0xff]);
    }
}

#[test]
fn forgets_notifications_of_before_a_reset() {
    let mut driver = Driver::new(Echo::default());
    driver.notify(1);
    driver.set_status(0);
    let event = &driver.function.notifications()[1].event;
    assert!(event.read().is_err());
}

#[test]
fn wants_sound_features() {
    let mut driver = Driver::new(Echo::default());
    for features in [0_u64, 1 | 2 | 1 << 32, 1] {
        driver.set_status(0);
        driver.set_status(ACKNOWLEDGE | DRIVER);
        for half in [0_u32, 1] {
            driver.set_common(8, &half.to_le_bytes());
            let value = (features >> (half * 32)) as u32;
            driver.set_common(12, &value.to_le_bytes());
        }
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
}

#[test]
fn keeps_features_once_agreed() {
    let mut driver = Driver::new(Echo::default());
    driver.negotiate(1);
    driver.set_common(8, &[0; 4]);
    driver.set_common(12, &[0xff; 4]);
    assert_eq!(driver.common(12), [1, 0, 0, 0]);
    driver.set_status(ACKNOWLEDGE);
    let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    assert_eq!(driver.status(), agreed, "only a reset clears bits");
}

#[test]
fn refuses_queues_that_cannot_be() {
    let fields: [(u64, &[u8]); 7] = [
        (0x20, &0x1_0008_u64.to_le_bytes()),
        (0x28, &0x1_0001_u64.to_le_bytes()),
        (0x30, &0x1_0002_u64.to_le_bytes()),
        (0x20, &HOLE.to_le_bytes()),
        (0x28, &(HOLE - 16).to_le_bytes()),
        (0x30, &0xffff_ffff_ffff_fff0_u64.to_le_bytes()),
        (0x28, &0_u64.to_le_bytes()),
    ];
    for (offset, value) in fields {
        let mut driver = Driver::new(Echo::default());
        driver.negotiate(u64::MAX);
        let queue = driver.set_up_queue(0);
        driver.set_common(0x16, &[1, 0]);
        driver.set_common(0x20, &queue.descriptors.to_le_bytes());
        driver.set_common(0x28, &queue.available.to_le_bytes());
        driver.set_common(0x30, &queue.used.to_le_bytes());
        driver.set_common(offset, value);
        driver.set_common(0x1c, &[1, 0]);
        assert_eq!(driver.common(0x1c), [0, 0], "{offset:#x}");
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        let status = driver.status();
        driver.set_status(status | DRIVER_OK);
        assert_eq!(driver.status() & DRIVER_OK, 0);
        driver.start(u64::MAX);
        assert_eq!(driver.status() & NEEDS_RESET, 0, "a reset heals");
    }
}

#[test]
fn keeps_queues_once_enabled() {
    let mut driver = Driver::new(Echo::default());
    driver.negotiate(u64::MAX);
    let queue = driver.set_up_queue(0);
    for (offset, value) in [(0x20, [9; 8]), (0x28, [9; 8]), (0x30, [9; 8])] {
        driver.set_common(offset, &value);
    }
    driver.set_common(0x18, &[2, 0]);
    driver.set_common(0x1c, &[0, 0]);
    assert_eq!(driver.common(0x20), queue.descriptors.to_le_bytes());
    assert_eq!(driver.common(0x18), queue.size.to_le_bytes());
    assert_eq!(driver.common(0x1c), [1, 0]);
}

#[test]
fn takes_powers_of_two_as_queue_sizes() {
    let mut driver = Driver::new(Echo::default());
    driver.negotiate(u64::MAX);
    driver.set_common(0x16, &[0, 0]);
    for (size, is) in [(3_u16, 64_u16), (128, 64), (0, 64), (32, 32), (1, 1)] {
        driver.set_common(0x18, &size.to_le_bytes());
        assert_eq!(driver.common(0x18), is.to_le_bytes());
    }
}

#[test]
fn needs_the_queues_of_its_device() {
    let mut driver = Driver::new(Echo::default());
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    let status = driver.status();
    driver.set_status(status | DRIVER_OK);
    driver.wait_needs_reset();
    assert_eq!(
        *driver.reports.lock().unwrap(),
        ["test: activation: queue 1 is not enabled"]
    );
    // It is too late for that now.
    driver.set_up_queue_as_is(1);
    assert_eq!(driver.common(0x1c), [0, 0]);
}

#[test]
fn a_bad_chain_costs_a_reset() {
    let mut driver = Driver::new(Echo::default());
    let mut queues = driver.start(u64::MAX);
    let answer = driver.allocate(16);
    queues[0].add(&[Buffer::writable(answer, 16)]);
    driver.notify(0);
    driver.wait_needs_reset();
    assert_eq!(driver.isr() & 2, 2);
    assert_eq!(
        *driver.reports.lock().unwrap(),
        ["test: queue 0: nothing to read"]
    );
    // No more work until the reset, which heals.
    driver.allocate_with(b"x");
    driver.notify(1);
    assert!(!driver.interrupted(2, SHORT));
    let mut queues = driver.start(u64::MAX);
    echo(&mut driver, &mut queues[0], b"well again");
}

#[test]
fn reports_are_bounded() {
    let mut driver = Driver::new(Echo::default());
    for _ in 0..20 {
        let mut queues = driver.start(u64::MAX);
        let answer = driver.allocate(16);
        queues[0].add(&[Buffer::writable(answer, 16)]);
        driver.notify(0);
        driver.wait_needs_reset();
    }
    assert_eq!(driver.reports.lock().unwrap().len(), 8);
}

#[test]
fn masked_vectors_are_pending() {
    let mut driver = Driver::new(Echo::default());
    let mut queues = driver.start(u64::MAX);
    let connected = Arc::clone(&driver.vectors.connected);
    let message = |data| {
        Some(super::super::MsiMessage {
            address: 0xfee0_0000,
            data,
        })
    };
    assert_eq!(
        *connected.lock().unwrap(),
        [message(0), message(1), message(2)]
    );

    driver.function.write_bar(0, TABLE + 16 + 12, &[1, 0, 0, 0]);
    assert_eq!(connected.lock().unwrap()[1], None);
    let request = driver.allocate_with(b"x");
    queues[0].add(&[request]);
    driver.notify(0);
    let mut pending = [0; 8];
    wait_until("a vector is pending", || {
        driver.function.read_bar(0, PENDING, &mut pending);
        pending != [0; 8]
    });
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    // Only now: taking the chain earlier may ask for no interrupt (EVENT_IDX).
    assert!(queues[0].pop_used().is_some());
    driver.function.write_bar(0, TABLE + 16 + 8, &[77, 0, 0, 0]);
    driver.function.write_bar(0, TABLE + 16 + 12, &[0; 4]);
    assert_eq!(connected.lock().unwrap()[1], message(77));
    assert!(driver.interrupted(1, SHORT));

    let control = driver.function.msix_capability + 2;
    let _ = driver.function.write_config(control, &[0, 0xc0]);
    assert_eq!(*connected.lock().unwrap(), [None; 3], "function mask");
    let _ = driver.function.write_config(control, &[0, 0x80]);
    assert_eq!(connected.lock().unwrap()[1], message(77));
}

#[test]
fn does_without_vectors() {
    let mut driver = Driver::new(Echo::default());
    let mut queues = driver.start(u64::MAX);
    driver.set_common(0x16, &[0, 0]);
    driver.set_common(0x1a, &[9, 0]);
    assert_eq!(driver.common(0x1a), [0xff, 0xff], "there is no vector 9");
    let request = driver.allocate_with(b"x");
    queues[0].add(&[request]);
    driver.notify(0);
    assert!(!driver.interrupted(1, SHORT));
    assert!(queues[0].pop_used().is_some());
    assert_eq!(driver.isr(), 1);
}

#[test]
fn has_a_window_in_configuration_space() {
    let mut driver = Driver::new(Echo::default());
    let window = driver.function.window;
    let access = |driver: &mut Driver, at: u64, len: u32| {
        let _ = driver.function.write_config(window + WINDOW_BAR, &[0]);
        let offset = (at as u32).to_le_bytes();
        let _ = driver
            .function
            .write_config(window + WINDOW_OFFSET, &offset);
        let _ = driver
            .function
            .write_config(window + WINDOW_LENGTH, &len.to_le_bytes());
    };
    access(&mut driver, COMMON + 0x12, 2);
    assert_eq!(driver.config::<2>(window + WINDOW_DATA), [2, 0]);
    access(&mut driver, COMMON + 0x14, 1);
    let _ = driver
        .function
        .write_config(window + WINDOW_DATA, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    access(&mut driver, COMMON + 0x14, 3);
    let _ = driver.function.write_config(window + WINDOW_DATA, &[0]);
    assert_eq!(driver.status(), ACKNOWLEDGE, "three bytes are no access");
    let data = window + WINDOW_DATA;
    let _ = driver.function.write_config(data, &[7; 4]);
    for (at, len) in [(COMMON, 3), (COMMON, 8), (COMMON + 1, 2), (COMMON + 2, 4)] {
        access(&mut driver, at, len);
        assert_eq!(driver.config(data), [7; 4], "{len} bytes at {at:#x}");
    }
}

#[test]
fn control_finds_the_working_half() {
    let device = Echo::default();
    let told = Arc::clone(&device.told);
    let mut driver = Driver::new(device);
    driver.function.control(Box::new(1_u32)).unwrap();
    driver.start(u64::MAX);
    driver.function.control(Box::new(2_u32)).unwrap();
    driver.set_status(0);
    driver.function.control(Box::new(3_u32)).unwrap();
    let expected = [("device", 1), ("worker", 2), ("reset", 0), ("device", 3)];
    assert_eq!(*told.lock().unwrap(), expected);
}

#[test]
fn waits_while_the_loop_is_paused() {
    let mut driver = Driver::new(Echo::default());
    let mut queues = driver.start(u64::MAX);
    let handle = driver.event_loop.handle();
    handle.pause().unwrap();
    let request = driver.allocate_with(b"x");
    queues[0].add(&[request]);
    driver.notify(0);
    assert!(!driver.interrupted(1, SHORT));
    assert_eq!(queues[0].used_index(), 0);
    handle.resume().unwrap();
    driver.wait_queue(0);
    handle.pause().unwrap();
    driver.set_status(0);
    handle.resume().unwrap();
    let mut queues = driver.start(u64::MAX);
    echo(&mut driver, &mut queues[0], b"resumed");
}

#[test]
fn survives_its_event_loop() {
    let mut driver = Driver::new(Echo::default());
    driver.start(u64::MAX);
    driver.event_loop = crate::event_loop::EventLoop::start("other", || Ok(())).unwrap();
    driver.set_status(0);
    assert_eq!(driver.status(), NEEDS_RESET);
}

#[derive(Clone, Debug)]
enum Access {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    Common(u64, u64, usize),
    Notify(u16),
}

fn any_access() -> impl Strategy<Value = Access> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..10);
    prop_oneof![
        (0..0x110_u16, bytes()).prop_map(|(at, data)| Access::Config(at, data)),
        (0..0x9000_u64, bytes()).prop_map(|(at, data)| Access::Bar(at, data)),
        (any::<u64>(), bytes()).prop_map(|(at, data)| Access::Bar(at, data)),
        // Whole registers with small values: gets far into the state machine.
        (
            prop::sample::select(vec![
                (0, 4),
                (8, 4),
                (0xc, 4),
                (0x10, 2),
                (0x14, 1),
                (0x16, 2),
                (0x18, 2),
                (0x1a, 2),
                (0x1c, 2),
                (0x20, 8),
                (0x28, 8),
                (0x30, 8),
            ]),
            prop_oneof![0..16_u64, Just(0x1_0000), Just(u64::MAX)],
        )
            .prop_map(|((at, len), value)| Access::Common(at, value, len)),
        (0..4_u16).prop_map(Access::Notify),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn survives_any_access(accesses in prop::collection::vec(any_access(), 1..200), start in any::<bool>()) {
        let mut driver = Driver::new(Echo::default());
        if start {
            driver.start(u64::MAX);
        }
        for access in accesses {
            match access {
                Access::Config(at, mut data) => {
                    let _ = driver.function.write_config(at, &data);
                    driver.function.read_config(at, &mut data);
                }
                Access::Bar(at, mut data) => {
                    driver.function.write_bar(0, at, &data);
                    driver.function.read_bar(0, at, &mut data);
                }
                Access::Common(at, value, len) => {
                    driver.set_common(at, &value.to_le_bytes()[..len]);
                }
                Access::Notify(queue) => {
                    if let Some(n) = driver.function.notifications().get(usize::from(queue)) {
                        n.event.write(1).unwrap();
                    }
                }
            }
        }
        // Whatever happened, a reset heals.
        let mut queues = driver.start(u64::MAX);
        let request = driver.allocate_with(b"x");
        queues[0].add(&[request]);
        driver.notify(0);
        wait_until("the chain is used", || queues[0].pop_used().is_some());
    }
}

#[test]
fn a_retired_device_does_not_start_again() {
    let echo = Echo::default();
    let told = Arc::clone(&echo.told);
    let mut driver = Driver::new(echo);
    let _queues = driver.start(0);
    assert!(driver.function.retire());
    // Not reset, and not given another working half.
    for status in [0, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK] {
        driver.set_status(status);
    }
    assert!(driver.function.control(Box::new(1_u32)).is_err());
    assert!(told.lock().unwrap().is_empty());
    // Both halves are gone though the function is still here.
    assert_eq!(Arc::strong_count(&told), 1);
    let mut config = [1; 4];
    driver.function.read_bar(0, 0x2000, &mut config);
    assert_eq!(config, [0; 4]);
}

#[test]
fn a_device_that_does_not_rest_holds_nobody_up() {
    let device = Echo::default();
    let (told, hang) = (Arc::clone(&device.told), Arc::clone(&device.hang));
    let mut driver = Driver::new(device);
    let _queues = driver.start(0);
    let hung = hang.lock().unwrap();
    driver.set_status(0);
    assert_eq!(driver.status(), NEEDS_RESET);
    // A driver that doesn't wait gets no second working half.
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    let reports = driver.reports.lock().unwrap().clone();
    assert!(
        reports
            .iter()
            .all(|report| report.contains("does not finish"))
    );
    assert!(!driver.function.retire());
    drop(hung);
    // Drivers write once, and read until it is so.
    wait_until("it is reset", || driver.status() == 0);
    assert_eq!(*told.lock().unwrap(), [("reset", 0)]);
    let mut queues = driver.start(0);
    echo(&mut driver, &mut queues[0], b"healed");

    let hung = hang.lock().unwrap();
    assert!(!driver.function.retire());
    drop(hung);
    wait_until("it rests", || driver.function.retire());
    assert_eq!(Arc::strong_count(&told), 1);
}

/// Saves a paused device and has another one go on with its driver.
fn move_to_another(before: Driver) -> Driver {
    before.event_loop.handle().pause().unwrap();
    let saved = before.function.save().unwrap();
    let mut after = Driver::with_memory(Echo::default(), before.memory.clone());
    drop(before);
    after.function.restore(&saved).unwrap();
    assert_eq!(after.function.save().unwrap().config, saved.config);
    after
}

#[test]
fn goes_on_with_the_driver_of_another() {
    for features in [u64::MAX, 0] {
        let mut driver = Driver::new(Echo::default());
        let mut queues = driver.start(features);
        for round in 0..8_u8 {
            echo(&mut driver, &mut queues[0], &[round; 9]);
            // On its way when the machine is saved: nobody has been notified.
            let request = driver.allocate_with(&[round; 5]);
            let answer = driver.allocate(5);
            let head = queues[1].add(&[request, Buffer::writable(answer, 5)]);
            driver.forget_buffers();
            driver = move_to_another(driver);
            assert_eq!(
                driver.status(),
                ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
            );
            assert!(
                driver
                    .vectors
                    .connected
                    .lock()
                    .unwrap()
                    .iter()
                    .all(Option::is_some)
            );
            let used = loop {
                // One interrupt may have been on its way, too.
                driver.wait_queue(1);
                if let Some(used) = queues[1].pop_used() {
                    break used;
                }
            };
            assert_eq!(used, (head.into(), 5));
            assert_eq!(driver.read(answer, 5), [round; 5]);
            while driver.interrupted(1, SHORT) || driver.interrupted(0, SHORT) {}
        }
    }
}

#[test]
fn a_device_at_rest_and_one_that_failed_stay_so() {
    let mut driver = move_to_another(Driver::new(Echo::default()));
    assert_eq!(driver.status(), 0);
    let mut queues = driver.start(u64::MAX);
    echo(&mut driver, &mut queues[0], b"first");

    queues[0].add(&[]);
    queues[0].add(&[Buffer::writable(0x10_0000, 8)]);
    driver.notify(0);
    driver.wait_needs_reset();
    let mut driver = move_to_another(driver);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.set_status(0);
    let mut queues = driver.start(u64::MAX);
    echo(&mut driver, &mut queues[0], b"again");
}

#[test]
fn takes_no_state_of_another_device() {
    let mut driver = Driver::new(Echo::default());
    let _queues = driver.start(u64::MAX);
    driver.event_loop.handle().pause().unwrap();
    let good = driver.function.save().unwrap();
    let refused = |change: &dyn Fn(&mut FunctionState, &mut VirtioState)| {
        let mut state = good.clone();
        let mut virtio = state.virtio.take().unwrap();
        change(&mut state, &mut virtio);
        state.virtio = Some(virtio);
        let mut other = Driver::with_memory(Echo::default(), driver.memory.clone());
        let error = other.function.restore(&state).unwrap_err();
        error.to_string()
    };
    let not_alike = |said: String| assert!(said.contains("is not that of such"), "{said}");
    not_alike(refused(&|_, virtio| virtio.registers.offered ^= 1));
    not_alike(refused(&|_, virtio| virtio.registers.driver_features = 0));
    not_alike(refused(&|_, virtio| virtio.registers.status = DRIVER_OK));
    not_alike(refused(&|_, virtio| virtio.registers.status |= 0x20));
    not_alike(refused(&|_, virtio| virtio.registers.queues[0].size = 128));
    not_alike(refused(&|_, virtio| virtio.registers.queues[0].size = 3));
    not_alike(refused(&|_, virtio| virtio.registers.queues.truncate(1)));
    not_alike(refused(&|_, virtio| {
        virtio.signals.queue_vectors.truncate(1)
    }));
    not_alike(refused(&|_, virtio| virtio.table.truncate(1)));
    not_alike(refused(&|state, _| state.config.truncate(255)));
    not_alike(refused(&|state, _| state.config[2] ^= 1));
    let said = refused(&|_, virtio| virtio.registers.queues[0].used = HOLE);
    assert!(said.contains("activation"), "{said}");
    // Vectors that do not exist are none, as for a driver.
    let mut far = good.clone();
    if let Some(virtio) = &mut far.virtio {
        virtio.signals.queue_vectors[0] = 77;
        virtio.pending = vec![77, 0xffff];
    }
    let mut other = Driver::with_memory(Echo::default(), driver.memory.clone());
    other.function.restore(&far).unwrap();
}
