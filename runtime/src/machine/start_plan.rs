//! How a pod's machine begins: it boots, or goes on from a template.

use std::fs::File;
use std::io::Read;

use husk_vmm_spec::ExitReason;

use super::MachineRequest;
use crate::agent_client::AgentError;
use crate::cgroup::LimitHits;
use crate::debug_shell;
use crate::error::Error;
use crate::guest_image;
use crate::template::TemplateKey;
use crate::vm_plan::{self, HostFacts, Room, Start, VmSize};
use crate::vm_process::{VmEnd, VmError};

/// What the guest's kernel gets of the host's to tell it from its template.
const ENTROPY_BYTES: usize = 64;

/// How a machine is to begin.
#[derive(Debug)]
pub struct StartPlan {
    /// What it begins with.
    pub size: VmSize,
    /// What it may grow to.
    pub room: Room,
    /// From what.
    pub start: Start,
    /// What a copy gets to tell it from its template; nothing where it boots.
    pub entropy: Vec<u8>,
    /// The template as whose copy it begins.
    pub template: Option<TemplateKey>,
    /// The one that would have been better, if it were there.
    pub lacking: Option<TemplateKey>,
    /// Before it began.
    pub hits: LimitHits,
}

impl StartPlan {
    /// From a template where there is one that fits the pod: the largest.
    ///
    /// # Errors
    /// A file that it boots from is not there, or is another than it should be.
    pub async fn new(
        request: &MachineRequest,
        size: VmSize,
        host: HostFacts,
    ) -> Result<Self, Error> {
        let (config, pod) = (&request.config, &request.pod);
        let room = vm_plan::room(pod, size, host);
        let mut lacking = None;
        // One that is to tell more is told so as it boots.
        let keys = match request.debug {
            true => Vec::new(),
            false => TemplateKey::all_of_node(config, host),
        };
        for key in keys {
            let Some(shape) = key.shape(pod, size, room) else {
                continue;
            };
            let Some(files) = key.open() else {
                lacking = lacking.or(Some(key));
                continue;
            };
            return Ok(Self {
                size: shape.size,
                room: shape.room,
                start: Start::Restore {
                    template: files,
                    origin: key.origin().to_owned(),
                },
                entropy: entropy()?,
                template: Some(key),
                lacking,
                hits: LimitHits::so_far(request.cgroup.as_ref()),
            });
        }
        let extra = debug_shell::kernel_parameters(config);
        Ok(Self {
            size,
            room,
            start: Start::Boot {
                kernel: guest_image::open("guest kernel", &config.kernel, config).await?,
                initramfs: debug_shell::initramfs(config).await?,
                command_line: vm_plan::command_line(size, room, &extra, request.debug),
            },
            entropy: Vec::new(),
            template: None,
            lacking,
            hits: LimitHits::so_far(request.cgroup.as_ref()),
        })
    }
}

fn entropy() -> Result<Vec<u8>, VmError> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut entropy))
        .map_err(|source| VmError::Io {
            what: "/dev/urandom",
            source,
        })?;
    Ok(entropy)
}

/// A template whose copy did not start may be damaged: the next pod boots, and
/// has another made. Where the pod itself may be the reason, the next copy tells; where
/// its limits were in the way since `hits`, nothing is known.
pub fn blame(template: Option<&TemplateKey>, error: &Error, hits: &LimitHits) {
    let Some(template) = template else { return };
    match error {
        _ if hits.have_grown() => {
            tracing::info!("the pod's limits were in the way of its machine's start");
        }
        // An agent that says no does so to what the pod asks for, mostly, as does a
        // VMM, to which the pod's disks and interfaces come with the template; one that
        // ends without a word was killed; and a pod that may use little of a processor,
        // or has little time, is late however good its template is.
        Error::Agent(AgentError::Refused { .. } | AgentError::TooLarge { .. })
        | Error::Vm(
            VmError::NotReady { .. }
            | VmError::Ended(VmEnd {
                reason: None | Some(ExitReason::Failed(_)),
                ..
            }),
        ) => template.doubt(),
        _ => template.discard(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::sums;
    use husk_vmm_spec::Failure;
    use std::fs;

    use crate::config::Config;

    #[test]
    fn what_a_pod_asked_for_is_no_proof_against_its_template() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        file(sums::FILE);
        let config = Config {
            vmm: file("vmm"),
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            template_dir: dir.path().join("templates"),
            template_max_age_seconds: 60,
            ..Config::default()
        };
        let host = HostFacts {
            memory_mib: 8192,
            cpus: 8,
        };
        let key = TemplateKey::all_of_node(&config, host).remove(0);
        let made = config.template_dir.join(key.name());
        let cgroup = dir.path().join("cgroup");
        fs::create_dir(&cgroup).unwrap();
        let is_kept = |error: VmError, events: &str| {
            fs::create_dir_all(&made).unwrap();
            let hits = LimitHits::of(Some(cgroup.clone()));
            fs::write(cgroup.join("memory.events"), events).unwrap();
            blame(Some(&key), &error.into(), &hits);
            made.exists()
        };
        let is_kept_after = |reason: Option<ExitReason>, events: &str| {
            let end = VmEnd {
                reason,
                console: String::new(),
            };
            is_kept(VmError::Ended(end), events)
        };
        let is_kept_by_a_late_one = || {
            let late = VmError::NotReady {
                seconds: 30,
                console: String::new(),
            };
            is_kept(late, "")
        };
        assert!(is_kept_by_a_late_one());
        key.proved();
        assert!(is_kept_by_a_late_one());
        assert!(!is_kept_by_a_late_one());
        let message = "all 32 slots of the PCI bus are taken".to_owned();
        let failed = Some(ExitReason::Failed(Failure { message }));
        assert!(is_kept_after(failed, ""));
        key.proved();
        // However often its pods have too little.
        for kill in 1..4 {
            assert!(is_kept_after(None, &format!("oom_kill {kill}\n")));
        }
        assert!(is_kept_after(None, "oom_kill 3\n"));
        // Twice running is no accident.
        assert!(!is_kept_after(None, "oom_kill 3\n"));
        assert!(!is_kept_after(Some(ExitReason::Panic), "oom_kill 3\n"));
    }
}
