// SPDX-License-Identifier: GPL-2.0-or-later

//! The size of the balloon: the one that the user wants, and the one that the
//! driver reports

use system::{guest_ram_size, prelude::*, send_balloon_change};
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::spec::{
    config_size, pages_to_actual, target_to_pages, Config, VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    VIRTIO_BALLOON_F_PAGE_POISON,
};

use super::VirtIOBalloon;
use crate::trace::{
    trace_virtio_balloon_get_config, trace_virtio_balloon_set_config,
    trace_virtio_balloon_to_target,
};

impl VirtIOBalloon {
    pub(super) fn ram_size() -> u64 {
        guest_ram_size()
    }

    pub(super) fn config_size(&self) -> usize {
        config_size(self.host_features)
    }

    /// Pages that have left the balloon because the guest was out of memory
    pub(super) fn unasked(&self) -> u64 {
        let now = CLOCK_VIRTUAL.get_ms();
        self.memory
            .with_deflation(|deflation| deflation.unasked(now))
    }

    /// The size of the balloon has changed, but not because the driver inflated
    /// or deflated it.
    pub(super) fn restart_deflation(&self, size: u32) {
        let target = self.num_pages.get();
        self.memory
            .with_deflation(|deflation| deflation.restart(size, target));
    }

    /// The number of pages that the driver is asked to have in the balloon
    pub(super) fn shown_pages(&self) -> u32 {
        // `actual` can be too large while a legacy driver writes it byte by
        // byte.
        let level = self.memory.with_deflation(|d| d.level());
        let size = self.actual.get().min(level);
        self.oom_hold.shown(self.num_pages.get(), size)
    }

    pub(super) fn get_config(&self, data: &mut [u8]) {
        let config = Config {
            num_pages: self.shown_pages(),
            actual: self.actual.get(),
            free_page_hint_cmd_id: self.hinting.config_cmd_id(),
            poison_val: self.poison_val.get(),
        };
        trace_virtio_balloon_get_config(config.num_pages, config.actual);
        config.write_to(data);
    }

    pub(super) fn set_config(&self, data: &[u8]) {
        let config = Config::read_from(data);
        let old_actual = self.actual.replace(config.actual);

        if config.actual != old_actual {
            send_balloon_change(self.balloon_actual());
        }
        let target = self.num_pages.get();
        let may_deflate = self.has_feature(VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
        let now = CLOCK_VIRTUAL.get_ms();
        self.memory
            .with_deflation(|d| d.size_written(config.actual, target, may_deflate, now));
        self.oom_hold
            .size_written(&self.context(), self.unasked(), self.oom_hold_time);
        self.poison_val
            .set(if self.has_feature(VIRTIO_BALLOON_F_PAGE_POISON) {
                config.poison_val
            } else {
                0
            });
        trace_virtio_balloon_set_config(config.actual, old_actual);
    }
}

impl BalloonDevice for VirtIOBalloon {
    fn balloon_to_target(&self, target: u64) {
        let ram_size = Self::ram_size();
        let target = target.min(ram_size);

        if target != 0 {
            let pages = target_to_pages(ram_size, target);
            self.num_pages.set(pages);
            self.memory.with_deflation(|d| d.target_changed(pages));
            self.oom_hold.end();
            // Otherwise, if the VM is migrated before the driver reads the new
            // target, the destination mistakes the old one for a hold.
            self.update_last_config();
            self.notify_config();
        }
        trace_virtio_balloon_to_target(target, self.num_pages.get());
    }

    fn balloon_actual(&self) -> u64 {
        pages_to_actual(Self::ram_size(), self.actual.get())
    }
}
