/*
 * Migration and free page hinting, for tests of virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_MIGRATION_H
#define TESTS_VIRTIO_BALLOON_MIGRATION_H

#include "virtio-balloon-common.h"

/*
 * Stop the VM, and continue it in another QEMU that is started with @options.
 * Returns the driver there; the Balloon that is passed is freed.
 */
Balloon *balloon_migrate(Balloon *src, const char *options);

/* Save the VM to a file.  Afterwards it is stopped. */
void balloon_save(Balloon *b, const char *path);

/*
 * Load a VM that was saved in another QEMU that is started with @options.
 * Returns the driver there; @src has no queues anymore.
 */
Balloon *balloon_load(Balloon *src, const char *path, const char *options);

/*
 * Stop the VM, and check that another QEMU that is started with @options fails
 * to load it.  That QEMU prints a message; the argument is a regular expression
 * for the line.  The VM stays at the source.
 */
void balloon_migrate_fails(Balloon *src, const char *options,
                           const char *message);

/* Begin a migration that does not end by itself. */
void start_migration(Balloon *b);
void cancel_migration(Balloon *b);

/*
 * More memory than can be migrated during a test, however slow the host is.
 * With the smallest bandwidth, QEMU sends one buffer of the stream in 100 ms.
 * That is 32 pages if even zero pages are sent in full.
 */
#define HINT_OPTIONS    ",free-page-hint=on,iothread=io0 -m 1G"

/*
 * Start QEMU with HINT_OPTIONS and without ioeventfd.  With ioeventfd, QEMU
 * itself notifies the device when it begins to use the eventfd, and a test
 * cannot know when an I/O thread has handled that.
 */
Balloon *balloon_start_hinting(const Transport *t);

/* The state of a round of hinting */
typedef enum HintState {
    HINT_REQUESTED,
    HINT_START,
    HINT_STOP,
    HINT_DONE,
    HINT_STATES,
} HintState;

/* The command ID that the device shows in the configuration space */
uint32_t get_cmd_id(Balloon *b);

/* Wait until the device shows a command ID other than @id. */
uint32_t wait_cmd_id(Balloon *b, uint32_t old);

/* Send a command ID, and wait until the device has read it. */
void hint_command(Balloon *b, uint32_t id);

/* Send a hint for a page, and wait until the element is used. */
void hint(Balloon *b, uint64_t addr);

/* Begin a migration, and continue until hinting is in the given state. */
void hint_until(Balloon *b, HintState state);

/* Cancel the migration, and check that the driver can have its pages back. */
void cancel_hinting(Balloon *b);

/*
 * The driver resets the device in each state of hinting.  Afterwards, the
 * device does not remember the round.  A hint is sent before the reset; with
 * in_flight, the device may still have it at the reset.
 */
void check_hinting_reset(Balloon *b, bool in_flight);

/*
 * The device is unplugged from a PC in the given state of hinting, after a hint
 * was sent.  With in_flight, the device may still have the hint then.
 */
void check_hinting_unplug(Balloon *b, HintState state, bool in_flight);

#endif
