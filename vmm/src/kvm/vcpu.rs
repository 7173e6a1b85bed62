//! Processors: one thread each.
//!
//! ```text
//!            resume()              stop()
//!   paused <──────────> running ───────────> stopped
//!      │     pause()                            ^
//!      └────────────────────────────────────────┘
//! ```
//!
//! A thread looks at the phase before each `KVM_RUN`. A change of phase is
//! followed by a signal whose handler sets `immediate_exit` in the thread's own
//! `kvm_run` page, so that the change is seen whether the signal comes before,
//! in or after the call.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use husk_vmm_spec::{ExitReason, Failure, VCPU_MAX};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::gate::{Gate, Phase};
use super::vcpu_state::{self, VcpuState};
use super::vm::{KvmError, Vm, failed};
use crate::address_space::AddressSpace;
use crate::arch::x86_64::cpuid::{self, Supported, Topology};
use crate::arch::x86_64::{msr, regs};
use crate::bounded::at_most;
use crate::console::ConsoleOutput;
use crate::exit::{ExitLatch, describe};
use crate::seccomp::{Confinement, Role};

/// A processor thread that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A guest was saved where something is not as it is here.
    #[error("the guest was saved with another {0}")]
    Unlike(&'static str),
    /// More CPUID leaves or registers than KVM takes.
    #[error("too many CPUID leaves or registers")]
    TooMany,
    /// The kicking signal's handler could not be installed.
    #[error("install the handler of the kicking signal")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// The thread could not be made.
    #[error("start the thread of vCPU {index}")]
    Thread {
        /// Which.
        index: u8,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A processor that has its registers, not yet its thread.
struct Vcpu {
    index: u8,
    fd: VcpuFd,
}

/// All processors of a machine, without their threads.
pub struct Vcpus {
    all: Vec<Vcpu>,
    leaves: Vec<kvm_cpuid_entry2>,
}

/// How processors begin.
#[derive(Clone, Copy)]
pub enum Begin<'a> {
    /// The first one starts here, the others wait for its start-up message.
    Entry(u64),
    /// They go on as those that were saved.
    Saved(&'a ProcessorsState),
}

/// What of all processors is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProcessorsState {
    /// What the first one tells of itself: those of the machine that goes on must
    /// tell the same.
    #[serde(deserialize_with = "at_most::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    leaves: Vec<kvm_cpuid_entry2>,
    /// In order.
    #[serde(deserialize_with = "at_most::<{ VCPU_MAX as usize }, _, _>")]
    vcpus: Vec<VcpuState>,
}

/// Makes all processors.
///
/// # Errors
/// KVM refuses, or those that were saved are not like this host's.
pub fn create_all(vm: &Vm, count: u8, begin: Begin<'_>) -> Result<Vcpus, VcpuError> {
    let cpuid = vm.supported_cpuid()?;
    let supported = Supported {
        cpuid: &cpuid,
        tsc_deadline: vm.has_tsc_deadline(),
    };
    let topology = Topology { cores: count };
    let msrs = msr::boot_msrs().map_err(|_| VcpuError::TooMany)?;
    let first = cpuid::for_vcpu(supported, topology, 0).map_err(|_| VcpuError::TooMany)?;
    if let Begin::Saved(saved) = begin {
        saved.check(count, first.as_slice())?;
    }
    let mut all = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let fd = vm.create_vcpu(index)?;
        let leaves = cpuid::for_vcpu(supported, topology, index).map_err(|_| VcpuError::TooMany)?;
        fd.set_cpuid2(&leaves).map_err(failed("KVM_SET_CPUID2"))?;
        all.push(Vcpu { index, fd });
    }
    for vcpu in &all {
        match begin {
            Begin::Entry(entry) => vcpu.begin(&msrs, entry)?,
            Begin::Saved(saved) => vcpu.go_on(saved)?,
        }
    }
    Ok(Vcpus {
        all,
        leaves: first.as_slice().to_vec(),
    })
}

impl Vcpu {
    /// As firmware would leave it.
    fn begin(&self, msrs: &Msrs, entry: u64) -> Result<(), KvmError> {
        let fd = &self.fd;
        let set = fd.set_msrs(msrs).map_err(failed("KVM_SET_MSRS"))?;
        if set != msrs.as_slice().len() {
            return Err(failed("KVM_SET_MSRS")(kvm_ioctls::Error::new(libc::EINVAL)));
        }
        if self.index == 0 {
            let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
            fd.set_sregs(&regs::special(sregs))
                .map_err(failed("KVM_SET_SREGS"))?;
            fd.set_fpu(&regs::fpu()).map_err(failed("KVM_SET_FPU"))?;
            fd.set_regs(&regs::general(entry))
                .map_err(failed("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// As it was saved.
    fn go_on(&self, saved: &ProcessorsState) -> Result<(), VcpuError> {
        let state = saved.vcpus.get(usize::from(self.index));
        let state = state.ok_or(VcpuError::Unlike("number of processors"))?;
        if self.fd.get_tsc_khz().unwrap_or(0) != state.tsc_khz {
            return Err(VcpuError::Unlike("speed of the time stamp counter"));
        }
        Ok(vcpu_state::restore(&self.fd, state)?)
    }
}

impl ProcessorsState {
    fn check(&self, count: u8, leaves: &[kvm_cpuid_entry2]) -> Result<(), VcpuError> {
        if self.vcpus.len() != usize::from(count) {
            return Err(VcpuError::Unlike("number of processors"));
        }
        if self.leaves != leaves {
            return Err(VcpuError::Unlike("processor (CPUID)"));
        }
        Ok(())
    }
}

/// All processor threads of a machine. They begin paused.
pub struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    exits: Arc<AtomicU64>,
    leaves: Vec<kvm_cpuid_entry2>,
}

impl VcpuThreads {
    /// Starts a thread for each of `vcpus`; each is confined first.
    ///
    /// # Errors
    /// The host refuses a thread.
    pub fn start(
        vcpus: Vcpus,
        space: &Arc<AddressSpace>,
        exit: &Arc<ExitLatch>,
        console: &Arc<ConsoleOutput>,
        confinement: Confinement,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), leave_guest).map_err(VcpuError::Signal)?;
        let mut this = Self {
            threads: Vec::with_capacity(vcpus.all.len()),
            gate: Arc::new(Gate::new()),
            exits: Arc::new(AtomicU64::new(0)),
            leaves: vcpus.leaves,
        };
        for vcpu in vcpus.all {
            let index = vcpu.index;
            let runner = Runner {
                index,
                fd: vcpu.fd,
                space: Arc::clone(space),
                exit: Arc::clone(exit),
                console: Arc::clone(console),
                gate: Arc::clone(&this.gate),
                exits: Arc::clone(&this.exits),
                undelivered: 0,
                retried: 0,
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || match confinement.enter(Role::Vcpu) {
                    Ok(()) => runner.run(),
                    Err(error) => runner.fail(describe(&error)),
                })
                .map_err(|source| VcpuError::Thread { index, source })?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Waits until every thread is out of the guest and stays there.
    pub fn wait_paused(&self) {
        self.gate.wait_parked(self.threads.len());
    }

    /// Takes every processor out of the guest.
    pub fn pause(&self) {
        self.gate.set_phase(Phase::Paused);
        self.kick();
        self.wait_paused();
    }

    /// The state of all processors, which are paused: none has ended. `msrs` are
    /// the model-specific registers that KVM lists.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self, msrs: &[u32]) -> Result<ProcessorsState, KvmError> {
        let msrs = vcpu_state::msrs_to_save(msrs);
        Ok(ProcessorsState {
            leaves: self.leaves.clone(),
            vcpus: self.gate.save(self.threads.len(), &msrs)?,
        })
    }

    /// Lets the processors enter the guest.
    pub fn resume(&self) {
        self.gate.set_phase(Phase::Running);
    }

    /// Ends every thread.
    pub fn stop(&mut self) {
        self.gate.set_phase(Phase::Stopped);
        self.kick();
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended, too.
            let _ = thread.join();
        }
    }

    /// Exits from `KVM_RUN` so far.
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    fn kick(&self) {
        for thread in &self.threads {
            // Fails for a thread that has ended, which needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

thread_local! {
    /// The `kvm_run` page of this thread's processor while it is being run.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    RUN_PAGE.with(|page| {
        let page = page.get();
        if !page.is_null() {
            // SAFETY: the thread that runs this handler owns the page and clears
            // the cell before it is unmapped.
            unsafe { (&raw mut (*page).immediate_exit).write_volatile(1) };
        }
    });
}

/// Makes the run page known to the signal handler for as long as it lives.
struct RunPage;

impl RunPage {
    fn of(fd: &mut VcpuFd) -> Self {
        RUN_PAGE.set(ptr::from_mut(fd.get_kvm_run()));
        Self
    }

    fn clear_immediate_exit() {
        RUN_PAGE.with(|page| {
            // SAFETY: set by `of`, whose descriptor outlives `self`; other
            // accesses are those of the handler on this same thread.
            unsafe { (&raw mut (*page.get()).immediate_exit).write_volatile(0) };
        });
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}

/// How an entry into the guest went.
enum Entered {
    /// The guest wanted something, and has it.
    Handled,
    /// A signal came, or the processor waits for its start-up message.
    Interrupted,
    /// The machine ends.
    Ended(ExitReason),
}

/// How often in a row a processor may fail to deliver an event. The guest is as it
/// was then and enters again. KVM says so of accesses to devices as well while
/// what it was told of the last event is still there: it looks at the event's type
/// (`EXITINTINFO`), and some hosts leave that when the event is gone. A guest whose
/// descriptor table is a device fails for ever.
const REDELIVERIES: u32 = 8;

/// How often in a row KVM may have the first processor try again. It tells others so
/// whenever something has woken them before their start-up message; the first waits
/// for none, and is told so where KVM's own thread for the machine (that splits large
/// pages) cannot be had, each time anew.
const RETRIES: u32 = 8;

/// What a processor thread owns.
struct Runner {
    index: u8,
    fd: VcpuFd,
    space: Arc<AddressSpace>,
    exit: Arc<ExitLatch>,
    console: Arc<ConsoleOutput>,
    gate: Arc<Gate>,
    exits: Arc<AtomicU64>,
    /// How often in a row KVM could not deliver an event.
    undelivered: u32,
    /// How often in a row KVM had the first processor try again.
    retried: u32,
}

impl Runner {
    fn run(mut self) {
        let _page = RunPage::of(&mut self.fd);
        let mut was_paused = false;
        loop {
            RunPage::clear_immediate_exit();
            let phase = self.gate.phase();
            let entered = match phase {
                Phase::Running => {
                    if was_paused {
                        // So that the guest's watchdogs forgive the pause; fails
                        // when the guest has no kvm-clock.
                        let _ = self.fd.kvmclock_ctrl();
                        was_paused = false;
                    }
                    self.enter()
                }
                Phase::Paused => self.settle(),
                Phase::Stopped => break,
            };
            if let Entered::Ended(reason) = entered {
                self.exit.set(reason);
                break;
            }
            if phase == Phase::Paused {
                let fd = &self.fd;
                self.gate
                    .park(self.index, |msrs| vcpu_state::capture(fd, msrs));
                was_paused = true;
            }
        }
        self.gate.leave();
    }

    /// Has KVM finish the access that the last exit was for: until then, its
    /// result is not in the processor's registers.
    fn settle(&mut self) -> Entered {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.enter() {
                // The access had several parts.
                Entered::Handled => {}
                entered => return entered,
            }
        }
    }

    fn fail(self, failure: Failure) {
        self.exit.set(ExitReason::Failed(failure));
        self.gate.leave();
    }

    /// Runs the guest until its next exit and handles that.
    fn enter(&mut self) -> Entered {
        let result = self.fd.run();
        self.exits.fetch_add(1, Ordering::Relaxed);
        if !matches!(result, Ok(VcpuExit::InternalError)) {
            self.undelivered = 0;
        }
        match &result {
            Err(error) if error.errno() == libc::EAGAIN => {
                self.retried += u32::from(self.index == 0);
            }
            _ => self.retried = 0,
        }
        let may_try_again = self.retried <= RETRIES;
        match result {
            Ok(VcpuExit::IoIn(port, data)) => {
                self.space.read_port(port, data);
                Entered::Handled
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.space.write_port(port, data);
                Entered::Handled
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.space.read(address, data);
                Entered::Handled
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.space.write(address, data);
                Entered::Handled
            }
            // No pins, so no level to end; KVM exits for routed ones all the same.
            Ok(VcpuExit::Intr | VcpuExit::IoapicEoi(_)) => Entered::Handled,
            // A triple fault: how a guest resets when all else failed.
            Ok(VcpuExit::Shutdown) => {
                self.tell_where("triple fault");
                Entered::Ended(ExitReason::Reset)
            }
            Ok(VcpuExit::FailEntry(reason, _)) => Entered::Ended(failure(format!(
                "the processor refused to enter the guest: {reason:#x}"
            ))),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => Entered::Ended(failure(format!(
                "unexpected exit from the guest: {other:?}"
            ))),
            Err(error) if error.errno() == libc::EINTR => Entered::Interrupted,
            // Processors that wait for their start-up message.
            Err(error) if error.errno() == libc::EAGAIN && may_try_again => Entered::Interrupted,
            Err(error) => Entered::Ended(failure(format!("KVM_RUN: {}", io::Error::from(error)))),
        }
    }

    /// Leaves on the console what a crashed guest could not say itself.
    fn tell_where(&self, what: &str) {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return;
        };
        let line = format!(
            "husk-vmm: {what} at rip {:#x}, rsp {:#x}, cr2 {:#x}, cr3 {:#x}\n",
            regs.rip, regs.rsp, sregs.cr2, sregs.cr3
        );
        self.console.put(line.as_bytes());
    }

    /// KVM could not emulate an instruction, or the like.
    fn internal_error(&mut self) -> Entered {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that KVM filled this member of the union.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        if suberror == KVM_INTERNAL_ERROR_DELIVERY_EV && self.undelivered < REDELIVERIES {
            self.undelivered += 1;
            return Entered::Handled;
        }
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Entered::Ended(failure(format!(
            "KVM gave up: KVM_EXIT_INTERNAL_ERROR, suberror {suberror}, rip {rip:#x}"
        )))
    }
}

fn failure(message: String) -> ExitReason {
    ExitReason::Failed(Failure { message })
}
