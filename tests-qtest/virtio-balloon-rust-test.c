/*
 * QTest test cases for what only the implementation of virtio-balloon in Rust
 * does
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-migration.h"
#include "qobject/qlist.h"

#define HUGE_OPTIONS \
    " -object memory-backend-memfd,id=ram0,size=128M,hugetlb=on," \
    "hugetlbsize=2M -machine memory-backend=ram0"

/*
 * Counters
 */

static uint64_t get_counter(Balloon *b, const char *name)
{
    /* The path is that of the proxy, which has an alias of the property */
    QDict *counters = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'balloon-counters' } }", BALLOON_PATH);
    uint64_t value = qdict_get_int(counters, name);

    qobject_unref(counters);
    return value;
}

static void test_counters(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 8);
    uint32_t pfns[] = { pfn(mem), pfn(mem) + 1, pfn(mem) + 5, UINT32_MAX };

    send_pfns(b, IVQ, pfns, 4);
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, 3);
    g_assert_cmpint(get_counter(b, "bad-pfns"), ==, 1);
    g_assert_cmpint(get_counter(b, "discard-calls"), ==, 1);
    g_assert_cmpint(get_counter(b, "discard-ranges"), ==, 2);
    g_assert_cmpint(get_counter(b, "bytes-discarded"), ==, 3 * PAGE);
    g_assert_cmpint(get_counter(b, "discard-errors"), ==, 0);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);

    /* The host wants the balloon to be as large as it is, */
    config_writel(b, CFG(actual), 3);
    set_balloon(b, RAM_SIZE - 3 * PAGE);
    send_pfns(b, DVQ, pfns, 1);
    g_assert_cmpint(get_counter(b, "pages-deflated"), ==, 1);
    g_assert_cmpint(get_counter(b, "pages-deflated-unasked"), ==, 1);

    /* or to become smaller */
    config_writel(b, CFG(actual), 2);
    set_balloon(b, RAM_SIZE);
    send_pfns(b, DVQ, pfns + 1, 2);
    g_assert_cmpint(get_counter(b, "pages-deflated"), ==, 3);
    g_assert_cmpint(get_counter(b, "pages-deflated-unasked"), ==, 1);
    balloon_quit(b);
}

/*
 * Make elements available with one notification: every 8th page, beginning with
 * another one in each element.  All of them together are one range.
 */
static void inflate_shuffled(Balloon *b, uint64_t mem)
{
    uint32_t heads[8];

    for (int i = 0; i < 8; i++) {
        uint32_t le[7];
        Buffer buffer = { .len = sizeof(le) };

        for (int j = 0; j < 7; j++) {
            le[j] = cpu_to_le32(pfn(mem) + 8 * ((3 * j) % 7) + (5 * i) % 8);
        }
        buffer.addr = put(b, le, sizeof(le));
        heads[i] = add_element(b, IVQ, &buffer, 1);
    }
    send_batch(b, IVQ, heads, 8);
    assert_pages(b, mem, "00000000" "00000000" "00000000" "00000000"
                 "00000000" "00000000" "00000000" "PPPPPPPP");
}

/* Many elements in any order become few discards */
static void test_runs(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 64);

    /*
     * The device may begin with what it has found if that took long, but not
     * every time
     */
    for (int i = 1; ; i++) {
        uint64_t before = get_counter(b, "discard-ranges");

        g_assert_cmpint(i, <, 10);
        inflate_shuffled(b, mem);
        g_assert_cmpint(get_counter(b, "pages-inflated"), ==, 56 * i);
        if (get_counter(b, "discard-ranges") == before + 1) {
            break;
        }
        qtest_memset(b->qts, mem, PATTERN, 64 * PAGE);
    }
    balloon_quit(b);
}

/*
 * Huge pages
 */

static void send_range(Balloon *b, int q, uint64_t addr, int n)
{
    g_autofree uint32_t *pfns = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        pfns[i] = pfn(addr) + n - 1 - i;
    }
    send_pfns(b, q, pfns, n);
}

/* Host pages are discarded as a whole, when all of them is in the balloon */
static void test_huge_pages(const void *data)
{
    Balloon *b = balloon_start(data, HUGE_OPTIONS);
    uint64_t mem = QEMU_ALIGN_UP(alloc_pages(b, 2 * HUGE_PAGE / PAGE),
                                 HUGE_PAGE);

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

    /* One page leaves the balloon and is used, until it goes back */
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
    balloon_quit(b);
}

/* Where PCs have memory that was plugged, if there is little of it */
#define DIMM_ADDR       (4ULL * 1024 * 1024 * 1024)

static void plug_huge_page(Balloon *b)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'object-add', 'arguments': {"
        " 'qom-type': 'memory-backend-memfd', 'id': 'mem1', 'size': %d,"
        " 'hugetlb': true, 'hugetlbsize': %d } }", HUGE_PAGE, HUGE_PAGE);
    qtest_qmp_device_add(b->qts, "pc-dimm", "dimm1",
                         "{ 'memdev': 'mem1', 'addr': %" PRIu64 " }",
                         (uint64_t)DIMM_ADDR);
    qtest_memset(b->qts, DIMM_ADDR, PATTERN, HUGE_PAGE);
}

/* What was in the balloon when it was unplugged is not there any more */
static void test_unplug_huge_pages(const void *data)
{
    Balloon *b = balloon_start(data, " -m slots=1,maxmem=1G");

    plug_huge_page(b);
    send_range(b, IVQ, DIMM_ADDR, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);

    /* The guest ejects it, see docs/specs/acpi_mem_hotplug.rst */
    qtest_qmp_device_del_send(b->qts, "dimm1");
    qtest_outl(b->qts, 0xa00, 0);
    qtest_outb(b->qts, 0xa14, 1 << 3);
    qtest_qmp_eventwait(b->qts, "DEVICE_DELETED");
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'mem1' } }");
    /* when nothing refers to it any more */
    WAIT_FOR(get_counter(b, "partial-host-pages") == 0);

    plug_huge_page(b);
    send_range(b, IVQ, DIMM_ADDR + 256 * PAGE, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    assert_pages(b, DIMM_ADDR, "PP");
    send_range(b, IVQ, DIMM_ADDR, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    assert_pages(b, DIMM_ADDR, "00");
    balloon_quit(b);
}

/*
 * Elements that take long
 */

#define ENDLESS_PFNS    (1024 * 1024)

/* PFNs: every second page of 8 MiB, over and over */
static Buffer prepare_endless(Balloon *b)
{
    g_autofree uint32_t *le = g_new(uint32_t, ENDLESS_PFNS);
    uint64_t mem = guest_alloc(b->alloc, 8 * MiB);
    Buffer endless = { .len = ENDLESS_PFNS * sizeof(*le) };

    for (int i = 0; i < ENDLESS_PFNS; i++) {
        le[i] = cpu_to_le32(pfn(mem) + 2 * (i % 1024));
    }
    endless.addr = guest_alloc(b->alloc, endless.len);
    qtest_bufwrite(b->qts, endless.addr, le, endless.len);
    return endless;
}

/* As many descriptors as a queue of any size can have in an element */
#define MAX_DESCS   128

/*
 * Make an element available with many descriptors, each of which refers to the
 * same PFNs.  There must not be any other in the queue.
 */
static uint32_t submit_endless(Balloon *b, Buffer endless, int descs)
{
    Buffer buffers[MAX_DESCS];

    for (int i = 0; i < descs; i++) {
        buffers[i] = endless;
    }
    qvirtqueue_reset_pool(b->vq[IVQ]);
    return submit_element(b, IVQ, buffers, descs);
}

/*
 * How many descriptors an element has when it is tried again: the test may be
 * slower than the device, if only it is not so every time.
 */
static int next_try(int descs)
{
    static int tries;

    g_assert_cmpint(tries++, <, 100);
    return MIN(2 * descs, MAX_DESCS);
}

/* Stop the VM while an element is being worked on. */
static uint32_t stop_in_the_middle(Balloon *b, Buffer endless)
{
    for (int descs = 8; ; descs = next_try(descs)) {
        uint32_t head = submit_endless(b, endless, descs), idx;

        stop_vm(b);
        if (!qvirtqueue_get_buf(b->qts, b->vq[IVQ], &idx, NULL)) {
            return head;
        }
        g_assert_cmpint(idx, ==, head);
        continue_vm(b);
    }
}

static void test_bounded(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);
    Buffer endless = prepare_endless(b);
    uint64_t inflated;
    uint32_t head;

    /*
     * It is worked on step by step, and the monitor answers meanwhile.  A
     * device that does not let it would have done everything each time.
     */
    for (int descs = 8; ; descs = next_try(descs)) {
        head = submit_endless(b, endless, descs);
        inflated = get_counter(b, "pages-inflated");
        wait_used(b, IVQ, head);
        if (get_counter(b, "pages-inflated") > inflated) {
            break;
        }
    }

    /* The VM is stopped in the middle, and continues */
    head = stop_in_the_middle(b, endless);
    inflated = get_counter(b, "pages-inflated");
    assert_not_used(b, IVQ);
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, inflated);
    continue_vm(b);
    wait_used(b, IVQ, head);

    /* The driver resets the device in the middle */
    submit_endless(b, endless, 64);
    balloon_restart(b, F_BALLOON);
    inflated = get_counter(b, "pages-inflated");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, inflated + 1);

    /* The device goes away in the middle */
    submit_endless(b, endless, 64);
    balloon_quit(b);
}

/*
 * The command ID stays in the configuration space until the round ends, so that
 * a driver that reads it again, whatever the reason, does not end the round.
 */
static void test_hinting_cmd_id(const void *data)
{
    Balloon *b = balloon_start(data, HINT_OPTIONS);
    uint64_t mem = alloc_pages(b, 1);
    uint32_t id;

    start_migration(b);
    id = wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_STOP);
    hint_command(b, id);
    hint(b, mem);
    g_assert_cmphex(get_cmd_id(b), ==, id);
    /* a configuration change interrupt */
    set_balloon(b, RAM_SIZE - PAGE);
    g_assert_cmphex(get_cmd_id(b), ==, id);
    hint(b, mem);

    /* The driver ends the round */
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);
    cancel_hinting(b);

    /* Migration ends the round */
    start_migration(b);
    g_assert_cmphex(wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_DONE), ==, id + 1);
    hint_command(b, id + 1);
    g_assert_cmphex(get_cmd_id(b), ==, id + 1);
    cancel_hinting(b);
    balloon_quit(b);
}

/*
 * Free page hinting, while there is a hint that the driver does not have back.
 * The I/O thread of the C device may use it, the queue, or the device itself
 * when they are not there any more.
 */

static void test_hinting_reset(const void *data)
{
    Balloon *b = balloon_start(data, HINT_OPTIONS);

    check_hinting_reset(b, true);
    balloon_quit(b);
}

static void test_hinting_unplug(const void *data)
{
    for (HintState state = 0; state < HINT_STATES; state++) {
        Balloon *b = balloon_start(data, HINT_OPTIONS);

        check_hinting_unplug(b, state, true);
        balloon_quit(b);
    }
}

/*
 * Migration
 */

/* An element that is being worked on is finished at the destination. */
static void test_migrate_unfinished(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint32_t head = stop_in_the_middle(b, prepare_endless(b));

    b = balloon_migrate(b, "");
    wait_used(b, IVQ, head);
    g_assert_cmpint(get_counter(b, "pages-inflated"), >, 0);
    balloon_quit(b);
}

/*
 * The destination does not know what was in the balloon: it only discards huge
 * pages all of which goes into the balloon there.
 */
static void test_migrate_huge_pages(const void *data)
{
    Balloon *b = balloon_start(data, HUGE_OPTIONS);
    uint64_t mem = QEMU_ALIGN_UP(alloc_pages(b, 2 * HUGE_PAGE / PAGE),
                                 HUGE_PAGE);

    send_range(b, IVQ, mem, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);

    b = balloon_migrate(b, HUGE_OPTIONS);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    send_range(b, IVQ, mem + 256 * PAGE, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 1);
    assert_pages(b, mem, "PP");
    send_range(b, IVQ, mem, 256);
    g_assert_cmpint(get_counter(b, "partial-host-pages"), ==, 0);
    assert_pages(b, mem, "00");
    balloon_quit(b);
}

/*
 * Which device it is
 */

/*
 * oom-hold-time
 */

#define HOLD_OPTIONS    ",deflate-on-oom=on,oom-hold-time=5"

/* The driver takes pages out of the balloon, which had @actual of them. */
static void deflate(Balloon *b, uint64_t mem, uint32_t actual, int n)
{
    g_autofree uint32_t *pfns = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        pfns[i] = pfn(mem) + i;
    }
    send_pfns(b, DVQ, pfns, n);
    config_writel(b, CFG(actual), actual - n);
}

static void assert_shown(Balloon *b, uint32_t pages, bool holds)
{
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, pages);
    g_assert_cmpint(get_counter(b, "oom-hold-active"), ==, holds);
}

/* Time passes, until the target is shown again. */
static void assert_hold_ends(Balloon *b, int seconds, uint32_t held,
                             uint32_t target)
{
    qtest_clock_step(b->qts, seconds * SECOND - 1000 * 1000);
    assert_shown(b, held, true);
    qtest_clock_step(b->qts, 2 * 1000 * 1000);
    assert_shown(b, target, false);
    /* The driver is told. */
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
}

static void test_oom_hold(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, 8);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
    config_writel(b, CFG(actual), 60);
    assert_shown(b, 100, false);

    /* Linux moves a page of the balloon. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    deflate(b, mem + PAGE, 61, 1);
    assert_shown(b, 100, false);

    /* Out of memory; and again, before the time is over */
    deflate(b, mem, 60, 2);
    assert_shown(b, 58, true);
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
    qtest_clock_step(b->qts, 3 * SECOND);
    deflate(b, mem, 58, 8);
    assert_shown(b, 50, true);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 1);
    /* What the user sees does not change. */
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - 50 * PAGE);
    assert_hold_ends(b, 5, 50, 100);

    /* Soon afterwards it takes longer. */
    config_writel(b, CFG(actual), 60);
    deflate(b, mem, 60, 1);
    assert_hold_ends(b, 10, 59, 100);
    qtest_clock_step(b->qts, 11 * SECOND);
    deflate(b, mem, 59, 1);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 3);

    /* The user wants something else: what is shown is what he wants. */
    set_balloon(b, RAM_SIZE - 90 * PAGE);
    assert_shown(b, 90, false);

    /* Deflating as the host wants it is no reason. */
    set_balloon(b, RAM_SIZE - 50 * PAGE);
    deflate(b, mem, 58, 8);
    assert_shown(b, 50, false);

    set_balloon(b, RAM_SIZE - 90 * PAGE);
    deflate(b, mem, 50, 1);
    assert_shown(b, 49, true);
    balloon_restart(b, F_BALLOON);
    assert_shown(b, 90, false);
    balloon_quit(b);
}

/* It goes on after migration, if the destination can do that. */
static void test_migrate_oom_hold(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, 8);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    config_writel(b, CFG(actual), 60);
    deflate(b, mem, 60, 8);
    assert_shown(b, 52, true);

    b = balloon_migrate(b, HOLD_OPTIONS);
    assert_hold_ends(b, 5, 52, 100);
    deflate(b, mem, 52, 2);
    assert_shown(b, 50, true);

    b = balloon_migrate(b, ",deflate-on-oom=on");
    assert_shown(b, 100, false);
    balloon_quit(b);
}

static void test_oom_hold_off(const void *data)
{
    Balloon *b = balloon_start(data, ",deflate-on-oom=on");
    uint64_t mem = alloc_pages(b, 8);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    config_writel(b, CFG(actual), 60);
    deflate(b, mem, 60, 8);
    assert_shown(b, 100, false);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);
    balloon_quit(b);
}

/* Whether the device has the property that only the one in Rust has */
static bool have_counters(void)
{
    QTestState *qts = qtest_init("-machine none");
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'device-list-properties',"
                            " 'arguments': {"
                            " 'typename': 'virtio-balloon-device' } }");
    const QListEntry *entry;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(resp, "return"), entry) {
        QDict *property = qobject_to(QDict, qlist_entry_obj(entry));

        found = found || !strcmp(qdict_get_str(property, "name"),
                                 "balloon-counters");
    }
    qobject_unref(resp);
    qtest_quit(qts);
    return found;
}

static void test_device(void)
{
    g_assert_true(have_counters());
}

static void skip_all(void)
{
    g_test_skip("only for the implementation in Rust");
}

static const TransportTest tests[] = {
    { "counters", test_counters },
    { "runs", test_runs },
    { "huge-pages", test_huge_pages, .huge_vms = 1 },
    { "unplug-huge-pages", test_unplug_huge_pages, .pc_only = true,
      .huge_vms = 1 },
    { "bounded", test_bounded },
    { "oom-hold", test_oom_hold },
    { "oom-hold-off", test_oom_hold_off },
    { "migrate-oom-hold", test_migrate_oom_hold },
    { "hinting/cmd-id", test_hinting_cmd_id },
    { "hinting/reset-in-flight", test_hinting_reset },
    { "hinting/unplug-in-flight", test_hinting_unplug, .pc_only = true },
    { "migrate-unfinished", test_migrate_unfinished },
    { "migrate-huge-pages", test_migrate_huge_pages, .huge_vms = 2 },
};

int main(int argc, char **argv)
{
    /* "c" or "rust" */
    const char *expected = getenv("QTEST_BALLOON_DEVICE");

    g_test_init(&argc, &argv, NULL);
    if (expected ? strcmp(expected, "rust") != 0 : !have_counters()) {
        qtest_add_func("virtio-balloon/rust", skip_all);
        return g_test_run();
    }

    qtest_add_func("virtio-balloon/rust", test_device);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
