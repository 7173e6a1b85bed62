//! Disks and mounts that do not answer: the agent does, and what waited for them is
//! over in time.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use husk_protocol::agent::{
    BindStorage, BlockStorage, CreateSandboxRequest, DeleteContainerRequest, RemoveDeviceRequest,
    Storage, TmpfsStorage, remove_device_request, storage,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use ttrpc::Code;

use crate::agent::{Agent, context, skip, status, unable, within};
use crate::agent_test;
use crate::storage::at;

/// What takes longer has waited for something that hangs.
const AT_ONCE: Duration = Duration::from_secs(5);

fn disk(serial: &str) -> Storage {
    let block = BlockStorage {
        serial: serial.to_owned(),
        ..Default::default()
    };
    at("/run/husk/disk", storage::Source::Block(block))
}

/// Others are served meanwhile.
async fn others_are_served(agent: &Agent) {
    let began = Instant::now();
    assert_eq!(agent.wait_for_calm().await.exit_code, 0);
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_disk_that_does_not_answer_holds_up_nobody() {
    if let Some(reason) = unable() {
        skip("disks that hang", &reason);
        return;
    }
    // A pipe without a writer is a file that is never read to its end.
    let disks = "mount -t tmpfs none /sys/block; cd /sys/block; mkdir first wanted last; \
        mkfifo first/serial last/serial; echo wanted > wanted/serial; echo 7:0 > wanted/dev; cd /";
    let agent = Agent::start_with(disks).await;
    let request = CreateSandboxRequest::default();
    let created = agent.client.create_sandbox(context(), &request);
    created.await.unwrap();

    let spec = agent.spec(&["/bin/true"]);
    let began = Instant::now();
    let made = agent.create_with("a", &spec, vec![disk("wanted")]).await;
    made.unwrap();
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());

    let removal = RemoveDeviceRequest {
        device: Some(remove_device_request::Device::BlockSerial(
            "other".to_owned(),
        )),
        ..Default::default()
    };
    let (made, removed, ()) = tokio::join!(
        agent.create_with("b", &spec, vec![disk("other")]),
        agent.client.remove_device(context(), &removal),
        others_are_served(&agent),
    );
    for error in [made.err().unwrap(), removed.err().unwrap()] {
        let text = "block device \"other\" did not appear within 10 s";
        assert_eq!(status(error), (Code::DEADLINE_EXCEEDED, text.to_owned()));
    }
    agent.delete("a").await;
}

agent_test! {
    async fn a_creation_ends_with_its_deletion_though_a_mount_hangs(agent: Agent) {
        let before = agent.mounts();
        let file = agent.directory.path().join("file");
        fs::write(&file, "").unwrap();
        // Whoever opens it to write waits for a reader.
        let hung = agent.directory.path().join("hung");
        mknodat(CWD, &hung, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let bind = BindStorage {
            source: file.display().to_string(),
            ..Default::default()
        };
        let storages = vec![
            at("/run/husk/volumes/first", storage::Source::Tmpfs(TmpfsStorage::default())),
            at(hung.to_str().unwrap(), storage::Source::Bind(bind)),
        ];
        let first = "/run/husk/volumes/first ";
        let deletion = async {
            within("the first mount", async {
                while !agent.mounts().contains(first) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
            others_are_served(&agent).await;
            let began = Instant::now();
            let request = DeleteContainerRequest {
                container_id: "a".to_owned(),
                ..Default::default()
            };
            agent.client.delete_container(context(), &request).await.unwrap();
            assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
        };
        let spec = agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"]);
        let (created, ()) = tokio::join!(agent.create_with("a", &spec, storages), deletion);
        let (_, text) = status(created.err().unwrap());
        assert_eq!(text, "the process was given up while it was being made");
        // What hangs keeps nothing else mounted, nor the id.
        within("the first mount's end", async {
            while agent.mounts().contains(first) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        agent.run("a", &spec).await.read_until("ready").await;
        agent.delete("a").await;
        // It ends at last, and nothing is left of it either.
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&hung);
        let _reader = reader.unwrap();
        within("the late mount's end", async {
            while hung.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(agent.mounts(), before);
    }
}
