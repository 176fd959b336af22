// SPDX-License-Identifier: GPL-2.0-or-later

//! The trait that a virtio device implements

use std::{
    ffi::{c_int, CStr},
    ptr::{self, addr_of, NonNull},
    slice,
};

use common::{callbacks::FnCall, Immovable, Zeroable};
use hwcore::prelude::*;
use migration::{
    bindings::{VMStateField, VMStateFlags},
    prelude::*,
    vmstate_fields_ref,
};
use qom::{prelude::*, Hold};
use util::{Error, Result};

use crate::{
    bindings,
    device::{VirtIODevice, VirtioDeviceClass, VirtioDeviceMethods},
    queue::VirtQueue,
};

/// Passed to [`VirtioDeviceImpl::REALIZE`], so that the device can add its
/// queues, which it cannot do at any other time.
pub struct VirtioRealize<'a, T: VirtioDeviceImpl> {
    dev: &'a T,
    count: u16,
}

impl<T: VirtioDeviceImpl> VirtioRealize<'_, T> {
    /// Add a queue with room for `size` elements, which the driver can reduce.
    /// `handler` is called when the driver has notified the queue.  Returns the
    /// index of the queue.
    ///
    /// # Panics
    ///
    /// Panics if there are too many queues, or `size` is 0 or larger than
    /// 1024.
    pub fn add_queue<F>(&mut self, size: u16, _handler: &F) -> u16
    where
        F: for<'a> FnCall<(&'a T, VirtQueue<'a>)>,
    {
        /// # Safety
        ///
        /// `vdev` must be a `T`.
        unsafe extern "C" fn rust_handle_output<
            T: VirtioDeviceImpl,
            F: for<'a> FnCall<(&'a T, VirtQueue<'a>)>,
        >(
            vdev: *mut bindings::VirtIODevice,
            vq: *mut bindings::VirtQueue,
        ) {
            let state = NonNull::new(vdev).unwrap().cast::<T>();
            // SAFETY: the handler was registered for a queue of a T, and is
            // called with that queue.  The object exists at least until the
            // function returns, because of the reference.
            unsafe {
                let vdev = VirtIODevice::from_raw(vdev);
                if let Some(_hold) = Hold::new(vdev) {
                    F::call((
                        state.as_ref(),
                        VirtQueue::new(vdev, NonNull::new(vq).unwrap()),
                    ));
                }
            }
        }

        const { assert!(F::IS_SOME) };
        assert!(size > 0 && u32::from(size) <= bindings::VIRTQUEUE_MAX_SIZE);
        assert!(u32::from(self.count) < bindings::VIRTIO_QUEUE_MAX);

        // SAFETY: virtio_init() was called before the device got `self`, and
        // the sizes were checked above
        unsafe {
            bindings::virtio_add_queue(
                self.dev.upcast::<VirtIODevice>().as_mut_ptr(),
                c_int::from(size),
                Some(rust_handle_output::<T, F>),
            );
        }
        self.count += 1;
        self.count - 1
    }
}

/// Trait providing the contents of [`VirtioDeviceClass`].
///
/// All functions are called with the big QEMU lock taken.
///
/// Devices that implement the trait have to be objects of their own, created
/// with `object_new()`, because elements own a reference to the device.  C code
/// cannot embed such a device in another object, because it does not know the
/// size of the device.
pub trait VirtioDeviceImpl: DeviceImpl + IsA<VirtIODevice> + Immovable {
    /// The virtio device ID (virtio 1.3, section 5)
    const DEVICE_ID: u16;

    /// The size of the configuration space in bytes.  Evaluated once, when
    /// the device is realized.
    const CONFIG_SIZE: fn(&Self) -> usize;

    /// Called when the device is realized, after `virtio_init()`.  If the
    /// function fails, the queues that were added are removed; the function has
    /// to undo everything else that it has done.
    const REALIZE: fn(&Self, &mut VirtioRealize<'_, Self>) -> Result<()>;

    /// Called when the device is unrealized, before the queues are removed.
    /// The device has to give up all elements, and all references to itself.
    const UNREALIZE: Option<fn(&Self)> = None;

    /// Return the features that the device offers: the features in the
    /// argument, which the transport and common code support, and the device's
    /// own.
    const GET_FEATURES: fn(&Self, u64) -> Result<u64>;

    /// Write the contents of the configuration space into the argument, which
    /// has the size that [`CONFIG_SIZE`](Self::CONFIG_SIZE) returned.
    const GET_CONFIG: Option<fn(&Self, &mut [u8])> = None;

    /// The driver has written to the configuration space.  The argument is the
    /// whole space after the write, including fields that the driver is not
    /// supposed to write.
    const SET_CONFIG: Option<fn(&Self, &[u8])> = None;

    /// The device is reset by the driver or with the machine.  The device has
    /// to give up all elements, because the queues are reset afterwards.
    const RESET: Option<fn(&Self)> = None;

    /// The driver resets a single queue (`VIRTIO_F_RING_RESET`).  The device
    /// has to give up all elements of that queue.
    const QUEUE_RESET: Option<fn(&Self, u32)> = None;

    /// The driver has written the device status field, or the VM was started or
    /// stopped.  The argument is the new status.
    const SET_STATUS: Option<fn(&Self, u8)> = None;

    /// Update what [`last_config`](VirtioDeviceMethods::last_config) returns,
    /// as if the driver had read the configuration space.
    fn update_last_config(&self) {
        let mut data = self.last_config();
        if let Some(get_config) = Self::GET_CONFIG {
            get_config(self, &mut data);
            let vdev = self.upcast::<VirtIODevice>().as_ptr();
            // SAFETY: last_config() has checked that the BQL is taken, and has
            // returned as many bytes as the field has.  There are no references
            // to these bytes.
            unsafe {
                if !(*vdev).config.is_null() {
                    ptr::copy_nonoverlapping(data.as_ptr(), (*vdev).config.cast(), data.len());
                }
            }
        }
    }

    /// Migration format of the device itself.  [`DeviceImpl::VMSTATE`] has what
    /// all virtio devices have in common, see [`virtio_vmstate`].
    const VIRTIO_VMSTATE: Option<VMStateDescription<Self>> = None;
}

/// # Safety
///
/// `dev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_virtio_realize_fn<T: VirtioDeviceImpl>(
    dev: *mut hwcore::bindings::DeviceState,
    errp: *mut *mut util::bindings::Error,
) {
    let vdev = dev.cast::<bindings::VirtIODevice>();
    // SAFETY: QEMU calls the function on a T, and virtio_device_realize() does
    // so once in the life of a realized device
    let result = unsafe {
        let state = NonNull::new(dev).unwrap().cast::<T>().as_ref();
        // Check now that the device is not embedded in another object, instead
        // of when the first element is popped.
        drop(state.upcast::<VirtIODevice>().to_owned_ref());
        bindings::virtio_init(vdev, T::DEVICE_ID, T::CONFIG_SIZE(state));

        let mut realize = VirtioRealize {
            dev: state,
            count: 0,
        };
        let result = <T as VirtioDeviceImpl>::REALIZE(state, &mut realize);
        if result.is_err() {
            rust_virtio_cleanup(vdev);
        }
        result
    };
    // SAFETY: errp is an Error** as specified by qapi/error.h
    unsafe {
        Error::ok_or_propagate(result, errp);
    }
}

/// # Safety
///
/// `dev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_virtio_unrealize_fn<T: VirtioDeviceImpl>(
    dev: *mut hwcore::bindings::DeviceState,
) {
    // SAFETY: QEMU calls the function on a T that was realized
    unsafe {
        let state = NonNull::new(dev).unwrap().cast::<T>();
        if let Some(unrealize) = T::UNREALIZE {
            unrealize(state.as_ref());
        }
        rust_virtio_cleanup(dev.cast::<bindings::VirtIODevice>());
    }
}

/// Undo `virtio_init()` and remove all queues.
///
/// # Safety
///
/// `vdev` must be valid, and `virtio_init()` must have been called.
unsafe fn rust_virtio_cleanup(vdev: *mut bindings::VirtIODevice) {
    // SAFETY: virtio_init() has allocated the queues.  The memory of the queues
    // is only freed when the device is finalized, so elements can still refer
    // to it; but they are not returned to the queue.
    unsafe {
        for n in (0..bindings::virtio_get_num_queues(vdev)).rev() {
            bindings::virtio_del_queue(vdev, n);
        }
        bindings::virtio_cleanup(vdev);
    }
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_get_features_fn<T: VirtioDeviceImpl>(
    vdev: *mut bindings::VirtIODevice,
    features: u64,
    errp: *mut *mut util::bindings::Error,
) -> u64 {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: QEMU calls the function on a T, with an Error** as specified by
    // qapi/error.h
    unsafe {
        let result = T::GET_FEATURES(state.as_ref(), features);
        Error::ok_or_propagate(result, errp).unwrap_or(features)
    }
}

/// Like `slice::from_raw_parts_mut()`, but the pointer can be NULL if the size
/// is 0.
///
/// # Safety
///
/// If `len` is not 0, see `slice::from_raw_parts_mut()`.
unsafe fn slice_or_empty<'a>(data: *mut u8, len: usize) -> &'a mut [u8] {
    if len == 0 {
        &mut []
    } else {
        // SAFETY: same requirements
        unsafe { slice::from_raw_parts_mut(data, len) }
    }
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_get_config_fn<T: VirtioDeviceImpl>(
    vdev: *mut bindings::VirtIODevice,
    config: *mut u8,
) {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: QEMU calls the function on a T.  All callers pass either
    // vdev->config or a buffer of the same size, which was initialized.  The
    // pointer can only be NULL if the size is 0.  The device gets a copy
    // because it can read vdev->config by itself; there is no reference to the
    // original while it runs.
    unsafe {
        let len = (*vdev).config_len;
        let mut data = slice_or_empty(config, len).to_vec();
        T::GET_CONFIG.unwrap()(state.as_ref(), &mut data);
        slice_or_empty(config, len).copy_from_slice(&data);
    }
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_set_config_fn<T: VirtioDeviceImpl>(
    vdev: *mut bindings::VirtIODevice,
    config: *const u8,
) {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: see rust_get_config_fn.  The data is copied because the device
    // may cause vdev->config to be written.
    unsafe {
        let data = slice_or_empty(config.cast_mut(), (*vdev).config_len).to_vec();
        T::SET_CONFIG.unwrap()(state.as_ref(), &data);
    }
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_reset_fn<T: VirtioDeviceImpl>(vdev: *mut bindings::VirtIODevice) {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: QEMU calls the function on a T
    T::RESET.unwrap()(unsafe { state.as_ref() });
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_queue_reset_fn<T: VirtioDeviceImpl>(
    vdev: *mut bindings::VirtIODevice,
    queue_index: u32,
) {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: QEMU calls the function on a T
    T::QUEUE_RESET.unwrap()(unsafe { state.as_ref() }, queue_index);
}

/// # Safety
///
/// `vdev` must be a `T`; only called through the vtable of `T`.
unsafe extern "C" fn rust_set_status_fn<T: VirtioDeviceImpl>(
    vdev: *mut bindings::VirtIODevice,
    status: u8,
) -> c_int {
    let state = NonNull::new(vdev).unwrap().cast::<T>();
    // SAFETY: QEMU calls the function on a T
    T::SET_STATUS.unwrap()(unsafe { state.as_ref() }, status);
    0
}

/// Methods of the class struct, as an extension trait because it is defined by
/// another crate
pub trait VirtioDeviceClassExt {
    /// Fill in the virtual methods of [`VirtioDeviceClass`] based on the
    /// definitions in the [`VirtioDeviceImpl`] trait.
    fn class_init<T: VirtioDeviceImpl>(&mut self);
}

impl VirtioDeviceClassExt for VirtioDeviceClass {
    fn class_init<T: VirtioDeviceImpl>(&mut self) {
        // virtio_device_realize() must not be overridden
        const { assert!(<T as DeviceImpl>::REALIZE.is_none()) };

        self.realize = Some(rust_virtio_realize_fn::<T>);
        self.unrealize = Some(rust_virtio_unrealize_fn::<T>);
        self.get_features = Some(rust_get_features_fn::<T>);
        if T::GET_CONFIG.is_some() {
            self.get_config = Some(rust_get_config_fn::<T>);
        }
        if T::SET_CONFIG.is_some() {
            self.set_config = Some(rust_set_config_fn::<T>);
        }
        if T::RESET.is_some() {
            self.reset = Some(rust_reset_fn::<T>);
        }
        if T::QUEUE_RESET.is_some() {
            self.queue_reset = Some(rust_queue_reset_fn::<T>);
        }
        if T::SET_STATUS.is_some() {
            self.set_status = Some(rust_set_status_fn::<T>);
        }
        if let Some(ref vmsd) = T::VIRTIO_VMSTATE {
            self.vmsd = vmsd.as_ref();
        }
        self.parent.class_init::<T>();
    }
}

/// The equivalent of `VMSTATE_VIRTIO_DEVICE`: transport, queues, and then what
/// [`VirtioDeviceImpl::VIRTIO_VMSTATE`] describes.  Must be applied to the
/// `VirtIODevice` itself, which is at offset zero of the device.
const VMSTATE_VIRTIO_DEVICE: VMStateField = VMStateField {
    name: c"virtio".as_ptr(),
    info: addr_of!(bindings::virtio_vmstate_info),
    flags: VMStateFlags::VMS_SINGLE,
    ..Zeroable::ZERO
};

static VMSTATE_VIRTIO_FIELDS: &[VMStateField] = vmstate_fields_ref!(VMSTATE_VIRTIO_DEVICE);

/// The value for [`DeviceImpl::VMSTATE`] of a virtio device.  `name` identifies
/// the device in the migration stream.
pub const fn virtio_vmstate<T: VirtioDeviceImpl>(
    name: &'static CStr,
    version_id: u8,
) -> VMStateDescription<T> {
    VMStateDescriptionBuilder::<T>::new()
        .name(name)
        .version_id(version_id)
        .minimum_version_id(version_id)
        .fields(VMSTATE_VIRTIO_FIELDS)
        .build()
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use super::*;

    // A device without a configuration space has a NULL pointer
    #[test]
    fn test_slice_or_empty() {
        // SAFETY: there are as many bytes
        unsafe {
            assert_eq!(slice_or_empty(null_mut(), 0), []);
            assert_eq!(slice_or_empty([1, 2].as_mut_ptr(), 2), [1, 2]);
        }
    }
}
