//! Paths inside the guest that both sides name.

/// Everything of ours in the guest lives below this.
pub const RUN: &str = "/run/husk";

/// Where the agent mounts the pod's shared virtio-fs tree.
pub const SHARED: &str = "/run/husk/shared";

/// One directory a container: `<CONTAINERS>/<id>/rootfs`, its volumes beside.
pub const CONTAINERS: &str = "/run/husk/containers";

/// One directory a volume whose files the shim sends: `<VOLUMES>/<id>`.
pub const VOLUMES: &str = "/run/husk/volumes";

/// Tag of the pod's virtio-fs device.
pub const SHARED_TAG: &str = "husk";

/// Word of the kernel's command line by which the agent serves debug shells.
pub const DEBUG_SHELL: &str = "husk.debug_shell=1";

/// The pod's `resolv.conf`, `hosts` and `hostname` as the agent wrote them.
pub const SANDBOX: &str = "/run/husk/sandbox";
