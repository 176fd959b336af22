/*
 * QTest test cases for virtio-balloon: faults on the queues for hints and for
 * statistics
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-busy.h"

static const Transport *transport;
static bool rust_device;

/*
 * Buffers that are not RAM
 */

static const struct {
    const char *name;
    uint64_t addr;
    uint32_t len;
} bad_buffers[] = {
    /* The registers of devices, which may be larger than a bounce buffer */
    { "vga", 0xa0000, 64 },
    { "into-vga", 0xa0000 - 4, 2 * PAGE },
    { "ioapic", 0xfec00000, 64 },
    { "own-registers", 0, 64 },
    { "own-registers-page", 0, PAGE },
    { "rom", 0xfffff000, PAGE },
    { "end-of-ram", BUSY_VM_SIZE - 4, 16 },
    { "nothing", 32 * GiB, 64 },
    { "wraps", UINT64_MAX - 7, 16 },
    { "wraps-far", UINT64_MAX - 7, UINT32_MAX },
    { "empty", 16 * MiB, 0 },
};

/*
 * Whatever the device does with a buffer, the driver gets it back, or sees that
 * the device needs a reset; memory does not change; and the device works after
 * a reset.
 */
static void check_bad_buffer(Balloon *b, int q, Buffer buffer, bool round)
{
    uint64_t mem = alloc_pages(b, 2);
    uint16_t used;

    if (round) {
        hint_until(b, HINT_START);
    }
    used = qtest_readw(b->qts, b->vq[q]->used + 2);
    submit_element(b, q, &buffer, 1);
    if (q == SVQ) {
        poll_stats(b);
    }
    WAIT_FOR(qtest_readw(b->qts, b->vq[q]->used + 2) == used + 1 ||
             is_broken_for_qmp(b));
    assert_pages(b, mem, "PP");
    balloon_restart(b, F_BALLOON);
    if (round) {
        cancel_migration(b);
    }
    check_works(b);
}

static void test_bad_buffers(const void *data)
{
    const bool hints = GPOINTER_TO_INT(data);
    Balloon *b = balloon_start(transport, BUSY_OPTIONS);

    for (int i = 0; i < ARRAY_SIZE(bad_buffers); i++) {
        uint64_t addr = bad_buffers[i].addr ?: b->pci->bar.addr;

        for (int write = 0; write < 2; write++) {
            for (int round = 0; round <= hints; round++) {
                g_test_message("%s, %d, %d", bad_buffers[i].name, write, round);
                check_bad_buffer(b, hints ? b->hint_vq : SVQ,
                                 (Buffer) { addr, bad_buffers[i].len, write },
                                 round);
            }
        }
    }
    balloon_quit(b);
}

/*
 * Events while hints are in flight and the user waits for statistics
 */

typedef struct Fault {
    Busy busy;
    HintState state;
    /* The I/O thread, which is stopped */
    pid_t tid;
} Fault;

/* The user does not wait for statistics for ever. */
static void wait_stats(Balloon *b)
{
    if (rust_device) {
        qtest_qmp_eventwait(b->qts, "BALLOON_STATS");
    }
}

static void fault_none_left(Fault *f)
{
    if (rust_device) {
        g_assert_cmpint(busy_in_flight(&f->busy), ==, 0);
    }
}

static void fault_cancel(Fault *f)
{
    if (f->state != HINT_DONE) {
        cancel_migration(f->busy.b);
    }
}

static void do_stop(Fault *f)
{
    stop_vm(f->busy.b);
    fault_none_left(f);
    if (rust_device) {
        g_assert_cmpint(used_idx(f->busy.b, f->busy.q), ==, f->busy.end);
    }
    continue_iothread(f->tid);
    continue_vm(f->busy.b);
    busy_finish(&f->busy);
    fault_cancel(f);
}

static void do_reset(Fault *f)
{
    balloon_restart(f->busy.b, F_BALLOON);
    fault_none_left(f);
    continue_iothread(f->tid);
    busy_check_guard(&f->busy);
    fault_cancel(f);
}

static void do_cancel(Fault *f)
{
    /* This does not depend on the I/O thread. */
    f->busy.b->hints_polled = false;
    fault_cancel(f);
    continue_iothread(f->tid);
    busy_finish(&f->busy);
}

/* The user deletes the I/O thread that the device uses. */
static void do_delete_iothread(Fault *f)
{
    qtest_qmp_assert_success(f->busy.b->qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'io0' } }");
    if (f->state == HINT_START) {
        /* Otherwise migration makes each of many hints wait. */
        f->busy.b->hints_polled = false;
        fault_cancel(f);
    }
    continue_iothread(f->tid);
    busy_finish(&f->busy);
    if (f->state != HINT_START) {
        fault_cancel(f);
    }
}

static void do_unplug(Fault *f)
{
    /* This event comes first. */
    eject_balloon_start(f->busy.b);
    wait_stats(f->busy.b);
    eject_balloon_wait(f->busy.b);
    continue_iothread(f->tid);
    busy_check_guard(&f->busy);
    fault_cancel(f);
}

/* QEMU must exit with success: the caller checks that. */
static void do_quit(Fault *f)
{
    continue_iothread(f->tid);
}

static const struct {
    const char *name;
    void (*fn)(Fault *f);
    bool rust_only;
    /* The user asks for this before migration, when it is permitted. */
    bool unplug;
    bool works;
} events[] = {
    { "stop", do_stop, .works = true },
    /* The I/O thread of the C device may use the queue after it was reset. */
    { "reset", do_reset, .rust_only = true, .works = true },
    { "cancel", do_cancel, .works = true },
    { "delete-iothread", do_delete_iothread, .works = true },
    { "unplug", do_unplug, .unplug = true },
    { "quit", do_quit },
};

static void check_event(int event, HintState state)
{
    Balloon *b = balloon_start(transport, BUSY_OPTIONS);
    Fault f = { .state = state };
    uint32_t head;

    if (events[event].unplug) {
        qtest_qmp_device_del_send(b->qts, "balloon");
    }
    /* The driver does not answer. */
    head = submit_element(b, SVQ, (Buffer[]) { put_stats(b, put(b, "", 1)) },
                          1);
    poll_stats(b);
    wait_used(b, SVQ, head);
    if (rust_device) {
        qtest_qmp_assert_success(
            b->qts, "{ 'execute': 'qom-set', 'arguments': { 'path': %s,"
            " 'property': 'guest-stats-request', 'value': true } }",
            BALLOON_PATH);
    }
    hint_until(b, state);
    if (rust_device) {
        /* The C device may poll, and stop with a lock taken. */
        f.tid = stop_iothread(b);
    }
    busy_start(&f.busy, b, HINT, busy_alloc(b), ARRAY_SIZE(f.busy.heads));
    if (f.tid) {
        WAIT_FOR(busy_in_flight(&f.busy) == f.busy.n);
    }
    events[event].fn(&f);
    if (events[event].works) {
        wait_stats(b);
        check_works(b);
    }
    balloon_quit(b);
}

static void test_event(const void *data)
{
    for (HintState state = 0; state < HINT_STATES; state++) {
        g_test_message("state %d", state);
        check_event(GPOINTER_TO_INT(data), state);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    /* None of this depends on the transport. */
    transport = pci_transport();
    if (!transport) {
        return g_test_run();
    }
    rust_device = is_rust_device();
    qtest_add_data_func("virtio-balloon/bad-buffers/statistics",
                        GINT_TO_POINTER(false), test_bad_buffers);
    qtest_add_data_func("virtio-balloon/bad-buffers/hints",
                        GINT_TO_POINTER(true), test_bad_buffers);
    for (int i = 0; i < ARRAY_SIZE(events); i++) {
        g_autofree char *path = g_strdup_printf(
            "virtio-balloon/hints-in-flight/%s", events[i].name);

        if (rust_device || !events[i].rust_only) {
            qtest_add_data_func(path, GINT_TO_POINTER(i), test_event);
        }
    }
    return g_test_run();
}
