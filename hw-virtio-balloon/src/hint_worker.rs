// SPDX-License-Identifier: GPL-2.0-or-later

//! What the I/O thread does with hints
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
        Mutex, MutexGuard, PoisonError,
    },
};

use ::migration::{prelude::*, InvalidError, ToMigrationStateShared};
use virtio::prelude::*;
use virtio_balloon_core::hinting::{HintStatus, Hinting};

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

/// An element that is to be returned
#[derive(Debug)]
pub struct Processed {
    pub elem: VirtQueueElement,
    /// The driver has sent something that is too short to be a command
    pub bad_command: bool,
}

/// A panic would have ended QEMU.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// What the driver sees in the configuration space
    pub fn config_cmd_id(&self) -> u32 {
        self.config_cmd_id.load(Ordering::Relaxed)
    }

    /// Change the state, after waiting for the I/O thread to be done with what
    /// it is currently working on.
    pub fn update<R>(&self, f: impl FnOnce(&mut Hinting) -> R) -> R {
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

    /// Add an element for the I/O thread.  Returns whether that has to be asked
    /// to [`process_all`](Self::process_all).
    pub fn add(&self, elem: VirtQueueElement) -> bool {
        let mut elements = lock(&self.elements);
        elements.pending.push_back(elem);
        !std::mem::replace(&mut elements.scheduled, true)
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

    /// Process all elements that are pending.  To be called in the I/O thread.
    pub fn process_all(&self) {
        while self.process_next() {}
    }

    /// Take the elements that the I/O thread is done with.
    pub fn take_processed(&self) -> Vec<Processed> {
        take(&mut lock(&self.elements).done)
    }

    /// Take all elements from the I/O thread, and drop them.
    pub fn drop_all(&self) {
        // wait for the one that it is working on
        let state = lock(&self.state);
        let mut elements = lock(&self.elements);
        let all = (take(&mut elements.done), take(&mut elements.pending));
        drop(elements);
        drop(state);
        drop(all);
    }

    /// Take all elements from the I/O thread, in the order in which they came.
    /// Those that it did not process are processed now, but hints are optional,
    /// so do not wait for migration to take them.
    pub fn finish_all(&self) -> Vec<Processed> {
        let mut state = lock(&self.state);
        let mut elements = lock(&self.elements);
        let (mut done, pending) = (take(&mut elements.done), take(&mut elements.pending));
        drop(elements);
        done.extend(
            pending
                .into_iter()
                .map(|elem| self.process(&mut state, elem, false)),
        );
        drop(state);
        done
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
