/*
 * QTest test cases for virtio-balloon: the driver resets single queues
 * (VIRTIO_F_RING_RESET; virtio 1.3, sections 2.6.1 and 4.1.4.3)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-migration.h"
#include "virtio-balloon-queue-reset.h"
#include "standard-headers/linux/virtio_pci.h"

/* A size that no queue has by default */
#define SMALL           16

/* All queues, without ioeventfd: see balloon_start_hinting() */
#define ALL_QUEUES \
    ",free-page-reporting=on" HINT_OPTIONS " -global virtio-pci.ioeventfd=off"

/* Let the device do all that it has to do. */
static void run_main_loop(Balloon *b)
{
    for (int i = 0; i < 20; i++) {
        qtest_clock_step(b->qts, 1000);
        qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
    }
}

/* Whether the device has interrupted the driver because of a queue */
static bool was_interrupted(Balloon *b, int q)
{
    return b->dev->bus->get_queue_isr_status(b->dev, b->vq[q]);
}

/* A buffer that tells the device something about a page */
static Buffer page_buffer(Balloon *b, int q, uint64_t page)
{
    uint32_t le = cpu_to_le32(pfn(page));

    if (q == b->hint_vq || q == b->reporting_vq) {
        return (Buffer) { page, PAGE, true };
    }
    /* In the queue for statistics, this is too short to be one. */
    return (Buffer) { put(b, &le, sizeof(le)), sizeof(le), false };
}

/* Check that a queue works. */
static void use_queue(Balloon *b, int q)
{
    uint64_t page = alloc_pages(b, 1);
    Buffer buffer = page_buffer(b, q, page);
    uint32_t head;

    if (!b->vq[q]->num_free) {
        qvirtqueue_reset_pool(b->vq[q]);
    }
    head = submit_element(b, q, &buffer, 1);
    if (q == SVQ) {
        poll_stats(b);
    }
    wait_used(b, q, head);
    if (q == b->hint_vq && !b->hints_polled) {
        wait_hint_queue_idle(b);
    }
    g_assert(is_zero(b, page) == (q == IVQ || q == b->reporting_vq));
    if (buffer.addr != page) {
        guest_free(b->alloc, buffer.addr);
    }
    guest_free(b->alloc, page);
}

static void use_all_queues(Balloon *b)
{
    for (int q = 0; q < b->num_queues; q++) {
        use_queue(b, q);
    }
    g_assert_false(is_broken_for_qmp(b));
}

/* Check that all queues work, also after the device is reset. */
static void restart_and_quit(Balloon *b)
{
    use_all_queues(b);
    balloon_restart(b, F_BALLOON);
    use_all_queues(b);
    balloon_quit(b);
}

/*
 * Queues that are idle
 */

/* Notify a queue of an element in its old ring, which nobody uses. */
static void check_unused(Balloon *b, int q)
{
    QVirtQueue *vq = b->vq[q];
    uint64_t page = alloc_pages(b, 1);
    Buffer buffer = page_buffer(b, q, page);
    uint16_t idx = qtest_readw(b->qts, vq->avail + 2);
    OldRing ring;

    qvirtqueue_reset_pool(vq);
    qtest_writew(b->qts, vq->avail + 4 + 2 * (idx % vq->size),
                 add_element(b, q, &buffer, 1));
    qvirtqueue_set_avail_idx(b->qts, b->dev, vq, idx + 1);
    ring = save_ring(b, q);
    was_interrupted(b, q);

    b->dev->bus->virtqueue_kick(b->dev, vq);
    if (q == SVQ) {
        poll_stats(b);
    }
    run_main_loop(b);
    g_assert_false(was_interrupted(b, q));
    assert_ring_unchanged(b, &ring);

    /* All others work, and so does this one with another ring. */
    for (int i = 0; i < b->num_queues; i++) {
        if (i != q) {
            use_queue(b, i);
        }
    }
    g_assert_false(is_enabled(b, q));
    reenable_queue(b, q, SMALL);
    for (int i = 0; i < 2 * SMALL + 3; i++) {
        use_queue(b, q);
    }
    assert_pages(b, page, "P");
    release_ring(b, &ring);
}

static void test_idle(const void *data)
{
    Balloon *b = balloon_start(data, ALL_QUEUES);

    g_assert_cmpint(b->num_queues, ==, 5);
    use_all_queues(b);
    for (int q = 0; q < b->num_queues; q++) {
        int size = b->vq[q]->size;

        reset_queue(b, q);
        check_unused(b, q);
        reset_queue(b, q);
        g_assert_cmpint(read_common(b, q, VIRTIO_PCI_COMMON_Q_SIZE), ==, size);
        replace_ring(b, q, size);
    }
    restart_and_quit(b);
}

/* A queue that is not enabled can be reset, too. */
static void test_not_enabled(const void *data)
{
    Balloon *b = balloon_boot(data, ALL_QUEUES);

    for (int q = 0; q < 5; q++) {
        reset_queue(b, q);
    }
    balloon_negotiate(b, F_BALLOON);
    use_all_queues(b);
    for (int q = 0; q < b->num_queues; q++) {
        reset_queue(b, q);
        replace_ring(b, q, SMALL);
    }
    restart_and_quit(b);
}

/* Queues that do not exist, and values that must not be written */
static void test_bad_writes(const void *data)
{
    static const uint16_t queues[] = { 5, 63, 1023, 1024, UINT16_MAX };
    static const uint16_t values[] = { 0, 2, 0x100, UINT16_MAX };
    Balloon *b = balloon_start(data, ALL_QUEUES);

    for (int i = 0; i < ARRAY_SIZE(queues); i++) {
        reset_queue(b, queues[i]);
        g_assert_false(read_common(b, queues[i], VIRTIO_PCI_COMMON_Q_SIZE));
        /* QEMU does not select an index that no device can have. */
        g_assert_cmpint(read_common(b, queues[i], VIRTIO_PCI_COMMON_Q_SELECT),
                        ==, MIN(queues[i], 1023));
    }
    for (int q = 0; q < b->num_queues; q++) {
        for (int i = 0; i < ARRAY_SIZE(values); i++) {
            write_common(b, q, VIRTIO_PCI_COMMON_Q_RESET, values[i]);
            g_assert_false(read_common(b, q, VIRTIO_PCI_COMMON_Q_RESET));
            g_assert_true(is_enabled(b, q));
        }
    }
    restart_and_quit(b);
}

/* The driver resets queues although it is not offered the feature. */
static void test_not_offered(const void *data)
{
    Balloon *b = balloon_start(data, ",queue_reset=off");

    g_assert_false(b->offered & BIT64(VIRTIO_F_RING_RESET));
    for (int q = 0; q < b->num_queues; q++) {
        replace_ring(b, q, SMALL);
    }
    restart_and_quit(b);
}

/* The reset disables the interrupt of the queue. */
static void test_msix(const void *data)
{
    Balloon *b = balloon_boot(data, "");
    QVirtQueuePCI *vq;

    qpci_msix_enable(b->pci->pdev);
    balloon_negotiate(b, F_BALLOON);
    vq = container_of(b->vq[IVQ], QVirtQueuePCI, vq);
    qvirtqueue_pci_msix_setup(b->pci, vq, b->alloc, 1);
    use_queue(b, IVQ);
    g_assert_true(was_interrupted(b, IVQ));

    replace_ring(b, IVQ, SMALL);
    g_assert_cmphex(read_common(b, IVQ, VIRTIO_PCI_COMMON_Q_MSIX), ==,
                    VIRTIO_MSI_NO_VECTOR);
    use_queue(b, IVQ);
    g_assert_false(was_interrupted(b, IVQ));

    write_common(b, IVQ, VIRTIO_PCI_COMMON_Q_MSIX, 1);
    use_queue(b, IVQ);
    g_assert_true(was_interrupted(b, IVQ));
    qpci_msix_disable(b->pci->pdev);
    balloon_quit(b);
}

/*
 * Queues with elements in flight
 */

/*
 * The device has kept a buffer with statistics, which it would return when they
 * are polled.  C returns it to the new ring, of which it never was.
 */
static void test_stats(const void *data)
{
    Balloon *b;
    uint64_t addr;
    OldRing ring;

    if (!is_rust_device()) {
        g_test_skip("the C device returns the buffer to the new ring");
        return;
    }
    b = balloon_start(data, "");
    addr = guest_alloc(b->alloc, 10);
    submit(b, SVQ, addr, 10, false);
    assert_not_used(b, SVQ);
    g_assert_cmpint(queue_status(b, SVQ, "inuse"), ==, 1);
    was_interrupted(b, SVQ);
    reset_queue(b, SVQ);
    g_assert_cmpint(queue_status(b, SVQ, "inuse"), ==, 0);
    assert_not_used(b, SVQ);
    ring = save_ring(b, SVQ);

    reenable_queue(b, SVQ, SMALL);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 3 * SECOND);
    assert_not_used(b, SVQ);
    g_assert_false(was_interrupted(b, SVQ));
    /* The device continues to poll. */
    for (int i = 0; i < 2; i++) {
        uint32_t head = submit(b, SVQ, addr, 10, false);

        qtest_clock_step(b->qts, 3 * SECOND);
        wait_used(b, SVQ, head);
    }
    release_ring(b, &ring);
    restart_and_quit(b);
}

/* A queue that is reset when the VM is migrated */
static void test_migrate(const void *data)
{
    Balloon *b = balloon_start(data, "");

    submit(b, SVQ, guest_alloc(b->alloc, 10), 10, false);
    assert_not_used(b, SVQ);
    for (int q = DVQ; q <= SVQ; q++) {
        reset_queue(b, q);
    }
    b = balloon_migrate(b, "");
    g_assert_true(is_enabled(b, IVQ));
    for (int q = DVQ; q <= SVQ; q++) {
        reenable_queue(b, q, SMALL);
    }
    restart_and_quit(b);
}

/*
 * Elements that take the device many turns: each has an indirect table, whose
 * buffers all refer to the same memory, or have the PFNs of every second page
 * of the first huge page of it several times.
 */
typedef struct Work {
    QVRingIndirectDesc *table;
    uint64_t mem;
} Work;

enum { BUFFERS = 1024, PAGES = HUGE_PAGE / PAGE / 2, SIZE = 8 * HUGE_PAGE };

static Work prepare_work(Balloon *b, int q)
{
    Work w = {
        .table = qvring_indirect_desc_setup(b->qts, b->dev, b->alloc, BUFFERS),
        .mem = QEMU_ALIGN_UP(alloc_pages(b, (SIZE + HUGE_PAGE) / PAGE),
                              HUGE_PAGE),
    };
    Buffer buffer = { w.mem, SIZE, true };
    uint32_t pfns[8 * PAGES];

    if (q == IVQ || q == DVQ) {
        for (int i = 0; i < ARRAY_SIZE(pfns); i++) {
            pfns[i] = cpu_to_le32(pfn(w.mem) + 2 * (i % PAGES));
        }
        buffer = (Buffer) { put(b, pfns, sizeof(pfns)), sizeof(pfns) };
    }
    for (int i = 0; i < BUFFERS; i++) {
        qvring_indirect_desc_add(b->dev, b->qts, w.table, buffer.addr,
                                 buffer.len, buffer.write);
    }
    return w;
}

static void submit_work(Balloon *b, int q, const Work *w, int n)
{
    Buffer table = { w->table->desc, BUFFERS * sizeof(struct vring_desc) };
    uint32_t heads[SMALL];

    qvirtqueue_reset_pool(b->vq[q]);
    for (int i = 0; i < n; i++) {
        heads[i] = add_element(b, q, &table, 1);
        make_indirect(b, q, heads[i]);
    }
    make_available(b, q, heads, n);
}

/* A number that becomes larger when the device returns elements; 0 in C */
static uint64_t work_done(Balloon *b, int q)
{
    return !is_rust_device() ? 0 :
           get_counter(b, q == IVQ ? "pages-inflated" :
                       q == DVQ ? "pages-deflated" :
                       q == b->hint_vq ? "hints" : "reports");
}

/*
 * Reset a queue while the device works on elements, and enable it again.  The
 * device must not discard pages any more, which the driver can use again.  C
 * finishes all elements when it is notified of them.
 */
static void reset_in_flight(Balloon *b, int q, const Work *w)
{
    int attempts = 0;
    bool in_flight;

    /* The I/O thread handles hints much faster than the main loop pages. */
    for (int n = q == b->hint_vq ? SMALL : 1; ; n = MIN(2 * n, SMALL)) {
        uint16_t used = b->vq[q]->last_used_idx;
        OldRing ring;
        uint64_t done;

        begin_attempt(&attempts);
        submit_work(b, q, w, n);
        in_flight = queue_status(b, q, "inuse") > 0;
        reset_queue(b, q);
        qtest_memset(b->qts, w->mem, PATTERN, HUGE_PAGE);
        done = work_done(b, q);
        ring = save_ring(b, q);
        in_flight = in_flight && (uint16_t)(used_idx(b, q) - used) < n;
        g_assert_cmpint(queue_status(b, q, "inuse"), ==, 0);

        was_interrupted(b, q);
        run_main_loop(b);
        g_assert_false(was_interrupted(b, q));
        for (int i = 0; i < 2 * PAGES; i++) {
            assert_pages(b, w->mem + i * PAGE, "P");
        }
        reenable_queue(b, q, SMALL);
        run_main_loop(b);
        g_assert_cmpint(used_idx(b, q), ==, 0);
        g_assert_cmpint(work_done(b, q), ==, done);
        release_ring(b, &ring);
        if (in_flight || !is_rust_device()) {
            break;
        }
    }
    g_assert_cmpint(in_flight, ==, is_rust_device());
}

static void check_work(Balloon *b, int q)
{
    Work w = prepare_work(b, q);

    reset_in_flight(b, q, &w);
    for (int i = 0; i < 2 * SMALL + 3; i++) {
        use_queue(b, q);
    }
    g_free(w.table);
}

static void test_pages(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");

    check_work(b, IVQ);
    check_work(b, DVQ);
    check_work(b, b->reporting_vq);
    restart_and_quit(b);
}

/* The device goes on with the elements of one queue if another one is reset. */
static void test_other_queue(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Work w = prepare_work(b, IVQ);

    submit_work(b, IVQ, &w, 2);
    reset_queue(b, DVQ);
    wait_used(b, IVQ, 0);
    wait_used(b, IVQ, 1);
    assert_pages(b, w.mem, "0P0P");
    replace_ring(b, DVQ, SMALL);
    g_free(w.table);
    restart_and_quit(b);
}

/*
 * The device must not remember parts of huge pages that were in the elements:
 * they were not returned, so the driver can use these pages without telling the
 * device.
 */
static void check_huge_pages(const Transport *t, const char *property)
{
    g_autofree char *options =
        g_strdup_printf("%s -object memory-backend-memfd,id=ram0,size=128M,"
                        "hugetlb=on,hugetlbsize=2M"
                        " -machine memory-backend=ram0", property);
    uint32_t pfns[2 * PAGES];
    Balloon *b;
    Work w;

    if (!qtest_take_huge_pages(RAM_SIZE)) {
        return;
    }
    b = balloon_start(t, options);
    w = prepare_work(b, IVQ);
    reset_in_flight(b, IVQ, &w);

    /* The other pages, and enough PFNs to be a whole huge page */
    for (int i = 0; i < PAGES; i++) {
        pfns[2 * i] = pfn(w.mem) + 2 * i + 1;
        pfns[2 * i + 1] = pfn(w.mem) + 2 * PAGES + i;
    }
    send_pfns(b, IVQ, pfns, 2 * PAGES);
    assert_pages(b, w.mem, "PPPP");
    g_free(w.table);
    balloon_quit(b);
}

static void test_huge_pages(const void *data)
{
    check_huge_pages(data, "");
}

static void test_huge_pages_on(const void *data)
{
    if (!is_rust_device()) {
        g_test_skip("the C device does not have the property");
        return;
    }
    check_huge_pages(data, ",huge-pages=on");
}

/* The state of hinting does not depend on the queue. */
static void test_hints(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    int q = b->hint_vq;

    for (HintState state = 0; state < HINT_STATES; state++) {
        uint32_t id;

        if (state == HINT_START && !is_rust_device()) {
            /* The I/O thread of C may use the queue after it was reset. */
            continue;
        }
        hint_until(b, state);
        id = get_cmd_id(b);
        if (state == HINT_START) {
            uint64_t hints;

            check_work(b, q);
            hints = get_counter(b, "hints");
            use_queue(b, q);
            g_assert_cmpint(get_counter(b, "hints"), ==, hints + 1);
        } else {
            replace_ring(b, q, SMALL);
            use_queue(b, q);
        }
        g_assert_cmphex(get_cmd_id(b), ==, id);

        if (state == HINT_REQUESTED) {
            hint_command(b, id);
            hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
        }
        if (state != HINT_DONE) {
            cancel_hinting(b);
        }
    }
    restart_and_quit(b);
}

#define RESET BIT64(VIRTIO_F_RING_RESET)

static const TransportTest tests[] = {
    { "queue-reset/idle", test_idle, .features = RESET },
    { "queue-reset/not-enabled", test_not_enabled, .features = RESET },
    { "queue-reset/bad-writes", test_bad_writes, .features = RESET },
    { "queue-reset/not-offered", test_not_offered, .features = RESET },
    { "queue-reset/msix", test_msix, .features = RESET },
    { "queue-reset/stats", test_stats, .features = RESET },
    { "queue-reset/migrate", test_migrate, .features = RESET },
    { "queue-reset/pages", test_pages, .features = RESET },
    { "queue-reset/other-queue", test_other_queue, .features = RESET },
    { "queue-reset/huge-pages", test_huge_pages, .features = RESET },
    { "queue-reset/huge-pages-on", test_huge_pages_on, .features = RESET },
    { "queue-reset/hints", test_hints, .features = RESET },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
