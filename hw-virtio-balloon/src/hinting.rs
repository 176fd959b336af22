// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page hinting (virtio 1.3, section 5.5.6.5): migration need not send what
//! the guest does not use.
//!
//! The driver sends commands and hints, which go to an I/O thread; see
//! [`hint_worker`](crate::hint_worker).

use std::sync::Arc;

use ::migration::{
    precopy::{free_page_hint_start, migrate_postcopy_ram},
    prelude::*,
};
use bql::prelude::*;
use common::{field, Field};
use qom::prelude::*;
use system::prelude::*;
use virtio::prelude::*;
use virtio_balloon_core::{
    budget::Budget,
    engine::{Host, Phase, Progress, Queue, Turn, Work},
    features::VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    hinting::Hinting,
};

use crate::{
    deferred::{self, Deferred, PartHost, QueuePart},
    hint_worker::{Element, Processed, Shared},
    part::{Context, Part},
};

/// How many buffers the device takes at the same time.  Whoever resets the
/// device or stops the VM waits until they are released, which takes about
/// 40 ns each.  The element that exceeds the limit is still taken.
const MAX_BUFFERS: usize = 16 * 1024;

/// After how many hints the main loop returns elements
const HINTS: usize = 1024;

/// The part of the device for hints
#[derive(Default)]
pub struct FreePageHinting {
    pub shared: Migratable<Arc<Shared>>,
    /// Set while the device is realized, and offers the feature
    iothread: BqlRefCell<Option<Owned<IOThread>>>,
    deferred: Deferred<HintWork>,
    /// How many buffers the elements in `shared` have
    buffers: BqlCell<usize>,
    notifier: PrecopyNotifier,
}

/// Elements are passed on as soon as they are popped, and returned as soon as
/// they come back, so there are none.
#[derive(Default)]
pub struct HintWork;

impl QueuePart for FreePageHinting {
    type Work = HintWork;

    fn deferred(&self) -> &Deferred<HintWork> {
        &self.deferred
    }
}

impl Work<PartHost<'_, FreePageHinting>> for HintWork {
    fn is_empty(&self) -> bool {
        true
    }

    fn step(
        &mut self,
        host: &PartHost<'_, FreePageHinting>,
        turn: Turn,
        budget: &mut Budget,
        _phase: Phase,
    ) -> Progress {
        // Nothing may be returned to the driver while the VM is stopped, which
        // is checked before the turn begins.
        let part = host.part;
        let mut returned = false;
        while budget.buffers > 0 {
            let Some(processed) = part.shared.exchange.next_processed() else {
                break;
            };
            budget.charge_element(host.buffers(&processed.elem.0));
            part.give_back(host, processed);
            // Each of them can cause a reset
            if !turn.is_current(host) {
                return Progress::Idle;
            }
            returned = true;
        }
        if returned {
            host.notify();
            return Progress::More;
        }

        if part.buffers.get() >= MAX_BUFFERS {
            // return_processed() will come back to it
            return Progress::Idle;
        }
        let Some(elem) = host.pop() else {
            return Progress::Idle;
        };
        let buffers = host.buffers(&elem);
        budget.charge_element(buffers);
        if turn.is_current(host) {
            part.buffers.set(part.buffers.get() + buffers);
            if part.shared.exchange.add(Element(elem)) {
                part.schedule_worker(host.cx);
            }
        }
        Progress::More
    }

    fn put_back(&mut self, _host: &PartHost<'_, FreePageHinting>) {}
}

impl FreePageHinting {
    pub const BH: Field<Self, BottomHalf> = field!(Self, deferred).then(Deferred::BH);
    pub const NOTIFIER: Field<Self, PrecopyNotifier> = field!(Self, notifier);

    /// What the driver sees in the configuration space
    pub fn config_cmd_id(&self) -> u32 {
        self.shared.exchange.state().config_cmd_id()
    }

    /// The driver sends commands or hints.
    #[doc(alias = "virtio_balloon_handle_free_page_vq")]
    pub fn run(&self, cx: &dyn Context) {
        if cx.vm_running() {
            deferred::run(self, cx);
        } else {
            // vm_state_change() will come back to it
            self.deferred.expect();
        }
    }

    fn schedule_worker(&self, cx: &dyn Context) {
        let iothread = self.iothread.borrow();
        if let Some(iothread) = &*iothread {
            let shared = Arc::<Shared>::clone(&self.shared);
            let processed = cx.hints_processed();
            iothread.schedule_oneshot(move || {
                shared.exchange.process(HINTS);
                processed();
            });
        }
    }

    /// The I/O thread is done with elements.
    pub fn return_processed(&self, cx: &dyn Context) {
        if self.shared.exchange.go_on() {
            self.schedule_worker(cx);
        }
        // If the VM was stopped meanwhile, they were returned then.
        if cx.vm_running() {
            deferred::run(self, cx);
        }
    }

    /// Return an element to the driver.
    fn give_back(&self, host: &PartHost<'_, Self>, processed: Processed) {
        let Processed { elem, bad_command } = processed;
        let left = self.buffers.get().saturating_sub(host.buffers(&elem.0));
        self.buffers.set(left);
        if bad_command {
            host.cx.error("received an incorrect cmd id");
        }
        host.push(elem.0);
    }

    /// The VM is stopped: return all elements.
    fn finish(&self, cx: &dyn Context) {
        if self.buffers.get() >= MAX_BUFFERS {
            // There may be more in the queue
            self.deferred.expect();
        }
        let elements = self.shared.exchange.finish_all();
        let Some(host) = PartHost::new(self, cx) else {
            return;
        };
        if elements.is_empty() {
            return;
        }
        let life = host.engine(|engine| engine.life());
        for processed in elements {
            // Each of them can cause a reset
            if !life.is_current(&host) {
                return;
            }
            self.give_back(&host, processed);
        }
        if life.is_current(&host) {
            host.notify();
        }
    }

    /// The queue is reset: drop all elements.
    fn drop_all(&self) {
        self.deferred.reset();
        self.shared.exchange.drop_all();
        self.buffers.set(0);
    }

    /// Change the state, and tell the driver if `change` returns that it has to
    /// be told.
    fn update(&self, cx: &dyn Context, change: impl FnOnce(&mut Hinting) -> bool) {
        if self.shared.exchange.update(change) {
            cx.notify_config();
        }
    }

    /// Migration has reached a certain point.
    #[doc(alias = "virtio_balloon_free_page_hint_notify")]
    pub fn precopy_notify(&self, cx: &dyn Context, reason: PrecopyNotifyReason) {
        // Hints are optional for migration, too.
        //
        // Pages that were hinted are not migrated.  If the guest uses them on
        // the destination of a postcopy migration, it requests them from the
        // source, and is stuck until migration is over.  Therefore do not even
        // start if postcopy is possible.
        if !cx.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) || migrate_postcopy_ram() {
            // A driver can withdraw the feature in a round.  That must not
            // outlast migration, which frees what hints refer to.
            self.update(cx, Hinting::withdraw);
            return;
        }

        match reason {
            PrecopyNotifyReason::BeforeBitmapSync => self.update(cx, Hinting::stop),
            PrecopyNotifyReason::AfterBitmapSync if cx.vm_running() => {
                free_page_hint_start();
                self.update(cx, Hinting::request);
            }
            // Before the device state is migrated, so that the guest reuses the
            // pages as soon as it runs on the destination; likewise if
            // migration has failed or was canceled.
            PrecopyNotifyReason::AfterBitmapSync | PrecopyNotifyReason::Cleanup => {
                self.update(cx, Hinting::done);
            }
            PrecopyNotifyReason::Setup
            | PrecopyNotifyReason::Complete
            | PrecopyNotifyReason::Unknown(_) => {}
        }
    }
}

impl Part for FreePageHinting {
    fn realize(&self, cx: &dyn Context, queue: u16) {
        *self.iothread.borrow_mut() = cx.iothread();
        self.deferred.realize(queue);
    }

    fn unrealize(&self, _cx: &dyn Context) {
        self.notifier.unregister();
        self.shared.exchange.update(Hinting::stop);
        self.drop_all();
        self.deferred.unrealize();
        let iothread = self.iothread.borrow_mut().take();
        drop(iothread);
    }

    fn reset(&self, cx: &dyn Context) {
        self.drop_all();
        if cx.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
            self.update(cx, Hinting::stop);
        } else {
            self.update(cx, Hinting::withdraw);
        }
    }

    fn queue_reset(&self, _cx: &dyn Context, queue: u32) {
        if self.deferred.is_for(queue) {
            self.drop_all();
        }
    }

    fn vm_state_change(&self, cx: &dyn Context, running: bool) {
        if !running {
            self.finish(cx);
        }
        deferred::vm_state_change(self, cx, running);
    }

    fn post_load(&self, _cx: &dyn Context) {
        self.deferred.expect();
    }
}
