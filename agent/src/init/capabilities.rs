//! The five capability sets.

use std::str::FromStr;

use caps::CapSet;

use crate::error::{Doing, OsError};
use crate::oci;

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
const VERSION: u32 = 0x2008_0522;

/// The sets a process shall have, as bit masks, as far as the agent has them itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Capabilities {
    /// Those of the spec; without any, none.
    pub fn from_spec(spec: Option<&oci::Capabilities>) -> Result<Self, OsError> {
        let held = held()?;
        let mask = |names: &[String]| {
            // A name that this kernel doesn't have is nothing it could allow.
            let bits = names
                .iter()
                .filter_map(|name| caps::Capability::from_str(name).ok());
            bits.fold(0, |mask, bit| mask | bit.bitmask()) & held
        };
        let Some(spec) = spec else {
            return Ok(Self::default());
        };
        let permitted = mask(&spec.permitted);
        let inheritable = mask(&spec.inheritable);
        Ok(Self {
            bounding: mask(&spec.bounding),
            effective: mask(&spec.effective) & permitted,
            permitted,
            inheritable,
            // The kernel wants them in both.
            ambient: mask(&spec.ambient) & permitted & inheritable,
        })
    }

    /// Lowers the bounding set; needs CAP_SETPCAP.
    pub fn limit_bounding(self) -> Result<(), OsError> {
        for capability in caps::runtime::thread_all_supported() {
            if self.bounding & capability.bitmask() == 0 {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(std::io::Error::other)
                    .doing("drop", capability)?;
            }
        }
        Ok(())
    }

    /// After the change of user: takes back all that is permitted for the last
    /// steps, and sets what only grows from it.
    pub fn prepare(self) -> Result<(), OsError> {
        let all = held()?;
        set(all, all, self.inheritable).doing("raise", "capabilities")?;
        caps::clear(None, CapSet::Ambient)
            .map_err(std::io::Error::other)
            .doing("clear", "ambient capabilities")?;
        for capability in caps::runtime::thread_all_supported() {
            if self.ambient & capability.bitmask() != 0 {
                caps::raise(None, CapSet::Ambient, capability)
                    .map_err(std::io::Error::other)
                    .doing("raise", capability)?;
            }
        }
        Ok(())
    }

    /// Gives up everything else.
    pub fn finish(self) -> Result<(), OsError> {
        set(self.effective, self.permitted, self.inheritable).doing("lower", "capabilities")
    }
}

/// What this process may hand on.
fn held() -> Result<u64, OsError> {
    let held = caps::read(None, CapSet::Permitted)
        .map_err(std::io::Error::other)
        .doing("read", "capabilities")?;
    Ok(held.iter().fold(0, |mask, bit| mask | bit.bitmask()))
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> std::io::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads one header and two data structs, which live until the call ends.
    let result =
        unsafe { libc::syscall(libc::SYS_capset, std::ptr::from_ref(&header), data.as_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
