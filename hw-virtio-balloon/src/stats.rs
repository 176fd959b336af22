// SPDX-License-Identifier: GPL-2.0-or-later

//! Memory statistics of the guest (virtio 1.3, section 5.5.6.3)
//!
//! The driver makes one buffer with statistics available.  The device holds it
//! and, when it wants new statistics, returns it; the driver fills it again.

use std::{
    ffi::CStr,
    time::{SystemTime, UNIX_EPOCH},
};

use bql::prelude::*;
use common::field;
use util::{prelude::*, Error, Result};
use virtio::prelude::*;
use virtio_balloon_core::{
    features::VIRTIO_BALLOON_F_STATS_VQ,
    stats::{check_poll_interval, Stats},
};

use crate::device::{VirtIOBalloon, STATS_QUEUE};

/// What the device knows about the guest's memory
#[derive(Default)]
pub struct GuestStats {
    latest: BqlRefCell<Stats>,
    /// The buffer that is to be returned to get new statistics
    element: BqlRefCell<Option<VirtQueueElement>>,
    /// In seconds; 0 if statistics are not polled
    poll_interval: BqlCell<u32>,
    /// Only armed while statistics are polled
    timer: Timer,
}

impl GuestStats {
    /// Forget all statistics.
    pub fn reset(&self) {
        *self.latest.borrow_mut() = Stats::default();
    }

    fn take_element(&self) -> Option<VirtQueueElement> {
        self.element.borrow_mut().take()
    }

    /// Release the buffer without telling the driver.
    pub fn drop_element(&self) {
        drop(self.take_element());
    }

    /// Put the buffer back into the queue.
    pub fn unpop_element(&self) {
        if let Some(elem) = self.take_element() {
            elem.unpop();
        }
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
}

/// The next pair of tag and value.  A driver may pad the last one.
fn read_stat(reader: &mut OutReader<'_>) -> Option<(u16, u64)> {
    Some((reader.read_u16()?, reader.read_u64()?))
}

impl VirtIOBalloon {
    /// The device was created; nothing is polled yet.
    pub fn init_stats(&self) {
        Timer::init(
            self,
            field!(Self, stats.timer),
            CLOCK_VIRTUAL,
            Timer::MS,
            Self::poll_stats,
        );
    }

    /// The driver has sent statistics.
    pub fn handle_stats(&self, vq: VirtQueue<'_>) {
        if let Some(elem) = vq.pop() {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| t.as_secs() as i64);
            let mut reader = elem.out_reader();
            self.stats
                .latest
                .borrow_mut()
                .update(std::iter::from_fn(|| read_stat(&mut reader)), now);

            let old = self.stats.element.borrow_mut().replace(elem);
            if let Some(old) = old {
                // A driver that follows the specification does not send a
                // second buffer before it gets back the first.
                old.push(0);
                vq.notify();
            }
        }
        self.stats.rearm_timer();
    }

    /// After migration the source's buffer is still in flight, according to
    /// the state of the queue, but the device does not have it: get it again.
    pub fn recover_stats(&self) {
        let lost = self.stats.element.borrow().is_none();
        if let Some(vq) = self.queue(STATS_QUEUE) {
            if lost && vq.rewind(1) {
                self.handle_stats(vq);
            }
        }
    }

    fn poll_stats(&self) {
        if self.has_feature(VIRTIO_BALLOON_F_STATS_VQ) {
            if let Some(elem) = self.stats.take_element() {
                elem.push(0);
                if let Some(vq) = self.queue(STATS_QUEUE) {
                    vq.notify();
                }
                // handle_stats() arms the timer when the driver has answered
                return;
            }
        }
        self.stats.rearm_timer();
    }

    /// Disable polling.
    pub fn stop_polling_stats(&self) {
        self.stats.timer.delete();
        self.stats.poll_interval.set(0);
    }

    pub fn get_stats(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let mut stats = *self.stats.latest.borrow();
        v.visit_struct(name, |v| {
            v.visit_int(c"last-update", &mut stats.last_update)?;
            v.visit_struct(c"stats", |v| {
                stats
                    .iter()
                    .try_for_each(|(stat, mut value)| v.visit_u64(stat, &mut value))
            })
        })
    }

    pub fn get_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        v.visit_int(name, &mut self.stats.poll_interval.get().into())
    }

    pub fn set_poll_interval(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let mut value = 0;
        v.visit_int(name, &mut value)?;
        let value = check_poll_interval(value).map_err(Error::msg)?;
        let old = self.stats.poll_interval.get();

        if value == old {
            return Ok(());
        }
        if value == 0 {
            self.stop_polling_stats();
            return Ok(());
        }

        self.stats.poll_interval.set(value);
        // Start with an immediate request.
        self.stats.set_timer(if old == 0 { 0 } else { value });
        Ok(())
    }
}
