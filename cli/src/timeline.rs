//! `husk timeline`: the stages of a pod's start.

use serde_json::{Value, json};

use husk_node::state::Timeline;

use crate::answer::Answer;
use crate::pods;
use crate::text;

mod svg;

/// Columns of the chart's bars.
const COLUMNS: u64 = 40;

/// The stages of a start that are over when the first container's program runs.
pub const OF_START: [&str; 6] = ["node", "vmm-spec", "vmm-build", "guest", "create", "start"];

/// A part of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its name for programs.
    pub key: &'static str,
    /// Its name for people.
    pub what: &'static str,
    /// Since containerd's request.
    pub from_ns: u64,
    /// The same, of its end.
    pub to_ns: u64,
}

/// Shows the start of a pod.
///
/// # Errors
/// There is no such pod.
pub fn run(pod: &str, svg: bool, json: bool) -> anyhow::Result<Answer> {
    let pod = pods::find(&pods::state_dir()?, pod)?;
    let stages = stages(&pod.state.timeline);
    let title = pod.title();
    if json {
        return Answer::json(&value(&pod.id, &stages));
    }
    Ok(Answer::done(match svg {
        true => svg::draw(&title, &stages),
        false => chart(&title, &stages),
    }))
}

/// Those that are over, in their order.
pub fn stages(timeline: &Timeline) -> Vec<Stage> {
    let moments = [
        (
            "node",
            "node: mounts, network, VMM's program",
            timeline.vmm_exec_ns,
        ),
        (
            "vmm-spec",
            "VMM: confinement, specification",
            timeline.vmm_spec_ns,
        ),
        (
            "vmm-build",
            "VMM: the machine is built",
            timeline.guest_entered_ns,
        ),
        ("guest", "guest: kernel and agent", timeline.agent_ready_ns),
        (
            "create",
            "first container: created",
            timeline.container_created_ns,
        ),
        (
            "start",
            "first container: executed",
            timeline.container_started_ns,
        ),
        (
            "output",
            "first container: first output",
            timeline.first_output_ns,
        ),
    ];
    let mut stages = Vec::new();
    let mut from_ns = 0;
    for (key, what, moment) in moments {
        // Not yet, or of another clock.
        let since = moment.checked_sub(timeline.request_ns);
        let Some(to_ns) = since.filter(|_| moment > 0) else {
            continue;
        };
        // Two may overlap: containers are made while the machine boots.
        let to_ns = to_ns.max(from_ns);
        let stage = Stage {
            key,
            what,
            from_ns,
            to_ns,
        };
        stages.push(stage);
        from_ns = to_ns;
    }
    stages
}

pub fn value(pod: &str, stages: &[Stage]) -> Value {
    let stages: Vec<Value> = stages
        .iter()
        .map(|stage| json!({ "stage": stage.key, "what": stage.what, "from_ns": stage.from_ns, "to_ns": stage.to_ns }))
        .collect();
    json!({ "pod": pod, "stages": stages })
}

/// A length of time, to a tenth.
pub fn milliseconds(ns: u64) -> String {
    format!("{}.{} ms", ns / 1_000_000, ns / 100_000 % 10)
}

fn whole_ns(stages: &[Stage]) -> u64 {
    stages.last().map_or(0, |stage| stage.to_ns).max(1)
}

fn chart(title: &str, stages: &[Stage]) -> String {
    let whole = whole_ns(stages);
    // Of numbers this large no product may be made in 64 bits.
    let column = |ns: u64| {
        let column = u128::from(ns) * u128::from(COLUMNS) / u128::from(whole);
        usize::try_from(column).unwrap_or_default()
    };
    let rows: Vec<_> = stages
        .iter()
        .map(|stage| {
            let (from, to) = (column(stage.from_ns), column(stage.to_ns));
            let bar = "█".repeat((to - from).max(1));
            vec![
                stage.what.to_owned(),
                milliseconds(stage.to_ns - stage.from_ns),
                milliseconds(stage.to_ns),
                " ".repeat(from) + &bar,
            ]
        })
        .collect();
    let title = text::short(title);
    if rows.is_empty() {
        return format!("{title}: nothing has happened yet\n");
    }
    format!(
        "{title}\n{}",
        text::table(&["STAGE", "TOOK", "AT", ""], &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline() -> Timeline {
        let at = |ms: u64| 5_000_000_000 + ms * 1_000_000;
        Timeline {
            request_ns: at(0),
            vmm_exec_ns: at(10),
            vmm_spec_ns: at(20),
            guest_entered_ns: at(30),
            agent_began_ns: at(100),
            agent_ready_ns: at(130),
            container_created_ns: at(120),
            container_started_ns: at(200),
            first_output_ns: 0,
        }
    }

    #[test]
    fn stages_follow_each_other() {
        let stages = stages(&timeline());
        let took: Vec<_> = stages
            .iter()
            .map(|s| (s.to_ns - s.from_ns) / 1_000_000)
            .collect();
        // What was done before it was asked for took no time of its own.
        assert_eq!(took, [10, 10, 10, 100, 0, 70]);
        let keys: Vec<_> = stages.iter().map(|stage| stage.key).collect();
        assert_eq!(keys, OF_START);
        assert_eq!(super::stages(&Timeline::default()).len(), 0);
    }

    #[test]
    fn draws_what_took_long_long() {
        let text = chart("shop/\x1bweb", &stages(&timeline()));
        assert!(text.starts_with("shop/\\u{1b}web\n"), "{text}");
        let guest = text.lines().find(|line| line.starts_with("guest")).unwrap();
        assert!(guest.contains("100.0 ms  130.0 ms"), "{guest}");
        assert_eq!(guest.matches('█').count(), 20, "{guest}");
        let drawn = svg::draw("<a&b>", &stages(&timeline()));
        assert!(drawn.contains("&lt;a&amp;b&gt;") && !drawn.contains("<a&b>"));
        assert_eq!(drawn.matches("<rect").count(), 7);
        assert!(chart("p", &[]).contains("nothing has happened"));
        svg::draw("p", &[]);
    }

    #[test]
    fn odd_clocks_break_nothing() {
        let odd = Timeline {
            request_ns: 1,
            vmm_exec_ns: u64::MAX,
            ..Timeline::default()
        };
        assert_eq!(stages(&odd).len(), 1);
        chart("p", &stages(&odd));
        svg::draw("p", &stages(&odd));
    }
}
