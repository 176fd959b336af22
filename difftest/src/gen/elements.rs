// SPDX-License-Identifier: GPL-2.0-or-later

//! Elements of the queues

use super::Generator;
use crate::{
    differences::Difference,
    driver::{F_HINT, F_INDIRECT, PAGE, RAM_SIZE, WINDOW, WINDOW_PAGES},
    op::{Mode, Op, Seg},
};

/// Whether the device can access the buffer without a copy
fn in_ram(seg: &Seg) -> bool {
    match seg {
        Seg::Data(_) => true,
        Seg::Out { addr, len } | Seg::In { addr, len } => {
            (0x10_0000..RAM_SIZE).contains(addr) && addr + u64::from(*len) <= RAM_SIZE
        }
    }
}

impl Generator<'_> {
    pub(super) fn pfn(&mut self) -> u32 {
        let window = WINDOW / PAGE;
        let pfn = match self.rng.below(20) {
            0 => self.rng.pick(&[
                (RAM_SIZE / PAGE) as u32,
                (RAM_SIZE / PAGE - 1) as u32,
                0xfeb00, // transports
                0xfec00, // I/O APIC
                0xfee00, // local APIC
                0xfffff, // firmware
                0xf0,    // alias of the firmware, or RAM
                0xc0,
                0xa0,
                0,
                u32::MAX,
                0x7fff_ffff,
                0x8000_0000,
                0x10_0000,
            ]),
            1 => self.rng.next_u64() as u32,
            // RAM that is not used for anything else
            2 => self.rng.range(window + WINDOW_PAGES, RAM_SIZE / PAGE) as u32,
            _ => (window + self.rng.below(WINDOW_PAGES)) as u32,
        };
        if self.ring_pfns.contains(&pfn) {
            self.avoid(Difference::InflatedRing);
            return window as u32;
        }
        pfn
    }

    pub(super) fn pfns(&mut self) -> Vec<u8> {
        let n = match self.rng.below(10) {
            0..=6 => self.rng.range(1, 6),
            7 => 0,
            8 => 256,
            _ => self.rng.range(7, 64),
        };
        let mut data = Vec::new();
        for _ in 0..n {
            let pfn = self.pfn();
            data.extend_from_slice(&pfn.to_le_bytes());
            if self.rng.percent(5) {
                data.extend_from_slice(&pfn.to_le_bytes());
            }
        }
        if self.rng.percent(10) {
            let extra = self.rng.range(1, 3) as usize;
            data.extend_from_slice(&[0x55; 3][..extra]);
        }
        data
    }

    /// Split data into segments; sometimes with empty ones.
    pub(super) fn split(&mut self, data: Vec<u8>) -> Vec<Seg> {
        let mut segs = vec![data];
        while self.rng.percent(30) && segs.len() < 4 {
            let last = segs.pop().unwrap_or_default();
            let at = self.rng.below(last.len() as u64 + 1) as usize;
            segs.push(last[..at].to_vec());
            segs.push(last[at..].to_vec());
        }
        if self.rng.percent(98) {
            // An empty descriptor breaks the device.
            segs.retain(|seg| !seg.is_empty());
        }
        if segs.iter().any(Vec::is_empty) {
            self.broken = true;
        }
        segs.into_iter().map(Seg::Data).collect()
    }

    pub(super) fn element(&mut self, q: u32, mut segs: Vec<Seg>) -> Op {
        let mut anything = segs.is_empty() && self.rng.percent(90);
        // Without buffers it has the descriptor of another one, which may be large.
        if segs.is_empty() && !anything && !self.running {
            self.avoid(Difference::ResumeAfterMigration);
            anything = true;
        }
        if anything {
            segs.push(Seg::In {
                addr: WINDOW,
                len: 4,
            });
        }
        let mode = match self.rng.below(10) {
            0 | 1 if self.features & F_INDIRECT != 0 => Mode::Indirect,
            2 => Mode::Cross,
            _ => Mode::Direct,
        };
        // see Difference::ErrorInBatch and BounceBuffers
        let mut foreign = self.is_batched(q) && !segs.iter().all(in_ram);
        if foreign {
            self.avoid(Difference::BounceBuffers);
            if self.unnotified[q as usize] {
                segs = vec![Seg::Data((WINDOW as u32 >> 12).to_le_bytes().to_vec())];
                foreign = false;
            }
        }
        self.foreign |= foreign;
        // Without buffers it has the descriptor of another one, perhaps the next.
        let alone = Some(q) == self.hint_queue() || foreign || segs.is_empty();
        let kick = alone || self.rng.percent(92);
        self.unnotified[q as usize] = !kick;
        Op::Elem {
            q,
            kick,
            mode,
            segs,
        }
    }

    pub(super) fn raw_address(&mut self) -> u64 {
        let window = WINDOW + self.rng.below(WINDOW_PAGES) * PAGE;
        match self.rng.below(12) {
            0 => RAM_SIZE - PAGE,
            1 => RAM_SIZE - 2,
            2 => RAM_SIZE,
            3 => 0xfeb0_0000,
            4 => 0xffff_f000,
            5 => self.rng.pick(&[1 << 40, u64::MAX - 4095, 0xfee0_0000]),
            6 => window + self.rng.below(PAGE),
            7 => 0xf_0000,
            _ => window,
        }
    }

    pub(super) fn raw_segment(&mut self) -> Seg {
        let addr = self.raw_address();
        let len = self.rng.pick(&[1, 3, 4, 8, 4096, 4097, 8192]);
        if self.rng.percent(50) {
            Seg::Out { addr, len }
        } else {
            Seg::In { addr, len }
        }
    }

    pub(super) fn balloon_element(&mut self, q: u32) -> Op {
        let data = self.pfns();
        let mut segs = self.split(data);
        if self.rng.percent(5) {
            segs.push(Seg::In {
                addr: self.raw_address(),
                len: 8,
            });
        }
        if self.rng.percent(4) {
            let addr = self.raw_address();
            let len = self.rng.pick(&[1, 4, 6, 64, 4096]);
            segs.insert(0, Seg::Out { addr, len });
        }
        self.element(q, segs)
    }

    pub(super) fn stats_element(&mut self) -> Op {
        let n = match self.rng.below(10) {
            0 => 0,
            1 => 100,
            _ => self.rng.range(1, 18),
        };
        let mut data = Vec::new();
        for _ in 0..n {
            let tag = match self.rng.below(10) {
                0 => self.rng.next_u64() as u16,
                1 => 16,
                _ => self.rng.below(16) as u16,
            };
            let value = self
                .rng
                .pick(&[0, 1, 0xdead_beef, u64::MAX, 1 << 63, 12345]);
            data.extend_from_slice(&tag.to_le_bytes());
            data.extend_from_slice(&value.to_le_bytes());
        }
        if self.rng.percent(15) {
            let extra = self.rng.range(1, 9) as usize;
            data.extend_from_slice(&[3; 9][..extra]);
        }
        let mut segs = self.split(data);
        if self.rng.percent(4) {
            segs.push(self.raw_segment());
        }
        self.element(2, segs)
    }

    pub(super) fn report_element(&mut self, q: u32) -> Op {
        let n = self.rng.range(1, 3);
        let mut segs = Vec::new();
        if self.rng.percent(5) {
            segs.push(Seg::Data(vec![1, 2, 3, 4]));
        }
        for _ in 0..n {
            let page = self.rng.below(WINDOW_PAGES);
            let pages = self.rng.range(1, 4).min(WINDOW_PAGES - page);
            let (mut addr, mut len) = (WINDOW + page * PAGE, (pages * PAGE) as u32);
            match self.rng.below(20) {
                0 => addr += self.rng.range(1, PAGE),
                1 => len -= self.rng.range(1, 4095) as u32,
                2 => {
                    addr = self.raw_address();
                    len = self.rng.pick(&[1, 4, 2048, 4096, 8192]);
                }
                3 if self.rng.percent(20) => {
                    addr = RAM_SIZE - PAGE;
                    len = 0x2000;
                }
                _ => {}
            }
            segs.push(Seg::In { addr, len });
        }
        self.element(q, segs)
    }

    /// Why there must not be anything for the queue for hints at the moment
    pub(super) fn obstacle_to_hints(&self) -> Option<Difference> {
        if self.features & F_HINT == 0 || !self.initialized {
            Some(Difference::HintNotNegotiated)
        } else if self.arrived_stopped {
            Some(Difference::HintOnArrival)
        } else {
            None
        }
    }

    pub(super) fn hint_element(&mut self) -> Op {
        let Some(q) = self.hint_queue() else {
            return self.stats_element();
        };
        if let Some(difference) = self.obstacle_to_hints() {
            self.avoid(difference);
            return self.balloon_element(0);
        }
        let mut segs = Vec::new();
        if self.rng.percent(60) {
            let len = match (self.rng.percent(8), self.running) {
                (true, true) => {
                    self.broken = true;
                    self.rng.range(1, 3)
                }
                (true, false) => {
                    self.avoid(Difference::HintErrorOnResume);
                    4
                }
                (false, _) => 4,
            };
            let id = self
                .rng
                .pick(&[0, 1, 0x8000_0000u32, 0x8000_0001, u32::MAX]);
            segs.push(Seg::Data(id.to_le_bytes()[..len as usize].to_vec()));
        }
        while self.rng.percent(50) && segs.len() < 4 || segs.is_empty() {
            let page = self.rng.below(WINDOW_PAGES - 4);
            segs.push(Seg::In {
                addr: WINDOW + page * PAGE,
                len: self.rng.pick(&[4096, 16384, 100]),
            });
        }
        self.element(q, segs)
    }

    pub(super) fn bad_element(&mut self) -> Op {
        let mut q = self.queue_index();
        if Some(q) == self.hint_queue() {
            let stopped = (!self.running).then_some(Difference::HintErrorOnResume);
            if let Some(difference) = self.obstacle_to_hints().or(stopped) {
                self.avoid(difference);
                q = 0;
            }
        }
        let hint = Some(q) == self.hint_queue();
        let mut mode = self.rng.pick(&Mode::BAD);
        // It makes descriptors available that were used before.
        if mode == Mode::Jump && (hint || self.foreign || !self.running) {
            self.avoid(if hint {
                Difference::HintJump
            } else if self.foreign {
                Difference::BounceBuffers
            } else {
                Difference::ResumeAfterMigration
            });
            mode = Mode::BadHead;
        }
        let mut segs = vec![Seg::Data((WINDOW as u32 >> 12).to_le_bytes().to_vec())];
        if self.rng.percent(30) {
            segs.insert(
                0,
                Seg::In {
                    addr: WINDOW,
                    len: 4096,
                },
            );
        }
        if self.rng.percent(30) {
            let seg = self.raw_segment();
            let foreign = self.is_batched(q) && !in_ram(&seg);
            if hint {
                self.avoid(Difference::HintMmio);
            } else if foreign && (mode == Mode::Jump || self.unnotified[q as usize]) {
                self.avoid(Difference::BounceBuffers);
            } else {
                self.foreign |= foreign;
                segs.push(seg);
            }
        }
        self.broken = true;
        self.unnotified[q as usize] = false;
        Op::Elem {
            q,
            kick: true,
            mode,
            segs,
        }
    }
}
