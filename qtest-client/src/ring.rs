// SPDX-License-Identifier: GPL-2.0-or-later

//! The driver's side of a virtqueue, split (virtio 1.3, section 2.7) or packed
//! (section 2.8)
//!
//! A driver that tests a device also has to make mistakes, and must not wait
//! for the device.  Therefore this code does not track which elements the
//! device has returned: descriptors are used in the order of the ring, and used
//! again when it wraps around.

use crate::write_command;

/// Flags of descriptors
pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;
/// Flags of packed descriptors; their meaning depends on the wrap counters
pub const DESC_AVAIL: u16 = 1 << 7;
pub const DESC_USED: u16 = 1 << 15;

/// Size of a descriptor
pub const DESC_SIZE: u64 = 16;
/// In a packed ring, interrupts are only wanted for a certain descriptor.
const EVENT_DESC: u16 = 2;

/// Access to guest memory, for the driver's writes
pub trait Memory {
    fn write(&mut self, addr: u64, data: &[u8]);
}

/// Lines of qtest commands
impl Memory for String {
    fn write(&mut self, addr: u64, data: &[u8]) {
        *self += &write_command(addr, data);
        self.push('\n');
    }
}

/// The layout of the ring
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Split,
    Packed,
}

/// A buffer of an element
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    /// [`DESC_WRITE`], or [`DESC_INDIRECT`] for a table of buffers
    pub flags: u16,
}

/// Mistakes of a driver
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The last descriptor is chained to the first; in a packed ring, to the
    /// next descriptor of the ring
    Loop,
    /// The last descriptor is chained to one that does not exist; in a packed
    /// ring, to the next descriptor of the ring
    BadNext,
    /// The index of the head does not exist.  A packed ring has no such index;
    /// there, it is an unusual buffer ID.
    BadHead,
    /// More elements are made available than there are; in a packed ring, a
    /// descriptor is left out
    Jump,
}

fn descriptor(format: Format, buffer: Buffer, flags: u16, next_or_id: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
    let (third, fourth) = match format {
        Format::Split => (flags, next_or_id),
        Format::Packed => (next_or_id, flags),
    };
    bytes[12..14].copy_from_slice(&third.to_le_bytes());
    bytes[14..].copy_from_slice(&fourth.to_le_bytes());
    bytes
}

/// An indirect table.  In a split ring, `DESC_NEXT` is added where needed;
/// packed tables do not use it.
pub fn table(format: Format, buffers: &[Buffer]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, buffer) in buffers.iter().enumerate() {
        let (mut flags, mut next) = (buffer.flags, 0);
        if format == Format::Split && i + 1 < buffers.len() {
            flags |= DESC_NEXT;
            next = i as u16 + 1;
        }
        bytes.extend(descriptor(format, *buffer, flags, next));
    }
    bytes
}

/// The driver's view of a virtqueue
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    pub format: Format,
    pub size: u32,
    /// Address of the descriptors
    pub desc: u64,
    /// Address of the available ring, or of the driver's event suppression
    /// structure
    pub avail: u64,
    /// Address of the used ring, or of the device's event suppression structure
    pub used: u64,
    /// How many elements were made available; only for split rings
    avail_idx: u16,
    /// Index of the next descriptor
    next: u16,
    /// The driver's wrap counter; only for packed rings
    wrap: bool,
}

impl Ring {
    /// A ring at `desc`, with its other areas behind it, as with the legacy
    /// interface and an alignment of 64
    pub fn new(format: Format, size: u32, desc: u64) -> Self {
        let avail = desc + u64::from(size) * DESC_SIZE;
        let used = match format {
            Format::Split => (avail + 4 + 2 * u64::from(size)).next_multiple_of(64),
            Format::Packed => avail + 4,
        };
        Self {
            format,
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            next: 0,
            wrap: true,
        }
    }

    /// The first address after the area that the device writes
    pub fn end(&self) -> u64 {
        self.used.saturating_add(match self.format {
            Format::Split => 6 + 8 * u64::from(self.size),
            Format::Packed => 4,
        })
    }

    /// The position of the next element, as in notifications with
    /// `VIRTIO_F_NOTIFICATION_DATA`
    pub fn position(&self) -> u16 {
        match self.format {
            Format::Split => self.avail_idx,
            Format::Packed => self.next | u16::from(self.wrap) << 15,
        }
    }

    /// The device or the queue was reset.
    pub fn restart(&mut self) {
        self.avail_idx = 0;
        self.next = 0;
        self.wrap = true;
    }

    /// Whether the device must still be at the start of the ring
    pub fn is_at_start(&self) -> bool {
        self.avail_idx == 0 && self.next == 0 && self.wrap
    }

    /// Continue where another ring was.  This is for a device that gets the
    /// addresses of another ring without a reset.  A packed ring must have the
    /// size of the other one.
    pub fn go_on_from(&mut self, other: &Self) {
        match self.format {
            Format::Split => self.avail_idx = other.avail_idx,
            Format::Packed => {
                self.next = other.next;
                self.wrap = other.wrap;
            }
        }
    }

    /// Initialize the areas that the device reads, for a ring without elements.
    pub fn write_position(&self, mem: &mut impl Memory) {
        if self.format == Format::Split {
            mem.write(self.avail, &0u16.to_le_bytes());
            mem.write(self.avail + 2, &self.avail_idx.to_le_bytes());
        }
    }

    /// Make an element available.
    pub fn add(&mut self, mem: &mut impl Memory, chain: &[Buffer], fault: Option<Fault>) {
        match self.format {
            Format::Split => self.add_split(mem, chain, fault),
            Format::Packed => self.add_packed(mem, chain, fault),
        }
    }

    fn add_split(&mut self, mem: &mut impl Memory, chain: &[Buffer], fault: Option<Fault>) {
        let size = self.size.max(1) as u16;
        let head = self.next % size;
        for (i, buffer) in chain.iter().enumerate() {
            let at = self.next % size;
            self.next = (at + 1) % size;
            let last = i + 1 == chain.len();
            let (flags, next) = match fault {
                _ if buffer.flags & DESC_INDIRECT != 0 => (0, self.next),
                _ if !last => (DESC_NEXT, self.next),
                Some(Fault::Loop) => (DESC_NEXT, head),
                Some(Fault::BadNext) => (DESC_NEXT, size),
                _ => (0, 0),
            };
            let bytes = descriptor(self.format, *buffer, buffer.flags | flags, next);
            mem.write(self.desc + u64::from(at) * DESC_SIZE, &bytes);
        }
        let head = if fault == Some(Fault::BadHead) {
            size
        } else {
            head
        };
        let entry = self.avail + 4 + u64::from(self.avail_idx % size) * 2;
        mem.write(entry, &head.to_le_bytes());
        let step = if fault == Some(Fault::Jump) {
            size + 2
        } else {
            1
        };
        self.avail_idx = self.avail_idx.wrapping_add(step);
        mem.write(self.avail + 2, &self.avail_idx.to_le_bytes());
    }

    fn advance(&mut self) {
        self.next += 1;
        if u32::from(self.next) >= self.size {
            self.next = 0;
            self.wrap = !self.wrap;
        }
    }

    fn add_packed(&mut self, mem: &mut impl Memory, chain: &[Buffer], fault: Option<Fault>) {
        let nothing = [Buffer {
            addr: 0,
            len: 0,
            flags: 0,
        }];
        // The driver cannot make an element available here without writing it.
        let chain = if chain.is_empty() { &nothing } else { chain };
        let id = match fault {
            Some(Fault::BadHead) => self.size as u16,
            _ => self.next,
        };
        let mut writes = Vec::new();
        for (i, buffer) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let mut flags = buffer.flags | if self.wrap { DESC_AVAIL } else { DESC_USED };
            if !last || matches!(fault, Some(Fault::Loop | Fault::BadNext)) {
                flags |= DESC_NEXT;
            }
            let addr = self.desc + u64::from(self.next) * DESC_SIZE;
            writes.push((addr, descriptor(self.format, *buffer, flags, id)));
            self.advance();
        }
        // Writing the first descriptor makes all of them available.
        for (addr, bytes) in writes.iter().rev() {
            mem.write(*addr, bytes);
        }
        if fault == Some(Fault::Jump) {
            self.advance();
        }
    }

    /// Set the flags that turn interrupts off or on.
    pub fn write_flags(&self, mem: &mut impl Memory, flags: u16) {
        let addr = match self.format {
            Format::Split => self.avail,
            Format::Packed => self.avail + 2,
        };
        mem.write(addr, &flags.to_le_bytes());
    }

    /// Request an interrupt when the device has used the element that is
    /// `distance` after the driver's position.
    pub fn write_event(&self, mem: &mut impl Memory, distance: u16) {
        match self.format {
            Format::Split => {
                let event = self.avail_idx.wrapping_add(distance);
                let addr = self.avail + 4 + 2 * u64::from(self.size);
                mem.write(addr, &event.to_le_bytes());
            }
            Format::Packed => {
                let to = u32::from(self.next) + u32::from(distance);
                let size = self.size.max(1);
                let wrap = self.wrap ^ (to / size % 2 == 1);
                let event = (to % size) as u16 | u16::from(wrap) << 15;
                mem.write(self.avail, &event.to_le_bytes());
                mem.write(self.avail + 2, &EVENT_DESC.to_le_bytes());
            }
        }
    }
}

/// How many times the device has written to a packed ring between two states of
/// it.  It writes once for each element; with `VIRTIO_F_IN_ORDER`, it may write
/// once for several elements.
pub fn packed_returns(old: &[u8], new: &[u8]) -> u64 {
    let is_used = |desc: &[u8]| {
        let flags = u16::from_le_bytes([desc[14], desc[15]]);
        // Writes that clear the ring are not from the device
        (flags & DESC_AVAIL == 0) == (flags & DESC_USED == 0) && desc.iter().any(|byte| *byte != 0)
    };
    old.chunks_exact(DESC_SIZE as usize)
        .zip(new.chunks_exact(DESC_SIZE as usize))
        .filter(|(old, new)| old != new && is_used(new))
        .count() as u64
}

#[cfg(test)]
mod tests;
