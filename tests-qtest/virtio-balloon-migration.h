/*
 * Migration and free page hinting, for tests of virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_MIGRATION_H
#define TESTS_VIRTIO_BALLOON_MIGRATION_H

#include "virtio-balloon-common.h"

/*
 * Stop the VM, and continue it in another QEMU that is started with the given
 * options.  The driver goes on there; the Balloon that is passed is released.
 */
Balloon *balloon_migrate(Balloon *src, const char *options);

/*
 * Stop the VM, and fail to continue it in another QEMU that is started with the
 * given options, which prints a message: a regular expression for a line.  The
 * VM stays where it is.
 */
void balloon_migrate_fails(Balloon *src, const char *options,
                           const char *message);

/* Begin to migrate, which will not end by itself. */
void start_migration(Balloon *b);
void cancel_migration(Balloon *b);

/*
 * More memory than can be migrated during a test, however slow the host is: at
 * the smallest bandwidth, one buffer of the stream, which is 32 pages if even
 * zero pages are sent as a whole, leaves QEMU in 100 ms.
 */
#define HINT_OPTIONS    ",free-page-hint=on,iothread=io0 -m 1G"

/*
 * Start QEMU with HINT_OPTIONS, and without ioeventfd: otherwise, QEMU itself
 * notifies the device when it begins to use one, and it is not possible to know
 * when an I/O thread is done with that.
 */
Balloon *balloon_start_hinting(const Transport *t);

/* How far a round of hinting has got */
typedef enum HintState {
    HINT_REQUESTED,
    HINT_START,
    HINT_STOP,
    HINT_DONE,
    HINT_STATES,
} HintState;

/* The command ID that the device shows */
uint32_t get_cmd_id(Balloon *b);

/* Wait until the device shows a command ID other than the given one. */
uint32_t wait_cmd_id(Balloon *b, uint32_t old);

/* Send a command ID, and wait until the device has read it. */
void hint_command(Balloon *b, uint32_t id);

/* Tell that a page is free, and wait until the device knows. */
void hint(Balloon *b, uint64_t addr);

/* Begin to migrate, and go on until hinting is in the given state. */
void hint_until(Balloon *b, HintState state);

/* The guest stays, and the driver can have its pages back. */
void cancel_hinting(Balloon *b);

/*
 * The driver resets the device in each state of hinting, and does not remember
 * anything of the round when it is back.  A hint is sent before the reset; with
 * in_flight, the device may still have it then.
 */
void check_hinting_reset(Balloon *b, bool in_flight);

/*
 * The device is unplugged from a PC in the given state of hinting, after a hint
 * which the device may still have with in_flight.
 */
void check_hinting_unplug(Balloon *b, HintState state, bool in_flight);

#endif
