/*
 * QTest test cases for virtio-balloon: migration and free page hinting
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-migration.h"

static void test_hinting(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 16);
    uint32_t id;

    g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_STOP);
    /* Hints that nobody has asked for are returned */
    hint(b, mem);

    start_migration(b);
    id = wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_STOP);
    g_assert_cmphex(id, >, 0x80000000);

    hint_command(b, id);
    for (int i = 0; i < 16; i++) {
        hint(b, mem + i * PAGE);
    }
    /* Pages are only skipped, not discarded */
    assert_pages(b, mem, "PPPPPPPPPPPPPPPP");

    /* The driver has no more */
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
    g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_STOP);

    cancel_hinting(b);

    /* The next one has another ID */
    start_migration(b);
    g_assert_cmphex(wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_DONE), ==, id + 1);
    /* Reset in the middle of it */
    balloon_restart(b, F_BALLOON);
    g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_STOP);
    cancel_migration(b);
    balloon_quit(b);
}

static void test_hinting_reset(const void *data)
{
    Balloon *b = balloon_start_hinting(data);

    /* The I/O thread of the C device is not prepared for hints in flight. */
    check_hinting_reset(b, false);
    balloon_quit(b);
}

/*
 * Nothing is taken from the queue while the VM is stopped, and everything after
 * that
 */
static void test_hinting_stop_cont(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 1);
    uint32_t head;

    for (HintState state = 0; state < HINT_STATES; state++) {
        int64_t taken;

        hint_until(b, state);
        stop_vm(b);
        taken = queue_status(b, b->hint_vq, "last-avail-idx");
        head = submit(b, b->hint_vq, mem, PAGE, true);
        /*
         * There is no way to know that the I/O thread does not want to do
         * anything.  Give it many opportunities to do what is wrong.
         */
        for (int i = 0; i < 200; i++) {
            g_assert_cmpint(queue_status(b, b->hint_vq, "last-avail-idx"), ==,
                            taken);
            assert_not_used(b, b->hint_vq);
        }
        continue_vm(b);
        wait_used(b, b->hint_vq, head);
        if (!b->hints_polled) {
            wait_hint_queue_idle(b);
        }
        if (state != HINT_DONE) {
            cancel_hinting(b);
        }
        balloon_restart(b, F_BALLOON);
    }
    balloon_quit(b);
}

static void test_hinting_unplug(const void *data)
{
    for (HintState state = 0; state < HINT_STATES; state++) {
        Balloon *b;

        /* The I/O thread of the C device is never idle then. */
        if (state == HINT_START) {
            continue;
        }
        b = balloon_start_hinting(data);
        check_hinting_unplug(b, state, false);
        balloon_quit(b);
    }
}

/* A command ID that is too short breaks the device, but not QEMU */
static void test_hinting_bad_command(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 1);

    submit(b, b->hint_vq, mem, 3, false);
    /* The I/O thread reads the command at some time */
    WAIT_FOR(is_broken_for_qmp(b));
    assert_broken(b);
    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken(b));
    hint(b, mem);
    balloon_quit(b);
}

/* The state arrives at the destination. */
static void test_migrate(const void *data)
{
    const char *options = ",free-page-hint=on,iothread=io0,deflate-on-oom=on";
    Balloon *b = balloon_start(data, options);
    uint64_t mem = alloc_pages(b, 3);

    set_balloon(b, RAM_SIZE - 50 * PAGE);
    config_writel(b, CFG(actual), 40);
    config_writel(b, CFG(poison_val), 0xcafe);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);

    b = balloon_migrate(b, options);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - 40 * PAGE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 50);
    g_assert_cmpint(config_readl(b, CFG(actual)), ==, 40);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0xcafe);
    g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_DONE);
    assert_pages(b, mem, "0PP");
    /* The queues go on where they were. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 2 }, 1);
    assert_pages(b, mem, "0P0");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "hinting/migrate", test_hinting },
    { "hinting/reset", test_hinting_reset },
    { "hinting/stop-cont", test_hinting_stop_cont },
    { "hinting/unplug", test_hinting_unplug, .pc_only = true },
    { "hinting/bad-command", test_hinting_bad_command },
    { "migrate", test_migrate },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
