// SPDX-License-Identifier: GPL-2.0-or-later
#![allow(
    dead_code,
    improper_ctypes_definitions,
    improper_ctypes,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unnecessary_transmutes,
    unsafe_op_in_unsafe_fn,
    clippy::pedantic,
    clippy::restriction,
    clippy::style,
    clippy::missing_const_for_fn,
    clippy::ptr_offset_with_cast,
    clippy::useless_transmute,
    clippy::missing_safety_doc,
    clippy::too_many_arguments
)]

use hwcore_sys::{DeviceClass, DeviceRealize, DeviceState, DeviceUnrealize};
use migration_sys::{VMStateDescription, VMStateInfo};
use qom_sys::Object;
use system_sys::{hwaddr, AddressSpace, MemoryListener, MemoryRegion, MemoryRegionSection};
use util_sys::{AioContext, Error, EventNotifier, QEMUBHFunc, QEMUFile, QEMUBH};

#[cfg(MESON)]
include!("bindings.inc.rs");

#[cfg(not(MESON))]
include!(concat!(env!("OUT_DIR"), "/bindings.inc.rs"));
