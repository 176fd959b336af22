// SPDX-License-Identifier: GPL-2.0-or-later

//! Bottom halves of virtio devices

use std::{
    ffi::{c_void, CStr},
    fmt,
    ptr::NonNull,
};

use bql::prelude::*;
use common::{assert_embedded, callbacks::FnCall};
use hwcore::prelude::*;
use qom::prelude::*;

use crate::{bindings, device::VirtIODevice};

struct Inner {
    bh: NonNull<util::bindings::QEMUBH>,
    /// Owns the reentrancy guard
    _transport: Owned<DeviceState>,
}

/// A bottom half that is a field of a virtio device and runs a method of it in
/// the main loop, with the big QEMU lock taken.
#[derive(Default)]
pub struct BottomHalf(BqlRefCell<Option<Inner>>);

// SAFETY: all accesses go through BqlRefCell, which checks that the BQL is taken
unsafe impl Send for BottomHalf {}
// SAFETY: see above
unsafe impl Sync for BottomHalf {}

impl BottomHalf {
    /// Create the bottom half, which will call `f` with `owner` as the
    /// argument.  To be used while the device is being realized; the device has
    /// to [`delete`](Self::delete) it when it is unrealized.
    ///
    /// While it runs, the reentrancy guard of the transport is engaged; see
    /// `virtio_bh_new_guarded()`.
    ///
    /// # Panics
    ///
    /// Panics if the bottom half is not a field of `owner`, if it exists
    /// already, or if the device is not plugged into a transport.
    pub fn init<T, F>(&self, owner: &T, name: &'static CStr, _f: &F)
    where
        T: IsA<VirtIODevice> + IsA<DeviceState>,
        F: for<'a> FnCall<(&'a T,)>,
    {
        /// # Safety
        ///
        /// `opaque` must be a `T`.
        unsafe extern "C" fn rust_bh_cb<T, F: for<'a> FnCall<(&'a T,)>>(opaque: *mut c_void) {
            // SAFETY: the opaque was passed to virtio_bh_new_guarded_full() as
            // a reference to T, which has not been dropped because dropping it
            // deletes the bottom half.
            F::call((unsafe { &*(opaque.cast::<T>()) },))
        }

        const { assert!(F::IS_SOME) };
        assert_embedded(owner, self);
        assert!(self.0.borrow().is_none());

        let dev = owner.upcast::<DeviceState>();
        // SAFETY: a device that is plugged in has a parent bus, which belongs
        // to another device; both are valid while the device is plugged in.
        // Taking a reference keeps the guard valid for longer than that.
        let transport = unsafe {
            let bus = (*dev.as_ptr()).parent_bus;
            assert!(!bus.is_null() && !(*bus).parent.is_null());
            Owned::from(DeviceState::from_raw((*bus).parent))
        };

        let opaque: *const T = owner;
        // SAFETY: the bottom half is deleted at the latest when `owner` is
        // dropped.  Running and deleting it are both done under the BQL, so
        // they cannot race with each other.
        let bh = unsafe {
            bindings::virtio_bh_new_guarded_full(
                dev.as_mut_ptr(),
                Some(rust_bh_cb::<T, F>),
                opaque.cast::<c_void>().cast_mut(),
                name.as_ptr(),
            )
        };
        *self.0.borrow_mut() = NonNull::new(bh).map(|bh| Inner {
            bh,
            _transport: transport,
        });
    }

    /// Have the main loop run the bottom half soon.  No effect if there is
    /// none.
    pub fn schedule(&self) {
        if let Some(inner) = &*self.0.borrow() {
            // SAFETY: the bottom half exists, because delete() clears the field
            unsafe { util::bindings::qemu_bh_schedule(inner.bh.as_ptr()) }
        }
    }

    /// Do not run the bottom half, if it was scheduled.
    pub fn cancel(&self) {
        if let Some(inner) = &*self.0.borrow() {
            // SAFETY: see schedule()
            unsafe { util::bindings::qemu_bh_cancel(inner.bh.as_ptr()) }
        }
    }

    /// Remove the bottom half; it does not run anymore even if it was
    /// scheduled.
    pub fn delete(&self) {
        let inner = self.0.borrow_mut().take();
        if let Some(inner) = inner {
            // SAFETY: created by init() and deleted only here
            unsafe { util::bindings::qemu_bh_delete(inner.bh.as_ptr()) }
        }
    }
}

impl Drop for BottomHalf {
    fn drop(&mut self) {
        self.delete();
    }
}

impl fmt::Debug for BottomHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BottomHalf").finish_non_exhaustive()
    }
}
