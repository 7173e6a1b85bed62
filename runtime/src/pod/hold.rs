//! What a machine that does not end keeps from others: disks and devices of the node,
//! which it may still write to.

use std::time::Duration;

use tokio::time::sleep;

use crate::process::Process as HostProcess;

/// Pause between two looks whether a VMM that hangs has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Waits for the end of a process that the kernel keeps for nobody knows how long.
pub(super) async fn ended(process: HostProcess) {
    while process.is_alive() {
        sleep(LOOK_AGAIN).await;
    }
}
