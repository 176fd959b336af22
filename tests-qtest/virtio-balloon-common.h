/*
 * A driver for virtio-balloon, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_COMMON_H
#define TESTS_VIRTIO_BALLOON_COMMON_H

#include "libqtest.h"
#include "libqos/libqos-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-mmio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_ring.h"

/*
 * Time after which a test fails.  Nothing takes nearly as long, and no test
 * passes because of this limit.  It only has to be shorter than the timeout of
 * the whole test program.
 */
#define TIMEOUT_US      (100 * G_USEC_PER_SEC)

/* Wait until a condition is true. */
#define WAIT_FOR(condition)                                             \
    do {                                                                \
        gint64 deadline_ = g_get_monotonic_time() + TIMEOUT_US;         \
                                                                        \
        while (!(condition)) {                                          \
            g_assert_cmpint(g_get_monotonic_time(), <, deadline_);      \
            g_usleep(100);                                              \
        }                                                               \
    } while (0)

#define PAGE            4096
#define PATTERN         0xa5
#define SECOND          1000000000LL
#define BIT64(n)        (1ULL << (n))
#define HUGE_PAGE       (2 * 1024 * 1024)

/* The proxy of the device that is tested, or the device if it has none */
#define BALLOON_PATH    "/machine/peripheral/balloon"

#define RAM_MB          128
#define RAM_SIZE        (RAM_MB * 1024ULL * 1024)

/* Queues; the index of the last two depends on the features */
enum { IVQ, DVQ, SVQ };

#define F_TELL      BIT64(VIRTIO_BALLOON_F_MUST_TELL_HOST)
#define F_STATS     BIT64(VIRTIO_BALLOON_F_STATS_VQ)
#define F_OOM       BIT64(VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
#define F_HINT      BIT64(VIRTIO_BALLOON_F_FREE_PAGE_HINT)
#define F_POISON    BIT64(VIRTIO_BALLOON_F_PAGE_POISON)
#define F_REPORTING BIT64(VIRTIO_BALLOON_F_REPORTING)
#define F_BALLOON   (F_TELL | F_STATS | F_OOM | F_HINT | F_POISON | F_REPORTING)

/* added by the PCI proxy, for the legacy interface */
#define F_BAD       QVIRTIO_F_BAD_FEATURE

/* The offset of a field in the configuration space */
#define CFG(field)  offsetof(struct virtio_balloon_config, field)

/* How the device is attached */
typedef struct Transport {
    const char *name;
    const char *machine;
    /* The options for QEMU, without those of the balloon itself */
    const char *device;
    /* The features of the transport and the rings */
    uint64_t features;
    bool pci;
} Transport;

typedef struct Balloon {
    const Transport *t;
    QTestState *qts;
    QOSState *qs;
    QGuestAllocator *alloc;
    QGuestAllocator mmio_alloc;
    QVirtioDevice *dev;
    QVirtioPCIDevice *pci;
    QVirtioMMIODevice mmio;
    uint64_t offered;
    QVirtQueue *vq[5];
    int num_queues;
    int hint_vq, reporting_vq;
    /* The I/O thread may poll for hints without being notified. */
    bool hints_polled;
    /* The device may not have been notified of the last element with a hint. */
    bool hint_not_kicked;
    bool vm_stopped;
} Balloon;

/* A test that runs with each transport */
typedef struct TransportTest {
    const char *name;
    void (*fn)(const void *transport);
    /* The test needs a PC, with the device on the PCI bus. */
    bool pc_only;
    /* The transport must have these features. */
    uint64_t features;
    /* The number of VMs for which there have to be enough huge pages */
    int huge_vms;
} TransportTest;

/*
 * The transports that the driver supports, and for whose machine there is a
 * QEMU.  The last entry is NULL.
 */
const Transport *const *transports(void);

/*
 * The modern interface of PCI, for tests that need only one transport; NULL if
 * there is no QEMU for a machine with PCI
 */
const Transport *pci_transport(void);

/* Add tests for all transports. @tests must exist until they have run. */
void add_transport_tests(const TransportTest *tests, size_t n);

/* Whether the device is the Rust implementation, which has more properties */
bool is_rust_device(void);

/*
 * The main function of a program with tests that only pass with the Rust
 * implementation, and are skipped with the C implementation
 */
int run_rust_tests(int argc, char **argv, const char *name,
                   const TransportTest *tests, size_t n);

/*
 * Booting and initialization
 */

/* Start QEMU, and leave the initialization of the device to the test. */
Balloon *balloon_boot(const Transport *t, const char *options);

/*
 * Accept those wanted features that the device offers, and set up the queues.
 */
void balloon_negotiate(Balloon *b, uint64_t wanted);

/* Start QEMU, and initialize the device. */
Balloon *balloon_start(const Transport *t, const char *options);

/* Have the driver reset the device, and initialize it from the start. */
void balloon_restart(Balloon *b, uint64_t wanted);

void balloon_free_queues(Balloon *b);
void balloon_quit(Balloon *b);

uint8_t balloon_status(Balloon *b);

/* Whether the driver can see that it did something wrong */
bool is_broken(Balloon *b);

/* The same, but also works for legacy drivers, which do not know NEEDS_RESET */
bool is_broken_for_qmp(Balloon *b);

/* Check that the device is broken until the driver resets it. */
void assert_broken(Balloon *b);

void config_writel(Balloon *b, uint64_t offset, uint32_t value);
void config_writeb(Balloon *b, uint64_t offset, uint8_t value);
uint32_t config_readl(Balloon *b, uint64_t offset);

/*
 * Queues
 */

/* The index of the used ring, which the driver may not have looked at */
uint16_t used_idx(Balloon *b, int q);

/* Wait until an element is used; it must be @head. */
void wait_used(Balloon *b, int q, uint32_t head);

/*
 * Check that no element is used, even after all pending work was done.  This
 * only covers the main loop: a test cannot know what an I/O thread has
 * processed.
 */
void assert_not_used(Balloon *b, int q);

/*
 * Wait until an I/O thread that has turned notifications off has nothing left
 * to do.  While a round of hinting is active, that never happens.  While the VM
 * is stopped, the I/O thread does not continue.
 */
void wait_hint_queue_idle(Balloon *b);

/* A buffer of an element */
typedef struct Buffer {
    uint64_t addr;
    uint32_t len;
    /* The device can write to it. */
    bool write;
} Buffer;

/* Add an element to the descriptor table, without making it available. */
uint32_t add_element(Balloon *b, int q, const Buffer *buffers, int n);

/* The buffer of an element that is not available yet is an indirect table. */
void make_indirect(Balloon *b, int q, uint32_t head);

/* Make an element available, and notify the device. */
uint32_t submit_element(Balloon *b, int q, const Buffer *buffers, int n);

/* The same, for an element with one buffer */
uint32_t submit(Balloon *b, int q, uint64_t addr, uint32_t len, bool write);

/* Make elements available that were added before, with one notification. */
void make_available(Balloon *b, int q, const uint32_t *heads, int n);

/* The same, and wait until the elements are used in order. */
void send_batch(Balloon *b, int q, const uint32_t *heads, int n);

/* Write data to guest memory that is not used for anything else. */
uint64_t put(Balloon *b, const void *data, size_t len);

/* Send PFNs to inflate or deflate, and wait until the element is used. */
void send_pfns(Balloon *b, int q, const uint32_t *pfns, int n);

/* Allocate guest pages that contain a pattern. */
uint64_t alloc_pages(Balloon *b, int n);

uint32_t pfn(uint64_t addr);

/* Whether a page contains zeroes; if not, it must contain the pattern. */
bool is_zero(Balloon *b, uint64_t addr);

/* Check pages: a '0' in @expected stands for a page of zeroes. */
void assert_pages(Balloon *b, uint64_t addr, const char *expected);

/*
 * QMP
 */

int64_t query_balloon(Balloon *b);
void set_balloon(Balloon *b, uint64_t value);

/* Poll the driver's statistics; 0 to stop */
void set_stats_interval(Balloon *b, int64_t seconds);

/* Have the device return the buffer with statistics. */
void poll_stats(Balloon *b);

/* A member of balloon-counters, a property of the Rust implementation */
uint64_t get_counter(Balloon *b, const char *name);

/*
 * The value of balloon-status, a property of the Rust implementation; the
 * caller has to release it
 */
QDict *get_status(Balloon *b);

/* How many elements of a queue it has there */
int64_t get_in_flight(Balloon *b, const char *queue);

/*
 * Begin an attempt of something that the device may be done with before the
 * test has done what it is for.  How long it takes depends on the host, but it
 * must not be faster than the test every time.
 */
void begin_attempt(int *attempts);

/* Check the member "summary" of balloon-status. */
void assert_summary(Balloon *b, const char *expected);

/* The guest ejects the device from a PC after the user has asked for it. */
void eject_balloon(Balloon *b);

/* The two parts of this: the device is not used anymore, and is gone. */
void eject_balloon_start(Balloon *b);
void eject_balloon_wait(Balloon *b);

void stop_vm(Balloon *b);
void continue_vm(Balloon *b);

/* The QOM path of the device itself, not of its proxy */
const char *backend_path(const Transport *t);

/* The answer to x-query-virtio-status; the caller has to release it */
QDict *virtio_status(Balloon *b);

/* A number in the answer to x-query-virtio-queue-status */
int64_t queue_status(Balloon *b, int q, const char *name);

/* Check that a command has failed; takes ownership of the answer. */
void assert_error(QDict *resp, const char *expected);

/* Check that there is no device. */
void assert_no_balloon(QTestState *qts);

#endif
