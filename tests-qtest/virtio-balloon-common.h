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
 * When to give up.  Nothing takes nearly that long, and no test passes because
 * of it: it only has to be shorter than the timeout of the test as a whole.
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
    /* With all options but those of the balloon itself */
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
    /* The I/O thread may look for hints without being notified. */
    bool hints_polled;
    /* The device may not have been notified of the last hint. */
    bool hint_not_kicked;
    bool vm_stopped;
} Balloon;

/* A test that is run for each transport */
typedef struct TransportTest {
    const char *name;
    void (*fn)(const void *transport);
    /* The test needs a PC, and the device on its PCI bus. */
    bool pc_only;
    /* For how many VMs there have to be enough huge pages */
    int huge_vms;
} TransportTest;

/*
 * The transports that the driver knows, and for which QEMU has the machine.
 * The last one is NULL.
 */
const Transport *const *transports(void);

/* Add tests for all transports.  They must exist until they are run. */
void add_transport_tests(const TransportTest *tests, size_t n);

/* Whether there are enough huge pages for the memory of some VMs */
bool have_huge_pages(int vms);

/* Whether the device is the one in Rust, which has more properties */
bool is_rust_device(void);

/*
 * The main function of a program with tests that only the device in Rust
 * passes; they are skipped with the one in C.
 */
int run_rust_tests(int argc, char **argv, const char *name,
                   const TransportTest *tests, size_t n);

/*
 * Booting and initialization
 */

/* Start QEMU, and leave the initialization of the device to the test. */
Balloon *balloon_boot(const Transport *t, const char *options);

/* Accept the wanted features, as far as they are offered, and set up queues. */
void balloon_negotiate(Balloon *b, uint64_t wanted);

/* Start QEMU, and initialize the device. */
Balloon *balloon_start(const Transport *t, const char *options);

/* Reset by the driver, and initialization from the start */
void balloon_restart(Balloon *b, uint64_t wanted);

void balloon_free_queues(Balloon *b);
void balloon_quit(Balloon *b);

uint8_t balloon_status(Balloon *b);

/* Whether the driver can see that it did something wrong */
bool is_broken(Balloon *b);

/* The same for legacy drivers, which do not know NEEDS_RESET */
bool is_broken_for_qmp(Balloon *b);

/* The driver did something wrong, and has to reset the device. */
void assert_broken(Balloon *b);

void config_writel(Balloon *b, uint64_t offset, uint32_t value);
void config_writeb(Balloon *b, uint64_t offset, uint8_t value);
uint32_t config_readl(Balloon *b, uint64_t offset);

/*
 * Queues
 */

/* Wait until an element returns; it must be the given one. */
void wait_used(Balloon *b, int q, uint32_t head);

/*
 * No element returns, even after everything that is pending was done.  This is
 * about the main loop; there is nothing to tell what an I/O thread has seen.
 */
void assert_not_used(Balloon *b, int q);

/*
 * Wait until an I/O thread that does not want to be notified has done all that
 * it has to do.  It never has while a round of hinting is active, and while the
 * VM is stopped it goes no further.
 */
void wait_hint_queue_idle(Balloon *b);

/* A buffer of an element */
typedef struct Buffer {
    uint64_t addr;
    uint32_t len;
    /* The device can write to it. */
    bool write;
} Buffer;

/* Add an element to the descriptors only. */
uint32_t add_element(Balloon *b, int q, const Buffer *buffers, int n);

/* Make an element available, and notify the device. */
uint32_t submit_element(Balloon *b, int q, const Buffer *buffers, int n);

/* The same with only one buffer */
uint32_t submit(Balloon *b, int q, uint64_t addr, uint32_t len, bool write);

/* Make elements available that were added, with only one notification. */
void make_available(Balloon *b, int q, const uint32_t *heads, int n);

/* The same, and wait until they return in order */
void send_batch(Balloon *b, int q, const uint32_t *heads, int n);

/* Write data to memory of the guest that is not used for anything else. */
uint64_t put(Balloon *b, const void *data, size_t len);

/* Inflate or deflate, and wait until it is done. */
void send_pfns(Balloon *b, int q, const uint32_t *pfns, int n);

/* Allocate guest pages that contain a pattern. */
uint64_t alloc_pages(Balloon *b, int n);

uint32_t pfn(uint64_t addr);

/* Whether a page consists of zeroes; otherwise it must have the pattern. */
bool is_zero(Balloon *b, uint64_t addr);

/* Check pages: in the string there is a '0' for each that is zero. */
void assert_pages(Balloon *b, uint64_t addr, const char *expected);

/*
 * QMP
 */

int64_t query_balloon(Balloon *b);
void set_balloon(Balloon *b, uint64_t value);

/* One of the balloon-counters, which only the device in Rust has */
uint64_t get_counter(Balloon *b, const char *name);

void stop_vm(Balloon *b);
void continue_vm(Balloon *b);

/* The device itself, behind its proxy (if there is one) */
const char *backend_path(const Transport *t);

/* The answer to x-query-virtio-status, which has to be released */
QDict *virtio_status(Balloon *b);

/* A number in the answer to x-query-virtio-queue-status */
int64_t queue_status(Balloon *b, int q, const char *name);

/* Check that a command has failed; takes ownership of the answer. */
void assert_error(QDict *resp, const char *expected);

/* Check that there is no device. */
void assert_no_balloon(QTestState *qts);

#endif
