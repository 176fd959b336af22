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

/// The part of the device for hints
#[derive(Default)]
pub struct FreePageHinting {
    pub shared: Migratable<Arc<Shared>>,
    /// Set while the device is realized, and offers the feature
    iothread: BqlRefCell<Option<Owned<IOThread>>>,
    deferred: Deferred<HintWork>,
    notifier: PrecopyNotifier,
}

/// Elements are passed on as soon as they are popped, so there are none.
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
        let Some(elem) = host.pop() else {
            return Progress::Idle;
        };
        budget.charge_element(host.buffers(&elem));
        if turn.is_current(host) && host.part.shared.exchange.add(Element(elem)) {
            host.part.schedule_worker(host.cx);
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
                shared.exchange.process_all();
                processed();
            });
        }
    }

    /// Return the elements that the I/O thread is done with.
    pub fn return_processed(&self, cx: &dyn Context) {
        self.return_elements(cx, self.shared.exchange.take_processed());
    }

    fn return_elements(&self, cx: &dyn Context, elements: Vec<Processed>) {
        let Some(host) = PartHost::new(self, cx) else {
            return;
        };
        if elements.is_empty() {
            return;
        }
        let life = host.engine(|engine| engine.life());
        for Processed { elem, bad_command } in elements {
            // Each of them can cause a reset
            if !life.is_current(&host) {
                return;
            }
            if bad_command {
                cx.error("received an incorrect cmd id");
            }
            host.push(elem.0);
        }
        if life.is_current(&host) {
            host.notify();
        }
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
        self.shared.exchange.drop_all();
        self.deferred.unrealize();
        let iothread = self.iothread.borrow_mut().take();
        drop(iothread);
    }

    fn reset(&self, cx: &dyn Context) {
        self.deferred.reset();
        self.shared.exchange.drop_all();
        if cx.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
            self.update(cx, Hinting::stop);
        } else {
            self.update(cx, Hinting::withdraw);
        }
    }

    fn queue_reset(&self, _cx: &dyn Context, queue: u32) {
        if self.deferred.is_for(queue) {
            self.deferred.reset();
            self.shared.exchange.drop_all();
        }
    }

    fn vm_state_change(&self, cx: &dyn Context, running: bool) {
        if !running {
            self.return_elements(cx, self.shared.exchange.finish_all());
        }
        deferred::vm_state_change(self, cx, running);
    }

    fn post_load(&self, _cx: &dyn Context) {
        self.deferred.expect();
    }
}
