//! `husk metrics`: the pods of now, in the text format of Prometheus.

use std::fmt::Write;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Context;

use crate::answer::Answer;
use crate::arguments::MetricsArguments;
use crate::memory::Memory;
use crate::pods::{self, Pod, Status};
use crate::timeline;

mod listen;
mod starts;

/// Serves them, prints them, or replaces a file by them in one step.
///
/// # Errors
/// The pods are not for this user, or the file cannot be written, or nobody can be
/// listened to there.
pub fn run(asked: &MetricsArguments) -> anyhow::Result<Answer> {
    if let Some(address) = asked.listen {
        return Answer::streamed(listen::serve(address));
    }
    let page = page(&pods::with_memory()?)?;
    let Some(path) = &asked.output else {
        return Ok(Answer::done(page));
    };
    replace(path, &page).with_context(|| path.display().to_string())?;
    Ok(Answer::done(String::new()))
}

/// Puts a file into a directory that may be somebody else's: nothing that is there
/// is written to, nor what a link there names.
fn replace(path: &Path, page: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
    file.write_all(page.as_bytes())?;
    fs::rename(&new, path)
}

fn page(pods: &[(Pod, Option<Memory>)]) -> Result<String, std::fmt::Error> {
    let mut page = String::new();
    let version = env!("CARGO_PKG_VERSION");
    head(&mut page, "husk_build_info", "The version of the command.")?;
    writeln!(page, "husk_build_info{{version=\"{version}\"}} 1")?;
    head(&mut page, "husk_pods", "Pods on this node.")?;
    let all = [
        Status::Starting,
        Status::Running,
        Status::Ended,
        Status::Abandoned,
    ];
    for status in all {
        let count = pods.iter().filter(|(pod, _)| pod.status == status).count();
        writeln!(page, "husk_pods{{status=\"{}\"}} {count}", status.word())?;
    }
    let name = "husk_pod_memory_used_bytes";
    head(
        &mut page,
        name,
        "What a pod really uses of the node's memory.",
    )?;
    for (pod, memory) in pods {
        let Some(memory) = memory else { continue };
        for (part, kib) in [
            ("guest", memory.guest_kib),
            ("vmm", memory.vmm_kib),
            ("shim", memory.shim_kib),
            ("file_server", memory.file_server_kib),
        ] {
            let bytes = kib.saturating_mul(1024);
            writeln!(page, "{name}{{{},part=\"{part}\"}} {bytes}", labels(pod))?;
        }
    }
    let name = "husk_pod_memory_size_bytes";
    head(
        &mut page,
        name,
        "The memory that a pod's machine began with.",
    )?;
    for (pod, _) in pods {
        if let Some(machine) = &pod.state.machine {
            let bytes = u64::from(machine.memory_mib) << 20;
            writeln!(page, "{name}{{{}}} {bytes}", labels(pod))?;
        }
    }
    let name = "husk_pod_start_seconds";
    head(
        &mut page,
        name,
        "How long each stage of a pod's start took.",
    )?;
    for (pod, _) in pods {
        for stage in timeline::stages(&pod.state.timeline) {
            let ns = stage.to_ns - stage.from_ns;
            let (whole, rest) = (ns / 1_000_000_000, ns % 1_000_000_000);
            let key = stage.key;
            writeln!(
                page,
                "{name}{{{},stage=\"{key}\"}} {whole}.{rest:09}",
                labels(pod)
            )?;
        }
    }
    Ok(page)
}

fn head(page: &mut String, name: &str, help: &str) -> std::fmt::Result {
    writeln!(page, "# HELP {name} {help}\n# TYPE {name} gauge")
}

fn labels(pod: &Pod) -> String {
    let name = pod.name.as_deref().unwrap_or_default();
    let name: String = name.chars().take(512).collect();
    format!(
        "namespace=\"{}\",pod=\"{}\",name=\"{}\"",
        escape(&pod.namespace),
        escape(&pod.id),
        escape(&name)
    )
}

/// As the text format wants it; other control characters are none of a name's.
fn escape(value: &str) -> String {
    let mut escaped = String::new();
    for c in value.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::state::{MachineFacts, State, Timeline};

    #[test]
    fn every_line_is_a_sample() {
        let pod = Pod {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            name: Some("shop/we\"b\n\\".into()),
            dir: "/run/husk/k8s.io/abc".into(),
            state: State {
                machine: Some(MachineFacts {
                    memory_mib: 512,
                    ..MachineFacts::default()
                }),
                timeline: Timeline {
                    request_ns: 1,
                    vmm_exec_ns: 1_500_000_001,
                    ..Timeline::default()
                },
                ..State::default()
            },
            status: Status::Running,
        };
        let memory = Memory {
            guest_kib: 2,
            ..Memory::default()
        };
        let page = page(&[(pod, Some(memory))]).unwrap();
        let name = "name=\"shop/we\\\"b\\n\\\\\"";
        for line in [
            "husk_pods{status=\"running\"} 1".to_owned(),
            "husk_pods{status=\"ended\"} 0".to_owned(),
            format!(
                "husk_pod_memory_used_bytes{{namespace=\"k8s.io\",pod=\"abc\",{name},part=\"guest\"}} 2048"
            ),
            format!(
                "husk_pod_memory_size_bytes{{namespace=\"k8s.io\",pod=\"abc\",{name}}} 536870912"
            ),
            format!(
                "husk_pod_start_seconds{{namespace=\"k8s.io\",pod=\"abc\",{name},stage=\"node\"}} 1.500000000"
            ),
        ] {
            assert!(
                page.lines().any(|shown| shown == line),
                "{page} lacks {line}"
            );
        }
        let is_sound = |line: &str| line.starts_with("# ") || line.starts_with("husk_");
        assert!(page.lines().all(is_sound), "{page}");
    }
}
