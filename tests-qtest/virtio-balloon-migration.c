/*
 * Migration and free page hinting, for tests of virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qemu/bswap.h"
#include "virtio-balloon-migration.h"

/*
 * Migration
 */

static bool migration_has_status(Balloon *b, const char *expected)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'query-migrate' }");
    const char *status = qdict_get_try_str(ret, "status");
    bool result = !g_strcmp0(status, expected);

    if (!g_strcmp0(status, "failed") && !strcmp(expected, "cancelled")) {
        /*
         * The sending thread may notice that the channel is closed before it
         * learns that this is intended.
         */
        result = true;
    } else if (!result && (!g_strcmp0(status, "failed") ||
                           !g_strcmp0(status, "completed") ||
                           !g_strcmp0(status, "cancelled"))) {
        g_test_message("%s", qdict_get_try_str(ret, "error-desc") ?: "");
        g_assert_cmpstr(status, ==, expected);
    }
    qobject_unref(ret);
    return result;
}

static bool migration_has_failed(Balloon *b)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'query-migrate' }");
    bool failed = !g_strcmp0(qdict_get_try_str(ret, "status"), "failed");

    qobject_unref(ret);
    return failed;
}

/* Wait until the migration has ended, with the given status. */
static void wait_migration(Balloon *b, const char *status)
{
    WAIT_FOR(migration_has_status(b, status));
}

/* A file for the state of a VM, in a directory of its own */
typedef struct StateFile {
    char *dir;
    char *path;
} StateFile;

static void remove_state_file(void *opaque)
{
    StateFile *file = opaque;

    g_unlink(file->path);
    g_rmdir(file->dir);
}

static void state_file_init(StateFile *file)
{
    g_autoptr(GError) err = NULL;

    file->dir = g_dir_make_tmp("virtio-balloon-XXXXXX", &err);
    g_assert_no_error(err);
    file->path = g_build_filename(file->dir, "state", NULL);
    /* Failed assertions do not get as far as state_file_cleanup(). */
    qtest_add_abrt_handler(remove_state_file, file);
}

static void state_file_cleanup(StateFile *file)
{
    qtest_remove_abrt_handler(file);
    remove_state_file(file);
    g_free(file->path);
    g_free(file->dir);
}

/* The queues and all other guest memory have not moved. */
static void move_driver(Balloon *dst, Balloon *src)
{
    QGuestAllocator alloc = *dst->alloc;

    *dst->alloc = *src->alloc;
    *src->alloc = alloc;

    dst->dev->features = src->dev->features;
    dst->dev->features_negotiated = true;
    dst->num_queues = src->num_queues;
    dst->hint_vq = src->hint_vq;
    dst->reporting_vq = src->reporting_vq;
    for (int i = 0; i < src->num_queues; i++) {
        dst->vq[i] = src->vq[i];
        dst->vq[i]->vdev = dst->dev;
    }
    src->num_queues = 0;
}

static char *file_uri(const char *path)
{
    return g_strdup_printf("file:%s", path);
}

void balloon_save(Balloon *b, const char *path)
{
    g_autofree char *uri = file_uri(path);

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
    wait_migration(b, "completed");
}

static Balloon *boot_incoming(Balloon *src, const char *options)
{
    g_autofree char *incoming = g_strdup_printf("%s -incoming defer", options);

    return balloon_boot(src->t, incoming);
}

Balloon *balloon_load(Balloon *src, const char *path, const char *options)
{
    g_autofree char *uri = file_uri(path);
    Balloon *dst = boot_incoming(src, options);

    qtest_qmp_assert_success(
        dst->qts, "{ 'execute': 'migrate-incoming',"
        " 'arguments': { 'uri': %s } }", uri);
    wait_migration(dst, "completed");
    move_driver(dst, src);
    return dst;
}

void balloon_migrate_fails(Balloon *src, const char *options,
                           const char *message)
{
    g_autofree char *uri = NULL, *text = NULL, *log = NULL, *all = NULL;
    StateFile file;
    Balloon *dst;

    g_assert_cmpint(close(g_file_open_tmp("virtio-balloon-XXXXXX", &log,
                                          NULL)), ==, 0);
    all = g_strdup_printf("%s 2>%s", options, log);
    state_file_init(&file);
    uri = file_uri(file.path);
    stop_vm(src);
    balloon_save(src, file.path);
    dst = boot_incoming(src, all);
    qtest_qmp_assert_success(
        dst->qts, "{ 'execute': 'migrate-incoming',"
        " 'arguments': { 'uri': %s, 'exit-on-error': false } }", uri);
    WAIT_FOR(migration_has_failed(dst));
    state_file_cleanup(&file);
    balloon_quit(dst);

    g_assert_true(g_file_get_contents(log, &text, NULL, NULL));
    g_test_message("%s", text);
    g_assert_true(g_regex_match_simple(message, text, G_REGEX_MULTILINE, 0));
    g_unlink(log);
}

Balloon *balloon_migrate(Balloon *src, const char *options)
{
    StateFile file;
    Balloon *dst;

    state_file_init(&file);
    stop_vm(src);
    balloon_save(src, file.path);
    dst = balloon_load(src, file.path, options);
    state_file_cleanup(&file);

    balloon_quit(src);
    continue_vm(dst);
    return dst;
}

void start_migration(Balloon *b)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'max-bandwidth': 10,"
        " 'zero-page-detection': 'none' } }");
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate',"
        " 'arguments': { 'uri': 'exec:cat > /dev/null' } }");
}

void cancel_migration(Balloon *b)
{
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'migrate_cancel' }");
    wait_migration(b, "cancelled");
    if (b->hints_polled) {
        b->hints_polled = false;
        wait_hint_queue_idle(b);
    }
}

/*
 * Free page hinting
 */

Balloon *balloon_start_hinting(const Transport *t)
{
    return balloon_start(t, t->pci ?
                         HINT_OPTIONS " -global virtio-pci.ioeventfd=off" :
                         HINT_OPTIONS " -global virtio-mmio.ioeventfd=off");
}

uint32_t get_cmd_id(Balloon *b)
{
    return config_readl(b, CFG(free_page_hint_cmd_id));
}

uint32_t wait_cmd_id(Balloon *b, uint32_t old)
{
    uint32_t id;

    WAIT_FOR((id = get_cmd_id(b)) != old);
    return id;
}

void hint_command(Balloon *b, uint32_t id)
{
    uint32_t le = cpu_to_le32(id);

    wait_used(b, b->hint_vq,
              submit(b, b->hint_vq, put(b, &le, sizeof(le)), sizeof(le),
                     false));
    b->hints_polled = id != VIRTIO_BALLOON_CMD_ID_STOP;
    if (!b->hints_polled) {
        wait_hint_queue_idle(b);
    }
}

void hint(Balloon *b, uint64_t addr)
{
    wait_used(b, b->hint_vq, submit(b, b->hint_vq, addr, PAGE, true));
    if (!b->hints_polled) {
        wait_hint_queue_idle(b);
    }
}

void hint_until(Balloon *b, HintState state)
{
    uint32_t before = get_cmd_id(b), id;

    start_migration(b);
    id = wait_cmd_id(b, before);
    if (state >= HINT_START) {
        hint_command(b, id);
    }
    if (state >= HINT_STOP) {
        hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);
    }
    if (state == HINT_DONE) {
        cancel_hinting(b);
    }
    /*
     * While the driver sends hints, the C device shows the command ID that
     * stops hinting; see virtio-balloon-rust-test.c.
     */
    if (state != HINT_START) {
        g_assert_cmphex(get_cmd_id(b), ==,
                        state == HINT_REQUESTED ? id :
                        state == HINT_DONE ? VIRTIO_BALLOON_CMD_ID_DONE :
                        VIRTIO_BALLOON_CMD_ID_STOP);
    }
}

void cancel_hinting(Balloon *b)
{
    cancel_migration(b);
    /* The device is told before the migration ends. */
    g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_DONE);
}

/* Send a hint.  With in_flight, the device may still have it afterwards. */
static void hint_or_submit(Balloon *b, uint64_t addr, bool in_flight)
{
    if (in_flight) {
        submit(b, b->hint_vq, addr, PAGE, true);
    } else {
        hint(b, addr);
    }
}

void check_hinting_reset(Balloon *b, bool in_flight)
{
    uint64_t mem = alloc_pages(b, 2);

    for (HintState state = 0; state < HINT_STATES; state++) {
        hint_until(b, state);
        hint_or_submit(b, mem, in_flight);
        balloon_restart(b, F_BALLOON);
        g_assert_cmphex(get_cmd_id(b), ==, VIRTIO_BALLOON_CMD_ID_STOP);
        hint(b, mem);
        if (state != HINT_DONE) {
            cancel_hinting(b);
        }
    }
    assert_pages(b, mem, "PP");
}

void check_hinting_unplug(Balloon *b, HintState state, bool in_flight)
{
    uint64_t mem = alloc_pages(b, 1);

    /* The device can only be unplugged by the user before migration begins. */
    qtest_qmp_device_del_send(b->qts, "balloon");
    hint_until(b, state);
    hint_or_submit(b, mem, in_flight);
    eject_balloon(b);
    if (state != HINT_DONE) {
        cancel_migration(b);
    }
}
