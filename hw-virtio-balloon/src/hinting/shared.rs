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
//! There is one wait with the big QEMU lock: when a round ends, the device is
//! reset or removed, or the VM is stopped, for the hint that the I/O thread is
//! passing on at that moment, and not for others.  Without it, migration could
//! get a hint after it has ended the round.  [`HintExchange`] has the locking,
//! without QEMU, so that it can be tested with all interleavings of the threads.

use ::migration::{prelude::*, InvalidError, ToMigrationStateShared};
use virtio::prelude::*;
use virtio_balloon_core::{
    hint_exchange::{self, Command, HintElement, HintExchange},
    hinting::{HintStatus, Hinting},
};

/// An element of the queue for hints
#[derive(Debug)]
pub struct Element(pub VirtQueueElement);

/// An element that is to be returned
pub type Processed = hint_exchange::Processed<Element>;

impl HintElement for Element {
    fn command(&self) -> Command {
        if self.0.has_out() {
            let id = self.0.out_reader().read_u32();
            id.map_or(Command::Bad, Command::Id)
        } else {
            Command::None
        }
    }

    fn hint(&self, index: usize) -> bool {
        let buf = self.0.in_buffer(index);
        buf.is_some_and(|buf| {
            buf.range.free_page_hint();
            true
        })
    }
}

/// What the I/O thread and the main loop share
#[derive(Debug, Default)]
pub struct Shared {
    pub exchange: HintExchange<Element>,
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
        let state = self.exchange.state();
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
        self.exchange
            .update(|state| *state = Hinting::arrive(status, source.cmd_id));
        Ok(())
    }
}
