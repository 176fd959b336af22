// SPDX-License-Identifier: GPL-2.0-or-later

//! What can be seen of the devices

use std::fmt::{self, Display};

use anyhow::{Context, Result};
use qtest_client::{
    hex,
    ring::{packed_returns, Format},
    transport::Reg,
    value,
};

use super::Lockstep;
use crate::{
    driver::{Script, PAGE, WINDOW, WINDOW_PAGES},
    effects::Effects,
};

/// What the device writes in a virtqueue
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct RingView {
    /// The used ring, or packed descriptors, in hexadecimal
    pub(super) area: String,
    /// The event suppression structure of a packed ring
    event: Option<String>,
}

impl RingView {
    fn new(area: &str, event: Option<&String>) -> Self {
        let hex = |reply: &str| reply.trim_start_matches("OK 0x").to_owned();
        Self {
            area: hex(area),
            event: event.map(|reply| hex(reply)),
        }
    }

    /// Without what only tells the driver when to send notifications
    pub(super) fn entries(&self) -> &str {
        match self.event {
            Some(_) => &self.area,
            None => self
                .area
                .get(4..self.area.len().saturating_sub(4))
                .unwrap_or(&self.area),
        }
    }

    /// How many elements were returned since another look
    fn returned_since(&self, old: &Self) -> u64 {
        let index = |view: &Self| {
            let digits = view.area.get(4..8).unwrap_or("0");
            u16::from_str_radix(digits, 16).unwrap_or(0).swap_bytes()
        };
        match (&self.event, &old.event) {
            (Some(_), Some(_)) => {
                let bytes = |view: &Self| hex::decode(&view.area).unwrap_or_default();
                packed_returns(&bytes(old), &bytes(self))
            }
            (None, None) => match index(self).wrapping_sub(index(old)) {
                n if n < 256 => n.into(),
                _ => 0,
            },
            _ => 0,
        }
    }
}

impl Display for RingView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.area)?;
        self.event
            .as_ref()
            .map_or(Ok(()), |event| write!(f, ", event {event}"))
    }
}

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Observed {
    pub(super) status: u64,
    pub(super) isr: u64,
    pub(super) generation: String,
    pub(super) config: String,
    pub(super) used: Vec<RingView>,
    pub(super) window: Vec<bool>,
}

impl Lockstep {
    pub(super) fn observe_script(&self, s: &mut Script, window: bool) {
        let driver = &self.driver[0];
        let transport = &driver.transport;
        for reg in [Reg::Status, Reg::InterruptStatus, Reg::ConfigGeneration] {
            s.push(format_args!("{}", transport.read(reg)));
        }
        s.push(format_args!("read {:#x} 20", transport.config()));
        for queue in &driver.queues[..driver.num_queues as usize] {
            let ring = &queue.ring;
            let size = ring.size.clamp(1, 32);
            match ring.format {
                Format::Split => {
                    s.push(format_args!("read {:#x} {}", ring.used, 4 + 8 * size + 2));
                }
                Format::Packed => {
                    s.push(format_args!("read {:#x} {}", ring.desc, 16 * size));
                    s.push(format_args!("read {:#x} 4", ring.used));
                }
            }
        }
        if window {
            for page in 0..WINDOW_PAGES {
                s.push(format_args!("readb {:#x}", WINDOW + page * PAGE));
            }
        }
    }

    pub(super) fn parse(
        &mut self,
        device: usize,
        formats: &[Format],
        replies: &[String],
    ) -> Result<Observed> {
        let mut replies = replies.iter();
        let mut next = || replies.next().context("too few replies");
        let status = value(next()?)?;
        let mut isr = value(next()?)?;
        if self.driver[0].transport.interrupt_status_is_cleared() {
            self.isr[device] |= isr;
            isr = self.isr[device];
        }
        let (generation, config) = (next()?.clone(), next()?.clone());
        let mut used = Vec::new();
        for format in formats {
            let area = next()?;
            let event = match format {
                Format::Split => None,
                Format::Packed => Some(next()?),
            };
            used.push(RingView::new(area, event));
        }
        Ok(Observed {
            status,
            isr,
            generation,
            config,
            used,
            window: replies
                .map(|reply| value(reply).map(|v| v == 0))
                .collect::<Result<_>>()?,
        })
    }

    /// The formats of the rings, as the driver has set them up
    pub(super) fn formats(&self) -> Vec<Format> {
        let driver = &self.driver[0];
        driver.queues[..driver.num_queues as usize]
            .iter()
            .map(|queue| queue.ring.format)
            .collect()
    }

    /// Differences between two observations
    pub(super) fn compare(&self, obs: &[Observed; 2]) -> Vec<String> {
        let mut list = Vec::new();
        let mut check = |name: &str, a: &str, b: &str| {
            if a != b {
                list.push(format!("{name}: A: {a}, B: {b}"));
            }
        };
        let [a, b] = obs;
        check(
            "status",
            &format!("{:#x}", a.status),
            &format!("{:#x}", b.status),
        );
        check("interrupt status", &a.isr.to_string(), &b.isr.to_string());
        check("config generation", &a.generation, &b.generation);
        check("configuration space", &a.config, &b.config);
        for (q, (used_a, used_b)) in a.used.iter().zip(&b.used).enumerate() {
            let name = format!("used ring of queue {q}");
            if self.hint_queue == Some(q) {
                check(&name, used_a.entries(), used_b.entries());
            } else {
                check(&name, &used_a.to_string(), &used_b.to_string());
            }
        }
        for (page, (zero_a, zero_b)) in a.window.iter().zip(&b.window).enumerate() {
            check(
                &format!("page {page} of the window is zero"),
                &zero_a.to_string(),
                &zero_b.to_string(),
            );
        }
        list
    }

    /// Look at both devices.
    pub(super) fn observe(&mut self, window: bool) -> Result<[Observed; 2]> {
        let mut script = Script::default();
        self.observe_script(&mut script, window);
        let [a, b] = self.run_scripts([&script, &script])?;
        let formats = self.formats();
        Ok([self.parse(0, &formats, &a)?, self.parse(1, &formats, &b)?])
    }

    pub(super) fn count_effects(&mut self, mut new: Observed, effects: &mut Effects) {
        let old = &self.last;
        effects.used += old
            .used
            .iter()
            .zip(&new.used)
            .map(|(old, new)| new.returned_since(old))
            .sum::<u64>();
        effects.broken += u64::from(new.status & !old.status & 0x40 != 0);
        effects.config += u64::from(new.config != old.config);
        effects.interrupts += u64::from(new.isr & !old.isr != 0);
        if new.window.is_empty() {
            new.window.clone_from(&old.window);
        } else {
            effects.discarded += new
                .window
                .iter()
                .enumerate()
                .filter(|(page, zero)| **zero && !old.window.get(*page).unwrap_or(&false))
                .count() as u64;
        }
        self.last = new;
    }
}

/// Describe replies that differ; long ones only from where they do.
pub(super) fn explain(command: &str, a: &str, b: &str) -> String {
    let at = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let cut = |s: &str| -> String {
        if s.len() <= 200 {
            s.to_owned()
        } else {
            let part: String = s.chars().skip(at).take(80).collect();
            format!("...{part}... (from character {at})")
        }
    };
    format!("{command}: A: {}, B: {}", cut(a), cut(b))
}
