// SPDX-License-Identifier: GPL-2.0-or-later

//! The `balloon-status` property; [`virtio_balloon_core::status`] has the logic

use std::ffi::CStr;

use system::prelude::*;
use util::{prelude::*, Result};
use virtio::prelude::*;
use virtio_balloon_core::{
    spec::pages_to_actual,
    status::{Driver, Inhibitor, StatsState, Status, FEATURES},
};

use super::VirtIOBalloon;
use crate::guest_memory::inhibitors;

impl VirtIOBalloon {
    /// Getter of the `balloon-status` property
    pub(super) fn get_status(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let ram_size = Self::ram_size();
        let driver = Driver::new(self.status(), self.is_broken());
        let inhibitors = inhibitors();
        let status = Status {
            vm_running: self.vm_running(),
            driver,
            target: pages_to_actual(ram_size, self.num_pages.get()),
            shown_target: pages_to_actual(ram_size, self.shown_pages()),
            actual: self.balloon_actual(),
            stats: self.stats.state(&self.context(), driver),
            inhibitors: &inhibitors,
            waiting_for_memory: self.waits_for_memory(),
        };
        v.visit_struct(name, |v| self.visit_status(v, &status))
    }

    fn visit_status(&self, v: &Visitor, status: &Status<'_>) -> Result<()> {
        v.output_str(c"implementation", c"Rust")?;
        v.output_str(c"summary", status.summary().text())?;
        v.output_str(c"driver", status.driver.name())?;
        let accepted = FEATURES
            .iter()
            .filter(|(bit, _)| self.has_feature(*bit))
            .map(|(_, name)| *name);
        v.output_str_list(c"features", accepted)?;
        for (member, mut value) in [
            (c"target", status.target),
            (c"shown-target", status.shown_target),
            (c"actual", status.actual),
        ] {
            v.visit_u64(member, &mut value)?;
        }
        v.visit_struct(c"statistics", |v| {
            v.output_str(c"state", status.stats.name())?;
            if let StatsState::Asked(mut seconds) = status.stats {
                v.visit_u64(c"asked-ago", &mut seconds)?;
            }
            v.visit_int(c"last-update", &mut self.stats.last_update())?;
            v.visit_u64(c"polling-interval", &mut self.stats.poll_interval().into())
        })?;
        let names = status.inhibitors.iter().copied().map(Inhibitor::name);
        v.output_str_list(c"inhibited-by", names)?;
        v.visit_bool(c"waiting-for-memory", &mut { status.waiting_for_memory })
    }
}
