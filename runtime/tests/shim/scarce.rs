//! Too few descriptors, processes or threads for a start, whichever is the first
//! that there is none for: one clear error, and nothing is left.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::WaitRequest;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use ttrpc::Code;
use ttrpc::context::with_duration;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::{connect, refusal, soon};
use crate::faults::{attempt, outcome};

pub const CASES: &[Case] = &[
    ("scarce_descriptors_from_the_first", descriptors_at_start),
    ("scarce_descriptors_of_a_shim", descriptors_of_a_shim),
    ("scarce_descriptors_for_a_connection", connection_waits),
    ("scarce_processes_from_the_first", processes_at_start),
    ("scarce_processes_of_a_shim", processes_of_a_shim),
    ("scarce_processes_of_a_member", processes_of_a_member),
];

/// In the kernel's words, for processes and threads alike.
const NO_PROCESS: &str = "Resource temporarily unavailable";

const NO_DESCRIPTOR: &str = "Too many open files";

/// So many starts in a row must work for a sweep to be over.
const ENOUGH: usize = 3;

/// What a sweep has seen.
#[derive(Default)]
struct Sweep {
    failed: usize,
    worked: usize,
}

impl Sweep {
    /// Notes what a start under a limit came to; true: that is enough.
    fn note(&mut self, limit: u64, refusal: Option<&str>, words: &[&str]) -> bool {
        match refusal {
            None => self.worked += 1,
            Some(message) => {
                let is_clear = words.iter().any(|words| message.contains(words));
                assert!(is_clear, "{limit}: {message}");
                assert!(!message.contains('\n'), "{limit}: {message}");
                self.failed += 1;
                self.worked = 0;
            }
        }
        self.worked == ENOUGH
    }

    fn end(&self, least: usize) {
        let Self { failed, worked } = self;
        assert!(
            *failed >= least && *worked == ENOUGH,
            "{failed} failed, {worked} worked"
        );
    }
}

fn limit_descriptors(pid: i32, limit: u64) {
    let limits = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    prlimit(Pid::from_raw(pid), Resource::Nofile, limits).unwrap();
}

/// The shim's program begins with the limit.
fn descriptors_at_start() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("n", &["sleep"]);
        let mut sweep = Sweep::default();
        // Nobody has less than the three streams.
        for limit in 3..=80 {
            let limited = |command: &mut Command| {
                // SAFETY: one system call between fork and exec.
                unsafe {
                    command.pre_exec(move || {
                        let limit = libc::rlimit {
                            rlim_cur: limit,
                            rlim_max: limit,
                        };
                        match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
                            0 => Ok(()),
                            _ => Err(std::io::Error::last_os_error()),
                        }
                    });
                }
            };
            let refusal = start_with(&node, &bundle, limited).await;
            node.assert_clean();
            if let Some(message) = &refusal {
                assert!(limit < 64, "{limit}: {message}");
            }
            let words = [&*format!("(RLIMIT_NOFILE) is {limit}")];
            if sweep.note(limit, refusal.as_deref(), &words) {
                break;
            }
        }
        sweep.end(30);
    });
}

/// The limit comes when the shim serves.
fn descriptors_of_a_shim() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("s", &["sleep"]);
        let mut sweep = Sweep::default();
        for more in 0..80 {
            let shim = node.start(&bundle).await;
            answers(&shim).await;
            let open = fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap();
            limit_descriptors(shim.pid, open.count() as u64 + more);
            let refusal = outcome(&shim, &bundle).await.map(|(_, message)| message);
            node.assert_clean();
            if sweep.note(more, refusal.as_deref(), &[NO_DESCRIPTOR]) {
                break;
            }
        }
        sweep.end(5);
    });
}

/// One that cannot be taken costs the shim next to nothing, and is taken as soon as
/// it can be.
fn connection_waits() {
    block_on(async {
        let node = Node::new().await;
        let bundle = node.bundle("c", &["sleep"]);
        let shim = node.start(&bundle).await;
        answers(&shim).await;
        let pid = Pid::from_raw(shim.pid);
        // The shim has raised its own as far as that.
        let most = getrlimit(Resource::Nofile).maximum;
        let before = Rlimit {
            current: most,
            maximum: most,
        };
        let none_free = Rlimit {
            current: Some(first_free(shim.pid)),
            ..before
        };
        prlimit(pid, Resource::Nofile, none_free).unwrap();
        let other = connect(&shim.address).await;
        let request = WaitRequest {
            id: "nobody".into(),
            ..WaitRequest::default()
        };
        let used = ticks(shim.pid);
        let (began, half_a_second) = (Instant::now(), Duration::from_millis(500));
        let answer = other.wait(with_duration(half_a_second), &request).await;
        assert!(began.elapsed() >= half_a_second, "{answer:?}");
        let used = ticks(shim.pid) - used;
        assert!(used < 15, "{used} hundredths of a second");
        prlimit(pid, Resource::Nofile, before).unwrap();
        let (code, _) = refusal(other.wait(soon(), &request).await);
        assert_eq!(code, Code::NOT_FOUND);
        assert_eq!(outcome(&shim, &bundle).await, None);
        node.assert_clean();
    });
}

/// The number that the next descriptor of a process gets.
fn first_free(pid: i32) -> u64 {
    let is_free = |number: &u64| !PathBuf::from(format!("/proc/{pid}/fd/{number}")).exists();
    (0..).find(is_free).unwrap()
}

/// Processor time of a process.
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    // proc_pid_stat(5): fields 14 and 15; the third is the first of these.
    let times = fields.split(' ').skip(14 - 3).take(2);
    times.map(|time| time.parse::<u64>().unwrap()).sum()
}

/// The shim has taken the connection.
async fn answers(shim: &Shim) {
    shim.wait("nobody", "").await.unwrap_err();
}

/// A start of the program, changed by `change`, up to its pod's end; why it came
/// to nothing, whoever said so.
async fn start_with(
    node: &Node,
    bundle: &Bundle,
    change: impl FnOnce(&mut Command),
) -> Option<String> {
    match node.try_start_with(bundle, change).await {
        Err(why) => {
            let address = fs::read_to_string(bundle.dir.join("address")).unwrap_or_default();
            let socket = address.strip_prefix("unix://").map(PathBuf::from);
            if let Some(socket) = socket {
                assert!(!socket.exists(), "{} is left", socket.display());
            }
            Some(why)
        }
        Ok(shim) => outcome(&shim, bundle).await.map(|(_, message)| message),
    }
}

/// A cgroup that counts processes; none where this machine has none to give.
struct Pids(PathBuf);

impl Pids {
    fn new(name: &str) -> Option<Self> {
        let name = format!("husk-scarce-{name}-{}", std::process::id());
        let roots = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
        let made = roots.iter().find_map(|root| {
            let path = PathBuf::from(root).join(&name);
            fs::create_dir(&path).ok()?;
            let pids = Self(path);
            pids.0.join("pids.max").exists().then_some(pids)
        });
        if made.is_none() {
            println!("skipped: no cgroup that counts processes");
        }
        made
    }

    fn limit(&self, most: u64) {
        fs::write(self.0.join("pids.max"), most.to_string()).unwrap();
    }

    fn unlimited(&self) {
        fs::write(self.0.join("pids.max"), "max").unwrap();
    }

    fn add(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn current(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("pids.current")).unwrap();
        text.trim().parse().unwrap()
    }

    /// Nobody is left in it, and nobody counts any more: who was orphaned is waited
    /// for by the machine's first process.
    async fn assert_empty(&self) {
        let began = Instant::now();
        while self.current() > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{} processes are left",
                self.current()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The shim's program begins with the limit.
fn processes_at_start() {
    block_on(async {
        let Some(pids) = Pids::new("start") else {
            return;
        };
        let node = Node::new().await;
        let bundle = node.bundle("p", &["sleep"]);
        let mut sweep = Sweep::default();
        for limit in 1..40 {
            pids.limit(limit);
            let procs = pids.0.join("cgroup.procs");
            let joins = move |command: &mut Command| {
                let file = fs::File::options().write(true).open(procs).unwrap();
                // SAFETY: one system call between fork and exec.
                unsafe {
                    command.pre_exec(move || {
                        rustix::io::write(&file, b"0")?;
                        Ok(())
                    });
                }
            };
            let refusal = start_with(&node, &bundle, joins).await;
            node.assert_clean();
            pids.assert_empty().await;
            if sweep.note(limit, refusal.as_deref(), &[NO_PROCESS]) {
                break;
            }
        }
        sweep.end(4);
    });
}

/// The limit comes when the shim serves.
fn processes_of_a_shim() {
    block_on(async {
        let Some(pids) = Pids::new("shim") else {
            return;
        };
        let node = Node::new().await;
        let bundle = node.bundle("q", &["sleep"]);
        let mut sweep = Sweep::default();
        for more in 0..40 {
            let shim = node.start(&bundle).await;
            answers(&shim).await;
            pids.add(shim.pid);
            pids.limit(pids.current() + more);
            let refusal = outcome(&shim, &bundle).await.map(|(_, message)| message);
            node.assert_clean();
            pids.unlimited();
            pids.assert_empty().await;
            if sweep.note(more, refusal.as_deref(), &[NO_PROCESS]) {
                break;
            }
        }
        sweep.end(3);
    });
}

/// The limit comes when there is a pod: what it has goes on, and another container
/// is refused or made whole.
fn processes_of_a_member() {
    block_on(async {
        let Some(pids) = Pids::new("member") else {
            return;
        };
        let node = Node::new().await;
        let sandbox = node.bundle("sandbox", &["pause"]).with(|spec| {
            spec["annotations"] = serde_json::json!({
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "sandbox",
            });
        });
        let member = node.bundle("member", &["sleep"]).with(|spec| {
            spec["annotations"] = serde_json::json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "sandbox",
            });
        });
        let shim = node.start(&sandbox).await;
        pids.add(shim.pid);
        shim.create(&sandbox.request()).await.unwrap();
        shim.run("sandbox", "").await.unwrap();
        let mut sweep = Sweep::default();
        for more in 0..20 {
            // The work of the last round may still be on its way out.
            tokio::time::sleep(Duration::from_millis(50)).await;
            pids.limit(pids.current() + more);
            let refusal = attempt(&shim, &member).await.map(|(_, message)| message);
            if sweep.note(more, refusal.as_deref(), &[NO_PROCESS]) {
                break;
            }
        }
        pids.unlimited();
        sweep.end(1);
        crate::lifecycle::kill(&shim, "sandbox", "", 9)
            .await
            .unwrap();
        shim.wait("sandbox", "").await.unwrap();
        crate::lifecycle::finish(&node, &shim, "sandbox").await;
        pids.assert_empty().await;
    });
}
