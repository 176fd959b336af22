// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page hinting: migration need not send what the guest does not use.
//!
//! # Threads
//!
//! Passing a hint to migration waits for a lock that the migration thread holds
//! while it sends pages, which can take tens of milliseconds.  That is why the
//! user has to provide an I/O thread: it does the waiting, instead of the main
//! loop with the big QEMU lock.
//!
//! The I/O thread does nothing else, and never takes the big QEMU lock.  It has
//! access to [`Shared`] only: the state of hinting, and the elements that were
//! taken from the queue.  The main loop takes the elements from the queue and
//! returns them.  So the queue and the device are only ever accessed with the
//! big QEMU lock taken; and a driver that places its buffers in device memory,
//! which has to be accessed with that lock, cannot cause a deadlock.
//!
//! There are two locks.  [`Shared::state`] is held while an element is being
//! processed; thus after a change of the state, which can have to wait, no
//! hints of the previous state are still to come.  [`Shared::elements`] is
//! only held for moments.  An element is in one of the lists of the latter
//! whenever the former is free.

use std::{
    collections::VecDeque,
    mem::take,
    sync::{
        atomic::{AtomicU32, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
};

use ::migration::{
    precopy::migrate_postcopy_ram, prelude::*, InvalidError, ToMigrationStateShared,
};
use bql::prelude::*;
use common::field;
use hwcore::Link;
use qom::prelude::*;
use system::{main_loop_schedule_oneshot, prelude::*};
use virtio::prelude::*;
use virtio_balloon_core::{
    features::VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    hinting::{HintStatus, Hinting},
};

use crate::device::VirtIOBalloon;

/// What the I/O thread and the main loop share
#[derive(Debug, Default)]
pub struct Shared {
    state: Mutex<Hinting>,
    elements: Mutex<Elements>,
    /// What the driver is to see in the configuration space; a copy, so that
    /// reading it does not have to wait.
    config_cmd_id: AtomicU32,
}

#[derive(Debug, Default)]
struct Elements {
    /// To be processed by the I/O thread
    pending: VecDeque<VirtQueueElement>,
    /// To be returned by the main loop
    done: Vec<Processed>,
    /// The I/O thread has been asked to look at `pending`
    scheduled: bool,
}

#[derive(Debug)]
struct Processed {
    elem: VirtQueueElement,
    /// The driver has sent something that is too short to be a command
    bad_command: bool,
}

/// A panic would have ended QEMU.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Change the state, after waiting for the I/O thread to be done with what
    /// it is currently working on.
    fn update<R>(&self, f: impl FnOnce(&mut Hinting) -> R) -> R {
        let mut state = lock(&self.state);
        let result = f(&mut state);
        self.config_cmd_id
            .store(state.config_cmd_id(), Ordering::Relaxed);
        result
    }

    /// Look at one element.  `hint` tells whether to pass on hints.
    fn process(&self, state: &mut Hinting, elem: VirtQueueElement, hint: bool) -> Processed {
        let mut bad_command = false;
        if elem.has_out() {
            match elem.out_reader().read_u32() {
                Some(id) => {
                    state.command(id);
                    self.config_cmd_id
                        .store(state.config_cmd_id(), Ordering::Relaxed);
                }
                None => bad_command = true,
            }
        }
        if hint && !bad_command && state.is_hinting() {
            elem.in_buffers().for_each(|buf| buf.range.free_page_hint());
        }
        Processed { elem, bad_command }
    }

    /// Process an element that is pending; returns false if there is none.
    fn process_next(&self) -> bool {
        let mut state = lock(&self.state);
        let elem = {
            let mut elements = lock(&self.elements);
            let elem = elements.pending.pop_front();
            elements.scheduled = elem.is_some();
            elem
        };
        elem.is_some_and(|elem| {
            let processed = self.process(&mut state, elem, true);
            lock(&self.elements).done.push(processed);
            true
        })
    }

    /// Take all elements from the I/O thread.
    fn take_all(&self) -> (Vec<Processed>, VecDeque<VirtQueueElement>) {
        // wait for the one that it is working on
        let _state = lock(&self.state);
        let mut elements = lock(&self.elements);
        (take(&mut elements.done), take(&mut elements.pending))
    }
}

/// What is migrated of [`Shared`]
#[derive(Debug, Default)]
pub struct HintingMigration {
    cmd_id: u32,
    status: u32,
}

impl_vmstate_struct!(
    HintingMigration,
    VMStateDescriptionBuilder::<HintingMigration>::new()
        .name(c"free-page-hinting")
        .version_id(1)
        .minimum_version_id(1)
        .fields(vmstate_fields! {
            vmstate_of!(HintingMigration, cmd_id),
            vmstate_of!(HintingMigration, status),
        })
        .build()
);

impl ToMigrationState for Shared {
    type Migrated = HintingMigration;

    fn snapshot_migration_state(&self, target: &mut HintingMigration) -> Result<(), InvalidError> {
        let state = self.update(|state| *state);
        target.cmd_id = state.cmd_id();
        target.status = state.status() as u32;
        Ok(())
    }

    fn restore_migrated_state_mut(
        &mut self,
        source: HintingMigration,
        version_id: u8,
    ) -> Result<(), InvalidError> {
        self.restore_migrated_state(source, version_id)
    }
}

impl ToMigrationStateShared for Shared {
    fn restore_migrated_state(
        &self,
        source: HintingMigration,
        _version_id: u8,
    ) -> Result<(), InvalidError> {
        let status = HintStatus::try_from(source.status).map_err(|_| InvalidError)?;
        self.update(|state| *state = Hinting::new(status, source.cmd_id));
        Ok(())
    }
}

/// The free page hinting part of the device
#[derive(Default)]
pub struct FreePageHinting {
    pub shared: Migratable<Arc<Shared>>,
    /// Set while the device is realized, and offers the feature
    worker: BqlRefCell<Option<(Owned<IOThread>, u16)>>,
    notifier: PrecopyNotifier,
    /// Looks at the queue after the VM was started
    resume_bh: BottomHalf,
    /// There may be elements that the driver will not tell about again
    pending: BqlCell<bool>,
}

impl FreePageHinting {
    /// What the driver sees in the configuration space
    pub fn config_cmd_id(&self) -> u32 {
        self.shared.config_cmd_id.load(Ordering::Relaxed)
    }

    fn queue_index(&self) -> Option<u16> {
        self.worker.borrow().as_ref().map(|(_, queue)| *queue)
    }
}

impl VirtIOBalloon {
    fn hinting_negotiated(&self) -> bool {
        self.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT)
    }

    fn hint_queue(&self) -> Option<VirtQueue<'_>> {
        let index = self.hinting.queue_index()?;
        self.queue(index)
    }

    /// The device is realized, with the given queue for hints.
    pub fn start_hinting(&self, queue: u16) {
        let iothread = Link::get(self, field!(Self, iothread));
        *self.hinting.worker.borrow_mut() = iothread.map(|iothread| (iothread, queue));
        PrecopyNotifier::register(self, field!(Self, hinting.notifier), Self::precopy_notify);
        BottomHalf::init(
            self,
            field!(Self, hinting.resume_bh),
            c"virtio-balloon-hints",
            Self::continue_hints,
        );
    }

    /// The device is unrealized.
    pub fn stop_hinting(&self) {
        self.hinting.notifier.unregister();
        self.hinting.resume_bh.delete();
        self.hinting.shared.update(Hinting::stop);
        drop(self.hinting.shared.take_all());
        let worker = self.hinting.worker.borrow_mut().take();
        drop(worker);
    }

    /// The driver sends commands or hints.
    pub fn handle_hints(&self, vq: VirtQueue<'_>) {
        // Nothing may be returned to the driver while the VM is stopped:
        // resume_hinting() will come back to it.
        if !self.vm_running() {
            self.hinting.pending.set(true);
            return;
        }
        self.hinting.pending.set(false);

        let mut schedule = false;
        while let Some(elem) = vq.pop() {
            let mut elements = lock(&self.hinting.shared.elements);
            elements.pending.push_back(elem);
            schedule |= !elements.scheduled;
            elements.scheduled = true;
        }
        if schedule {
            self.schedule_worker();
        }
    }

    fn schedule_worker(&self) {
        let worker = self.hinting.worker.borrow();
        if let Some((iothread, _)) = &*worker {
            let shared = Arc::<Shared>::clone(&self.hinting.shared);
            let dev = self.to_owned_ref();
            iothread.schedule_oneshot(move || {
                while shared.process_next() {}
                // The device is passed on, because it can only be released in
                // the main loop.
                main_loop_schedule_oneshot(move || dev.return_processed());
            });
        }
    }

    /// Return the elements that the I/O thread is done with.
    fn return_processed(&self) {
        let done = take(&mut lock(&self.hinting.shared.elements).done);
        self.return_elements(done);
    }

    fn return_elements(&self, elements: Vec<Processed>) {
        if elements.is_empty() {
            return;
        }
        for Processed { elem, bad_command } in elements {
            if bad_command {
                self.error("received an incorrect cmd id");
            }
            elem.push(0);
        }
        if let Some(vq) = self.hint_queue() {
            vq.notify();
        }
    }

    /// The VM was stopped: return everything to the driver, since the queue and
    /// guest memory must not change any more.  Hints are optional, so do not
    /// wait for migration to take those that are left.
    pub fn suspend_hinting(&self) {
        let (mut done, pending) = self.hinting.shared.take_all();
        let mut state = lock(&self.hinting.shared.state);
        done.extend(
            pending
                .into_iter()
                .map(|elem| self.hinting.shared.process(&mut state, elem, false)),
        );
        drop(state);
        self.return_elements(done);
    }

    /// The VM is running (again).  The queue must not be used yet: an error would
    /// be forgotten, because the device status is about to be overwritten.
    pub fn resume_hinting(&self) {
        if self.hinting.pending.get() && self.hinting_negotiated() {
            self.hinting.resume_bh.schedule();
        }
    }

    /// The VM has come from another QEMU, which may have left something in the
    /// queue.
    pub fn expect_hints(&self) {
        self.hinting.pending.set(true);
    }

    fn continue_hints(&self) {
        if let Some(vq) = self.hint_queue() {
            self.handle_hints(vq);
        }
    }

    /// The device is reset.
    pub fn reset_hinting(&self) {
        self.hinting.pending.set(false);
        self.hinting.resume_bh.cancel();
        drop(self.hinting.shared.take_all());
        if self.hinting_negotiated() {
            self.free_page_stop();
        }
    }

    /// The driver resets a queue.
    pub fn reset_hint_queue(&self, queue: u32) {
        if self.hinting.queue_index().map(u32::from) == Some(queue) {
            drop(self.hinting.shared.take_all());
        }
    }

    fn free_page_start(&self) {
        self.hinting.shared.update(Hinting::request);
        self.notify_config();
    }

    fn free_page_stop(&self) {
        if self.hinting.shared.update(Hinting::stop) {
            self.notify_config();
        }
    }

    fn free_page_done(&self) {
        if self.hinting.shared.update(Hinting::done) {
            self.notify_config();
        }
    }

    fn precopy_notify(&self, reason: PrecopyNotifyReason) {
        // Hints are optional for migration, too.
        if !self.hinting_negotiated() {
            return;
        }

        // Pages that were hinted are not migrated.  If the guest uses them on
        // the destination of a postcopy migration, it requests them from the
        // source, and is stuck until migration is over.  Therefore do not even
        // start if postcopy is possible.
        if migrate_postcopy_ram() {
            return;
        }

        match reason {
            PrecopyNotifyReason::BeforeBitmapSync => self.free_page_stop(),
            PrecopyNotifyReason::AfterBitmapSync if self.vm_running() => self.free_page_start(),
            // Before the device state is migrated, so that the guest reuses the
            // pages as soon as it runs on the destination; likewise if
            // migration has failed or was canceled.
            PrecopyNotifyReason::AfterBitmapSync | PrecopyNotifyReason::Cleanup => {
                self.free_page_done();
            }
            PrecopyNotifyReason::Setup | PrecopyNotifyReason::Complete => {}
            PrecopyNotifyReason::Unknown(reason) => {
                self.error(&format!("{}: {reason} reason unknown", module_path!()));
            }
        }
    }
}
