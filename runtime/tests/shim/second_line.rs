//! Nodes that lack a second line of defence.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use crate::Case;
use crate::case::{Node, block_on};
use crate::sandbox::{kill, remove};

pub const CASES: &[Case] = &[
    ("second_line_that_is_there_is_not_told", there),
    ("second_line_that_lacks_is_told_once", lacking),
];

/// linux/seccomp.h.
const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;

fn there() {
    // SAFETY: the call with these arguments only asks for the version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if version < 2 {
        println!("skipped: the kernel has no Landlock, or the first");
        return;
    }
    let log = log_of_a_pod();
    assert!(!log.contains("Landlock"), "{log}");
}

fn lacking() {
    // The filter stays with the thread and all that it starts.
    let log = std::thread::spawn(|| {
        forbid(libc::SYS_landlock_create_ruleset, libc::ENOSYS);
        log_of_a_pod()
    });
    let log = log.join().unwrap();
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("Landlock"))
        .collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(
        told[0].contains("level=warning") && told[0].contains("kernel has no Landlock"),
        "{log}"
    );
}

/// Has a system call answered with `error`, as by a kernel without it, for this
/// thread and all that it starts.
pub fn forbid(call: libc::c_long, error: i32) {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = [
        // The call's number is the first that there is.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: call as u32,
        },
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | error as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    rustix::thread::set_no_new_privs(true).unwrap();
    // SAFETY: the kernel copies the program, which has as many statements.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    assert_eq!(result, 0);
}

/// What the shim of a pod says from its start to its end.
fn log_of_a_pod() -> String {
    let mut said = String::new();
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("told", &["sleep"]);
        let mut log = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(bundle.fifo("log"))
            .unwrap();
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        shim.run("told", "").await.unwrap();
        kill(&shim, "told").await;
        remove(&node, &shim, "told").await;
        let mut bytes = Vec::new();
        // Ends with an error, as nobody closes the fifo.
        let _ = log.read_to_end(&mut bytes);
        said = String::from_utf8(bytes).unwrap();
    });
    // Something is always said.
    assert!(said.contains("level="), "{said:?}");
    said
}
