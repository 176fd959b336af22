// SPDX-License-Identifier: GPL-2.0-or-later

//! Turns operations into qtest commands.  Both devices have their own instance
//! of the driver, which behaves in the same way.

use std::fmt::Write;

pub use qtest_client::mmio as reg;
use qtest_client::write_command;

use crate::op::{Mode, Op, Seg};

/// Size of the guest's RAM
pub const RAM_SIZE: u64 = 64 << 20;
/// Size of a page
pub const PAGE: u64 = 4096;
/// Where the pages are that are filled with a pattern, and discarded
pub const WINDOW: u64 = 0x200_0000;
/// How many these are
pub const WINDOW_PAGES: u64 = 24;
/// What they are filled with
pub const PATTERN: u8 = 0xa5;

const RINGS: u64 = 0x100_0000;
const RING_SIZE: u64 = 0x8000;
const DATA: u64 = 0x110_0000;
const DATA_SIZE: u64 = 0x8000;
const SLOTS: u64 = 4;
const SLOT_SIZE: u64 = DATA_SIZE / SLOTS;
const TABLES: u64 = 0x120_0000;
/// As many queues as any device has, and one that does not exist
pub const MAX_QUEUES: u32 = 6;

/// The memory in which the driver keeps its data, for a final comparison
pub const DRIVER_MEMORY: [(u64, u64); 3] = [
    (DATA, DATA_SIZE * (MAX_QUEUES as u64)),
    (TABLES, PAGE * (MAX_QUEUES as u64)),
    (WINDOW, WINDOW_PAGES * PAGE),
];

/// Feature bits
pub const F_NOTIFY_ON_EMPTY: u64 = 1 << 24;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_NOTIFICATION_DATA: u64 = 1 << 38;
/// Free page hinting
pub const F_HINT: u64 = 1 << 3;

const S_ACK: u8 = 1;
const S_DRIVER: u8 = 2;
const S_DRIVER_OK: u8 = 4;
const S_FEATURES_OK: u8 = 8;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// The driver's view of a queue
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    pub size: u32,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub avail_idx: u16,
    next_desc: u16,
    slot: u64,
}

fn valid_size(size: u32) -> bool {
    matches!(size, 1..=1024)
}

impl Queue {
    fn standard(q: u32, size: u32) -> Self {
        let size = if valid_size(size) { size } else { 16 };
        let desc = RINGS + u64::from(q) * RING_SIZE;
        let avail = desc + u64::from(size) * 16;
        // like the legacy interface, with an alignment of 64
        let used = (avail + 4 + 2 * u64::from(size)).next_multiple_of(64);
        Self {
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            next_desc: 0,
            slot: 0,
        }
    }
}

/// A descriptor
#[derive(Debug, Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The driver
#[derive(Debug, Clone)]
pub struct Driver {
    pub base: u64,
    pub legacy: bool,
    pub num_queues: u32,
    pub features: u64,
    pub queues: [Queue; MAX_QUEUES as usize],
    pub running: bool,
}

/// qtest commands
#[derive(Debug, Default)]
pub struct Script {
    /// One per line
    pub text: String,
    /// How many these are
    pub count: usize,
}

impl Script {
    /// Add a command.
    pub fn push(&mut self, args: std::fmt::Arguments<'_>) {
        let _ = self.text.write_fmt(args);
        self.text.push('\n');
        self.count += 1;
    }

    fn write(&mut self, addr: u64, data: &[u8]) {
        if !data.is_empty() {
            self.push(format_args!("{}", write_command(addr, data)));
        }
    }

    fn writew(&mut self, addr: u64, value: u16) {
        self.push(format_args!("writew {addr:#x} {value:#x}"));
    }
}

impl Driver {
    /// A driver for the device at `base`
    pub fn new(base: u64, legacy: bool, num_queues: u32) -> Self {
        Self {
            base,
            legacy,
            num_queues,
            features: 0,
            queues: std::array::from_fn(|q| Queue::standard(q as u32, 16)),
            running: true,
        }
    }

    fn reg(&self, s: &mut Script, reg: u64, value: u32) {
        let addr = self.base + reg;
        s.push(format_args!("writel {addr:#x} {value:#x}"));
    }

    fn reg64(&self, s: &mut Script, reg: u64, value: u64) {
        self.reg(s, reg, value as u32);
        self.reg(s, reg + 4, (value >> 32) as u32);
    }

    fn features(&mut self, s: &mut Script, features: u64) {
        self.reg(s, reg::DRIVER_FEATURES_SEL, 0);
        self.reg(s, reg::DRIVER_FEATURES, features as u32);
        if !self.legacy {
            self.reg(s, reg::DRIVER_FEATURES_SEL, 1);
            self.reg(s, reg::DRIVER_FEATURES, (features >> 32) as u32);
        }
        self.features = features;
    }

    fn negotiate(&mut self, s: &mut Script, features: u64) -> u8 {
        self.reset(s);
        self.reg(s, reg::STATUS, S_ACK.into());
        self.reg(s, reg::STATUS, (S_ACK | S_DRIVER).into());
        self.features(s, features);
        if self.legacy {
            return S_ACK | S_DRIVER;
        }
        let status = S_ACK | S_DRIVER | S_FEATURES_OK;
        self.reg(s, reg::STATUS, status.into());
        status
    }

    fn reset(&mut self, s: &mut Script) {
        self.reg(s, reg::STATUS, 0);
        self.was_reset();
    }

    /// The device has forgotten everything.
    fn was_reset(&mut self) {
        self.features = 0;
        for queue in &mut self.queues {
            queue.avail_idx = 0;
        }
    }

    fn queue(&mut self, s: &mut Script, q: u32, size: u32, queue: Queue) {
        let mut queue = queue;
        // The device goes on where it was.  If it found a smaller index, it
        // would take that for 65536 elements.
        queue.avail_idx = self.queues[q as usize].avail_idx;
        self.queues[q as usize] = queue;
        let end = queue.used.saturating_add(6 + 8 * u64::from(queue.size));
        let rings = RINGS..RINGS + RING_SIZE * u64::from(MAX_QUEUES);
        if rings.contains(&queue.desc) && rings.contains(&end) {
            s.push(format_args!(
                "memset {:#x} {} 0",
                queue.desc,
                end - queue.desc
            ));
        }
        if queue.avail_idx != 0 || !(RINGS..DATA).contains(&queue.avail) {
            s.writew(queue.avail, 0);
            s.writew(queue.avail + 2, queue.avail_idx);
        }
        self.reg(s, reg::QUEUE_SEL, q);
        if !valid_size(size) {
            // It is ignored.  The rings must not overlap, though: the device
            // would never find the end.
            self.reg(s, reg::QUEUE_NUM, queue.size);
        }
        self.reg(s, reg::QUEUE_NUM, size);
        if self.legacy {
            self.reg(s, reg::GUEST_PAGE_SIZE, PAGE as u32);
            self.reg(s, reg::QUEUE_ALIGN, 64);
            self.reg(s, reg::QUEUE_PFN, (queue.desc / PAGE) as u32);
        } else {
            self.reg64(s, reg::QUEUE_DESC, queue.desc);
            self.reg64(s, reg::QUEUE_AVAIL, queue.avail);
            self.reg64(s, reg::QUEUE_USED, queue.used);
            self.reg(s, reg::QUEUE_READY, 1);
        }
    }

    /// Notify the device.
    pub fn kick(&self, s: &mut Script, q: u32) {
        let mut value = q;
        if self.features & F_NOTIFICATION_DATA != 0 && q < MAX_QUEUES {
            value |= u32::from(self.queues[q as usize].avail_idx) << 16;
        }
        self.reg(s, reg::QUEUE_NOTIFY, value);
    }

    fn elem(&mut self, s: &mut Script, q: u32, kick: bool, mode: Mode, segs: &[Seg]) {
        let i = q as usize;
        let mut queue = self.queues[i];
        let size = queue.size.max(1) as u16;

        // Data
        let mut place = DATA + u64::from(q) * DATA_SIZE + (queue.slot % SLOTS) * SLOT_SIZE;
        if mode == Mode::Cross {
            place += PAGE - 2;
        }
        let table = TABLES + u64::from(q) * PAGE + (queue.slot % SLOTS) * 512;
        queue.slot += 1;
        let mut descs: Vec<Desc> = Vec::new();
        for seg in segs {
            let (addr, len, flags) = match seg {
                Seg::Data(data) => {
                    s.write(place, data);
                    let at = place;
                    place += data.len() as u64;
                    (at, data.len() as u32, 0)
                }
                Seg::Out { addr, len } => (*addr, *len, 0),
                Seg::In { addr, len } => (*addr, *len, DESC_WRITE),
            };
            descs.push(Desc {
                addr,
                len,
                flags,
                next: 0,
            });
        }

        // Descriptors
        let indirect = matches!(
            mode,
            Mode::Indirect
                | Mode::IndirectOdd
                | Mode::IndirectEmpty
                | Mode::IndirectNext
                | Mode::IndirectNested
        );
        if indirect {
            let mut bytes = Vec::new();
            let n = descs.len();
            for (k, desc) in descs.iter_mut().enumerate() {
                if k + 1 < n {
                    desc.flags |= DESC_NEXT;
                    desc.next = k as u16 + 1;
                } else if mode == Mode::IndirectNested {
                    desc.flags |= DESC_INDIRECT;
                }
                bytes.extend_from_slice(&desc.bytes());
            }
            s.write(table, &bytes);
            let len = match mode {
                Mode::IndirectOdd => bytes.len() as u32 + 5,
                Mode::IndirectEmpty => 0,
                _ => bytes.len() as u32,
            };
            let next = if mode == Mode::IndirectNext {
                DESC_NEXT
            } else {
                0
            };
            descs = vec![Desc {
                addr: table,
                len,
                flags: DESC_INDIRECT | next,
                next: 0,
            }];
        }
        let mut head = queue.next_desc % size;
        let n = descs.len();
        for (k, mut desc) in descs.into_iter().enumerate() {
            let at = queue.next_desc % size;
            queue.next_desc = (at + 1) % size;
            if indirect {
                desc.next = queue.next_desc;
            } else if k + 1 < n {
                desc.flags |= DESC_NEXT;
                desc.next = queue.next_desc;
            } else if mode == Mode::Loop {
                desc.flags |= DESC_NEXT;
                desc.next = head;
            } else if mode == Mode::BadNext {
                desc.flags |= DESC_NEXT;
                desc.next = size;
            }
            s.write(queue.desc + u64::from(at) * 16, &desc.bytes());
        }
        if mode == Mode::BadHead {
            head = size;
        }

        // Available ring
        s.writew(
            queue.avail + 4 + u64::from(queue.avail_idx % size) * 2,
            head,
        );
        let step = if mode == Mode::Jump { size + 2 } else { 1 };
        queue.avail_idx = queue.avail_idx.wrapping_add(step);
        s.writew(queue.avail + 2, queue.avail_idx);
        self.queues[i] = queue;
        if kick {
            self.kick(s, q);
        }
    }

    /// Add the commands for an operation.
    pub fn compile(&mut self, op: &Op, s: &mut Script) {
        match op {
            Op::Init { features, size } => {
                let status = self.negotiate(s, *features);
                for q in 0..self.num_queues {
                    self.queue(s, q, *size, Queue::standard(q, *size));
                }
                self.reg(s, reg::STATUS, (status | S_DRIVER_OK).into());
            }
            Op::Reset => self.reset(s),
            Op::ResetPfn => {
                self.reg(s, reg::QUEUE_PFN, 0);
                if self.legacy {
                    self.was_reset();
                }
            }
            Op::Status { value } => {
                self.reg(s, reg::STATUS, (*value).into());
                if *value == 0 {
                    self.was_reset();
                }
            }
            Op::Negotiate { features } => {
                self.negotiate(s, *features);
            }
            Op::Features { sel, value } => {
                self.reg(s, reg::DRIVER_FEATURES_SEL, *sel);
                self.reg(s, reg::DRIVER_FEATURES, *value);
            }
            Op::Queue { q, size } => self.queue(s, *q, *size, Queue::standard(*q, *size)),
            Op::QueueAt {
                q,
                size,
                desc,
                avail,
                used,
            } => {
                let mut queue = Queue::standard(*q, *size);
                queue.desc = *desc;
                queue.avail = *avail;
                queue.used = *used;
                if self.legacy {
                    queue.avail = desc + u64::from(*size) * 16;
                    queue.used = (queue.avail + 4 + 2 * u64::from(*size)).next_multiple_of(64);
                }
                // Where the device cannot read the index, it takes it for 0,
                // which must not be less than before.
                let features = self.features;
                let status = self.negotiate(s, features);
                for i in (0..self.num_queues).filter(|i| i != q) {
                    self.queue(s, i, 16, Queue::standard(i, 16));
                }
                self.queue(s, *q, *size, queue);
                self.reg(s, reg::STATUS, (status | S_DRIVER_OK).into());
            }
            Op::Ready { q, value } => {
                self.reg(s, reg::QUEUE_SEL, *q);
                self.reg(s, reg::QUEUE_READY, *value);
            }
            Op::Elem {
                q,
                kick,
                mode,
                segs,
            } => self.elem(s, *q, *kick, *mode, segs),
            Op::Kick { value } => self.kick(s, *value),
            Op::AvailFlags { q, value } => s.writew(self.queues[*q as usize].avail, *value),
            Op::UsedEvent { q, value } => {
                let queue = self.queues[*q as usize];
                s.writew(
                    queue.avail + 4 + 2 * u64::from(queue.size),
                    queue.avail_idx.wrapping_add(*value),
                );
            }
            Op::CfgWrite { off, width, value } => {
                let addr = self.base + reg::CONFIG + off;
                let suffix = suffix(*width);
                s.push(format_args!("write{suffix} {addr:#x} {value:#x}"));
            }
            Op::CfgRead { off, width } => {
                let addr = self.base + reg::CONFIG + off;
                s.push(format_args!("read{} {addr:#x}", suffix(*width)));
            }
            Op::RegRead { off, width } => {
                let addr = self.base + off;
                s.push(format_args!("read{} {addr:#x}", suffix(*width)));
            }
            Op::Ack { value } => self.reg(s, reg::INTERRUPT_ACK, *value),
            Op::Fill => s.push(format_args!(
                "memset {WINDOW:#x} {} {PATTERN:#x}",
                WINDOW_PAGES * PAGE
            )),
            Op::Clock { ns } => s.push(format_args!("clock_step {ns}")),
            Op::Stop => self.running = false,
            Op::Cont => self.running = true,
            Op::SystemReset => self.was_reset(),
            Op::Check => {
                for (addr, len) in DRIVER_MEMORY {
                    s.push(format_args!("b64read {addr:#x} {len}"));
                }
            }
            Op::Qmp { .. } | Op::Migrate => {}
        }
    }
}

fn suffix(width: u8) -> char {
    match width {
        1 => 'b',
        2 => 'w',
        4 => 'l',
        _ => 'q',
    }
}
