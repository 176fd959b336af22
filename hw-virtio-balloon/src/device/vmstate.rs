// SPDX-License-Identifier: GPL-2.0-or-later

//! Migration format, which is that of the C implementation

use ::migration::{prelude::*, Infallible};
use virtio::prelude::*;
use virtio_balloon_core::spec::{
    Config, VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_POISON,
};

use super::VirtIOBalloon;

impl VirtIOBalloon {
    fn post_load(&self, _version_id: u8) -> Result<(), Infallible> {
        self.stats.rearm_timer();
        // A hold is not migrated, because the migration format of C has no room
        // for it.  But what the driver saw as its target is a part of the
        // configuration space that is migrated.
        let config = Config::read_from(&self.last_config());
        self.oom_hold
            .post_load(&config, self.num_pages.get(), self.oom_hold_time);
        self.restart_deflation(self.actual.get());
        self.memory.arrive();
        self.incoming.set(true);
        Ok(())
    }

    fn hinting_needed(&self) -> bool {
        self.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT)
    }

    fn page_poison_needed(&self) -> bool {
        self.has_feature(VIRTIO_BALLOON_F_PAGE_POISON)
    }
}

static VMSTATE_FREE_PAGE_HINT: VMStateDescription<VirtIOBalloon> =
    VMStateDescriptionBuilder::<VirtIOBalloon>::new()
        // free page hinting was once called free page reporting
        .name(c"virtio-balloon-device/free-page-report")
        .version_id(1)
        .minimum_version_id(1)
        .needed(&VirtIOBalloon::hinting_needed)
        .fields(vmstate_fields! {
            vmstate_of!(VirtIOBalloon, hinting.shared),
        })
        .build();

static VMSTATE_PAGE_POISON: VMStateDescription<VirtIOBalloon> =
    VMStateDescriptionBuilder::<VirtIOBalloon>::new()
        .name(c"virtio-balloon-device/page-poison")
        .version_id(1)
        .minimum_version_id(1)
        .needed(&VirtIOBalloon::page_poison_needed)
        .fields(vmstate_fields! {
            vmstate_of!(VirtIOBalloon, poison_val),
        })
        .build();

pub const VMSTATE_BALLOON: VMStateDescription<VirtIOBalloon> =
    VMStateDescriptionBuilder::<VirtIOBalloon>::new()
        .name(c"virtio-balloon-device")
        .version_id(1)
        .minimum_version_id(1)
        .post_load(&VirtIOBalloon::post_load)
        .fields(vmstate_fields! {
            vmstate_of!(VirtIOBalloon, num_pages),
            vmstate_of!(VirtIOBalloon, actual),
        })
        .subsections(vmstate_subsections!(
            VMSTATE_FREE_PAGE_HINT,
            VMSTATE_PAGE_POISON,
        ))
        .build();
