// SPDX-License-Identifier: GPL-2.0-or-later

//! Property `oom-hold-time`: after a guest has deflated the balloon because it
//! was out of memory, do not ask it to inflate the balloon again for some time

use bql::prelude::*;
use common::{field, Field};
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{oom_hold::Hold, spec::Config};

use crate::part::Context;

/// Decides what the driver sees as the target size of the balloon
#[derive(Default)]
pub struct OomHold {
    state: BqlRefCell<Hold>,
    /// How many pages had left the balloon unasked when the driver last wrote
    /// the size
    deflated: BqlCell<u64>,
    /// How often the target was held back
    count: BqlCell<u64>,
    /// Armed while the target is held back
    timer: Timer,
}

impl OomHold {
    pub const TIMER: Field<Self, Timer> = field!(Self, timer);

    /// The target that the driver sees, in pages, if `actual` pages are in the
    /// balloon
    pub fn shown(&self, target: u32, actual: u32) -> u32 {
        self.state.borrow().shown(target, actual)
    }

    /// How often the target was held back
    pub fn count(&self) -> u64 {
        self.count.get()
    }

    /// Whether the target is held back
    pub fn is_active(&self) -> bool {
        self.state.borrow().is_active()
    }

    /// The driver has written the size of the balloon.  `unasked` is the number
    /// of pages that have left the balloon unasked so far.  `time` is the value
    /// of the property, in seconds; 0 if holds are disabled.
    pub fn size_written(&self, cx: &Context<'_>, unasked: u64, time: u32) {
        if self.deflated.replace(unasked) == unasked || time == 0 {
            return;
        }
        let active = self.is_active();
        let now = CLOCK_VIRTUAL.get_ms();
        let until = self.state.borrow_mut().deflated(now, ms(time));
        self.timer.modify(until);
        if !active {
            self.count.set(self.count.get() + 1);
            cx.vdev.notify_config();
        }
    }

    /// The timer has expired.
    pub fn elapsed(&self, cx: &Context<'_>) {
        let over = self.state.borrow_mut().elapsed(CLOCK_VIRTUAL.get_ms());
        if over {
            cx.vdev.notify_config();
        }
    }

    /// The user has set another target, or the device is reset: end the hold.
    pub fn end(&self) {
        self.timer.delete();
        *self.state.borrow_mut() = Hold::default();
    }

    /// The VM was migrated; at the source, the driver saw `config`.
    pub fn post_load(&self, config: &Config, target: u32, time: u32) {
        self.end();
        if time > 0 {
            let now = CLOCK_VIRTUAL.get_ms();
            let (shown, actual) = (config.num_pages, config.actual);
            let until = self
                .state
                .borrow_mut()
                .arrive(shown, target, actual, now, ms(time));
            if let Some(until) = until {
                self.timer.modify(until);
            }
        }
    }
}

fn ms(seconds: u32) -> u64 {
    u64::from(seconds) * 1000
}
