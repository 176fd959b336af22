/*
 * Elements that keep virtio-balloon busy, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_BUSY_H
#define TESTS_VIRTIO_BALLOON_BUSY_H

#include "qemu/units.h"
#include "virtio-balloon-migration.h"

/*
 * Options with which all queues exist.  Without ioeventfd, QEMU does not notify
 * the device by itself.
 */
#define BUSY_OPTIONS \
    ",free-page-reporting=on" HINT_OPTIONS " -global virtio-pci.ioeventfd=off"
/* The size of RAM with them */
#define BUSY_VM_SIZE    GiB

enum { INFLATE, DEFLATE, STATS, HINT, REPORT, QUEUES };

/* The names of the queues in balloon-status */
extern const char *const busy_queues[QUEUES];

typedef struct Busy {
    Balloon *b;
    int queue, q;
    /* Five pages, of which elements name the second and the fourth */
    uint64_t mem;
    uint32_t heads[16];
    int n;
    /* The index of the used ring when all of them are used */
    uint16_t end;
    /*
     * The pages were discarded during migration, which may have sent them
     * before: the destination can have the old contents.
     */
    bool stale;
} Busy;

/* The size of the memory that elements name, again and again */
#define BUSY_MEMORY     (16 * MiB)

uint64_t busy_alloc(Balloon *b);

/*
 * Make @n elements available that name the memory at @large.  The Rust device
 * needs many turns for them; the C device is done at once.  Of statistics,
 * there is one element.
 */
void busy_start(Busy *busy, Balloon *b, int queue, uint64_t large, int n);

/* How many elements the Rust device has */
int64_t busy_in_flight(Busy *busy);

/* Check that what the guest has not given away has not changed. */
void busy_check_guard(Busy *busy);

/* Check that all elements are used, in order, and each of them once. */
void busy_finish(Busy *busy);

/* A buffer with the PFNs of a range, and one with statistics at an address */
Buffer put_pfns(Balloon *b, uint64_t mem, int n);
Buffer put_stats(Balloon *b, uint64_t addr);

/* Check that all queues work that the driver uses. */
void check_works(Balloon *b);

/*
 * Have the I/O thread stop where it waits for events.  Returns 0 if that is not
 * permitted: then it is idle, but will run when there is something to do.
 */
pid_t stop_iothread(Balloon *b);
void continue_iothread(pid_t tid);

/*
 * Add a test for each queue.  If it returns false, the Rust device was done too
 * early, and there is another attempt.
 */
void add_queue_tests(const char *name, bool (*fn)(int queue));

#endif
