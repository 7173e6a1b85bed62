//! `husk-demo`: a container and a pod in VMs, shown from inside and outside.
//! Runs as root on a node with containerd and Husk.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_e2e::case::{Bench, Case, WARM_UP, husk_case};
use husk_e2e::cri::api::{ContainerState, NamespaceMode};
use husk_e2e::host::HostState;
use husk_e2e::image;
use husk_e2e::node::{Node, Runtime};
use husk_e2e::pod::Pod;
use husk_e2e::{footprint, pod_state, process, template};

const DEMO: Case = husk_case("demo", 180, demo);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Options: --slowness N, --busybox FILE.
fn run() -> Result<()> {
    let mut node = Node::local();
    node.work = "/var/tmp/husk-demo".into();
    let mut busybox = PathBuf::from("/bin/busybox");
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{word} wants a value"))?;
        match word.as_str() {
            "--slowness" => node.slowness = value.parse()?,
            "--busybox" => busybox = value.into(),
            _ => bail!("no option {word}"),
        }
    }
    std::fs::create_dir_all(&node.work)?;
    title("An image, made offline");
    let probe = std::env::current_exe()?.with_file_name("husk-probe");
    image::install_for(&node, &probe, &busybox)?;
    println!("{} imported into containerd", image::BASE);
    DEMO.run(&node, Runtime::Husk)
}

fn title(text: &str) {
    println!("\n\x1b[1m== {text}\x1b[0m");
}

fn demo(bench: &Bench) -> Result<()> {
    title("The host");
    let host = process::run(Command::new("uname").arg("-a"), Duration::from_secs(5))?
        .ok()?
        .out();
    print!("{host}");

    title("A container in a VM: ctr run --rm --runtime io.containerd.husk.v2 … uname -a");
    let begun = Instant::now();
    let guest = bench
        .ctr
        .run(&[], &bench.id(), &["uname", "-a"])?
        .ok()?
        .out();
    print!("{guest}");
    println!(
        "(start, run and removal: {} ms)",
        begun.elapsed().as_millis()
    );
    ensure!(
        host != guest,
        "the container says it runs on the host's kernel"
    );

    // The node's first pod, in whatever runtime, makes the bridge and folders
    // of containerd's that stay.
    WARM_UP.run(&bench.node, Runtime::Runc)?;
    // The machine that has booted is saved once; the next pods are its copies.
    template::await_maker(bench.seconds(60))?;
    let before = HostState::capture(&bench.node);
    let pod_id = pod(bench)?;

    title("After removal");
    before.await_same(&bench.node, bench.seconds(10), |_| true)?;
    println!(
        "of pod {}: no process, mount, interface, cgroup, namespace, socket or file is left on the host",
        short(&pod_id)
    );
    Ok(())
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A pod of two containers that talk over localhost; returns its id.
fn pod(bench: &Bench) -> Result<String> {
    let cri = bench.cri()?;
    title("A pod of two containers (CRI), talking over localhost");
    let begun = Instant::now();
    let pod = Pod::run(bench, &cri, |config| {
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    })?;
    println!(
        "pod {} runs after {} ms",
        short(&pod.id),
        begun.elapsed().as_millis()
    );
    let start = |command: &[&str]| {
        let mut config = pod.container(command);
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        pod.start_config(&cri, &config)
    };
    let server = start(&["probe", "echo", "127.0.0.1:7000"])?;
    pod.await_log(&cri, &server, "listening")?;
    println!("container {}: listens on 127.0.0.1:7000", short(&server));
    let client = start(&[
        "sh",
        "-c",
        "probe fetch 127.0.0.1:7000 'hello over localhost'; sleep 1000",
    ])?;
    pod.await_log(&cri, &client, "hello over localhost")?;
    println!(
        "container {}: got back \"hello over localhost\"",
        short(&client)
    );
    ensure!(cri.container_status(&client)?.state() == ContainerState::ContainerRunning);
    let network = cri.pod_status(&pod.id)?.network.unwrap_or_default();
    let more: Vec<String> = network
        .additional_ips
        .into_iter()
        .map(|more| more.ip)
        .collect();
    println!("addresses: {} {}", network.ip, more.join(" "));

    title("The pod's processes, as the guest sees them");
    let uname = cri.exec_sync(&client, &["uname", "-a"], 20)?.ok()?;
    println!("{uname}");
    let inside = cri
        .exec_sync(&client, &["ps", "-o", "pid,user,args"], 20)?
        .ok()?;
    println!("{inside}");

    title("The pod, as the host sees it");
    println!(
        "{:>8} {:>11} {:>10} {:>10}  program",
        "pid", "uid", "own KiB", "guest KiB"
    );
    let outside = footprint::of_pod(&pod.id)?;
    for process in &outside {
        println!(
            "{:>8} {:>11} {:>10} {:>10}  {}",
            process.pid, process.uid, process.own_kib, process.guest_kib, process.name
        );
    }
    println!("(memory: proportional set size; guest: pages of the VM's memory)");
    for program in ["probe", "sleep"] {
        let found = process::run(
            Command::new("pgrep").args(["-x", program]),
            Duration::from_secs(10),
        )?;
        ensure!(found.stdout.is_empty(), "the host sees the pod's {program}");
    }
    println!("none of the processes above it is visible here");

    title("Where the start's time went");
    timeline(&pod.id)?;
    pod.remove(&cri)?;
    Ok(pod.id)
}

const STAGES: &[(&str, &str)] = &[
    ("request_ns", "containerd's request"),
    ("vmm_exec_ns", "VMM's program begins"),
    ("vmm_spec_ns", "VMM jailed, has its specification"),
    ("guest_entered_ns", "kernel entered"),
    ("agent_ready_ns", "agent ready, sandbox set up"),
    ("container_created_ns", "first container created"),
    ("container_started_ns", "its program executed"),
    ("first_output_ns", "its first output"),
];

/// Prints the shim's timeline of a pod.
fn timeline(pod: &str) -> Result<()> {
    let state = pod_state::of(pod)?;
    let moment = |stage: &str| state["timeline"][stage].as_u64().filter(|ns| *ns > 0);
    let begun = moment("request_ns").context("no timeline")?;
    let mut last = begun;
    for (stage, what) in STAGES {
        let Some(at) = moment(stage) else {
            println!("{:>21}  {what}", "-");
            continue;
        };
        let ms = |ns: u64| ns as f64 / 1e6;
        println!(
            "{:>9.1} ms {:>+8.1}  {what}",
            ms(at - begun),
            ms(at.saturating_sub(last))
        );
        last = at;
    }
    Ok(())
}
