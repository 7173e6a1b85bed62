//! containerd's shim for Husk: one process a pod, which runs the pod's
//! containers in a virtual machine.

use std::env;
use std::error::Error;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use flags::Invocation;
use husk_node::{config, process};

mod agent_client;
mod blocking;
mod bundle;
mod cgroup;
mod child;
mod cleanup;
mod clock;
mod container;
mod container_files;
mod daemon;
mod debug_shell;
mod descriptors;
mod device;
mod disk;
mod error;
mod event;
mod file_server;
mod flags;
mod forward;
mod growth;
mod guest_image;
mod hook;
mod host_mount;
mod id;
mod id_map;
mod info;
mod interfaces;
mod joined;
mod log;
mod lower_layers;
mod machine;
mod mapped_overlay;
mod mirror;
mod mount_copy;
mod mounts_below;
mod names;
mod network;
mod pace;
mod pod;
mod pod_config;
mod ports;
mod rootfs;
mod sandbox_service;
mod second_line;
mod serve;
mod shared_tree;
mod shared_volume;
mod socket;
mod stand_in;
mod start;
mod state_dir;
mod stdio;
mod task_service;
mod template;
mod trace;
mod vfio;
mod vm_plan;
mod vm_process;
mod volume;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("containerd-shim-husk-v2: {}", error::chain(&*error));
            // containerd puts the text into the middle of its own error.
            if io::stderr().is_terminal() {
                eprintln!();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    match flags::parse(env::args().skip(1))? {
        Invocation::Version => println!("containerd-shim-husk-v2 {}", env!("CARGO_PKG_VERSION")),
        Invocation::Info => info::print()?,
        Invocation::Start(flags) => start::start(&flags)?,
        Invocation::Delete(flags) => cleanup::delete(&flags)?,
        Invocation::Template(memory_mib) => template::make::run(memory_mib)?,
        Invocation::TemplateNames => info::print_templates()?,
        Invocation::Serve(flags) => serve::serve(&flags)?,
    }
    Ok(())
}
