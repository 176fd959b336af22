// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for virtqueue elements

use std::{
    ffi::{c_uint, c_void},
    fmt,
    mem::ManuallyDrop,
    ptr::{self, NonNull},
};

use glib_sys::g_free;
use hwcore::prelude::*;
use qom::prelude::*;
use system::{bindings::address_space_memory, prelude::*};

use crate::{
    bindings,
    cursor::Cursor,
    device::{VirtIODevice, VirtioDeviceMethods},
    reader::OutReader,
    writer::InWriter,
};

/// A request of the driver: a chain of descriptors, mapped into QEMU.
///
/// The device gives up an element in one of three ways.  It
/// [pushes](Self::push) the element, which returns it to the driver; it [puts
/// it back](Self::unpop), as if it had never been popped; or it drops the
/// element, which releases the memory without telling the driver.  Dropping is
/// for elements of a queue that is about to be reset.
///
/// An element can be passed to another thread, which can read the contents.
/// The big QEMU lock is needed to return it to the queue, or to drop it.
///
/// The device has to give up all elements of a queue when the queue is reset or
/// removed.  An element that is kept longer is unknown to the queue: returning
/// it only releases the memory.
pub struct VirtQueueElement {
    elem: NonNull<bindings::VirtQueueElement>,
    vq: NonNull<bindings::VirtQueue>,
    /// The generation of the queue when the element was popped
    generation: u64,
    // keeps the memory of the VirtQueue alive, even after unrealize
    vdev: Owned<VirtIODevice>,
    big_endian: bool,
}

/// The generation of a queue, which changes when it is reset or removed
///
/// # Safety
///
/// The device that the queue belongs to must not have been finalized.
///
/// # Panics
///
/// Panics if the big QEMU lock is not taken.
pub unsafe fn generation(vq: NonNull<bindings::VirtQueue>) -> u64 {
    assert!(bql::is_locked());
    // SAFETY: the memory of a queue is freed when its device is finalized, so
    // the queue exists or was removed.  The counter is modified under the BQL.
    unsafe { bindings::virtio_queue_get_generation(vq.as_ptr()) }
}

// SAFETY: all functions that modify the element or the queue check that the BQL
// is taken.  The rest reads fields of the element that do not change after
// virtqueue_pop() has set them, and copies guest memory, which any thread can
// do while it is mapped (and which the guest can change at any time anyway).
unsafe impl Send for VirtQueueElement {}
// SAFETY: see above
unsafe impl Sync for VirtQueueElement {}

/// A buffer that the device may write.  In the queues for hints and reports,
/// the buffer is itself the memory that is hinted or reported.
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
    /// `elem` must have been popped from `vq`, which must be a queue of `vdev`
    /// with that generation; the caller passes on its ownership.
    pub(crate) unsafe fn new(
        elem: NonNull<bindings::VirtQueueElement>,
        vq: NonNull<bindings::VirtQueue>,
        generation: u64,
        vdev: &VirtIODevice,
    ) -> Self {
        Self {
            elem,
            vq,
            generation,
            vdev: vdev.to_owned_ref(),
            big_endian: vdev.is_big_endian(),
        }
    }

    /// The number of buffers that the device can read
    const fn out_num(&self) -> u32 {
        // SAFETY: the element is owned; virtqueue_pop() has set the field, and
        // nobody modifies it.  There cannot be a reference to the element
        // itself because virtqueue_pop() leaves other fields uninitialized.
        unsafe { (*self.elem.as_ptr()).out_num }
    }

    /// The number of buffers that the device can write
    const fn in_num(&self) -> u32 {
        // SAFETY: see out_num()
        unsafe { (*self.elem.as_ptr()).in_num }
    }

    /// Whether there is anything that the device can read
    pub const fn has_out(&self) -> bool {
        self.out_num() != 0
    }

    /// Read the data that the driver has sent.  Each reader starts from the
    /// beginning.
    pub fn out_reader(&self) -> OutReader<'_> {
        // SAFETY: virtqueue_pop() has set the field.  It has mapped out_num
        // buffers, which are unmapped by functions that consume `self`; those
        // cannot be called while the reader borrows it.
        let cursor = unsafe { Cursor::new((*self.elem.as_ptr()).out_sg, self.out_num()) };
        OutReader::new(cursor, self.big_endian)
    }

    /// Write data for the driver.  Each writer starts from the beginning;
    /// [`push`](Self::push) has to be told how much was written.
    pub fn in_writer(&self) -> InWriter<'_> {
        // SAFETY: see out_reader(), likewise for in_num buffers; they were
        // mapped for writing
        let cursor = unsafe { Cursor::new((*self.elem.as_ptr()).in_sg, self.in_num()) };
        InWriter::new(cursor, self.big_endian)
    }

    /// One of the buffers that the device may write, in the order of the
    /// descriptors
    pub fn in_buffer(&self, index: usize) -> Option<InBuffer<'_>> {
        if index >= self.in_num() as usize {
            return None;
        }
        // SAFETY: virtqueue_pop() has set both fields to arrays with in_num
        // elements, and has mapped the buffers; see out_reader()
        unsafe {
            let elem = self.elem.as_ptr();
            let iov = *(*elem).in_sg.add(index);
            Some(InBuffer {
                addr: *(*elem).in_addr.add(index),
                range: HostRange::new(iov.iov_base, iov.iov_len),
            })
        }
    }

    /// The number of buffers, for both directions together
    pub fn buffers(&self) -> usize {
        // cannot overflow: each is at most 1024
        (self.out_num() + self.in_num()) as usize
    }

    /// Whether the queue still knows the element, because it has been neither
    /// reset nor removed since the element was popped.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    fn is_current(&self) -> bool {
        // SAFETY: the memory of the queue is valid, because of the reference to
        // the device
        unsafe { generation(self.vq) == self.generation }
    }

    /// Return the element to the driver, after the first `len` bytes of its
    /// buffers were written: usually the [position](InWriter::position) of the
    /// writer, or 0.  The driver is only interrupted by
    /// [`VirtQueue::notify`](crate::VirtQueue::notify).
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_push")]
    pub fn push(self, len: usize) {
        if self.is_current() {
            // the field in the ring has 32 bits
            let len = c_uint::try_from(len).unwrap_or(c_uint::MAX);
            // SAFETY: the element was popped from the queue, which was neither
            // reset nor removed since then; and it was not returned yet, as
            // that would have consumed `self`
            self.consume(|vq, elem| unsafe { bindings::virtqueue_push(vq, elem, len) });
        }
    }

    /// Put the element back, so that it is the next one to be popped.  Only the
    /// element that was popped last may be put back.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "virtqueue_unpop")]
    pub fn unpop(self) {
        if self.is_current() {
            // SAFETY: see push()
            self.consume(|vq, elem| unsafe { bindings::virtqueue_unpop(vq, elem, 0) });
        }
    }

    /// Pass the element to a function that returns it to the queue.
    fn consume(self, f: impl FnOnce(*mut bindings::VirtQueue, *const bindings::VirtQueueElement)) {
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

impl VirtQueueElement {
    /// Whether the address space in which the buffers were mapped may not exist
    /// anymore.  The address space of a PCI device, which the device uses with
    /// `iommu_platform=on`, is destroyed when the device is unplugged, after
    /// unrealize.
    fn is_address_space_gone(&self) -> bool {
        // SAFETY: plain fields of a valid object.  The first is modified under
        // the BQL, which is taken when an element is dropped; the second does
        // not change after the device was plugged.  The pointers are only
        // compared.
        let (realized, dma_as) = unsafe {
            let dev = self.vdev.upcast::<DeviceState>().as_ptr();
            let vdev = self.vdev.upcast::<VirtIODevice>().as_ptr();
            ((*dev).realized, (*vdev).dma_as)
        };
        // While the device is being unrealized, the queue still exists.
        !realized && !self.is_current() && !ptr::eq(dma_as, ptr::addr_of!(address_space_memory))
    }
}

impl Drop for VirtQueueElement {
    fn drop(&mut self) {
        let is_current = self.is_current();
        let elem = self.elem.as_ptr();
        // SAFETY: the element was popped from the queue and not returned yet,
        // as that would have consumed it.  The function subtracts `ndescs` from
        // the number of descriptors in flight; if the queue was reset or
        // removed since the element was popped, that number does not include
        // the descriptors of the element anymore.  Apart from that, the
        // function only releases the mappings, for which the address space has
        // to exist; if it may not exist, the mappings are leaked.  The memory
        // of the queue exists as long as the device does.
        unsafe {
            if !is_current {
                (*elem).ndescs = 0;
            }
            if !self.is_address_space_gone() {
                bindings::virtqueue_detach_element(self.vq.as_ptr(), elem, 0);
            }
            g_free(elem.cast::<c_void>());
        }
    }
}

impl fmt::Debug for VirtQueueElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: see out_num()
        let index = unsafe { (*self.elem.as_ptr()).index };
        f.debug_struct("VirtQueueElement")
            .field("index", &index)
            .field("out_num", &self.out_num())
            .field("in_num", &self.in_num())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub mod tests {
    use std::{
        cell::RefCell,
        mem::{size_of, zeroed, MaybeUninit},
        ptr::{addr_of, addr_of_mut, null_mut},
    };

    use super::*;

    thread_local! {
        /// Records the calls of the functions below
        static CALLS: RefCell<Vec<(&'static str, c_uint, c_uint)>> =
            const { RefCell::new(Vec::new()) };
    }

    fn calls() -> Vec<(&'static str, c_uint, c_uint)> {
        CALLS.with_borrow_mut(std::mem::take)
    }

    /// # Safety
    ///
    /// `elem` must have been made by `Queue::pop()`.
    unsafe fn called(name: &'static str, elem: *const bindings::VirtQueueElement, len: c_uint) {
        // SAFETY: the caller has promised this
        let ndescs = unsafe { (*elem).ndescs };
        CALLS.with_borrow_mut(|calls| calls.push((name, ndescs, len)));
    }

    // Replacements for functions of virtio.c and other files that are not
    // linked into the tests

    /// Replaces the address space, of which only the address is used
    #[no_mangle]
    #[allow(non_upper_case_globals)]
    static address_space_memory: u64 = 0;

    #[no_mangle]
    unsafe extern "C" fn virtqueue_push(
        _vq: *mut bindings::VirtQueue,
        elem: *const bindings::VirtQueueElement,
        len: c_uint,
    ) {
        // SAFETY: same requirements
        unsafe { called("push", elem, len) }
    }

    #[no_mangle]
    unsafe extern "C" fn virtqueue_unpop(
        _vq: *mut bindings::VirtQueue,
        elem: *const bindings::VirtQueueElement,
        len: c_uint,
    ) {
        // SAFETY: same requirements
        unsafe { called("unpop", elem, len) }
    }

    #[no_mangle]
    unsafe extern "C" fn virtqueue_detach_element(
        _vq: *mut bindings::VirtQueue,
        elem: *const bindings::VirtQueueElement,
        len: c_uint,
    ) {
        // SAFETY: same requirements
        unsafe { called("detach", elem, len) }
    }

    /// In the tests, a queue consists of its generation only.
    #[no_mangle]
    unsafe extern "C" fn virtio_queue_get_generation(vq: *mut bindings::VirtQueue) -> u64 {
        // SAFETY: Queue::new() has made it
        unsafe { *vq.cast::<u64>() }
    }

    #[no_mangle]
    unsafe extern "C" fn virtqueue_pop(_vq: *mut bindings::VirtQueue, _size: usize) -> *mut c_void {
        unreachable!()
    }

    #[no_mangle]
    unsafe extern "C" fn virtqueue_rewind(_vq: *mut bindings::VirtQueue, _num: c_uint) -> bool {
        unreachable!()
    }

    #[no_mangle]
    unsafe extern "C" fn virtio_notify(
        _vdev: *mut bindings::VirtIODevice,
        _vq: *mut bindings::VirtQueue,
    ) {
        unreachable!()
    }

    /// A queue of a device that is not registered with QOM, and never finalized
    pub struct Queue {
        pub vdev: &'static VirtIODevice,
        pub vq: NonNull<bindings::VirtQueue>,
    }

    impl Queue {
        pub fn new() -> Self {
            unsafe extern "C" fn free(_obj: *mut c_void) {}

            bql::start_test();
            // SAFETY: zeroes are valid for the struct.  The test leaks the
            // memory, and the reference that is counted here.  Nothing but the
            // generation of a queue is used.
            unsafe {
                let vdev = Box::leak(Box::new(zeroed::<bindings::VirtIODevice>()));
                vdev.parent_obj.parent_obj.ref_ = 1;
                vdev.parent_obj.parent_obj.free = Some(free);
                vdev.dma_as = addr_of!(super::address_space_memory).cast_mut();
                let vq = NonNull::from(Box::leak(Box::new(0u64))).cast();
                Self {
                    vdev: VirtIODevice::from_raw(vdev),
                    vq,
                }
            }
        }

        fn pop(&self) -> VirtQueueElement {
            // SAFETY: the memory has the size of the struct.  Like
            // virtqueue_pop(), this leaves some fields as they are.
            unsafe {
                let elem = glib_sys::g_malloc(size_of::<bindings::VirtQueueElement>())
                    .cast::<MaybeUninit<bindings::VirtQueueElement>>();
                elem.cast::<u8>()
                    .write_bytes(0xff, size_of::<bindings::VirtQueueElement>());
                let raw = elem.cast::<bindings::VirtQueueElement>();
                addr_of_mut!((*raw).index).write(7);
                addr_of_mut!((*raw).ndescs).write(3);
                addr_of_mut!((*raw).out_num).write(0);
                addr_of_mut!((*raw).in_num).write(0);
                addr_of_mut!((*raw).out_sg).write(null_mut());
                addr_of_mut!((*raw).in_sg).write(null_mut());
                VirtQueueElement::new(
                    NonNull::new(raw).unwrap(),
                    self.vq,
                    generation(self.vq),
                    self.vdev,
                )
            }
        }

        /// The queue is reset, or removed.
        pub fn forget(&self) {
            // SAFETY: see new(); nobody has a reference to it
            unsafe { *self.vq.cast::<u64>().as_ptr() += 1 }
        }

        fn references(&self) -> u32 {
            // SAFETY: the test has only one thread that uses the device
            unsafe { (*self.vdev.as_ptr()).parent_obj.parent_obj.ref_ }
        }
    }

    #[test]
    fn test_current() {
        let queue = Queue::new();
        queue.pop().push(5);
        assert_eq!(calls(), [("push", 3, 5)]);
        queue.pop().push(usize::MAX);
        assert_eq!(calls(), [("push", 3, c_uint::MAX)]);
        queue.pop().unpop();
        assert_eq!(calls(), [("unpop", 3, 0)]);
        drop(queue.pop());
        assert_eq!(calls(), [("detach", 3, 0)]);
        assert_eq!(queue.references(), 1);
    }

    #[test]
    fn test_after_reset() {
        let queue = Queue::new();
        let elems = [(); 3].map(|()| queue.pop());
        assert_eq!(queue.references(), 4);
        queue.forget();
        let [push, unpop, dropped] = elems;
        push.push(5);
        unpop.unpop();
        drop(dropped);
        // the queue does not count their descriptors anymore
        assert_eq!(calls(), [("detach", 0, 0); 3]);
        assert_eq!(queue.references(), 1);

        queue.pop().push(5);
        assert_eq!(calls(), [("push", 3, 5)]);
    }

    /// The mappings are leaked if the address space may not exist anymore.
    #[test]
    fn test_without_address_space() {
        let queue = Queue::new();
        let elems = [(); 3].map(|()| queue.pop());
        let set_realized = |realized| {
            // SAFETY: the test has only one thread that uses the device
            unsafe { (*queue.vdev.as_mut_ptr()).parent_obj.realized = realized }
        };
        // SAFETY: likewise, and nobody follows the pointer
        unsafe { (*queue.vdev.as_mut_ptr()).dma_as = NonNull::dangling().as_ptr() };
        let [unrealizing, reset, unplugged] = elems;
        drop(unrealizing);
        assert_eq!(calls(), [("detach", 3, 0)]);
        queue.forget();
        set_realized(true);
        drop(reset);
        assert_eq!(calls(), [("detach", 0, 0)]);
        set_realized(false);
        drop(unplugged);
        assert!(calls().is_empty());
        assert_eq!(queue.references(), 1);
    }

    // Functions must not create a reference to the element, because some of its
    // fields are uninitialized.
    #[test]
    fn test_uninitialized_fields() {
        let elem = Queue::new().pop();
        assert!(!elem.has_out());
        assert!(elem.out_reader().read_u8().is_none());
        assert!(elem.in_writer().write_u8(1).is_none());
        assert!(elem.in_buffer(0).is_none());
        assert!(format!("{elem:?}").contains("index: 7"));
    }
}
