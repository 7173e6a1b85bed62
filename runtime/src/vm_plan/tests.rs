use super::*;
use crate::bundle::Overrides;
use crate::network::LinkId;
use std::fs::File;

const HOST: HostFacts = HostFacts {
    memory_mib: 8192,
    cpus: 4,
};

fn pod(memory_bytes: Option<u64>, cpu_millis: Option<u64>, overrides: Overrides) -> PodSpec {
    PodSpec {
        limits: Limits {
            memory_bytes,
            cpu_millis,
            huge_page_bytes: 0,
        },
        overrides,
        ..PodSpec::default()
    }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

#[test]
fn sizes_by_limits() {
    let none = Overrides::default();
    let some = Overrides {
        vcpus: Some(8),
        memory_mib: Some(300),
        ..none
    };
    for (memory, cpu, overrides, memory_mib, vcpus) in [
        (None, None, none, 512, 1),
        (Some(1), None, none, 98, 1),
        (Some(64 << 20), Some(1500), none, 161, 2),
        (Some(4096 << 20), None, none, 4256, 1),
        (None, Some(100), none, 512, 1),
        (None, Some(64_000), none, 512, 4),
        (Some(64 << 20), Some(1500), some, 300, 8),
    ] {
        let size = size(&pod(memory, cpu, overrides), HOST).unwrap();
        assert_eq!(size, VmSize { memory_mib, vcpus });
    }
}

#[test]
fn leaves_room_for_containers_without_limits() {
    let mut pod = pod(Some(64 << 20), Some(1500), Overrides::default());
    pod.unlimited = Unlimited {
        memory: true,
        cpu: true,
    };
    let VmSize { memory_mib, vcpus } = size(&pod, HOST).unwrap();
    assert_eq!((memory_mib, vcpus), (64 + 512 + 9 + 96, 3));
    // Never more than the node has, and always the limit.
    let small = HostFacts {
        memory_mib: 100,
        cpus: 1,
    };
    let VmSize { memory_mib, vcpus } = size(&pod, small).unwrap();
    assert_eq!((memory_mib, vcpus), (100 + 2 + 96, 1));
}

#[test]
fn gives_pods_room_to_grow() {
    let boot = |memory_mib, vcpus| VmSize { memory_mib, vcpus };
    let mut pod = pod(None, None, Overrides::default());
    let alone = room(&pod, boot(512, 1), HOST);
    assert_eq!((alone.vcpus, alone.pluggable_mib), (4, 0));
    pod.limits_are_a_sum = true;
    for (memory_mib, vcpus, most, pluggable) in
        [(512, 1, 4, 2048), (161, 4, 4, 640), (6000, 8, 8, 8192)]
    {
        let room = room(&pod, boot(memory_mib, vcpus), HOST);
        assert_eq!((room.vcpus, room.pluggable_mib), (most, pluggable));
    }
}

#[test]
fn adds_huge_pages() {
    let mut limited = pod(Some(64 << 20), None, Overrides::default());
    limited.limits.huge_page_bytes = 32 << 20;
    assert_eq!(size(&limited, HOST).unwrap().memory_mib, 96 + 2 + 96);
    let mut open = pod(None, None, Overrides::default());
    open.limits.huge_page_bytes = 32 << 20;
    assert_eq!(size(&open, HOST).unwrap().memory_mib, 512 + 32);
    open.limits.huge_page_bytes = u64::MAX;
    assert!(size(&open, HOST).is_err());
}

#[test]
fn refuses_more_memory_than_the_node_has() {
    let none = Overrides::default();
    assert!(size(&pod(Some(8192 << 20), None, none), HOST).is_ok());
    let error = size(&pod(Some(9000 << 20), None, none), HOST).unwrap_err();
    assert!(error.to_string().contains("8192 MiB"), "{error}");
}

fn nic(number: u8) -> Nic {
    Nic {
        link: LinkId {
            index: 1 + u32::from(number),
            name: format!("eth{number}"),
        },
        tap: null(),
        tap_index: 3,
        mac: MacAddress([2, 0, 0, 0, 0, number]),
        mtu: 1500,
    }
}

fn disk(number: usize) -> Disk {
    Disk {
        serial: format!("disk-{number}"),
        file: null(),
        read_only: true,
    }
}

/// Of a machine that boots.
fn parts(nics: Vec<Nic>, disks: Vec<Disk>) -> VmParts {
    VmParts {
        kvm: null(),
        start: Start::Boot {
            kernel: null(),
            initramfs: null(),
            command_line: String::new(),
        },
        console: null(),
        agent: null(),
        nics,
        file_server: Some(null()),
        disks,
        rates: Rates::default(),
        vfio: false,
    }
}

#[test]
fn a_machine_has_no_more_devices_than_slots() {
    let size = VmSize {
        memory_mib: 128,
        vcpus: 1,
    };
    let room = Room {
        vcpus: 1,
        pluggable_mib: 0,
    };
    let planned = |interfaces: u8, disks: usize| {
        let nics = (0..interfaces).map(nic).collect();
        let disks = (0..disks).map(disk).collect();
        plan(size, room, parts(nics, disks)).map(|_| ())
    };
    planned(20, 4).unwrap();
    let error = planned(20, 5).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the pod has 20 interfaces and 5 disks as its machine begins; both together can be 24"
    );
    assert_eq!(error.code(), Code::INVALID_ARGUMENT);
}

#[test]
fn plans_a_machine_the_vmm_takes() {
    let size = VmSize {
        memory_mib: 128,
        vcpus: 2,
    };
    let room = Room {
        vcpus: 4,
        pluggable_mib: 256,
    };
    let parts = VmParts {
        start: Start::Boot {
            kernel: null(),
            initramfs: null(),
            command_line: command_line(size, room, "a=b", false),
        },
        rates: Rates {
            disk: DeviceRates {
                kib_per_second: Some(u32::MAX),
                ..DeviceRates::default()
            },
            network: DeviceRates {
                operations_per_second: Some(100),
                burst_operations: Some(7),
                burst_kib: Some(1),
                ..DeviceRates::default()
            },
        },
        ..parts(vec![nic(1)], vec![disk(0)])
    };
    let (spec, descriptors) = plan(size, room, parts).unwrap();
    let spec = spec.spec();
    assert_eq!(descriptors.len(), 8);
    assert_eq!(spec.memory.boot_mib, 128);
    assert_eq!(spec.memory.pluggable_mib, 256);
    assert_eq!(spec.vcpus, VcpuSpec { boot: 2, max: 4 });
    let boot = spec.start.boot().unwrap();
    assert!(boot.command_line.contains(" maxcpus=2 "));
    assert!(boot.command_line.ends_with(" a=b"));
    let bucket = |per_second, burst| Some(BucketSpec { per_second, burst });
    let most = u64::from(u32::MAX) << 10;
    assert_eq!(spec.blocks[0].rate.bytes, bucket(most, most));
    assert_eq!(spec.blocks[0].rate.operations, None);
    assert_eq!(spec.nets[0].rate.bytes, None);
    assert_eq!(spec.nets[0].rate.operations, bucket(100, 7));
    assert_eq!(spec.filesystems[0].tag, "husk");
    assert_eq!(spec.vsock.as_ref().unwrap().host_ports[0].port, 1024);
}
