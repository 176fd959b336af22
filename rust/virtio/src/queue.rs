// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for virtqueues

use std::{mem::size_of, ptr::NonNull};

use crate::{bindings, device::VirtIODevice, element::VirtQueueElement};

/// A queue of a virtio device.
#[derive(Clone, Copy, Debug)]
pub struct VirtQueue<'a> {
    vdev: &'a VirtIODevice,
    vq: NonNull<bindings::VirtQueue>,
}

impl<'a> VirtQueue<'a> {
    /// # Safety
    ///
    /// `vq` must be a queue of `vdev`.
    pub(crate) const unsafe fn new(
        vdev: &'a VirtIODevice,
        vq: NonNull<bindings::VirtQueue>,
    ) -> Self {
        Self { vdev, vq }
    }

    /// Index of the queue in the device
    pub fn index(&self) -> u16 {
        // SAFETY: the queue is valid as long as the device is
        unsafe { bindings::virtio_get_queue_index(self.vq.as_ptr()) }
    }

    /// The number of descriptors that the queue has room for, as configured by
    /// the driver.  That many elements can be in flight, with indirect
    /// descriptors or a descriptor each.
    pub fn size(&self) -> usize {
        // SAFETY: the queue is valid as long as the device is
        let size =
            unsafe { bindings::virtio_queue_get_num(self.vdev.as_mut_ptr(), self.index().into()) };
        usize::try_from(size).unwrap_or(0)
    }

    /// Take the next element that the driver has made available; `None` if
    /// there is none, or if the device is broken.
    ///
    /// The element refers to the device; a device that stores it has to give
    /// it up on unrealize and reset.
    pub fn pop(&self) -> Option<VirtQueueElement> {
        assert!(bql::is_locked());
        // SAFETY: the queue is valid.  The size is the one of the struct that
        // VirtQueueElement wraps.
        let elem = unsafe {
            bindings::virtqueue_pop(self.vq.as_ptr(), size_of::<bindings::VirtQueueElement>())
        };
        let elem = NonNull::new(elem.cast::<bindings::VirtQueueElement>())?;

        // SAFETY: virtqueue_pop() returns a new element of the queue
        unsafe { Some(VirtQueueElement::new(elem, self.vq, self.vdev)) }
    }

    /// Pretend that the last `count` elements were not popped.  This is for
    /// elements that the device has lost track of, because it was migrated;
    /// otherwise use [`VirtQueueElement::unpop`].  Returns false if fewer
    /// elements are in flight.
    pub fn rewind(&self, count: u32) -> bool {
        assert!(bql::is_locked());
        // SAFETY: the queue is valid
        unsafe { bindings::virtqueue_rewind(self.vq.as_ptr(), count) }
    }

    /// Interrupt the driver, unless it has asked not to be, because elements
    /// were pushed to the queue.
    pub fn notify(&self) {
        assert!(bql::is_locked());
        // SAFETY: the queue belongs to the device
        unsafe { bindings::virtio_notify(self.vdev.as_mut_ptr(), self.vq.as_ptr()) }
    }
}
