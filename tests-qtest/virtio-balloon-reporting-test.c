/*
 * QTest test cases for virtio-balloon: free page reporting
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-common.h"

static void report(Balloon *b, uint64_t addr, uint32_t len)
{
    wait_used(b, b->reporting_vq, submit(b, b->reporting_vq, addr, len, true));
}

static void test_reporting(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 6);
    Buffer ranges[] = {
        { mem, PAGE, true },
        { mem + 4 * PAGE, 2 * PAGE, true },
    };

    report(b, mem + PAGE, 2 * PAGE);
    assert_pages(b, mem, "P00PPP");

    /* Several ranges in one element */
    wait_used(b, b->reporting_vq,
              submit_element(b, b->reporting_vq, ranges, ARRAY_SIZE(ranges)));
    assert_pages(b, mem, "000P00");
    balloon_quit(b);
}

static void test_reporting_bad(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t le = cpu_to_le32(pfn(mem));

    /* Ranges that are not whole pages */
    report(b, mem + 1, PAGE);
    report(b, mem, PAGE - 1);
    report(b, mem + 512, 2 * PAGE - 512);
    assert_pages(b, mem, "PPPP");
    /* A buffer that the device cannot write to */
    wait_used(b, b->reporting_vq,
              submit(b, b->reporting_vq, put(b, &le, 4), 4, false));
    assert_pages(b, mem, "PPPP");
    g_assert_false(is_broken(b));
    report(b, mem + 3 * PAGE, PAGE);
    assert_pages(b, mem, "PPP0");
    balloon_quit(b);
}

/* An element with ranges in two blocks of memory, of different kinds */
static void test_reporting_blocks(const void *data)
{
    const uint64_t first = 60 * MiB, second = 100 * MiB;
    Balloon *b = balloon_start(
        data, ",free-page-reporting=on"
        " -object memory-backend-ram,id=private,size=64M"
        " -object memory-backend-memfd,id=shared,size=64M,share=on"
        " -numa node,memdev=private -numa node,memdev=shared");
    Buffer ranges[] = {
        { first, PAGE, true },
        { second, PAGE, true },
        { first + 2 * PAGE, PAGE, true },
    };

    qtest_memset(b->qts, first, PATTERN, 4 * PAGE);
    qtest_memset(b->qts, second, PATTERN, 4 * PAGE);
    wait_used(b, b->reporting_vq,
              submit_element(b, b->reporting_vq, ranges, ARRAY_SIZE(ranges)));
    assert_pages(b, first, "0P0P");
    assert_pages(b, second, "0PPP");
    balloon_quit(b);
}

static void test_reporting_poison(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 2);

    config_writel(b, CFG(poison_val), PATTERN);
    report(b, mem, PAGE);
    assert_pages(b, mem, "PP");
    /* Inflating is not affected */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0");
    config_writel(b, CFG(poison_val), 0);
    report(b, mem, PAGE);
    assert_pages(b, mem, "00");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "reporting/good", test_reporting },
    { "reporting/bad", test_reporting_bad },
    { "reporting/blocks", test_reporting_blocks, .pc_only = true },
    { "reporting/poison", test_reporting_poison },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
