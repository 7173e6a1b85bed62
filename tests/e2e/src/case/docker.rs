//! Docker with the runtime chosen by `docker run --runtime`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Bench, Case, Skip, case};
use crate::docker::Docker;
use crate::process::eventually;

pub mod compose;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("docker/run", 90, run),
    case("docker/terminal", 60, terminal),
    case("docker/files", 90, files),
    case("docker/ports", 60, ports),
    case("docker/names", 90, names),
    case("docker/network-of-another", 60, network_of_another),
    case("docker/networks-come-and-go", 60, networks_come_and_go),
    case("docker/exec", 60, exec),
    case("docker/life-cycle", 90, life_cycle),
    case("docker/restart-policies", 90, restart_policies),
    case("docker/health", 60, health),
    case("docker/observed", 60, observed),
    case("docker/limits", 90, limits),
];

fn docker(bench: &Bench) -> Result<Docker> {
    match Docker::missing() {
        None => Ok(Docker::new(&bench.node, bench.runtime)),
        Some(reason) => Err(Skip(reason).into()),
    }
}

/// Streams, environment, exit codes; commands that are none.
fn run(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let flags = [
        "--interactive",
        "--env",
        "GREETING=hei maailma",
        "--workdir",
        "/tmp",
        "--user",
        "1000:1000",
        "--hostname",
        "box",
    ];
    let script = "cat; echo $GREETING; pwd; id -u; hostname; echo apart >&2; exit 7";
    let mut running = docker.start(&flags, &["sh", "-c", script])?;
    running.write(b"typed\n")?;
    let done = running.finish(docker.deadline())?.expect_code(7)?;
    ensure!(
        done.out() == "typed\nhei maailma\n/tmp\n1000\nbox\n" && done.err() == "apart\n",
        "{}",
        done.tail()
    );
    for (command, code) in [("no-such-command", 127), ("/bin/not-executable", 126)] {
        let done = docker.run(&[], &[command])?.expect_code(code)?;
        ensure!(done.err().contains(command), "{}", done.tail());
    }
    Ok(())
}

/// Its size, and what is typed.
fn terminal(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let wait = docker.deadline();
    let script = "echo ready; while read -r line; do [ \"$line\" = end ] && exit 3; \
                  echo \"$line is $(stty size)!\"; done";
    let name = bench.id();
    let mut on_terminal = docker.run_on_terminal(&["--name", &name], &["sh", "-c", script])?;
    on_terminal.read_until("ready", wait)?;
    on_terminal.write("first\n")?;
    on_terminal.read_until("first is 30 100!", wait)?;
    on_terminal.resize(40, 120)?;
    eventually("the other size", wait, || {
        on_terminal.write("again\n")?;
        let said = on_terminal.read_until("!", wait)?;
        Ok(said.contains("40 120").then_some(()))
    })?;
    on_terminal.write("end\n")?;
    let (said, code) = on_terminal.finish(wait)?;
    ensure!(code == 3, "exit code {code}: {said}");
    Ok(())
}

/// Volumes, binds, memory; `docker cp` while the container runs.
fn files(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let (name, volume) = (bench.id(), bench.id());
    let bound = bench.folder().join("bound");
    fs::create_dir_all(&bound)?;
    fs::write(bound.join("in"), "of the node\n")?;
    docker.ask(&["volume", "create", &volume])?;
    let (of_volume, of_bind) = (
        format!("{volume}:/data"),
        format!("{}:/bound:ro", bound.display()),
    );
    let flags = [
        "--volume",
        &of_volume,
        "--volume",
        &of_bind,
        "--tmpfs",
        "/small:size=1m",
        "--read-only",
    ];
    let script = "cat /bound/in; echo kept > /data/file; touch /etc/x 2>&1; touch /bound/x 2>&1; \
                  df /small | tail -n 1 | tr -s ' ' | cut -d' ' -f2; sync";
    let done = docker.run(&flags, &["sh", "-c", script])?.ok()?;
    ensure!(
        done.out().starts_with("of the node\n") && done.out().ends_with("\n1024\n"),
        "{}",
        done.tail()
    );
    ensure!(
        done.out().matches("Read-only file system").count() == 2,
        "{}",
        done.tail()
    );

    docker.run_detached(&name, &["--volume", &of_volume], &["sleep", "1000"])?;
    let kept = docker.exec(&[], &name, &["cat", "/data/file"])?.ok()?;
    ensure!(kept.out() == "kept\n", "{}", kept.tail());
    let (into, back) = (bench.folder().join("into"), bench.folder().join("back"));
    fs::write(&into, "copied in\n")?;
    let (into, back) = (into.display().to_string(), back.display().to_string());
    docker.ask(&["cp", &into, &format!("{name}:/root/into")])?;
    let script = "cat /root/into; echo copied out > /root/out";
    let copied = docker.exec(&[], &name, &["sh", "-c", script])?.ok()?;
    ensure!(copied.out() == "copied in\n", "{}", copied.tail());
    docker.ask(&["cp", &format!("{name}:/root/out"), &back])?;
    let text = fs::read_to_string(&back)?;
    ensure!(text == "copied out\n", "{text:?}");
    docker.remove(&name)?;
    docker.ask(&["volume", "rm", &volume])?;
    Ok(())
}

/// What an echo server at `address` makes of a text.
fn echoed(address: SocketAddr, text: &str) -> Result<String> {
    let wait = Duration::from_secs(20);
    let mut stream =
        TcpStream::connect_timeout(&address, wait).with_context(|| format!("dial {address}"))?;
    stream.set_read_timeout(Some(wait))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .with_context(|| format!("answer of {address}"))?;
    Ok(answer)
}

/// Published ports, by Docker's proxy and by its rules; the node from inside.
fn ports(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let flags = ["--publish", "7000/tcp"];
    docker.run_detached(&name, &flags, &["probe", "echo", "0.0.0.0:7000"])?;
    let published = docker.ask(&["port", &name, "7000/tcp"])?;
    let port = published
        .lines()
        .next()
        .and_then(|line| line.rsplit(':').next());
    let port: u16 = port.with_context(|| published.clone())?.parse()?;
    let bridge = docker.ask(&[
        "network",
        "inspect",
        "--format",
        "{{(index .IPAM.Config 0).Gateway}}",
        "bridge",
    ])?;
    let bridge = bridge.trim();
    // The proxy takes what comes for localhost, the rules do what else.
    for address in [
        format!("127.0.0.1:{port}"),
        format!("{bridge}:{port}"),
        format!("{}:7000", docker.address(&name)?),
    ] {
        let answer = eventually("an answer", bench.seconds(10), || {
            let answer = echoed(address.parse()?, "to a port");
            Ok(answer.ok().filter(|answer| !answer.is_empty()))
        });
        let answer = answer.with_context(|| address.clone())?;
        ensure!(answer == "to a port", "{address}: {answer:?}");
    }
    let listener = TcpListener::bind((bridge, 0))?;
    let own = listener.local_addr()?.to_string();
    let server = thread::spawn(move || -> std::io::Result<String> {
        let (mut stream, _) = listener.accept()?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        stream.write_all(b"the node")?;
        Ok(text)
    });
    let fetch = docker.exec(&[], &name, &["probe", "fetch", &own, "hello"])?;
    let fetch = fetch.ok()?;
    ensure!(fetch.out().contains("the node"), "{}", fetch.tail());
    let heard = server.join().ok().context("the server panicked")??;
    ensure!(heard.contains("hello"), "{heard:?}");
    docker.remove(&name)
}

/// Containers of a network of the user's find each other by name.
fn names(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let (network, server) = (bench.id(), bench.id());
    docker.ask(&["network", "create", &network])?;
    let flags = ["--network", &network, "--network-alias", "www"];
    docker.run_detached(&server, &flags, &["probe", "echo", "0.0.0.0:7000"])?;
    let address = docker.address(&server)?;
    let by_name = format!("{server}:7000");
    let script = format!(
        "nslookup {server}; probe fetch www:7000 by-alias; \
         probe fetch {by_name} by-name; nslookup nobody || echo nobody"
    );
    let done = docker.run(&["--network", &network], &["sh", "-c", &script])?;
    let done = done.ok()?;
    for wanted in [&address, "by-alias", "by-name", "nobody"] {
        ensure!(done.out().contains(wanted), "no {wanted}: {}", done.tail());
    }
    // By address, a name: the container's, in its network.
    let own = docker.exec(&[], &server, &["nslookup", &address])?.ok()?;
    let full = format!("{server}.{network}");
    ensure!(own.out().contains(&full), "{}", own.tail());
    docker.remove(&server)?;
    docker.ask(&["network", "rm", &network])?;
    Ok(())
}

/// `--network container:NAME`: one localhost, and each its own files.
fn network_of_another(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let server = bench.id();
    docker.run_detached(&server, &[], &["probe", "echo", "127.0.0.1:7000"])?;
    docker.exec(&[], &server, &["touch", "/root/mine"])?.ok()?;
    let flags = ["--network", &format!("container:{server}")];
    let script = "probe fetch 127.0.0.1:7000 to-localhost; ls -A /root | wc -l; \
                  ip address show eth0 | grep -o 'inet [0-9.]*'";
    let done = docker.run(&flags, &["sh", "-c", script])?.ok()?;
    let expected = format!("inet {}\n", docker.address(&server)?);
    ensure!(
        done.out().contains("to-localhost")
            && done.out().contains("0\n")
            && done.out().ends_with(&expected),
        "{}",
        done.tail()
    );
    // The first goes on without the second.
    let status = docker.inspect(&server, "/State/Status")?;
    ensure!(status == "running", "{status}");
    docker.remove(&server)
}

/// `network connect` and `disconnect` of a container that runs.
fn networks_come_and_go(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let (network, name) = (bench.id(), bench.id());
    docker.ask(&["network", "create", &network])?;
    docker.run_detached(&name, &[], &["sleep", "1000"])?;
    docker.ask(&["network", "connect", &network, &name])?;
    let at = |key: &str| -> Result<String> {
        let said = docker.inspect(&name, &format!("/NetworkSettings/Networks/{network}/{key}"))?;
        let text = said.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .with_context(|| format!("no {key}: {said}"))
    };
    let (address, gateway) = (at("IPAddress")?, at("Gateway")?);
    let is_there = |is_wanted: bool| {
        let what = format!("it is {is_wanted} that {address} is there");
        eventually(&what, bench.seconds(15), || {
            let seen = docker.exec(&[], &name, &["ip", "-o", "address"])?.ok()?;
            let is_there = seen.out().contains(&format!(" {address}/"));
            Ok((is_there == is_wanted).then_some(()))
        })
    };
    is_there(true)?;
    let ping = ["ping", "-c", "1", "-W", "5", gateway.as_str()];
    docker.exec(&[], &name, &ping)?.ok()?;
    docker.ask(&["network", "disconnect", &network, &name])?;
    is_there(false)?;
    // The first is as it was.
    let script = "ping -c 1 -W 5 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')";
    docker.exec(&[], &name, &["sh", "-c", script])?.ok()?;
    // And once more, on a network that the container had.
    docker.ask(&["network", "connect", &network, &name])?;
    is_there(true)?;
    docker.remove(&name)?;
    docker.ask(&["network", "rm", &network])?;
    Ok(())
}

fn exec(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    docker.run_detached(&name, &["--env", "SPEC=yes"], &["sleep", "1000"])?;
    let flags = ["--env", "MORE=too", "--workdir", "/tmp", "--user", "web"];
    let script = "pwd; echo $SPEC $MORE; id -un; echo apart >&2; exit 4";
    let done = docker.exec(&flags, &name, &["sh", "-c", script])?;
    let done = done.expect_code(4)?;
    ensure!(
        done.out() == "/tmp\nyes too\nweb\n" && done.err() == "apart\n",
        "{}",
        done.tail()
    );
    let mut command = docker.command(&["exec", "--interactive", &name, "sha256sum"]);
    let mut with_input = crate::process::start(&mut command)?;
    with_input.write(b"abc")?;
    let sum = with_input.finish(docker.deadline())?.ok()?;
    ensure!(sum.out().starts_with("ba7816bf8f01cfea"), "{}", sum.tail());
    let missing = docker.exec(&[], &name, &["no-such-command"])?;
    // Older daemons give one code for everything that can't be executed.
    let server = docker.ask(&["version", "--format", "{{.Server.Version}}"])?;
    let major: u32 = server.split('.').next().unwrap_or_default().parse()?;
    let missing = missing.expect_code(if major < 28 { 126 } else { 127 })?;
    let said = missing.out() + &missing.err();
    ensure!(said.contains("no-such-command"), "{said}");
    let detached = ["sh", "-c", "echo done > /tmp/detached"];
    docker.exec(&["--detach"], &name, &detached)?.ok()?;
    eventually("what a detached process writes", bench.seconds(10), || {
        let file = docker.exec(&[], &name, &["cat", "/tmp/detached"])?;
        Ok((file.out() == "done\n").then_some(()))
    })?;
    docker.remove(&name)
}

/// Created, started, paused, stopped, started again with its files, killed.
fn life_cycle(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let script = "trap 'echo told; exit 5' TERM; trap 'echo signal' USR1; \
                  echo run >> /root/runs; echo up; while :; do sleep 0.1; done";
    let status = |wanted: &str| {
        eventually(&format!("it is {wanted}"), bench.seconds(10), || {
            let status = docker.inspect(&name, "/State/Status")?;
            Ok((status == wanted).then_some(()))
        })
    };
    let logged = |wanted: &str, count: usize| {
        eventually(
            &format!("{count} {wanted} in its log"),
            bench.seconds(10),
            || {
                let log = docker.ask(&["logs", &name])?;
                Ok((log.matches(wanted).count() == count).then_some(()))
            },
        )
    };
    docker.run_detached(&name, &[], &["sh", "-c", script])?;
    logged("up", 1)?;
    docker.ask(&["pause", &name])?;
    status("paused")?;
    docker.ask(&["unpause", &name])?;
    status("running")?;
    docker.ask(&["kill", "--signal", "USR1", &name])?;
    logged("signal", 1)?;
    docker.ask(&["stop", &name])?;
    status("exited")?;
    logged("told", 1)?;
    let code = docker.inspect(&name, "/State/ExitCode")?;
    ensure!(code == 5, "exit code {code}");
    docker.ask(&["start", &name])?;
    logged("up", 2)?;
    let runs = docker.exec(&[], &name, &["cat", "/root/runs"])?.ok()?;
    ensure!(runs.out() == "run\nrun\n", "{}", runs.tail());
    docker.ask(&["kill", &name])?;
    let code = docker.ask(&["wait", &name])?;
    ensure!(code.trim() == "137", "exit code {code}");
    docker.remove(&name)
}

fn restart_policies(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let flags = ["--restart", "on-failure:1"];
    let script = "echo run; exit 3";
    docker.run_detached(&name, &flags, &["sh", "-c", script])?;
    eventually("it has ended for good", docker.deadline(), || {
        let state = docker.inspect(&name, "/State/Status")?;
        let count = docker.inspect(&name, "/RestartCount")?;
        Ok((state == "exited" && count == 1).then_some(()))
    })?;
    let log = docker.ask(&["logs", &name])?;
    ensure!(log == "run\nrun\n", "{log:?}");
    let code = docker.inspect(&name, "/State/ExitCode")?;
    ensure!(code == 3, "exit code {code}");
    docker.remove(&name)?;

    let name = bench.id();
    let flags = ["--restart", "always"];
    docker.run_detached(&name, &flags, &["sleep", "1000"])?;
    // Not by Docker: that would be the user's word that it shall end.
    let pid = docker.inspect(&name, "/State/Pid")?;
    let main = pid.as_i64().and_then(|pid| i32::try_from(pid).ok());
    let main = main.with_context(|| format!("pid {pid}"))?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(main),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    eventually("it runs again", docker.deadline(), || {
        let state = docker.inspect(&name, "/State")?;
        let count = docker.inspect(&name, "/RestartCount")?;
        Ok((state["Status"] == "running" && count == 1).then_some(()))
    })?;
    docker.exec(&[], &name, &["true"])?.ok()?;
    docker.remove(&name)
}

fn health(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let flags = [
        "--health-cmd",
        "cat /tmp/well",
        "--health-interval",
        "1s",
        "--health-timeout",
        "60s",
        "--health-retries",
        "1",
    ];
    docker.run_detached(&name, &flags, &["sleep", "1000"])?;
    let is = |wanted: &str| {
        eventually(&format!("it is {wanted}"), bench.seconds(20), || {
            let health = docker.inspect(&name, "/State/Health/Status")?;
            Ok((health == wanted).then_some(()))
        })
    };
    is("unhealthy")?;
    let make = ["sh", "-c", "echo quite well > /tmp/well"];
    docker.exec(&[], &name, &make)?.ok()?;
    is("healthy")?;
    let log = docker.inspect(&name, "/State/Health/Log")?;
    let last = log.as_array().and_then(|log| log.last());
    let said = last.map(|last| &last["Output"]);
    ensure!(said == Some(&Value::from("quite well\n")), "{log}");
    docker.remove(&name)
}

/// Logs, events, statistics, processes.
fn observed(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let script = "echo one; echo two >&2; probe eat 40 > /dev/null & exec sleep 1000";
    docker.run_detached(&name, &[], &["sh", "-c", script])?;
    let logged = eventually("two lines in its log", bench.seconds(10), || {
        let log = docker.call(&["logs", &name])?.ok()?;
        Ok((!log.stdout.is_empty() && !log.stderr.is_empty()).then_some(log))
    })?;
    ensure!(
        logged.out() == "one\n" && logged.err() == "two\n",
        "{}",
        logged.tail()
    );
    let format = "{{.PIDs}} {{.MemPerc}} {{.NetIO}} {{.MemUsage}}";
    let stats = docker.ask(&["stats", "--no-stream", "--format", format, &name])?;
    let words: Vec<&str> = stats.split_whitespace().collect();
    ensure!(
        words
            .first()
            .is_some_and(|pids| *pids == "1" || *pids == "2")
            && words.get(1).is_some_and(|memory| *memory != "0.00%"),
        "{stats}"
    );
    let top = docker.ask(&["top", &name])?;
    ensure!(top.lines().count() >= 2, "{top}");
    docker.exec(&[], &name, &["true"])?.ok()?;
    docker.ask(&["kill", &name])?;
    docker.ask(&["wait", &name])?;
    let filter = format!("container={name}");
    let question = ["--since", "10m", "--until", "0s", "--format", "{{.Action}}"];
    let question = [&["events", "--filter", &filter], &question[..]].concat();
    let wanted = ["create", "start", "exec_start", "exec_die", "kill", "die"];
    // The daemon notes the end after it has answered who waited for it.
    let mut events = String::new();
    eventually("all events", bench.seconds(10), || {
        events = docker.ask(&question)?;
        let actions = events.lines().filter_map(|line| line.split(':').next());
        let seen: BTreeSet<&str> = actions.collect();
        Ok(wanted
            .iter()
            .all(|action| seen.contains(action))
            .then_some(()))
    })
    .with_context(|| format!("only\n{events}"))?;
    docker.remove(&name)
}

/// Memory, processes; changed while it runs.
fn limits(bench: &Bench) -> Result<()> {
    let docker = docker(bench)?;
    let name = bench.id();
    let flags = ["--memory", "64m", "--pids-limit", "50", "--cpus", "0.5"];
    docker.run_detached(&name, &flags, &["sleep", "1000"])?;
    let seen = |file: &str| -> Result<String> {
        let path = format!("/sys/fs/cgroup/{file}");
        Ok(docker.exec(&[], &name, &["cat", &path])?.ok()?.out())
    };
    for (file, wanted) in [
        ("memory.max", "67108864\n"),
        ("pids.max", "50\n"),
        ("cpu.max", "50000 100000\n"),
    ] {
        let value = seen(file)?;
        ensure!(value == wanted, "{file} is {value:?}");
    }
    let flags = ["--memory", "96m", "--memory-swap", "96m", "--cpus", "1"];
    docker.ask(&[&["update"], &flags[..], &[&name]].concat())?;
    for (file, wanted) in [
        ("memory.max", "100663296\n"),
        ("cpu.max", "100000 100000\n"),
    ] {
        let value = seen(file)?;
        ensure!(value == wanted, "{file} is {value:?}");
    }
    docker.remove(&name)?;

    let name = bench.id();
    docker.run_detached(&name, &["--memory", "64m"], &["probe", "eat", "200"])?;
    let code = docker.ask(&["wait", &name])?;
    ensure!(code.trim() == "137", "exit code {code}");
    let killed = docker.inspect(&name, "/State/OOMKilled")?;
    ensure!(killed == true, "OOMKilled is {killed}");
    docker.remove(&name)
}
