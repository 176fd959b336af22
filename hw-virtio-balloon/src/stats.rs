// SPDX-License-Identifier: GPL-2.0-or-later

//! Memory statistics of the guest (virtio 1.3, section 5.5.6.3)
//!
//! The driver makes one buffer with statistics available.  The device keeps it,
//! and returns it when it wants new statistics; the driver then fills the
//! buffer again.

use std::{
    ffi::CStr,
    time::{SystemTime, UNIX_EPOCH},
};

use bql::prelude::*;
use common::{field, Field};
use system::send_balloon_stats;
use util::{prelude::*, Error, Result};
use virtio::prelude::*;
use virtio_balloon_core::{
    counters::count,
    engine::Event,
    spec::VIRTIO_BALLOON_F_STATS_VQ,
    stats::{check_poll_interval, Stats},
    status::{Driver, StatsState},
};

use crate::part::{Context, Part};

/// The part of the device that handles statistics
#[derive(Default)]
pub struct GuestStats {
    queue: BqlCell<Option<u16>>,
    latest: BqlRefCell<Stats>,
    /// The buffer to return when new statistics are wanted
    element: BqlRefCell<Option<VirtQueueElement>>,
    /// Interval in seconds; 0 if statistics are not polled
    poll_interval: BqlCell<u32>,
    /// Armed only while statistics are polled
    timer: Timer,
    /// When the driver was asked for statistics, in milliseconds of the virtual
    /// clock; `None` if it has answered
    asked: BqlCell<Option<u64>>,
    /// The user wants to be told when the driver sends statistics, see
    /// [`request`](Self::request).
    requested: BqlCell<bool>,
    /// Expires when the user has waited long enough
    patience: Timer,
}

/// How long the driver may take to send statistics that the user has requested,
/// in milliseconds
const PATIENCE: u64 = 1000;

impl GuestStats {
    pub const TIMER: Field<Self, Timer> = field!(Self, timer);
    pub const PATIENCE: Field<Self, Timer> = field!(Self, patience);

    /// The interval at which statistics are polled, in seconds
    pub fn poll_interval(&self) -> u32 {
        self.poll_interval.get()
    }

    /// When the driver last sent statistics, in seconds since the Unix epoch; 0
    /// if it never did
    pub fn last_update(&self) -> i64 {
        self.latest.borrow().last_update
    }

    /// Whether the driver sends statistics
    pub fn state(&self, cx: &Context<'_>, driver: Driver) -> StatsState {
        if driver != Driver::Ready || !cx.vdev.has_feature(VIRTIO_BALLOON_F_STATS_VQ) {
            StatsState::Unsupported
        } else if let Some(asked) = self.asked.get() {
            StatsState::Asked(CLOCK_VIRTUAL.get_ms().saturating_sub(asked) / 1000)
        } else if self.last_update() == 0 {
            StatsState::NeverSent
        } else {
            StatsState::Answered
        }
    }

    /// Forget all statistics.
    pub fn forget(&self) {
        *self.latest.borrow_mut() = Stats::default();
    }

    fn vq<'a>(&self, cx: &Context<'a>) -> Option<VirtQueue<'a>> {
        VirtQueue::of(cx.vdev, self.queue.get()?)
    }

    fn take_element(&self) -> Option<VirtQueueElement> {
        self.element.borrow_mut().take()
    }

    fn set_timer(&self, seconds: u32) {
        self.timer
            .modify(CLOCK_VIRTUAL.get_ms() + u64::from(seconds) * 1000);
    }

    /// Poll again after the configured interval, if polling is enabled.
    pub fn rearm_timer(&self) {
        let interval = self.poll_interval.get();
        if interval > 0 {
            self.set_timer(interval);
        }
    }

    /// The driver has sent statistics.
    #[doc(alias = "virtio_balloon_receive_stats")]
    fn receive(&self, cx: &Context<'_>, vq: &VirtQueue<'_>) {
        if let Some(elem) = vq.pop() {
            cx.memory.count(|c| count(&mut c.stats_answers, 1));
            self.asked.set(None);
            // The host's clock is fine here: only the user sees the time
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| t.as_secs() as i64);
            let mut reader = elem.out_reader();
            self.latest
                .borrow_mut()
                .update(std::iter::from_fn(|| read_stat(&mut reader)), now);

            let old = self.element.borrow_mut().replace(elem);
            if let Some(old) = old {
                // A driver that follows the specification does not send a
                // second buffer before the first has been returned.
                old.push(0);
                vq.notify();
            }
            self.end_request(true);
        }
        self.rearm_timer();
    }

    /// The VM is running and the driver is ready.  This is also called if that
    /// was so before.
    ///
    /// After migration, the state of the queue says that the buffer that the
    /// source kept is in flight, but the device does not have it.  The queue
    /// only knows how many elements are in flight, and this is the only one
    /// that can be: go back by one element, and pop it again.
    ///
    /// As in C, this is done at once, because the timer may expire next.  If
    /// the driver has made the element invalid in the meantime, the device is
    /// marked as broken, but the status register does not show it, because it
    /// is about to be overwritten.
    #[doc(alias = "virtio_balloon_set_status")]
    pub fn recover(&self, cx: &Context<'_>) {
        let lost = self.element.borrow().is_none();
        if let Some(vq) = self.vq(cx) {
            if lost && vq.rewind(1) {
                self.receive(cx, &vq);
            }
        }
    }

    /// The timer has expired: ask for new statistics.
    #[doc(alias = "balloon_stats_poll_cb")]
    pub fn poll(&self, cx: &Context<'_>) {
        // receive() arms the timer again
        if !cx.vdev.has_feature(VIRTIO_BALLOON_F_STATS_VQ) || !self.ask(cx) {
            self.rearm_timer();
        }
    }

    /// Ask the driver for new statistics.  Returns false if it has the buffer
    /// already.
    fn ask(&self, cx: &Context<'_>) -> bool {
        let Some(elem) = self.take_element() else {
            return false;
        };
        cx.memory.count(|c| count(&mut c.stats_requests, 1));
        self.asked.set(Some(CLOCK_VIRTUAL.get_ms()));
        elem.push(0);
        if let Some(vq) = self.vq(cx) {
            vq.notify();
        }
        true
    }

    /// The user wants statistics at once, whatever the interval, and a
    /// `BALLOON_STATS` event when they are there.  A request while another one
    /// is pending is answered with it.
    ///
    /// # Errors
    ///
    /// Fails if the driver cannot send them.
    pub fn request(&self, cx: &Context<'_>, driver: Driver) -> Result<()> {
        ensure!(cx.vdev.vm_running(), "the VM is stopped");
        ensure!(
            self.state(cx, driver) != StatsState::Unsupported,
            "the guest has no driver that sends statistics"
        );
        if !self.requested.replace(true) {
            // The user waits, also if the VM is stopped meanwhile.
            self.patience.modify(CLOCK_REALTIME.get_ms() + PATIENCE);
            // Otherwise the driver was asked before, and not answered yet.
            self.ask(cx);
        }
        Ok(())
    }

    /// The driver has answered, or has not within the time it may take.
    pub fn end_request(&self, answered: bool) {
        if self.requested.replace(false) {
            self.patience.delete();
            send_balloon_stats(answered);
        }
    }

    /// Disable polling.
    pub fn stop_polling(&self) {
        self.timer.delete();
        self.poll_interval.set(0);
    }

    /// Getter of the `guest-stats` property
    #[doc(alias = "balloon_stats_get_all")]
    pub fn get_stats(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let mut stats = *self.latest.borrow();
        v.visit_struct(name, |v| {
            v.visit_int(c"last-update", &mut stats.last_update)?;
            v.visit_struct(c"stats", |v| {
                stats.iter().try_for_each(|(stat, value)| {
                    // As in C, all bits are set if the value is unknown
                    v.visit_u64(stat, &mut value.unwrap_or(u64::MAX))
                })
            })
        })
    }

    /// Getter of the `guest-stats-polling-interval` property
    pub fn get_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        v.visit_int(name, &mut self.poll_interval.get().into())
    }

    /// Setter of the `guest-stats-polling-interval` property
    #[doc(alias = "balloon_stats_set_poll_interval")]
    pub fn set_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let mut value = 0;
        v.visit_int(name, &mut value)?;
        let value = check_poll_interval(value).map_err(Error::msg)?;
        let old = self.poll_interval.get();

        if value == old {
            return Ok(());
        }
        if value == 0 {
            self.stop_polling();
            return Ok(());
        }

        self.poll_interval.set(value);
        // If polling was disabled, poll at once.
        self.set_timer(if old == 0 { 0 } else { value });
        Ok(())
    }
}

/// The next pair of tag and value; `None` if the rest of the buffer is too
/// short.  A driver may pad the buffer.
fn read_stat(reader: &mut OutReader<'_>) -> Option<(u16, u64)> {
    Some((reader.read_u16()?, reader.read_u64()?))
}

impl Part for GuestStats {
    fn queue(&self) -> &BqlCell<Option<u16>> {
        &self.queue
    }

    fn handle(&self, cx: &Context<'_>, event: Event) {
        if event == Event::Notified {
            if let Some(vq) = self.vq(cx) {
                self.receive(cx, &vq);
            }
        }
    }

    fn in_flight(&self, _cx: &Context<'_>) -> usize {
        usize::from(self.element.borrow().is_some())
    }

    fn drop_elements(&self, _cx: &Context<'_>) {
        self.asked.set(None);
        drop(self.take_element());
    }
}
