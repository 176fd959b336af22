// SPDX-License-Identifier: GPL-2.0-or-later

//! A balloon driver that only sends PFNs, as fast as possible

use std::{
    fmt::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{ensure, Result};
use qtest_client::{
    mmio::{self as reg, find_balloon},
    value, write_command, Qemu,
};

/// Size of a balloon page in bytes
pub const PAGE: u64 = 4096;
/// Number of PFNs in an element of Linux
pub const ELEMENT: usize = 256;
/// Number of elements in the queue
pub const ELEMENTS: usize = 128;
/// Number of elements in the queue for free page reporting
pub const REPORTS: usize = 32;
/// Address of the memory that is inflated
pub const REGION: u64 = 64 << 20;
/// Size of that memory in bytes
pub const REGION_SIZE: u64 = 256 << 20;

/// Address of the driver's own data
const RINGS: u64 = 16 << 20;
const RING_SIZE: u64 = 0x10000;
const DATA: u64 = 17 << 20;

/// Indexes of the queues
pub const INFLATE: u32 = 0;
pub const DEFLATE: u32 = 1;
pub const REPORTING: u32 = 3;

/// A QEMU with a balloon, and the driver's state
pub struct Driver {
    pub qemu: Qemu,
    base: u64,
    /// How many elements were sent to each queue
    avail_idx: [u16; 4],
}

/// A buffer: address, length, and whether the device may write to it
pub type Buffer = (u64, u32, bool);

const fn ring(q: u32) -> u64 {
    RINGS + q as u64 * RING_SIZE
}

const fn avail(q: u32) -> u64 {
    ring(q) + 0x1000
}

const fn used(q: u32) -> u64 {
    ring(q) + 0x2000
}

/// The descriptors of buffers; either each is an element, or all of them are
/// one element.
fn descriptors(buffers: &[Buffer], chain: bool) -> Vec<u8> {
    let mut table = Vec::new();
    for (i, &(addr, len, write)) in buffers.iter().enumerate() {
        let next = chain && i + 1 < buffers.len();
        table.extend(addr.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend((u16::from(next) | u16::from(write) << 1).to_le_bytes());
        table.extend((i as u16 + 1).to_le_bytes());
    }
    table
}

impl Driver {
    /// Start QEMU with a microvm of 512 MiB, and initialize the balloon.
    /// `memory` has options for the guest's memory.
    pub fn start(binary: &Path, memory: &[&str], device: &str) -> Result<Self> {
        let mut args: Vec<String> = [
            "-machine",
            "microvm",
            "-m",
            "512M",
            "-global",
            "virtio-mmio.force-legacy=false",
            // With it, QEMU would process the commands of several notifications
            // before the device gets one notification for all of them.
            "-global",
            "virtio-mmio.ioeventfd=off",
            "-device",
        ]
        .map(str::to_owned)
        .to_vec();
        args.push(format!("virtio-balloon-device,id=balloon{device}"));
        args.extend(memory.iter().map(|&arg| arg.to_owned()));
        let mut driver = Self {
            qemu: Qemu::start(binary, &args)?,
            base: 0,
            avail_idx: [0; 4],
        };
        driver.base = find_balloon(&mut driver.qemu)?;
        driver.init()?;
        Ok(driver)
    }

    /// Send qtest commands, and return the last answer.
    fn run(&mut self, script: &str) -> Result<String> {
        self.qemu.send(script)?;
        let mut last = String::new();
        for line in script.lines() {
            last = self.qemu.reply()?;
            ensure!(last.starts_with("OK"), "{line:.80}: {last}");
        }
        Ok(last)
    }

    fn set(&mut self, register: u64, value: u64) -> Result<()> {
        let addr = self.base + register;
        self.run(&format!("writel {addr:#x} {value:#x}\n"))?;
        Ok(())
    }

    /// Accept only free page reporting and `VIRTIO_BALLOON_F_MUST_TELL_HOST`,
    /// if they are offered, and set up all queues.
    pub fn init(&mut self) -> Result<()> {
        self.avail_idx = [0; 4];
        for status in [0, 1, 3] {
            self.set(reg::STATUS, status)?;
        }
        for (sel, features) in [(0, 1 << 5 | 1), (1, 1)] {
            self.set(reg::DRIVER_FEATURES_SEL, sel)?;
            self.set(reg::DRIVER_FEATURES, features)?;
        }
        self.set(reg::STATUS, 11)?;
        for q in 0..4 {
            let size = if q == REPORTING { REPORTS } else { ELEMENTS };
            self.run(&format!("memset {:#x} {RING_SIZE:#x} 0\n", ring(q)))?;
            self.set(reg::QUEUE_SEL, q.into())?;
            self.set(reg::QUEUE_NUM, size as u64)?;
            for (register, addr) in [
                (reg::QUEUE_DESC, ring(q)),
                (reg::QUEUE_AVAIL, avail(q)),
                (reg::QUEUE_USED, used(q)),
            ] {
                self.set(register, addr)?;
                self.set(register + 4, 0)?;
            }
            self.set(reg::QUEUE_READY, 1)?;
        }
        self.set(reg::STATUS, 15)
    }

    pub fn write(&mut self, addr: u64, data: &[u8]) -> Result<()> {
        for (i, chunk) in data.chunks(1 << 20).enumerate() {
            let command = write_command(addr + ((i as u64) << 20), chunk);
            self.run(&(command + "\n"))?;
        }
        Ok(())
    }

    /// Write to all pages of the region.
    pub fn touch(&mut self) -> Result<()> {
        self.touch_at(REGION)
    }

    /// Write to as much memory as the region has, at another address.
    pub fn touch_at(&mut self, addr: u64) -> Result<()> {
        for offset in (0..REGION_SIZE).step_by(64 << 20) {
            self.fill(addr + offset, 64 << 20)?;
        }
        Ok(())
    }

    /// Write to memory of any size.
    pub fn fill(&mut self, addr: u64, len: u64) -> Result<()> {
        self.run(&format!("memset {addr:#x} {len:#x} 0x5a\n"))?;
        Ok(())
    }

    /// Fill the descriptors of a queue; either each is an element, or all of
    /// them are one element.
    pub fn prepare(&mut self, q: u32, buffers: &[Buffer], chain: bool) -> Result<()> {
        let heads: Vec<u8> = (0..buffers.len() as u16)
            .flat_map(|i| (if chain { 0 } else { i }).to_le_bytes())
            .collect();
        self.write(ring(q), &descriptors(buffers, chain))?;
        self.write(avail(q) + 4, &heads)
    }

    /// Write the PFNs, which are relative to the region, into buffers.
    pub fn prepare_pfns(&mut self, pfns: &[u32]) -> Result<()> {
        let base = (REGION / PAGE) as u32;
        let data: Vec<u8> = pfns
            .iter()
            .flat_map(|pfn| (base + pfn).to_le_bytes())
            .collect();
        self.write(DATA, &data)?;
        let buffers: Vec<Buffer> = (0..pfns.len().div_ceil(ELEMENT))
            .map(|i| {
                let len = ELEMENT.min(pfns.len() - i * ELEMENT);
                (DATA + (i * ELEMENT * 4) as u64, len as u32 * 4, false)
            })
            .collect();
        self.prepare(INFLATE, &buffers, false)?;
        self.prepare(DEFLATE, &buffers, false)
    }

    /// Make `per_kick` elements available and notify the device, `kicks` times,
    /// and wait until all elements are used.  If `per_kick` is 0, this only
    /// measures the cost of the notifications.
    fn send(&mut self, q: u32, kicks: usize, per_kick: usize) -> Result<Duration> {
        let notify = self.base + reg::QUEUE_NOTIFY;
        let mut script = String::new();
        for _ in 0..kicks {
            let i = &mut self.avail_idx[q as usize];
            *i = i.wrapping_add(per_kick as u16);
            writeln!(script, "writew {:#x} {i:#x}", avail(q) + 2)?;
            writeln!(script, "writel {notify:#x} {q:#x}")?;
        }
        let target = u64::from(self.avail_idx[q as usize]);
        let poll = format!("readw {:#x}", used(q) + 2);

        let start = Instant::now();
        self.run(&script)?;
        while self.qemu.query(&poll)? != target {
            ensure!(
                start.elapsed() < Duration::from_secs(300),
                "device is stuck"
            );
        }
        Ok(start.elapsed())
    }

    /// Measure the time in nanoseconds to send `elements` elements: with one
    /// notification for all, or with one for each.  The time that the qtest
    /// protocol takes is subtracted.
    pub fn measure(&mut self, q: u32, elements: usize, one_kick: bool) -> Result<f64> {
        let (kicks, per_kick) = if one_kick {
            (1, elements)
        } else {
            (elements, 1)
        };
        // The first time takes longer than the others
        self.send(q, kicks, 0)?;
        let idle = self.send(q, kicks, 0)?;
        let busy = self.send(q, kicks, per_kick)?;
        Ok(busy.as_nanos() as f64 - idle.as_nanos() as f64)
    }

    /// Replace the descriptors, make all elements available and notify the
    /// device, once for each of the rounds, and wait until all elements are
    /// used.  If not `available`, this only measures the cost of the commands.
    ///
    /// All commands are sent at once, because waking up QEMU for each round
    /// takes longer than the device takes, and not always equally long.
    fn send_rounds(
        &mut self,
        q: u32,
        rounds: &[Vec<Buffer>],
        chain: bool,
        available: bool,
    ) -> Result<Duration> {
        let notify = self.base + reg::QUEUE_NOTIFY;
        let poll = format!("readw {:#x}", used(q) + 2);
        let mut script = String::new();
        let mut targets = Vec::new();
        for buffers in rounds {
            let elements = if chain { 1 } else { buffers.len() };
            let i = &mut self.avail_idx[q as usize];
            if available {
                *i = i.wrapping_add(elements as u16);
            }
            targets.push(u64::from(*i));
            let table = descriptors(buffers, chain);
            writeln!(script, "{}", write_command(ring(q), &table))?;
            writeln!(script, "writew {:#x} {i:#x}", avail(q) + 2)?;
            writeln!(script, "writel {notify:#x} {q:#x}")?;
            writeln!(script, "{poll}")?;
        }

        let start = Instant::now();
        self.qemu.send(&script)?;
        let mut is_used = true;
        for target in targets {
            // The descriptors of the previous round were replaced since then
            ensure!(is_used, "elements were not used before the next round");
            for _ in 0..3 {
                let reply = self.qemu.reply()?;
                ensure!(reply.starts_with("OK"), "{reply}");
            }
            is_used = value(&self.qemu.reply()?)? == target;
        }
        let target = u64::from(self.avail_idx[q as usize]);
        while !is_used {
            ensure!(
                start.elapsed() < Duration::from_secs(300),
                "device is stuck"
            );
            is_used = self.qemu.query(&poll)? == target;
        }
        Ok(start.elapsed())
    }

    /// Measure the time in nanoseconds to send the buffers of each round with
    /// one notification.  A round must take no more than a turn of the device,
    /// except for the last one.  The time that the qtest protocol takes is
    /// subtracted.
    pub fn measure_rounds(&mut self, q: u32, rounds: &[Vec<Buffer>], chain: bool) -> Result<f64> {
        if let Some(first) = rounds.first() {
            // This also writes the available ring, which is the same for all
            self.prepare(q, first, chain)?;
        }
        // The first time takes longer than the others
        self.send_rounds(q, rounds, chain, false)?;
        let idle = self.send_rounds(q, rounds, chain, false)?;
        let busy = self.send_rounds(q, rounds, chain, true)?;
        Ok(busy.as_nanos() as f64 - idle.as_nanos() as f64)
    }

    /// Send one element, without waiting for it to be used.
    pub fn kick(&mut self, q: u32) -> Result<()> {
        let i = &mut self.avail_idx[q as usize];
        *i = i.wrapping_add(1);
        let script = format!(
            "writew {:#x} {i:#x}\nwritel {:#x} {q:#x}\n",
            avail(q) + 2,
            self.base + reg::QUEUE_NOTIFY
        );
        self.qemu.send(&script)
    }

    /// Wait for the answers to [`kick`](Self::kick).
    pub fn kicked(&mut self) -> Result<()> {
        self.qemu.reply()?;
        self.qemu.reply()?;
        Ok(())
    }
}
