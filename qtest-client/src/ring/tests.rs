// SPDX-License-Identifier: GPL-2.0-or-later

//! Tests the driver with a small model of a device

use super::*;
use crate::rng::Rng;

const DESC: u64 = 0x100;
const TABLE: u64 = 0x4000;

/// Guest memory
struct Ram(Vec<u8>);

impl Memory for Ram {
    fn write(&mut self, addr: u64, data: &[u8]) {
        self.0[addr as usize..][..data.len()].copy_from_slice(data);
    }
}

impl Ram {
    fn new() -> Self {
        Self(vec![0; 0x20000])
    }

    fn u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.0[addr as usize..][..2].try_into().unwrap())
    }

    fn buffer(&self, addr: u64, flags: u16) -> Buffer {
        let bytes = &self.0[addr as usize..][..12];
        Buffer {
            addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..].try_into().unwrap()),
            flags,
        }
    }
}

/// An element that the device has popped
#[derive(Debug)]
struct Element {
    id: u16,
    /// How many descriptors of the ring it uses
    descs: u16,
    buffers: Vec<Buffer>,
}

/// A device, with its own position in the ring
struct Device {
    ring: Ring,
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
}

impl Device {
    fn new(ring: Ring) -> Self {
        Self {
            ring,
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
        }
    }

    fn step(&self, position: u16, wrap: bool, n: u16) -> (u16, bool) {
        let to = position + n;
        let size = self.ring.size as u16;
        if to >= size {
            (to - size, !wrap)
        } else {
            (to, wrap)
        }
    }

    fn table(&self, ram: &Ram, table: Buffer) -> Vec<Buffer> {
        assert_eq!(table.len % 16, 0);
        let at = |i: u64| table.addr + i * DESC_SIZE;
        let n = u64::from(table.len) / DESC_SIZE;
        match self.ring.format {
            Format::Packed => (0..n)
                .map(|i| ram.buffer(at(i), ram.u16(at(i) + 14)))
                .collect(),
            Format::Split => {
                let mut list = Vec::new();
                let mut i = 0;
                loop {
                    let flags = ram.u16(at(i) + 12);
                    list.push(ram.buffer(at(i), flags & !DESC_NEXT));
                    if flags & DESC_NEXT == 0 {
                        return list;
                    }
                    i = ram.u16(at(i) + 14).into();
                    assert!(i < n);
                }
            }
        }
    }

    fn pop(&mut self, ram: &Ram) -> Option<Element> {
        let mut element = match self.ring.format {
            Format::Split => self.pop_split(ram)?,
            Format::Packed => self.pop_packed(ram)?,
        };
        if element.buffers[0].flags & DESC_INDIRECT != 0 {
            assert_eq!(element.buffers.len(), 1);
            element.buffers = self.table(ram, element.buffers[0]);
        }
        Some(element)
    }

    fn pop_split(&mut self, ram: &Ram) -> Option<Element> {
        let ring = self.ring;
        if ram.u16(ring.avail + 2) == self.avail {
            return None;
        }
        let entry = u64::from(self.avail) % u64::from(ring.size);
        let head = ram.u16(ring.avail + 4 + 2 * entry);
        self.avail = self.avail.wrapping_add(1);
        let (mut i, mut buffers) = (head, Vec::new());
        loop {
            let at = ring.desc + u64::from(i) * DESC_SIZE;
            let flags = ram.u16(at + 12);
            buffers.push(ram.buffer(at, flags & !DESC_NEXT));
            if flags & DESC_NEXT == 0 {
                break;
            }
            i = ram.u16(at + 14);
        }
        Some(Element {
            id: head,
            descs: buffers.len() as u16,
            buffers,
        })
    }

    fn pop_packed(&mut self, ram: &Ram) -> Option<Element> {
        let (mut buffers, mut id) = (Vec::new(), 0);
        loop {
            let at = self.ring.desc + u64::from(self.avail) * DESC_SIZE;
            let flags = ram.u16(at + 14);
            let avail = flags & DESC_AVAIL != 0;
            let used = flags & DESC_USED != 0;
            if avail != self.avail_wrap || used == self.avail_wrap {
                // The first descriptor makes all of them available
                assert!(buffers.is_empty(), "a part of a chain at {at:#x}");
                return None;
            }
            let other = DESC_NEXT | DESC_AVAIL | DESC_USED;
            buffers.push(ram.buffer(at, flags & !other));
            if buffers.len() > 1 {
                assert_eq!(id, ram.u16(at + 12), "all have the same");
            }
            id = ram.u16(at + 12);
            (self.avail, self.avail_wrap) = self.step(self.avail, self.avail_wrap, 1);
            if flags & DESC_NEXT == 0 {
                break;
            }
        }
        Some(Element {
            id,
            descs: buffers.len() as u16,
            buffers,
        })
    }

    fn push(&mut self, ram: &mut Ram, element: &Element) {
        assert_eq!(self.ring.format, Format::Packed);
        let at = self.ring.desc + u64::from(self.used) * DESC_SIZE;
        let flags = if self.used_wrap {
            DESC_AVAIL | DESC_USED
        } else {
            0
        };
        ram.write(at + 8, &[0; 4]);
        ram.write(at + 12, &element.id.to_le_bytes());
        ram.write(at + 14, &flags.to_le_bytes());
        (self.used, self.used_wrap) = self.step(self.used, self.used_wrap, element.descs);
    }
}

fn random_chain(rng: &mut Rng, most: u64) -> Vec<Buffer> {
    (0..rng.range(1, most))
        .map(|_| Buffer {
            addr: rng.next_u64(),
            len: rng.next_u64() as u32,
            flags: rng.pick(&[0, DESC_WRITE]),
        })
        .collect()
}

/// The device finds the elements that the driver has made available, after any
/// number of wraps and with any number of elements in flight.
#[test]
fn device_gets_all_elements() {
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        for format in [Format::Split, Format::Packed] {
            let size: u32 = rng.pick(&[1, 2, 3, 4, 8, 16, 33]);
            let size = if format == Format::Split {
                size.next_power_of_two()
            } else {
                size
            };
            let mut ram = Ram::new();
            let mut driver = Ring::new(format, size, DESC);
            assert!(driver.is_at_start());
            let mut device = Device::new(driver);
            for _ in 0..100 {
                let mut free = size as u16;
                let mut sent = Vec::new();
                while free > 0 && (sent.is_empty() || rng.percent(60)) {
                    let chain = random_chain(&mut rng, free.into());
                    if rng.percent(30) {
                        let place = TABLE + u64::from(free) * 0x400;
                        let bytes = table(format, &chain);
                        ram.write(place, &bytes);
                        let entry = Buffer {
                            addr: place,
                            len: bytes.len() as u32,
                            flags: DESC_INDIRECT,
                        };
                        driver.add(&mut ram, &[entry], None);
                        free -= 1;
                    } else {
                        driver.add(&mut ram, &chain, None);
                        free -= chain.len() as u16;
                    }
                    sent.push(chain);
                }
                let before = ram.0.clone();
                let mut elements = Vec::new();
                while let Some(element) = device.pop(&ram) {
                    elements.push(element);
                }
                let got: Vec<_> = elements.iter().map(|e| e.buffers.clone()).collect();
                assert_eq!(sent, got);
                if format == Format::Packed {
                    elements.iter().for_each(|e| device.push(&mut ram, e));
                    let area = DESC as usize..(DESC + u64::from(size) * DESC_SIZE) as usize;
                    let n = packed_returns(&before[area.clone()], &ram.0[area]);
                    assert_eq!(n, elements.len() as u64);
                    let position = device.avail | u16::from(device.avail_wrap) << 15;
                    assert_eq!(driver.position(), position);
                }
            }
        }
    }
}

#[test]
fn a_chain_becomes_available_with_its_first_descriptor() {
    struct Order(Vec<u64>);
    impl Memory for Order {
        fn write(&mut self, addr: u64, _: &[u8]) {
            self.0.push(addr);
        }
    }
    let mut ring = Ring::new(Format::Packed, 4, DESC);
    let buffer = Buffer {
        addr: 0,
        len: 1,
        flags: 0,
    };
    let mut order = Order(Vec::new());
    ring.add(&mut order, &[buffer; 3], None);
    assert_eq!(order.0, [DESC + 32, DESC + 16, DESC]);
}

#[test]
fn events() {
    let mut ram = Ram::new();
    let mut ring = Ring::new(Format::Packed, 3, DESC);
    ring.write_event(&mut ram, 2);
    assert_eq!(ram.u16(ring.avail), 0x8002);
    assert_eq!(ram.u16(ring.avail + 2), EVENT_DESC);
    ring.write_event(&mut ram, 4);
    assert_eq!(ram.u16(ring.avail), 0x0001);
    ring.write_event(&mut ram, 6);
    assert_eq!(ram.u16(ring.avail), 0x8000);
    ring.write_flags(&mut ram, 1);
    assert_eq!(ram.u16(ring.avail + 2), 1);

    let buffer = Buffer {
        addr: 0,
        len: 1,
        flags: 0,
    };
    let mut split = Ring::new(Format::Split, 4, DESC);
    split.add(&mut ram, &[buffer], None);
    split.write_event(&mut ram, 0xffff);
    assert_eq!(ram.u16(split.avail + 4 + 8), 0);
    split.write_flags(&mut ram, 1);
    assert_eq!(ram.u16(split.avail), 1);
    ring.restart();
    assert!(ring.is_at_start());
}

#[test]
fn mistakes() {
    let buffer = Buffer {
        addr: 0,
        len: 1,
        flags: 0,
    };
    let mut ram = Ram::new();
    let mut ring = Ring::new(Format::Split, 4, DESC);
    ring.add(&mut ram, &[buffer; 2], Some(Fault::Loop));
    assert_eq!(ram.u16(DESC + 16 + 12), DESC_NEXT);
    assert_eq!(ram.u16(DESC + 16 + 14), 0);
    ring.add(&mut ram, &[buffer], Some(Fault::BadNext));
    assert_eq!(ram.u16(DESC + 32 + 14), 4);
    ring.add(&mut ram, &[buffer], Some(Fault::BadHead));
    assert_eq!(ram.u16(ring.avail + 4 + 4), 4);
    ring.add(&mut ram, &[buffer], Some(Fault::Jump));
    assert_eq!(ring.position(), 3 + 6);
    assert_eq!(ram.u16(ring.avail + 2), 9);

    let mut packed = Ring::new(Format::Packed, 4, DESC);
    packed.add(&mut ram, &[buffer], Some(Fault::Loop));
    assert_eq!(ram.u16(DESC + 14), DESC_NEXT | DESC_AVAIL);
    packed.add(&mut ram, &[buffer], Some(Fault::BadHead));
    assert_eq!(ram.u16(DESC + 16 + 12), 4);
    packed.add(&mut ram, &[], Some(Fault::Jump));
    assert_eq!(packed.position(), 0);
}
