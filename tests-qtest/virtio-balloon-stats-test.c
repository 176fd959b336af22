/*
 * QTest test cases for virtio-balloon: statistics of the guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-migration.h"
#include "qobject/qnum.h"

/* The value of a statistic that the driver did not send */
#define UNSET           UINT64_MAX

/*
 * Statistics in QMP
 */

#define INTERVAL        "guest-stats-polling-interval"

static QDict *try_set_interval(Balloon *b, int64_t value)
{
    return qtest_qmp(b->qts, "{ 'execute': 'qom-set', 'arguments': {"
                     " 'path': %s, 'property': %s, 'value': %" PRId64 " } }",
                     BALLOON_PATH, INTERVAL, value);
}

static int64_t get_interval(Balloon *b, const char *path)
{
    QDict *resp = qtest_qmp(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': %s } }", path, INTERVAL);
    int64_t value = qdict_get_int(resp, "return");

    qobject_unref(resp);
    return value;
}

static QDict *get_stats(Balloon *b)
{
    return qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats' } }", BALLOON_PATH);
}

static uint64_t get_stat(Balloon *b, const char *name)
{
    QDict *ret = get_stats(b);
    QNum *num = qobject_to(QNum, qdict_get(qdict_get_qdict(ret, "stats"),
                                           name));
    uint64_t value;

    g_assert_nonnull(num);
    /* Large values are unsigned; others can be signed or unsigned */
    if (!qnum_get_try_uint(num, &value)) {
        value = qnum_get_int(num);
    }
    qobject_unref(ret);
    return value;
}

static void assert_stat(Balloon *b, const char *name, uint64_t expected)
{
    g_assert_cmphex(get_stat(b, name), ==, expected);
}

static int64_t last_update(Balloon *b)
{
    QDict *ret = get_stats(b);
    int64_t value = qdict_get_int(ret, "last-update");

    qobject_unref(ret);
    return value;
}

/*
 * Statistics from the driver
 */

typedef struct virtio_balloon_stat Stat;

static Stat stat_entry(uint16_t tag, uint64_t val)
{
    return (Stat) { cpu_to_le16(tag), cpu_to_le64(val) };
}

static uint32_t send_stats(Balloon *b, const Stat *stats, int n)
{
    return submit(b, SVQ, put(b, stats, n * sizeof(*stats)),
                  n * sizeof(*stats), false);
}

/*
 * Wait until the device has received the statistics that the driver has sent.
 */
static void sync_stats(Balloon *b, const char *name, uint64_t value)
{
    WAIT_FOR(get_stat(b, name) == value);
}

/*
 * Tests
 */

static void test_stats(const void *data)
{
    static const char *names[] = {
        "stat-swap-in", "stat-swap-out", "stat-major-faults",
        "stat-minor-faults", "stat-free-memory", "stat-total-memory",
        "stat-available-memory", "stat-disk-caches", "stat-htlb-pgalloc",
        "stat-htlb-pgfail", "stat-oom-kills", "stat-alloc-stalls",
        "stat-async-scans", "stat-direct-scans", "stat-async-reclaims",
        "stat-direct-reclaims",
    };
    Balloon *b = balloon_start(data, "");
    Stat stats[ARRAY_SIZE(names)];
    uint32_t head;
    int i;

    QEMU_BUILD_BUG_ON(ARRAY_SIZE(names) != VIRTIO_BALLOON_S_NR);
    g_assert_cmpint(last_update(b), ==, 0);
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        assert_stat(b, names[i], UNSET);
        stats[i] = stat_entry(i, 1000 + i);
    }
    stats[5].val = cpu_to_le64(UINT64_MAX - 1);

    head = send_stats(b, stats, ARRAY_SIZE(stats));
    sync_stats(b, names[15], 1015);
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        assert_stat(b, names[i], i == 5 ? UINT64_MAX - 1 : 1000 + i);
    }
    g_assert_cmpint(last_update(b), >, 1700000000);
    /* The device keeps the buffer, because polling is disabled */
    assert_not_used(b, SVQ);

    set_stats_interval(b, 10);
    g_assert_cmpint(get_interval(b, backend_path(b->t)), ==, 10);
    g_assert_cmpint(get_interval(b, BALLOON_PATH), ==, 10);
    /* The device polls at once, */
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    /* and again after the interval; a statistic that was not sent is unset */
    stats[0] = stat_entry(7, 77);
    stats[1] = stat_entry(VIRTIO_BALLOON_S_NR, 1);
    stats[2] = stat_entry(0xffff, 2);
    stats[3] = stat_entry(6, 66);
    stats[4] = stat_entry(7, 78);
    head = send_stats(b, stats, 5);
    sync_stats(b, names[7], 78);
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        assert_stat(b, names[i], i == 6 ? 66 : i == 7 ? 78 : UNSET);
    }
    qtest_clock_step(b->qts, 9 * SECOND);
    assert_not_used(b, SVQ);
    qtest_clock_step(b->qts, 2 * SECOND);
    wait_used(b, SVQ, head);

    /* The timer continues even if the driver has not answered yet */
    qtest_clock_step(b->qts, 50 * SECOND);
    head = send_stats(b, stats, 1);
    sync_stats(b, names[7], 77);
    qtest_clock_step(b->qts, 11 * SECOND);
    wait_used(b, SVQ, head);

    /* Polling is disabled */
    head = send_stats(b, stats + 3, 1);
    sync_stats(b, names[6], 66);
    set_stats_interval(b, 0);
    qtest_clock_step(b->qts, 100 * SECOND);
    assert_not_used(b, SVQ);
    balloon_quit(b);
}

static void test_stats_interval(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(4, 44) };
    uint32_t head = send_stats(b, stats, 1);

    sync_stats(b, "stat-free-memory", 44);
    set_stats_interval(b, 100);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    stats[0] = stat_entry(4, 45);
    head = send_stats(b, stats, 1);
    sync_stats(b, "stat-free-memory", 45);

    /* A shorter interval counts from now */
    qtest_clock_step(b->qts, 50 * SECOND);
    set_stats_interval(b, 5);
    qtest_clock_step(b->qts, 4 * SECOND);
    assert_not_used(b, SVQ);
    qtest_clock_step(b->qts, 2 * SECOND);
    wait_used(b, SVQ, head);

    assert_error(try_set_interval(b, -1),
                 "timer value must be greater than zero");
    assert_error(try_set_interval(b, 4294967296), "timer value is too big");
    g_assert_cmpint(get_interval(b, BALLOON_PATH), ==, 5);
    set_stats_interval(b, 4294967295);
    g_assert_cmpint(get_interval(b, BALLOON_PATH), ==, 4294967295);
    balloon_quit(b);
}

/* A driver that sends another buffer gets back the first one */
static void test_stats_twice(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(0, 1), stat_entry(0, 2) };
    uint32_t first = send_stats(b, stats, 1), second;

    sync_stats(b, "stat-swap-in", 1);
    second = send_stats(b, stats + 1, 1);
    wait_used(b, SVQ, first);
    assert_stat(b, "stat-swap-in", 2);
    assert_not_used(b, SVQ);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, second);
    balloon_quit(b);
}

/* Incomplete entries are ignored */
static void test_stats_truncated(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(0, 1), stat_entry(1, 2) };
    uint64_t addr = put(b, stats, sizeof(stats));
    int64_t before;

    submit(b, SVQ, addr, sizeof(stats) - 1, false);
    sync_stats(b, "stat-swap-in", 1);
    assert_stat(b, "stat-swap-out", UNSET);
    before = last_update(b);

    submit(b, SVQ, addr, 1, false);
    sync_stats(b, "stat-swap-in", UNSET);
    g_assert_cmpint(last_update(b), >=, before);
    g_assert_false(is_broken(b));
    balloon_quit(b);
}

static void test_stats_reset(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(3, 33) };
    uint32_t head;

    send_stats(b, stats, 1);
    sync_stats(b, "stat-minor-faults", 33);

    /* The device has a buffer. A reset by the driver drops it, */
    balloon_restart(b, F_BALLOON);
    assert_stat(b, "stat-minor-faults", 33);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 5 * SECOND);
    assert_not_used(b, SVQ);
    head = send_stats(b, stats, 1);
    qtest_clock_step(b->qts, 5 * SECOND);
    wait_used(b, SVQ, head);

    /* and a reset of the machine also clears the statistics. */
    send_stats(b, stats, 1);
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(b->qts, "RESET");
    assert_stat(b, "stat-minor-faults", UNSET);
    g_assert_cmpint(last_update(b), ==, 0);
    g_assert_cmpint(get_interval(b, BALLOON_PATH), ==, 1);
    balloon_quit(b);
}

/* A buffer that the device cannot read has no statistics. */
static void test_stats_in_only(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);
    uint32_t head = submit(b, SVQ, mem, PAGE, true);

    WAIT_FOR(last_update(b));
    assert_stat(b, "stat-free-memory", UNSET);
    /* The device keeps the buffer, and returns it when it polls. */
    assert_not_used(b, SVQ);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);

    assert_pages(b, mem, "P");
    g_assert_false(is_broken_for_qmp(b));
    balloon_quit(b);
}

/* The VM is stopped and continued while the device has a buffer */
static void test_stop_cont(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(9, 99) };
    uint64_t mem = alloc_pages(b, 2);
    uint32_t head = send_stats(b, stats, 1);

    sync_stats(b, "stat-htlb-pgfail", 99);
    stop_vm(b);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE);
    set_balloon(b, RAM_SIZE / 2);
    continue_vm(b);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / 2 / PAGE);

    assert_not_used(b, SVQ);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0");
    balloon_quit(b);
}

/* The destination pops the buffer again that the source has kept. */
static void test_stats_migrate(const void *data)
{
    Balloon *b = balloon_start(data, "");
    Stat stats[] = { stat_entry(1, 11) };
    uint32_t head = send_stats(b, stats, 1);

    sync_stats(b, "stat-swap-out", 11);
    b = balloon_migrate(b, "");
    sync_stats(b, "stat-swap-out", 11);
    assert_not_used(b, SVQ);
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "stats/all", test_stats },
    { "stats/interval", test_stats_interval },
    { "stats/twice", test_stats_twice },
    { "stats/truncated", test_stats_truncated },
    { "stats/in-only", test_stats_in_only },
    { "stats/reset", test_stats_reset },
    { "stats/migrate", test_stats_migrate },
    { "stop-cont", test_stop_cont },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
