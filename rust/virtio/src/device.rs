// SPDX-License-Identifier: GPL-2.0-or-later

//! Bindings for the `virtio-device` class

use std::ffi::{c_uint, CStr, CString};

use common::Opaque;
use hwcore::prelude::*;
use qom::prelude::*;

use crate::bindings;
pub use crate::bindings::VirtioDeviceClass;

/// A safe wrapper around [`bindings::VirtIODevice`].
#[repr(transparent)]
#[derive(Debug, common::Wrapper)]
pub struct VirtIODevice(Opaque<bindings::VirtIODevice>);

// SAFETY: as for DeviceState, all of its functions check that the BQL is taken
unsafe impl Send for VirtIODevice {}
// SAFETY: see above
unsafe impl Sync for VirtIODevice {}

// SAFETY: the struct, the class struct and the name are those of the C type
unsafe impl ObjectType for VirtIODevice {
    type Class = VirtioDeviceClass;
    const TYPE_NAME: &'static CStr = c"virtio-device";
}

qom_isa!(VirtIODevice: DeviceState, Object);

/// Declare the QOM type of a virtio device: a struct with
/// `#[derive(qom::Object)]` whose first field is a `ParentField<VirtIODevice>`,
/// and that uses [`VirtioDeviceClass`] as its class struct.
///
/// # Examples
///
/// See the [crate's documentation](crate) for a complete device.  A struct that
/// does not derive `qom::Object` is not accepted:
///
/// ```compile_fail,E0277
/// # use qom::prelude::*;
/// # use virtio::prelude::*;
/// pub struct VirtIOFoo(u8);
///
/// virtio_device_type!(VirtIOFoo, c"virtio-foo-device");
///
/// impl ObjectImpl for VirtIOFoo {
///     type ParentType = VirtIODevice;
///     const CLASS_INIT: fn(&mut Self::Class) = |_| {};
/// }
/// ```
#[macro_export]
macro_rules! virtio_device_type {
    ($t:ident, $name:expr) => {
        ::common::assert_same_type!(
            <$t as ::qom::ObjectImpl>::ParentType,
            $crate::VirtIODevice
        );

        const _: () = {
            const fn has_derive_object<T: ::common::Immovable>() {}
            has_derive_object::<$t>();
        };

        // SAFETY: Immovable is an unsafe trait that only derive(Object)
        // implements for devices.  That also checks that the struct is repr(C)
        // and starts with the parent type of ObjectImpl, which is VirtIODevice
        // according to the assertion above.  The type uses the parent's class
        // struct, and the name under which derive(Object) registers it is
        // TYPE_NAME itself.
        unsafe impl ::qom::ObjectType for $t {
            type Class = $crate::VirtioDeviceClass;
            const TYPE_NAME: &'static ::std::ffi::CStr = $name;
        }

        ::qom::qom_isa!($t: $crate::VirtIODevice, ::hwcore::DeviceState, ::qom::Object);
    };
}

/// Whether the device is plugged into a transport.  It is plugged in before it
/// is realized, and unplugged after it is unrealized.
pub fn is_plugged(vdev: &VirtIODevice) -> bool {
    assert!(bql::is_locked());
    // SAFETY: a plain field of a valid struct, modified under the BQL, which
    // this thread has
    unsafe {
        !(*vdev.upcast::<DeviceState>().as_ptr())
            .parent_bus
            .is_null()
    }
}

/// Trait for methods of [`VirtIODevice`] and its subclasses.
pub trait VirtioDeviceMethods: ObjectDeref
where
    Self::Target: IsA<VirtIODevice>,
{
    /// Whether the driver has accepted a feature; false for feature bits that
    /// do not exist.
    fn has_feature(&self, bit: u32) -> bool {
        assert!(bql::is_locked());
        // SAFETY: a plain field of a valid struct, modified under the BQL,
        // which this thread has.  The other field of the union starts with it.
        let features = unsafe {
            let vdev = self.upcast::<VirtIODevice>().as_ptr();
            (*vdev).__bindgen_anon_2.guest_features
        };
        features.checked_shr(bit).is_some_and(|f| f & 1 != 0)
    }

    /// Whether the VM is running, as far as virtio devices are concerned
    fn vm_running(&self) -> bool {
        assert!(bql::is_locked());
        // SAFETY: a plain field of a valid struct, modified under the BQL,
        // which this thread has
        unsafe { (*self.upcast::<VirtIODevice>().as_ptr()).vm_running }
    }

    /// The status register: what the driver has done so far to use the device
    fn status(&self) -> u8 {
        assert!(bql::is_locked());
        // SAFETY: as in vm_running()
        unsafe { (*self.upcast::<VirtIODevice>().as_ptr()).status }
    }

    /// Whether the device does nothing until it is reset, because of a mistake
    /// of the driver; see [`error`](Self::error)
    fn is_broken(&self) -> bool {
        assert!(bql::is_locked());
        // SAFETY: as in vm_running()
        unsafe { (*self.upcast::<VirtIODevice>().as_ptr()).broken }
    }

    /// Whether multi-byte values in the queues are big endian.  They are not if
    /// `VIRTIO_F_VERSION_1` was negotiated; otherwise they have the endianness
    /// of the guest.
    fn is_big_endian(&self) -> bool {
        assert!(bql::is_locked());
        // SAFETY: a plain field of a valid struct, modified under the BQL,
        // which this thread has
        let endian = unsafe { (*self.upcast::<VirtIODevice>().as_ptr()).device_endian };

        !self.has_feature(bindings::VIRTIO_F_VERSION_1)
            && c_uint::from(endian)
                == bindings::virtio_device_endian::VIRTIO_DEVICE_ENDIAN_BIG as c_uint
    }

    /// Tell the driver that the configuration space has changed.  This has no
    /// effect if the device is not plugged into a transport (anymore).
    #[doc(alias = "virtio_notify_config")]
    fn notify_config(&self) {
        let vdev = self.upcast::<VirtIODevice>();
        if is_plugged(vdev) {
            // SAFETY: the device is valid, and plugged into the transport that
            // the function uses
            unsafe { bindings::virtio_notify_config(vdev.as_mut_ptr()) }
        }
    }

    /// The configuration space when the driver last read or wrote it; after
    /// migration, when it did so at the source.  Empty if the device is not
    /// realized, or has no configuration space.
    #[doc(alias = "config")]
    fn last_config(&self) -> Vec<u8> {
        assert!(bql::is_locked());
        let vdev = self.upcast::<VirtIODevice>().as_ptr();
        // SAFETY: plain fields of a valid struct, modified under the BQL, which
        // this thread has.
        let (config, len) = unsafe { ((*vdev).config, (*vdev).config_len) };
        if config.is_null() {
            return Vec::new();
        }
        // SAFETY: virtio_init() has allocated config_len bytes, initialized
        // with zeroes.  They are freed when the device is finalized, so not
        // while there is a reference to it.  All code that writes to them has
        // the BQL, and does not run before this returns.
        unsafe { std::slice::from_raw_parts(config.cast::<u8>(), len) }.to_vec()
    }

    /// The driver has violated the specification: report an error, and stop
    /// using the queues until the device is reset.  This has no effect if the
    /// device is not plugged into a transport (anymore).
    #[doc(alias = "virtio_error")]
    fn error(&self, msg: &str) {
        let vdev = self.upcast::<VirtIODevice>();
        if is_plugged(vdev) {
            let msg = CString::new(msg).unwrap_or_default();
            // SAFETY: the device is valid, and plugged into the transport that
            // the function uses; the format consumes exactly one NUL-terminated
            // string
            unsafe {
                bindings::virtio_error(vdev.as_mut_ptr(), c"%s".as_ptr(), msg.as_ptr());
            }
        }
    }
}

impl<R: ObjectDeref> VirtioDeviceMethods for R where R::Target: IsA<VirtIODevice> {}
