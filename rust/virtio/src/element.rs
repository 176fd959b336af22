// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for virtqueue elements

use std::{
    ffi::c_void,
    fmt,
    mem::ManuallyDrop,
    ptr::{self, NonNull},
};

use glib_sys::g_free;
use qom::prelude::*;
use system::prelude::*;

use crate::{
    bindings,
    device::{VirtIODevice, VirtioDeviceMethods},
    queue::VirtQueue,
    reader::OutReader,
};

/// A request of the driver: a chain of descriptors, mapped into QEMU.
///
/// The element leaves the device exactly once: either it is
/// [pushed](Self::push), which returns it to the driver; or the device acts as
/// if it had never been taken from the queue ([`unpop`](Self::unpop)); or it is
/// dropped, which releases the memory without telling the driver (and is right
/// when the queue is about to be reset).
///
/// An element can be passed to another thread, which can read the contents.
/// Returning it to the queue, or dropping it, needs the big QEMU lock.
pub struct VirtQueueElement {
    elem: NonNull<bindings::VirtQueueElement>,
    vq: NonNull<bindings::VirtQueue>,
    // keeps the memory of the VirtQueue alive, even after unrealize
    vdev: Owned<VirtIODevice>,
    big_endian: bool,
}

// SAFETY: all functions that modify the element or the queue check that the BQL
// is taken.  The rest reads the element's own fields, which do not change, and
// guest memory, of which any thread can make copies while it is mapped.
unsafe impl Send for VirtQueueElement {}
// SAFETY: see above
unsafe impl Sync for VirtQueueElement {}

/// A buffer into which the driver expects the device to write, or that it
/// wants to be reported or hinted.
#[derive(Clone, Copy, Debug)]
pub struct InBuffer<'a> {
    /// Guest-physical address (or IOVA, with an IOMMU), in bytes
    pub addr: u64,
    /// Where the buffer was mapped
    pub range: HostRange<'a>,
}

impl VirtQueueElement {
    /// # Safety
    ///
    /// `elem` must have been popped from `vq`, which must be a queue of `vdev`;
    /// the caller passes on its ownership.
    pub(crate) unsafe fn new(
        elem: NonNull<bindings::VirtQueueElement>,
        vq: NonNull<bindings::VirtQueue>,
        vdev: &VirtIODevice,
    ) -> Self {
        let big_endian = vdev.is_big_endian();
        Self {
            elem,
            vq,
            // SAFETY: the queue comes from a VirtioDeviceImpl, which according
            // to that trait's documentation is not embedded in another object
            vdev: unsafe { Owned::from(vdev) },
            big_endian,
        }
    }

    const fn raw(&self) -> &bindings::VirtQueueElement {
        // SAFETY: the element is owned, and not modified after virtqueue_pop()
        unsafe { self.elem.as_ref() }
    }

    /// The queue that the element comes from
    pub fn queue(&self) -> VirtQueue<'_> {
        // SAFETY: the queue belongs to the device, see new()
        unsafe { VirtQueue::new(&self.vdev, self.vq) }
    }

    /// Whether there is anything that the device can read
    pub fn has_out(&self) -> bool {
        self.raw().out_num != 0
    }

    /// Read what the driver has sent.  Each reader starts from the beginning.
    pub fn out_reader(&self) -> OutReader<'_> {
        let raw = self.raw();
        // SAFETY: virtqueue_pop() has mapped out_num buffers, which are unmapped
        // when the element is returned to the queue or dropped
        unsafe { OutReader::new(raw.out_sg, raw.out_num, self.big_endian) }
    }

    /// The buffers that the device may write, in the order of the descriptors
    pub fn in_buffers(&self) -> impl Iterator<Item = InBuffer<'_>> {
        let raw = self.raw();
        // SAFETY: the index is less than the number of buffers
        (0..raw.in_num as usize).map(|i| unsafe { self.in_buffer_unchecked(i) })
    }

    /// One of the [`in_buffers`](Self::in_buffers)
    pub fn in_buffer(&self, index: usize) -> Option<InBuffer<'_>> {
        // SAFETY: the index is less than the number of buffers
        (index < self.raw().in_num as usize).then(|| unsafe { self.in_buffer_unchecked(index) })
    }

    /// # Safety
    ///
    /// `index` must be less than the number of buffers that the device may
    /// write.
    const unsafe fn in_buffer_unchecked(&self, index: usize) -> InBuffer<'_> {
        let raw = self.raw();
        // SAFETY: virtqueue_pop() has allocated in_num elements in both arrays,
        // and has mapped the buffers; see out_reader()
        unsafe {
            let iov = *raw.in_sg.add(index);
            InBuffer {
                addr: *raw.in_addr.add(index),
                range: HostRange::new(iov.iov_base, iov.iov_len),
            }
        }
    }

    /// The number of buffers, for either direction
    pub fn buffers(&self) -> usize {
        // each is at most 1024
        (self.raw().out_num + self.raw().in_num) as usize
    }

    /// Return the element to the driver, after having written the first `len`
    /// bytes of its buffers.  The driver gets to know of it through
    /// [`VirtQueue::notify`].
    pub fn push(self, len: u32) {
        // SAFETY: the element was popped from the queue and not returned yet
        self.consume(|vq, elem| unsafe { bindings::virtqueue_push(vq, elem, len) });
    }

    /// Put the element back: it will be the next one to be popped.  To be used
    /// for the last element that was popped only.
    pub fn unpop(self) {
        // SAFETY: the element was popped from the queue and not returned yet
        self.consume(|vq, elem| unsafe { bindings::virtqueue_unpop(vq, elem, 0) });
    }

    fn consume(self, f: impl FnOnce(*mut bindings::VirtQueue, *const bindings::VirtQueueElement)) {
        assert!(bql::is_locked());

        let mut this = ManuallyDrop::new(self);
        f(this.vq.as_ptr(), this.elem.as_ptr());
        // SAFETY: neither field is used again, because `this` is never dropped;
        // the element was allocated by GLib
        unsafe {
            g_free(this.elem.as_ptr().cast::<c_void>());
            ptr::drop_in_place(&mut this.vdev);
        }
    }
}

impl Drop for VirtQueueElement {
    fn drop(&mut self) {
        assert!(bql::is_locked());
        // SAFETY: the element was popped from the queue and not returned yet,
        // else drop() would not be called
        unsafe {
            bindings::virtqueue_detach_element(self.vq.as_ptr(), self.elem.as_ptr(), 0);
            g_free(self.elem.as_ptr().cast::<c_void>());
        }
    }
}

impl fmt::Debug for VirtQueueElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let raw = self.raw();
        f.debug_struct("VirtQueueElement")
            .field("index", &raw.index)
            .field("out_num", &raw.out_num)
            .field("in_num", &raw.in_num)
            .finish_non_exhaustive()
    }
}
