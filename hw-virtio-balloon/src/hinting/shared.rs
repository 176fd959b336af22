// SPDX-License-Identifier: GPL-2.0-or-later

//! The state that the main loop and the I/O thread share
//!
//! # Threads
//!
//! Passing a hint to migration waits for a lock.  The migration thread holds
//! that lock while it sends pages, which can take tens of milliseconds.  The
//! user has to provide an I/O thread so that it waits, and not the main loop
//! with the big QEMU lock.
//!
//! For this device, the I/O thread does nothing but process hints, and it never
//! takes the big QEMU lock.  It only has access to [`Shared`]: the state of
//! hinting, and the elements that were popped from the queue.  The main loop
//! pops the elements from the queue and returns them.  Thus the queue and the
//! device are only accessed with the big QEMU lock taken.  A driver that places
//! its buffers in device memory, which can only be accessed with that lock,
//! cannot cause a deadlock.
//!
//! The main loop waits for the I/O thread, with the big QEMU lock taken, in
//! three cases: when a round ends, when the device is reset or removed, and
//! when the VM is stopped.  It waits for the one hint that the I/O thread is
//! passing on at that moment, because migration must not get a hint after it
//! has ended the round.  [`HintExchange`] has the locking; it does not depend
//! on QEMU, so that it can be tested with all interleavings of the threads.

use ::migration::{prelude::*, InvalidError, ToMigrationStateShared};
use virtio::prelude::*;
use virtio_balloon_core::{
    hint_exchange::{self, Command, HintElement, HintExchange},
    hinting::{HintStatus, Hinting},
};

/// An element of the queue for hints
#[derive(Debug)]
pub struct Element(pub VirtQueueElement);

/// An element that has to be returned to the driver
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

/// What the main loop and the I/O thread share
#[derive(Debug, Default)]
pub struct Shared {
    pub exchange: HintExchange<Element>,
}

/// The part of [`Shared`] that is migrated
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
