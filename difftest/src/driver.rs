// SPDX-License-Identifier: GPL-2.0-or-later

//! Turns operations into qtest commands.  Both devices have their own instance
//! of the driver, which behaves in the same way.

use std::fmt::Write;

pub use qtest_client::mmio as reg;
use qtest_client::{
    ring::{self, Buffer, Fault, Format, Memory, Ring, DESC_INDIRECT, DESC_NEXT, DESC_WRITE},
    transport::{Reg, Transport},
    write_command,
};

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

/// A buffer of many PFNs, which all are 0: address and size
pub const LONG_BUFFER: (u64, u32) = (0x180_0000, 1 << 20);

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
pub const F_ACCESS_PLATFORM: u64 = 1 << 33;
pub const F_PACKED: u64 = 1 << 34;
pub const F_RING_RESET: u64 = 1 << 40;
pub const F_NOTIFICATION_DATA: u64 = 1 << 38;
/// Free page hinting
pub const F_HINT: u64 = 1 << 3;

const S_ACK: u8 = 1;
const S_DRIVER: u8 = 2;
const S_DRIVER_OK: u8 = 4;
const S_FEATURES_OK: u8 = 8;

/// The driver's view of a queue
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    pub ring: Ring,
    slot: u64,
    /// The device was told where it is.
    is_set_up: bool,
}

fn valid_size(size: u32) -> bool {
    matches!(size, 1..=1024)
}

impl Queue {
    fn was_reset(&mut self) {
        self.ring.restart();
        self.is_set_up = false;
    }

    fn standard(format: Format, q: u32, size: u32) -> Self {
        let size = if valid_size(size) { size } else { 16 };
        Self {
            ring: Ring::new(format, size, RINGS + u64::from(q) * RING_SIZE),
            slot: 0,
            is_set_up: false,
        }
    }
}

/// The driver
#[derive(Debug, Clone)]
pub struct Driver {
    pub transport: Transport,
    pub legacy: bool,
    pub num_queues: u32,
    /// Features that the device has
    offered: u64,
    /// Features that the driver has chosen
    pub features: u64,
    pub queues: [Queue; MAX_QUEUES as usize],
    /// The device may use queues that are set up.
    driver_ok: bool,
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

    /// Add a command, or several, each ended by a newline.
    fn line(&mut self, command: &str) {
        for line in command.lines() {
            self.push(format_args!("{line}"));
        }
    }
}

impl Memory for Script {
    fn write(&mut self, addr: u64, data: &[u8]) {
        if !data.is_empty() {
            self.push(format_args!("{}", write_command(addr, data)));
        }
    }
}

impl Driver {
    /// A driver for the device at `transport`
    pub fn new(transport: Transport, legacy: bool, num_queues: u32, offered: u64) -> Self {
        let queue = |q| Queue::standard(Format::Split, q as u32, 16);
        Self {
            transport,
            legacy,
            num_queues,
            offered,
            features: 0,
            queues: std::array::from_fn(queue),
            driver_ok: false,
            running: true,
        }
    }

    fn reg(&self, s: &mut Script, reg: Reg, value: u32) {
        s.line(&self.transport.write(reg, value));
    }

    /// Write a register that only virtio-mmio has.
    fn mmio(&self, s: &mut Script, register: u64, value: u32) {
        if let Transport::Mmio { base } = self.transport {
            s.push(format_args!("writel {:#x} {value:#x}", base + register));
        }
    }

    fn features(&mut self, s: &mut Script, features: u64) {
        self.reg(s, Reg::DriverFeaturesSel, 0);
        self.reg(s, Reg::DriverFeatures, features as u32);
        if !self.legacy {
            self.reg(s, Reg::DriverFeaturesSel, 1);
            self.reg(s, Reg::DriverFeatures, (features >> 32) as u32);
        }
        self.features = features;
    }

    /// What the device expects, even if the driver asked for more than it has
    fn format(&self) -> Format {
        if self.features & self.offered & F_PACKED != 0 {
            Format::Packed
        } else {
            Format::Split
        }
    }

    fn negotiate(&mut self, s: &mut Script, features: u64) -> u8 {
        self.reset(s);
        self.reg(s, Reg::Status, S_ACK.into());
        self.reg(s, Reg::Status, (S_ACK | S_DRIVER).into());
        self.features(s, features);
        if self.legacy {
            return S_ACK | S_DRIVER;
        }
        let status = S_ACK | S_DRIVER | S_FEATURES_OK;
        self.reg(s, Reg::Status, status.into());
        status
    }

    fn reset(&mut self, s: &mut Script) {
        self.reg(s, Reg::Status, 0);
        self.was_reset();
    }

    /// The device has forgotten everything.
    fn was_reset(&mut self) {
        self.features = 0;
        self.driver_ok = false;
        for queue in &mut self.queues {
            queue.was_reset();
        }
    }

    fn write_status(&mut self, s: &mut Script, status: u32) {
        self.reg(s, Reg::Status, status);
        self.driver_ok = status & u32::from(S_DRIVER_OK) != 0;
    }

    fn queue(&mut self, s: &mut Script, q: u32, mut size: u32, queue: Queue) {
        let mut ring = queue.ring;
        let Queue {
            ring: old,
            is_set_up,
            ..
        } = self.queues[q as usize];
        if old.format == ring.format {
            // The device does not let a queue that is in use change its size.
            let refused = self.driver_ok && is_set_up;
            if refused || !old.is_at_start() {
                ring = Queue::standard(ring.format, q, old.size).ring;
            }
            // It may have taken elements or not: do not try.
            if !refused && !old.is_at_start() {
                size = old.size;
            }
            // The device goes on where it was.  If it found a smaller index, it
            // would take that for 65536 elements.
            ring.go_on_from(&old);
        }
        self.queues[q as usize] = Queue {
            ring,
            is_set_up: ring.desc != 0,
            ..queue
        };
        let end = ring.end();
        let rings = RINGS..RINGS + RING_SIZE * u64::from(MAX_QUEUES);
        if rings.contains(&ring.desc) && rings.contains(&end) {
            s.push(format_args!(
                "memset {:#x} {} 0",
                ring.desc,
                end - ring.desc
            ));
        }
        if ring.position() != 0 || !(RINGS..DATA).contains(&ring.avail) {
            ring.write_position(s);
        }
        self.reg(s, Reg::QueueSel, q);
        if !valid_size(size) {
            // It is ignored.  The rings must not overlap, though: the device
            // would never find the end.
            self.reg(s, Reg::QueueSize, ring.size);
        }
        self.reg(s, Reg::QueueSize, size);
        if self.legacy {
            self.mmio(s, reg::GUEST_PAGE_SIZE, PAGE as u32);
            self.mmio(s, reg::QUEUE_ALIGN, 64);
            self.mmio(s, reg::QUEUE_PFN, (ring.desc / PAGE) as u32);
        } else {
            for command in self
                .transport
                .write_addresses(ring.desc, ring.avail, ring.used)
            {
                s.line(&command);
            }
            self.reg(s, Reg::QueueReady, 1);
        }
    }

    /// Notify the device.
    pub fn kick(&self, s: &mut Script, q: u32) {
        let mut value = q;
        if self.features & F_NOTIFICATION_DATA != 0 && q < MAX_QUEUES {
            value |= u32::from(self.queues[q as usize].ring.position()) << 16;
        }
        if let Some(command) = self.transport.notify(value) {
            s.line(&command);
        }
    }

    /// Forget the interrupt.
    pub fn acknowledge(&self, s: &mut Script, value: u32) {
        self.mmio(s, reg::INTERRUPT_ACK, value);
    }

    fn elem(&mut self, s: &mut Script, q: u32, kick: bool, mode: Mode, segs: &[Seg]) {
        let i = q as usize;
        let mut queue = self.queues[i];

        // Data
        let mut place = DATA + u64::from(q) * DATA_SIZE + (queue.slot % SLOTS) * SLOT_SIZE;
        if mode == Mode::Cross {
            place += PAGE - 2;
        }
        let table = TABLES + u64::from(q) * PAGE + (queue.slot % SLOTS) * 512;
        queue.slot += 1;
        let mut chain = Vec::new();
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
            chain.push(Buffer { addr, len, flags });
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
            if let (Mode::IndirectNested, Some(last)) = (mode, chain.last_mut()) {
                last.flags |= DESC_INDIRECT;
            }
            let bytes = ring::table(queue.ring.format, &chain);
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
            chain = vec![Buffer {
                addr: table,
                len,
                flags: DESC_INDIRECT | next,
            }];
        }
        let fault = match mode {
            Mode::Loop => Some(Fault::Loop),
            Mode::BadNext => Some(Fault::BadNext),
            Mode::BadHead => Some(Fault::BadHead),
            Mode::Jump => Some(Fault::Jump),
            _ => None,
        };
        queue.ring.add(s, &chain, fault);
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
                    self.queue(s, q, *size, Queue::standard(self.format(), q, *size));
                }
                self.write_status(s, (status | S_DRIVER_OK).into());
            }
            Op::Reset => self.reset(s),
            Op::ResetPfn => {
                self.mmio(s, reg::QUEUE_PFN, 0);
                if self.legacy {
                    self.was_reset();
                }
            }
            Op::Status { value } => {
                self.write_status(s, (*value).into());
                if *value == 0 {
                    self.was_reset();
                }
            }
            Op::Negotiate { features } => {
                self.negotiate(s, *features);
            }
            Op::Features { sel, value } => {
                self.reg(s, Reg::DriverFeaturesSel, *sel);
                self.reg(s, Reg::DriverFeatures, *value);
            }
            Op::Queue { q, size } => {
                self.queue(s, *q, *size, Queue::standard(self.format(), *q, *size));
            }
            Op::QueueAt {
                q,
                size,
                desc,
                avail,
                used,
            } => {
                // Where the device cannot read the index, it takes it for 0,
                // which must not be less than before.
                let features = self.features;
                let status = self.negotiate(s, features);
                for i in (0..self.num_queues).filter(|i| i != q) {
                    self.queue(s, i, 16, Queue::standard(self.format(), i, 16));
                }
                let mut queue = Queue::standard(self.format(), *q, *size);
                let ring = &mut queue.ring;
                ring.desc = *desc;
                ring.avail = *avail;
                ring.used = *used;
                if self.legacy {
                    ring.avail = desc + u64::from(*size) * 16;
                    ring.used = (ring.avail + 4 + 2 * u64::from(*size)).next_multiple_of(64);
                }
                self.queue(s, *q, *size, queue);
                self.write_status(s, (status | S_DRIVER_OK).into());
            }
            Op::Ready { q, value } => {
                self.reg(s, Reg::QueueSel, *q);
                self.reg(s, Reg::QueueReady, *value);
            }
            Op::Elem {
                q,
                kick,
                mode,
                segs,
            } => self.elem(s, *q, *kick, *mode, segs),
            Op::Kick { value } => self.kick(s, *value),
            Op::AvailFlags { q, value } => self.queues[*q as usize].ring.write_flags(s, *value),
            Op::UsedEvent { q, value } => self.queues[*q as usize].ring.write_event(s, *value),
            Op::CfgWrite { off, width, value } => {
                let addr = self.transport.config() + off;
                let suffix = suffix(*width);
                s.push(format_args!("write{suffix} {addr:#x} {value:#x}"));
            }
            Op::CfgRead { off, width } => {
                let addr = self.transport.config() + off;
                s.push(format_args!("read{} {addr:#x}", suffix(*width)));
            }
            Op::RegRead { off, width } => {
                let addr = self.transport.registers() + off;
                s.push(format_args!("read{} {addr:#x}", suffix(*width)));
            }
            Op::Ack { value } => self.acknowledge(s, *value),
            Op::Fill => s.push(format_args!(
                "memset {WINDOW:#x} {} {PATTERN:#x}",
                WINDOW_PAGES * PAGE
            )),
            Op::Clock { ns } => s.push(format_args!("clock_step {ns}")),
            Op::Stop => self.running = false,
            Op::Cont => self.running = true,
            Op::SystemReset => {
                if let Transport::Pci(pci) = self.transport {
                    s.line(&pci.setup_commands());
                }
                self.was_reset();
            }
            Op::Check => {
                for (addr, len) in DRIVER_MEMORY {
                    s.push(format_args!("b64read {addr:#x} {len}"));
                }
            }
            Op::QueueReset { q, size } => {
                self.reg(s, Reg::QueueSel, *q);
                if let Some(command) = self.transport.reset_queue() {
                    s.line(&command);
                    self.queues[*q as usize].was_reset();
                }
                if *size != 0 {
                    self.queue(s, *q, *size, Queue::standard(self.format(), *q, *size));
                }
            }
            Op::Qmp { .. } | Op::Migrate | Op::MigrateLive => {}
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
