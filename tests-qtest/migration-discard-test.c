/*
 * QTest test cases for migration: ranges that the destination has to discard
 *
 * A stream of postcopy migration tells the destination which memory it has to
 * discard.  The ranges of a damaged stream must not do harm.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include <glib/gstdio.h>

#define PAGE        4096
#define RAM_SIZE    (16 * MiB)

/* See migration/savevm.h and migration/savevm.c */
#define FILE_MAGIC              0x5145564d
#define FILE_VERSION            3
#define COMMAND                 8
#define CMD_POSTCOPY_ADVISE     3
#define CMD_POSTCOPY_DISCARD    6
#define CMD_UNKNOWN             0x7fff

typedef struct Case {
    const char *path;
    uint64_t start, length;
    /* What the error is about: the last command of the stream is unknown */
    const char *error;
} Case;

static const Case cases[] = {
    { "/migration-discard/first-page", 0, PAGE, "unknown" },
    { "/migration-discard/last-page", RAM_SIZE - PAGE, PAGE, "unknown" },
    { "/migration-discard/all", 0, RAM_SIZE, "unknown" },
    { "/migration-discard/behind", RAM_SIZE, PAGE, "Failed to discard" },
    { "/migration-discard/far", 1ull << 60, PAGE, "Failed to discard" },
    { "/migration-discard/beyond-end", RAM_SIZE - PAGE, 2 * PAGE,
      "Failed to discard" },
    { "/migration-discard/too-long", PAGE, 1ull << 60, "Failed to discard" },
    { "/migration-discard/wrap", -(uint64_t)PAGE, 2 * PAGE,
      "Failed to discard" },
};

static void put(GByteArray *s, uint64_t value, int bytes)
{
    uint8_t data[8];

    stq_be_p(data, value);
    g_byte_array_append(s, data + 8 - bytes, bytes);
}

static void put_command(GByteArray *s, uint16_t command, uint16_t length)
{
    put(s, COMMAND, 1);
    put(s, command, 2);
    put(s, length, 2);
}

/* The name of the block in the machine "none", as in the stream */
static const char ram[] = "\3ram";

static void write_stream(const char *file, const Case *c)
{
    g_autoptr(GByteArray) s = g_byte_array_new();
    GError *err = NULL;

    put(s, FILE_MAGIC, 4);
    put(s, FILE_VERSION, 4);
    put_command(s, CMD_POSTCOPY_ADVISE, 0);
    put_command(s, CMD_POSTCOPY_DISCARD, 1 + sizeof(ram) + 16);
    put(s, 0, 1);
    g_byte_array_append(s, (const uint8_t *)ram, sizeof(ram));
    put(s, c->start, 8);
    put(s, c->length, 8);
    put_command(s, CMD_UNKNOWN, 0);
    g_file_set_contents(file, (const char *)s->data, s->len, &err);
    g_assert_no_error(err);
}

/* Wait until the migration has failed, and return why. */
static char *wait_for_error(QTestState *qts)
{
    for (;;) {
        QDict *info =
            qtest_qmp_assert_success_ref(qts,
                                         "{ 'execute': 'query-migrate' }");
        const char *status = qdict_get_try_str(info, "status");
        char *error = NULL;

        g_assert_cmpstr(status, !=, "completed");
        if (!g_strcmp0(status, "failed")) {
            error = g_strdup(qdict_get_str(info, "error-desc"));
        }
        qobject_unref(info);
        if (error) {
            return error;
        }
        g_usleep(1000);
    }
}

static void test_range(const void *opaque)
{
    const Case *c = opaque;
    g_autofree char *dir = g_dir_make_tmp("migration-discard-XXXXXX", NULL);
    g_autofree char *file = g_build_filename(dir, "stream", NULL);
    g_autofree char *uri = g_strdup_printf("file:%s", file);
    g_autofree char *error = NULL;
    QTestState *qts;

    write_stream(file, c);
    qts = qtest_init("-machine none -m 16M -incoming defer "
                     "-global migration.send-configuration=off");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-incoming',"
                             " 'arguments': { 'uri': %s,"
                             " 'exit-on-error': false } }", uri);
    error = wait_for_error(qts);
    g_assert_nonnull(strstr(error, c->error));

    qtest_quit(qts);
    g_unlink(file);
    g_rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        qtest_add_data_func(cases[i].path, &cases[i], test_range);
    }
    return g_test_run();
}
