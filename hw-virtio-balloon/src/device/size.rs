// SPDX-License-Identifier: GPL-2.0-or-later

//! The size of the balloon: what the user wants it to be, and what the driver says
//! that it is

use system::{prelude::*, send_balloon_change};
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{
    config::{config_size, Config},
    features::{VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_PAGE_POISON},
    pages::{pages_to_actual, target_to_pages},
};

use super::VirtIOBalloon;
use crate::{
    events::{
        trace_virtio_balloon_get_config, trace_virtio_balloon_set_config,
        trace_virtio_balloon_to_target,
    },
    part::Context,
};

impl VirtIOBalloon {
    fn ram_size() -> u64 {
        MachineState::current().map_or(0, MachineState::current_ram_size)
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

    /// The balloon has a size that is not due to the driver.
    pub(super) fn restart_deflation(&self, size: u32) {
        let target = self.registers.borrow().num_pages;
        self.memory
            .with_deflation(|deflation| deflation.restart(size, target));
    }

    pub(super) fn get_config(&self, data: &mut [u8]) {
        let registers = *self.registers.borrow();
        // While a legacy driver writes it byte by byte, it may be larger than that.
        let size = registers
            .actual
            .min(self.memory.with_deflation(|d| d.level()));
        let config = Config {
            num_pages: self.oom_hold.shown(registers.num_pages, size),
            actual: registers.actual,
            free_page_hint_cmd_id: self.hinting.config_cmd_id(),
            poison_val: self.poison_val.get(),
        };
        trace_virtio_balloon_get_config(config.num_pages, config.actual);
        config.write_to(data);
    }

    pub(super) fn set_config(&self, data: &[u8]) {
        let config = Config::read_from(data);
        let old_actual = self.registers.borrow().actual;
        self.registers.borrow_mut().actual = config.actual;

        if config.actual != old_actual {
            send_balloon_change(self.balloon_actual());
        }
        let target = self.registers.borrow().num_pages;
        let may_deflate = Context::has_feature(self, VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
        let now = CLOCK_VIRTUAL.get_ms();
        self.memory
            .with_deflation(|d| d.size_written(config.actual, target, may_deflate, now));
        self.oom_hold
            .size_written(self, self.unasked(), self.oom_hold_time);
        self.poison_val.set(
            if Context::has_feature(self, VIRTIO_BALLOON_F_PAGE_POISON) {
                config.poison_val
            } else {
                0
            },
        );
        trace_virtio_balloon_set_config(config.actual, old_actual);
    }
}

impl BalloonDevice for VirtIOBalloon {
    fn balloon_to_target(&self, target: u64) {
        let ram_size = Self::ram_size();
        let target = target.min(ram_size);

        if target != 0 {
            let pages = target_to_pages(ram_size, target);
            self.registers.borrow_mut().num_pages = pages;
            self.memory.with_deflation(|d| d.target_changed(pages));
            self.oom_hold.end();
            // If the VM is migrated before the driver has read this, it is not to
            // look like a hold.
            VirtioDeviceMethods::update_last_config(&self);
            VirtioDeviceMethods::notify_config(&self);
        }
        trace_virtio_balloon_to_target(target, self.registers.borrow().num_pages);
    }

    fn balloon_actual(&self) -> u64 {
        pages_to_actual(Self::ram_size(), self.registers.borrow().actual)
    }
}
