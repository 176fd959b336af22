/*
 * QTest test cases for virtio-balloon: migration and free page hinting
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <sys/un.h>
#include "virtio-balloon-migration.h"

static void test_hinting(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 16);
    uint32_t id;

    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);
    /* Elements with hints are returned even if no round is active */
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

    /* The driver has no more hints */
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);

    cancel_hinting(b);

    /* The next round has another ID */
    start_migration(b);
    g_assert_cmphex(wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_DONE), ==, id + 1);
    /* The driver resets the device in the middle of the round */
    balloon_restart(b, F_BALLOON);
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);
    cancel_migration(b);
    balloon_quit(b);
}

/*
 * The I/O thread of the C device turns notifications off while it polls the
 * queue.  If the VM arrives in that state, the driver must be told again to
 * notify the device.
 */
static void test_no_notify(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 2);
    uint64_t flags;

    hint(b, mem);
    wait_hint_queue_idle(b);
    stop_vm(b);
    flags = b->vq[b->hint_vq]->used + offsetof(struct vring_used, flags);
    qtest_writew(b->qts, flags, VRING_USED_F_NO_NOTIFY);

    /* With ioeventfd, which is the default, C looks at the queue now. */
    b = balloon_migrate(b, HINT_OPTIONS);
    WAIT_FOR(!qtest_readw(b->qts, flags));
    hint(b, mem + PAGE);
    balloon_quit(b);
}

static void test_hinting_reset(const void *data)
{
    Balloon *b = balloon_start_hinting(data);

    /*
     * Not with hints in flight: the I/O thread of the C device may use the
     * queue after it was reset.
     */
    check_hinting_reset(b, false);
    balloon_quit(b);
}

/*
 * No element is popped while the VM is stopped, and all are popped when it
 * continues.
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
         * A test cannot know that the I/O thread is idle.  Give it many
         * opportunities to do something wrong.
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

/*
 * Elements of the largest size, and more of them than the device pops at a time
 */
static void test_hinting_many(const void *data)
{
    enum { ELEMENTS = 64, BUFFERS = 1024, LIMIT = 17 };
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 1);
    QVRingIndirectDesc *indirect =
        qvring_indirect_desc_setup(b->qts, b->dev, b->alloc, BUFFERS);
    uint32_t heads[ELEMENTS];
    int used = 0;

    for (int i = 0; i < BUFFERS; i++) {
        qvring_indirect_desc_add(b->dev, b->qts, indirect, mem, PAGE, true);
    }
    for (int i = 0; i < ELEMENTS; i++) {
        indirect->index = BUFFERS;
        heads[i] = qvirtqueue_add_indirect(b->qts, b->vq[b->hint_vq], indirect);
    }

    /* They are returned in order while the VM is running. */
    hint_until(b, HINT_START);
    make_available(b, b->hint_vq, heads, ELEMENTS);
    while (used < ELEMENTS) {
        uint32_t idx;

        g_assert_cmpint(queue_status(b, b->hint_vq, "inuse"), <=, LIMIT);
        if (qvirtqueue_get_buf(b->qts, b->vq[b->hint_vq], &idx, NULL)) {
            g_assert_cmpint(idx, ==, heads[used++]);
        } else {
            stop_vm(b);
            g_assert_cmpint(queue_status(b, b->hint_vq, "inuse"), ==, 0);
            continue_vm(b);
        }
    }
    cancel_hinting(b);
    g_free(indirect);
    balloon_quit(b);
}

static void test_hinting_unplug(const void *data)
{
    for (HintState state = 0; state < HINT_STATES; state++) {
        for (int in_flight = 0; in_flight < 2; in_flight++) {
            Balloon *b = balloon_start_hinting(data);

            check_hinting_unplug(b, state, in_flight);
            balloon_quit(b);
        }
    }
}

/* A command ID that is too short breaks the device, but not QEMU */
static void test_hinting_bad_command(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 1);

    submit(b, b->hint_vq, mem, 3, false);
    /* The I/O thread reads the command at any time */
    WAIT_FOR(is_broken_for_qmp(b));
    assert_broken(b);
    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken(b));
    hint(b, mem);
    balloon_quit(b);
}

/* A socket that neither accepts nor refuses connections */
typedef struct BusySocket {
    char *dir;
    char *path;
    int listener;
    int client;
} BusySocket;

static void busy_socket_init(BusySocket *s)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    s->dir = g_dir_make_tmp("virtio-balloon-XXXXXX", NULL);
    s->path = g_build_filename(s->dir, "socket", NULL);
    g_assert_cmpint(g_strlcpy(addr.sun_path, s->path, sizeof(addr.sun_path)),
                    <, sizeof(addr.sun_path));
    s->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    s->client = socket(AF_UNIX, SOCK_STREAM, 0);
    g_assert_cmpint(bind(s->listener, (struct sockaddr *)&addr, sizeof(addr)),
                    ==, 0);
    /* The backlog has room for one connection, which is never accepted. */
    g_assert_cmpint(listen(s->listener, 0), ==, 0);
    g_assert_cmpint(connect(s->client, (struct sockaddr *)&addr, sizeof(addr)),
                    ==, 0);
}

static void busy_socket_cleanup(BusySocket *s)
{
    close(s->client);
    close(s->listener);
    g_unlink(s->path);
    g_rmdir(s->dir);
    g_free(s->path);
    g_free(s->dir);
}

/*
 * The driver withdraws the feature during a round.  The device must not pass on
 * hints after that migration has ended, nor before the next one has started to
 * send.
 */
static void test_hinting_withdraw(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 8);
    g_autofree char *uri = NULL;
    BusySocket s;

    /* Modern drivers cannot do that after they have set FEATURES_OK. */
    if (b->offered & BIT64(VIRTIO_F_VERSION_1)) {
        balloon_quit(b);
        return;
    }

    busy_socket_init(&s);
    hint_until(b, HINT_START);
    hint(b, mem);
    b->dev->bus->set_features(b->dev, b->dev->features & ~F_HINT);
    /* If the device did not end the round, it would poll for hints forever. */
    b->hints_polled = false;
    cancel_migration(b);
    b->hints_polled = true;

    uri = g_strdup_printf("unix:%s", s.path);
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
    for (int i = 0; i < 8; i++) {
        hint(b, mem + i * PAGE);
    }
    b->hints_polled = false;
    wait_hint_queue_idle(b);
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);
    /* Migration can only be canceled once the connection has failed. */
    busy_socket_cleanup(&s);
    cancel_migration(b);

    /* If the driver accepts the feature, a new round can begin. */
    balloon_restart(b, F_BALLOON);
    hint_until(b, HINT_START);
    hint(b, mem);
    b->dev->bus->set_features(b->dev, b->dev->features & ~F_HINT);
    balloon_restart(b, F_BALLOON & ~F_HINT);
    wait_hint_queue_idle(b);
    cancel_migration(b);
    balloon_quit(b);
}

/* Hints for memory that is not migrated have no effect. */
static void test_hinting_ignore_shared(const void *data)
{
    g_autofree char *options = g_strdup_printf(
        HINT_OPTIONS " -global virtio-pci.ioeventfd=off"
        " -object memory-backend-file,id=shared,size=128M,share=on,mem-path=%s"
        " -object memory-backend-ram,id=private,size=896M"
        " -numa node,memdev=shared -numa node,memdev=private",
        g_get_tmp_dir());
    Balloon *b = balloon_start(data, options);
    uint64_t mem = alloc_pages(b, 2);

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': 'x-ignore-shared',"
        " 'state': true } ] } }");
    hint_until(b, HINT_START);
    hint(b, mem);
    hint(b, mem + PAGE);
    assert_pages(b, mem, "PP");
    /* A hint for memory that is migrated */
    hint(b, 512 * 1024 * 1024);
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
    cancel_hinting(b);
    balloon_quit(b);
}

/*
 * If the guest writes to a page after it has sent a hint for it, the page must
 * be in the dirty log of KVM.  Therefore the log of all memory has to be
 * cleared before the guest may send hints.
 */
static void test_hinting_dirty_log(const void *data)
{
    const int shift = 12;
    const char *event = "migration_bitmap_clear_dirty";
    g_autofree char *dir = g_dir_make_tmp("virtio-balloon-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "log", NULL);
    g_autofree char *options = g_strdup_printf(
        HINT_OPTIONS " -global migration.x-clear-bitmap-shift=%d"
        " -trace %s -D %s", shift, event, path);
    Balloon *b = balloon_start(data, options);
    g_autofree char *log = NULL;
    int cleared = 0;

    hint_until(b, HINT_REQUESTED);
    g_assert_true(g_file_get_contents(path, &log, NULL, NULL));
    for (char *line = log; (line = strstr(line, event)); line++) {
        cleared++;
    }
    g_assert_cmpint(cleared, >=, (1024 << 20) / (PAGE << shift));
    cancel_hinting(b);
    balloon_quit(b);
    g_unlink(path);
    g_rmdir(dir);
}

/* The destination has the state of the device. */
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
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_DONE);
    assert_pages(b, mem, "0PP");
    /* The queues continue where they were. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 2 }, 1);
    assert_pages(b, mem, "0P0");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "hinting/migrate", test_hinting },
    { "hinting/reset", test_hinting_reset },
    { "hinting/no-notify", test_no_notify },
    { "hinting/stop-cont", test_hinting_stop_cont },
    { "hinting/many", test_hinting_many },
    { "hinting/unplug", test_hinting_unplug, .pc_only = true },
    { "hinting/bad-command", test_hinting_bad_command },
    { "hinting/withdraw", test_hinting_withdraw },
    { "hinting/dirty-log", test_hinting_dirty_log },
    { "hinting/ignore-shared", test_hinting_ignore_shared, .pc_only = true },
    { "migrate", test_migrate },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
