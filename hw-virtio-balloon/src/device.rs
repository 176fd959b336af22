// SPDX-License-Identifier: GPL-2.0-or-later

//! The device: properties, features, life cycle, and dispatch of events to its
//! parts

mod size;
mod status;
mod vmstate;

use std::ffi::CStr;

use ::migration::prelude::*;
use bql::prelude::*;
use common::field;
use hwcore::{prelude::*, Link};
use qom::prelude::*;
use system::prelude::*;
use util::{prelude::*, Result};
use virtio::{
    bindings::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_ID_BALLOON},
    prelude::*,
    virtio_vmstate,
};
use virtio_balloon_core::{
    counters::State,
    engine::Event,
    spec::{
        includes, offered, VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
    },
};

use self::vmstate::VMSTATE_BALLOON;
use crate::{
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

    /// The optional features that the user wants the device to offer
    #[property(rename = "deflate-on-oom", bit = VIRTIO_BALLOON_F_DEFLATE_ON_OOM, default = false)]
    #[property(rename = "free-page-hint", bit = VIRTIO_BALLOON_F_FREE_PAGE_HINT, default = false)]
    #[property(rename = "page-poison", bit = VIRTIO_BALLOON_F_PAGE_POISON, default = true)]
    #[property(rename = "free-page-reporting", bit = VIRTIO_BALLOON_F_REPORTING, default = false)]
    #[property(rename = "huge-pages", bit = VIRTIO_BALLOON_F_MUST_TELL_HOST, default = false)]
    host_features: u32,

    /// For how many seconds the device does not ask a guest to inflate the
    /// balloon again after it has deflated the balloon because it was out of
    /// memory; 0 to ask all the time
    #[property(rename = "oom-hold-time", default = 0)]
    oom_hold_time: u32,

    #[property(rename = "iothread")]
    iothread: Link<IOThread>,

    /// How many pages the user wants to be in the balloon
    num_pages: BqlCell<u32>,
    /// How many pages are in the balloon, according to the driver
    actual: BqlCell<u32>,
    /// What the guest fills free pages with; 0 unless the driver has accepted
    /// `VIRTIO_BALLOON_F_PAGE_POISON`
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
    /// Calls [`resume`](Self::resume) in the next iteration of the main loop
    bh: BottomHalf,
    /// Expires when the parts should try again what the host could not do
    retry: Timer,
    /// The device was migrated, and the VM has not run since then
    incoming: BqlCell<bool>,
}

virtio_device_type!(VirtIOBalloon, TYPE_VIRTIO_BALLOON);

impl VirtIOBalloon {
    fn offers(&self, feature: u32) -> bool {
        includes(self.host_features, feature)
    }

    /// What the parts can access of the device
    fn context(&self) -> Context<'_> {
        Context {
            vdev: self.upcast(),
            memory: &self.memory,
            poison_val: &self.poison_val,
            bh: &self.bh,
            retry: &self.retry,
        }
    }

    /// All parts, in the order in which they handle an event
    fn parts(&self) -> [&dyn Part; 5] {
        [
            &self.deflate,
            &self.inflate,
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
            |dev: &Self| dev.stats.poll(&dev.context()),
        );
        Timer::init(
            self,
            field!(Self, stats).then(GuestStats::PATIENCE),
            CLOCK_REALTIME,
            Timer::MS,
            |dev: &Self| dev.stats.end_request(false),
        );
        Timer::init(
            self,
            field!(Self, oom_hold).then(OomHold::TIMER),
            CLOCK_VIRTUAL,
            Timer::MS,
            |dev: &Self| dev.oom_hold.elapsed(&dev.context()),
        );
        Timer::init(
            self,
            field!(Self, retry),
            CLOCK_VIRTUAL,
            Timer::MS,
            |dev: &Self| dev.handle(Event::Retry),
        );
        // These cannot be class properties: for these two, the proxies create
        // aliases by name, in addition to the aliases that they create for all
        // class properties, and the names would conflict.
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

    fn request_stats(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let mut request = false;
        v.visit_bool(name, &mut request)?;
        if request {
            self.stats.request(&self.context(), self.driver())?;
        }
        Ok(())
    }

    /// Whether the guest waits for memory of the host
    fn waits_for_memory(&self) -> bool {
        self.deflate.waits_for_memory() || self.repopulation.waits_for_memory()
    }

    fn get_counters(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let members = self.memory.counters().members(&State {
            pages_deflated_unasked: self.unasked(),
            partial_host_pages: self.memory.partial_host_pages(),
            waiting_for_memory: self.waits_for_memory(),
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
        if hint {
            let Some(iothread) = Link::get(self, field!(Self, iothread)) else {
                self.handler.unregister();
                return Err(util::Error::msg(
                    "'free-page-hint' requires 'iothread' to be set",
                ));
            };
            self.hinting.start(iothread, Self::hints_processed);
        }
        let mut add_queue = |part: &dyn Part, size| {
            let index = queues.add_queue(size, &Self::handle_output);
            part.queue().set(Some(index));
        };
        add_queue(&self.inflate, QUEUE_SIZE);
        add_queue(&self.deflate, QUEUE_SIZE);
        add_queue(&self.stats, QUEUE_SIZE);
        if hint {
            add_queue(&self.hinting, HINT_QUEUE_SIZE);
        }
        if self.offers(VIRTIO_BALLOON_F_REPORTING) {
            add_queue(&self.reporting, REPORTING_QUEUE_SIZE);
        }
        self.stats.forget();

        BottomHalf::init(self, field!(Self, bh), c"virtio-balloon", Self::resume);
        if self.offers(VIRTIO_BALLOON_F_MUST_TELL_HOST) {
            MemoryListener::register(
                self,
                field!(Self, memory).then(GuestMemory::LISTENER),
                |dev: &Self, block, range| dev.memory.unmapped(block, range),
            );
        }
        if hint {
            PrecopyNotifier::register(
                self,
                field!(Self, hinting).then(FreePageHinting::NOTIFIER),
                |dev: &Self, reason| dev.hinting.precopy_notify(&dev.context(), reason),
            );
        }
        Ok(())
    }

    fn unrealize(&self) {
        self.hinting.stop();
        self.stats.stop_polling();
        self.stats.end_request(false);
        self.bh.delete();
        self.retry.delete();
        for part in self.parts() {
            part.drop_elements(&self.context());
            part.queue().set(None);
        }
        self.memory.unrealize();
        self.oom_hold.end();
        self.handler.unregister();
    }

    /// The driver has notified a queue.
    fn handle_output(&self, vq: VirtQueue<'_>) {
        if let Some(part) = self.part_of(vq.index().into()) {
            self.deflate_before(part);
            part.handle(&self.context(), Event::Notified);
        }
    }

    /// The bottom half has been scheduled: continue what did not fit into
    /// earlier turns.
    fn resume(&self) {
        self.repopulation.resume(&self.context());
        if self.vm_running() {
            for part in self.parts() {
                self.deflate_before(part);
                part.handle(&self.context(), Event::MainLoop);
            }
        }
    }

    /// The part that works on a queue
    fn part_of(&self, queue: u32) -> Option<&dyn Part> {
        self.parts()
            .into_iter()
            .find(|part| part.queue().get().map(u32::from) == Some(queue))
    }

    /// Handle the deflate queue before the inflate queue, because a page that
    /// is in both of them has to leave the balloon before it goes into it.  C
    /// only handles the queue that was notified, so this is only done if parts
    /// of host pages are remembered for longer than one element.
    fn deflate_before(&self, part: &dyn Part) {
        let cx = self.context();
        let is_inflate = part.queue().get() == self.inflate.queue().get();
        if is_inflate && cx.completes_host_pages() {
            self.deflate.handle(&cx, Event::Notified);
        }
    }

    /// Have all parts handle an event.
    fn handle(&self, event: Event) {
        for part in self.parts() {
            part.handle(&self.context(), event);
        }
    }

    /// The I/O thread has processed hints.
    fn hints_processed(vdev: &VirtIODevice) {
        if let Some(dev) = vdev.downcast::<Self>() {
            dev.hinting.return_processed(&dev.context());
        }
    }

    fn get_features(&self, requested: u64) -> Result<u64> {
        Ok(offered(requested, self.host_features))
    }

    fn reset(&self) {
        for part in self.parts() {
            part.reset(&self.context());
        }
        self.memory.reset();
        self.restart_deflation(0);
        self.oom_hold.end();
        self.poison_val.set(0);
        if self.vm_running() {
            self.repopulation.run(&self.context());
        }
    }

    /// The driver resets a single queue.
    fn queue_reset(&self, queue: u32) {
        if let Some(part) = self.part_of(queue) {
            part.drop_elements(&self.context());
        }
    }

    fn set_status(&self, status: u8) {
        let running = self.vm_running();
        let driver_ok = u32::from(status) & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if running {
            self.repopulation.run(&self.context());
            if self.incoming.replace(false) && driver_ok {
                self.handle(Event::Arrived);
            }
            self.handle(Event::Started);
            if driver_ok {
                self.stats.recover(&self.context());
            }
        } else {
            self.handle(Event::Stopped);
        }
    }

    fn reset_enter(&self, typ: ResetType) {
        // Statistics stay valid when the guest wakes up from suspend
        if typ != ResetType::RESET_TYPE_WAKEUP {
            self.stats.forget();
        }
    }
}

impl ObjectImpl for VirtIOBalloon {
    type ParentType = VirtIODevice;

    const INSTANCE_INIT: Option<InstanceInitFn<Self>> = hwcore::instance_init!(VirtIOBalloon {
        parent: [parent_obj],
        properties: [host_features, oom_hold_time, iothread],
        num_pages: BqlCell::new(0),
        actual: BqlCell::new(0),
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
        bh: BottomHalf::default(),
        retry: Timer::default(),
        incoming: BqlCell::new(false),
    });
    const INSTANCE_POST_INIT: Option<fn(&Self)> = Some(Self::post_init);
    const CLASS_INIT: fn(&mut Self::Class) = Self::Class::class_init::<Self>;
    const CLASS_PROPERTIES: &'static [ObjectProperty<Self>] = &[
        ObjectProperty::new(c"balloon-counters", c"balloon counters").getter(&Self::get_counters),
        ObjectProperty::new(c"balloon-status", c"balloon status").getter(&Self::get_status),
        ObjectProperty::new(c"guest-stats-request", c"bool").setter(&Self::request_stats),
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
