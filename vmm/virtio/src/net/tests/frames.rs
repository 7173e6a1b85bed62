//! Frames both ways, and the commands on the control queue.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;

const SEGMENTS: u64 = EVENT_IDX
    | MERGEABLE
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;

#[test]
fn tells_address_and_mtu() {
    let guest = Guest::new(0);
    let mut config = [0xff; 14];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
}

#[test]
fn frames_leave() {
    for features in [0, EVENT_IDX] {
        let mut guest = Guest::new(features);
        let frames = [26, 27, 1526, 65561, 65562].map(|len| frame(len, len));
        for frame in &frames {
            guest.driver.send(frame);
        }
        // Too short and too long for a frame: dropped.
        guest.driver.send(&frame(1, 25));
        guest.driver.send(&frame(1, 65563));
        guest.driver.send(&frame(1, 12));
        guest.run();
        for frame in &frames {
            assert!(guest.left().as_ref() == Some(frame));
        }
        assert_eq!(guest.left(), None);
        guest.driver.can_send();
        assert_eq!(guest.driver.tx_free.len(), 128);
        assert!(guest.driver.interrupt.queues[1].read().unwrap() > 0);
    }
}

#[test]
fn a_full_wire_loses_frames_and_stalls_nothing() {
    let mut guest = Guest::new(EVENT_IDX);
    for _ in 0..2 {
        while guest.driver.can_send() && guest.driver.tx.room() >= 2 {
            guest.driver.send(&frame(1, 60000));
        }
        guest.run();
        assert!(guest.driver.can_send());
    }
}

#[test]
fn a_frame_is_spread_over_buffers() {
    // Straight into the buffers, and by way of the detour.
    for buffers in [100, 10] {
        let mut guest = Guest::new(SEGMENTS);
        guest.driver.give(buffers, 1000);
        for (seed, (len, count)) in [(1000, 1), (1001, 2), (60, 1), (4500, 5)]
            .into_iter()
            .enumerate()
        {
            let frame = frame(seed, len);
            guest.arrive(&frame);
            guest.run();
            assert!(guest.driver.receive() == received(frame, count));
        }
        assert!(guest.driver.interrupt.queues[0].read().unwrap() > 0);
    }
}

#[test]
fn interrupts_for_any_buffer_of_a_frame() {
    let mut guest = Guest::new(SEGMENTS);
    guest.driver.give(100, 1000);
    guest.run();
    // The driver wants to know of the first buffer; three come at once.
    assert_eq!(guest.driver.receive(), None);
    guest.arrive(&frame(1, 2500));
    guest.run();
    assert_eq!(guest.driver.interrupt.queues[0].read().unwrap(), 1);
}

#[test]
fn waits_for_buffers_without_losing_frames() {
    let mut guest = Guest::new(EVENT_IDX | MERGEABLE);
    let frames: Vec<_> = (0..8).map(|seed| frame(seed, 1500)).collect();
    for frame in &frames {
        guest.arrive(frame);
    }
    guest.run();
    assert_eq!(guest.driver.receive(), None);
    for (i, frame) in frames.into_iter().enumerate() {
        // The first buffer is not enough; the second is.
        guest.driver.give(1, 1000);
        guest.run();
        assert_eq!(guest.driver.receive(), None, "frame {i}");
        guest.driver.give(1, 1000);
        guest.run();
        assert!(guest.driver.receive() == received(frame, 2), "frame {i}");
    }
}

#[test]
fn what_fits_into_no_buffers_is_dropped() {
    // One chain a frame.
    let mut guest = Guest::new(EVENT_IDX);
    guest.driver.give(4, 100);
    for (seed, len) in [(1, 101), (2, 100), (3, 1530), (4, 1531), (5, 80)] {
        guest.arrive(&frame(seed, len));
    }
    guest.run();
    assert!(guest.driver.receive() == received(frame(2, 100), 1));
    assert!(guest.driver.receive() == received(frame(5, 80), 1));
    assert_eq!(guest.driver.receive(), None);

    // The whole ring.
    let mut guest = Guest::new(SEGMENTS);
    guest.driver.give(256, 12);
    guest.arrive(&frame(1, 12 * 256 + 1));
    guest.arrive(&frame(2, 12 * 256));
    guest.run();
    assert!(guest.driver.receive() == received(frame(2, 12 * 256), 256));
    assert_eq!(guest.driver.receive(), None);

    // Longer than can be: cut off by nobody.
    let mut guest = Guest::new(EVENT_IDX | MERGEABLE);
    for buffers in [1, 20] {
        guest.driver.give(buffers, 1600);
        guest.arrive(&frame(1, 12 + 18 + 1501));
        guest.arrive(&frame(2, 12 + 18 + 1500));
        guest.run();
        assert!(guest.driver.receive() == received(frame(2, 1530), 1));
    }
}

#[test]
fn a_tap_that_is_gone_is_left_alone() {
    let mut guest = Guest::new(EVENT_IDX);
    guest.driver.give(4, 2000);
    guest.run();
    guest.wire = std::fs::File::open("/dev/null").unwrap().into();
    guest.run();
    assert!(guest.worker.as_ref().unwrap().sources().is_empty());
    guest.driver.send(&frame(1, 100));
    guest.driver.give(4, 2000);
    guest.run();
    assert!(guest.driver.can_send());
}

#[test]
fn short_buffers_are_an_error() {
    let mut guest = Guest::new(EVENT_IDX | MERGEABLE);
    guest.driver.give(1, 11);
    guest.arrive(&frame(1, 100));
    assert!(matches!(
        guest.try_run(),
        Err(DeviceError::Chain { queue: RX, .. })
    ));
}

#[test]
fn a_pause_gives_unused_buffers_back() {
    let mut guest = Guest::new(SEGMENTS);
    guest.driver.give(40, 2000);
    for seed in 0..10 {
        guest.arrive(&frame(seed, 3000));
        guest.run();
        guest.worker.as_mut().unwrap().quiesce();
        assert!(guest.driver.receive() == received(frame(seed, 3000), 2));
    }
}

#[test]
fn the_tap_outlasts_a_reset() {
    let mut guest = Guest::new(SEGMENTS);
    assert_eq!(guest.offloads.load(Ordering::Relaxed), 3);
    guest.device.reset(guest.worker.take().unwrap());
    guest.features = EVENT_IDX;
    guest.driver = Driver::new(EVENT_IDX);
    guest.worker = Some(guest.driver.activate(&mut guest.device, EVENT_IDX));
    assert_eq!(guest.offloads.load(Ordering::Relaxed), 0);
    guest.driver.give(1, 2000);
    guest.arrive(&frame(1, 100));
    guest.run();
    assert!(guest.driver.receive() == received(frame(1, 100), 1));
}

#[test]
fn commands_are_answered() {
    let mut guest = Guest::new(SEGMENTS);
    for (command, answer) in [
        (&[0, 0, 1][..], 0),
        (&[0, 1, 0], 0),
        (&[0, 0], 1),
        (&[0, 2, 1], 1),
        (&[0], 1),
        (&[], 1),
        (&[2, 0, 1, 0], 1),
        (&[9, 9, 9], 1),
        // Two tables of addresses, of one and none.
        (&[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0], 0),
        (&[1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 1, 0, 0, 0], 1),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1),
        (&[1, 1, 1, 2, 3, 4, 5, 6], 1),
    ] {
        assert_eq!(guest.command(command), answer, "{command:?}");
    }
    for (offloads, answer, flags) in [(0u64, 0, 0), (1 << 1, 0, 1), (1 << 8, 1, 1), (0x82, 0, 3)] {
        let mut command = vec![5, 0];
        command.extend(offloads.to_le_bytes());
        assert_eq!(guest.command(&command), answer, "{offloads:#x}");
        assert_eq!(guest.offloads.load(Ordering::Relaxed), flags);
    }
    // Not negotiated.
    let mut guest = Guest::new(0);
    assert_eq!(guest.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 1);
}

/// What the kernel was told last stays, and is told in vain no more.
#[test]
fn offloads_that_change_for_ever_are_refused() {
    let mut guest = Guest::new(SEGMENTS);
    let (mut told, mut refused, mut last) = (0, 0, 3);
    for offloads in [0_u64, 0x82].repeat(50) {
        let mut command = vec![5, 0];
        command.extend(offloads.to_le_bytes());
        refused += u32::from(guest.command(&command));
        let now = guest.offloads.load(Ordering::Relaxed);
        told += u32::from(now != last);
        last = now;
    }
    assert!((10..=20).contains(&told), "{told}");
    assert!(refused >= 30, "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn frames_arrive_whole_and_in_order(
        lens in prop::collection::vec(prop_oneof![26usize..200, 26usize..1530, 26usize..65562], 1..60),
        steps in prop::collection::vec((any::<bool>(), 1usize..40, 12u32..4000), 1..60),
        event_idx in any::<bool>(),
    ) {
        let features = if event_idx { SEGMENTS } else { SEGMENTS & !EVENT_IDX };
        let mut guest = Guest::new(features);
        let mut expected = std::collections::VecDeque::new();
        let mut lens = lens.into_iter().enumerate();
        let mut next = lens.next();
        for (quiesce, count, len) in steps.into_iter().chain(std::iter::repeat_n((false, 256, 4000), 30)) {
            while let Some((seed, len)) = next && guest.arrive(&frame(seed, len)) {
                expected.push_back(frame(seed, len));
                next = lens.next();
            }
            guest.driver.give(count, len);
            guest.run();
            while let Some((mut got, _)) = guest.driver.receive() {
                got[10..12].fill(0);
                // What a ring full of small buffers cannot hold may be missing.
                while expected.front().is_some_and(|next| *next != got && next.len() > 256 * 12) {
                    expected.pop_front();
                }
                prop_assert!(expected.pop_front() == Some(got));
            }
            if quiesce {
                guest.worker.as_mut().unwrap().quiesce();
            }
        }
        prop_assert!(next.is_none());
        prop_assert!(expected.iter().all(|frame| frame.len() > 256 * 12));
    }

    #[test]
    fn garbage_rings_do_no_harm(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(TX_BUFFERS), 0u64..MEMORY_BYTES as u64, any::<u64>()],
                prop_oneof![0u32..5000, any::<u32>()],
                0u16..8,
                0u16..258,
            ),
            256,
        ),
        heads in prop::collection::vec((0usize..3, 0u16..258), 0..100),
        features in prop_oneof![Just(SEGMENTS), Just(MERGEABLE), Just(0)],
    ) {
        let mut guest = Guest::new(features);
        let Driver { rx, tx, control, .. } = &mut guest.driver;
        for (i, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            rx.write_descriptor(i as u16, addr, len, flags, next);
            tx.write_descriptor(i as u16, addr, len, flags, next);
            if i < 16 {
                control.write_descriptor(i as u16, addr, len, flags, next % 18);
            }
        }
        for (queue, head) in heads {
            let Driver { rx, tx, control, .. } = &mut guest.driver;
            let queue = [rx, tx, control].into_iter().nth(queue).unwrap();
            queue.offer(head);
            queue.notify.write(1).unwrap();
            guest.arrive(&frame(1, 3000));
            while guest.left().is_some() {}
            if guest.try_run().is_err() {
                break;
            }
        }
    }
}
