//! Interfaces that come and go while a container runs, as `docker network connect`
//! and `disconnect` have it.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Case;
use crate::case::{Bundle, Node, Shim, block_on};
use crate::containerd::{refusal, soon};
use crate::lifecycle::{added, finish, kill};

pub const CASES: &[Case] = &[
    ("interfaces_come_and_go", come_and_go),
    ("refused_interface_is_left_alone", refused),
    ("interface_that_fails_hides_no_other", fails),
    ("interface_may_become_another", becomes_another),
    ("start_fails_for_what_came_for_it_alone", missed),
    ("devices_may_move_what_the_node_and_the_pod_say", rates),
];

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
        self.run(&format!("ip {line}"));
    }

    fn run(&self, line: &str) -> String {
        let mut command = Command::new("nsenter");
        let command = command.arg(format!("--net={}", self.path()));
        let done = command.args(line.split(' ')).output().unwrap();
        assert!(done.status.success(), "{line}");
        String::from_utf8(done.stdout).unwrap()
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

/// What the guest answers.
async fn ask(shim: &Shim, bundle: &Bundle, exec: &str, command: &str) -> String {
    let mut request = added(&bundle.id, exec, &[command]);
    request.stdout = bundle.fifo(exec);
    shim.task.exec(soon(), &request).await.unwrap();
    let mut output = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&request.stdout)
        .unwrap();
    shim.run(&bundle.id, exec).await.unwrap();
    shim.wait(&bundle.id, exec).await.unwrap();
    let mut answer = String::new();
    output.read_to_string(&mut answer).unwrap();
    shim.delete(&bundle.id, exec).await.unwrap();
    answer
}

/// What the guest has been told of its network since it booted, in the end.
async fn expect(shim: &Shim, bundle: &Bundle, wanted: &[&str]) {
    let began = Instant::now();
    for number in 0.. {
        let exec = format!("x{number}-{}", wanted.len());
        let told = ask(shim, bundle, &exec, "network").await;
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

/// A container that is created and has one interface, and where others may lead.
async fn created(node: &Node) -> (Bundle, Shim, Netns, Netns) {
    created_with(node, json!({})).await
}

async fn created_with(node: &Node, annotations: Value) -> (Bundle, Shim, Netns, Netns) {
    let (netns, other) = (Netns::new(), Netns::new());
    netns.add(&other, "eth0", 1);
    netns.ip("route add default via 10.1.0.1");
    let bundle = node.bundle("n", &["sleep"]).with(|spec| {
        spec["linux"]["namespaces"] =
            json!([{"type": "pid"}, {"type": "network", "path": netns.path()}]);
        spec["annotations"] = annotations;
    });
    let shim = node.start(&bundle).await;
    shim.create(&bundle.request()).await.unwrap();
    (bundle, shim, netns, other)
}

async fn end(node: &Node, shim: &Shim) {
    kill(shim, "n", "", 9).await.unwrap();
    shim.wait("n", "").await.unwrap();
    finish(node, shim, "n").await;
}

fn come_and_go() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim, netns, other) = created(&node).await;
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
        end(&node, &shim).await;
    });
}

/// The VMM does not take it: the container runs without it, nothing is left on the
/// interface, and nobody tries again before it is another.
fn refused() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim, netns, other) = created(&node).await;
        netns.add(&other, "eth1", 0x66);
        shim.run("n", "").await.unwrap();
        // Others come all the same.
        netns.add(&other, "eth2", 2);
        let mut wanted = vec!["eth2:10.2.0.2/24"];
        expect(&shim, &bundle, &wanted).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(ask(&shim, &bundle, "count", "refused").await, "1");
        let filters = netns.run("tc filter show dev eth1 parent ffff:");
        assert!(!filters.contains("mirred"), "{filters}");
        let taps = netns.run("ip -o link show type tun");
        assert_eq!(taps.lines().count(), 2, "{taps}");
        netns.ip("link set eth1 address 02:00:00:00:00:05");
        wanted.push("eth1:10.102.0.2/24");
        expect(&shim, &bundle, &wanted).await;
        end(&node, &shim).await;
    });
}

/// Its tap cannot be made for a while.
fn fails() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim, netns, other) = created(&node).await;
        netns.ip("link add husk500 type veth peer name husk501");
        shim.run("n", "").await.unwrap();
        let peer = format!("peer name p9 netns {}", other.0.id());
        netns.ip(&format!("link add eth9 index 500 type veth {peer}"));
        netns.ip("address add 10.9.0.2/24 dev eth9");
        netns.ip("link set eth9 up");
        netns.add(&other, "eth2", 2);
        let mut wanted = vec!["eth2:10.2.0.2/24"];
        expect(&shim, &bundle, &wanted).await;
        netns.ip("link delete husk500");
        wanted.push("eth9:10.9.0.2/24");
        expect(&shim, &bundle, &wanted).await;
        end(&node, &shim).await;
    });
}

/// A device has the name, the address and the room that it was plugged with.
fn becomes_another() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim, netns, other) = created(&node).await;
        netns.add(&other, "eth1", 2);
        shim.run("n", "").await.unwrap();
        let mut wanted = vec!["eth1:10.2.0.2/24"];
        expect(&shim, &bundle, &wanted).await;
        netns.ip("link set eth1 down");
        netns.ip("link set eth1 name net1");
        netns.ip("link set net1 up");
        wanted.extend(["gone:02", "net1:10.2.0.2/24"]);
        expect(&shim, &bundle, &wanted).await;
        netns.ip("link set net1 address 02:00:00:00:00:07");
        wanted.extend(["gone:02", "net1:10.2.0.2/24"]);
        expect(&shim, &bundle, &wanted).await;
        netns.ip("link set eth0 mtu 4000");
        wanted.extend(["gone:01", "eth0:10.1.0.2/24", "to:"]);
        expect(&shim, &bundle, &wanted).await;
        // There is room for less.
        netns.ip("link set eth0 mtu 1400");
        wanted.push("eth0:10.1.0.2/24");
        expect(&shim, &bundle, &wanted).await;
        // Its frames do not come here any more; it is the same otherwise.
        netns.run("tc qdisc del dev net1 ingress");
        netns.ip("route add 10.50.0.0/16 via 10.1.0.1");
        wanted.extend(["gone:07", "net1:10.2.0.2/24", "to:10.50.0.0/16"]);
        expect(&shim, &bundle, &wanted).await;
        let filters = netns.run("tc filter show dev net1 parent ffff:");
        assert_eq!(filters.matches("mirred").count(), 1, "{filters}");
        end(&node, &shim).await;
    });
}

/// The guest does not take an interface: the program that it came for does not
/// start without it, but others do, and hear of what else changes.
fn missed() {
    block_on(async {
        let node = Node::new().await;
        let (bundle, shim, netns, other) = created(&node).await;
        netns.add(&other, "eth7", 77);
        let (_, message) = refusal(shim.run("n", "").await);
        assert!(message.contains("it is unwanted"), "{message}");
        shim.run("n", "").await.unwrap();
        netns.add(&other, "eth2", 2);
        expect(&shim, &bundle, &["eth2:10.2.0.2/24"]).await;
        end(&node, &shim).await;
    });
}

fn rates() {
    block_on(async {
        let node = Node::new().await;
        node.configure(
            "network_kib_per_second = 1000\nnetwork_burst_kib = 10\ndisk_kib_per_second = 5\n",
        );
        let annotations = json!({
            "io.husk.vm.network_kib_per_second": "2000",
            "io.husk.vm.network_frames_per_second": "300",
        });
        let (bundle, shim, netns, other) = created_with(&node, annotations).await;
        // One at boot, one later.
        netns.add(&other, "eth1", 2);
        shim.run("n", "").await.unwrap();
        let both = ["net-00000001", "net-00000002"].map(|id| format!("{id}:2048000+10240:300+300"));
        assert_eq!(ask(&shim, &bundle, "r", "rates").await, both.join(" "));
        end(&node, &shim).await;
        // Without a word of it, nothing is limited.
        node.configure("");
        let (bundle, shim, _netns, _other) = created(&node).await;
        shim.run("n", "").await.unwrap();
        let rates = ask(&shim, &bundle, "again", "rates").await;
        assert_eq!(rates, "net-00000001:-:-");
        end(&node, &shim).await;
    });
}
