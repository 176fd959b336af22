// SPDX-License-Identifier: GPL-2.0-or-later

//! The device itself: properties, features, configuration space, life cycle

use std::ffi::CStr;

use ::migration::{
    precopy::{migration_in_bg_snapshot, migration_in_incoming_postcopy},
    prelude::*,
};
use bql::prelude::*;
use common::field;
use hwcore::{prelude::*, Link};
use qom::prelude::*;
use system::{prelude::*, ram_block_discard_is_disabled, send_balloon_change};
use util::{prelude::*, Result};
use virtio::{
    bindings::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_ID_BALLOON},
    prelude::*,
    virtio_vmstate,
};
use virtio_balloon_core::{
    config::{config_size, Config},
    features::{
        has_feature, offered, VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
    },
    pages::{pages_to_bytes, target_to_pages},
};

use crate::{
    discard::Memory,
    events::{
        trace_virtio_balloon_get_config, trace_virtio_balloon_set_config,
        trace_virtio_balloon_to_target,
    },
    hinting::FreePageHinting,
    inflate::PageQueue,
    migration::VMSTATE_BALLOON,
    reporting::ReportQueue,
    stats::GuestStats,
    TYPE_VIRTIO_BALLOON,
};

/// Size of the queues for inflating, deflating and statistics
const QUEUE_SIZE: u16 = 128;
/// Size of the queue for hints
const HINT_QUEUE_SIZE: u16 = 1024;
/// Size of the queue for reports
const REPORTING_QUEUE_SIZE: u16 = 32;

/// Index of the queue for pages that go into the balloon
pub const INFLATE_QUEUE: u16 = 0;
/// Index of the queue for pages that leave the balloon
pub const DEFLATE_QUEUE: u16 = 1;
/// Index of the queue for statistics
pub const STATS_QUEUE: u16 = 2;

/// A virtio memory balloon
#[repr(C)]
#[derive(qom::Object, hwcore::Device)]
pub struct VirtIOBalloon {
    parent_obj: ParentField<VirtIODevice>,

    /// The optional features that the user wants to be offered
    #[property(rename = "deflate-on-oom", bit = VIRTIO_BALLOON_F_DEFLATE_ON_OOM, default = false)]
    #[property(rename = "free-page-hint", bit = VIRTIO_BALLOON_F_FREE_PAGE_HINT, default = false)]
    #[property(rename = "page-poison", bit = VIRTIO_BALLOON_F_PAGE_POISON, default = true)]
    #[property(rename = "free-page-reporting", bit = VIRTIO_BALLOON_F_REPORTING, default = false)]
    host_features: u32,

    #[property(rename = "iothread")]
    pub iothread: Link<IOThread>,

    /// How many pages the user wants to be in the balloon
    pub num_pages: BqlCell<u32>,
    /// How many pages are in the balloon, according to the driver
    pub actual: BqlCell<u32>,
    /// What the guest fills free pages with, if it has negotiated to tell
    pub poison_val: BqlCell<u32>,

    /// What the device knows of the guest's memory, and has done with it
    pub memory: Memory,
    pub inflate: PageQueue,
    pub deflate: PageQueue,
    pub stats: GuestStats,
    pub hinting: FreePageHinting,
    pub reports: ReportQueue,
    handler: BalloonHandler,
    /// The device was migrated, and the VM has not been started since
    pub incoming: BqlCell<bool>,
}

virtio_device_type!(VirtIOBalloon, TYPE_VIRTIO_BALLOON);

impl VirtIOBalloon {
    fn offers(&self, feature: u32) -> bool {
        has_feature(self.host_features, feature)
    }

    /// Whether discarding memory would do harm: if it is pinned, in postcopy,
    /// and while a background snapshot is taken.
    pub fn discard_inhibited() -> bool {
        ram_block_discard_is_disabled()
            || migration_in_incoming_postcopy()
            || migration_in_bg_snapshot()
    }

    fn ram_size() -> u64 {
        MachineState::current().map_or(0, MachineState::current_ram_size)
    }

    fn config_size(&self) -> usize {
        config_size(self.host_features)
    }

    fn post_init(&self) {
        self.init_stats();
        // Not class properties: the proxies create aliases for all of those,
        // but also for the following two.
        self.add_property(
            &ObjectProperty::new(c"guest-stats", c"guest statistics").getter(&Self::get_stats),
        );
        self.add_property(
            &ObjectProperty::new(c"guest-stats-polling-interval", c"int")
                .getter(&Self::get_poll_interval)
                .setter(&Self::set_poll_interval),
        );
    }

    fn get_counters(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let members = self
            .memory
            .counters
            .get()
            .members(self.memory.partial_host_pages());
        v.visit_struct(name, |v| {
            members
                .into_iter()
                .try_for_each(|(member, mut value)| v.visit_u64(member, &mut value))
        })
    }

    fn realize(&self, queues: &mut VirtioRealize<'_, Self>) -> Result<()> {
        ensure!(
            BalloonHandler::register(self, field!(Self, handler)).is_ok(),
            "Only one balloon device is supported"
        );
        let hint = self.offers(VIRTIO_BALLOON_F_FREE_PAGE_HINT);
        if hint && !self.iothread.is_set() {
            self.handler.unregister();
            return Err(util::Error::msg(
                "'free-page-hint' requires 'iothread' to be set",
            ));
        }

        queues.add_queue(QUEUE_SIZE, &Self::handle_inflate);
        queues.add_queue(QUEUE_SIZE, &Self::handle_deflate);
        queues.add_queue(QUEUE_SIZE, &Self::handle_stats);
        if hint {
            let queue = queues.add_queue(HINT_QUEUE_SIZE, &Self::handle_hints);
            self.start_hinting(queue);
        }
        if self.offers(VIRTIO_BALLOON_F_REPORTING) {
            let queue = queues.add_queue(REPORTING_QUEUE_SIZE, &Self::handle_reports);
            self.start_reports(queue);
        }
        self.start_pages();
        self.stats.reset();
        Ok(())
    }

    fn unrealize(&self) {
        self.stop_pages();
        self.stop_reports();
        self.stop_hinting();
        self.stop_polling_stats();
        self.stats.drop_element();
        self.handler.unregister();
    }

    fn get_features(&self, requested: u64) -> Result<u64> {
        Ok(offered(requested, self.host_features))
    }

    fn get_config(&self, data: &mut [u8]) {
        let config = Config {
            num_pages: self.num_pages.get(),
            actual: self.actual.get(),
            free_page_hint_cmd_id: self.hinting.config_cmd_id(),
            poison_val: self.poison_val.get(),
        };
        trace_virtio_balloon_get_config(config.num_pages, config.actual);
        config.write_to(data);
    }

    fn set_config(&self, data: &[u8]) {
        let config = Config::read_from(data);
        let old_actual = self.actual.replace(config.actual);

        if config.actual != old_actual {
            send_balloon_change(self.balloon_actual());
        }
        self.poison_val
            .set(if self.has_feature(VIRTIO_BALLOON_F_PAGE_POISON) {
                config.poison_val
            } else {
                0
            });
        trace_virtio_balloon_set_config(config.actual, old_actual);
    }

    fn reset(&self) {
        self.reset_pages();
        self.reset_reports();
        self.reset_hinting();
        self.stats.unpop_element();
        self.poison_val.set(0);
    }

    /// The driver resets a single queue: what was taken from it must not be
    /// put into the new one.
    fn queue_reset(&self, queue: u32) {
        if queue == u32::from(STATS_QUEUE) {
            self.stats.drop_element();
        }
        self.reset_page_queue(queue);
        self.reset_hint_queue(queue);
        self.reset_report_queue(queue);
    }

    fn set_status(&self, status: u8) {
        if self.vm_running() {
            let driver_ok = u32::from(status) & VIRTIO_CONFIG_S_DRIVER_OK != 0;
            if self.incoming.replace(false) && driver_ok {
                self.expect_pages();
                self.expect_hints();
                self.expect_reports();
            }
            if driver_ok {
                self.recover_stats();
            }
            self.resume_pages();
            self.resume_hinting();
            self.resume_reports();
        } else {
            self.suspend_pages();
            self.suspend_hinting();
            self.suspend_reports();
        }
    }

    fn reset_enter(&self, typ: ResetType) {
        // Statistics stay valid when the guest wakes up from suspend.
        if typ != ResetType::RESET_TYPE_WAKEUP {
            self.stats.reset();
        }
    }
}

impl BalloonDevice for VirtIOBalloon {
    fn balloon_to_target(&self, target: u64) {
        let ram_size = Self::ram_size();
        let target = target.min(ram_size);

        if target != 0 {
            self.num_pages.set(target_to_pages(ram_size, target));
            self.notify_config();
        }
        trace_virtio_balloon_to_target(target, self.num_pages.get());
    }

    fn balloon_actual(&self) -> u64 {
        // The driver is free to claim that more than all memory is in the
        // balloon; it only makes a fool of itself with the user.
        Self::ram_size().wrapping_sub(pages_to_bytes(self.actual.get()))
    }
}

impl ObjectImpl for VirtIOBalloon {
    type ParentType = VirtIODevice;

    const INSTANCE_INIT: Option<InstanceInitFn<Self>> = hwcore::instance_init!(VirtIOBalloon {
        parent: [parent_obj],
        properties: [host_features, iothread],
        num_pages: BqlCell::new(0),
        actual: BqlCell::new(0),
        poison_val: BqlCell::new(0),
        memory: Memory::default(),
        inflate: PageQueue::default(),
        deflate: PageQueue::default(),
        stats: GuestStats::default(),
        hinting: FreePageHinting::default(),
        reports: ReportQueue::default(),
        handler: BalloonHandler::new(),
        incoming: BqlCell::new(false),
    });
    const INSTANCE_POST_INIT: Option<fn(&Self)> = Some(Self::post_init);
    const CLASS_INIT: fn(&mut Self::Class) = Self::Class::class_init::<Self>;
    const CLASS_PROPERTIES: &'static [ObjectProperty<Self>] =
        &[
            ObjectProperty::new(c"balloon-counters", c"balloon counters")
                .getter(&Self::get_counters),
        ];
}

impl DeviceImpl for VirtIOBalloon {
    const VMSTATE: Option<VMStateDescription<Self>> = Some(virtio_vmstate(c"virtio-balloon", 1));
    const CATEGORY: Option<DeviceCategory> = Some(DeviceCategory::DEVICE_CATEGORY_MISC);
}

impl ResettablePhasesImpl for VirtIOBalloon {
    const ENTER: Option<fn(&Self, ResetType)> = Some(Self::reset_enter);
}

impl VirtioDeviceImpl for VirtIOBalloon {
    const DEVICE_ID: u16 = VIRTIO_ID_BALLOON as u16;
    const CONFIG_SIZE: fn(&Self) -> usize = Self::config_size;
    const REALIZE: fn(&Self, &mut VirtioRealize<'_, Self>) -> Result<()> = Self::realize;
    const UNREALIZE: Option<fn(&Self)> = Some(Self::unrealize);
    const GET_FEATURES: fn(&Self, u64) -> Result<u64> = Self::get_features;
    const GET_CONFIG: Option<fn(&Self, &mut [u8])> = Some(Self::get_config);
    const SET_CONFIG: Option<fn(&Self, &[u8])> = Some(Self::set_config);
    const RESET: Option<fn(&Self)> = Some(Self::reset);
    const QUEUE_RESET: Option<fn(&Self, u32)> = Some(Self::queue_reset);
    const SET_STATUS: Option<fn(&Self, u8)> = Some(Self::set_status);
    const VIRTIO_VMSTATE: Option<VMStateDescription<Self>> = Some(VMSTATE_BALLOON);
}
