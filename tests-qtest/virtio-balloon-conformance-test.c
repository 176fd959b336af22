/*
 * QTest test cases for virtio-balloon: what drivers must not do, or hardly do
 *
 * Section numbers are those of version 1.3 of the virtio specification.  If a
 * driver breaks a rule, the specification rarely says what follows.  Then QEMU
 * must neither stop nor hang, memory that the driver did not mention must keep
 * its contents, and the device must work again after a reset.  Either the
 * element is returned, or the device needs a reset (2.1.2).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qemu/bswap.h"
#include "virtio-balloon-common.h"
#include "virtio-balloon-queue-reset.h"
#include "hw/pci/pci_regs.h"
#include "standard-headers/linux/virtio_mmio.h"
#include "standard-headers/linux/virtio_pci.h"

/* Where the RAM begins that the driver uses */
static uint64_t ram_start(Balloon *b)
{
    return !strcmp(b->t->machine, "virt") ? 0x40000000 : 0;
}

/*
 * Wait until the device has returned elements that the driver has not seen yet,
 * or needs a reset.  Returns whether it has returned the elements.
 */
static bool wait_returned(Balloon *b, int q, int n)
{
    uint16_t expected = b->vq[q]->last_used_idx + n;

    WAIT_FOR(used_idx(b, q) == expected || is_broken_for_qmp(b));
    if (used_idx(b, q) != expected) {
        return false;
    }
    b->vq[q]->last_used_idx = expected;
    return true;
}

/* Check that a device works after a reset, whatever happened before. */
static void check_restart(Balloon *b)
{
    uint64_t mem;

    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken_for_qmp(b));
    mem = alloc_pages(b, 3);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    send_pfns(b, DVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
}

/* Write PFNs to guest memory. */
static void write_pfns(Balloon *b, uint64_t addr, const uint32_t *pfns, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t le = cpu_to_le32(pfns[i]);

        qtest_memwrite(b->qts, addr + i * sizeof(le), &le, sizeof(le));
    }
}

static uint64_t put_pfns(Balloon *b, const uint32_t *pfns, int n)
{
    uint64_t addr = guest_alloc(b->alloc, n * sizeof(*pfns));

    write_pfns(b, addr, pfns, n);
    return addr;
}

/* Write a descriptor of a split ring, or of an indirect table for one. */
static void write_desc(Balloon *b, uint64_t table, int i, Buffer buffer,
                       uint16_t flags, uint16_t next)
{
    struct vring_desc desc = {
        .addr = cpu_to_le64(buffer.addr),
        .len = cpu_to_le32(buffer.len),
        .flags = cpu_to_le16(flags |
                             (buffer.write ? VRING_DESC_F_WRITE : 0)),
        .next = cpu_to_le16(next),
    };

    qtest_memwrite(b->qts, table + i * sizeof(desc), &desc, sizeof(desc));
}

/* Make an element of the first lap available, without notifying the device. */
static uint32_t prepare(Balloon *b, int q, Buffer buffer)
{
    uint32_t head = add_element(b, q, &buffer, 1);
    uint16_t idx = qtest_readw(b->qts, b->vq[q]->avail +
                               offsetof(struct vring_avail, idx));

    qtest_writew(b->qts, b->vq[q]->avail +
                 offsetof(struct vring_avail, ring) + 2 * idx, head);
    qvirtqueue_set_avail_idx(b->qts, b->dev, b->vq[q], idx + 1);
    return head;
}

/* Make an element available that consists of one descriptor with flags. */
static uint32_t submit_flags(Balloon *b, int q, Buffer buffer, uint16_t flags,
                             uint16_t next)
{
    uint32_t head = add_element(b, q, &buffer, 1);

    write_desc(b, b->vq[q]->desc, head, buffer, flags, next);
    qvirtqueue_kick(b->qts, b->dev, b->vq[q], head);
    return head;
}

/*
 * Pages that the device itself uses
 *
 * The device may modify a page of the balloon after it has seen its PFN
 * (5.5.6.2), so a driver that sends the pages of a ring has none any more.  The
 * same page is in the balloon and is used, which a driver must not do
 * (5.5.6.1).
 */

/*
 * Reset a queue, and enable it with a ring whose three parts are in pages of
 * their own (2.6.1).
 */
static void separate_ring(Balloon *b, int q)
{
    QVirtQueue *vq = b->vq[q];
    uint64_t *const parts[] = { &vq->desc, &vq->avail, &vq->used };

    reset_queue(b, q);
    guest_free(b->alloc, vq->desc);
    for (int i = 0; i < ARRAY_SIZE(parts); i++) {
        *parts[i] = guest_alloc(b->alloc, PAGE);
        qtest_memset(b->qts, *parts[i], 0, PAGE);
    }
    qvirtqueue_reset_pool(vq);
    vq->last_used_idx = 0;
    b->dev->bus->set_queue_address(b->dev, vq);
    write_common(b, q, VIRTIO_PCI_COMMON_Q_ENABLE, 1);
}

static void test_descriptors(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3), table;
    uint32_t pfns[2] = { 0, pfn(mem) + 1 }, heads[2];

    separate_ring(b, IVQ);
    table = b->vq[IVQ]->desc;
    pfns[0] = pfn(table);
    send_pfns(b, IVQ, pfns, 2);
    g_assert_true(is_zero(b, table));
    assert_pages(b, mem, "P0P");

    /* The driver can write descriptors to the new page. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "00P");

    /* The device may not have read the second element when this happens. */
    for (int i = 0; i < 2; i++) {
        heads[i] = add_element(b, IVQ,
                               &(Buffer){ put_pfns(b, pfns, 2), 8 }, 1);
    }
    make_available(b, IVQ, heads, 2);
    if (!wait_returned(b, IVQ, 2)) {
        assert_broken(b);
    }
    assert_pages(b, mem, "00P");
    check_restart(b);
    balloon_quit(b);
}

static bool has_consumed(Balloon *b, int64_t idx)
{
    return queue_status(b, IVQ, "last-avail-idx") == idx &&
           used_idx(b, IVQ) == idx;
}

/*
 * The index of the available ring becomes zero.  To the device, the driver has
 * then made 65534 elements available, which is not allowed either (2.7.13).
 */
static void test_available(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);
    uint32_t pfns[2] = { 0, pfn(mem) + 1 };

    separate_ring(b, IVQ);
    send_pfns(b, IVQ, &pfns[1], 1);
    pfns[0] = pfn(b->vq[IVQ]->avail);
    submit(b, IVQ, put_pfns(b, pfns, 2), 8, false);
    WAIT_FOR(has_consumed(b, 0) || is_broken_for_qmp(b));
    assert_pages(b, mem, "P0P");
    check_restart(b);

    /* A reset while the device may still be working on these elements */
    separate_ring(b, IVQ);
    mem = alloc_pages(b, 3);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    pfns[0] = pfn(b->vq[IVQ]->avail);
    submit(b, IVQ, put_pfns(b, pfns, 1), 4, false);
    check_restart(b);
    assert_pages(b, mem, "P0P");
    balloon_quit(b);
}

/*
 * The device writes elements to the new page of the ring (2.7.8).  Those that
 * the driver had not read yet would be lost.
 */
static void test_used(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5);
    uint32_t used = pfn(b->vq[IVQ]->used);
    uint32_t heads[3];

    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    for (int i = 0; i < 3; i++) {
        uint32_t pfns[] = { i == 0 ? used : pfn(mem) + 1, pfn(mem) + 3 };

        heads[i] = add_element(b, IVQ,
                               &(Buffer){ put_pfns(b, pfns, 2), 8 }, 1);
    }
    make_available(b, IVQ, heads, 3);
    g_assert_true(wait_returned(b, IVQ, 3));
    for (int i = 0; i < 3; i++) {
        uint64_t elem = b->vq[IVQ]->used +
                        offsetof(struct vring_used, ring[1 + i]);

        g_assert_cmpint(qtest_readl(b->qts, elem), ==, heads[i]);
        g_assert_cmpint(qtest_readl(b->qts, elem + 4), ==, 0);
    }
    /* The driver can go on with this ring. */
    assert_pages(b, mem, "P0P0P");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "00P0P");
    g_assert_false(is_broken_for_qmp(b));
    check_restart(b);
    balloon_quit(b);
}

/*
 * A ring as libqos and legacy drivers lay it out: the descriptors and the
 * available ring share a page (2.7.2).  When it is read again, the element has
 * a buffer of length zero.
 */
static void test_descriptors_and_available(const void *data)
{
    Balloon *b = balloon_start(data, "");
    QVirtQueue *vq = b->vq[IVQ];
    uint64_t mem = alloc_pages(b, 3);
    uint32_t pfns[2] = { pfn(vq->desc), pfn(mem) + 1 };

    g_assert_cmphex(vq->desc & ~(PAGE - 1ULL), ==, vq->avail & ~(PAGE - 1ULL));
    submit(b, IVQ, put_pfns(b, pfns, 2), 8, false);
    g_assert_true(wait_returned(b, IVQ, 1));
    g_assert_true(is_zero(b, vq->desc));
    b->dev->bus->virtqueue_kick(b->dev, vq);
    WAIT_FOR(is_broken_for_qmp(b));
    assert_broken(b);
    assert_pages(b, mem, "P0P");
    check_restart(b);
    balloon_quit(b);
}

/* The page of an indirect table (2.7.5.3) */
static void test_indirect_table(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3), table = guest_alloc(b->alloc, PAGE);
    uint32_t pfns[2] = { pfn(table), pfn(mem) + 1 };
    Buffer buffer = { put_pfns(b, pfns, 2), 4 };

    qtest_memset(b->qts, table, 0, PAGE);
    write_desc(b, table, 0, buffer, VRING_DESC_F_NEXT, 1);
    buffer.addr += 4;
    write_desc(b, table, 1, buffer, 0, 0);
    wait_used(b, IVQ,
              submit_flags(b, IVQ, (Buffer){ table, 2 * 16 },
                           VRING_DESC_F_INDIRECT, 0));
    g_assert_true(is_zero(b, table));
    assert_pages(b, mem, "P0P");

    /* Now the table has buffers of length zero. */
    submit_flags(b, IVQ, (Buffer){ table, 2 * 16 }, VRING_DESC_F_INDIRECT, 0);
    WAIT_FOR(is_broken_for_qmp(b));
    assert_not_used(b, IVQ);
    check_restart(b);
    balloon_quit(b);
}

/*
 * The page of the PFNs of this element.  When the device has seen its PFN, the
 * driver does not know what the rest of the page contains (5.5.6.2), so it must
 * not expect anything of the PFNs that follow.
 */
static void test_own_pfns(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5), page = alloc_pages(b, 1);
    uint32_t pfns[3] = { pfn(mem) + 1, pfn(page) };

    /* As the last PFN of a buffer */
    write_pfns(b, page, pfns, 2);
    wait_used(b, IVQ, submit(b, IVQ, page, 8, false));
    g_assert_true(is_zero(b, page));
    assert_pages(b, mem, "P0PPP");

    /* As the first PFN of a buffer */
    pfns[0] = pfn(page);
    pfns[1] = pfn(mem) + 3;
    write_pfns(b, page, pfns, 2);
    wait_used(b, IVQ, submit(b, IVQ, page, 8, false));
    g_assert_true(is_zero(b, page));
    assert_pages(b, mem, is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");
    g_assert_false(is_broken_for_qmp(b));
    check_restart(b);
    balloon_quit(b);
}

/* The page of the PFNs of the next element (5.5.6.2) */
static void test_next_pfns(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5), page = alloc_pages(b, 1);
    uint32_t pfns[] = { pfn(mem) + 1, pfn(page) }, heads[3];

    write_pfns(b, page, &(uint32_t){ pfn(mem) + 3 }, 1);
    heads[0] = add_element(b, IVQ, &(Buffer){ put_pfns(b, pfns, 2), 8 }, 1);
    heads[1] = add_element(b, IVQ, &(Buffer){ page, 4 }, 1);
    heads[2] = add_element(b, IVQ, &(Buffer){ put_pfns(b, pfns, 1), 4 }, 1);
    send_batch(b, IVQ, heads, 3);
    g_assert_true(is_zero(b, page));
    assert_pages(b, mem, is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");
    g_assert_false(is_broken_for_qmp(b));
    check_restart(b);
    balloon_quit(b);
}

/*
 * A page is reported and inflated at the same time.  The driver uses a reported
 * page before it is returned (5.5.6.7.1); each element is returned anyway.
 */
static void test_reported_and_inflated(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 3);
    uint64_t pfns = put_pfns(b, &(uint32_t){ pfn(mem) + 1 }, 1);
    Buffer inflate = { pfns, 4 }, report = { mem + PAGE, PAGE, true };
    const int orders[][2] = {
        { IVQ, b->reporting_vq }, { b->reporting_vq, IVQ },
    };

    for (int i = 0; i < ARRAY_SIZE(orders); i++) {
        uint32_t heads[2];

        qtest_memset(b->qts, mem, PATTERN, 3 * PAGE);
        for (int j = 0; j < 2; j++) {
            int q = orders[i][j];

            heads[j] = submit_element(b, q, q == IVQ ? &inflate : &report, 1);
        }
        for (int j = 0; j < 2; j++) {
            wait_used(b, orders[i][j], heads[j]);
        }
        assert_pages(b, mem, "P0P");
    }
    send_pfns(b, DVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    qtest_memset(b->qts, mem + PAGE, PATTERN, PAGE);
    assert_pages(b, mem, "PPP");
    g_assert_false(is_broken_for_qmp(b));
    balloon_quit(b);
}

/*
 * The page of the used ring of the queue with which it is reported.  It is in
 * use, so it must not be reported (5.5.6.7.1).
 */
static void test_reported_ring(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    int q = b->reporting_vq;
    uint64_t mem = alloc_pages(b, 3);
    Buffer report[] = {
        { b->vq[q]->used, PAGE, true }, { mem + PAGE, PAGE, true },
    };

    for (int i = 0; i < 3; i++) {
        wait_used(b, q, submit_element(b, q, report, 2));
    }
    assert_pages(b, mem, "P0P");
    g_assert_false(is_broken_for_qmp(b));
    check_restart(b);
    balloon_quit(b);
}

/*
 * Queues and configuration
 */

/* Notify the device of a queue with any index. */
static void notify(Balloon *b, uint16_t index)
{
    if (!b->t->pci) {
        qtest_writel(b->qts, b->mmio.addr + VIRTIO_MMIO_QUEUE_NOTIFY, index);
    } else if (b->offered & BIT64(VIRTIO_F_VERSION_1)) {
        uint64_t offset = index * b->pci->notify_off_multiplier;

        /* Other addresses are not in the structure (4.1.4.4). */
        if (offset < PAGE) {
            qpci_io_writew(b->pci->pdev, b->pci->bar,
                           b->pci->notify_cfg_offset + offset, index);
        }
    } else {
        qpci_io_writew(b->pci->pdev, b->pci->bar, VIRTIO_PCI_QUEUE_NOTIFY,
                       index);
    }
}

/* Configure a queue as if it existed. */
static void enable_queue(Balloon *b, uint16_t index, uint64_t addr)
{
    b->dev->bus->queue_select(b->dev, index);
    /* 4.1.4.3.1, 4.2.2 */
    g_assert_cmpint(b->dev->bus->get_queue_size(b->dev), ==, 0);
    b->dev->bus->set_queue_address(
        b->dev, &(QVirtQueue){
            .vdev = b->dev, .index = index, .size = 32, .align = PAGE,
            .desc = addr, .avail = addr + PAGE, .used = addr + 2 * PAGE,
        });
    if (b->t->pci && (b->offered & BIT64(VIRTIO_F_VERSION_1))) {
        qpci_io_writew(b->pci->pdev, b->pci->bar, b->pci->common_cfg_offset +
                       VIRTIO_PCI_COMMON_Q_ENABLE, 1);
    }
}

/*
 * The queue for reports only exists with the feature (5.5.2).  Without it, the
 * driver sees that the size is zero, and nothing that it does has an effect.
 */
static void test_missing_queues(const void *data)
{
    static const uint16_t queues[] = { 3, 4, 5, 63, 1023, 1024, UINT16_MAX };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3), ring = guest_alloc(b->alloc, 3 * PAGE);

    g_assert_cmpint(b->num_queues, ==, 3);
    for (int i = 0; i < ARRAY_SIZE(queues); i++) {
        uint16_t *index = &(uint16_t){ cpu_to_le16(1) };

        qtest_memset(b->qts, ring, 0, 3 * PAGE);
        write_desc(b, ring, 0, (Buffer){ mem, PAGE, true }, 0, 0);
        qtest_memwrite(b->qts, ring + PAGE +
                       offsetof(struct vring_avail, idx), index, 2);
        if (queues[i] < 1024) {
            enable_queue(b, queues[i], ring);
        }
        notify(b, queues[i]);
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
        g_assert_true(is_zero(b, ring + 2 * PAGE));
        g_assert_false(is_broken_for_qmp(b));
    }
    assert_pages(b, mem, "PPP");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    balloon_quit(b);
}

/*
 * The driver has not accepted the feature, so there should be no such queue
 * (5.5.2).  As differences.md says, the queues depend on what is offered, so it
 * exists, and its elements are returned.
 */
static void test_reporting_not_accepted(const void *data)
{
    Balloon *b = balloon_boot(data, ",free-page-reporting=on");
    uint64_t mem;

    balloon_negotiate(b, F_BALLOON & ~F_REPORTING);
    mem = alloc_pages(b, 3);
    wait_used(b, b->reporting_vq,
              submit(b, b->reporting_vq, mem + PAGE, PAGE, true));
    g_assert_false(is_broken_for_qmp(b));
    assert_pages(b, mem, is_zero(b, mem + PAGE) ? "P0P" : "PPP");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    balloon_quit(b);
}

/* The window of the PCI configuration space into the BARs (4.1.4.9) */
typedef struct Window {
    QPCIDevice *pdev;
    uint8_t cap;
} Window;

static Window find_window(Balloon *b)
{
    Window w = { .pdev = b->pci->pdev };

    do {
        w.cap = qpci_find_capability(w.pdev, PCI_CAP_ID_VNDR, w.cap);
        /* A device must have this capability (4.1.4.9.1). */
        g_assert_cmphex(w.cap, !=, 0);
    } while (qpci_config_readb(w.pdev, w.cap +
                               offsetof(struct virtio_pci_cap, cfg_type)) !=
             VIRTIO_PCI_CAP_PCI_CFG);
    return w;
}

static uint8_t set_window(Balloon *b, Window w, uint32_t offset, uint32_t len)
{
    qpci_config_writeb(w.pdev, w.cap + offsetof(struct virtio_pci_cap, bar),
                       b->pci->bar_idx);
    qpci_config_writel(w.pdev, w.cap + offsetof(struct virtio_pci_cap, offset),
                       offset);
    qpci_config_writel(w.pdev, w.cap + offsetof(struct virtio_pci_cap, length),
                       len);
    return w.cap + offsetof(struct virtio_pci_cfg_cap, pci_cfg_data);
}

static uint32_t window_read(Balloon *b, Window w, uint32_t offset, uint32_t len)
{
    return qpci_config_readl(w.pdev, set_window(b, w, offset, len));
}

static void window_write(Balloon *b, Window w, uint32_t offset, uint32_t len,
                         uint32_t value)
{
    qpci_config_writel(w.pdev, set_window(b, w, offset, len), value);
}

static void test_pci_cfg(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Window w = find_window(b);
    uint32_t config = b->pci->device_cfg_offset;
    uint64_t mem = alloc_pages(b, 3);
    uint32_t head;

    set_balloon(b, RAM_SIZE - 0x1234 * PAGE);
    g_assert_cmphex(window_read(b, w, config + CFG(num_pages), 4), ==, 0x1234);
    g_assert_cmphex(window_read(b, w, config + CFG(num_pages), 2) & 0xffff, ==,
                    0x1234);
    g_assert_cmphex(window_read(b, w, config + CFG(num_pages), 1) & 0xff, ==,
                    0x34);
    g_assert_cmphex(window_read(b, w, config + CFG(num_pages) + 1, 1) & 0xff,
                    ==, 0x12);

    window_write(b, w, config + CFG(actual), 4, 0x1011);
    g_assert_cmphex(config_readl(b, CFG(actual)), ==, 0x1011);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - 0x1011 * PAGE);
    /* Only the first bytes of the data are written. */
    window_write(b, w, config + CFG(actual), 2, 0xffff0203);
    g_assert_cmphex(config_readl(b, CFG(actual)), ==, 0x0203);
    window_write(b, w, config + CFG(actual) + 1, 1, 0xffffff04);
    g_assert_cmphex(config_readl(b, CFG(actual)), ==, 0x0403);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - 0x0403 * PAGE);
    /* This field is read-only for the driver (5.5.4). */
    window_write(b, w, config + CFG(num_pages), 4, 7);
    g_assert_cmphex(config_readl(b, CFG(num_pages)), ==, 0x1234);

    /* Notifications can be sent through the window, too. */
    head = prepare(b, IVQ, (Buffer){
        put_pfns(b, &(uint32_t){ pfn(mem) + 1 }, 1), 4
    });
    window_write(b, w, b->pci->notify_cfg_offset, 2, IVQ);
    wait_used(b, IVQ, head);
    assert_pages(b, mem, "P0P");

    /* Nothing happens at lengths and offsets that are not allowed. */
    for (uint32_t len = 0; len < 10; len++) {
        if (len != 1 && len != 2 && len != 4) {
            window_write(b, w, config + CFG(actual), len, UINT32_MAX);
            window_read(b, w, config + CFG(actual), len);
        }
    }
    window_write(b, w, UINT32_MAX, 4, UINT32_MAX);
    window_write(b, w, UINT32_MAX - 3, 4, UINT32_MAX);
    window_write(b, w, config + PAGE - 2, 4, UINT32_MAX);
    window_read(b, w, UINT32_MAX, 4);
    window_read(b, w, config + PAGE - 2, 4);
    window_write(b, w, config + CFG(actual), UINT32_MAX, UINT32_MAX);
    g_assert_cmphex(config_readl(b, CFG(actual)), ==, 0x0403);
    g_assert_false(is_broken_for_qmp(b));
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "00P");
    balloon_quit(b);
}

/*
 * Buffers
 */

/* PFNs that cross pages of the guest; a buffer is contiguous (2.7.5). */
static void test_crosses_pages(const void *data)
{
    Balloon *b = balloon_start(data, "");
    int n = PAGE / sizeof(uint32_t) + 1;
    uint64_t mem = alloc_pages(b, 5), pages = alloc_pages(b, 4);
    uint32_t pfns[] = { pfn(mem) + 1, pfn(mem) + 3 };
    g_autofree uint32_t *many = g_new(uint32_t, n);

    /* Each position of a PFN */
    for (int i = 0; i < 5; i++) {
        uint64_t addr = pages + PAGE - i;

        qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
        write_pfns(b, addr, pfns, 2);
        wait_used(b, IVQ, submit(b, IVQ, addr, 8, false));
        assert_pages(b, mem, "P0P0P");
    }

    /* A whole page between parts of other pages */
    qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
    for (int i = 0; i < n; i++) {
        many[i] = i == 0 ? pfn(mem) : i == n - 1 ? pfn(mem) + 4 : pfn(mem) + 2;
    }
    write_pfns(b, pages + PAGE - 2, many, n);
    wait_used(b, IVQ, submit(b, IVQ, pages + PAGE - 2, n * 4, false));
    assert_pages(b, mem, "0P0P0");
    balloon_quit(b);
}

/*
 * Submit a buffer with one valid PFN at its start, and check that only its page
 * may be discarded.
 */
static void check_bad_buffer(Balloon *b, uint64_t addr, uint32_t len,
                             bool has_pfn)
{
    uint64_t mem = alloc_pages(b, 3);

    for (int q = IVQ; q <= DVQ; q++) {
        if (has_pfn) {
            write_pfns(b, addr, &(uint32_t){ pfn(mem) + 1 }, 1);
        }
        submit(b, q, addr, len, false);
        if (wait_returned(b, q, 1)) {
            g_assert_false(is_broken_for_qmp(b));
            assert_pages(b, mem, has_pfn ? "P0P" : "PPP");
        } else {
            assert_broken(b);
            assert_pages(b, mem, is_zero(b, mem + PAGE) ? "P0P" : "PPP");
        }
        check_restart(b);
    }
}

/*
 * A buffer that begins in RAM, and goes on where there is nothing, or in the
 * registers of a device.  Addresses of buffers are those of the guest's memory
 * (2.7.5); that QEMU reads them elsewhere, too, is its choice.
 */
static void test_end_of_ram(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t end = ram_start(b) + RAM_SIZE;

    for (uint32_t len = 5; len <= 12; len++) {
        check_bad_buffer(b, end - 4, len, true);
    }
    check_bad_buffer(b, end - 4, 4 * PAGE, true);
    balloon_quit(b);
}

/* From conventional memory to that of the graphics card (2.7.5) */
static void test_into_device(const void *data)
{
    Balloon *b = balloon_start(data, "");

    check_bad_buffer(b, 0xa0000 - 4, 8, true);
    check_bad_buffer(b, 0xa0000 - 4, 2 * PAGE, true);
    balloon_quit(b);
}

/* The PFNs are in the registers of the balloon itself (2.7.5). */
static void test_own_registers(const void *data)
{
    Balloon *b = balloon_start(data, "");

    if (!b->t->pci) {
        check_bad_buffer(b, b->mmio.addr, 0x200, false);
    } else {
        check_bad_buffer(b, b->pci->bar.addr, PAGE, false);
        check_bad_buffer(b, b->pci->bar.addr + b->pci->notify_cfg_offset, 64,
                         false);
    }
    balloon_quit(b);
}

/* The end of a buffer is below its start (2.7.5). */
static void test_wraps(const void *data)
{
    static const Buffer buffers[] = {
        { UINT64_MAX - 7, 16 },
        { UINT64_MAX, 8 },
        { -4ULL * PAGE, 8 * PAGE },
        { -4ULL * PAGE, UINT32_MAX },
    };
    Balloon *b = balloon_start(data, "");

    for (int i = 0; i < ARRAY_SIZE(buffers); i++) {
        check_bad_buffer(b, buffers[i].addr, buffers[i].len, false);
    }
    balloon_quit(b);
}

/*
 * A descriptor whose buffer is the ring itself.  The device must not write to
 * the descriptors (2.7.5.1).
 */
static void test_own_ring(const void *data)
{
    Balloon *b = balloon_start(data, "");
    QVirtQueue *vq = b->vq[IVQ];
    uint64_t mem = alloc_pages(b, 3);
    uint8_t before[2048], after[2048];

    for (int write = 0; write < 2; write++) {
        const Buffer buffers[] = {
            { vq->desc, sizeof(before), write },
            { vq->avail, 64, write },
            { vq->used, PAGE, write },
        };

        for (int i = 0; i < ARRAY_SIZE(buffers); i++) {
            uint32_t head = add_element(b, IVQ, &buffers[i], 1);

            qtest_memread(b->qts, vq->desc, before, sizeof(before));
            make_available(b, IVQ, &head, 1);
            wait_used(b, IVQ, head);
            qtest_memread(b->qts, vq->desc, after, sizeof(after));
            g_assert_cmpmem(before, sizeof(before), after, sizeof(after));
        }
    }
    assert_pages(b, mem, "PPP");
    g_assert_false(is_broken_for_qmp(b));
    check_restart(b);
    balloon_quit(b);
}

/*
 * Indirect tables that a driver must not make (2.7.5.3.1), and those whose
 * WRITE flag the device must ignore (2.7.5.3.2).
 */
static void test_indirect_flags(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5);
    uint32_t pfns[] = { pfn(mem) + 1, pfn(mem) + 3 };
    Buffer first = { put_pfns(b, pfns, 2), 4 }, second = first;
    uint64_t tables = guest_alloc(b->alloc, PAGE);
    Buffer table = { tables, 16 }, outer = { tables + 16, 16 };
    uint32_t head;

    second.addr += 4;
    qtest_memset(b->qts, tables, 0, PAGE);
    write_desc(b, tables, 0, first, 0, 0);

    /* The device ignores WRITE in the descriptor of a table. */
    table.write = true;
    wait_used(b, IVQ, submit_flags(b, IVQ, table, VRING_DESC_F_INDIRECT, 0));
    assert_pages(b, mem, "P0PPP");
    table.write = false;

    /* Another table follows by NEXT. */
    qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
    write_desc(b, tables, 2, second, 0, 0);
    head = add_element(b, IVQ, (Buffer[]){ table, { tables + 32, 16 } }, 2);
    write_desc(b, b->vq[IVQ]->desc, head, table,
               VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, head + 1);
    write_desc(b, b->vq[IVQ]->desc, head + 1, (Buffer){ tables + 32, 16 },
               VRING_DESC_F_INDIRECT, 0);
    make_available(b, IVQ, &head, 1);
    wait_returned(b, IVQ, 1);
    assert_pages(b, mem, !is_zero(b, mem + PAGE) ? "PPPPP" :
                         is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");
    check_restart(b);

    /* A table in a table */
    qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
    write_desc(b, tables, 1, table, VRING_DESC_F_INDIRECT, 0);
    submit_flags(b, IVQ, outer, VRING_DESC_F_INDIRECT, 0);
    wait_returned(b, IVQ, 1);
    assert_pages(b, mem, is_zero(b, mem + PAGE) ? "P0PPP" : "PPPPP");
    check_restart(b);

    /* A table that has itself as a buffer */
    write_desc(b, tables, 1, outer, VRING_DESC_F_INDIRECT, 0);
    submit_flags(b, IVQ, outer, VRING_DESC_F_INDIRECT, 0);
    wait_returned(b, IVQ, 1);
    check_restart(b);
    balloon_quit(b);
}

/* Tables that cannot be read; the device needs a reset (2.1.2). */
static void test_bad_indirect(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1), end = ram_start(b) + RAM_SIZE;
    uint64_t loop = guest_alloc(b->alloc, 32);
    const Buffer tables[] = {
        /* not a number of descriptors */
        { mem, 0 }, { mem, 15 }, { mem, 17 },
        /* not in RAM, or not only */
        { end - 16, 32 }, { UINT64_MAX - 15, 32 },
        /* chained to itself */
        { loop, 16 },
        /* chained to a descriptor that is not in the table */
        { loop + 16, 16 },
    };

    for (int i = 0; i < ARRAY_SIZE(tables); i++) {
        write_desc(b, loop, 0, (Buffer){ mem, 4 }, VRING_DESC_F_NEXT, 0);
        write_desc(b, loop, 1, (Buffer){ mem, 4 }, VRING_DESC_F_NEXT, 1);
        write_desc(b, end - 16, 0, (Buffer){ mem, 4 }, VRING_DESC_F_NEXT, 1);
        submit_flags(b, IVQ, tables[i], VRING_DESC_F_INDIRECT, 0);
        WAIT_FOR(is_broken_for_qmp(b));
        assert_not_used(b, IVQ);
        check_restart(b);
    }
    assert_pages(b, mem, "P");
    balloon_quit(b);
}

/*
 * The host does something while the guest inflates
 */

/* Add elements that inflate every other page. */
static void submit_many(Balloon *b, uint64_t mem, uint32_t *heads, int n)
{
    for (int i = 0; i < n; i++) {
        heads[i] = submit(b, IVQ,
                          put_pfns(b, &(uint32_t){ pfn(mem) + 1 + 2 * i }, 1),
                          4, false);
    }
}

static void wait_many(Balloon *b, const uint32_t *heads, int n)
{
    for (int i = 0; i < n; i++) {
        wait_used(b, IVQ, heads[i]);
    }
}

#define MANY    40

static void assert_every_other(Balloon *b, uint64_t mem)
{
    for (int i = 0; i < 2 * MANY + 1; i++) {
        g_assert_cmpint(is_zero(b, mem + i * PAGE), ==, i & 1);
    }
}

/*
 * The target changes (5.5.6), and the VM stops and continues.  Each element is
 * returned once, in order, when the VM has continued.
 */
static void test_target_and_stop(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 2 * MANY + 1);
    uint32_t heads[MANY];

    for (int i = 0; i < MANY; i += 4) {
        uint64_t part = mem + 2 * i * PAGE;

        submit_many(b, part, heads + i, 1);
        set_balloon(b, RAM_SIZE - (i + 1) * PAGE);
        submit_many(b, part + 2 * PAGE, heads + i + 1, 1);
        stop_vm(b);
        submit_many(b, part + 4 * PAGE, heads + i + 2, 1);
        set_balloon(b, RAM_SIZE - (i + 2) * PAGE);
        continue_vm(b);
        submit_many(b, part + 6 * PAGE, heads + i + 3, 1);
        g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, i + 2);
    }
    wait_many(b, heads, MANY);
    assert_not_used(b, IVQ);
    assert_every_other(b, mem);
    config_writel(b, CFG(actual), MANY);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - MANY * PAGE);
    g_assert_false(is_broken_for_qmp(b));
    balloon_quit(b);
}

/* A stream that is only read when the test says so */
typedef struct Stream {
    char *dir, *state, *fifo, *uri;
    int fd;
} Stream;

static void remove_stream(void *opaque)
{
    Stream *stream = opaque;

    g_unlink(stream->state);
    g_unlink(stream->fifo);
    g_rmdir(stream->dir);
}

static void stream_init(Stream *stream)
{
    g_autoptr(GError) err = NULL;

    stream->dir = g_dir_make_tmp("virtio-balloon-XXXXXX", &err);
    g_assert_no_error(err);
    stream->state = g_build_filename(stream->dir, "state", NULL);
    stream->fifo = g_build_filename(stream->dir, "fifo", NULL);
    stream->uri = g_strdup_printf("exec:read x < %s; cat > %s", stream->fifo,
                                  stream->state);
    qtest_add_abrt_handler(remove_stream, stream);
    g_assert_cmpint(mkfifo(stream->fifo, 0600), ==, 0);
    /* If it were only opened for writing, it would wait for the reader. */
    stream->fd = open(stream->fifo, O_RDWR);
    g_assert_cmpint(stream->fd, >=, 0);
}

static void stream_cleanup(Stream *stream)
{
    close(stream->fd);
    qtest_remove_abrt_handler(stream);
    remove_stream(stream);
    g_free(stream->dir);
    g_free(stream->state);
    g_free(stream->fifo);
    g_free(stream->uri);
}

static bool has_migrated(QTestState *qts, bool started)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'query-migrate' }");
    const char *status = qdict_get_try_str(ret, "status");
    bool result = !g_strcmp0(status, started ? "active" : "completed");

    g_assert_cmpstr(status, !=, "failed");
    qobject_unref(ret);
    return result;
}

static void start_stream(Balloon *b, Stream *stream)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }",
        stream->uri);
}

static void finish_migration(Balloon *b, Stream *stream)
{
    g_assert_cmpint(write(stream->fd, "\n", 1), ==, 1);
    WAIT_FOR(has_migrated(b->qts, false));
}

/*
 * Load a stream, without running the VM: the device would handle the elements
 * that were available when the state was saved.
 */
static Balloon *load(const Transport *t, const char *options, Stream *stream)
{
    g_autofree char *uri = g_strdup_printf("file:%s", stream->state);
    g_autofree char *all = g_strdup_printf("%s -S -incoming defer",
                                            options);
    Balloon *b = balloon_boot(t, all);

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-incoming', 'arguments': { 'uri': %s } }",
        uri);
    WAIT_FOR(has_migrated(b->qts, false));
    return b;
}

/*
 * The guest inflates while a migration is under way.  Pages that it has not
 * sent keep their contents at the destination; those of the others are not
 * defined (5.5.6.2).
 */
static void test_while_migrating(const void *data)
{
    Balloon *b = balloon_start(data, ""), *dst;
    uint64_t mem = alloc_pages(b, 2 * MANY + 1);
    uint32_t heads[MANY];
    Stream stream;

    stream_init(&stream);
    submit_many(b, mem, heads, MANY / 2);
    start_stream(b, &stream);
    WAIT_FOR(has_migrated(b->qts, true));
    submit_many(b, mem + MANY * PAGE, heads + MANY / 2, MANY / 2);
    set_balloon(b, RAM_SIZE - MANY * PAGE);
    wait_many(b, heads, MANY);
    assert_every_other(b, mem);
    config_writel(b, CFG(actual), MANY);
    finish_migration(b, &stream);

    dst = load(data, "", &stream);
    g_assert_cmpint(query_balloon(dst), ==, RAM_SIZE - MANY * PAGE);
    for (int i = 0; i < 2 * MANY + 1; i += 2) {
        g_assert_false(is_zero(dst, mem + i * PAGE));
    }
    stream_cleanup(&stream);
    balloon_quit(dst);
    balloon_quit(b);
}

/*
 * The guest inflates while a background snapshot is taken.  This saves the
 * memory as it was at the start, so pages must not be discarded meanwhile; the
 * device need not modify the pages of the balloon (5.5.6.2).
 */
static void test_background_snapshot(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on"), *dst;
    uint64_t mem = alloc_pages(b, 7);
    uint32_t heads[2];
    int q = b->reporting_vq;
    Stream stream;
    QDict *resp;

    resp = qtest_qmp(b->qts, "{ 'execute': 'migrate-set-capabilities',"
                     " 'arguments': { 'capabilities': [ {"
                     " 'capability': 'background-snapshot',"
                     " 'state': true } ] } }");
    if (qdict_haskey(resp, "error")) {
        g_test_skip("background snapshots do not work on this host");
        qobject_unref(resp);
        balloon_quit(b);
        return;
    }
    qobject_unref(resp);

    stream_init(&stream);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    heads[0] = prepare(b, IVQ, (Buffer){
        put_pfns(b, &(uint32_t){ pfn(mem) + 3 }, 1), 4
    });
    heads[1] = prepare(b, q, (Buffer){ mem + 5 * PAGE, PAGE, true });
    start_stream(b, &stream);
    qtest_qmp_eventwait(b->qts, "STOP");
    qtest_qmp_eventwait(b->qts, "RESUME");
    /*
     * All memory is protected until it is saved, so the device waits when it
     * returns an element.  Only then may the stream be read.
     */
    b->dev->bus->virtqueue_kick(b->dev, b->vq[IVQ]);
    b->dev->bus->virtqueue_kick(b->dev, b->vq[q]);
    finish_migration(b, &stream);
    wait_used(b, IVQ, heads[0]);
    wait_used(b, q, heads[1]);

    dst = load(data, ",free-page-reporting=on", &stream);
    assert_pages(dst, mem, "P0PPPPP");
    balloon_quit(dst);
    stream_cleanup(&stream);

    /* After the snapshot, pages are discarded again. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 3 }, 1);
    g_assert_true(is_zero(b, mem + 3 * PAGE));
    balloon_quit(b);
}

/*
 * Packed rings
 *
 * libqos only knows split rings, but the memory of one has room for the parts
 * of a packed ring.
 */

#define F_AVAIL     (1 << VRING_PACKED_DESC_F_AVAIL)
#define F_USED      (1 << VRING_PACKED_DESC_F_USED)
#define DESC_SIZE   sizeof(struct vring_packed_desc)

typedef struct Packed {
    Balloon *b;
    QVirtQueue *vq;
    /* The slot of the next descriptor that the driver adds */
    uint16_t next;
    bool wrap;
} Packed;

static Packed packed_init(Balloon *b)
{
    Packed p = { .b = b, .vq = b->vq[IVQ], .wrap = true };

    g_assert_cmphex(b->dev->features & BIT64(VIRTIO_F_RING_PACKED), !=, 0);
    /* libqos has initialized the ring as a split ring. */
    qtest_memset(b->qts, p.vq->desc, 0, p.vq->size * DESC_SIZE);
    return p;
}

static Packed packed_start(const Transport *t)
{
    return packed_init(balloon_start(t, ",packed=on"));
}

static void write_packed(Balloon *b, uint64_t addr, Buffer buffer,
                         uint16_t id, uint16_t flags)
{
    struct vring_packed_desc desc = {
        .addr = cpu_to_le64(buffer.addr),
        .len = cpu_to_le32(buffer.len),
        .id = cpu_to_le16(id),
        .flags = cpu_to_le16(flags |
                             (buffer.write ? VRING_DESC_F_WRITE : 0)),
    };

    qtest_memwrite(b->qts, addr, &desc, sizeof(desc));
}

/* Add a descriptor.  Returns its slot. */
static uint16_t packed_add(Packed *p, Buffer buffer, uint16_t id,
                           uint16_t flags)
{
    uint16_t slot = p->next;

    write_packed(p->b, p->vq->desc + slot * DESC_SIZE, buffer, id,
                 flags ^ (p->wrap ? F_AVAIL : F_USED));
    p->next = (slot + 1) % p->vq->size;
    p->wrap ^= !p->next;
    return slot;
}

static void packed_kick(Packed *p)
{
    p->b->dev->bus->virtqueue_kick(p->b->dev, p->vq);
}

static struct vring_packed_desc packed_read(Packed *p, uint16_t slot)
{
    struct vring_packed_desc desc;

    qtest_memread(p->b->qts, p->vq->desc + slot * DESC_SIZE, &desc,
                  sizeof(desc));
    desc.id = le16_to_cpu(desc.id);
    desc.flags = le16_to_cpu(desc.flags);
    return desc;
}

/* Whether the device has used an element of the first lap */
static bool packed_is_used(Packed *p, uint16_t slot)
{
    return (packed_read(p, slot).flags & (F_AVAIL | F_USED)) ==
           (F_AVAIL | F_USED);
}

static void packed_wait(Packed *p, uint16_t slot, uint16_t id)
{
    struct vring_packed_desc desc;

    WAIT_FOR(packed_is_used(p, slot));
    desc = packed_read(p, slot);
    g_assert_cmphex(desc.id, ==, id);
    g_assert_cmpint(le32_to_cpu(desc.len), ==, 0);
}

/* Inflate pages with an element of one buffer. */
static void packed_inflate(Packed *p, uint16_t id, const uint32_t *pfns, int n)
{
    uint16_t slot = packed_add(p, (Buffer){ put_pfns(p->b, pfns, n), n * 4 },
                               id, 0);

    packed_kick(p);
    packed_wait(p, slot, id);
}

/*
 * Wait until an element is returned, or the device needs a reset, and then
 * check that the device works after a reset.
 */
static void packed_settle(Packed *p, uint16_t slot)
{
    Balloon *b = p->b;
    uint64_t mem = alloc_pages(b, 3);

    WAIT_FOR(packed_is_used(p, slot) || is_broken_for_qmp(b));
    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken_for_qmp(b));
    *p = packed_init(b);
    packed_inflate(p, 0, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
}

static void packed_quit(Packed *p)
{
    balloon_quit(p->b);
}

/*
 * An ID only tells the driver which of its buffers was used (2.8.13).  For the
 * device, none is wrong, and IDs need not differ.  Only that of the last
 * descriptor counts (2.8.6).
 */
static void test_packed_ids(const void *data)
{
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 11);
    const uint16_t ids[] = { 0, p.vq->size, UINT16_MAX, INT16_MAX + 1 };
    uint16_t slots[4];
    uint64_t addr;

    /* Too large, or never used before */
    for (int i = 0; i < ARRAY_SIZE(ids); i++) {
        packed_inflate(&p, ids[i], &(uint32_t){ pfn(mem) + 1 + 2 * i }, 1);
    }
    assert_pages(b, mem, "P0P0P0P0P");

    /* Four elements at once with the same ID */
    qtest_memset(b->qts, mem, PATTERN, 11 * PAGE);
    for (int i = 0; i < ARRAY_SIZE(slots); i++) {
        addr = put_pfns(b, &(uint32_t){ pfn(mem) + 1 + 2 * i }, 1);
        slots[i] = packed_add(&p, (Buffer){ addr, 4 }, 7, 0);
    }
    packed_kick(&p);
    for (int i = 0; i < ARRAY_SIZE(slots); i++) {
        packed_wait(&p, slots[i], 7);
    }
    assert_pages(b, mem, "P0P0P0P0P");

    /* Different IDs in a chain */
    qtest_memset(b->qts, mem, PATTERN, 11 * PAGE);
    addr = put_pfns(b, (uint32_t[]){ pfn(mem) + 1, pfn(mem) + 3 }, 2);
    slots[0] = packed_add(&p, (Buffer){ addr, 4 }, 1000, VRING_DESC_F_NEXT);
    packed_add(&p, (Buffer){ addr + 4, 4 }, 3, 0);
    packed_kick(&p);
    packed_wait(&p, slots[0], 3);
    assert_pages(b, mem, "P0P0PPPPP");
    g_assert_false(is_broken_for_qmp(b));
    packed_quit(&p);
}

/*
 * The device must not use a descriptor unless AVAIL has changed (2.8.15).  In a
 * chain, the flags must be right in all descriptors (2.8.6).
 */
static void test_packed_flags(const void *data)
{
    /* In the first lap, AVAIL is 1 and USED is 0 when it is available. */
    static const uint16_t wrong[] = { F_AVAIL, F_USED, F_AVAIL | F_USED };
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 5);
    uint64_t addr = put_pfns(b, (uint32_t[]){ pfn(mem) + 1, pfn(mem) + 3 }, 2);

    for (int i = 0; i < ARRAY_SIZE(wrong); i++) {
        Packed before = p;
        uint16_t slot = packed_add(&p, (Buffer){ addr, 4 }, i, wrong[i]);
        uint16_t flags = packed_read(&p, slot).flags;

        packed_kick(&p);
        qtest_clock_step(b->qts, 1000);
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
        g_assert_cmphex(packed_read(&p, slot).flags, ==, flags);
        g_assert_cmpint(packed_read(&p, slot).id, ==, i);
        assert_pages(b, mem, "PPPPP");
        g_assert_false(is_broken_for_qmp(b));
        p = before;
    }

    for (int i = 0; i < ARRAY_SIZE(wrong); i++) {
        uint16_t slot;

        qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
        slot = packed_add(&p, (Buffer){ addr, 4 }, 1, VRING_DESC_F_NEXT);
        packed_add(&p, (Buffer){ addr + 4, 4 }, 1, wrong[i]);
        packed_kick(&p);
        packed_settle(&p, slot);
        assert_pages(b, mem, !is_zero(b, mem + PAGE) ? "PPPPP" :
                             is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");
    }
    packed_quit(&p);
}

/* Chains that do not end; they must fit into the ring (2.8.17). */
static void test_packed_chains(const void *data)
{
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 3);
    uint64_t addr = put_pfns(b, &(uint32_t){ pfn(mem) + 1 }, 1);

    /* Into descriptors that were never written */
    packed_add(&p, (Buffer){ addr, 4 }, 0, VRING_DESC_F_NEXT);
    packed_kick(&p);
    WAIT_FOR(is_broken_for_qmp(b));
    assert_broken(b);
    packed_settle(&p, 0);

    /* Around the whole ring */
    balloon_restart(b, F_BALLOON);
    p = packed_init(b);
    for (int i = 0; i < p.vq->size; i++) {
        packed_add(&p, (Buffer){ addr, 4 }, 0, VRING_DESC_F_NEXT);
    }
    packed_kick(&p);
    WAIT_FOR(is_broken_for_qmp(b));
    assert_broken(b);
    assert_pages(b, mem, "PPP");
    packed_settle(&p, 0);
    packed_quit(&p);
}

/* Buffers whose end is below their start, and buffers in the ring (2.8.4) */
static void test_packed_buffers(const void *data)
{
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 3);

    for (int write = 0; write < 2; write++) {
        for (int i = 0; i < 6; i++) {
            uint64_t ring = p.vq->desc;
            const Buffer buffers[] = {
                { UINT64_MAX - 7, 16, write },
                { UINT64_MAX, 1, write },
                { -4ULL * PAGE, UINT32_MAX, write },
                /* the descriptor itself, the whole ring, and its end */
                { ring + p.next * DESC_SIZE, DESC_SIZE, write },
                { ring, p.vq->size * DESC_SIZE, write },
                { ring + (p.vq->size - 1) * DESC_SIZE, 2 * DESC_SIZE, write },
            };
            uint16_t slot = packed_add(&p, buffers[i], i, 0);

            packed_kick(&p);
            packed_settle(&p, slot);
        }
    }
    assert_pages(b, mem, "PPP");
    packed_quit(&p);
}

/*
 * The pages of the ring, of an indirect table, and of PFNs are inflated.  The
 * device writes the used descriptor to the new page.
 */
static void test_packed_pages(const void *data)
{
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 5), table = guest_alloc(b->alloc, PAGE);
    uint64_t page = alloc_pages(b, 1);
    uint32_t pfns[] = { pfn(p.vq->desc), pfn(mem) + 1 };
    uint16_t slot;

    packed_inflate(&p, 1, pfns, 2);
    assert_pages(b, mem, "P0PPP");
    packed_inflate(&p, 2, &(uint32_t){ pfn(mem) + 3 }, 1);
    assert_pages(b, mem, "P0P0P");

    /* The device area is in this page, too. */
    packed_inflate(&p, 3, &(uint32_t){ pfn(p.vq->used) }, 1);
    packed_inflate(&p, 4, &(uint32_t){ pfn(mem) + 3 }, 1);

    qtest_memset(b->qts, table, 0, PAGE);
    pfns[0] = pfn(table);
    write_packed(b, table, (Buffer){ put_pfns(b, pfns, 2), 8 }, 0, 0);
    slot = packed_add(&p, (Buffer){ table, DESC_SIZE }, 5,
                      VRING_DESC_F_INDIRECT);
    packed_kick(&p);
    packed_wait(&p, slot, 5);
    g_assert_true(is_zero(b, table));

    pfns[0] = pfn(mem) + 1;
    pfns[1] = pfn(page);
    write_pfns(b, page, pfns, 2);
    slot = packed_add(&p, (Buffer){ page, 8 }, 6, 0);
    packed_kick(&p);
    packed_wait(&p, slot, 6);
    g_assert_true(is_zero(b, page));
    assert_pages(b, mem, "P0P0P");

    /* Now the table has a buffer of length zero. */
    slot = packed_add(&p, (Buffer){ table, DESC_SIZE }, 7,
                      VRING_DESC_F_INDIRECT);
    packed_kick(&p);
    WAIT_FOR(is_broken_for_qmp(b));
    g_assert_false(packed_is_used(&p, slot));
    packed_settle(&p, slot);
    packed_quit(&p);
}

/*
 * Indirect tables.  The device ignores WRITE in the descriptor of a table, and
 * all flags but WRITE, and the ID, in the table (2.8.7).
 */
static void test_packed_indirect(const void *data)
{
    Packed p = packed_start(data);
    Balloon *b = p.b;
    uint64_t mem = alloc_pages(b, 5), tables = guest_alloc(b->alloc, PAGE);
    uint64_t addr = put_pfns(b, (uint32_t[]){ pfn(mem) + 1, pfn(mem) + 3 }, 2);
    uint16_t slot;

    qtest_memset(b->qts, tables, 0, PAGE);
    write_packed(b, tables, (Buffer){ addr, 4 }, 99,
                 (uint16_t)~VRING_DESC_F_WRITE);
    write_packed(b, tables + DESC_SIZE, (Buffer){ addr + 4, 4 }, 98,
                 VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT);
    slot = packed_add(&p, (Buffer){ tables, 2 * DESC_SIZE, true }, 5,
                      VRING_DESC_F_INDIRECT);
    packed_kick(&p);
    packed_wait(&p, slot, 5);
    assert_pages(b, mem, "P0P0P");

    /* Two tables by NEXT (2.8.19) */
    qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
    slot = packed_add(&p, (Buffer){ tables, DESC_SIZE }, 6,
                      VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT);
    packed_add(&p, (Buffer){ tables + DESC_SIZE, DESC_SIZE }, 6,
               VRING_DESC_F_INDIRECT);
    packed_kick(&p);
    packed_settle(&p, slot);
    assert_pages(b, mem, !is_zero(b, mem + PAGE) ? "PPPPP" :
                         is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");

    /* A table after another buffer (2.8.19) */
    qtest_memset(b->qts, mem, PATTERN, 5 * PAGE);
    slot = packed_add(&p, (Buffer){ addr, 4 }, 6, VRING_DESC_F_NEXT);
    packed_add(&p, (Buffer){ tables + DESC_SIZE, DESC_SIZE }, 6,
               VRING_DESC_F_INDIRECT);
    packed_kick(&p);
    packed_settle(&p, slot);
    assert_pages(b, mem, !is_zero(b, mem + PAGE) ? "PPPPP" :
                         is_zero(b, mem + 3 * PAGE) ? "P0P0P" : "P0PPP");
    packed_quit(&p);
}

/* What a test needs of the transport */
typedef enum Need {
    ANY,
    /* the PCI bus of a PC */
    PC,
    /* registers that are not ports */
    MMIO,
    /* the modern interface of PCI */
    MODERN,
} Need;

typedef struct Test {
    const char *name;
    void (*fn)(const void *transport);
    Need need;
} Test;

static const Test tests[] = {
    { "conformance/descriptors", test_descriptors, MODERN },
    { "conformance/available", test_available, MODERN },
    { "conformance/used", test_used },
    { "conformance/descriptors-and-available", test_descriptors_and_available },
    { "conformance/indirect-table", test_indirect_table },
    { "conformance/own-pfns", test_own_pfns },
    { "conformance/next-pfns", test_next_pfns },
    { "conformance/reported-and-inflated", test_reported_and_inflated },
    { "conformance/reported-ring", test_reported_ring },
    { "conformance/missing-queues", test_missing_queues },
    { "conformance/reporting-not-accepted", test_reporting_not_accepted },
    { "conformance/pci-cfg", test_pci_cfg, MODERN },
    { "conformance/crosses-pages", test_crosses_pages },
    { "conformance/end-of-ram", test_end_of_ram },
    { "conformance/into-device", test_into_device, PC },
    { "conformance/own-registers", test_own_registers, MMIO },
    { "conformance/wraps", test_wraps },
    { "conformance/own-ring", test_own_ring },
    { "conformance/indirect-flags", test_indirect_flags },
    { "conformance/bad-indirect", test_bad_indirect },
    { "conformance/target-and-stop", test_target_and_stop },
    { "conformance/while-migrating", test_while_migrating },
    { "conformance/background-snapshot", test_background_snapshot },
    { "conformance/packed/ids", test_packed_ids, MODERN },
    { "conformance/packed/flags", test_packed_flags, MODERN },
    { "conformance/packed/chains", test_packed_chains, MODERN },
    { "conformance/packed/buffers", test_packed_buffers, MODERN },
    { "conformance/packed/pages", test_packed_pages, MODERN },
    { "conformance/packed/indirect", test_packed_indirect, MODERN },
};

static bool has_needed(const Transport *t, Need need)
{
    bool modern = t->pci && (t->features & BIT64(VIRTIO_F_VERSION_1));

    return need == ANY || (need == PC && t->pci) ||
           (need == MMIO && (modern || !t->pci)) || (need == MODERN && modern);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (const Transport *const *t = transports(); *t; t++) {
        /* To libqos, this is the same as pci-modern. */
        if (!strcmp((*t)->name, "pci-transitional")) {
            continue;
        }
        for (int i = 0; i < ARRAY_SIZE(tests); i++) {
            g_autofree char *path =
                g_strdup_printf("virtio-balloon/%s/%s", (*t)->name,
                                tests[i].name);

            if (has_needed(*t, tests[i].need)) {
                qtest_add_data_func(path, *t, tests[i].fn);
            }
        }
    }
    return g_test_run();
}
