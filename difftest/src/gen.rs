// SPDX-License-Identifier: GPL-2.0-or-later

//! Generates random operations

use qtest_client::rng::Rng;
use serde_json::{json, Value};

use crate::{
    driver::{
        reg, F_EVENT_IDX, F_HINT, F_INDIRECT, F_NOTIFY_ON_EMPTY, F_VERSION_1, PAGE, RAM_SIZE,
        WINDOW, WINDOW_PAGES,
    },
    op::{Config, Mode, Op, Seg},
};

const PATH: &str = "/machine/peripheral/balloon";

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
    initialized: bool,
    running: bool,
    stopped_for: u32,
    /// The VM was stopped when it was migrated, and did not run since
    arrived_stopped: bool,
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
            initialized: false,
            running: true,
            stopped_for: 0,
            arrived_stopped: false,
        }
    }

    /// Options for QEMU
    pub fn config(&mut self) -> Config {
        let mut flags = [false; 5];
        for (flag, percent) in flags.iter_mut().zip([30, 50, 50, 60, 60]) {
            *flag = self.rng.percent(percent);
        }
        Config::from_flags(flags)
    }

    /// Start an episode.
    pub fn start(&mut self, cfg: &Config, offered: u64) {
        self.cfg = cfg.clone();
        self.offered = offered;
        self.features = 0;
        self.broken = false;
        self.initialized = false;
        self.stopped_for = 0;
    }

    /// How many operations an episode has
    pub fn episode_length(&mut self) -> u64 {
        self.rng.range(100, 400)
    }

    fn num_queues(&self) -> u64 {
        3 + u64::from(self.cfg.free_page_hint) + u64::from(self.cfg.free_page_reporting)
    }

    fn hint_queue(&self) -> Option<u32> {
        self.cfg.free_page_hint.then_some(3)
    }

    fn report_queue(&self) -> Option<u32> {
        self.cfg
            .free_page_reporting
            .then_some(if self.cfg.free_page_hint { 4 } else { 3 })
    }

    fn random_features(&mut self) -> u64 {
        let mut features = self.offered;
        match self.rng.below(10) {
            0..=4 => {
                for bit in [0, 1, 2, 3, 4, 5, 24, 27, 28, 29, 40] {
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
        // Rings of another format, and addresses that need translation, are
        // not offered; and that is all that there is to compare.
        features & !(1 << 33 | 1 << 34)
    }

    fn init(&mut self) -> Op {
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
            585..=586 => {
                self.arrived_stopped |= !running;
                Op::Migrate
            }
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
                    // see NAMED_DIFFERENCES, batch-notification
                    let same = (F_NOTIFY_ON_EMPTY | F_EVENT_IDX) as u32;
                    value = value & !same | self.features as u32 & same;
                    // The legacy interface accepts that at any time.
                    self.features &= u64::from(value) | !u64::from(u32::MAX);
                }
                Op::Features { sel, value }
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

    fn kick(&mut self) -> Op {
        let mut value = if self.rng.percent(60) {
            self.queue_index()
        } else {
            self.rng
                .pick(&[5, 6, 63, 64, 1023, 1024, 0x1_0000, u32::MAX])
        };
        if self.hint_queue() == Some(value & 0xffff) && !self.can_hint() {
            // see NAMED_DIFFERENCES, hint-not-negotiated
            value = 2;
        }
        Op::Kick { value }
    }

    fn status(&mut self) -> Op {
        let value = self.rng.pick(&[
            0, 1, 2, 3, 4, 7, 8, 0xb, 0xc, 0xf, 0xf, 0xf, 0x80, 0x8f, 0x4f, 0x40, 0xff,
        ]);
        if value == 0 {
            self.features = 0;
            self.initialized = false;
        }
        Op::Status { value }
    }

    fn queue(&mut self) -> Op {
        let q = self.queue_index();
        let size = match self.rng.below(10) {
            0 => self.rng.pick(&[0, 3, 5, 129, 256, 1024, 1025, 65536]),
            _ => self.rng.pick(&[1, 2, 4, 8, 16, 32, 64, 128]),
        };
        if self.hint_queue() == Some(q) || size > 256 && self.cfg.legacy {
            return Op::Queue { q: 0, size: 16 };
        }
        Op::Queue { q, size }
    }

    fn queue_at(&mut self) -> Op {
        let q = self.queue_index();
        if self.hint_queue() == Some(q) {
            return Op::Queue { q: 0, size: 16 };
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
        Op::QueueAt {
            q,
            size: self.rng.pick(&[1, 2, 8, 16]),
            desc: addr[0],
            avail: addr[1],
            used: addr[2],
        }
    }

    fn register(&mut self) -> u64 {
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

    fn config_offset(&mut self) -> u64 {
        match self.rng.below(10) {
            0..=6 => self.rng.pick(&[0, 4, 4, 4, 8, 12]),
            7 | 8 => self.rng.below(24),
            _ => self.rng.pick(&[16, 20, 64, 0xf0, 0xf8]),
        }
    }

    fn config_write(&mut self) -> Op {
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

    fn pfn(&mut self) -> u32 {
        let window = WINDOW / PAGE;
        match self.rng.below(20) {
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
        }
    }

    fn pfns(&mut self) -> Vec<u8> {
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
    fn split(&mut self, data: Vec<u8>) -> Vec<Seg> {
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

    fn element(&mut self, q: u32, mut segs: Vec<Seg>) -> Op {
        if segs.is_empty() && self.rng.percent(90) {
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
        // see NAMED_DIFFERENCES, error-in-batch and bounce-buffers
        let foreign = q < 2 && !segs.iter().all(in_ram);
        self.foreign |= foreign;
        let alone = Some(q) == self.hint_queue() || foreign;
        let kick = alone || self.rng.percent(92);
        Op::Elem {
            q,
            kick,
            mode,
            segs,
        }
    }

    fn raw_address(&mut self) -> u64 {
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

    fn raw_segment(&mut self) -> Seg {
        let addr = self.raw_address();
        let len = self.rng.pick(&[1, 3, 4, 8, 4096, 4097, 8192]);
        if self.rng.percent(50) {
            Seg::Out { addr, len }
        } else {
            Seg::In { addr, len }
        }
    }

    fn balloon_element(&mut self, q: u32) -> Op {
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

    fn stats_element(&mut self) -> Op {
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

    fn report_element(&mut self, q: u32) -> Op {
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

    fn can_hint(&self) -> bool {
        // see NAMED_DIFFERENCES, hint-not-negotiated and hint-on-arrival
        self.features & F_HINT != 0 && self.initialized && !self.arrived_stopped
    }

    fn hint_element(&mut self) -> Op {
        let Some(q) = self.hint_queue() else {
            return self.stats_element();
        };
        if !self.can_hint() {
            return self.balloon_element(0);
        }
        let mut segs = Vec::new();
        if self.rng.percent(60) {
            let len = if self.rng.percent(8) && self.running {
                self.broken = true;
                self.rng.range(1, 3)
            } else {
                4
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

    fn bad_element(&mut self) -> Op {
        let mut q = self.queue_index();
        // see NAMED_DIFFERENCES, hint-error-on-resume
        if Some(q) == self.hint_queue() && !(self.can_hint() && self.running) {
            q = 0;
        }
        let hint = Some(q) == self.hint_queue();
        let mut mode = self.rng.pick(&Mode::bad());
        // Makes descriptors available that were used before; see
        // NAMED_DIFFERENCES, hint-jump and bounce-buffers
        if mode == Mode::Jump && (hint || self.foreign) {
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
        if self.rng.percent(30) && !hint {
            let seg = self.raw_segment();
            let foreign = q < 2 && !in_ram(&seg);
            if mode != Mode::Jump || !foreign {
                self.foreign |= foreign;
                segs.push(seg);
            }
        }
        self.broken = true;
        Op::Elem {
            q,
            kick: true,
            mode,
            segs,
        }
    }

    fn qmp(&mut self) -> Op {
        let mib = 1u64 << 20;
        let command = match self.rng.below(20) {
            0..=4 => {
                let value = match self.rng.below(12) {
                    0 => json!(0),
                    1 => json!(1),
                    2 => json!(-1),
                    3 => json!(i64::MIN),
                    4 => json!(i64::MAX),
                    5 => json!(u64::MAX),
                    6 => json!("64M"),
                    7 => json!(RAM_SIZE + self.rng.below(3) - 1),
                    8 => json!(1.5),
                    _ => json!(self.rng.range(1, 64) * mib),
                };
                json!({"execute": "balloon", "arguments": {"value": value}})
            }
            5..=6 => json!({"execute": "query-balloon"}),
            7..=8 => get("guest-stats"),
            9 => get("guest-stats-polling-interval"),
            10..=13 => {
                let value = match self.rng.below(12) {
                    0 | 1 => json!(0),
                    2..=4 => json!(1),
                    5 => json!(self.rng.range(2, 60)),
                    6 => json!(-1),
                    7 => json!(u32::MAX),
                    8 => json!(u64::from(u32::MAX) + 1),
                    9 => json!("2"),
                    10 => json!(i64::MIN),
                    _ => json!(u64::MAX),
                };
                set("guest-stats-polling-interval", value)
            }
            14 => set("guest-stats", json!({})),
            15 => {
                let name = self.property();
                get(name)
            }
            16 => {
                let name = self.property();
                let value =
                    self.rng
                        .pick(&[json!(true), json!(false), json!(1), json!("/objects/io0")]);
                set(name, value)
            }
            17 => json!({"execute": "x-query-virtio-status", "arguments": {"path": PATH}}),
            18 => {
                let q = self.queue_index();
                // What the hint queue looks like depends on how far the I/O
                // thread is.
                let q = if Some(q) == self.hint_queue() { 7 } else { q };
                json!({"execute": "x-query-virtio-queue-status",
                       "arguments": {"path": PATH, "queue": q}})
            }
            _ => json!({"execute": self.rng.pick(&["query-status", "query-memory-size-summary"])}),
        };
        Op::Qmp {
            command: command.to_string(),
        }
    }

    fn property(&mut self) -> &'static str {
        self.rng.pick(&[
            "deflate-on-oom",
            "free-page-hint",
            "page-poison",
            "free-page-reporting",
            "iothread",
            "hotplugged",
            "indirect_desc",
            "no-such-property",
        ])
    }
}

/// Whether the device can access the buffer without a copy
fn in_ram(seg: &Seg) -> bool {
    match seg {
        Seg::Data(_) => true,
        Seg::Out { addr, len } | Seg::In { addr, len } => {
            (0x10_0000..RAM_SIZE).contains(addr) && addr + u64::from(*len) <= RAM_SIZE
        }
    }
}

fn get(property: &str) -> Value {
    json!({"execute": "qom-get", "arguments": {"path": PATH, "property": property}})
}

fn set(property: &str, value: Value) -> Value {
    json!({"execute": "qom-set",
           "arguments": {"path": PATH, "property": property, "value": value}})
}
