/*
 * The reset of single queues (VIRTIO_F_RING_RESET), for tests of virtio-balloon
 *
 * Of the transports in QEMU, only the modern interface of virtio-pci has this.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_QUEUE_RESET_H
#define TESTS_VIRTIO_BALLOON_QUEUE_RESET_H

#include "virtio-balloon-common.h"

/* Access a field of the common configuration that belongs to a queue. */
uint16_t read_common(Balloon *b, int q, uint64_t field);
void write_common(Balloon *b, int q, uint64_t field, uint16_t value);

bool is_enabled(Balloon *b, int q);

/* Reset a queue, and wait until the device says that it has done it. */
void reset_queue(Balloon *b, int q);

/* Enable a queue with a new ring; the caller has to free the old one. */
void reenable_queue(Balloon *b, int q, uint32_t size);

/* Reset a queue that is idle, and enable it with a new ring. */
void replace_ring(Balloon *b, int q, uint32_t size);

/* A ring that the device must not use any more */
typedef struct OldRing {
    uint64_t addr;
    size_t len;
    uint8_t *data;
} OldRing;

OldRing save_ring(Balloon *b, int q);
void assert_ring_unchanged(Balloon *b, const OldRing *ring);

/* Check this for the last time, and free the ring. */
void release_ring(Balloon *b, OldRing *ring);

#endif
