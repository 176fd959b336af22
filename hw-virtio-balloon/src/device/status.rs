// SPDX-License-Identifier: GPL-2.0-or-later

//! The `balloon-status` property; [`virtio_balloon_core::status`] has the logic

use std::ffi::{CStr, CString};

use system::{is_memory_locked, prelude::*};
use util::{prelude::*, Result};
use virtio::prelude::*;
use virtio_balloon_core::{
    backing::Backing,
    spec::{pages_to_actual, VIRTIO_BALLOON_F_REPORTING},
    status::{Driver, Inhibitor, StatsState, Status, FEATURES},
};

use super::VirtIOBalloon;
use crate::{guest_memory::inhibitors, part::Part};

/// A block of the guest's memory
struct Block {
    name: CString,
    /// Size in bytes
    size: u64,
    backing: Backing,
}

/// All blocks of the guest's memory
fn blocks(completes_host_pages: bool) -> Vec<Block> {
    let locked = is_memory_locked();
    let mut blocks = Vec::new();
    RamBlock::for_each_of_backends(|block| {
        blocks.push(Block {
            name: block.name().to_owned(),
            size: block.used_length(),
            backing: Backing {
                page_size: block.page_size(),
                has_file: block.has_file(),
                shared: block.is_shared(),
                read_only_file: block.has_read_only_file(),
                locked,
                completes_host_pages,
            },
        });
    });
    blocks
}

impl VirtIOBalloon {
    /// What is known of the driver
    pub(super) fn driver(&self) -> Driver {
        Driver::new(self.status(), self.is_broken())
    }

    /// Getter of the `balloon-status` property
    pub(super) fn get_status(&self, v: &Visitor, name: &CStr) -> Result<()> {
        let ram_size = Self::ram_size();
        let cx = self.context();
        let driver = self.driver();
        let inhibitors = inhibitors();
        let blocks = blocks(cx.completes_host_pages());
        let memory: Vec<_> = blocks.iter().map(|block| block.backing).collect();
        let now = CLOCK_VIRTUAL.get_ms();
        let since_unasked = self.memory.with_deflation(|d| d.since_unasked(now));
        let status = Status {
            vm_running: self.vm_running(),
            driver,
            target: pages_to_actual(ram_size, self.num_pages.get()),
            shown_target: pages_to_actual(ram_size, self.shown_pages()),
            actual: self.balloon_actual(),
            stats: self.stats.state(&cx, driver),
            inhibitors: &inhibitors,
            memory: &memory,
            reporting: self.has_feature(VIRTIO_BALLOON_F_REPORTING),
            poisoned: self.poison_val.get() != 0,
            in_use: self.num_pages.get() > 0 || self.actual.get() > 0,
            since_unasked: since_unasked.map(|ms| ms / 1000),
            waiting_for_memory: self.waits_for_memory(),
        };
        v.visit_struct(name, |v| self.visit_status(v, &status, &blocks))
    }

    fn visit_status(&self, v: &Visitor, status: &Status<'_>, blocks: &[Block]) -> Result<()> {
        v.output_str(c"implementation", c"Rust")?;
        v.output_str(c"summary", status.summary().text())?;
        v.output_str(c"driver", status.driver.name())?;
        let accepted = FEATURES
            .iter()
            .filter(|(bit, _)| self.has_feature(*bit))
            .map(|(_, name)| *name);
        v.output_str_list(c"features", accepted)?;
        for (member, mut value) in [
            (c"target", status.target),
            (c"shown-target", status.shown_target),
            (c"actual", status.actual),
        ] {
            v.visit_u64(member, &mut value)?;
        }
        if let Some(mut seconds) = status.since_unasked {
            v.visit_u64(c"unasked-ago", &mut seconds)?;
        }
        v.visit_struct(c"statistics", |v| {
            v.output_str(c"state", status.stats.name())?;
            if let StatsState::Asked(mut seconds) = status.stats {
                v.visit_u64(c"asked-ago", &mut seconds)?;
            }
            v.visit_int(c"last-update", &mut self.stats.last_update())?;
            v.visit_u64(c"polling-interval", &mut self.stats.poll_interval().into())
        })?;
        let names = status.inhibitors.iter().copied().map(Inhibitor::name);
        v.output_str_list(c"inhibited-by", names)?;
        v.output_struct_list(c"memory", blocks, |v, block| {
            v.output_str(c"id", &block.name)?;
            v.visit_u64(c"size", &mut { block.size })?;
            v.visit_u64(c"page-size", &mut { block.backing.page_size })?;
            v.output_str(c"file", block.backing.file())?;
            v.output_str(c"discarding", block.backing.discarding().name())
        })?;
        v.visit_struct(c"in-flight", |v| {
            let cx = self.context();
            let parts: [(&CStr, &dyn Part); 5] = [
                (c"inflate", &self.inflate),
                (c"deflate", &self.deflate),
                (c"statistics", &self.stats),
                (c"hints", &self.hinting),
                (c"reports", &self.reporting),
            ];
            parts
                .into_iter()
                .try_for_each(|(name, part)| v.visit_u64(name, &mut (part.in_flight(&cx) as u64)))
        })?;
        v.visit_bool(c"waiting-for-memory", &mut { status.waiting_for_memory })
    }
}
