//! How a running machine follows the limits of the pod's containers, which come,
//! change and go. It never gets smaller than it was made.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::agent_client::Agent;
use crate::bundle::{Limits, PodSpec, Unlimited};
use crate::vm_plan::{self, HostFacts, Room, VmSize};
use crate::vm_process::Vm;

/// The default period of CPU quotas, microseconds.
const CPU_PERIOD: u64 = 100_000;

/// What a machine has beyond what it began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Processors, those of the beginning too.
    pub vcpus: u8,
    /// Memory, those of the beginning not counted, MiB.
    pub plugged_mib: u32,
}

/// What a machine may become.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    boot: VmSize,
    /// What its pod has at least.
    least: Target,
    room: Room,
    host: HostFacts,
    /// The pod's cgroup leaves it so, too.
    unlimited: Unlimited,
}

impl Growth {
    /// For the machine of `pod`, which began as `boot` and is to be at least
    /// `size`.
    pub fn new(pod: &PodSpec, boot: VmSize, size: VmSize, room: Room, host: HostFacts) -> Self {
        Self {
            boot,
            least: Target {
                vcpus: size.vcpus,
                plugged_mib: size.memory_mib.saturating_sub(boot.memory_mib),
            },
            room,
            host,
            unlimited: pod.unlimited,
        }
    }

    /// As it began.
    pub fn start(&self) -> Target {
        Target {
            vcpus: self.boot.vcpus,
            plugged_mib: 0,
        }
    }

    /// What containers with these limits need, as far as there is room for it.
    pub fn target(&self, containers: &[Limits]) -> Target {
        let any = |none: fn(&Limits) -> bool| containers.iter().any(none);
        let limits = sum(containers);
        let huge = limits.huge_page_bytes > 0;
        if limits.memory_bytes.is_none() && limits.cpu_millis.is_none() && !huge {
            return self.least;
        }
        let unlimited = Unlimited {
            memory: self.unlimited.memory && any(|one| one.memory_bytes.is_none()),
            cpu: self.unlimited.cpu && any(|one| one.cpu_millis.is_none()),
        };
        // More than the node has is as much as there is room for.
        let needed = vm_plan::needed(limits, unlimited, self.host).unwrap_or(VmSize {
            memory_mib: u32::MAX,
            vcpus: u8::MAX,
        });
        let memory_mib = match limits.memory_bytes {
            None if !huge => 0,
            _ => needed.memory_mib,
        };
        let beyond = memory_mib.saturating_sub(self.boot.memory_mib);
        Target {
            vcpus: needed.vcpus.min(self.room.vcpus).max(self.least.vcpus),
            plugged_mib: beyond
                .min(self.room.pluggable_mib)
                .max(self.least.plugged_mib),
        }
    }
}

/// Limits after containerd has sent new `resources` (OCI `linux.resources`): what
/// those do not mention stays. The agent says what is wrong with them.
fn updated(limits: Limits, resources: &[u8]) -> Limits {
    let resources: Value = serde_json::from_slice(resources).unwrap_or_default();
    let memory = resources["memory"]["limit"].as_i64();
    let quota = resources["cpu"]["quota"].as_i64();
    let period = resources["cpu"]["period"].as_u64().unwrap_or(CPU_PERIOD);
    let Ok(new) = Limits::new(memory, quota, Some(period)) else {
        return limits;
    };
    let mentioned = |number: Option<i64>| number.is_some_and(|number| number != 0);
    Limits {
        memory_bytes: if mentioned(memory) {
            new.memory_bytes
        } else {
            limits.memory_bytes
        },
        cpu_millis: if mentioned(quota) {
            new.cpu_millis
        } else {
            limits.cpu_millis
        },
        ..limits
    }
}

/// The limits of a container, which are changed one update after another or
/// several at once.
#[derive(Debug, Default)]
pub struct AgreedLimits {
    limits: Limits,
    /// What the guest has been sent and not answered.
    asked: Vec<Arc<[u8]>>,
}

impl From<Limits> for AgreedLimits {
    fn from(limits: Limits) -> Self {
        Self {
            limits,
            asked: Vec::new(),
        }
    }
}

impl AgreedLimits {
    /// Notes that the guest is sent new resources.
    pub fn ask(&mut self, resources: Vec<u8>) -> Arc<[u8]> {
        let resources = Arc::from(resources);
        self.asked.push(Arc::clone(&resources));
        resources
    }

    /// Notes its answer.
    pub fn answered(&mut self, resources: &Arc<[u8]>, is_done: bool) {
        self.asked.retain(|asked| !Arc::ptr_eq(asked, resources));
        if is_done {
            self.limits = updated(self.limits, resources);
        }
    }

    /// All that may hold now.
    pub fn largest(&self) -> Limits {
        let asked = self.asked.iter();
        let asked = asked.map(|resources| updated(self.limits, resources));
        asked.fold(self.limits, larger)
    }
}

/// What two sets of limits allow together.
fn larger(one: Limits, other: Limits) -> Limits {
    // None is no limit.
    let max = |one: Option<u64>, other: Option<u64>| Some(one?.max(other?));
    Limits {
        memory_bytes: max(one.memory_bytes, other.memory_bytes),
        cpu_millis: max(one.cpu_millis, other.cpu_millis),
        huge_page_bytes: one.huge_page_bytes.max(other.huge_page_bytes),
    }
}

/// The sum over the containers that have limits.
fn sum(containers: &[Limits]) -> Limits {
    let add = |sum: Option<u64>, one: Option<u64>| match (sum, one) {
        (Some(sum), Some(one)) => Some(sum.saturating_add(one)),
        (sum, one) => sum.or(one),
    };
    containers
        .iter()
        .fold(Limits::default(), |sum, one| Limits {
            memory_bytes: add(sum.memory_bytes, one.memory_bytes),
            cpu_millis: add(sum.cpu_millis, one.cpu_millis),
            huge_page_bytes: sum.huge_page_bytes.saturating_add(one.huge_page_bytes),
        })
}

/// Makes a running machine what it should be.
#[derive(Clone, Debug)]
pub struct Fitter {
    growth: Growth,
    /// What was asked for last.
    wanted: Arc<Mutex<Target>>,
    /// What the machine is; whoever holds it is changing that.
    is: Arc<tokio::sync::Mutex<Target>>,
}

impl Fitter {
    /// For a machine that has just begun.
    pub fn new(growth: Growth) -> Self {
        Self {
            growth,
            wanted: Arc::new(Mutex::new(growth.least)),
            is: Arc::new(tokio::sync::Mutex::new(growth.start())),
        }
    }

    /// Notes that these are the limits of the pod's containers.
    pub fn want(&self, containers: &[Limits]) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) =
            self.growth.target(containers);
    }

    /// Makes the machine what was asked for last. That it cannot be is no reason
    /// to do without the container: it has less than it could use.
    pub async fn fit(&self, vm: &Vm, agent: &Agent) {
        let mut is = self.is.lock().await;
        let wanted = *self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.plugged_mib != is.plugged_mib {
            match vm.plug_memory(wanted.plugged_mib).await {
                Ok(()) => is.plugged_mib = wanted.plugged_mib,
                Err(error) => {
                    tracing::warn!("memory: {}", crate::error::chain(&error));
                }
            }
        }
        if wanted.vcpus != is.vcpus {
            match agent.set_vcpus(wanted.vcpus).await {
                Ok(()) => is.vcpus = wanted.vcpus,
                Err(error) => tracing::warn!(%error, "vCPUs"),
            }
        }
        tracing::debug!(?wanted, "machine's size");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(memory_mib: Option<u64>, cpu_millis: Option<u64>) -> Limits {
        Limits {
            memory_bytes: memory_mib.map(|mib| mib * MIB),
            cpu_millis,
            huge_page_bytes: 0,
        }
    }

    fn growth() -> Growth {
        let boot = VmSize {
            memory_mib: 512,
            vcpus: 1,
        };
        let host = HostFacts {
            memory_mib: 8192,
            cpus: 8,
        };
        let room = Room {
            vcpus: 4,
            pluggable_mib: 2048,
        };
        let pod = PodSpec {
            unlimited: Unlimited {
                memory: true,
                cpu: true,
            },
            ..PodSpec::default()
        };
        Growth::new(&pod, boot, boot, room, host)
    }

    #[test]
    fn a_machine_is_never_smaller_than_it_began() {
        let none = limits(None, None);
        for containers in [&[][..], &[none, none], &[limits(Some(64), Some(100))]] {
            assert_eq!(growth().target(containers), growth().start());
        }
    }

    #[test]
    fn a_machine_follows_the_sum_of_the_limits() {
        let one = limits(Some(512), Some(1500));
        // What kernel and agent need is on top: 96 MiB and a 64th.
        let target = growth().target(&[one]);
        assert_eq!((target.vcpus, target.plugged_mib), (2, 96 + 8));
        let target = growth().target(&[one, one]);
        assert_eq!((target.vcpus, target.plugged_mib), (3, 512 + 96 + 16));
        // One without limits gets what one alone would get.
        let target = growth().target(&[one, limits(None, None)]);
        assert_eq!((target.vcpus, target.plugged_mib), (3, 512 + 96 + 16));
    }

    #[test]
    fn a_machine_from_a_template_is_what_its_pod_needs() {
        let mut growth = growth();
        growth.boot.memory_mib = 128;
        growth.least = Target {
            vcpus: 2,
            plugged_mib: 384,
        };
        assert_eq!(growth.target(&[limits(None, None)]), growth.least);
        let small = limits(Some(1), Some(100));
        assert_eq!(
            growth.target(&[small, limits(None, None)]).plugged_mib,
            1 + 512 + 9 + 96 - 128
        );
        growth.unlimited = Unlimited::default();
        assert_eq!(growth.target(&[small]), growth.least);
        let one = limits(Some(1024), Some(2500));
        let target = growth.target(&[one]);
        assert_eq!(
            (target.vcpus, target.plugged_mib),
            (3, 1024 + 16 + 96 - 128)
        );
    }

    #[test]
    fn huge_pages_come_on_top() {
        let mut huge = limits(None, None);
        huge.huge_page_bytes = 64 * MIB;
        assert_eq!(growth().target(&[huge]).plugged_mib, 64);
    }

    #[test]
    fn a_pod_with_limits_has_no_room_for_more() {
        let mut growth = growth();
        growth.unlimited = Unlimited::default();
        let containers = [limits(Some(500), Some(2000)), limits(None, None)];
        let target = growth.target(&containers);
        assert_eq!((target.vcpus, target.plugged_mib), (2, 500 + 96 + 8 - 512));
    }

    #[test]
    fn an_update_changes_what_it_mentions() {
        let before = limits(Some(64), Some(500));
        let after = |text: &str| {
            let limits = updated(before, text.as_bytes());
            (
                limits.memory_bytes.map(|bytes| bytes / MIB),
                limits.cpu_millis,
            )
        };
        assert_eq!(after("{}"), (Some(64), Some(500)));
        assert_eq!(after("nonsense"), (Some(64), Some(500)));
        assert_eq!(
            after(r#"{"memory": {"limit": 134217728}}"#),
            (Some(128), Some(500))
        );
        assert_eq!(
            after(r#"{"memory": {"limit": -1}, "cpu": {"quota": 250000}}"#),
            (None, Some(2500))
        );
        assert_eq!(after(r#"{"cpu": {"quota": -1}}"#), (Some(64), None));
        let other = limits(Some(32), None);
        assert_eq!(larger(before, other), limits(Some(64), None));
    }

    #[test]
    fn updates_at_once_leave_what_the_guest_agreed_to() {
        let mut agreed = AgreedLimits::from(limits(Some(64), Some(500)));
        let lower = agreed.ask(br#"{"memory": {"limit": 33554432}}"#.to_vec());
        let quicker = agreed.ask(br#"{"cpu": {"quota": 100000}}"#.to_vec());
        assert_eq!(agreed.largest(), limits(Some(64), Some(1000)));
        agreed.answered(&lower, true);
        assert_eq!(agreed.largest(), limits(Some(32), Some(1000)));
        agreed.answered(&quicker, false);
        assert_eq!(agreed.largest(), limits(Some(32), Some(500)));
    }

    #[test]
    fn there_is_no_more_than_there_is_room_for() {
        for memory_mib in [4096, 1 << 30] {
            let target = growth().target(&[limits(Some(memory_mib), Some(64_000))]);
            assert_eq!((target.vcpus, target.plugged_mib), (4, 2048));
        }
    }
}
