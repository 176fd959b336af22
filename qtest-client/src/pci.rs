// SPDX-License-Identifier: GPL-2.0-or-later

//! virtio over PCI (virtio 1.3, section 4.1), on the machines of a PC
//!
//! There is no firmware, so the driver also assigns the addresses of the
//! regions.

use anyhow::{bail, ensure, Result};

use crate::Qemu;

/// Offsets in the common configuration structure
pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub const DEVICE_FEATURE: u64 = 0x04;
pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub const DRIVER_FEATURE: u64 = 0x0c;
pub const NUM_QUEUES: u64 = 0x12;
pub const DEVICE_STATUS: u64 = 0x14;
pub const CONFIG_GENERATION: u64 = 0x15;
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_SIZE: u64 = 0x18;
pub const QUEUE_ENABLE: u64 = 0x1c;
pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
pub const QUEUE_DESC: u64 = 0x20;
pub const QUEUE_DRIVER: u64 = 0x28;
pub const QUEUE_DEVICE: u64 = 0x30;
pub const QUEUE_RESET: u64 = 0x3a;

const CONFIG_ADDRESS: u32 = 0xcf8;
const CONFIG_DATA: u32 = 0xcfc;

const VENDOR: u32 = 0x1af4;
/// Device IDs of the memory balloon: transitional, and modern
const BALLOONS: [u32; 2] = [0x1002, 0x1045];

const REG_COMMAND: u32 = 0x04;
const REG_BARS: u32 = 0x10;
const NUM_BARS: usize = 6;
const REG_CAPABILITIES: u32 = 0x34;
/// Memory space, I/O space and bus master bits of the command register
const COMMAND: u32 = 7;
const CAP_VENDOR: u32 = 9;
/// Distance between the addresses of two regions
const BAR_DISTANCE: u32 = 0x10_0000;
/// Address of the first memory region, above the RAM of a small machine
const MEMORY: u32 = 0xe000_0000;
const PORTS: u32 = 0xc000;
const PORTS_DISTANCE: u32 = 0x100;

/// The types of the structures that vendor-specific capabilities locate
const CAP_COMMON: u32 = 1;
const CAP_NOTIFY: u32 = 2;
const CAP_ISR: u32 = 3;
const CAP_DEVICE: u32 = 4;

/// A device, and the addresses of its structures
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pci {
    pub(crate) slot: u32,
    /// The values of the base address registers; 0 for regions that do not
    /// exist
    pub(crate) bars: [u32; NUM_BARS],
    pub common: u64,
    pub isr: u64,
    pub device: u64,
    pub notify: u64,
    pub notify_multiplier: u64,
}

fn select(slot: u32, reg: u32) -> String {
    let address = 1 << 31 | slot << 11 | reg;
    format!("outl {CONFIG_ADDRESS:#x} {address:#x}\n")
}

fn read(qemu: &mut Qemu, slot: u32, reg: u32) -> Result<u32> {
    qemu.send(&select(slot, reg & !3))?;
    qemu.reply()?;
    let value = qemu.query(&format!("inl {CONFIG_DATA:#x}"))? as u32;
    Ok(value >> (8 * (reg & 3)))
}

fn write(qemu: &mut Qemu, slot: u32, reg: u32, value: u32) -> Result<()> {
    qemu.send(&write_commands(slot, reg, value))?;
    qemu.reply()?;
    qemu.reply()?;
    Ok(())
}

fn write_commands(slot: u32, reg: u32, value: u32) -> String {
    select(slot, reg) + &format!("outl {CONFIG_DATA:#x} {value:#x}\n")
}

const fn bar_register(i: usize) -> u32 {
    REG_BARS + 4 * i as u32
}

impl Pci {
    /// Find the balloon on the first bus, and set it up.
    ///
    /// # Errors
    ///
    /// Fails if there is no balloon, or if it lacks the expected structures.
    pub fn find_balloon(qemu: &mut Qemu) -> Result<Self> {
        for slot in 0..32 {
            let id = read(qemu, slot, 0)?;
            if id & 0xffff == VENDOR && BALLOONS.contains(&(id >> 16)) {
                let mut pci = Self {
                    slot,
                    ..Self::default()
                };
                pci.find_bars(qemu)?;
                pci.find_structures(qemu)?;
                for line in pci.setup_commands().lines() {
                    qemu.send(&format!("{line}\n"))?;
                    qemu.reply()?;
                }
                return Ok(pci);
            }
        }
        bail!("no balloon found")
    }

    /// Assign addresses to the regions.
    fn find_bars(&mut self, qemu: &mut Qemu) -> Result<()> {
        let mut i = 0;
        while i < NUM_BARS {
            write(qemu, self.slot, bar_register(i), u32::MAX)?;
            let bits = read(qemu, self.slot, bar_register(i))?;
            let (mask, n) = (if bits & 1 != 0 { !3 } else { !15 }, i as u32);
            let size = (bits & mask).wrapping_neg();
            if bits & 1 != 0 {
                ensure!(size & 0xffff <= PORTS_DISTANCE, "region {i}: too large");
                self.bars[i] = PORTS + n * PORTS_DISTANCE;
            } else if bits != 0 {
                ensure!(size <= BAR_DISTANCE, "region {i}: too large");
                self.bars[i] = MEMORY + n * BAR_DISTANCE;
            }
            // A 64-bit region has two registers; the upper half is 0.
            i += if bits & 7 == 4 { 2 } else { 1 };
        }
        Ok(())
    }

    fn find_structures(&mut self, qemu: &mut Qemu) -> Result<()> {
        let mut at = read(qemu, self.slot, REG_CAPABILITIES)? & 0xfc;
        while at != 0 {
            let head = read(qemu, self.slot, at)?;
            if head & 0xff == CAP_VENDOR {
                let bar = read(qemu, self.slot, at + 4)? & 0xff;
                let offset = read(qemu, self.slot, at + 8)?;
                let base = self.bars.get(bar as usize).copied().unwrap_or(0);
                let addr = u64::from(base) + u64::from(offset);
                match head >> 24 {
                    CAP_COMMON => self.common = addr,
                    CAP_NOTIFY => {
                        self.notify = addr;
                        self.notify_multiplier = read(qemu, self.slot, at + 16)?.into();
                    }
                    CAP_ISR => self.isr = addr,
                    CAP_DEVICE => self.device = addr,
                    _ => {}
                }
            }
            at = head >> 8 & 0xfc;
        }
        for addr in [self.common, self.isr, self.device, self.notify] {
            ensure!(addr >= MEMORY.into(), "a structure is missing: {self:x?}");
        }
        Ok(())
    }

    /// The commands that set the device up again, after a reset of the machine
    pub fn setup_commands(&self) -> String {
        let mut text = String::new();
        for (i, value) in self.bars.iter().enumerate() {
            if *value != 0 {
                text += &write_commands(self.slot, bar_register(i), *value);
            }
        }
        text + &write_commands(self.slot, REG_COMMAND, COMMAND)
    }
}
