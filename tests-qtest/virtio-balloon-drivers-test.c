/*
 * QTest test cases for virtio-balloon: what drivers other than that of Linux do
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-common.h"

#define BLOCKS          4
#define BLOCK_PAGES     (HUGE_PAGE / PAGE)

/* Check the first and the last page of each block, like assert_pages(). */
static void assert_blocks(Balloon *b, uint64_t mem, const char *expected)
{
    for (int i = 0; i < BLOCKS; i++) {
        const char page[] = { expected[i], 0 };

        assert_pages(b, mem + i * HUGE_PAGE, page);
        assert_pages(b, mem + (i + 1) * HUGE_PAGE - PAGE, page);
    }
}

/*
 * The driver for Windows allocates aligned blocks of 2 MiB, reports them, and
 * keeps them until memory becomes scarce.  If the device does not answer within
 * a second, the driver tries again.
 */
static void test_windows(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, (BLOCKS + 1) * BLOCK_PAGES);
    Buffer blocks[BLOCKS];
    uint32_t heads[2];
    gint64 begin;

    mem = QEMU_ALIGN_UP(mem, HUGE_PAGE);
    for (int i = 0; i < BLOCKS; i++) {
        blocks[i] = (Buffer) { mem + i * HUGE_PAGE, HUGE_PAGE, true };
    }
    assert_blocks(b, mem, "PPPP");
    begin = g_get_monotonic_time();
    wait_used(b, b->reporting_vq,
              submit_element(b, b->reporting_vq, blocks, BLOCKS));
    g_assert_cmpint(g_get_monotonic_time() - begin, <, G_USEC_PER_SEC);
    assert_blocks(b, mem, "0000");

    /* Memory becomes scarce: two blocks are used again, without notice, */
    qtest_memset(b->qts, mem + HUGE_PAGE, PATTERN, 2 * HUGE_PAGE);
    assert_blocks(b, mem, "0PP0");
    /* and reported later, one by one. */
    for (int i = 1; i < 3; i++) {
        wait_used(b, b->reporting_vq,
                  submit_element(b, b->reporting_vq, &blocks[i], 1));
    }
    assert_blocks(b, mem, "0000");

    /* There is no answer yet: the driver tries again. */
    qtest_memset(b->qts, mem, PATTERN, HUGE_PAGE);
    heads[0] = add_element(b, b->reporting_vq, &blocks[0], 1);
    heads[1] = add_element(b, b->reporting_vq, &blocks[0], 1);
    send_batch(b, b->reporting_vq, heads, 2);
    assert_blocks(b, mem, "0000");
    balloon_quit(b);
}

/*
 * The driver of FreeBSD accepts none of the device's features: it sends no
 * statistics, and does not deflate when it is out of memory.  It sends up to
 * 256 pages at once, in the order in which it has allocated them.
 */
static void test_freebsd(const void *data)
{
    Balloon *b = balloon_boot(data, ",deflate-on-oom=on");
    uint32_t pfns[256];
    uint64_t mem;
    QDict *stats;

    balloon_negotiate(b, 0);
    mem = alloc_pages(b, ARRAY_SIZE(pfns));
    for (int i = 0; i < ARRAY_SIZE(pfns); i++) {
        pfns[i] = pfn(mem) + i;
    }

    /* The host polls for statistics nevertheless. */
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'qom-set', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats-polling-interval', 'value': 1 } }",
        BALLOON_PATH);
    qtest_clock_step(b->qts, 3 * SECOND);

    set_balloon(b, RAM_SIZE - ARRAY_SIZE(pfns) * PAGE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, ARRAY_SIZE(pfns));
    send_pfns(b, IVQ, pfns, ARRAY_SIZE(pfns));
    config_writel(b, CFG(actual), ARRAY_SIZE(pfns));
    g_assert_cmpint(query_balloon(b), ==,
                    RAM_SIZE - ARRAY_SIZE(pfns) * PAGE);
    assert_pages(b, mem, "0000");

    set_balloon(b, RAM_SIZE);
    send_pfns(b, DVQ, pfns, ARRAY_SIZE(pfns));
    config_writel(b, CFG(actual), 0);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE);

    stats = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats' } }", BALLOON_PATH);
    g_assert_cmpint(qdict_get_int(stats, "last-update"), ==, 0);
    qobject_unref(stats);
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "drivers/windows", test_windows },
    { "drivers/freebsd", test_freebsd },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
