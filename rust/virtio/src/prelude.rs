// SPDX-License-Identifier: GPL-2.0-or-later

//! Essential types and traits intended for blanket imports.

pub use crate::bh::BottomHalf;

pub use crate::class::VirtioDeviceClassExt;
pub use crate::class::VirtioDeviceImpl;
pub use crate::class::VirtioRealize;

pub use crate::device::VirtIODevice;
pub use crate::device::VirtioDeviceClass;
pub use crate::device::VirtioDeviceMethods;

pub use crate::element::InBuffer;
pub use crate::element::VirtQueueElement;
pub use crate::queue::VirtQueue;
pub use crate::reader::OutReader;
pub use crate::writer::InWriter;

pub use crate::virtio_device_type;
