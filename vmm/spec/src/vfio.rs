//! PCI devices of the node.

use serde::{Deserialize, Serialize};

use crate::{Descriptor, DeviceId};

/// Most functions that are plugged together: those of one device.
pub const VFIO_FUNCTIONS_MAX: usize = 8;

/// Functions that the node's IOMMU cannot tell apart (one group of linux/vfio.h):
/// plugged and unplugged together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VfioSpec {
    /// Their name.
    pub id: DeviceId,
    /// What maps memory for them: `/dev/vfio/vfio`, which has the group and no other,
    /// and `VFIO_TYPE1v2_IOMMU`.
    pub container: Descriptor,
    /// The group.
    pub group: Descriptor,
    /// From 1 to [`VFIO_FUNCTIONS_MAX`].
    pub functions: Vec<VfioFunctionSpec>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VfioFunctionSpec {
    /// As `VFIO_GROUP_GET_DEVICE_FD` gives it.
    pub device: Descriptor,
    /// Slot of the machine's bus, by which the agent finds it; the shim takes them from
    /// the last down, as the VMM takes others from the first up.
    pub slot: u8,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecError;

    fn spec() -> VfioSpec {
        let function = |device, slot| VfioFunctionSpec {
            device: Descriptor(device),
            slot,
        };
        VfioSpec {
            id: "vfio-7".into(),
            container: Descriptor(0),
            group: Descriptor(1),
            functions: vec![function(2, 31), function(3, 30)],
        }
    }

    #[test]
    fn what_cannot_be_plugged_is_refused() {
        assert_eq!(spec().check(4), Ok(()));
        let refused = |change: fn(&mut VfioSpec)| {
            let mut spec = spec();
            change(&mut spec);
            spec.check(4).unwrap_err()
        };
        let functions = SpecError::Functions("vfio-7".into());
        assert_eq!(refused(|spec| spec.functions.clear()), functions);
        assert_eq!(refused(|spec| spec.functions[0].slot = 30), functions);
        assert_eq!(refused(|spec| spec.functions[0].slot = 32), functions);
        let many = refused(|spec| spec.functions = vec![spec.functions[0].clone(); 9]);
        assert_eq!(many, functions);
        let id = refused(|spec| spec.id = "vfio/7".into());
        assert_eq!(id, SpecError::DeviceId("vfio/7".into()));
        let twice = refused(|spec| spec.functions[1].device = Descriptor(1));
        assert!(matches!(twice, SpecError::DescriptorTwice { index: 1, .. }));
        let missing = spec().check(3).unwrap_err();
        assert!(matches!(
            missing,
            SpecError::DescriptorMissing { index: 3, .. }
        ));
    }
}
