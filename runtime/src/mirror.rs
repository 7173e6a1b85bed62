//! Volumes that programs watch: ConfigMaps, Secrets, projections. The kernel of
//! a guest cannot know what the node changes in a directory that is shared with
//! it, so nobody who waits for a change (inotify) would ever hear of one. These
//! volumes are small and only read, so the guest gets a copy of their files, and
//! the agent makes each change to the copy as it is made here.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use husk_protocol::agent::VolumeEntry;
use husk_protocol::path;
use tokio::sync::OnceCell;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::agent_client::{Agent, AgentError};
use crate::blocking;
use crate::id_map::IdMaps;

mod snapshot;
mod watch;

use snapshot::{DirectoryId, snapshot};
use watch::{Watch, Watches};

/// The kubelet's volumes of files that follow objects of the API.
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~downward-api",
    "kubernetes.io~projected",
    "kubernetes.io~secret",
];

/// How long one change may take: the kubelet makes several calls of it.
const SETTLED: Duration = Duration::from_millis(20);

/// All such volumes of a pod.
#[derive(Debug, Default)]
pub struct PodMirrors {
    last: AtomicU32,
    shared: Mutex<BTreeMap<Original, Weak<Mirror>>>,
    watches: OnceLock<Watches>,
    unused: Arc<Unused>,
}

/// Ids of the copies that the guest has and nobody uses any more.
type Unused = Mutex<Vec<String>>;

/// Of what it is a copy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Original {
    directory: PathBuf,
    id: DirectoryId,
    /// How the owners appear, if not as they are.
    id_maps: Option<IdMaps>,
}

/// A container's use of one, until it is dropped. What the last one leaves has to
/// be taken from the guest ([`PodMirrors::remove_unused`]).
#[derive(Debug)]
pub struct MirrorUse(Arc<Mirror>);

#[derive(Debug)]
struct Mirror {
    id: String,
    original: Original,
    /// Until the guest has it: what it gets, and what tells of changes since.
    begun: Mutex<Option<(Vec<VolumeEntry>, Watch)>>,
    follower: OnceCell<Follower>,
    /// The guest has been told of it.
    was_told: AtomicBool,
    unused: Arc<Unused>,
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if *self.was_told.get_mut() {
            let mut unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner);
            unused.push(std::mem::take(&mut self.id));
        }
    }
}

/// What brings changes to the guest; until it is dropped.
#[derive(Debug)]
struct Follower(AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the API server puts into every pod: clients look at it now and then.
const TOKENS: &str = "kube-api-access-";

/// Pauses, the first and the longest, before a change is tried again that the
/// guest did not take.
const AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(120)];

/// The directory is a volume of the kubelet's that follows an object of the API:
/// `volumes/<kind>/<name>`.
pub fn is_watched(source: &Path) -> bool {
    let kind = source.parent().unwrap_or(source);
    let is_kind = KINDS.iter().any(|known| kind.ends_with(known));
    let volumes = kind.parent().unwrap_or(kind);
    let name = source.file_name().unwrap_or_default().as_bytes();
    let is_other = !name.is_empty() && !name.starts_with(TOKENS.as_bytes());
    is_kind && volumes.ends_with("volumes") && is_other
}

impl PodMirrors {
    /// The copy of what is in `source`, with the owners that `id_maps` make of those
    /// it has, unless that is too much, something else than files, directories and
    /// links, or cannot be watched.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn share(&self, source: &Path, id_maps: Option<IdMaps>) -> io::Result<Option<MirrorUse>> {
        let original = Original {
            directory: source.to_owned(),
            id: DirectoryId::of(source)?,
            id_maps,
        };
        let mut shared = self.lock();
        let mirror = match shared.get(&original).and_then(Weak::upgrade) {
            Some(mirror) => mirror,
            None => {
                // From here on no change is lost.
                let watch = match self.watch(source) {
                    Ok(watch) => watch,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                    Err(error) => {
                        let at = source.display();
                        tracing::warn!("{at}: shared without word of changes (inotify): {error}");
                        return Ok(None);
                    }
                };
                let Some(entries) = original.look()? else {
                    return Ok(None);
                };
                // Ids are not used again: the guest may still have the old ones.
                let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
                let mirror = Arc::new(Mirror {
                    id: number.to_string(),
                    original: original.clone(),
                    begun: Mutex::new(Some((entries, watch))),
                    follower: OnceCell::new(),
                    was_told: AtomicBool::new(false),
                    unused: Arc::clone(&self.unused),
                });
                shared.retain(|_, mirror| mirror.strong_count() > 0);
                shared.insert(original, Arc::downgrade(&mirror));
                mirror
            }
        };
        Ok(Some(MirrorUse(mirror)))
    }

    /// Takes from the guest what nobody uses any more.
    pub async fn remove_unused(&self, agent: &Agent) {
        let unused = || self.unused.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = std::mem::take(&mut *unused());
        for id in ids {
            if let Err(error) = agent.remove_volume(&id).await {
                tracing::warn!(id, %error, "volume");
            }
        }
    }

    fn watch(&self, directory: &Path) -> io::Result<Watch> {
        let watches = match self.watches.get() {
            Some(watches) => watches,
            None => {
                let made = Watches::new()?;
                self.watches.get_or_init(|| made)
            }
        };
        watches.add(directory)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Original, Weak<Mirror>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Original {
    fn look(&self) -> io::Result<Option<Vec<VolumeEntry>>> {
        let mut seen = snapshot(&self.directory, self.id)?;
        if let Some(maps) = &self.id_maps {
            for entry in seen.iter_mut().flatten() {
                (entry.uid, entry.gid) = maps.outside(entry.uid, entry.gid);
            }
        }
        Ok(seen)
    }
}

impl MirrorUse {
    /// Where the guest has it.
    pub fn guest_path(&self) -> String {
        format!("{}/{}", path::VOLUMES, self.0.id)
    }

    /// Gives the guest its copy, unless another container's use has, and from
    /// then on what changes.
    ///
    /// # Errors
    /// As the agent says.
    pub async fn fill(&self, agent: &Agent) -> Result<(), AgentError> {
        let mirror = &self.0;
        mirror.was_told.store(true, Ordering::Relaxed);
        let begin = || async {
            let begun = || mirror.begun.lock().unwrap_or_else(PoisonError::into_inner);
            let (entries, watch) = begun().take().ok_or(AgentError::Gone)?;
            if let Err(error) = agent.set_volume(&mirror.id, entries.clone()).await {
                // For whoever else uses it.
                *begun() = Some((entries, watch));
                return Err(error);
            }
            let (id, original) = (mirror.id.clone(), mirror.original.clone());
            let following = follow(watch, original, id, Digest::of(&entries), agent.clone());
            Ok::<_, AgentError>(Follower(tokio::spawn(following).abort_handle()))
        };
        mirror.follower.get_or_try_init(begin).await?;
        Ok(())
    }
}

/// What tells a version of the files from others, without keeping it: nobody can
/// choose files for it, since nobody knows its key.
#[derive(Debug)]
struct Digest {
    key: RandomState,
    number: u64,
}

impl Digest {
    fn of(entries: &[VolumeEntry]) -> Self {
        let key = RandomState::new();
        let number = Self::number(&key, entries);
        Self { key, number }
    }

    fn is_of(&self, entries: &[VolumeEntry]) -> bool {
        self.number == Self::number(&self.key, entries)
    }

    fn number(key: &RandomState, entries: &[VolumeEntry]) -> u64 {
        let mut hasher = key.build_hasher();
        for entry in entries {
            (&entry.path, entry.mode, entry.uid, entry.gid).hash(&mut hasher);
            (&entry.target, &entry.content).hash(&mut hasher);
        }
        hasher.finish()
    }
}

async fn set(agent: &Agent, id: &str, entries: Vec<VolumeEntry>) -> Result<Digest, AgentError> {
    let digest = Digest::of(&entries);
    agent.set_volume(id, entries).await?;
    Ok(digest)
}

/// When to look again at what the guest does not have yet; nobody tells of the same
/// change twice.
#[derive(Debug)]
struct Late {
    is_late: bool,
    pause: Duration,
}

impl Late {
    fn new() -> Self {
        let [pause, _] = AGAIN;
        Self {
            is_late: false,
            pause,
        }
    }

    fn failed(&mut self) {
        let [_, longest] = AGAIN;
        if self.is_late {
            self.pause = (self.pause * 2).min(longest);
        }
        self.is_late = true;
    }
}

/// Makes each change on the node one in the guest.
async fn follow(watch: Watch, original: Original, id: String, mut last: Digest, agent: Agent) {
    let mut late = Late::new();
    loop {
        let changed = match late.is_late {
            false => watch.changed().await,
            true => timeout(late.pause, watch.changed()).await.unwrap_or(true),
        };
        if !changed {
            return;
        }
        sleep(SETTLED).await;
        let (now, at) = (original.clone(), original.directory.display());
        let seen = blocking::run(move || now.look()).await;
        match seen.and_then(|seen| seen) {
            Ok(Some(entries)) if last.is_of(&entries) => late.is_late = false,
            Ok(Some(entries)) => match set(&agent, &id, entries).await {
                Ok(now) => {
                    last = now;
                    late = Late::new();
                }
                Err(AgentError::Gone) => return,
                Err(error) => {
                    tracing::warn!("{at}: the guest does not take a change: {error}");
                    late.failed();
                }
            },
            Ok(None) => tracing::warn!("{at}: too large now for the guest to follow"),
            Err(error) => {
                tracing::warn!("{at}: {error}");
                late.failed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_kubelets_volumes() {
        let pods = Path::new("/var/lib/kubelet/pods/u/volumes");
        assert!(is_watched(&pods.join("kubernetes.io~configmap/settings")));
        assert!(is_watched(&pods.join("kubernetes.io~projected/token")));
        for other in [
            "kubernetes.io~empty-dir/cache",
            "kubernetes.io~configmap",
            "kubernetes.io~configmap/settings/below",
            "kubernetes.io~projected/kube-api-access-x7k2p",
        ] {
            assert!(!is_watched(&pods.join(other)), "{other}");
        }
        assert!(!is_watched(Path::new("/data/kubernetes.io~secret/x")));
    }

    #[test]
    fn a_digest_is_of_everything() {
        let entry = |change: fn(&mut VolumeEntry)| {
            let mut entry = VolumeEntry {
                path: "a".into(),
                ..VolumeEntry::default()
            };
            change(&mut entry);
            [entry]
        };
        let digest = Digest::of(&entry(|_| {}));
        assert!(digest.is_of(&entry(|_| {})));
        let changes: [fn(&mut VolumeEntry); 6] = [
            |entry| entry.path = "b".into(),
            |entry| entry.mode = 1,
            |entry| entry.uid = 1,
            |entry| entry.gid = 1,
            |entry| entry.target = "b".into(),
            |entry| entry.content = b"b".to_vec(),
        ];
        for change in changes {
            assert!(!digest.is_of(&entry(change)));
        }
    }

    #[test]
    fn owners_appear_as_the_maps_say() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), "text").unwrap();
        let own = std::fs::metadata(dir.path()).unwrap();
        let mut options: Vec<String> = vec![
            format!("uidmap={}:100000:1", own.uid()),
            format!("gidmap={}:100000:1", own.gid() + 1),
        ];
        let original = Original {
            directory: dir.path().to_owned(),
            id: DirectoryId::of(dir.path()).unwrap(),
            id_maps: IdMaps::take_from(&mut options).unwrap(),
        };
        let entries = original.look().unwrap().unwrap();
        let owners = entries.iter().map(|entry| (entry.uid, entry.gid));
        let nobodys = (100_000, 65_534);
        assert_eq!(owners.collect::<Vec<_>>(), [nobodys, nobodys]);
    }

    #[tokio::test]
    async fn a_volume_is_one_copy_as_long_as_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodMirrors::default();
        let share = || pod.share(dir.path(), None).unwrap().unwrap();
        let (first, second) = (share(), share());
        assert_eq!(first.guest_path(), second.guest_path());
        drop(first);
        assert_eq!(share().guest_path(), second.guest_path());
        let before = second.guest_path();
        drop(second);
        assert_ne!(share().guest_path(), before);
        assert!(pod.share(&dir.path().join("missing"), None).is_err());
    }
}
