// SPDX-License-Identifier: GPL-2.0-or-later

//! Property `oom-hold-time`: when a guest has deflated the balloon because it was
//! out of memory, do not ask it to inflate the balloon again for a while

use bql::prelude::*;
use common::{field, Field};
use util::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{oom_hold::Hold, spec::Config};

use crate::part::Context;

/// What the driver sees as the size that the host wants
#[derive(Default)]
pub struct OomHold {
    state: BqlRefCell<Hold>,
    /// Pages that had left the balloon unasked when the driver last wrote its
    /// size
    deflated: BqlCell<u64>,
    /// How often the target was held back
    count: BqlCell<u64>,
    /// Armed while it is
    timer: Timer,
}

impl OomHold {
    pub const TIMER: Field<Self, Timer> = field!(Self, timer);

    /// The target that the driver is to see, in pages, if so many are in the
    /// balloon
    pub fn shown(&self, target: u32, actual: u32) -> u32 {
        self.state.borrow().shown(target, actual)
    }

    /// How often a target was held back
    pub fn count(&self) -> u64 {
        self.count.get()
    }

    /// Whether the target is held back
    pub fn is_active(&self) -> bool {
        self.state.borrow().is_active()
    }

    /// The driver has told the size of the balloon.  `unasked` are the pages that
    /// have left the balloon unasked so far; `time` is the property, in seconds; 0
    /// if it is off.
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

    /// The user wants another size, or the device is reset: show the target.
    pub fn end(&self) {
        self.timer.delete();
        *self.state.borrow_mut() = Hold::default();
    }

    /// The VM has come from another QEMU, where the driver saw `config`.
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
