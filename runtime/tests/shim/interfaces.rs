//! Interfaces that come and go while a container runs, as `docker network connect`
//! and `disconnect` have it.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::soon;
use crate::lifecycle::{added, finish, kill};

pub const CASES: &[Case] = &[("interfaces_come_and_go", come_and_go)];

/// A network namespace of its own.
struct Netns(Child);

impl Netns {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        let holder = Self(command.args(["--net", "sleep", "100"]).spawn().unwrap());
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        while std::fs::read_link(holder.path()).is_ok_and(|theirs| theirs == own) {
            std::thread::sleep(Duration::from_millis(10));
        }
        holder
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    fn ip(&self, line: &str) {
        let mut command = Command::new("nsenter");
        let command = command.arg(format!("--net={}", self.path())).arg("ip");
        let done = command.args(line.split(' ')).status().unwrap();
        assert!(done.success(), "ip {line}");
    }

    /// Adds an interface whose other end is elsewhere.
    fn add(&self, other: &Self, name: &str, last: u8) {
        let peer = format!("peer name p{last} netns {}", other.0.id());
        self.ip(&format!(
            "link add {name} address 02:00:00:00:00:{last:02x} type veth {peer}"
        ));
        self.ip(&format!("address add 10.{last}.0.2/24 dev {name}"));
        self.ip(&format!("link set {name} up"));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the guest has been told of its network since it booted, in the end.
async fn expect(shim: &Shim, bundle: &Bundle, wanted: &[&str]) {
    let began = Instant::now();
    for number in 0.. {
        let exec = format!("x{number}-{}", wanted.len());
        let mut request = added(&bundle.id, &exec, &["network"]);
        request.stdout = bundle.fifo(&exec);
        shim.task.exec(soon(), &request).await.unwrap();
        let mut output = std::fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&request.stdout)
            .unwrap();
        shim.run(&bundle.id, &exec).await.unwrap();
        shim.wait(&bundle.id, &exec).await.unwrap();
        let mut told = String::new();
        output.read_to_string(&mut told).unwrap();
        shim.delete(&bundle.id, &exec).await.unwrap();
        if told.split_whitespace().eq(wanted.iter().copied()) {
            return;
        }
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{told:?}, not {wanted:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn come_and_go() {
    block_on(async {
        let node = Node::new().await;
        let (netns, other) = (Netns::new(), Netns::new());
        netns.add(&other, "eth0", 1);
        netns.ip("route add default via 10.1.0.1");
        let bundle = node.bundle("n", &["sleep"]).with(|spec| {
            spec["linux"]["namespaces"] =
                json!([{"type": "pid"}, {"type": "network", "path": netns.path()}]);
        });
        let shim = node.start(&bundle).await;
        shim.create(&bundle.request()).await.unwrap();
        // Before the start, as Docker does it: it is there when the program is.
        netns.add(&other, "eth1", 2);
        shim.run("n", "").await.unwrap();
        let mut wanted = vec!["eth1:10.2.0.2/24"];
        expect(&shim, &bundle, &wanted).await;
        netns.add(&other, "eth2", 3);
        wanted.push("eth2:10.3.0.2/24");
        expect(&shim, &bundle, &wanted).await;
        netns.ip("route add 10.50.0.0/16 via 10.3.0.1");
        wanted.push("to:10.50.0.0/16");
        expect(&shim, &bundle, &wanted).await;
        // One that is down for a while is still there.
        netns.ip("link set eth1 down");
        tokio::time::sleep(Duration::from_millis(300)).await;
        netns.ip("link set eth1 up");
        netns.ip("link delete eth2");
        wanted.push("gone:03");
        expect(&shim, &bundle, &wanted).await;
        // The same once more is another one.
        netns.add(&other, "eth2", 3);
        wanted.push("eth2:10.3.0.2/24");
        expect(&shim, &bundle, &wanted).await;
        kill(&shim, "n", "", 9).await.unwrap();
        shim.wait("n", "").await.unwrap();
        finish(&node, &shim, "n").await;
    });
}
