//! User and group ids of a container, as the guest's first user namespace has
//! them.

use super::launch;
use crate::error::{Error, OsError};
use crate::init::namespaces;
use crate::oci::{IdMapping, NamespaceKind, Spec, User};

/// The maps of a container's user namespace; without one, ids are themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMaps {
    maps: Option<(Vec<IdMapping>, Vec<IdMapping>)>,
}

impl IdMaps {
    /// Those of a spec.
    pub fn from_spec(spec: &Spec) -> Result<Self, Error> {
        if namespaces::find(spec, NamespaceKind::User).is_none() {
            return Ok(Self::default());
        }
        let linux = &spec.linux;
        Self::new(linux.uid_mappings.clone(), linux.gid_mappings.clone())
    }

    /// Both maps.
    pub fn new(users: Vec<IdMapping>, groups: Vec<IdMapping>) -> Result<Self, Error> {
        if users.is_empty() || groups.is_empty() {
            return Err(Error::Invalid {
                field: "linux.uidMappings",
                reason: "a user namespace needs maps of users and groups".to_owned(),
            });
        }
        Ok(Self {
            maps: Some((users, groups)),
        })
    }

    /// Gives them to the user namespace that a process has just made.
    pub fn write(&self, pid: i32) -> Result<(), OsError> {
        let Some((users, groups)) = &self.maps else {
            return Ok(());
        };
        launch::write_id_maps(pid, users, groups)
    }

    /// Who is root inside.
    pub fn root(&self) -> Option<u32> {
        let (users, _) = self.maps.as_ref()?;
        find(users, 0)
    }

    /// A user's ids outside of the container.
    pub fn outside(&self, user: &User) -> Result<(u32, u32), Error> {
        // To the kernel the highest number means that nothing changes.
        if user.uid == u32::MAX || user.gid == u32::MAX {
            return Err(Error::Invalid {
                field: "process.user",
                reason: format!("{}:{} is no user", user.uid, user.gid),
            });
        }
        let Some((users, groups)) = &self.maps else {
            return Ok((user.uid, user.gid));
        };
        match (find(users, user.uid), find(groups, user.gid)) {
            (Some(uid), Some(gid)) => Ok((uid, gid)),
            _ => Err(Error::Invalid {
                field: "process.user",
                reason: format!("{}:{} is in no map", user.uid, user.gid),
            }),
        }
    }
}

fn find(maps: &[IdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id)?;
        (offset < map.size).then(|| map.host_id.checked_add(offset))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_mapped_by_the_range_that_has_them() {
        let maps: Vec<IdMapping> = serde_json::from_str(
            r#"[{"containerID":0,"hostID":1000,"size":1},{"containerID":1,"hostID":5000,"size":10}]"#,
        )
        .unwrap();
        assert_eq!(find(&maps, 0), Some(1000));
        assert_eq!(find(&maps, 10), Some(5009));
        assert_eq!(find(&maps, 11), None);
    }
}
