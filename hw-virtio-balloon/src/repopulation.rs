// SPDX-License-Identifier: GPL-2.0-or-later

//! Populates memory for a guest that was reset
//!
//! After a reset the balloon is empty: the guest uses all of its memory without
//! having told the device.  Host pages that come from a pool, which can be
//! empty, have to be populated before that.  It can take long, so it is done in
//! turns, and the VM is stopped meanwhile.

use bql::prelude::*;
use system::{request_vm_stop, vm_start_if_paused};
use util::report::error_report;
use virtio::prelude::*;
use virtio_balloon_core::budget::Budget;

use crate::{guest_memory::Repopulated, part::Context};

/// Whether populating is in progress
#[derive(Default)]
pub struct Repopulation {
    state: BqlCell<State>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Done,
    /// The VM is stopped until all pages are populated.
    Stopped,
    /// The host does not have enough memory; the VM is stopped until the user
    /// continues it.
    NoMemory,
}

impl Repopulation {
    /// An iteration of the main loop: continue what has stopped the VM.
    pub fn resume(&self, cx: &Context<'_>) {
        // The bottom half also runs for others, and without memory it is up to
        // the user to continue.
        if self.state.get() == State::Stopped {
            self.run(cx);
        }
    }

    /// Populate as much as the budget allows.  Called when the device is reset
    /// while the VM is running, when the VM is started, and when the next turn
    /// is due.
    pub fn run(&self, cx: &Context<'_>) {
        if !cx.memory.lacks_memory() {
            return;
        }
        let mut budget = Budget::TURN;
        let before = self.state.get();
        match cx.memory.repopulate(&mut budget) {
            Repopulated::All => {
                self.state.set(State::Done);
                if before == State::Stopped {
                    vm_start_if_paused();
                }
            }
            Repopulated::Some => {
                if cx.vdev.vm_running() && before != State::Stopped {
                    self.state.set(State::Stopped);
                    request_vm_stop();
                }
                cx.bh.schedule();
            }
            Repopulated::NoMemory => {
                self.state.set(State::NoMemory);
                if cx.vdev.vm_running() {
                    request_vm_stop();
                }
                error_report(
                    "virtio-balloon: the host has no memory for what was in the balloon \
                     before the guest was reset: the VM is stopped. Provide huge pages, and \
                     continue it with 'cont'",
                );
            }
        }
    }

    /// Whether the VM is stopped because the host has no memory
    pub fn waits_for_memory(&self) -> bool {
        self.state.get() == State::NoMemory
    }
}
