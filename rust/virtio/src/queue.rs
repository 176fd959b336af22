// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for virtqueues

use std::{mem::size_of, ptr::NonNull};

use crate::{bindings, device::VirtIODevice, element::VirtQueueElement, generation};

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
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_get_queue_index")]
    pub fn index(&self) -> u16 {
        assert!(bql::is_locked());
        // SAFETY: the memory of the queue is valid as long as the device is,
        // which is borrowed
        unsafe { bindings::virtio_get_queue_index(self.vq.as_ptr()) }
    }

    /// The number of descriptors that the queue has room for, as configured by
    /// the driver; 0 if the device is not realized any more.  That many
    /// elements can be in flight, with indirect descriptors or a descriptor
    /// each.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_queue_get_num")]
    pub fn size(&self) -> usize {
        let index = self.index();
        // SAFETY: the queue is one of the device.  Its size is modified under
        // the BQL, and index() has checked that it is taken.
        let size = unsafe { bindings::virtio_queue_get_num(self.vdev.as_mut_ptr(), index.into()) };
        usize::try_from(size).unwrap_or(0)
    }

    /// Take the next element that the driver has made available; `None` if
    /// there is none, if the device is broken, or not realized any more.
    ///
    /// The element refers to the device; a device that stores it has to give
    /// it up on unrealize and reset.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_pop")]
    pub fn pop(&self) -> Option<VirtQueueElement> {
        let generation = generation::current(self.vq)?;
        // SAFETY: the queue was not removed, because it has a generation; which
        // is only known to those with the BQL.  The size is the one of the
        // struct that VirtQueueElement wraps.
        let elem = unsafe {
            bindings::virtqueue_pop(self.vq.as_ptr(), size_of::<bindings::VirtQueueElement>())
        };
        let elem = NonNull::new(elem.cast::<bindings::VirtQueueElement>())?;

        // SAFETY: virtqueue_pop() returns a new element of the queue, which
        // the caller has to free
        unsafe { Some(VirtQueueElement::new(elem, self.vq, generation, self.vdev)) }
    }

    /// Pretend that the last `count` elements were not popped.  This is for
    /// elements that the device has lost track of, because it was migrated;
    /// otherwise use [`VirtQueueElement::unpop`].  Returns false if fewer
    /// elements are in flight, or if the device is not realized any more.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_rewind")]
    pub fn rewind(&self, count: u32) -> bool {
        // SAFETY: the queue was not removed, because it has a generation.  If
        // the device does have one of the elements, the count of those in
        // flight becomes wrong; which C code checks, but does not rely on.
        generation::current(self.vq).is_some()
            && unsafe { bindings::virtqueue_rewind(self.vq.as_ptr(), count) }
    }

    /// Interrupt the driver, unless it has asked not to be, because elements
    /// were pushed to the queue.  No effect if the device is not realized any
    /// more.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_notify")]
    pub fn notify(&self) {
        if generation::current(self.vq).is_some() {
            // SAFETY: the queue belongs to the device, and was not removed; so
            // the device is still plugged into the transport that will be used
            unsafe { bindings::virtio_notify(self.vdev.as_mut_ptr(), self.vq.as_ptr()) }
        }
    }
}
