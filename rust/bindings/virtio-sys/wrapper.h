/* SPDX-License-Identifier: GPL-2.0-or-later */

/*
 * This header file is meant to be used as input to the `bindgen` application
 * in order to generate C FFI compatible Rust bindings.
 */

/*
 * We block include/qemu/typedefs.h from bindgen, add here symbols
 * that are needed as opaque types by other functions.
 */
typedef struct BusState BusState;
typedef struct VirtIODevice VirtIODevice;
typedef struct VMChangeStateEntry VMChangeStateEntry;

#include "qemu/osdep.h"

#include "hw/virtio/virtio.h"
#include "qemu/iov.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "system/replay.h"
