/*
 * QTest test cases for virtio-balloon: the property balloon-status, which only
 * the Rust implementation has.
 *
 * virtio-balloon-oom-test and virtio-balloon-huge-pages-test check the
 * summaries of guests that are out of memory, and that wait for memory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "virtio-balloon-migration.h"

#define SECOND          1000000000LL
#define GOOD            "the balloon has the size that was asked for"

/* A member that is a string */
static void assert_member(Balloon *b, const char *name, const char *expected)
{
    QDict *status = get_status(b);

    g_assert_cmpstr(qdict_get_str(status, name), ==, expected);
    qobject_unref(status);
}

/* A member that is a list of strings, with a space after each of them */
static void assert_list(Balloon *b, const char *name, const char *expected)
{
    QDict *status = get_status(b);
    g_autoptr(GString) text = g_string_new("");
    const QListEntry *entry;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(status, name), entry) {
        g_string_append_printf(text, "%s ", qstring_get_str(
            qobject_to(QString, qlist_entry_obj(entry))));
    }
    g_assert_cmpstr(text->str, ==, expected);
    qobject_unref(status);
}

static void assert_size(Balloon *b, const char *name, uint64_t expected)
{
    QDict *status = get_status(b);

    g_assert_cmpint(qdict_get_int(status, name), ==, expected);
    qobject_unref(status);
}

static void assert_stats(Balloon *b, const char *state, int64_t asked_ago)
{
    QDict *status = get_status(b);
    QDict *stats = qdict_get_qdict(status, "statistics");

    g_assert_cmpstr(qdict_get_str(stats, "state"), ==, state);
    g_assert_cmpint(qdict_get_try_int(stats, "asked-ago", -1), ==, asked_ago);
    qobject_unref(status);
}

/* What a driver does, from the start until it makes a mistake */
static void test_driver(const void *data)
{
    Balloon *b = balloon_boot(data, ",deflate-on-oom=on");

    assert_member(b, "implementation", "Rust");
    /* balloon_boot() has set the bits ACKNOWLEDGE and DRIVER. */
    assert_member(b, "driver", "found");
    assert_summary(b, "the guest's driver has found the balloon, but is not"
                   " ready yet");
    assert_list(b, "features", "");
    assert_stats(b, "unsupported", -1);

    b->dev->bus->set_status(b->dev, 0);
    assert_member(b, "driver", "none");
    assert_summary(b, "the guest has no balloon driver");

    qvirtio_start_device(b->dev);
    balloon_negotiate(b, F_BALLOON & ~F_POISON);
    assert_member(b, "driver", "ready");
    assert_list(b, "features", "guest-stats deflate-on-oom ");
    assert_list(b, "inhibited-by", "");
    assert_summary(b, GOOD);

    stop_vm(b);
    assert_member(b, "driver", "ready");
    assert_summary(b, "the VM is stopped");
    continue_vm(b);
    assert_summary(b, GOOD);

    /* Descriptors of length zero are not allowed. */
    submit(b, IVQ, alloc_pages(b, 1), 0, false);
    assert_not_used(b, IVQ);
    assert_member(b, "driver", "broken");
    assert_summary(b, "the driver has made a mistake, and the device does"
                   " nothing until it is reset");
    balloon_restart(b, F_BALLOON);
    assert_member(b, "driver", "ready");
    balloon_quit(b);
}

static void test_size(const void *data)
{
    const uint64_t target = RAM_SIZE - 2 * PAGE;
    Balloon *b = balloon_start(data, "");

    assert_size(b, "target", RAM_SIZE);
    assert_size(b, "actual", RAM_SIZE);
    set_balloon(b, target);
    assert_size(b, "target", target);
    assert_size(b, "shown-target", target);
    assert_size(b, "actual", RAM_SIZE);
    assert_summary(b, "the guest has not given back as much memory as it is"
                   " asked for");
    config_writel(b, CFG(actual), 2);
    assert_size(b, "actual", target);
    assert_summary(b, GOOD);
    set_balloon(b, RAM_SIZE);
    assert_summary(b, "the guest has not taken back as much memory as it may");
    balloon_quit(b);
}

static void test_stats(const void *data)
{
    Balloon *b = balloon_start(data, "");
    const uint8_t none[1] = { };
    uint64_t addr = put(b, none, sizeof(none));
    uint32_t head;

    assert_stats(b, "never-sent", -1);
    assert_summary(b, GOOD);
    head = submit(b, SVQ, addr, sizeof(none), false);
    assert_stats(b, "answered", -1);
    set_stats_interval(b, 3);
    qtest_clock_step(b->qts, 1);
    wait_used(b, SVQ, head);
    assert_stats(b, "asked", 0);
    assert_summary(b, GOOD);
    qtest_clock_step(b->qts, 6 * SECOND);
    assert_stats(b, "asked", 6);
    assert_summary(b, "the guest does not send statistics that it was asked"
                   " for: is its service running?");
    submit(b, SVQ, addr, sizeof(none), false);
    assert_stats(b, "answered", -1);
    assert_summary(b, GOOD);

    /* A driver that does not send statistics */
    balloon_restart(b, F_BALLOON & ~F_STATS);
    assert_stats(b, "unsupported", -1);
    balloon_quit(b);
}

/* Memory is not discarded while a snapshot is taken. */
static void test_snapshot(const void *data)
{
    Balloon *b = balloon_start(data, "");
    QDict *resp = qtest_qmp(b->qts, "{ 'execute': 'migrate-set-capabilities',"
                            " 'arguments': { 'capabilities': [ {"
                            " 'capability': 'background-snapshot',"
                            " 'state': true } ] } }");
    bool supported = qdict_haskey(resp, "return");

    qobject_unref(resp);
    if (!supported) {
        g_test_skip("the host does not support background snapshots");
        balloon_quit(b);
        return;
    }
    /* For three seconds, the process does not read, so this does not end. */
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:sleep 3' } }");
    qtest_qmp_eventwait(b->qts, "RESUME");
    assert_list(b, "inhibited-by", "background-snapshot ");
    assert_summary(b, "memory is not returned to the host until the snapshot is"
                   " complete");
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'migrate_cancel' }");
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "status/driver", test_driver },
    { "status/size", test_size },
    { "status/stats", test_stats },
    { "status/snapshot", test_snapshot },
};

int main(int argc, char **argv)
{
    return run_rust_tests(argc, argv, "status", tests, ARRAY_SIZE(tests));
}
