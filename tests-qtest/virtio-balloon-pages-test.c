/*
 * QTest test cases for virtio-balloon: inflating, deflating, and bad input
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-common.h"

static void test_inflate_one(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);

    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    /* inflating a page again is harmless */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    balloon_quit(b);
}

static void test_inflate_many(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 260);
    uint32_t pfns[256];
    int i;

    for (i = 0; i < 256; i++) {
        pfns[i] = pfn(mem) + 257 - i;
    }
    send_pfns(b, IVQ, pfns, 256);
    for (i = 0; i < 260; i++) {
        g_assert_cmpint(is_zero(b, mem + i * PAGE), ==, i >= 2 && i < 258);
    }
    balloon_quit(b);
}

/* Pages of an element in any order, some of them more than once */
static void test_inflate_order(const void *data)
{
    static const int order[] = {
        8, 9, 10, 5, 4, 3, 4, 9, 7, 12, 12, 13, 12, 14, 1, 1, 20, 19, 20, 21, 17
    };
    static const char expected[] = "P0P000P0000P000PP0P000P";
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, strlen(expected));
    uint32_t pfns[ARRAY_SIZE(order)];

    for (int i = 0; i < ARRAY_SIZE(order); i++) {
        pfns[i] = pfn(mem) + order[i];
    }
    send_pfns(b, IVQ, pfns, ARRAY_SIZE(order));
    assert_pages(b, mem, expected);
    send_pfns(b, DVQ, pfns, ARRAY_SIZE(order));
    assert_pages(b, mem, expected);
    balloon_quit(b);
}

/* More pages that are not adjacent than a system call could discard */
static void test_inflate_scattered(const void *data)
{
    static const int starts[] = { 0, 1000, 1020, 1024, 2044, 2048, 2490 };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5000);
    uint32_t pfns[2500];

    for (int i = 0; i < ARRAY_SIZE(pfns); i++) {
        pfns[i] = pfn(mem) + 2 * i;
    }
    send_pfns(b, IVQ, pfns, ARRAY_SIZE(pfns));
    for (int i = 0; i < ARRAY_SIZE(starts); i++) {
        assert_pages(b, mem + 2 * starts[i] * PAGE, "0P0P0P0P0P0P0P0P0P0P");
    }
    send_pfns(b, DVQ, pfns, ARRAY_SIZE(pfns));
    assert_pages(b, mem, "0P0P");
    balloon_quit(b);
}

/* Pages of an element that are in different memory regions, in turns */
static void test_inflate_regions(const void *data)
{
    Balloon *b = balloon_start(data, " -m slots=1,maxmem=1G"
                               " -object memory-backend-ram,id=ram1,size=128M"
                               " -device pc-dimm,memdev=ram1,addr=0x100000000");
    const uint64_t dimm = 4 * GiB;
    uint64_t mem = alloc_pages(b, 6);
    uint32_t pfns[] = {
        pfn(mem), pfn(dimm), pfn(dimm) + 1, pfn(mem) + 1, pfn(mem) + 2,
        pfn(dimm) + 5, pfn(mem) + 4, pfn(dimm) + 3,
    };

    qtest_memset(b->qts, dimm, PATTERN, 6 * PAGE);
    send_pfns(b, IVQ, pfns, ARRAY_SIZE(pfns));
    assert_pages(b, mem, "000P0P");
    assert_pages(b, dimm, "00P0P0");
    send_pfns(b, DVQ, pfns, ARRAY_SIZE(pfns));
    assert_pages(b, mem, "000P0P");
    assert_pages(b, dimm, "00P0P0");
    balloon_quit(b);
}

/* Many elements at once are returned in order */
static void test_inflate_batch(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 101);
    uint32_t heads[50];
    int i;

    for (i = 0; i < 50; i++) {
        uint32_t le = cpu_to_le32(pfn(mem) + 1 + 2 * i);

        heads[i] = add_element(b, IVQ, &(Buffer){ put(b, &le, 4), 4 }, 1);
    }
    send_batch(b, IVQ, heads, 50);
    for (i = 0; i < 101; i++) {
        g_assert_cmpint(is_zero(b, mem + i * PAGE), ==, i & 1);
    }
    balloon_quit(b);
}

/* As many elements as the ring has room for, which have to be used in order */
static void test_inflate_in_order(const void *data)
{
    Balloon *b = balloon_start(data, ",in_order=on");
    int n = b->vq[IVQ]->size;
    g_autofree uint32_t *heads = g_new(uint32_t, n);
    uint64_t mem = alloc_pages(b, n);
    uint64_t pfns = guest_alloc(b->alloc, n * sizeof(uint32_t));

    for (int round = 0; round < 3; round++) {
        qtest_memset(b->qts, mem, PATTERN, n * PAGE);
        qvirtqueue_reset_pool(b->vq[IVQ]);
        for (int i = 0; i < n; i++) {
            Buffer buffer = { pfns + i * sizeof(uint32_t), sizeof(uint32_t) };
            uint32_t le = cpu_to_le32(pfn(mem) + i);

            qtest_memwrite(b->qts, buffer.addr, &le, sizeof(le));
            heads[i] = add_element(b, IVQ, &buffer, 1);
        }
        send_batch(b, IVQ, heads, n);
        for (int i = 0; i < n; i++) {
            g_assert_true(is_zero(b, mem + i * PAGE));
        }
    }
    balloon_quit(b);
}

/* PFNs that are divided between descriptors */
static void test_inflate_chain(const void *data)
{
    static const int parts[] = { 3, 1, 6, 2 };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5);
    uint32_t le[] = {
        cpu_to_le32(pfn(mem) + 3),
        cpu_to_le32(pfn(mem) + 1),
        cpu_to_le32(pfn(mem)),
    };
    Buffer buffers[ARRAY_SIZE(parts)] = {};
    int offset = 0;

    for (int i = 0; i < ARRAY_SIZE(parts); i++) {
        buffers[i].addr = put(b, (char *)le + offset, parts[i]);
        buffers[i].len = parts[i];
        offset += parts[i];
    }
    wait_used(b, IVQ, submit_element(b, IVQ, buffers, ARRAY_SIZE(buffers)));
    assert_pages(b, mem, "00P0P");
    balloon_quit(b);
}

static void test_inflate_indirect(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t le[] = { cpu_to_le32(pfn(mem) + 2), cpu_to_le32(pfn(mem)) };
    QVRingIndirectDesc *indirect =
        qvring_indirect_desc_setup(b->qts, b->dev, b->alloc, 2);
    uint32_t head;

    qvring_indirect_desc_add(b->dev, b->qts, indirect, put(b, &le[0], 4), 4,
                             false);
    qvring_indirect_desc_add(b->dev, b->qts, indirect, put(b, &le[1], 4), 4,
                             false);
    head = qvirtqueue_add_indirect(b->qts, b->vq[IVQ], indirect);
    qvirtqueue_kick(b->qts, b->dev, b->vq[IVQ], head);
    wait_used(b, IVQ, head);
    assert_pages(b, mem, "0P0P");
    g_free(indirect);
    balloon_quit(b);
}

static void test_deflate(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t pfns[] = { pfn(mem) + 1, pfn(mem) + 2 };

    /* The contents of a page are kept, whether or not it was in the balloon */
    send_pfns(b, IVQ, pfns, 1);
    send_pfns(b, DVQ, pfns, 2);
    assert_pages(b, mem, "P0PP");
    qtest_memset(b->qts, mem + PAGE, PATTERN, PAGE);
    assert_pages(b, mem, "PPPP");
    balloon_quit(b);
}

static void test_interrupt(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);
    uint32_t le = cpu_to_le32(pfn(mem));
    uint64_t addr = put(b, &le, 4);
    uint32_t len = UINT32_MAX;

    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));
    qvirtio_wait_used_elem(b->qts, b->dev, b->vq[IVQ],
                           submit(b, IVQ, addr, 4, false), &len, TIMEOUT_US);
    g_assert_cmpint(len, ==, 0);
    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));

    /* The driver does not want to be interrupted */
    qtest_writew(b->qts, b->vq[IVQ]->avail, VRING_AVAIL_F_NO_INTERRUPT);
    wait_used(b, IVQ, submit(b, IVQ, addr, 4, false));
    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));
    balloon_quit(b);
}

/*
 * Bad input
 */

static void test_bad_pfns(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);
    uint32_t bad[] = {
        UINT32_MAX,
        INT32_MAX,
        pfn(RAM_SIZE * 64),
        /*
         * Nothing is mapped at the first address; at the others there are
         * devices
         */
        0xd0000,
        b->t->pci ? 0xfee00 : pfn(b->mmio.addr),
        0xfffff,
    };

    for (int q = IVQ; q <= DVQ; q++) {
        send_pfns(b, q, bad, ARRAY_SIZE(bad));
        g_assert_false(is_broken(b));
    }

    /* Valid PFNs between the bad ones are handled */
    bad[1] = pfn(mem) + 2;
    bad[5] = pfn(mem);
    send_pfns(b, IVQ, bad, ARRAY_SIZE(bad));
    assert_pages(b, mem, "0P0");
    g_assert_false(is_broken(b));
    balloon_quit(b);
}

/* ROM, and other regions below 1 MiB on a PC */
static void test_rom(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint8_t before[0x10000], after[0x10000];
    uint32_t pfns[16];

    qtest_memread(b->qts, 0xf0000, before, sizeof(before));
    for (int i = 0; i < 16; i++) {
        pfns[i] = 0xf0 + i;
    }
    send_pfns(b, IVQ, pfns, 16);
    qtest_memread(b->qts, 0xf0000, after, sizeof(after));
    g_assert_cmpmem(before, sizeof(before), after, sizeof(after));

    for (int i = 0; i < 16; i++) {
        pfns[i] = 0xffff0 + i;
    }
    send_pfns(b, IVQ, pfns, 16);
    qtest_memread(b->qts, 0xffff0000, after, sizeof(after));
    g_assert_cmpmem(before, sizeof(before), after, sizeof(after));
    balloon_quit(b);
}

static void test_truncated(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);
    uint32_t le[] = { cpu_to_le32(pfn(mem)), cpu_to_le32(pfn(mem) + 1) };
    uint64_t addr = put(b, le, sizeof(le));

    for (int len = 1; len < 4; len++) {
        wait_used(b, IVQ, submit(b, IVQ, addr, len, false));
        assert_pages(b, mem, "PPP");
    }
    for (int len = 5; len < 8; len++) {
        wait_used(b, IVQ, submit(b, IVQ, addr, len, false));
        assert_pages(b, mem, "0PP");
    }
    g_assert_false(is_broken(b));
    balloon_quit(b);
}

/* An element has no data for the device to read. */
static void test_in_only(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 2);

    for (int q = IVQ; q <= DVQ; q++) {
        wait_used(b, q, submit(b, q, mem, PAGE, true));
    }
    assert_pages(b, mem, "PP");
    g_assert_false(is_broken_for_qmp(b));
    balloon_quit(b);
}

/*
 * Descriptors of length zero are not allowed. The device recovers with a reset.
 */
static void test_zero_length(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 2);

    submit(b, IVQ, mem, 0, false);
    assert_not_used(b, IVQ);
    assert_broken(b);
    /* All queues are affected */
    submit(b, DVQ, mem, 4, false);
    assert_not_used(b, DVQ);

    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken_for_qmp(b));
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0P");
    balloon_quit(b);
}

/* A descriptor that is chained to itself */
static void submit_loop(Balloon *b, int q, uint64_t mem)
{
    QVirtQueue *vq = b->vq[q];
    uint32_t head = qvirtqueue_add(b->qts, vq, mem, 4, false, true);

    qtest_writew(b->qts, vq->desc + 16 * head + 14, head);
    qvirtqueue_kick(b->qts, b->dev, vq, head);
}

/* Far more elements than fit into the queue */
static void submit_too_many(Balloon *b, int q, uint64_t mem)
{
    qvirtqueue_set_avail_idx(b->qts, b->dev, b->vq[q], 0x8000);
    b->dev->bus->virtqueue_kick(b->dev, b->vq[q]);
}

/* A descriptor that does not exist */
static void submit_bad_head(Balloon *b, int q, uint64_t mem)
{
    qvirtqueue_kick(b->qts, b->dev, b->vq[q], 0xffff);
}

/* A writable descriptor before a readable one */
static void submit_bad_order(Balloon *b, int q, uint64_t mem)
{
    submit_element(b, q, (Buffer[]){ { mem, 4, true }, { mem, 4, false } }, 2);
}

/* Invalid rings break the device, but do not harm QEMU. */
static void test_bad_rings(const void *data)
{
    static void (*const submits[])(Balloon *b, int q, uint64_t mem) = {
        submit_loop, submit_too_many, submit_bad_head, submit_bad_order,
    };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);

    for (int i = 0; i < ARRAY_SIZE(submits); i++) {
        for (int q = IVQ; q <= SVQ; q++) {
            submits[i](b, q, mem);
            assert_not_used(b, q);
            assert_broken(b);
            balloon_restart(b, F_BALLOON);
            g_assert_false(is_broken_for_qmp(b));
        }
    }
    assert_pages(b, mem, "P");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    balloon_quit(b);
}

/* A buffer at an address without memory reads as zeroes. */
static void test_bad_buffer(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);

    for (int q = IVQ; q <= DVQ; q++) {
        wait_used(b, q, submit(b, q, 0xffffffff00000ULL, 4, false));
    }
    g_assert_false(is_broken_for_qmp(b));
    assert_pages(b, mem, "P");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "inflate/one", test_inflate_one },
    { "inflate/many", test_inflate_many },
    { "inflate/order", test_inflate_order },
    { "inflate/scattered", test_inflate_scattered },
    { "inflate/regions", test_inflate_regions, .pc_only = true },
    { "inflate/batch", test_inflate_batch },
    { "inflate/in-order", test_inflate_in_order },
    { "inflate/chain", test_inflate_chain },
    { "inflate/indirect", test_inflate_indirect },
    { "inflate/interrupt", test_interrupt },
    { "inflate/bad-pfns", test_bad_pfns },
    { "inflate/rom", test_rom, .pc_only = true },
    { "inflate/truncated", test_truncated },
    { "inflate/in-only", test_in_only },
    { "inflate/zero-length", test_zero_length },
    { "inflate/bad-rings", test_bad_rings },
    { "inflate/bad-buffer", test_bad_buffer },
    { "deflate", test_deflate },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
