/*
 * QTest test cases for features of only the Rust implementation of
 * virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-migration.h"

/*
 * Counters
 */

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

    g_assert_cmpint(get_counter(b, "populate-errors"), ==, 0);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 0);

    send_pfns(b, DVQ, pfns + 1, 2);
    g_assert_cmpint(get_counter(b, "pages-deflated"), ==, 2);
    g_assert_cmpint(get_counter(b, "pages-deflated-unasked"), ==, 0);
    balloon_quit(b);
}

/* How often the driver was asked for statistics, and has sent them */
static void test_stats_counters(const void *data)
{
    Balloon *b = balloon_start(data, "");
    const uint8_t none[1] = { };
    uint64_t addr = put(b, none, sizeof(none));
    uint32_t head = submit(b, SVQ, addr, sizeof(none), false);

    g_assert_cmpint(get_counter(b, "stats-answers"), ==, 1);
    g_assert_cmpint(get_counter(b, "stats-requests"), ==, 0);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 1);
    wait_used(b, SVQ, head);
    g_assert_cmpint(get_counter(b, "stats-requests"), ==, 1);
    g_assert_cmpint(get_counter(b, "stats-answers"), ==, 1);
    balloon_quit(b);
}

/* The driver claims that the balloon has more pages than the guest. */
static void test_excess(const void *data)
{
    Balloon *b = balloon_start(data, "");

    config_writel(b, CFG(actual), RAM_SIZE / PAGE - 1);
    g_assert_cmpint(query_balloon(b), ==, PAGE);
    config_writel(b, CFG(actual), RAM_SIZE / PAGE);
    g_assert_cmpint(query_balloon(b), ==, 0);
    config_writel(b, CFG(actual), RAM_SIZE / PAGE + 1);
    g_assert_cmpint(query_balloon(b), ==, 0);
    config_writel(b, CFG(actual), UINT32_MAX);
    g_assert_cmpint(query_balloon(b), ==, 0);
    balloon_quit(b);
}

/*
 * Make elements available with one notification.  Each element has every 8th
 * page, beginning with a different one.  The pages of all elements together are
 * one range.
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

/*
 * Many elements in any order become a few discards.  They use far less than the
 * budget of a turn.
 */
static void test_runs(const void *data)
{
    Balloon *b = balloon_start(data, "");

    inflate_shuffled(b, alloc_pages(b, 64));
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, 56);
    g_assert_cmpint(get_counter(b, "discard-ranges"), ==, 1);
    balloon_quit(b);
}

/*
 * Reports in elements of their own are discarded together, too.  A report that
 * is not a whole page does not keep the others from being discarded.
 */
static void test_reports(const void *data)
{
    enum { N = 32 };
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 2 * N);
    uint64_t calls = get_counter(b, "discard-calls");
    uint64_t ranges = get_counter(b, "discard-ranges");
    uint32_t heads[N];

    for (int i = 0; i < N; i++) {
        Buffer page = { mem + 2 * i * PAGE, i == 5 ? PAGE / 2 : PAGE, true };

        heads[i] = add_element(b, b->reporting_vq, &page, 1);
    }
    send_batch(b, b->reporting_vq, heads, N);
    g_assert_cmpint(get_counter(b, "discard-calls"), ==, calls + 1);
    g_assert_cmpint(get_counter(b, "discard-ranges"), ==, ranges + N - 1);
    for (int i = 0; i < 2 * N; i++) {
        assert_pages(b, mem + i * PAGE, i % 2 || i == 10 ? "P" : "0");
    }
    g_assert_cmpint(get_counter(b, "reports"), ==, N - 1);
    g_assert_cmpint(get_counter(b, "bytes-reported"), ==, (N - 1) * PAGE);
    g_assert_cmpint(get_counter(b, "reports-ignored"), ==, 1);

    /* The guest expects a pattern in free pages, so nothing is discarded. */
    config_writel(b, CFG(poison_val), 1);
    send_batch(b, b->reporting_vq, heads, 2);
    g_assert_cmpint(get_counter(b, "reports"), ==, N - 1);
    g_assert_cmpint(get_counter(b, "reports-ignored"), ==, 3);
    balloon_quit(b);
}

/*
 * Elements that take a long time
 */

#define ENDLESS_PFNS    (1024 * 1024)

/* A buffer of PFNs: every second page of 8 MiB, many times */
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

/* The most descriptors in an element; every queue has room for them */
#define MAX_DESCS   128

/*
 * Make an element available that has many descriptors, all of which refer to
 * the same PFNs.  There must not be any other element in the queue.
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
 * The number of descriptors for the next attempt, as an attempt fails if the
 * device is faster than the test.
 */
static int next_try(int descs)
{
    static int tries;

    begin_attempt(&tries);
    return MIN(2 * descs, MAX_DESCS);
}

/* Stop the VM while the device works on an element. */
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
     * The device works on the element in turns, and the monitor answers between
     * them.  A device that does not yield would have finished the element
     * before each answer.
     */
    for (int descs = 8; ; descs = next_try(descs)) {
        head = submit_endless(b, endless, descs);
        inflated = get_counter(b, "pages-inflated");
        wait_used(b, IVQ, head);
        if (get_counter(b, "pages-inflated") > inflated) {
            break;
        }
    }

    /* The VM is stopped in the middle of an element, and continues */
    head = stop_in_the_middle(b, endless);
    inflated = get_counter(b, "pages-inflated");
    assert_not_used(b, IVQ);
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, inflated);
    continue_vm(b);
    wait_used(b, IVQ, head);

    /* The driver resets the device in the middle of an element */
    submit_endless(b, endless, 64);
    balloon_restart(b, F_BALLOON);
    inflated = get_counter(b, "pages-inflated");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    g_assert_cmpint(get_counter(b, "pages-inflated"), ==, inflated + 1);

    /* QEMU quits in the middle of an element */
    submit_endless(b, endless, 64);
    balloon_quit(b);
}

/*
 * The command ID stays in the configuration space until the round ends, so that
 * a driver that reads it again, for any reason, does not end the round.
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
    /* causes a configuration change interrupt */
    set_balloon(b, RAM_SIZE - PAGE);
    g_assert_cmphex(get_cmd_id(b), ==, id);
    hint(b, mem);
    g_assert_cmpint(get_counter(b, "hints"), ==, 2);

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
 * Free page hinting while a hint is in flight.  The I/O thread of the C device
 * may use the queue after it was reset.
 */

static void test_hinting_reset(const void *data)
{
    Balloon *b = balloon_start(data, HINT_OPTIONS);

    check_hinting_reset(b, true);
    balloon_quit(b);
}

/*
 * Migration
 */

/*
 * An element that the device has not finished is finished at the destination.
 */
static void test_migrate_unfinished(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint32_t head = stop_in_the_middle(b, prepare_endless(b));

    b = balloon_migrate(b, "");
    wait_used(b, IVQ, head);
    g_assert_cmpint(get_counter(b, "pages-inflated"), >, 0);
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "counters", test_counters },
    { "counters/stats", test_stats_counters },
    { "excess", test_excess },
    { "runs", test_runs },
    { "reports", test_reports },
    { "bounded", test_bounded },
    { "hinting/cmd-id", test_hinting_cmd_id },
    { "hinting/reset-in-flight", test_hinting_reset },
    { "migrate-unfinished", test_migrate_unfinished },
};

int main(int argc, char **argv)
{
    return run_rust_tests(argc, argv, "rust", tests, ARRAY_SIZE(tests));
}
