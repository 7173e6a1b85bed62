//! The VMM process: start, requests, end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use husk_node::rates::Rates;
use husk_vmm_spec::{
    DeviceId, DeviceSpec, HostPort, Request, SavedSpec, Timeline, ValidVmSpec, VfioFunctionSpec,
    VfioSpec,
};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::cgroup::CgroupDir;
use crate::child::{AFTER_KILL, Child, Program};
use crate::config::Patience;
use crate::network::Nic;
use crate::process::Process;
use crate::vm_plan::{Descriptors, Disk, nic_id};

mod console;
mod control;
mod end;
mod owner;
mod pinned;

use console::Console;
use control::ControlSocket;
pub use end::{VmEnd, VmError};
use owner::{Call, KILL_PATIENCE, Owner};
use pinned::Pinned;

/// Longest time for the VMM to answer a request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// What it may take longer for each GiB of memory that is pinned: a page of 4 KiB may
/// have to be found and zeroed for each that the guest has not touched.
const PIN_PATIENCE: Duration = Duration::from_secs(2);

/// What a VMM may take longer to end for each GiB of its guest's memory, which the
/// kernel takes back page by page.
const GIVING_BACK: Duration = Duration::from_secs(1);

/// A VMM that has not been told yet what to run.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    /// Where it began.
    cgroup: Option<CgroupDir>,
    control: ControlSocket,
    console: pipe::Receiver,
    console_input: OwnedFd,
}

/// A running machine. Ends when the last of its handles is dropped.
#[derive(Clone, Debug)]
pub struct Vm {
    process: Process,
    /// Longest time for the VMM to answer a request.
    request_limit: Duration,
    /// Of what is plugged later.
    rates: Rates,
    /// All that the guest can come to have.
    memory_mib: u32,
    calls: mpsc::Sender<Call>,
    /// Apart from the calls, which may have to wait.
    kill: Arc<Notify>,
    end: watch::Receiver<Option<VmEnd>>,
    /// Somebody here wants it to end.
    dismissed: Arc<AtomicBool>,
}

impl Vmm {
    /// Starts the program; it confines itself and then waits for the machine's
    /// specification.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(
        path: &PathBuf,
        first_uid: u32,
        cgroup: Option<CgroupDir>,
    ) -> Result<Self, VmError> {
        let io_error = |what| move |source| VmError::Io { what, source };
        let (control, far_control) =
            ControlSocket::pair().map_err(io_error("VMM's control socket"))?;
        let (console, console_input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(io::Error::from)
            .map_err(io_error("console's pipe"))?;
        let console = pipe::Receiver::from_owned_fd(console).map_err(io_error("console's pipe"))?;
        let complaints = console_input
            .try_clone()
            .map_err(io_error("console's pipe"))?;
        let program = Program {
            path,
            first_uid,
            cgroup: cgroup.as_ref(),
            complaints,
        };
        let child = Child::spawn(program, &[], far_control)
            .await
            .map_err(|source| VmError::Spawn {
                path: path.clone(),
                source,
            })?;
        Ok(Self {
            child,
            cgroup,
            control,
            console,
            console_input,
        })
    }

    /// The process on the node.
    pub fn process(&self) -> Process {
        self.child.process()
    }

    /// Where output for the console's log goes in; for the machine's own
    /// console and for helpers that have something to say.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn console_input(&self) -> Result<OwnedFd, VmError> {
        self.console_input
            .try_clone()
            .map_err(|source| VmError::Io {
                what: "console's pipe",
                source,
            })
    }

    /// Ends the program before it was told anything.
    pub async fn end(self, patience: Patience) {
        drop(self.control);
        let after_kill = patience.of(AFTER_KILL);
        self.child.end(KILL_PATIENCE, after_kill).await;
    }

    /// Starts the machine, which may take as long as `limit`; later requests are
    /// waited for with `patience`, and what is plugged then may move as much as
    /// `rates` say.
    ///
    /// # Errors
    /// The VMM could not, or did not answer in time; it has ended then.
    pub async fn start(
        self,
        spec: &ValidVmSpec,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
        patience: Patience,
        rates: Rates,
    ) -> Result<(Vm, Timeline), VmError> {
        let process = self.process();
        let memory = spec.spec().memory;
        let memory_mib = memory.boot_mib.saturating_add(memory.pluggable_mib);
        match self.control.send(spec.spec(), &descriptors).await {
            // It has ended: why is asked below.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            sent => sent.map_err(|source| VmError::Io {
                what: "sending the machine's specification to the VMM",
                source,
            })?,
        }
        drop(descriptors);
        let (calls, call_receiver) = mpsc::channel(16);
        let (started, start) = oneshot::channel();
        let (end_sender, end) = watch::channel(None);
        let request_limit = patience.of(REQUEST_DEADLINE);
        let kill = Arc::new(Notify::new());
        let owner = Owner {
            request_limit,
            after_kill: patience.of(AFTER_KILL + GIVING_BACK * (memory_mib >> 10)),
            kill: Arc::clone(&kill),
            pinned: Pinned::new(process, memory_mib),
            child: self.child,
            cgroup: self.cgroup,
            control: self.control,
            console: Console::new(self.console),
            calls: call_receiver,
            started: Some(started),
            unanswered: VecDeque::new(),
        };
        drop(self.console_input);
        tokio::spawn(owner.run(end_sender));
        let vm = Vm {
            process,
            request_limit,
            rates,
            memory_mib,
            calls,
            kill,
            end,
            dismissed: Arc::default(),
        };
        match timeout(limit, start).await {
            Ok(Ok(timeline)) => Ok((vm, timeline)),
            Ok(Err(_)) => Err(VmError::Ended(vm.ended().await)),
            Err(_) => {
                let VmEnd { console, .. } = vm.kill().await;
                let seconds = limit.as_secs();
                Err(VmError::NotReady { seconds, console })
            }
        }
    }
}

impl Vm {
    /// The VMM on the node.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Lets the guest dial each of these ports once.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn add_host_ports(&self, ports: Vec<(u32, OwnedFd)>) -> Result<(), VmError> {
        if ports.is_empty() {
            return Ok(());
        }
        let mut descriptors = Descriptors::default();
        let numbers = ports.iter().map(|(port, _)| *port).collect();
        let ports = ports
            .into_iter()
            .map(|(port, stream)| HostPort {
                port,
                stream: descriptors.push(stream),
            })
            .collect();
        let added = self.request("open ports", Request::AddHostPorts(ports), descriptors.0);
        let added = added.await;
        if matches!(added, Err(VmError::Deadline { .. })) {
            // It may still do so.
            self.remove_host_ports(numbers).await;
        }
        added
    }

    /// Closes ports that the guest will not dial any more.
    pub async fn remove_host_ports(&self, ports: Vec<u32>) {
        if ports.is_empty() {
            return;
        }
        let removed = self.request("close ports", Request::RemoveHostPorts(ports), Vec::new());
        if let Err(error) = removed.await {
            tracing::debug!("{}", crate::error::chain(&error));
        }
    }

    /// Plugs a disk.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn add_disk(&self, disk: Disk) -> Result<(), VmError> {
        let mut descriptors = Descriptors::default();
        let device = DeviceSpec::Block(descriptors.disk(disk, self.rates));
        self.request("plug a disk", Request::AddDevice(device), descriptors.0)
            .await
    }

    /// Plugs a network interface.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn add_nic(&self, nic: Nic) -> Result<(), VmError> {
        let mut descriptors = Descriptors::default();
        let id = nic_id(nic.mac);
        let device = Request::AddDevice(DeviceSpec::Net(descriptors.nic(nic, self.rates)));
        let added = self.request("plug an interface", device, descriptors.0);
        let added = added.await;
        if matches!(added, Err(VmError::Deadline { .. })) {
            // It may still do so.
            if let Err(error) = self.remove_device(id).await {
                tracing::debug!("{}", crate::error::chain(&error));
            }
        }
        added
    }

    /// Plugs PCI devices of the node: a group with its devices, each into a slot.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn add_vfio(
        &self,
        id: DeviceId,
        container: OwnedFd,
        group: OwnedFd,
        functions: Vec<(OwnedFd, u8)>,
    ) -> Result<(), VmError> {
        let mut descriptors = Descriptors::default();
        let spec = VfioSpec {
            id: id.clone(),
            container: descriptors.push(container),
            group: descriptors.push(group),
            functions: functions
                .into_iter()
                .map(|(device, slot)| VfioFunctionSpec {
                    device: descriptors.push(device),
                    slot,
                })
                .collect(),
        };
        let request = Request::AddVfio(spec);
        let limit = self.pinning_limit();
        let added = self.request_within(limit, "plug a PCI device", request, descriptors.0);
        let added = added.await;
        if matches!(added, Err(VmError::Deadline { .. })) {
            // It may still do so.
            if let Err(error) = self.remove_vfio(id).await {
                tracing::debug!("{}", crate::error::chain(&error));
            }
        }
        added
    }

    /// Takes the devices of an IOMMU group back, of which the agent has let go.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn remove_vfio(&self, id: DeviceId) -> Result<(), VmError> {
        let (limit, request) = (self.pinning_limit(), Request::RemoveDevice(id));
        self.request_within(limit, "unplug a PCI device", request, Vec::new())
            .await
    }

    /// How long pinning all of the guest's memory may take, or letting go of it.
    fn pinning_limit(&self) -> Duration {
        let more = PIN_PATIENCE * (self.memory_mib >> 10);
        self.request_limit.saturating_add(more)
    }

    /// Unplugs a device that the agent has let go of.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn remove_device(&self, id: DeviceId) -> Result<(), VmError> {
        self.request("unplug a device", Request::RemoveDevice(id), Vec::new())
            .await
    }

    /// Tells the guest how much of its pluggable memory to have, MiB.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn plug_memory(&self, mib: u32) -> Result<(), VmError> {
        self.request("plug memory", Request::PlugMemory(mib), Vec::new())
            .await
    }

    /// Pauses the machine and writes it into two files.
    ///
    /// # Errors
    /// The VMM could not.
    pub async fn save(&self, origin: &str, state: OwnedFd, memory: OwnedFd) -> Result<(), VmError> {
        self.request("pause the machine", Request::Pause, Vec::new())
            .await?;
        let mut descriptors = Descriptors::default();
        let saved = SavedSpec {
            state: descriptors.push(state),
            memory: descriptors.push(memory),
            origin: origin.to_owned(),
        };
        self.request("save the machine", Request::Save(saved), descriptors.0)
            .await
    }

    /// Ends the machine and waits until its process is gone, or does not go.
    pub async fn kill(&self) -> VmEnd {
        self.dismiss();
        self.kill.notify_one();
        self.ended().await
    }

    /// Notes that the machine is to end, so that nobody wonders.
    pub fn dismiss(&self) {
        self.dismissed.store(true, Ordering::Relaxed);
    }

    /// The machine is to end.
    pub fn is_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) -> VmEnd {
        let mut end = self.end.clone();
        let unknown = || VmEnd {
            reason: None,
            console: String::new(),
        };
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(unknown),
            Err(_) => unknown(),
        }
    }

    async fn request(
        &self,
        what: &'static str,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        self.request_within(self.request_limit, what, request, descriptors)
            .await
    }

    async fn request_within(
        &self,
        limit: Duration,
        what: &'static str,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        let (reply, answer) = oneshot::channel();
        let call = Call {
            request,
            descriptors,
            reply,
        };
        let asked = async {
            // When nobody takes it, nobody answers either.
            let _ = self.calls.send(call).await;
            answer.await
        };
        match timeout(limit, asked).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err(source))) => Err(VmError::Refused { what, source }),
            Ok(Err(_)) => Err(VmError::Ended(self.ended().await)),
            Err(_) => Err(VmError::Deadline {
                what,
                seconds: limit.as_secs(),
            }),
        }
    }
}

#[cfg(test)]
impl Vm {
    /// One that is asked, answers as `answer` says, and is nothing else.
    pub fn pretended(
        answer: impl Fn(&Request) -> Result<(), String> + Send + 'static,
    ) -> (Self, mpsc::UnboundedReceiver<Request>) {
        let (calls, mut taken) = mpsc::channel::<Call>(16);
        let (asked, requests) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(call) = taken.recv().await {
                let answer = answer(&call.request);
                let answer = answer.map(|()| husk_vmm_spec::Reply::Done);
                let _ = asked.send(call.request);
                let _ = call
                    .reply
                    .send(answer.map_err(|message| husk_vmm_spec::Failure { message }));
            }
        });
        let (_, end) = watch::channel(None);
        let vm = Self {
            process: Process {
                pid: 0,
                start_ticks: 0,
            },
            request_limit: REQUEST_DEADLINE,
            rates: Rates::default(),
            memory_mib: 64,
            calls,
            kill: Arc::default(),
            end,
            dismissed: Arc::default(),
        };
        (vm, requests)
    }
}
