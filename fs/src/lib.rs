//! Husk's file server: shows a pod's root file systems and volumes to its VM
//! over virtio-fs (FUSE in a virtqueue, vhost-user to the VMM).
//!
//! [`server`] speaks FUSE and knows nothing of virtio; everything below it is
//! one noun each.
//!
//! What a guest can make the server hold, and where that ends:
//!
//! | what | bound | shown by |
//! | --- | --- | --- |
//! | files that it knows and does not forget | `--nodes`, which the shim makes one for each KiB of the guest's memory; less than half a KiB each | `a_guest_knows_so_many_files_and_no_more`, `so_many_are_known_and_no_more`, `a_known_file_costs_half_a_kib` |
//! | references to them | `REFERENCES` of [`jail`], unless they have no name any more | `ten_thousand_files`, `a_known_file_costs_half_a_kib` |
//! | files without a name, open files, open directories | together `DESCRIPTORS` of [`jail`], then `ENFILE` | `removed_files_end_with_the_descriptors`, `open_files_end_with_the_descriptors`, `the_process_keeps_little` |
//! | what listings have read ahead | `READING` of [`handle`], `CHUNK_BYTES` of [`directory`] each | `listings_hold_little_however_many_are_open` |
//! | what is known of devices | those of the mounts since the last change of these | |
//! | arguments and answers | one request at a time: `ARGUMENT_BYTES` of [`server`], 64 KiB of names or of an attribute; data goes between file and guest memory | `nonsense_is_answered_with_errors` |
//! | pieces of a message | [`buffers::MOST_PIECES`] | `bounds_the_number_of_pieces` |
//! | requests that wait | none here: they stay in the guest's queues, whose turns are bounded in [`vhost_user`] | `broken_chains_cost_the_guest_alone` |
//! | locks | none: they are the guest's kernel's | `locks_hold_within_the_guest` |
//! | queues and regions of memory, by the front end | `QUEUES` and `MEMORY_REGIONS` of [`vhost_user`] | `fuzz/fuzz_targets/vhost_user.rs` |
//! | room on the node's disks | none: quotas hold for the files' owners | |
//!
//! The server is in the pod's cgroup, whose limit holds for all of it.

pub mod abi;
pub mod area;
pub mod buffers;
pub mod credentials;
pub mod directory;
pub mod handle;
pub mod host;
pub mod jail;
pub mod mount_table;
pub mod name;
pub mod node;
pub mod seccomp;
pub mod server;
pub mod vhost_user;
