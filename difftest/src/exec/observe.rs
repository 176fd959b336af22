// SPDX-License-Identifier: GPL-2.0-or-later

//! What can be seen of the devices

use anyhow::{ensure, Result};
use qtest_client::value;

use super::Lockstep;
use crate::{
    driver::{reg, Script, PAGE, WINDOW, WINDOW_PAGES},
    effects::Effects,
};

#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Observed {
    pub(super) status: u64,
    pub(super) isr: u64,
    pub(super) generation: String,
    pub(super) config: String,
    pub(super) used: Vec<String>,
    pub(super) window: Vec<bool>,
}

/// Used ring without what only tells the driver when to send notifications
pub(super) fn ring_entries(hex: &str) -> &str {
    let start = "OK 0x".len() + 4;
    hex.get(start..hex.len().saturating_sub(4)).unwrap_or(hex)
}

pub(super) fn used_idx(reply: &str) -> u16 {
    let digits = reply.get(9..13).unwrap_or("0");
    u16::from_str_radix(digits, 16).unwrap_or(0).swap_bytes()
}

impl Lockstep {
    pub(super) fn observe_script(&self, s: &mut Script, window: bool) {
        let base = self.driver[0].base;
        s.push(format_args!("readl {:#x}", base + reg::STATUS));
        s.push(format_args!("readl {:#x}", base + reg::INTERRUPT_STATUS));
        s.push(format_args!("readl {:#x}", base + reg::CONFIG_GENERATION));
        s.push(format_args!("read {:#x} 20", base + reg::CONFIG));
        for q in 0..self.driver[0].num_queues {
            let queue = &self.driver[0].queues[q as usize];
            let len = 4 + 8 * queue.size.clamp(1, 32) + 2;
            s.push(format_args!("read {:#x} {len}", queue.used));
        }
        if window {
            for page in 0..WINDOW_PAGES {
                s.push(format_args!("readb {:#x}", WINDOW + page * PAGE));
            }
        }
    }

    pub(super) fn parse(&self, replies: &[String]) -> Result<Observed> {
        let queues = self.driver[0].num_queues as usize;
        ensure!(replies.len() >= 4 + queues, "too few replies");
        Ok(Observed {
            status: value(&replies[0])?,
            isr: value(&replies[1])?,
            generation: replies[2].clone(),
            config: replies[3].clone(),
            used: replies[4..4 + queues].to_vec(),
            window: replies[4 + queues..]
                .iter()
                .map(|reply| value(reply).map(|v| v == 0))
                .collect::<Result<_>>()?,
        })
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
                check(&name, ring_entries(used_a), ring_entries(used_b));
            } else {
                check(&name, used_a, used_b);
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
        Ok([self.parse(&a)?, self.parse(&b)?])
    }

    pub(super) fn count_effects(&mut self, mut new: Observed, effects: &mut Effects) {
        let old = &self.last;
        effects.used += old
            .used
            .iter()
            .zip(&new.used)
            .map(|(old, new)| used_idx(new).wrapping_sub(used_idx(old)))
            .filter(|n| *n < 256)
            .map(u64::from)
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
