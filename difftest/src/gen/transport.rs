// SPDX-License-Identifier: GPL-2.0-or-later

//! Features, queues, registers and the configuration space

use qtest_client::pci;

use super::Generator;
use crate::{
    differences::Difference,
    driver::{reg, F_ACCESS_PLATFORM, F_EVENT_IDX, F_PACKED, F_VERSION_1, PAGE, RAM_SIZE},
    op::Op,
};

impl Generator<'_> {
    pub(super) fn random_features(&mut self) -> u64 {
        let mut features = self.offered;
        match self.rng.below(10) {
            0..=4 => {
                for bit in [0, 1, 2, 3, 4, 5, 24, 27, 28, 29, 35, 40] {
                    if self.rng.percent(25) {
                        features &= !(1 << bit);
                    }
                }
            }
            5 => features &= self.rng.next_u64(),
            6 => features |= 1 << self.rng.below(42),
            _ => {}
        }
        if self.rng.percent(50) {
            features &= !F_EVENT_IDX;
        }
        if !self.cfg.legacy && self.rng.percent(95) {
            features |= F_VERSION_1;
        }
        if self.cfg.legacy {
            features &= 0xffff_ffff;
        }
        // Addresses that need translation are not offered; and that is all
        // that there is to compare.
        features &= !F_ACCESS_PLATFORM;
        if self.cfg.packed && self.rng.percent(90) {
            features |= F_PACKED;
        } else {
            features &= !F_PACKED;
        }
        features
    }

    pub(super) fn init(&mut self) -> Op {
        let features = self.random_features();
        self.features = features & self.offered;
        self.broken = false;
        self.foreign = false;
        self.initialized = true;
        Op::Init {
            features,
            size: self.rng.pick(&[4, 8, 16, 16, 32]),
        }
    }

    pub(super) fn kick(&mut self) -> Op {
        let mut value = if self.rng.percent(60) {
            self.queue_index()
        } else {
            self.rng
                .pick(&[5, 6, 63, 64, 1023, 1024, 0x1_0000, u32::MAX])
        };
        if self.hint_queue() == Some(value & 0xffff) {
            if let Some(difference) = self.obstacle_to_hints() {
                self.avoid(difference);
                value = 2;
            }
        }
        Op::Kick { value }
    }

    pub(super) fn status(&mut self) -> Op {
        let value = self.rng.pick(&[
            0, 1, 2, 3, 4, 7, 8, 0xb, 0xc, 0xf, 0xf, 0xf, 0x80, 0x8f, 0x4f, 0x40, 0xff,
        ]);
        if value == 0 {
            self.features = 0;
            self.initialized = false;
        }
        Op::Status { value }
    }

    pub(super) fn queue(&mut self) -> Op {
        let q = self.queue_index();
        let size = match self.rng.below(10) {
            0 => self.rng.pick(&[0, 3, 5, 129, 256, 1024, 1025, 65536]),
            _ => self.rng.pick(&[1, 2, 4, 8, 16, 32, 64, 128]),
        };
        if self.hint_queue() == Some(q) || size > 256 && self.cfg.legacy {
            return self.queue_of(0, 16);
        }
        self.queue_of(q, size)
    }

    fn queue_of(&mut self, q: u32, size: u32) -> Op {
        // What the device was not notified of is erased, but still available.
        self.broken |= self.unnotified[q as usize];
        Op::Queue { q, size }
    }

    pub(super) fn queue_reset(&mut self) -> Op {
        let mut q = self.rng.below(self.num_queues()) as u32;
        if q == 2 || self.hint_queue() == Some(q) {
            self.avoid(Difference::QueueReset);
            q = 0;
        }
        Op::QueueReset {
            q,
            size: self.rng.pick(&[0, 2, 4, 8, 16, 32]),
        }
    }

    pub(super) fn queue_at(&mut self) -> Op {
        let q = self.queue_index();
        if self.hint_queue() == Some(q) {
            return self.queue_of(0, 16);
        }
        let good = 0x1f0_0000;
        let bad = [
            RAM_SIZE,
            1 << 40,
            u64::MAX - 100,
            0,
            1,
            RAM_SIZE - 64,
            RAM_SIZE - 2,
            0xf_0000,
            0xffff_f000,
            0xfee0_0000,
        ];
        let mut addr = [good, good + PAGE, good + 2 * PAGE];
        let which = self.rng.below(3) as usize;
        addr[which] = if self.rng.percent(20) {
            good + 3 * PAGE + self.rng.below(17)
        } else {
            // The content of the available ring must not change (see
            // Driver::queue) because a page is discarded.
            let n = if which == 1 { 3 } else { bad.len() };
            self.rng.pick(&bad[..n])
        };
        if self.cfg.legacy {
            // the address is shifted
            addr[0] &= 0xfff_ffff & !(PAGE - 1);
            if addr[0] == 0 {
                addr[0] = PAGE;
            }
        }
        self.broken = true;
        for start in [addr[0], addr[2]] {
            // No ring of 16 entries is larger.
            let end = start.saturating_add(511);
            self.ring_pfns
                .extend([start, end].map(|at| (at / PAGE) as u32));
        }
        Op::QueueAt {
            q,
            size: self.rng.pick(&[1, 2, 8, 16]),
            desc: addr[0],
            avail: addr[1],
            used: addr[2],
        }
    }

    pub(super) fn register(&mut self) -> u64 {
        if self.cfg.pci {
            return self.rng.pick(&[
                pci::DEVICE_FEATURE,
                pci::DRIVER_FEATURE,
                pci::NUM_QUEUES,
                pci::DEVICE_STATUS,
                pci::CONFIG_GENERATION,
                pci::QUEUE_SELECT,
                pci::QUEUE_SIZE,
                pci::QUEUE_ENABLE,
                pci::QUEUE_NOTIFY_OFF,
                pci::QUEUE_RESET,
            ]);
        }
        self.rng.pick(&[
            reg::MAGIC,
            0x04,
            reg::DEVICE_ID,
            0x0c,
            reg::DEVICE_FEATURES,
            0x34,
            0x3c,
            reg::QUEUE_PFN,
            reg::QUEUE_READY,
            reg::INTERRUPT_STATUS,
            reg::STATUS,
            0xac,
            0xb0,
            reg::CONFIG_GENERATION,
        ])
    }

    pub(super) fn config_offset(&mut self) -> u64 {
        match self.rng.below(10) {
            0..=6 => self.rng.pick(&[0, 4, 4, 4, 8, 12]),
            7 | 8 => self.rng.below(24),
            _ => self.rng.pick(&[16, 20, 64, 0xf0, 0xf8]),
        }
    }

    pub(super) fn config_write(&mut self) -> Op {
        let off = self.config_offset();
        let value = match self.rng.below(6) {
            0 => 0,
            1 => self.rng.below(RAM_SIZE / PAGE),
            2 => self.rng.pick(&[RAM_SIZE / PAGE, RAM_SIZE / PAGE + 1, 1]),
            3 => u64::from(u32::MAX),
            4 => self.rng.next_u64(),
            _ => 0xa5a5_a5a5,
        };
        let width = self.rng.pick(&[4, 4, 4, 1, 2, 8]);
        let mask = if width == 8 {
            u64::MAX
        } else {
            (1 << (8 * u32::from(width))) - 1
        };
        Op::CfgWrite {
            off,
            width,
            value: value & mask,
        }
    }
}
