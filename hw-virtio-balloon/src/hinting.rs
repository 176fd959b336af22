// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page hinting (virtio 1.3, section 5.5.6.5): migration need not send
//! pages that the guest does not use.
//!
//! The driver sends commands and hints, which are processed in an I/O thread;
//! see [`shared`].

mod shared;

use std::sync::Arc;

use ::migration::{
    precopy::{free_page_hint_start, migrate_postcopy_ram},
    prelude::*,
};
use bql::prelude::*;
use common::{field, Field};
use qom::prelude::*;
use system::{main_loop_schedule_oneshot, prelude::*};
use virtio::prelude::*;
use virtio_balloon_core::{
    budget::Budget,
    counters::count,
    engine::{Event, Phase, Port, Progress, Work},
    hinting::Hinting,
    spec::VIRTIO_BALLOON_F_FREE_PAGE_HINT,
};

use self::shared::{Element, Processed, Shared};
use crate::part::{Context, Part, PartPort, Turns};

/// The most buffers that the device pops from the queue at a time.  Resetting
/// the device or stopping the VM takes about 40 ns for each of them, to release
/// it.  The element that exceeds the limit is still popped.
const MAX_BUFFERS: usize = 16 * 1024;

/// The number of hints after which the main loop returns elements
const HINTS: usize = 1024;

/// The part of the device that handles hints
#[derive(Default)]
pub struct FreePageHinting {
    pub shared: Migratable<Arc<Shared>>,
    /// Set while the device is realized and offers the feature
    worker: BqlRefCell<Option<Worker>>,
    turns: Turns<HintWork>,
    /// How many buffers the elements in `shared` have in total
    buffers: BqlCell<usize>,
    notifier: PrecopyNotifier,
}

/// What processes the elements in `shared`
struct Worker {
    iothread: Owned<IOThread>,
    /// Called in the main loop after elements were processed.  It lets the
    /// device call [`FreePageHinting::return_processed`].
    processed: fn(&VirtIODevice),
}

/// Has no state: elements are passed to the I/O thread as soon as they are
/// popped, and returned to the driver as soon as they come back, so none is
/// kept between two steps.
#[derive(Default)]
pub struct HintWork;

type HintPort<'a> = PartPort<'a, FreePageHinting, HintWork>;

impl Work<HintPort<'_>> for HintWork {
    fn step(&mut self, port: &HintPort<'_>, budget: &mut Budget, _phase: Phase) -> Progress {
        // This is not called while the VM is stopped, when nothing may be
        // returned to the driver.
        let part = port.part;
        let mut returned = false;
        while budget.buffers > 0 {
            let Some(processed) = part.shared.exchange.next_processed() else {
                break;
            };
            budget.charge_element(port.buffers(&processed.elem.0));
            part.give_back(port, processed);
            // Returning an element can reset the device
            if !port.is_current() {
                return Progress::Idle;
            }
            returned = true;
        }
        if returned {
            port.notify();
            return Progress::More;
        }

        if part.buffers.get() >= MAX_BUFFERS {
            // return_processed() will begin another turn
            return Progress::Idle;
        }
        let Some(elem) = port.pop() else {
            return Progress::Idle;
        };
        let buffers = port.buffers(&elem);
        budget.charge_element(buffers);
        if port.is_current() {
            part.buffers.set(part.buffers.get() + buffers);
            if part.shared.exchange.add(Element(elem)) {
                part.schedule_worker(port.cx);
            }
        }
        Progress::More
    }
}

impl FreePageHinting {
    pub const NOTIFIER: Field<Self, PrecopyNotifier> = field!(Self, notifier);

    /// The device is realized, and offers the feature.
    pub fn start(&self, iothread: Owned<IOThread>, processed: fn(&VirtIODevice)) {
        let worker = Worker {
            iothread,
            processed,
        };
        *self.worker.borrow_mut() = Some(worker);
    }

    /// The device is unrealized.  The caller drops the elements after this.
    pub fn stop(&self) {
        self.notifier.unregister();
        self.shared.exchange.update(Hinting::stop);
        let worker = self.worker.borrow_mut().take();
        drop(worker);
    }

    /// What the driver sees in the configuration space
    pub fn config_cmd_id(&self) -> u32 {
        self.shared.exchange.state().config_cmd_id()
    }

    fn turn(&self, cx: &Context<'_>, event: Event) {
        if let Some(port) = HintPort::new(self, &self.turns, cx) {
            port.turn(event);
        }
    }

    fn schedule_worker(&self, cx: &Context<'_>) {
        if let Some(worker) = &*self.worker.borrow() {
            let shared = Arc::<Shared>::clone(&self.shared);
            let processed = worker.processed;
            // The reference to the device is passed on to the main loop,
            // because it can only be dropped there.
            let vdev = cx.vdev.to_owned_ref();
            worker.iothread.schedule_oneshot(move || {
                shared.exchange.process(HINTS);
                main_loop_schedule_oneshot(move || processed(&vdev));
            });
        }
    }

    /// The I/O thread has processed elements.
    pub fn return_processed(&self, cx: &Context<'_>) {
        if self.shared.exchange.go_on() {
            self.schedule_worker(cx);
        }
        // If the VM was stopped meanwhile, finish() has returned them.
        if cx.vdev.vm_running() {
            self.turn(cx, Event::Notified);
        }
    }

    /// Return an element to the driver.
    fn give_back(&self, port: &HintPort<'_>, processed: Processed) {
        let Processed {
            elem,
            bad_command,
            hints,
        } = processed;
        let memory = port.cx.memory;
        memory.count(|c| count(&mut c.hints, hints as u64));
        let left = self.buffers.get().saturating_sub(port.buffers(&elem.0));
        self.buffers.set(left);
        if bad_command {
            port.cx.vdev.error("received an incorrect cmd id");
        }
        port.push(elem.0);
    }

    /// The VM is stopped: return all elements.
    fn finish(&self, cx: &Context<'_>) {
        if self.buffers.get() >= MAX_BUFFERS {
            // There may be more elements in the queue, for which there will be
            // no notification
            self.turn(cx, Event::Arrived);
        }
        let elements = self.shared.exchange.finish_all();
        let Some(port) = HintPort::new(self, &self.turns, cx) else {
            return;
        };
        if elements.is_empty() {
            return;
        }
        for processed in elements {
            // Returning an element can reset the device
            if !port.is_current() {
                return;
            }
            self.give_back(&port, processed);
        }
        if port.is_current() {
            port.notify();
        }
    }

    /// Change the state, and tell the driver if `change` returns true.
    fn update(&self, cx: &Context<'_>, change: impl FnOnce(&mut Hinting) -> bool) {
        if self.shared.exchange.update(change) {
            cx.vdev.notify_config();
        }
    }

    /// Migration has reached the point `reason`.
    #[doc(alias = "virtio_balloon_free_page_hint_notify")]
    pub fn precopy_notify(&self, cx: &Context<'_>, reason: PrecopyNotifyReason) {
        // Hints are optional for migration as well.
        //
        // Pages that were hinted are not migrated.  If the guest uses one of
        // them on the destination of a postcopy migration, it requests the page
        // from the source, and waits until migration is over.  Therefore no
        // round is started if postcopy is possible.
        if !cx.vdev.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) || migrate_postcopy_ram() {
            // A driver can withdraw the feature during a round.  The round must
            // not outlast migration, which frees the data structures that hints
            // change.
            self.update(cx, Hinting::withdraw);
            return;
        }

        match reason {
            PrecopyNotifyReason::BeforeBitmapSync => self.update(cx, Hinting::stop),
            PrecopyNotifyReason::AfterBitmapSync if cx.vdev.vm_running() => {
                free_page_hint_start();
                self.update(cx, Hinting::request);
            }
            // The former comes before the device state is migrated, so that the
            // guest reuses the pages as soon as it runs on the destination; the
            // latter also comes if migration has failed or was canceled.
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
    fn queue(&self) -> &BqlCell<Option<u16>> {
        self.turns.queue()
    }

    #[doc(alias = "virtio_balloon_handle_free_page_vq")]
    fn handle(&self, cx: &Context<'_>, event: Event) {
        match event {
            Event::Arrived => {
                // The C device turns notifications off while it polls the queue,
                // and may have been stopped then.
                let queue = self.queue().get();
                if let Some(vq) = queue.and_then(|index| VirtQueue::of(cx.vdev, index)) {
                    vq.set_notification(true);
                }
                self.turn(cx, event);
            }
            // Event::Started will begin a turn
            Event::Notified if !cx.vdev.vm_running() => self.turn(cx, Event::Arrived),
            Event::Stopped => {
                self.finish(cx);
                self.turn(cx, event);
            }
            _ => self.turn(cx, event),
        }
    }

    fn in_flight(&self, _cx: &Context<'_>) -> usize {
        self.shared.exchange.in_flight()
    }

    fn drop_elements(&self, _cx: &Context<'_>) {
        self.turns.drop_elements();
        self.shared.exchange.drop_all();
        self.buffers.set(0);
    }

    fn reset(&self, cx: &Context<'_>) {
        self.drop_elements(cx);
        if cx.vdev.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) {
            self.update(cx, Hinting::stop);
        } else {
            self.update(cx, Hinting::withdraw);
        }
    }
}
