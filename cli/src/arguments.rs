//! The command line. Its texts are the help, the manual pages and the
//! completions.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::traces::Endpoint;

/// Told by `--help` and in the manual pages.
const EXIT_CODES: &str = "\
Exit codes:
  0  done, and nothing that was looked at is wrong
  1  could not be done; standard error says why
  2  wrong usage
  3  no such pod, or several of that name
  4  something that was looked at is wrong: a check, or a configuration
exec and console end as what they ran; 125 where nothing was run, 126 and 127
where it could not be run or was not found";

/// Installs Husk on a node and looks into its pods
#[derive(Debug, Parser)]
#[command(name = "husk", version, after_help = EXIT_CODES, max_term_width = 100)]
#[command(disable_help_subcommand = true)]
pub struct Arguments {
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the pods on this node, with their machines
    Ps,
    /// Show everything about a pod's machine
    Inspect {
        /// Its id or the beginning of it, or NAMESPACE/NAME in Kubernetes
        pod: String,
    },
    /// Show where the start of a pod spent its time
    Timeline {
        /// Its id or the beginning of it, or NAMESPACE/NAME in Kubernetes
        pod: String,
        /// Draw it as SVG
        #[arg(long, conflicts_with = "json")]
        svg: bool,
    },
    /// Show what the shim, the guest's kernel and the agent of a pod logged, also of one that is gone
    Logs(LogArguments),
    /// Tell what happens to the pods on this node, line by line, until it is interrupted
    ///
    /// First it tells which pods are there. With --json, each line is an object.
    Events {
        /// Only of this pod: its id or the beginning of it, or NAMESPACE/NAME in Kubernetes
        pod: Option<String>,
    },
    /// Show what the pods on this node use of it, again and again until it is interrupted
    ///
    /// Processors, memory, disks, and how often guests are left for the node's work
    /// (where debugfs is mounted). With --json, each line is an object.
    Top(TopArguments),
    /// Print metrics of the pods in the text format of Prometheus
    Metrics(MetricsArguments),
    /// Tell what containerd asks of pods, and where that spends its time, as spans of OpenTelemetry
    ///
    /// Of what happens from then on, until it is interrupted. Where containerd traces, its
    /// requests to pods are parts of its traces; else each start is a trace of its own. Spans
    /// are in OTLP's JSON, on one line what has come together.
    Traces {
        /// Send them there instead of printing them; the host is an address or localhost
        #[arg(long, value_name = "http://HOST:4318")]
        otlp: Option<Endpoint>,
    },
    /// Write an archive for a bug report
    ///
    /// Of containerd's configuration, what looks like a secret is left out. The logs
    /// have what guests print on their consoles, whatever that is: look through the
    /// archive before you pass it on.
    SupportBundle {
        /// Where to; without it, husk-support-TIME.tar in the working directory
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Leave the logs out, and with them what guests print
        #[arg(long)]
        no_logs: bool,
    },
    /// Run a program in a pod's guest itself, beside its containers
    ///
    /// Only where the configuration has `debug_shell = true`, and in pods that began
    /// since. The guest has the programs of busybox, and the containers' files below
    /// /run/husk/shared. What it prints reaches this terminal as it is.
    Exec(ExecArguments),
    /// Open a shell in a pod's guest itself; Ctrl-] leaves it where it does not answer
    ///
    /// As `husk exec -it POD -- sh` does.
    Console {
        /// Its id or the beginning of it, or NAMESPACE/NAME in Kubernetes
        pod: String,
    },
    /// Look at the booted machines from which pods begin, make and drop them
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Start containers of an image with ctr, and tell what that took
    ///
    /// One a round, and one with runc in turns with it where that is asked for; a first
    /// round is not counted. Times are medians. Pods that began as copies of a template
    /// and those whose machine booted are told apart. Each container is removed at once;
    /// one may be left, named husk-bench-…, where this is killed or interrupted.
    Bench(BenchArguments),
    /// Let containerd, Docker and CRI-O know Husk
    Install {
        /// Let pods choose the size of their machine by annotations (io.husk.*)
        #[arg(long)]
        pod_annotations: bool,
        /// Where.
        #[command(flatten)]
        place: Place,
    },
    /// Take back what `husk install` did
    Uninstall(Place),
    /// Print the completions for a shell
    Completions {
        /// Which one
        shell: Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// It must be there
        dir: PathBuf,
    },
    /// Tell whether this node can run pods, and what to do where it cannot
    Check,
    /// Show the configuration in effect, and where each value was said
    Config(ConfigArguments),
}

/// What to run where.
#[derive(Debug, Args)]
pub struct ExecArguments {
    /// Pass standard input on
    #[arg(long, short = 'i')]
    pub stdin: bool,
    /// Give it a terminal; with -i, too, keys are the program's, and Ctrl-] leaves it where
    /// it does not answer
    #[arg(long, short = 't')]
    pub tty: bool,
    /// Its id or the beginning of it, or NAMESPACE/NAME in Kubernetes
    pub pod: String,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub args: Vec<String>,
}

/// What to start, and how often.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Rounds that count
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: u32,
    /// Start one with runc, too, in each round
    #[arg(long)]
    pub runc: bool,
    /// The namespace of containerd that has the image
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub namespace: String,
    /// The image, as `ctr images list` names it; nothing is pulled
    pub image: String,
    /// What to run instead of what the image says
    #[arg(last = true, value_name = "COMMAND")]
    pub args: Vec<String>,
}

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List them: size, age, pods that began as their copies, whether they fit what is installed
    List,
    /// Make the one that pods would begin as, unless it is there
    Build,
    /// Drop them; pods that run keep what they have
    Drop {
        /// Only the one whose name begins so
        name: Option<String>,
    },
}

/// How often.
#[derive(Debug, Args)]
pub struct TopArguments {
    /// Seconds from one look to the next
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub interval: u32,
    /// End after so many looks
    #[arg(long, short = 'n', value_name = "COUNT")]
    pub count: Option<u64>,
}

/// Where metrics go.
#[derive(Debug, Args)]
pub struct MetricsArguments {
    /// Replace FILE instead, for node-exporter's textfile collector
    #[arg(long, value_name = "FILE", conflicts_with = "listen")]
    pub output: Option<PathBuf>,
    /// Serve them at http://ADDRESS:PORT/metrics until interrupted, with histograms of starts
    ///
    /// Whoever can reach it learns the names of pods and what they use.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
}

/// Which logs.
#[derive(Debug, Args)]
pub struct LogArguments {
    /// Its id or the beginning of it, or NAMESPACE/NAME in Kubernetes while it is there
    pub pod: String,
    /// Read containerd's log here instead of in the journal
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Only what is not older, as journalctl understands it
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    pub since: Option<String>,
    /// At most so many of the last lines
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 1000)]
    pub lines: usize,
}

/// Where to install what.
#[derive(Debug, Args)]
pub struct Place {
    /// Only for this engine; without it, for each that is on the node
    #[arg(long = "for", value_name = "ENGINE", value_enum)]
    pub engines: Vec<Engine>,
    /// Name for RuntimeClass and for `docker run --runtime`
    #[arg(long, default_value = "husk")]
    pub handler: String,
    /// The node's file system, where it is not this one; nothing is restarted then
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
    /// Tell what would be written
    #[arg(long)]
    pub dry_run: bool,
    /// Restart engines (Docker: reload) without asking; else it is asked, or left when nobody can be
    #[arg(long, short = 'y', conflicts_with = "no_restart")]
    pub yes: bool,
    /// Restart nothing
    #[arg(long)]
    pub no_restart: bool,
}

/// A container engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// containerd, for Kubernetes and nerdctl
    Containerd,
    /// Docker
    Docker,
    /// CRI-O
    Crio,
}

impl Engine {
    /// Its unit of systemd.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Crio => "crio",
        }
    }

    /// How it reads its configuration again while its containers go on: those of
    /// Docker end with it, but it reads runtimes when it is asked to.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Docker => "reload",
            Self::Containerd | Self::Crio => "restart",
        }
    }
}

/// What to do with the configuration.
#[derive(Debug, Args)]
pub struct ConfigArguments {
    /// Tell instead everything that is wrong in FILE
    #[arg(long, value_name = "FILE", conflicts_with = "reference")]
    pub check: Option<PathBuf>,
    /// Print the reference of all keys, in Markdown
    #[arg(long, conflicts_with = "json")]
    pub reference: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn takes_json_anywhere() {
        for line in [["husk", "--json", "ps"], ["husk", "ps", "--json"]] {
            assert!(Arguments::try_parse_from(line).unwrap().json);
        }
    }
}
