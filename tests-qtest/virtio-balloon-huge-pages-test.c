/*
 * QTest test cases for virtio-balloon: guests whose memory consists of huge
 * pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-migration.h"
#include <sched.h>
#include <glib/gstdio.h>
#include <sys/mount.h>
#include <sys/statfs.h>

#define HUGE_OPTIONS \
    " -object memory-backend-memfd,id=ram0,size=128M,hugetlb=on," \
    "hugetlbsize=2M -machine memory-backend=ram0"

/* The number of balloon pages in a huge page */
#define PARTS           (HUGE_PAGE / PAGE)

/* The number of huge pages that the tests use */
#define COUNT           40

/* The option that only the Rust implementation has */
#define ON              ",huge-pages=on"

static bool rust_device;

/* Allocate memory that begins with a huge page. */
static uint64_t alloc_huge_pages(Balloon *b, int n)
{
    return QEMU_ALIGN_UP(alloc_pages(b, (n + 1) * PARTS), HUGE_PAGE);
}

/* The PFNs of a range in descending order, as Linux sends them */
static Buffer put_range(Balloon *b, uint64_t addr, int n)
{
    g_autofree uint32_t *le = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        le[i] = cpu_to_le32(pfn(addr) + n - 1 - i);
    }
    return (Buffer) { put(b, le, n * sizeof(*le)), n * sizeof(*le) };
}

/* Send an element for a range, and wait until it is used. */
static void send_range(Balloon *b, int q, uint64_t addr, int n)
{
    Buffer buffer = put_range(b, addr, n);

    wait_used(b, q, submit_element(b, q, &buffer, 1));
    guest_free(b->alloc, buffer.addr);
}

/* Send elements of 256 PFNs each, as Linux does. */
static void send_ranges(Balloon *b, int q, uint64_t addr, int n)
{
    for (int i = 0; i < n; i += 256) {
        send_range(b, q, addr + i * PAGE, 256);
    }
}

/*
 * By default, and if the driver has not promised to tell the device before it
 * uses pages of the balloon, a host page is discarded if all of it is in one
 * element.
 */
static void check_one_element(Balloon *b)
{
    uint64_t mem = alloc_huge_pages(b, 3);
    Buffer halves[2];
    uint32_t heads[2];

    /* A whole host page, with half a host page on either side */
    send_range(b, IVQ, mem + HUGE_PAGE / 2, 2 * PARTS);
    assert_pages(b, mem + HUGE_PAGE - PAGE, "P0");
    assert_pages(b, mem + 2 * HUGE_PAGE - PAGE, "0P");

    /* Two elements, first one after the other, then at the same time */
    qtest_memset(b->qts, mem, PATTERN, 3 * HUGE_PAGE);
    send_ranges(b, IVQ, mem, PARTS);
    assert_pages(b, mem, "PP");
    for (int i = 0; i < 2; i++) {
        halves[i] = put_range(b, mem + i * HUGE_PAGE / 2, PARTS / 2);
        heads[i] = add_element(b, IVQ, &halves[i], 1);
    }
    send_batch(b, IVQ, heads, 2);
    assert_pages(b, mem, "PP");

    /* Two descriptors of one element */
    wait_used(b, IVQ, submit_element(b, IVQ, halves, 2));
    assert_pages(b, mem, "00");
    assert_pages(b, mem + HUGE_PAGE - PAGE, "0P");

    /* Pages that are already in the balloon are not remembered. */
    qtest_memset(b->qts, mem, PATTERN, HUGE_PAGE);
    send_range(b, IVQ, mem, 1);
    assert_pages(b, mem, "PP");
    send_range(b, IVQ, mem, PARTS);
    assert_pages(b, mem, "00");
}

/*
 * The driver takes pages back and uses them, and tells the device later.  This
 * is allowed without VIRTIO_BALLOON_F_MUST_TELL_HOST, and the driver for
 * Windows does so.
 */
static void check_early_use(Balloon *b)
{
    uint64_t mem = alloc_huge_pages(b, 1);

    send_range(b, IVQ, mem, PARTS / 2);
    qtest_memset(b->qts, mem, PATTERN, HUGE_PAGE);
    send_range(b, IVQ, mem + HUGE_PAGE / 2, PARTS / 2);
    send_range(b, DVQ, mem, PARTS / 2);
    assert_pages(b, mem, "PP");
    assert_pages(b, mem + HUGE_PAGE / 2 - PAGE, "P");
}

static void check_off(const Transport *t, const char *options, uint64_t wanted)
{
    Balloon *b = balloon_boot(t, options);

    balloon_negotiate(b, wanted);
    check_one_element(b);
    check_early_use(b);
    if (rust_device) {
        g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    }
    balloon_quit(b);
}

static void test_off(const void *data)
{
    check_off(data, HUGE_OPTIONS, F_BALLOON);
    if (rust_device) {
        check_off(data, ON HUGE_OPTIONS, F_BALLOON & ~F_TELL);
    }
}

/* A host page is discarded when all of it is in the balloon */
static void test_on(const void *data)
{
    Balloon *b = balloon_start(data, ON HUGE_OPTIONS);
    uint64_t mem = alloc_huge_pages(b, 2);

    g_assert_true(b->dev->features & F_TELL);
    send_range(b, IVQ, mem, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    assert_pages(b, mem, "PP");
    send_range(b, IVQ, mem + 257 * PAGE, 255);
    assert_pages(b, mem, "PP");
    send_range(b, IVQ, mem + 256 * PAGE, 1);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    g_assert_cmpint(get_counter(b, "bytes-discarded"), ==, HUGE_PAGE);
    assert_pages(b, mem, "00");
    assert_pages(b, mem + 511 * PAGE, "0P");

    /* Inflating a page again does not cause another discard. */
    send_range(b, IVQ, mem + 9 * PAGE, 1);
    g_assert_cmpint(get_counter(b, "bytes-discarded"), ==, HUGE_PAGE);

    /* One page leaves the balloon and is used, and later goes back */
    send_range(b, DVQ, mem + 7 * PAGE, 1);
    qtest_memset(b->qts, mem + 7 * PAGE, PATTERN, PAGE);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    send_range(b, IVQ, mem + 8 * PAGE, 1);
    assert_pages(b, mem + 7 * PAGE, "P0");
    send_range(b, IVQ, mem + 7 * PAGE, 1);
    assert_pages(b, mem + 7 * PAGE, "00");
    g_assert_cmpint(get_counter(b, "bytes-discarded"), ==, 2 * HUGE_PAGE);

    /* A reset empties the balloon */
    qtest_memset(b->qts, mem, PATTERN, HUGE_PAGE);
    send_range(b, DVQ, mem, 512);
    send_range(b, IVQ, mem, 511);
    balloon_restart(b, F_BALLOON);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    send_range(b, IVQ, mem + 511 * PAGE, 1);
    assert_pages(b, mem, "PP");
    g_assert_cmpint(get_counter(b, "populate-errors"), ==, 0);
    balloon_quit(b);
}

/*
 * Both queues have elements: a page has to leave the balloon before it goes
 * into it again.
 */
static void test_order(const void *data)
{
    Balloon *b = balloon_start(data, ON HUGE_OPTIONS);
    uint64_t mem = alloc_huge_pages(b, 1);
    Buffer out, in;
    uint32_t head;

    send_range(b, IVQ, mem, PARTS - 1);
    out = put_range(b, mem, PARTS / 2);
    in = put_range(b, mem + (PARTS - 1) * PAGE, 1);
    head = add_element(b, DVQ, &out, 1);
    /* Make the element available without a notification */
    qtest_writew(b->qts, b->vq[DVQ]->avail + 4, head);
    qvirtqueue_set_avail_idx(b->qts, b->dev, b->vq[DVQ], 1);
    wait_used(b, IVQ, submit_element(b, IVQ, &in, 1));
    wait_used(b, DVQ, head);
    assert_pages(b, mem, "PP");
    balloon_quit(b);
}

/*
 * Memory hotplug
 */

/* The address of a DIMM in a PC with little RAM */
#define DIMM_ADDR       (4ULL * GiB)

static void plug_dimm(Balloon *b, const char *backend)
{
    qtest_qmp_device_add(b->qts, "pc-dimm", "dimm1",
                         "{ 'memdev': %s, 'addr': %" PRIu64 " }",
                         backend, (uint64_t)DIMM_ADDR);
    qtest_memset(b->qts, DIMM_ADDR, PATTERN, HUGE_PAGE);
}

/* The guest ejects the DIMM; see docs/specs/acpi_mem_hotplug.rst. */
static void unplug_dimm(Balloon *b)
{
    qtest_qmp_device_del_send(b->qts, "dimm1");
    qtest_outl(b->qts, 0xa00, 0);
    qtest_outb(b->qts, 0xa14, 1 << 3);
    qtest_qmp_eventwait(b->qts, "DEVICE_DELETED");
}

static void add_backend(Balloon *b, const char *backend)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'object-add', 'arguments': {"
        " 'qom-type': 'memory-backend-memfd', 'id': %s, 'size': %d,"
        " 'hugetlb': true, 'hugetlbsize': %d } }",
        backend, HUGE_PAGE, HUGE_PAGE);
}

/* After a DIMM was unplugged, its pages are not in the balloon anymore */
static void check_unplug(const Transport *t, bool keep_backend)
{
    Balloon *b = balloon_start(t, ON " -m slots=1,maxmem=1G");
    const char *backend = "mem1";

    add_backend(b, backend);
    plug_dimm(b, backend);
    send_range(b, IVQ, DIMM_ADDR, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);

    unplug_dimm(b);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    if (!keep_backend) {
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'object-del',"
                                 " 'arguments': { 'id': 'mem1' } }");
        /*
         * With the same ID, the new backend could get the file descriptor of
         * the old one, which is found by the ID, and is closed when RCU frees
         * the old backend.
         */
        backend = "mem2";
        add_backend(b, backend);
    }

    plug_dimm(b, backend);
    send_range(b, IVQ, DIMM_ADDR + 256 * PAGE, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    assert_pages(b, DIMM_ADDR, "PP");
    send_range(b, IVQ, DIMM_ADDR, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    assert_pages(b, DIMM_ADDR, "00");
    balloon_quit(b);
}

static void test_unplug(const void *data)
{
    check_unplug(data, false);
}

static void test_replug(const void *data)
{
    check_unplug(data, true);
}

/*
 * A pool with exactly as many huge pages as the guest has: a file system with
 * its own size limit
 */

typedef struct Pool {
    char *dir;
    char *options;
    /* Open file of another program that uses huge pages, or -1 */
    int other;
} Pool;

static void pool_unmount(void *opaque)
{
    Pool *pool = opaque;

    umount2(pool->dir, MNT_DETACH);
    g_rmdir(pool->dir);
}

/* Create the pool.  Returns false if that is not permitted. */
static bool pool_init(Pool *pool)
{
    g_autofree char *limit = g_strdup_printf("pagesize=2M,size=%dM", RAM_MB);
    g_autoptr(GError) err = NULL;
    static bool unshared;

    /*
     * In a mount namespace, the file system does not outlive the test.
     */
    if (!unshared && (unshare(CLONE_NEWNS) ||
                      mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))) {
        g_test_skip("mounting is not permitted");
        return false;
    }
    unshared = true;
    pool->dir = g_dir_make_tmp("virtio-balloon-XXXXXX", &err);
    g_assert_no_error(err);
    if (mount("none", pool->dir, "hugetlbfs", 0, limit)) {
        g_rmdir(pool->dir);
        g_free(pool->dir);
        g_test_skip("no file system for huge pages");
        return false;
    }
    qtest_add_abrt_handler(pool_unmount, pool);
    pool->other = -1;
    pool->options = g_strdup_printf(
        " -object memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on,"
        "prealloc=on -machine memory-backend=ram0", RAM_MB, pool->dir);
    return true;
}

static void pool_destroy(Pool *pool)
{
    if (pool->other >= 0) {
        close(pool->other);
    }
    qtest_remove_abrt_handler(pool);
    pool_unmount(pool);
    g_free(pool->dir);
    g_free(pool->options);
}

static int pool_free_pages(Pool *pool)
{
    struct statfs st;

    g_assert_cmpint(statfs(pool->dir, &st), ==, 0);
    return st.f_bfree;
}

/* Have another program use @n huge pages, instead of those that it has used. */
static void pool_use(Pool *pool, int n)
{
    if (pool->other < 0) {
        g_autofree char *path = g_build_filename(pool->dir, "other", NULL);

        pool->other = open(path, O_RDWR | O_CREAT, 0600);
        g_assert_cmpint(pool->other, >=, 0);
    }
    g_assert_cmpint(ftruncate(pool->other, (off_t)n * HUGE_PAGE), ==, 0);
    if (n) {
        g_assert_cmpint(fallocate(pool->other, 0, 0, (off_t)n * HUGE_PAGE), ==,
                        0);
    }
}

/*
 * By default, elements like those of Linux do not discard any huge page, so no
 * page is missing later.
 */
static void test_pool_off(const void *data)
{
    Balloon *b;
    uint64_t mem;
    Pool pool;

    if (!pool_init(&pool)) {
        return;
    }
    b = balloon_start(data, pool.options);
    mem = alloc_huge_pages(b, COUNT);
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    send_ranges(b, IVQ, mem, COUNT * PARTS);
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    send_ranges(b, DVQ, mem, COUNT * PARTS);
    qtest_memset(b->qts, mem, PATTERN, COUNT * HUGE_PAGE);
    balloon_quit(b);
    pool_destroy(&pool);
}

/*
 * Start a guest that has used all of its huge pages, and inflate COUNT of them.
 */
static Balloon *start_with_pool(const Transport *t, Pool *pool, uint64_t *mem,
                                const char *stderr_path)
{
    g_autofree char *options = g_strdup_printf(ON "%s%s%s", pool->options,
                                               stderr_path ? " 2>" : "",
                                               stderr_path ?: "");
    Balloon *b = balloon_start(t, options);

    *mem = alloc_huge_pages(b, COUNT);
    g_assert_cmpint(pool_free_pages(pool), ==, 0);
    send_ranges(b, IVQ, *mem, COUNT * PARTS);
    g_assert_cmpint(pool_free_pages(pool), ==, COUNT);
    return b;
}

/* Check that the deflate queue waits for memory while time passes. */
static void assert_waits(Balloon *b)
{
    uint64_t errors = get_counter(b, "populate-errors");

    g_assert_cmpint(errors, >, 0);
    for (int i = 0; i < 3; i++) {
        qtest_clock_step(b->qts, 2 * SECOND);
        assert_not_used(b, DVQ);
        g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 1);
        assert_summary(b, "the host has no memory for pages that leave the"
                       " balloon, and the guest waits");
        /* The device tries again. */
        WAIT_FOR(get_counter(b, "populate-errors") > errors);
        errors = get_counter(b, "populate-errors");
    }
}

static void test_pool_deflate(const void *data)
{
    Balloon *b;
    Buffer buffers[2];
    uint32_t heads[2];
    uint64_t mem;
    Pool pool;

    if (!pool_init(&pool)) {
        return;
    }
    b = start_with_pool(data, &pool, &mem, NULL);

    /* There are enough huge pages. */
    pool_use(&pool, COUNT - 4);
    send_range(b, DVQ, mem, 10);
    g_assert_cmpint(pool_free_pages(&pool), ==, 3);
    qtest_memset(b->qts, mem, PATTERN, 10 * PAGE);
    /* Another part of the same huge page */
    send_range(b, DVQ, mem + 10 * PAGE, 10);
    g_assert_cmpint(pool_free_pages(&pool), ==, 3);

    /* There are not enough: the guest waits for the first element. */
    pool_use(&pool, COUNT - 1);
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    for (int i = 0; i < 2; i++) {
        /*
         * each element needs two huge pages, and no two elements need the same
         */
        buffers[i] = put_range(b, mem + (2 * i + 1) * HUGE_PAGE + HUGE_PAGE / 2,
                               PARTS);
        heads[i] = submit_element(b, DVQ, &buffers[i], 1);
    }
    assert_waits(b);

    /* This does not prevent the guest from inflating, */
    send_range(b, IVQ, mem, 20);
    g_assert_cmpint(pool_free_pages(&pool), ==, 1);
    pool_use(&pool, COUNT);
    assert_waits(b);
    /* nor the VM from being stopped. */
    stop_vm(b);
    assert_not_used(b, DVQ);
    pool_use(&pool, COUNT - 1);
    continue_vm(b);
    /* One huge page is not enough. */
    assert_waits(b);
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    pool_use(&pool, COUNT - 2);
    qtest_clock_step(b->qts, 2 * SECOND);
    wait_used(b, DVQ, heads[0]);
    assert_waits(b);
    pool_use(&pool, COUNT - 4);
    qtest_clock_step(b->qts, 2 * SECOND);
    wait_used(b, DVQ, heads[1]);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 0);
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);

    /*
     * Pages that have left the balloon have memory, and keep what the guest
     * writes.
     */
    qtest_memset(b->qts, mem + HUGE_PAGE, PATTERN, 4 * HUGE_PAGE);
    assert_pages(b, mem + HUGE_PAGE, "PP");
    assert_pages(b, mem + 5 * HUGE_PAGE - PAGE, "P");
    /* A page that was never in the balloon */
    assert_pages(b, mem + COUNT * HUGE_PAGE, "PP");

    /* The driver resets the device while an element waits. */
    submit_element(b, DVQ, (Buffer[]) { put_range(b, mem + 6 * HUGE_PAGE, 1) },
                   1);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 1);
    pool_use(&pool, 0);
    balloon_restart(b, F_BALLOON);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 0);
    balloon_quit(b);
    pool_destroy(&pool);
}

static const char *run_state(Balloon *b)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'query-status' }");
    const char *state = g_intern_string(qdict_get_str(ret, "status"));

    qobject_unref(ret);
    return state;
}

/* How often QEMU has printed that the VM is stopped because of the pool */
static int count_messages(const char *path)
{
    const char *message =
        "virtio-balloon: the host has no memory for what was in the balloon"
        " before the guest was reset: the VM is stopped. Provide huge pages,"
        " and continue it with 'cont'\n";
    g_autofree char *text = NULL;
    int n = 0;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    for (char *p = text; (p = strstr(p, message)); p++) {
        n++;
    }
    return n;
}

/*
 * After a reset the guest uses all of its memory.  All of it has to be
 * populated before the guest runs: otherwise, an access would kill QEMU.
 */
static void check_reset(const Transport *t, bool by_driver, bool enough)
{
    g_autofree char *path = NULL;
    uint64_t mem;
    Balloon *b;
    Pool pool;
    int fd;

    if (!pool_init(&pool)) {
        return;
    }
    fd = g_file_open_tmp("virtio-balloon-XXXXXX", &path, NULL);
    g_assert_cmpint(fd, >=, 0);
    close(fd);
    b = start_with_pool(t, &pool, &mem, path);
    /*
     * Enough memory for all huge pages, for less than one turn, or for more
     * than one turn
     */
    pool_use(&pool, enough ? 0 : COUNT - (by_driver ? 10 : 2));

    if (by_driver) {
        balloon_free_queues(b);
        b->dev->bus->set_status(b->dev, 0);
    } else {
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'system_reset' }");
        qtest_qmp_eventwait(b->qts, "RESET");
    }
    /* The VM is stopped: more than one turn is needed, or the pool is empty. */
    qtest_qmp_eventwait(b->qts, "STOP");
    if (!enough) {
        for (int i = 1; i < 4; i++) {
            WAIT_FOR(count_messages(path) == i);
            g_assert_cmpint(pool_free_pages(&pool), ==, 0);
            g_assert_true(!strcmp(run_state(b), "paused") ||
                          !strcmp(run_state(b), "prelaunch"));
            g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 1);
            if (i < 3) {
                qtest_qmp_assert_success(b->qts, "{ 'execute': 'cont' }");
                qtest_qmp_eventwait(b->qts, "STOP");
            }
        }
        pool_use(&pool, 0);
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'cont' }");
        /* The VM is stopped once more, until all turns are done. */
        qtest_qmp_eventwait(b->qts, "RESUME");
        qtest_qmp_eventwait(b->qts, "STOP");
    }
    qtest_qmp_eventwait(b->qts, "RESUME");
    g_assert_cmpstr(run_state(b), ==, "running");
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 0);
    g_assert_cmpint(count_messages(path), ==, enough ? 0 : 3);
    qtest_memset(b->qts, mem, PATTERN, COUNT * HUGE_PAGE);
    assert_pages(b, mem, "PP");
    assert_pages(b, mem + COUNT * HUGE_PAGE, "PP");

    if (by_driver) {
        /* The balloon works as before. */
        balloon_restart(b, F_BALLOON);
        send_ranges(b, IVQ, mem, COUNT * PARTS);
        g_assert_cmpint(pool_free_pages(&pool), ==, COUNT);
    }
    balloon_quit(b);
    g_unlink(path);
    pool_destroy(&pool);
}

static void test_pool_reset(const void *data)
{
    check_reset(data, true, true);
    check_reset(data, true, false);
}

static void test_pool_reboot(const void *data)
{
    check_reset(data, false, true);
    check_reset(data, false, false);
}

/*
 * The VM is stopped when it is reset: all memory is populated before it runs.
 */
static void test_pool_reset_stopped(const void *data)
{
    uint64_t mem;
    Balloon *b;
    Pool pool;

    if (!pool_init(&pool)) {
        return;
    }
    b = start_with_pool(data, &pool, &mem, NULL);
    stop_vm(b);
    qtest_qmp_eventwait(b->qts, "STOP");
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(b->qts, "RESET");
    g_assert_cmpint(pool_free_pages(&pool), ==, COUNT);
    continue_vm(b);
    qtest_qmp_eventwait(b->qts, "RESUME");
    qtest_qmp_eventwait(b->qts, "STOP");
    qtest_qmp_eventwait(b->qts, "RESUME");
    g_assert_cmpint(pool_free_pages(&pool), ==, 0);
    qtest_memset(b->qts, mem, PATTERN, COUNT * HUGE_PAGE);
    balloon_quit(b);
    pool_destroy(&pool);
}

/*
 * Migration
 */

/*
 * The destination does not know which pages are in the balloon: it only
 * discards a huge page if all of it goes into the balloon there.
 */
static void test_migrate(const void *data)
{
    Balloon *b = balloon_start(data, ON HUGE_OPTIONS);
    uint64_t mem = alloc_huge_pages(b, 1);

    send_range(b, IVQ, mem, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);

    b = balloon_migrate(b, ON HUGE_OPTIONS);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    send_range(b, IVQ, mem + 256 * PAGE, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    assert_pages(b, mem, "PP");
    send_range(b, IVQ, mem, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    assert_pages(b, mem, "00");
    balloon_quit(b);
}

/* How many huge pages the guest's memory consists of at the moment */
static int huge_pages_in_use(Balloon *b)
{
    g_autofree char *dir =
        g_strdup_printf("/proc/%d/fd", (int)qtest_pid(b->qts));
    g_autoptr(GDir) fds = g_dir_open(dir, 0, NULL);
    const char *name;

    g_assert_nonnull(fds);
    while ((name = g_dir_read_name(fds))) {
        g_autofree char *path = g_build_filename(dir, name, NULL);
        g_autofree char *file = g_file_read_link(path, NULL);
        struct stat st;

        if (file && g_str_has_prefix(file, "/memfd:memory-backend-memfd") &&
            stat(path, &st) == 0) {
            return st.st_blocks * 512 / HUGE_PAGE;
        }
    }
    g_assert_not_reached();
}

/*
 * The destination does not know which pages of the balloon have no memory, but
 * allocates it before they leave the balloon.
 */
static void test_migrate_deflate(const void *data)
{
    Balloon *b = balloon_start(data, ON HUGE_OPTIONS);
    uint64_t mem = alloc_huge_pages(b, 4);
    int in_use = huge_pages_in_use(b);

    send_ranges(b, IVQ, mem, 4 * PARTS);
    g_assert_cmpint(huge_pages_in_use(b), ==, in_use - 4);

    b = balloon_migrate(b, ON HUGE_OPTIONS);
    in_use = huge_pages_in_use(b);
    send_range(b, DVQ, mem, 10);
    g_assert_cmpint(huge_pages_in_use(b), ==, in_use + 1);
    send_ranges(b, DVQ, mem, 4 * PARTS);
    g_assert_cmpint(huge_pages_in_use(b), ==, in_use + 4);
    assert_pages(b, mem, "00");
    balloon_quit(b);
}

/*
 * Source and destination need the property, because the driver has accepted the
 * feature.
 */
static void test_migrate_without(const void *data)
{
    Balloon *b = balloon_start(data, ON HUGE_OPTIONS);

    /* The feature is bit 0. */
    balloon_migrate_fails(b, HUGE_OPTIONS,
                          "^\\S+: Features 0x[0-9a-f]+3 unsupported\\. "
                          "Allowed features: 0x[0-9a-f]+2$");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "huge-pages/off", test_off, .huge_vms = 1 },
    { "huge-pages/pool-off", test_pool_off, .huge_vms = 1 },
};

static const TransportTest rust_tests[] = {
    { "huge-pages/on", test_on, .huge_vms = 1 },
    { "huge-pages/order", test_order, .huge_vms = 1 },
    { "huge-pages/unplug", test_unplug, .pc_only = true, .huge_vms = 1 },
    { "huge-pages/replug", test_replug, .pc_only = true, .huge_vms = 1 },
    { "huge-pages/pool-deflate", test_pool_deflate, .huge_vms = 1 },
    { "huge-pages/pool-reset", test_pool_reset, .huge_vms = 1 },
    { "huge-pages/pool-reboot", test_pool_reboot, .huge_vms = 1 },
    { "huge-pages/pool-reset-stopped", test_pool_reset_stopped,
      .huge_vms = 1 },
    { "huge-pages/migrate", test_migrate, .huge_vms = 2 },
    { "huge-pages/migrate-deflate", test_migrate_deflate, .huge_vms = 2 },
    { "huge-pages/migrate-without", test_migrate_without, .huge_vms = 2 },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rust_device = is_rust_device();
    add_transport_tests(tests, ARRAY_SIZE(tests));
    if (rust_device) {
        add_transport_tests(rust_tests, ARRAY_SIZE(rust_tests));
    }
    return g_test_run();
}
