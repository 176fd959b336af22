// SPDX-License-Identifier: GPL-2.0-or-later

//! Bottom halves of virtio devices

use std::{
    ffi::{c_void, CStr},
    fmt,
    ptr::{self, addr_of_mut, NonNull},
    rc::Rc,
};

use bql::prelude::*;
use common::{callbacks::FnCall, Field};
use hwcore::{bindings::MemReentrancyGuard, prelude::*};
use qom::prelude::*;

use crate::{bindings, class::VirtioDeviceImpl, device::VirtIODevice};

/// What the callback is going to do
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The callback will not be called.
    #[default]
    Idle,
    /// The callback will be called, and has to run the method.
    Scheduled,
    /// The callback will be called, but has nothing to do.
    Canceled,
}

/// The argument of the callback.  The callback owns a reference to it while it
/// is scheduled, because the callback cannot be prevented from being called: an
/// event in the queue of record/replay can neither be removed, nor be told that
/// the bottom half does not exist anymore.
struct Shared {
    /// NULL while the bottom half is being created
    bh: BqlCell<*mut util::bindings::QEMUBH>,
    /// NULL if the bottom half was deleted
    owner: BqlCell<*const c_void>,
    /// Runs the method, with the owner as its argument
    run: unsafe fn(*const c_void),
    state: BqlCell<State>,
}

impl Shared {
    /// # Safety
    ///
    /// `run` must be safe to call with `owner`, in the main loop with the BQL
    /// taken, until the owner is set to NULL.
    unsafe fn new(
        owner: *const c_void,
        run: unsafe fn(*const c_void),
        name: &'static CStr,
    ) -> Rc<Self> {
        let this = Rc::new(Self {
            bh: BqlCell::new(ptr::null_mut()),
            owner: BqlCell::new(owner),
            run,
            state: BqlCell::default(),
        });
        // SAFETY: the name is 'static.  The opaque is valid whenever the
        // callback is called: schedule() takes a reference for it.
        let bh = unsafe {
            util::bindings::qemu_bh_new_full(
                Some(rust_bh_cb),
                Rc::as_ptr(&this).cast::<c_void>().cast_mut(),
                name.as_ptr(),
                ptr::null_mut(),
            )
        };
        this.bh.set(bh);
        this
    }

    fn schedule(self: &Rc<Self>) {
        if self.state.replace(State::Scheduled) == State::Idle {
            let _for_callback = Rc::into_raw(Rc::clone(self));
            // SAFETY: the bottom half is deleted when `self` is dropped
            unsafe { bindings::replay_bh_schedule_event(self.bh.get()) }
        }
    }

    fn cancel(&self) {
        if self.state.get() == State::Scheduled {
            self.state.set(State::Canceled);
        }
    }

    fn delete(&self) {
        self.cancel();
        self.owner.set(ptr::null());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: created by new() and deleted only here.  Nothing is left that
        // could run it, because the callback would have a reference.  This can
        // happen in the callback: the main loop frees the memory later.
        unsafe { util::bindings::qemu_bh_delete(self.bh.get()) }
    }
}

/// # Safety
///
/// `opaque` must be a `Shared` that was scheduled.
unsafe extern "C" fn rust_bh_cb(opaque: *mut c_void) {
    // SAFETY: schedule() has taken a reference for the callback, which is
    // called once each time that it is scheduled in the state Idle
    let this = unsafe { Rc::from_raw(opaque.cast_const().cast::<Shared>()) };
    let owner = this.owner.get();
    if this.state.take() == State::Scheduled && !owner.is_null() {
        // SAFETY: the caller of new() has promised this
        unsafe { (this.run)(owner) }
    }
}

/// The reentrancy guard of the transport that a device is plugged into
///
/// # Safety
///
/// The BQL must be taken, and the result must not be used anymore after code
/// was run that could unplug the device.
unsafe fn guard(vdev: &VirtIODevice) -> Option<NonNull<MemReentrancyGuard>> {
    // SAFETY: a transport that is removed unplugs the devices on its bus, which
    // clears their pointers to the bus.  Therefore the bus and the transport
    // are valid if that pointer is not NULL.
    unsafe {
        let bus = (*vdev.upcast::<DeviceState>().as_ptr()).parent_bus;
        let transport = (*NonNull::new(bus)?.as_ptr()).parent;
        let transport = NonNull::new(transport)?.as_ptr();
        NonNull::new(addr_of_mut!((*transport).mem_reentrancy_guard))
    }
}

/// Run a method of a device, with the reentrancy guard of its transport
/// engaged. Does nothing if the device was unplugged.
///
/// # Safety
///
/// `owner` must be a `T` that is not being finalized.
unsafe fn run_guarded<T, F>(owner: *const c_void)
where
    T: VirtioDeviceImpl,
    F: for<'a> FnCall<(&'a T,)>,
{
    // SAFETY: the caller has promised the type; and the object exists at least
    // until the end of the function, because of the reference
    let dev = unsafe { &*owner.cast::<T>() };
    let vdev = dev.upcast::<VirtIODevice>();
    let reference = vdev.to_owned_ref();

    // SAFETY: to_owned_ref() has checked that the BQL is taken, and it is still
    // taken after the call.  The guard is looked up again after the call,
    // because the transport may not exist anymore.  (For this reason, the guard
    // is not engaged by C code, which would use the same pointer after the
    // callback.)
    unsafe {
        if let Some(before) = guard(vdev) {
            let engaged = (*before.as_ptr()).engaged_in_io;
            (*before.as_ptr()).engaged_in_io = true;
            F::call((dev,));
            if let Some(after) = guard(vdev) {
                (*after.as_ptr()).engaged_in_io = engaged;
            }
        }
    }
    // This may be the last reference; the device is not used after this
    // function
    drop(reference);
}

/// A bottom half that is a field of a virtio device and runs a method of it in
/// the main loop, with the big QEMU lock taken.
///
/// Under record/replay it is deterministic: the method runs at the point of the
/// guest's execution that was recorded.  A recorded event cannot be taken
/// back.  If it belongs to a bottom half that was canceled or deleted, the
/// event still happens, but has no effect.
#[derive(Default)]
pub struct BottomHalf(BqlRefCell<Option<Rc<Shared>>>);

// SAFETY: all accesses go through BqlRefCell, which checks that the BQL is
// taken.  This includes the reference count of the Rc, because only the
// callback gets a clone of it, and it runs with the BQL taken.
unsafe impl Send for BottomHalf {}
// SAFETY: see above
unsafe impl Sync for BottomHalf {}

impl BottomHalf {
    /// Create the bottom half, which will call `f` with `owner` as the
    /// argument.  This has to be done while the device is being realized.  The
    /// device has to [`delete`](Self::delete) the bottom half when it is
    /// unrealized.
    ///
    /// While `f` runs, the reentrancy guard of the transport is engaged, as
    /// with `virtio_bh_new_guarded()`.  `f` does not run if the device is not
    /// plugged into a transport.
    ///
    /// # Panics
    ///
    /// Panics if the bottom half already exists, or if the big QEMU lock is not
    /// taken.
    ///
    /// # Examples
    ///
    /// See the [crate's documentation](crate).
    #[doc(alias = "virtio_bh_new_guarded")]
    pub fn init<T, F>(owner: &T, field: Field<T, Self>, name: &'static CStr, _f: F)
    where
        T: VirtioDeviceImpl,
        F: for<'a> FnCall<(&'a T,)>,
    {
        const { assert!(F::IS_SOME) };
        let mut this = field.get(owner).0.borrow_mut();
        assert!(this.is_none());

        let opaque: *const T = owner;
        // SAFETY: according to `field` the bottom half is a part of `owner`,
        // which is Immovable because of VirtioDeviceImpl; hence `owner` stays
        // where it is until it is dropped, and dropping the bottom half sets
        // the pointer to NULL.
        *this = Some(unsafe { Shared::new(opaque.cast(), run_guarded::<T, F>, name) });
    }

    /// Have the main loop run the method soon.  This has no effect if the
    /// bottom half does not exist, or is already scheduled.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.  Under record/replay, also
    /// panics if the replay lock is not taken; the main loop and the vCPUs take
    /// it together with the big QEMU lock.
    #[doc(alias = "replay_bh_schedule_event")]
    #[doc(alias = "qemu_bh_schedule")]
    pub fn schedule(&self) {
        // The cell must not be borrowed while C code runs
        let shared = self.0.borrow().clone();
        if let Some(shared) = shared {
            shared.schedule();
        }
    }

    /// If the bottom half was scheduled, do not run the method.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "qemu_bh_cancel")]
    pub fn cancel(&self) {
        if let Some(shared) = &*self.0.borrow() {
            shared.cancel();
        }
    }

    /// Remove the bottom half.  The method does not run anymore, even if it was
    /// scheduled.
    ///
    /// # Panics
    ///
    /// Panics if the big QEMU lock is not taken.
    #[doc(alias = "qemu_bh_delete")]
    pub fn delete(&self) {
        let shared = self.0.borrow_mut().take();
        if let Some(shared) = shared {
            shared.delete();
        }
    }
}

impl Drop for BottomHalf {
    fn drop(&mut self) {
        if self.0.get_mut().is_some() {
            self.delete();
        }
    }
}

impl fmt::Debug for BottomHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BottomHalf").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, ptr::null_mut};

    use super::*;

    /// # Safety
    ///
    /// `owner` must be a `Cell<u32>`.
    unsafe fn count(owner: *const c_void) {
        // SAFETY: the caller has promised this
        let count = unsafe { &*owner.cast::<Cell<u32>>() };
        count.set(count.get() + 1);
    }

    fn poll() {
        // SAFETY: the context exists once the main loop was initialized
        unsafe {
            util::bindings::aio_bh_poll(util::bindings::qemu_get_aio_context());
        }
    }

    #[test]
    fn test_states() {
        bql::start_test();
        // SAFETY: done once, before anything uses the main loop
        let ret = unsafe { util::bindings::qemu_init_main_loop(null_mut()) };
        assert_eq!(ret, 0);

        let counter = Cell::new(0);
        let owner: *const Cell<u32> = &counter;
        // SAFETY: `counter` lives longer than all bottom halves of the test
        let new = || unsafe { Shared::new(owner.cast(), count, c"test") };
        let bh = new();
        poll();
        assert_eq!(counter.get(), 0);

        // the method runs once, however often it was scheduled
        bh.schedule();
        bh.schedule();
        assert_eq!(counter.get(), 0);
        poll();
        poll();
        assert_eq!(counter.get(), 1);
        assert_eq!(bh.state.get(), State::Idle);
        bh.schedule();
        poll();
        assert_eq!(counter.get(), 2);

        bh.schedule();
        bh.cancel();
        assert_eq!(bh.state.get(), State::Canceled);
        poll();
        assert_eq!(counter.get(), 2);
        assert_eq!(bh.state.get(), State::Idle);
        bh.cancel();
        assert_eq!(bh.state.get(), State::Idle);

        // a canceled bottom half can be scheduled again
        bh.schedule();
        bh.cancel();
        bh.schedule();
        poll();
        poll();
        assert_eq!(counter.get(), 3);

        // the callback has the last reference
        bh.schedule();
        let weak = Rc::downgrade(&bh);
        bh.delete();
        drop(bh);
        assert_eq!(weak.strong_count(), 1);
        poll();
        assert_eq!(weak.strong_count(), 0);
        poll();
        assert_eq!(counter.get(), 3);

        // the callback is not called if it was not scheduled
        let unused = new();
        let unused_weak = Rc::downgrade(&unused);
        unused.delete();
        drop(unused);
        assert_eq!(unused_weak.strong_count(), 0);
        poll();
        assert_eq!(counter.get(), 3);
    }
}
