// SPDX-License-Identifier: GPL-2.0-or-later

//! Tells intended differences from others: waits until the devices have nothing
//! to do, and makes them the same again

use std::time::Instant;

use anyhow::Result;
use qtest_client::{hex, ring::Format, write_command, TIMEOUT};
use serde_json::json;

use super::{observe::Observed, Lockstep};
use crate::{
    differences::Difference,
    driver::{Script, F_HINT},
    effects::Effects,
    op::{Mode, Op, Seg},
};

/// Whether to look at the window; what else discards pages is noticed by
/// [`Op::Check`].
pub(super) fn may_discard(op: &Op) -> bool {
    match op {
        Op::Elem { q, kick: true, .. } => *q != 1 && *q != 2,
        Op::Kick { .. } | Op::Migrate | Op::MigrateLive => true,
        _ => false,
    }
}

impl Lockstep {
    /// Whether the Rust device works on several elements of the queue together
    pub(super) fn is_batched(&self, q: u32) -> bool {
        q != 2 && self.hint_queue != Some(q as usize)
    }

    /// Whether an element of a queue whose elements are worked on together, or what
    /// is left of older ones where its ring is now, may break the device
    pub(super) fn may_break_batch(&self, op: &Op) -> bool {
        let good = |q: u32, seg: &Seg| match seg {
            Seg::Data(data) => !data.is_empty(),
            Seg::In { len, .. } => q >= 2 && *len > 0,
            Seg::Out { .. } => false,
        };
        match op {
            Op::Elem { q, mode, segs, .. } => {
                // A chain can go on through descriptors of elements before it, which
                // look different when they were returned.
                let size = self.driver[0].queues[*q as usize].ring.size;
                self.is_batched(*q)
                    && (Mode::BAD.contains(mode)
                        || segs.is_empty()
                        || !segs.iter().all(|seg| good(*q, seg))
                        || 2 * segs.len() as u32 > size)
            }
            Op::QueueAt { q, .. } => self.is_batched(*q),
            _ => false,
        }
    }

    /// Whether the I/O thread gets something to do
    pub(super) fn kicks_hints(&self, op: &Op) -> bool {
        match op {
            Op::Elem { q, kick: true, .. } => self.hint_queue == Some(*q as usize),
            Op::Kick { value } => self.hint_queue == Some((*value & 0xffff) as usize),
            _ => false,
        }
    }

    /// If the I/O thread has something to do after an operation, wait for it.
    pub(super) fn wait_for_hints(
        &mut self,
        op: &Op,
        obs: &mut [Observed; 2],
        effects: &mut Effects,
    ) -> Result<()> {
        let hint_kick = self.kicks_hints(op);
        let resumed = self.hint_blocked
            && matches!(
                op,
                Op::Cont | Op::Status { .. } | Op::Init { .. } | Op::Negotiate { .. }
            );
        if hint_kick && !self.running() {
            self.hint_blocked = true;
        }
        if self.running() && (hint_kick || resumed) {
            // The C device is blocked until the driver accepts the feature.
            self.hint_blocked &= self.driver[0].features & F_HINT == 0;
            self.hints = true;
        }
        // Even if it was given no work now, there may be some left
        if self.hints && (hint_kick || resumed || !self.compare(obs).is_empty()) {
            self.settle(obs, may_discard(op), effects)?;
        }
        Ok(())
    }

    /// Wait until the I/O thread is done with the hint queue.
    pub(super) fn settle(
        &mut self,
        obs: &mut [Observed; 2],
        window: bool,
        effects: &mut Effects,
    ) -> Result<()> {
        *obs = self.observe_idle(window)?;
        // By the Rust device only if the C device has sent its first one for
        // nothing, and event indexes make it wait for others then.
        if obs[0].isr ^ obs[1].isr == 1 && self.compare(obs).len() == 1 {
            effects.name(Difference::HintInterrupt);
            self.acknowledge(obs)?;
        }
        if let Some(q) = self.hint_queue {
            if obs[0].used[q] != obs[1].used[q]
                && obs[0].used[q].entries() == obs[1].used[q].entries()
            {
                effects.name(Difference::HintNotification);
            }
        }
        Ok(())
    }

    /// Look at both devices when nothing happens in them any more by itself:
    /// what the main loop and the I/O thread have asked each other to do is
    /// done after some turns of the former.
    pub(super) fn observe_idle(&mut self, window: bool) -> Result<[Observed; 2]> {
        let deadline = Instant::now() + TIMEOUT;
        let mut last = None;
        loop {
            for (qemu, thread) in self.qemu.iter().zip(self.io_threads) {
                qemu.wait_asleep(thread)?;
            }
            let obs = self.observe(window)?;
            let progress = self.progress()?;
            let mut idle = true;
            for (list, broken) in progress.iter().zip(self.broken_devices()?) {
                // A broken device keeps what it has.
                idle &= broken || list.iter().all(|(_, inuse)| *inuse == 0);
            }
            let now = (obs, progress);
            if idle && last.as_ref() == Some(&now) || Instant::now() >= deadline {
                return Ok(now.0);
            }
            last = Some(now);
        }
    }

    /// How far each device is with each queue on which it works step by step:
    /// the index of the next element, and how many are in flight
    pub(super) fn progress(&mut self) -> Result<[Vec<(i64, i64)>; 2]> {
        let mut result = [Vec::new(), Vec::new()];
        for (qemu, list) in self.qemu.iter_mut().zip(&mut result) {
            // The device keeps the element of the queue for statistics.
            for q in (0..self.driver[0].num_queues).filter(|q| *q != 2) {
                let command = json!({
                    "execute": "x-query-virtio-queue-status",
                    "arguments": {"path": self.path, "queue": q},
                });
                let answer = qemu.qmp(&command.to_string())?;
                // There is nothing to tell of a queue that is not set up.
                let get = |name: &str| answer["return"][name].as_i64().unwrap_or(0);
                list.push((get("last-avail-idx"), get("inuse")));
            }
        }
        Ok(result)
    }

    /// If both devices are different, see whether one of them is only late.
    pub(super) fn catch_up(
        &mut self,
        obs: &mut [Observed; 2],
        effects: &mut Effects,
    ) -> Result<bool> {
        let late = |q: &usize| obs[0].used[*q].entries() != obs[1].used[*q].entries();
        if !(0..obs[0].used.len()).any(|q| q != 2 && late(&q)) {
            return Ok(false);
        }
        let mut last = None;
        loop {
            *obs = self.observe_idle(true)?;
            self.tolerate_unreturned(obs, effects)?;
            if (obs[0].isr ^ obs[1].isr) == 1 {
                // The driver acknowledged the interrupt before it was there
                self.acknowledge(obs)?;
            }
            let seen = Some(obs.clone());
            if self.running() || self.compare(obs).is_empty() || seen == last {
                break;
            }
            last = seen;
            // While the VM is stopped, only a notification makes a device that
            // has interrupted its work go on, and nothing if there is no work.
            let mut kicks = Script::default();
            for q in (0..self.driver[0].num_queues).filter(|q| *q != 2) {
                if self.hint_queue != Some(q as usize) {
                    self.driver[0].kick(&mut kicks, q);
                }
            }
            self.run_scripts([&kicks, &kicks])?;
        }
        let caught_up = self.compare(obs).is_empty();
        if caught_up {
            effects.name(Difference::Turns);
        }
        Ok(caught_up)
    }

    /// Acknowledge the interrupt for used elements.
    pub(super) fn acknowledge(&mut self, obs: &mut [Observed; 2]) -> Result<()> {
        let mut ack = Script::default();
        self.driver[0].acknowledge(&mut ack, 1);
        self.run_scripts([&ack, &ack])?;
        self.isr = self.isr.map(|isr| isr & !1);
        for each in obs {
            each.isr &= !1;
        }
        Ok(())
    }

    /// Accept that a device which is broken has not returned elements that were
    /// made available together with a bad one, and that it interrupts or not.
    pub(super) fn tolerate_unreturned(
        &mut self,
        obs: &mut [Observed; 2],
        effects: &mut Effects,
    ) -> Result<()> {
        for q in 0..obs[0].used.len() {
            let [a, b] = [&obs[0].used[q], &obs[1].used[q]];
            let may_differ = self.bad_batch && self.is_batched(q as u32);
            if !may_differ || a == b || !self.both_broken()? {
                continue;
            }
            effects.name(Difference::ErrorInBatch);
            // From here on they are the same
            let ring = &self.driver[1].queues[q].ring;
            let addr = match ring.format {
                Format::Split => ring.used,
                Format::Packed => ring.desc,
            };
            let command = write_command(addr, &hex::decode(&a.area)?);
            self.qemu[1].send(&format!("{command}\n"))?;
            self.qemu[1].reply()?;
            obs[1].used[q] = obs[0].used[q].clone();
        }
        // The C device has looked whether to interrupt before it was broken.
        if self.bad_batch && obs[0].isr ^ obs[1].isr == 1 && self.both_broken()? {
            effects.name(Difference::ErrorInBatch);
            self.acknowledge(obs)?;
        }
        Ok(())
    }

    /// Whether the devices are broken, which the legacy interface does not tell
    pub(super) fn broken_devices(&mut self) -> Result<[bool; 2]> {
        let mut broken = [false; 2];
        for (qemu, flag) in self.qemu.iter_mut().zip(&mut broken) {
            let command = json!({
                "execute": "x-query-virtio-status",
                "arguments": {"path": self.path},
            });
            *flag = qemu.qmp(&command.to_string())?["return"]["broken"] == true;
        }
        Ok(broken)
    }

    pub(super) fn both_broken(&mut self) -> Result<bool> {
        Ok(self.broken_devices()? == [true, true])
    }
}
