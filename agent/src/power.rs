//! The end of the guest.

use rustix::system::{RebootCommand, reboot};

use crate::settings::Settings;

/// Powers the guest off; outside of a guest, ends this process.
pub fn off(settings: &Settings) -> ! {
    if settings.guest {
        log::info!("power off");
        let failed = reboot(RebootCommand::PowerOff);
        // Where nothing knows how to power off, a reset ends the VM as well.
        log::error!("cannot power off: {failed:?}");
        let failed = reboot(RebootCommand::Restart);
        log::error!("cannot reset: {failed:?}");
    }
    std::process::exit(0)
}
