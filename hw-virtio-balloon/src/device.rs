// SPDX-License-Identifier: GPL-2.0-or-later

//! The device itself: properties, features, configuration space, life cycle

mod size;
mod vmstate;

use std::ffi::CStr;

use ::migration::prelude::*;
use bql::prelude::*;
use common::field;
use hwcore::{prelude::*, Link};
use qom::prelude::*;
use system::{main_loop_schedule_oneshot, prelude::*};
use util::{prelude::*, Result};
use virtio::{
    bindings::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_ID_BALLOON},
    prelude::*,
    virtio_vmstate,
};
use virtio_balloon_core::{
    counters::State,
    features::{
        has_feature, offered, VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
    },
};

use self::vmstate::{Registers, VMSTATE_BALLOON};
use crate::{
    deferred,
    guest_memory::{Direction, GuestMemory},
    hinting::FreePageHinting,
    oom_hold::OomHold,
    page_queue::PageQueue,
    part::{Context, Part},
    repopulation::Repopulation,
    reporting::Reporting,
    stats::GuestStats,
    TYPE_VIRTIO_BALLOON,
};

/// Size of the queues for inflating, deflating and statistics
const QUEUE_SIZE: u16 = 128;
/// Size of the queue for hints
const HINT_QUEUE_SIZE: u16 = 1024;
/// Size of the queue for reports
const REPORTING_QUEUE_SIZE: u16 = 32;
/// The longest time for `oom-hold-time`, in seconds: a day
const MAX_OOM_HOLD_TIME: u32 = 24 * 60 * 60;

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
    #[property(rename = "huge-pages", bit = VIRTIO_BALLOON_F_MUST_TELL_HOST, default = false)]
    host_features: u32,

    /// For how many seconds a guest that has deflated the balloon because it was
    /// out of memory is not asked to inflate it again; 0 to ask all the time
    #[property(rename = "oom-hold-time", default = 0)]
    oom_hold_time: u32,

    #[property(rename = "iothread")]
    iothread: Link<IOThread>,

    registers: BqlRefCell<Registers>,
    /// What the guest fills free pages with, if it has negotiated to tell
    poison_val: BqlCell<u32>,

    memory: GuestMemory,
    inflate: PageQueue,
    deflate: PageQueue,
    stats: GuestStats,
    hinting: FreePageHinting,
    reporting: Reporting,
    oom_hold: OomHold,
    repopulation: Repopulation,
    handler: BalloonHandler,
    /// The device was migrated, and the VM has not run since
    incoming: BqlCell<bool>,
}

virtio_device_type!(VirtIOBalloon, TYPE_VIRTIO_BALLOON);

impl VirtIOBalloon {
    fn offers(&self, feature: u32) -> bool {
        has_feature(self.host_features, feature)
    }

    /// All parts, in the order of their queues
    fn parts(&self) -> [&dyn Part; 5] {
        [
            &self.inflate,
            &self.deflate,
            &self.stats,
            &self.hinting,
            &self.reporting,
        ]
    }

    fn post_init(&self) {
        Timer::init(
            self,
            field!(Self, stats).then(GuestStats::TIMER),
            CLOCK_VIRTUAL,
            Timer::MS,
            Self::poll_stats,
        );
        Timer::init(
            self,
            field!(Self, oom_hold).then(OomHold::TIMER),
            CLOCK_VIRTUAL,
            Timer::MS,
            Self::oom_hold_elapsed,
        );
        Timer::init(
            self,
            field!(Self, deflate).then(PageQueue::RETRY),
            CLOCK_VIRTUAL,
            Timer::MS,
            Self::retry_deflate,
        );
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

    fn get_stats(&self, v: &Visitor, name: &CStr) -> Result<()> {
        self.stats.get_stats(v, name)
    }

    fn get_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        self.stats.get_poll_interval(v, name)
    }

    fn set_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        self.stats.set_poll_interval(v, name)
    }

    fn get_counters(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let members = self.memory.counters().members(&State {
            pages_deflated_unasked: self.unasked(),
            partial_host_pages: self.memory.partial_host_pages(),
            waiting_for_memory: self.deflate.waits_for_memory()
                || self.repopulation.waits_for_memory(),
            oom_holds: self.oom_hold.count(),
            oom_hold_active: self.oom_hold.is_active(),
        });
        v.visit_struct(name, |v| {
            members
                .into_iter()
                .try_for_each(|(member, mut value)| v.visit_u64(member, &mut value))
        })
    }

    fn realize(&self, queues: &mut VirtioRealize<'_, Self>) -> Result<()> {
        ensure!(
            self.oom_hold_time <= MAX_OOM_HOLD_TIME,
            "'oom-hold-time' must not be more than {MAX_OOM_HOLD_TIME} seconds"
        );
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

        let inflate = queues.add_queue(QUEUE_SIZE, &Self::handle_inflate);
        self.inflate.realize(self, inflate);
        let deflate = queues.add_queue(QUEUE_SIZE, &Self::handle_deflate);
        self.deflate.realize(self, deflate);
        let stats = queues.add_queue(QUEUE_SIZE, &Self::handle_stats);
        self.stats.realize(self, stats);
        if hint {
            let hinting = queues.add_queue(HINT_QUEUE_SIZE, &Self::handle_hints);
            self.hinting.realize(self, hinting);
        }
        if self.offers(VIRTIO_BALLOON_F_REPORTING) {
            let reporting = queues.add_queue(REPORTING_QUEUE_SIZE, &Self::handle_reports);
            self.reporting.realize(self, reporting);
        }
        self.register_callbacks(hint);
        Ok(())
    }

    /// The device is realized; the parts unregister what is theirs.
    fn register_callbacks(&self, hint: bool) {
        if self.offers(VIRTIO_BALLOON_F_MUST_TELL_HOST) {
            MemoryListener::register(
                self,
                field!(Self, memory).then(GuestMemory::LISTENER),
                Self::ram_unmapped,
            );
        }
        if hint {
            PrecopyNotifier::register(
                self,
                field!(Self, hinting).then(FreePageHinting::NOTIFIER),
                Self::precopy_notify,
            );
        }

        let inflate = field!(Self, inflate).then(PageQueue::BH);
        BottomHalf::init(
            self,
            inflate,
            c"virtio-balloon-inflate",
            Self::resume_inflate,
        );
        let deflate = field!(Self, deflate).then(PageQueue::BH);
        BottomHalf::init(
            self,
            deflate,
            c"virtio-balloon-deflate",
            Self::resume_deflate,
        );
        let hinting = field!(Self, hinting).then(FreePageHinting::BH);
        BottomHalf::init(self, hinting, c"virtio-balloon-hints", Self::resume_hints);
        let reporting = field!(Self, reporting).then(Reporting::BH);
        BottomHalf::init(
            self,
            reporting,
            c"virtio-balloon-reports",
            Self::resume_reports,
        );
        let repopulation = field!(Self, repopulation).then(Repopulation::BH);
        BottomHalf::init(
            self,
            repopulation,
            c"virtio-balloon-repopulation",
            Self::repopulate,
        );
    }

    fn unrealize(&self) {
        for part in self.parts() {
            part.unrealize(self);
        }
        self.repopulation.unrealize();
        self.memory.unrealize();
        self.oom_hold.end();
        self.handler.unregister();
    }

    /// A page that is in both queues has to leave the balloon before it goes into
    /// it.  C works on what it is notified of, so this is only done if the driver
    /// has promised to tell, and parts of host pages are remembered.
    fn deflate_first(&self) {
        if self.completes_host_pages() {
            self.deflate.run(self);
        }
    }

    fn handle_inflate(&self, _vq: VirtQueue<'_>) {
        self.deflate_first();
        self.inflate.run(self);
    }

    fn handle_deflate(&self, _vq: VirtQueue<'_>) {
        self.deflate.run(self);
    }

    fn handle_stats(&self, _vq: VirtQueue<'_>) {
        self.stats.run(self);
    }

    fn handle_hints(&self, _vq: VirtQueue<'_>) {
        self.hinting.run(self);
    }

    fn handle_reports(&self, _vq: VirtQueue<'_>) {
        self.reporting.run(self);
    }

    fn resume_inflate(&self) {
        self.deflate_first();
        deferred::resume(&self.inflate, self);
    }

    fn resume_deflate(&self) {
        deferred::resume(&self.deflate, self);
    }

    fn resume_hints(&self) {
        deferred::resume(&self.hinting, self);
    }

    fn resume_reports(&self) {
        deferred::resume(&self.reporting, self);
    }

    fn retry_deflate(&self) {
        self.deflate.retry();
    }

    fn repopulate(&self) {
        self.repopulation.run(self);
    }

    fn poll_stats(&self) {
        self.stats.poll(self);
    }

    fn oom_hold_elapsed(&self) {
        self.oom_hold.elapsed(self);
    }

    fn ram_unmapped(&self, block: RamBlockId, range: RAMBlockRange) {
        self.memory.unmapped(block, range);
    }

    fn precopy_notify(&self, reason: PrecopyNotifyReason) {
        self.hinting.precopy_notify(self, reason);
    }

    fn get_features(&self, requested: u64) -> Result<u64> {
        Ok(offered(requested, self.host_features))
    }

    fn reset(&self) {
        for part in self.parts() {
            part.reset(self);
        }
        self.incoming.set(false);
        self.memory.reset();
        self.restart_deflation(0);
        self.oom_hold.end();
        self.poison_val.set(0);
        if VirtioDeviceMethods::vm_running(&self) {
            self.repopulation.run(self);
        }
    }

    /// The driver resets a single queue: what was taken from it must not be
    /// put into the new one.
    fn queue_reset(&self, queue: u32) {
        for part in self.parts() {
            part.queue_reset(self, queue);
        }
    }

    fn set_status(&self, status: u8) {
        let running = VirtioDeviceMethods::vm_running(&self);
        if running {
            self.repopulation.run(self);
        }
        let driver_ok = u32::from(status) & VIRTIO_CONFIG_S_DRIVER_OK != 0;

        let incoming = running && self.incoming.replace(false) && driver_ok;

        for part in self.parts() {
            if incoming {
                part.post_load(self);
            }
            part.vm_state_change(self, running);
        }
        if running && driver_ok {
            self.stats.recover(self);
        }
    }

    fn reset_enter(&self, typ: ResetType) {
        // Statistics stay valid when the guest wakes up from suspend.
        if typ != ResetType::RESET_TYPE_WAKEUP {
            self.stats.forget();
        }
    }
}

impl Context for VirtIOBalloon {
    fn queue(&self, index: u16) -> Option<VirtQueue<'_>> {
        VirtioDeviceMethods::queue(self, index)
    }

    fn vm_running(&self) -> bool {
        VirtioDeviceMethods::vm_running(&self)
    }

    fn has_feature(&self, bit: u32) -> bool {
        VirtioDeviceMethods::has_feature(&self, bit)
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn completes_host_pages(&self) -> bool {
        self.offers(VIRTIO_BALLOON_F_MUST_TELL_HOST)
            && Context::has_feature(self, VIRTIO_BALLOON_F_MUST_TELL_HOST)
    }

    fn poison_val(&self) -> u32 {
        self.poison_val.get()
    }

    fn iothread(&self) -> Option<Owned<IOThread>> {
        Link::get(self, field!(Self, iothread))
    }

    fn notify_config(&self) {
        VirtioDeviceMethods::notify_config(&self);
    }

    fn error(&self, msg: &str) {
        VirtioDeviceMethods::error(&self, msg);
    }

    fn hints_processed(&self) -> Box<dyn FnOnce() + Send> {
        // The device is passed on to the main loop, because it can only be
        // released there.
        let dev = self.to_owned_ref();
        Box::new(move || main_loop_schedule_oneshot(move || dev.hinting.return_processed(&*dev)))
    }
}

impl ObjectImpl for VirtIOBalloon {
    type ParentType = VirtIODevice;

    const INSTANCE_INIT: Option<InstanceInitFn<Self>> = hwcore::instance_init!(VirtIOBalloon {
        parent: [parent_obj],
        properties: [host_features, oom_hold_time, iothread],
        registers: BqlRefCell::new(Registers::default()),
        poison_val: BqlCell::new(0),
        memory: GuestMemory::default(),
        inflate: PageQueue::new(Direction::Inflate),
        deflate: PageQueue::new(Direction::Deflate),
        stats: GuestStats::default(),
        hinting: FreePageHinting::default(),
        reporting: Reporting::default(),
        oom_hold: OomHold::default(),
        repopulation: Repopulation::default(),
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
