/*
 * QTest test cases for virtio-balloon: tests that run on all machines of libqos
 *
 * Tests that depend on the transport, or that migrate, are in other programs,
 * see virtio-balloon-*-test.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest-single.h"
#include "qemu/bswap.h"
#include "qemu/module.h"
#include "libqos/qgraph.h"
#include "libqos/virtio-balloon.h"
#include "virtio-balloon-common.h"

/* The path of the device, which has no ID on the command line of qos-test */
#define ANON_PATH       "/machine/peripheral-anon/device[0]"

/* Initialize the device, which libqos has reset. */
static Balloon start(QVirtioBalloon *obj, QGuestAllocator *alloc)
{
    Balloon b = {
        .qts = global_qtest,
        .dev = obj->vdev,
        .alloc = alloc,
        .offered = qvirtio_get_features(obj->vdev),
    };

    balloon_negotiate(&b, F_BALLOON);
    return b;
}

/* Check that the device has not been broken. */
static void finish(Balloon *b)
{
    g_assert_false(is_broken(b));
    balloon_free_queues(b);
}

static void test_negotiate(void *obj, void *data, QGuestAllocator *alloc)
{
    Balloon b = start(obj, alloc);

    g_assert_cmphex(b.offered & F_BALLOON, ==, F_STATS | F_POISON);
    g_assert_cmpint(b.num_queues, ==, 3);
    for (int i = 0; i < b.num_queues; i++) {
        g_assert_cmpint(b.vq[i]->size, ==, 128);
    }
    finish(&b);
}

static void test_config(void *obj, void *data, QGuestAllocator *alloc)
{
    Balloon b = start(obj, alloc);
    /* No test here changes the size of the balloon. */
    int64_t ram = query_balloon(&b);

    g_assert_cmpint(config_readl(&b, CFG(actual)), ==, 0);
    g_assert_cmphex(config_readl(&b, CFG(poison_val)), ==, 0);
    set_balloon(&b, ram - 5 * PAGE);
    g_assert_cmpint(config_readl(&b, CFG(num_pages)), ==, 5);
    g_assert_cmpint(query_balloon(&b), ==, ram);
    set_balloon(&b, ram);
    g_assert_cmpint(config_readl(&b, CFG(num_pages)), ==, 0);
    finish(&b);
}

/*
 * A host page between two others.  It is discarded as a whole, and may consist
 * of more than one balloon page.
 */
typedef struct HostPage {
    uint64_t size;
    uint64_t before, addr, after;
} HostPage;

static HostPage alloc_host_page(Balloon *b)
{
    uint64_t size = MAX(qemu_real_host_page_size(), PAGE);
    uint64_t mem = QEMU_ALIGN_UP(alloc_pages(b, 4 * size / PAGE), size);

    return (HostPage) {
        .size = size,
        .before = mem + size - PAGE,
        .addr = mem + size,
        .after = mem + 2 * size,
    };
}

static void send_host_page(Balloon *b, int q, const HostPage *page)
{
    int n = page->size / PAGE;
    g_autofree uint32_t *pfns = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        pfns[i] = pfn(page->addr) + i;
    }
    send_pfns(b, q, pfns, n);
}

/* Only the memory of the host page is discarded. */
static void assert_discarded(Balloon *b, const HostPage *page)
{
    assert_pages(b, page->before, "P");
    for (uint64_t offset = 0; offset < page->size; offset += PAGE) {
        assert_pages(b, page->addr + offset, "0");
    }
    assert_pages(b, page->after, "P");
}

static void test_inflate(void *obj, void *data, QGuestAllocator *alloc)
{
    Balloon b = start(obj, alloc);
    HostPage page = alloc_host_page(&b);

    send_host_page(&b, IVQ, &page);
    assert_discarded(&b, &page);
    finish(&b);
}

static void test_deflate(void *obj, void *data, QGuestAllocator *alloc)
{
    Balloon b = start(obj, alloc);
    HostPage page = alloc_host_page(&b);

    send_host_page(&b, IVQ, &page);
    send_host_page(&b, DVQ, &page);
    assert_discarded(&b, &page);
    /* The guest can use the memory again. */
    qtest_memset(b.qts, page.addr, PATTERN, PAGE);
    assert_pages(&b, page.addr, "P");
    finish(&b);
}

/* PFNs at which there is no memory do not affect others. */
static void test_bad_pfns(void *obj, void *data, QGuestAllocator *alloc)
{
    static const uint32_t bad[] = { UINT32_MAX, INT32_MAX, 0xf0000000 };
    Balloon b = start(obj, alloc);
    HostPage page = alloc_host_page(&b);

    send_pfns(&b, IVQ, bad, ARRAY_SIZE(bad));
    send_pfns(&b, DVQ, bad, ARRAY_SIZE(bad));
    send_host_page(&b, IVQ, &page);
    assert_discarded(&b, &page);
    finish(&b);
}

static QDict *get_stats(void)
{
    return qtest_qmp_assert_success_ref(
        global_qtest, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats' } }", ANON_PATH);
}

static bool have_stats(void)
{
    QDict *ret = get_stats();
    bool have = qdict_get_int(ret, "last-update") != 0;

    qobject_unref(ret);
    return have;
}

/* The device keeps the buffer, and shows the statistics that are in it. */
static void test_stats(void *obj, void *data, QGuestAllocator *alloc)
{
    struct virtio_balloon_stat stat = {
        .tag = cpu_to_le16(VIRTIO_BALLOON_S_MEMFREE),
        .val = cpu_to_le64(12345),
    };
    Balloon b = start(obj, alloc);
    QDict *ret;

    g_assert_false(have_stats());
    submit(&b, SVQ, put(&b, &stat, sizeof(stat)), sizeof(stat), false);
    WAIT_FOR(have_stats());
    ret = get_stats();
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(ret, "stats"),
                                  "stat-free-memory"), ==, 12345);
    qobject_unref(ret);
    assert_not_used(&b, SVQ);
    finish(&b);
}

static void test_reporting(void *obj, void *data, QGuestAllocator *alloc)
{
    Balloon b = start(obj, alloc);
    HostPage page = alloc_host_page(&b);

    g_assert_cmphex(b.offered & F_REPORTING, ==, F_REPORTING);
    wait_used(&b, b.reporting_vq,
              submit(&b, b.reporting_vq, page.addr, page.size, true));
    assert_discarded(&b, &page);
    finish(&b);
}

static void register_virtio_balloon_test(void)
{
    QOSGraphTestOptions reporting = {
        .edge.extra_device_opts = "free-page-reporting=on",
    };

    qos_add_test("negotiate", "virtio-balloon", test_negotiate, NULL);
    qos_add_test("config", "virtio-balloon", test_config, NULL);
    qos_add_test("inflate", "virtio-balloon", test_inflate, NULL);
    qos_add_test("deflate", "virtio-balloon", test_deflate, NULL);
    qos_add_test("bad-pfns", "virtio-balloon", test_bad_pfns, NULL);
    qos_add_test("stats", "virtio-balloon", test_stats, NULL);
    qos_add_test("reporting", "virtio-balloon", test_reporting, &reporting);
}

libqos_init(register_virtio_balloon_test);
