//! KVM and the processor.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::{Finding, Node};

const DEVICE: &str = "/dev/kvm";

/// `KVMIO` of linux/kvm.h.
const KVMIO: u8 = 0xae;

/// `KVM_API_VERSION`; it has not changed since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What the VMM cannot do without and old or foreign KVMs lack: `KVM_CAP_…`.
const NEEDED: [(usize, &str); 4] = [
    (32, "KVM_CAP_IRQFD"),
    (77, "KVM_CAP_SIGNAL_MSI"),
    (121, "KVM_CAP_SPLIT_IRQCHIP"),
    (136, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A request of KVM whose argument is a number and whose answer is one.
struct Request {
    number: u8,
    argument: usize,
}

// SAFETY: the requests made with it (KVM_GET_API_VERSION, KVM_CREATE_VM and
// KVM_CHECK_EXTENSION of linux/kvm.h) take a number and touch no memory.
unsafe impl Ioctl for Request {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(KVMIO, self.number)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.argument)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

fn ask(kvm: &File, number: u8, argument: usize) -> io::Result<i32> {
    // SAFETY: as for the implementation; on what is no KVM the request is unknown.
    Ok(unsafe { ioctl(kvm, Request { number, argument }) }?)
}

pub fn check(node: &Node) -> Vec<Finding> {
    let processor = processor(&node.read("/proc/cpuinfo").unwrap_or_default());
    vec![device(), processor]
}

fn device() -> Finding {
    const ABOUT: &str = "KVM";
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    let kvm = match opened {
        Ok(kvm) => kvm,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let advice = "modprobe kvm_intel or kvm_amd; in a virtual machine, have nested \
                          virtualization switched on by whoever runs it";
            return Finding::problem(ABOUT, format!("no {DEVICE}"), advice);
        }
        Err(error) => {
            let advice = "run this as root; the shim does";
            return Finding::problem(ABOUT, format!("{DEVICE}: {error}"), advice);
        }
    };
    let not_kvm = |found: String| Finding::problem(ABOUT, found, "something else is at /dev/kvm");
    match ask(&kvm, 0x00, 0) {
        Ok(API_VERSION) => {}
        Ok(other) => return not_kvm(format!("API version {other} instead of {API_VERSION}")),
        Err(error) => return not_kvm(format!("{DEVICE} does not answer as KVM: {error}")),
    }
    for (capability, name) in NEEDED {
        if !ask(&kvm, 0x03, capability).is_ok_and(|has| has > 0) {
            let advice = "the node needs the KVM of Linux 5.15 or newer";
            return Finding::problem(ABOUT, format!("{name} is missing"), advice);
        }
    }
    match ask(&kvm, 0x01, 0) {
        Ok(vm) => {
            // SAFETY: KVM_CREATE_VM has just returned it, and nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(vm) });
            Finding::ok(ABOUT, format!("{DEVICE} makes machines"))
        }
        Err(error) => {
            let advice = "another hypervisor may hold the processor, or the firmware has \
                          virtualization switched off; see dmesg";
            Finding::problem(ABOUT, format!("no machine can be made: {error}"), advice)
        }
    }
}

fn processor(cpuinfo: &str) -> Finding {
    const ABOUT: &str = "processor";
    let field = |name: &str| {
        let mut lines = cpuinfo.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.split_once(':')?.1.trim()))
    };
    let Some(flags) = field("flags") else {
        return Finding::problem(ABOUT, "no x86-64 processor", "Husk runs on x86-64 only");
    };
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    let model = field("model name").unwrap_or("of unknown model");
    match (has("vmx"), has("svm")) {
        (false, false) => Finding::warning(
            ABOUT,
            format!("{model}, without vmx and svm"),
            "if KVM works all the same it is emulated, and pods are very slow; switch \
             virtualization on in the firmware, or nested virtualization in the host",
        ),
        _ if has("hypervisor") => Finding::warning(
            ABOUT,
            format!("{model}, itself in a virtual machine"),
            "pods run nested, each exit costs several times as much; metal is faster",
        ),
        (vmx, _) => Finding::ok(
            ABOUT,
            format!("{model} with {}", if vmx { "vmx" } else { "svm" }),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn tells_hardware_from_what_is_not() {
        let cpu = |flags| format!("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu {flags}\n");
        for (flags, verdict, words) in [
            ("vmx", Verdict::Ok, "A CPU with vmx"),
            ("svm x2apic", Verdict::Ok, "svm"),
            ("svm hypervisor", Verdict::Warning, "virtual machine"),
            ("svmx", Verdict::Warning, "without vmx and svm"),
        ] {
            let finding = processor(&cpu(flags));
            assert_eq!(finding.verdict, verdict, "{flags}");
            assert!(finding.found.contains(words), "{finding:?}");
        }
        assert_eq!(processor("").verdict, Verdict::Problem);
    }

    #[test]
    fn what_is_no_kvm_does_not_answer() {
        let null = File::open("/dev/null").unwrap();
        assert!(ask(&null, 0, 0).is_err());
    }
}
