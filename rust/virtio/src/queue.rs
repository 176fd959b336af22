// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for virtqueues

use std::{mem::size_of, ptr::NonNull};

use qom::prelude::*;

use crate::{
    bindings,
    device::VirtIODevice,
    element::{generation, VirtQueueElement},
};

/// A queue of a virtio device, until it is reset or removed.  After that, the
/// queue appears to be empty, and notifying the driver has no effect.
#[derive(Clone, Copy, Debug)]
pub struct VirtQueue<'a> {
    vdev: &'a VirtIODevice,
    vq: NonNull<bindings::VirtQueue>,
    generation: u64,
}

impl<'a> VirtQueue<'a> {
    /// # Safety
    ///
    /// `vq` must be a queue of `vdev`.
    pub(crate) unsafe fn new(vdev: &'a VirtIODevice, vq: NonNull<bindings::VirtQueue>) -> Self {
        // SAFETY: the memory of the queue is valid as long as the device is,
        // which is borrowed
        let generation = unsafe { generation(vq) };
        Self {
            vdev,
            vq,
            generation,
        }
    }

    /// The queue of a device with the index that
    /// [`VirtioRealize::add_queue`](crate::VirtioRealize::add_queue) has
    /// returned; `None` if the device is not realized (anymore).
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_get_queue")]
    pub fn of<T: IsA<VirtIODevice>>(dev: &'a T, index: u16) -> Option<Self> {
        assert!(bql::is_locked());
        let vdev = dev.upcast::<VirtIODevice>();

        // SAFETY: virtio_get_queue() computes the address of an element of
        // vdev->vq, which exists from virtio_init() until the device is
        // finalized.  Queues have a nonzero size until they are removed, and
        // are consecutive, so the index is in bounds.
        unsafe {
            let ptr = vdev.as_mut_ptr();
            if (*ptr).vq.is_null() || i32::from(index) >= bindings::virtio_get_num_queues(ptr) {
                return None;
            }
            let vq = bindings::virtio_get_queue(ptr, i32::from(index));
            Some(Self::new(vdev, NonNull::new(vq)?))
        }
    }

    /// Whether the queue has been neither reset nor removed since `self` was
    /// made.  Almost everything that the device calls can cause a reset,
    /// because the driver chooses the addresses of the rings and the buffers.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    pub fn is_current(&self) -> bool {
        // SAFETY: see new()
        unsafe { generation(self.vq) == self.generation }
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
    /// the driver; 0 if the device is not realized anymore.  Up to this many
    /// elements can be in flight, as an element takes at least one descriptor
    /// of the queue.
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

    /// Tell the driver whether it has to notify the device of new elements.
    /// Look at the queue after this, as there may be some already.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_queue_set_notification")]
    pub fn set_notification(&self, enable: bool) {
        if self.is_current() {
            // SAFETY: the queue was not removed, since it existed when `self`
            // was made, and is_current() has checked that the BQL is taken
            unsafe {
                bindings::virtio_queue_set_notification(self.vq.as_ptr(), enable.into());
            }
        }
    }

    /// Pop the next element that the driver has made available; `None` if there
    /// is none, or if the device is broken or not realized anymore.
    ///
    /// The element refers to the device.  A device that stores the element has
    /// to give it up on unrealize and reset.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_pop")]
    pub fn pop(&self) -> Option<VirtQueueElement> {
        if !self.is_current() {
            return None;
        }
        // SAFETY: the queue was not removed, since it existed when `self` was
        // made, and is_current() has checked that the BQL is taken.  The size
        // is the one of the struct that VirtQueueElement wraps.
        let elem = unsafe {
            bindings::virtqueue_pop(self.vq.as_ptr(), size_of::<bindings::VirtQueueElement>())
        };
        let elem = NonNull::new(elem.cast::<bindings::VirtQueueElement>())?;

        // SAFETY: virtqueue_pop() returns a new element of the queue, which
        // the caller has to free.  If the queue is reset while it runs, it is
        // an element that the queue does not know.
        unsafe {
            Some(VirtQueueElement::new(
                elem,
                self.vq,
                self.generation,
                self.vdev,
            ))
        }
    }

    /// Undo popping the last `count` elements.  This is for elements that the
    /// device has lost by migration; otherwise use
    /// [`VirtQueueElement::unpop`].  Returns false if fewer elements are in
    /// flight, or if the device is not realized anymore.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_rewind")]
    pub fn rewind(&self, count: u32) -> bool {
        // SAFETY: the queue was not removed.  If the device still owns one of
        // these elements, the count of elements in flight becomes wrong, which
        // C code checks but does not rely on.
        self.is_current() && unsafe { bindings::virtqueue_rewind(self.vq.as_ptr(), count) }
    }

    /// Interrupt the driver because elements were pushed to the queue, unless
    /// it does not want to be interrupted.  This has no effect if the device is
    /// not realized anymore.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtio_notify")]
    pub fn notify(&self) {
        if self.is_current() {
            // SAFETY: the queue belongs to the device, and was not removed; so
            // the device is still plugged into the transport that will be used
            unsafe { bindings::virtio_notify(self.vdev.as_mut_ptr(), self.vq.as_ptr()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::tests::Queue;

    #[test]
    fn test_stale() {
        let queue = Queue::new();
        // SAFETY: the queue is one of the device
        let vq = unsafe { VirtQueue::new(queue.vdev, queue.vq) };
        assert!(vq.is_current());
        queue.forget();
        assert!(!vq.is_current());
        // None of these functions calls C code
        assert!(vq.pop().is_none());
        assert!(!vq.rewind(1));
        vq.notify();
    }
}
