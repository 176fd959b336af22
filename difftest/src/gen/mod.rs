// SPDX-License-Identifier: GPL-2.0-or-later

//! Generates random operations

mod elements;
mod qmp;
mod transport;

use qtest_client::rng::Rng;

use crate::{
    differences::{Difference, Uses},
    driver::{F_EVENT_IDX, F_HINT, F_NOTIFY_ON_EMPTY, F_RING_RESET, MAX_QUEUES},
    op::{Config, Op},
};

/// What the user has chosen; everything else is up to the generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    pub packed: Option<bool>,
    pub pci: Option<bool>,
    pub in_order: bool,
}

/// The generator
#[derive(Debug)]
pub struct Generator<'a> {
    rng: &'a mut Rng,
    cfg: Config,
    offered: u64,
    features: u64,
    /// Something was done that breaks the device
    broken: bool,
    /// Descriptors of the queues for inflating and deflating may refer to
    /// something that is not RAM
    foreign: bool,
    /// Whether there are elements of these queues that the device was not notified
    /// of; their descriptors may be overwritten by those of the next elements.
    unnotified: [bool; MAX_QUEUES as usize],
    /// PFNs of rings that are not where they usually are
    ring_pfns: Vec<u32>,
    initialized: bool,
    running: bool,
    stopped_for: u32,
    /// The VM was stopped when it was migrated, and did not run since
    arrived_stopped: bool,
    /// Operations that were replaced because of a named difference
    avoided: Uses,
}

impl<'a> Generator<'a> {
    /// A generator
    pub fn new(rng: &'a mut Rng) -> Self {
        Self {
            rng,
            cfg: Config::default(),
            offered: 0,
            features: 0,
            broken: false,
            foreign: false,
            unnotified: Default::default(),
            ring_pfns: Vec::new(),
            initialized: false,
            running: true,
            stopped_for: 0,
            arrived_stopped: false,
            avoided: Uses::new(),
        }
    }

    /// Options for QEMU; `n` is how often it was started before
    pub fn config(&mut self, wanted: &Wanted, n: u64) -> Config {
        let mut flag = |percent| self.rng.percent(percent);
        let mut cfg = Config {
            legacy: flag(50),
            deflate_on_oom: flag(50),
            free_page_hint: flag(50),
            page_poison: flag(60),
            free_page_reporting: flag(60),
            packed: wanted.packed.unwrap_or(n % 2 == 1),
            in_order: flag(50) || wanted.in_order,
            pci: wanted.pci.unwrap_or(n / 2 % 2 == 1),
            i440fx: flag(50),
        };
        // The legacy interface has neither.
        cfg.legacy &= !(cfg.pci || cfg.packed || wanted.in_order);
        cfg.in_order &= !cfg.legacy;
        cfg.i440fx &= cfg.pci;
        cfg
    }

    /// Start an episode.
    pub fn start(&mut self, cfg: &Config, offered: u64) {
        self.cfg = cfg.clone();
        self.offered = offered;
        self.features = 0;
        self.broken = false;
        self.unnotified = Default::default();
        self.ring_pfns.clear();
        self.initialized = false;
        self.stopped_for = 0;
    }

    /// Count that something else is done because of a difference.
    fn avoid(&mut self, difference: Difference) {
        *self.avoided.entry(difference).or_default() += 1;
    }

    /// The differences that were avoided since the last call
    pub fn take_avoided(&mut self) -> Uses {
        std::mem::take(&mut self.avoided)
    }

    /// How many operations an episode has
    pub fn episode_length(&mut self) -> u64 {
        self.rng.range(100, 400)
    }

    fn num_queues(&self) -> u64 {
        self.cfg.num_queues().into()
    }

    fn hint_queue(&self) -> Option<u32> {
        self.cfg.free_page_hint.then_some(3)
    }

    /// Whether the Rust device works on several elements of the queue together
    fn is_batched(&self, q: u32) -> bool {
        q < 2 || Some(q) == self.report_queue()
    }

    fn report_queue(&self) -> Option<u32> {
        self.cfg
            .free_page_reporting
            .then_some(if self.cfg.free_page_hint { 4 } else { 3 })
    }

    fn migrate(&mut self, op: Op) -> Op {
        // An error must not be found by looking at queues in another order.
        let unnotified = self.unnotified.iter().position(|unnotified| *unnotified);
        if let Some(q) = unnotified.filter(|_| self.broken) {
            self.avoid(Difference::ResumeAfterMigration);
            self.unnotified[q] = false;
            return Op::Kick { value: q as u32 };
        }
        self.arrived_stopped |= !self.running;
        op
    }

    /// The next operation; `broken` tells whether the device needs a reset, and
    /// `running` whether the VM runs.
    pub fn op(&mut self, broken: bool, running: bool) -> Op {
        self.broken |= broken;
        self.running = running;
        self.arrived_stopped &= !running;
        if !running {
            self.stopped_for += 1;
            if self.rng.percent(15) || self.stopped_for > 20 {
                self.stopped_for = 0;
                return Op::Cont;
            }
        }
        if !self.initialized && self.rng.percent(70) || self.broken && self.rng.percent(30) {
            return self.init();
        }
        match self.rng.below(1000) {
            0..=149 => self.balloon_element(0),
            150..=199 => self.balloon_element(1),
            200..=289 => self.stats_element(),
            290..=359 => match self.report_queue() {
                Some(q) => self.report_element(q),
                None => self.balloon_element(0),
            },
            360..=399 => self.hint_element(),
            400..=424 => self.bad_element(),
            425..=449 => self.kick(),
            450..=524 => self.config_write(),
            525..=564 => Op::CfgRead {
                off: self.config_offset(),
                width: self.rng.pick(&[1, 2, 4, 8]),
            },
            565..=584 => Op::RegRead {
                off: self.register(),
                width: self.rng.pick(&[4, 4, 4, 1, 2, 8]),
            },
            585 => self.migrate(Op::Migrate),
            586 => self.migrate(Op::MigrateLive),
            587..=634 => Op::Ack {
                value: self.rng.pick(&[1, 2, 3, 3, 3, 0, u32::MAX]),
            },
            635..=664 => Op::Fill,
            665..=824 => self.qmp(),
            825..=889 => Op::Clock {
                ns: self.rng.pick(&[
                    1,
                    1_000_000,
                    500_000_000,
                    999_999_999,
                    1_000_000_000,
                    1_000_000_000,
                    2_500_000_000,
                    10_000_000_000,
                    61_000_000_000,
                ]),
            },
            890..=904 => {
                if running {
                    self.stopped_for = 0;
                    Op::Stop
                } else {
                    Op::Cont
                }
            }
            905..=909 => {
                self.initialized = false;
                self.features = 0;
                Op::SystemReset
            }
            910..=919 => {
                self.initialized = false;
                self.features = 0;
                if self.cfg.legacy && self.rng.percent(50) {
                    Op::ResetPfn
                } else {
                    Op::Reset
                }
            }
            920..=934 => self.init(),
            935..=939 => {
                let features = self.random_features();
                self.initialized = false;
                self.features = features & self.offered;
                Op::Negotiate { features }
            }
            940..=949 => self.status(),
            950..=954 => {
                let sel = self.rng.below(3) as u32;
                let mut value = self.rng.next_u64() as u32 & !0x6;
                if sel == 0 {
                    // see Difference::BatchNotification
                    let mut same = (F_NOTIFY_ON_EMPTY | F_EVENT_IDX) as u32;
                    let hint = F_HINT as u32;
                    if !running && (value ^ self.features as u32) & hint != 0 {
                        self.avoid(Difference::HintNotNegotiated);
                        same |= hint;
                    }
                    value = value & !same | self.features as u32 & same;
                    // The legacy interface accepts that at any time.
                    self.features &= u64::from(value) | !u64::from(u32::MAX);
                }
                Op::Features { sel, value }
            }
            955..=964 if self.features & F_RING_RESET != 0 && self.rng.percent(50) => {
                self.queue_reset()
            }
            955..=964 => self.queue(),
            965..=969 => self.queue_at(),
            970..=974 => Op::Ready {
                q: self.queue_index(),
                value: self.rng.below(2) as u32,
            },
            975..=984 => Op::AvailFlags {
                q: self.queue_index(),
                value: self.rng.pick(&[0, 1, 1, 2, 0xffff]),
            },
            _ => Op::UsedEvent {
                q: self.queue_index(),
                value: self.rng.pick(&[0, 0, 1, 2, 3, 0xffff, 0x8000]),
            },
        }
    }

    fn queue_index(&mut self) -> u32 {
        // sometimes one that does not exist
        let n = self.num_queues() + u64::from(self.rng.percent(10));
        self.rng.below(n) as u32
    }
}
