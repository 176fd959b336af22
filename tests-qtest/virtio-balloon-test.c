/*
 * QTest test cases for virtio balloon device
 *
 * Copyright (c) 2024 Gao Shiyuan <gaoshiyuan@baidu.com>
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-common.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"
#include "qobject/qstring.h"

/* The value of a statistic that the driver did not send */
#define UNSET           UINT64_MAX

/*
 * Properties and statistics, as QMP shows them
 */

static void set_interval(Balloon *b, int64_t value)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'qom-set', 'arguments': {"
        " 'path': '/machine/peripheral/balloon',"
        " 'property': 'guest-stats-polling-interval',"
        " 'value': %" PRId64 " } }", value);
}

static int64_t get_interval(Balloon *b, const char *path)
{
    QDict *resp = qtest_qmp(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats-polling-interval' } }", path);
    int64_t value = qdict_get_int(resp, "return");

    qobject_unref(resp);
    return value;
}

static QDict *get_stats(Balloon *b)
{
    return qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': {"
        " 'path': '/machine/peripheral/balloon',"
        " 'property': 'guest-stats' } }");
}

static uint64_t stat_value(QDict *ret, const char *name)
{
    QNum *num = qobject_to(QNum, qdict_get(qdict_get_qdict(ret, "stats"),
                                           name));
    uint64_t value;

    g_assert_nonnull(num);
    /* Large values are unsigned, others can be either */
    if (!qnum_get_try_uint(num, &value)) {
        value = qnum_get_int(num);
    }
    return value;
}

static uint64_t get_stat(Balloon *b, const char *name)
{
    QDict *ret = get_stats(b);
    uint64_t value = stat_value(ret, name);

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
 * Features and configuration space
 */

typedef struct FeatureCase {
    const Transport *t;
    const char *property;
    const char *value;          /* NULL for the default */
    const char *name;           /* in x-query-virtio-status */
    uint64_t bit;
    bool expected;
} FeatureCase;

/* Whether the device knows that the driver has accepted a feature */
static bool has_guest_feature(Balloon *b, const char *name)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'x-query-virtio-status',"
        " 'arguments': { 'path': %s } }", backend_path(b->t));
    QDict *features = qdict_get_qdict(ret, "guest-features");
    const QListEntry *entry;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(features, "dev-features"), entry) {
        QString *str = qobject_to(QString, qlist_entry_obj(entry));

        found = found || g_str_has_prefix(qstring_get_str(str), name);
    }
    qobject_unref(ret);
    return found;
}

static void test_feature(const void *data)
{
    const FeatureCase *c = data;
    g_autofree char *options =
        c->value ? g_strdup_printf(",%s=%s,iothread=io0", c->property,
                                   c->value) : g_strdup("");
    Balloon *b = balloon_boot(c->t, options);
    uint64_t expected = c->t->features | F_STATS | F_POISON;

    expected = c->expected ? expected | c->bit : expected & ~c->bit;
    g_assert_cmphex(b->offered, ==, expected);

    g_assert_cmpint(qtest_qom_get_bool(b->qts, backend_path(c->t),
                                       c->property), ==, c->expected);
    g_assert_cmpint(qtest_qom_get_bool(b->qts, "/machine/peripheral/balloon",
                                       c->property), ==, c->expected);

    /* The driver accepts the feature, */
    balloon_negotiate(b, F_BALLOON);
    g_assert_cmpint(!!(b->dev->features & c->bit), ==, c->expected);
    g_assert_cmpint(has_guest_feature(b, c->name), ==, c->expected);
    /* or everything except for it, */
    balloon_restart(b, F_BALLOON & ~c->bit);
    g_assert_false(has_guest_feature(b, c->name));
    /* or nothing */
    balloon_restart(b, 0);
    g_assert_false(has_guest_feature(b, "VIRTIO_BALLOON_F"));

    /* A feature that is not offered cannot be accepted */
    if (!c->expected) {
        qvirtio_start_device(b->dev);
        b->dev->bus->set_features(b->dev, (b->offered & ~F_BAD) | c->bit);
        b->dev->bus->set_status(b->dev, balloon_status(b) |
                                VIRTIO_CONFIG_S_FEATURES_OK);
        g_assert_false(has_guest_feature(b, c->name));
    }
    balloon_quit(b);
}

typedef struct ConfigCase {
    const Transport *t;
    const char *options;
    int size;
    int queues;
} ConfigCase;

static void test_config(const void *data)
{
    const ConfigCase *c = data;
    Balloon *b = balloon_start(c->t, c->options);
    int i;

    g_assert_cmpint(b->num_queues, ==, c->queues);
    for (i = 0; i < 8; i++) {
        int size = i == b->hint_vq ? 1024 : i == b->reporting_vq ? 32 : 128;

        if (i >= b->num_queues) {
            /* libqos insists on queues that are not set up yet */
            b->dev->bus->queue_select(b->dev, i);
            g_assert_cmpint(b->dev->bus->get_queue_size(b->dev), ==, 0);
        } else {
            g_assert_cmpint(b->vq[i]->size, ==, size);
        }
    }

    set_balloon(b, RAM_SIZE - 5 * PAGE);
    config_writel(b, CFG(actual), 3);
    if (c->size >= 16) {
        config_writel(b, CFG(poison_val), 0xaabbccdd);
    }
    for (i = 0; i < c->size; i += 4) {
        uint32_t expected = i == CFG(num_pages) ? 5 : i == CFG(actual) ? 3 :
            i == CFG(poison_val) && (b->dev->features & F_POISON) ?
            0xaabbccdd : 0;

        g_assert_cmphex(config_readl(b, i), ==, expected);
        g_assert_cmphex(qvirtio_config_readb(b->dev, i), ==, expected & 0xff);
        g_assert_cmphex(qvirtio_config_readw(b->dev, i), ==,
                        expected & 0xffff);
    }
    /* The end of the configuration space */
    g_assert_cmphex(qvirtio_config_readb(b->dev, c->size), ==, 0xff);
    balloon_quit(b);
}

static void test_target(const void *data)
{
    Balloon *b = balloon_start(data, "");
    QDict *event;

    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE);

    set_balloon(b, RAM_SIZE / 2);
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / 2 / PAGE);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE);

    /* The driver follows */
    config_writel(b, CFG(actual), RAM_SIZE / 4 / PAGE);
    event = qtest_qmp_eventwait_ref(b->qts, "BALLOON_CHANGE");
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(event, "data"), "actual"),
                    ==, RAM_SIZE - RAM_SIZE / 4);
    qobject_unref(event);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - RAM_SIZE / 4);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / 2 / PAGE);

    /* Parts of pages, and more than there is */
    set_balloon(b, RAM_SIZE - 3 * PAGE + 1);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 2);
    set_balloon(b, 1);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / PAGE - 1);
    set_balloon(b, RAM_SIZE * 4);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 0);

    /* The target survives a reset by the driver, and so does the size */
    set_balloon(b, RAM_SIZE - 7 * PAGE);
    balloon_restart(b, F_BALLOON);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 7);
    g_assert_cmpint(config_readl(b, CFG(actual)), ==, RAM_SIZE / 4 / PAGE);

    assert_error(qtest_qmp(b->qts, "{ 'execute': 'balloon',"
                                   " 'arguments': { 'value': 0 } }"),
                 "Parameter 'value' expects a size");
    assert_error(qtest_qmp(b->qts, "{ 'execute': 'balloon',"
                                   " 'arguments': { 'value': -1 } }"),
                 "Parameter 'value' expects a size");
    balloon_quit(b);
}

static void test_poison_config(const void *data)
{
    Balloon *b = balloon_start(data, "");

    config_writel(b, CFG(poison_val), 0x12345678);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0x12345678);

    /* A reset forgets the value; without the feature it cannot be set */
    balloon_restart(b, F_BALLOON & ~F_POISON);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0);
    config_writel(b, CFG(poison_val), 0x12345678);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0);

    /* The host's fields are not the driver's */
    config_writel(b, CFG(num_pages), 0x1111);
    config_writel(b, CFG(actual), 0);
    g_assert_cmphex(config_readl(b, CFG(num_pages)), ==, 0);
    balloon_quit(b);
}

/*
 * Inflating and deflating
 */

static void test_inflate_one(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);

    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    /* once more does no harm */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0P");
    balloon_quit(b);
}

static void test_inflate_many(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 260);
    uint32_t pfns[256];
    int i;

    for (i = 0; i < 256; i++) {
        pfns[i] = pfn(mem) + 257 - i;
    }
    send_pfns(b, IVQ, pfns, 256);
    for (i = 0; i < 260; i++) {
        g_assert_cmpint(is_zero(b, mem + i * PAGE), ==, i >= 2 && i < 258);
    }
    balloon_quit(b);
}

/* Many elements at once, which are returned in order */
static void test_inflate_batch(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 101);
    uint32_t head = 0;
    int i;

    for (i = 0; i < 50; i++) {
        uint32_t le = cpu_to_le32(pfn(mem) + 1 + 2 * i);

        head = qvirtqueue_add(b->qts, b->vq[IVQ], put(b, &le, 4), 4, false,
                              false);
        /* Kick for the last one only */
        if (i < 49) {
            qtest_writew(b->qts, b->vq[IVQ]->avail + 4 + 2 * i, head);
        }
    }
    qvirtqueue_set_avail_idx(b->qts, b->dev, b->vq[IVQ], 49);
    qvirtqueue_kick(b->qts, b->dev, b->vq[IVQ], head);
    for (i = 0; i < 50; i++) {
        wait_used(b, IVQ, i);
    }
    for (i = 0; i < 101; i++) {
        g_assert_cmpint(is_zero(b, mem + i * PAGE), ==, i & 1);
    }
    balloon_quit(b);
}

/* PFNs that are divided among descriptors */
static void test_inflate_chain(const void *data)
{
    static const int parts[] = { 3, 1, 6, 2 };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 5);
    uint32_t le[] = {
        cpu_to_le32(pfn(mem) + 3),
        cpu_to_le32(pfn(mem) + 1),
        cpu_to_le32(pfn(mem)),
    };
    uint32_t head = 0;
    int offset = 0;

    for (int i = 0; i < ARRAY_SIZE(parts); i++) {
        uint32_t id = qvirtqueue_add(b->qts, b->vq[IVQ],
                                     put(b, (char *)le + offset, parts[i]),
                                     parts[i], false,
                                     i < ARRAY_SIZE(parts) - 1);

        head = i ? head : id;
        offset += parts[i];
    }
    qvirtqueue_kick(b->qts, b->dev, b->vq[IVQ], head);
    wait_used(b, IVQ, head);
    assert_pages(b, mem, "00P0P");
    balloon_quit(b);
}

static void test_inflate_indirect(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t le[] = { cpu_to_le32(pfn(mem) + 2), cpu_to_le32(pfn(mem)) };
    QVRingIndirectDesc *indirect =
        qvring_indirect_desc_setup(b->qts, b->dev, b->alloc, 2);
    uint32_t head;

    qvring_indirect_desc_add(b->dev, b->qts, indirect, put(b, &le[0], 4), 4,
                             false);
    qvring_indirect_desc_add(b->dev, b->qts, indirect, put(b, &le[1], 4), 4,
                             false);
    head = qvirtqueue_add_indirect(b->qts, b->vq[IVQ], indirect);
    qvirtqueue_kick(b->qts, b->dev, b->vq[IVQ], head);
    wait_used(b, IVQ, head);
    assert_pages(b, mem, "0P0P");
    g_free(indirect);
    balloon_quit(b);
}

static void test_deflate(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t pfns[] = { pfn(mem) + 1, pfn(mem) + 2 };

    /* Contents are kept, whether the page was in the balloon or not */
    send_pfns(b, IVQ, pfns, 1);
    send_pfns(b, DVQ, pfns, 2);
    assert_pages(b, mem, "P0PP");
    qtest_memset(b->qts, mem + PAGE, PATTERN, PAGE);
    assert_pages(b, mem, "PPPP");
    balloon_quit(b);
}

/* The driver did something wrong, and has to reset the device. */
static void assert_broken(Balloon *b)
{
    g_assert_true(is_broken_for_qmp(b));
    if (b->offered & BIT64(VIRTIO_F_VERSION_1)) {
        g_assert_true(is_broken(b));
    }
}

static void test_bad_pfns(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);
    uint32_t bad[] = {
        UINT32_MAX,
        INT32_MAX,
        pfn(RAM_SIZE * 64),
        /* Nothing is mapped at the first, devices are at the rest */
        0xd0000,
        b->t->pci ? 0xfee00 : pfn(b->mmio.addr),
        0xfffff,
    };

    for (int q = IVQ; q <= DVQ; q++) {
        send_pfns(b, q, bad, ARRAY_SIZE(bad));
        g_assert_false(is_broken(b));
    }

    /* The good ones among them are not affected */
    bad[1] = pfn(mem) + 2;
    bad[5] = pfn(mem);
    send_pfns(b, IVQ, bad, ARRAY_SIZE(bad));
    assert_pages(b, mem, "0P0");
    g_assert_false(is_broken(b));
    balloon_quit(b);
}

/* ROM and whatever else is below 1 MiB on a PC */
static void test_rom(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint8_t before[0x10000], after[0x10000];
    uint32_t pfns[16];

    qtest_memread(b->qts, 0xf0000, before, sizeof(before));
    for (int i = 0; i < 16; i++) {
        pfns[i] = 0xf0 + i;
    }
    send_pfns(b, IVQ, pfns, 16);
    qtest_memread(b->qts, 0xf0000, after, sizeof(after));
    g_assert_cmpmem(before, sizeof(before), after, sizeof(after));

    for (int i = 0; i < 16; i++) {
        pfns[i] = 0xffff0 + i;
    }
    send_pfns(b, IVQ, pfns, 16);
    qtest_memread(b->qts, 0xffff0000, after, sizeof(after));
    g_assert_cmpmem(before, sizeof(before), after, sizeof(after));
    balloon_quit(b);
}

static void test_truncated(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 3);
    uint32_t le[] = { cpu_to_le32(pfn(mem)), cpu_to_le32(pfn(mem) + 1) };
    uint64_t addr = put(b, le, sizeof(le));

    for (int len = 1; len < 4; len++) {
        wait_used(b, IVQ, submit(b, IVQ, addr, len, false));
        assert_pages(b, mem, "PPP");
    }
    for (int len = 5; len < 8; len++) {
        wait_used(b, IVQ, submit(b, IVQ, addr, len, false));
        assert_pages(b, mem, "0PP");
    }
    g_assert_false(is_broken(b));
    balloon_quit(b);
}

/* There is nothing for the device to read. */
static void test_in_only(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 2);
    uint32_t head;

    for (int q = IVQ; q <= DVQ; q++) {
        wait_used(b, q, submit(b, q, mem, PAGE, true));
    }
    assert_pages(b, mem, "PP");

    /* These are statistics, too, without any value */
    g_assert_cmpint(last_update(b), ==, 0);
    head = submit(b, SVQ, mem, PAGE, true);
    WAIT_FOR(last_update(b));
    assert_stat(b, "stat-free-memory", UNSET);
    /* The device has the buffer, and returns it when it wants more */
    assert_not_used(b, SVQ);
    set_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);

    assert_pages(b, mem, "PP");
    g_assert_false(is_broken_for_qmp(b));
    balloon_quit(b);
}

/* Empty descriptors are not allowed; the device recovers with a reset. */
static void test_zero_length(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 2);

    submit(b, IVQ, mem, 0, false);
    assert_not_used(b, IVQ);
    assert_broken(b);
    /* All queues are affected */
    submit(b, DVQ, mem, 4, false);
    assert_not_used(b, DVQ);

    balloon_restart(b, F_BALLOON);
    g_assert_false(is_broken_for_qmp(b));
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0P");
    balloon_quit(b);
}

/* A descriptor that is followed by itself */
static void submit_loop(Balloon *b, int q, uint64_t mem)
{
    QVirtQueue *vq = b->vq[q];
    uint32_t head = qvirtqueue_add(b->qts, vq, mem, 4, false, true);

    qtest_writew(b->qts, vq->desc + 16 * head + 14, head);
    qvirtqueue_kick(b->qts, b->dev, vq, head);
}

/* Far more elements than fit into the queue */
static void submit_too_many(Balloon *b, int q, uint64_t mem)
{
    qvirtqueue_set_avail_idx(b->qts, b->dev, b->vq[q], 0x8000);
    b->dev->bus->virtqueue_kick(b->dev, b->vq[q]);
}

/* A descriptor that does not exist */
static void submit_bad_head(Balloon *b, int q, uint64_t mem)
{
    qvirtqueue_kick(b->qts, b->dev, b->vq[q], 0xffff);
}

/* Something for the device to write before something for it to read */
static void submit_bad_order(Balloon *b, int q, uint64_t mem)
{
    uint32_t head = qvirtqueue_add(b->qts, b->vq[q], mem, 4, true, true);

    qvirtqueue_add(b->qts, b->vq[q], mem, 4, false, false);
    qvirtqueue_kick(b->qts, b->dev, b->vq[q], head);
}

/* Rings that make no sense break the device, but do not harm QEMU. */
static void test_bad_rings(const void *data)
{
    static void (*const submits[])(Balloon *b, int q, uint64_t mem) = {
        submit_loop, submit_too_many, submit_bad_head, submit_bad_order,
    };
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);

    for (int i = 0; i < ARRAY_SIZE(submits); i++) {
        for (int q = IVQ; q <= SVQ; q++) {
            submits[i](b, q, mem);
            assert_not_used(b, q);
            assert_broken(b);
            balloon_restart(b, F_BALLOON);
            g_assert_false(is_broken_for_qmp(b));
        }
    }
    assert_pages(b, mem, "P");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    balloon_quit(b);
}

/* A buffer where there is no memory is read as zeroes. */
static void test_bad_buffer(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);

    for (int q = IVQ; q <= DVQ; q++) {
        wait_used(b, q, submit(b, q, 0xffffffff00000ULL, 4, false));
    }
    g_assert_false(is_broken_for_qmp(b));
    assert_pages(b, mem, "P");
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) }, 1);
    assert_pages(b, mem, "0");
    balloon_quit(b);
}

static void test_interrupt(const void *data)
{
    Balloon *b = balloon_start(data, "");
    uint64_t mem = alloc_pages(b, 1);
    uint32_t le = cpu_to_le32(pfn(mem));
    uint64_t addr = put(b, &le, 4);
    uint32_t len = UINT32_MAX;

    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));
    qvirtio_wait_used_elem(b->qts, b->dev, b->vq[IVQ],
                           submit(b, IVQ, addr, 4, false), &len, TIMEOUT_US);
    g_assert_cmpint(len, ==, 0);
    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));

    /* The driver does not want to be interrupted */
    qtest_writew(b->qts, b->vq[IVQ]->avail, VRING_AVAIL_F_NO_INTERRUPT);
    wait_used(b, IVQ, submit(b, IVQ, addr, 4, false));
    g_assert_false(b->dev->bus->get_queue_isr_status(b->dev, b->vq[IVQ]));
    balloon_quit(b);
}

/*
 * Statistics
 */

typedef struct QEMU_PACKED Stat {
    uint16_t tag;
    uint64_t val;
} Stat;

static Stat stat_entry(uint16_t tag, uint64_t val)
{
    return (Stat) { cpu_to_le16(tag), cpu_to_le64(val) };
}

static uint32_t send_stats(Balloon *b, const Stat *stats, int n)
{
    return submit(b, SVQ, put(b, stats, n * sizeof(*stats)),
                  n * sizeof(*stats), false);
}

/* The device has seen what the driver has sent */
static void sync_stats(Balloon *b, const char *name, uint64_t value)
{
    WAIT_FOR(get_stat(b, name) == value);
}

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
    /* The buffer stays with the device, because nobody polls */
    assert_not_used(b, SVQ);

    set_interval(b, 10);
    g_assert_cmpint(get_interval(b, backend_path(b->t)), ==, 10);
    g_assert_cmpint(get_interval(b, "/machine/peripheral/balloon"), ==, 10);
    /* At once, */
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    /* and then again after the interval; what was not sent is unset */
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

    /* The timer goes on even if the driver has not answered yet */
    qtest_clock_step(b->qts, 50 * SECOND);
    head = send_stats(b, stats, 1);
    sync_stats(b, names[7], 77);
    qtest_clock_step(b->qts, 11 * SECOND);
    wait_used(b, SVQ, head);

    /* Disabled */
    head = send_stats(b, stats + 3, 1);
    sync_stats(b, names[6], 66);
    set_interval(b, 0);
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
    set_interval(b, 100);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    stats[0] = stat_entry(4, 45);
    head = send_stats(b, stats, 1);
    sync_stats(b, "stat-free-memory", 45);

    /* A shorter interval counts from now */
    qtest_clock_step(b->qts, 50 * SECOND);
    set_interval(b, 5);
    qtest_clock_step(b->qts, 4 * SECOND);
    assert_not_used(b, SVQ);
    qtest_clock_step(b->qts, 2 * SECOND);
    wait_used(b, SVQ, head);

    assert_error(
        qtest_qmp(b->qts, "{ 'execute': 'qom-set', 'arguments': {"
                  " 'path': '/machine/peripheral/balloon',"
                  " 'property': 'guest-stats-polling-interval',"
                  " 'value': -1 } }"),
        "timer value must be greater than zero");
    assert_error(
        qtest_qmp(b->qts, "{ 'execute': 'qom-set', 'arguments': {"
                  " 'path': '/machine/peripheral/balloon',"
                  " 'property': 'guest-stats-polling-interval',"
                  " 'value': 4294967296 } }"),
        "timer value is too big");
    g_assert_cmpint(get_interval(b, "/machine/peripheral/balloon"), ==, 5);
    set_interval(b, 4294967295);
    g_assert_cmpint(get_interval(b, "/machine/peripheral/balloon"), ==,
                    4294967295);
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
    set_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, second);
    balloon_quit(b);
}

/* Entries that are not complete are ignored */
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

    /* The device has the buffer; a reset by the driver takes it away, */
    balloon_restart(b, F_BALLOON);
    assert_stat(b, "stat-minor-faults", 33);
    set_interval(b, 1);
    qtest_clock_step(b->qts, 5 * SECOND);
    assert_not_used(b, SVQ);
    head = send_stats(b, stats, 1);
    qtest_clock_step(b->qts, 5 * SECOND);
    wait_used(b, SVQ, head);

    /* and one of the machine also the statistics. */
    send_stats(b, stats, 1);
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(b->qts, "RESET");
    assert_stat(b, "stat-minor-faults", UNSET);
    g_assert_cmpint(last_update(b), ==, 0);
    g_assert_cmpint(get_interval(b, "/machine/peripheral/balloon"), ==, 1);
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
    set_interval(b, 1);
    qtest_clock_step(b->qts, 1000);
    wait_used(b, SVQ, head);
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0");
    balloon_quit(b);
}

/*
 * Free page reporting
 */

static void report(Balloon *b, uint64_t addr, uint32_t len)
{
    wait_used(b, b->reporting_vq, submit(b, b->reporting_vq, addr, len, true));
}

static void test_reporting(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 6);
    uint32_t head;

    report(b, mem + PAGE, 2 * PAGE);
    assert_pages(b, mem, "P00PPP");

    /* Several ranges in one element */
    head = qvirtqueue_add(b->qts, b->vq[b->reporting_vq], mem, PAGE, true,
                          true);
    qvirtqueue_add(b->qts, b->vq[b->reporting_vq], mem + 4 * PAGE, 2 * PAGE,
                   true, false);
    qvirtqueue_kick(b->qts, b->dev, b->vq[b->reporting_vq], head);
    wait_used(b, b->reporting_vq, head);
    assert_pages(b, mem, "000P00");
    balloon_quit(b);
}

static void test_reporting_bad(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 4);
    uint32_t le = cpu_to_le32(pfn(mem));

    /* Not whole pages */
    report(b, mem + 1, PAGE);
    report(b, mem, PAGE - 1);
    report(b, mem + 512, 2 * PAGE - 512);
    assert_pages(b, mem, "PPPP");
    /* Not for the device to write */
    wait_used(b, b->reporting_vq,
              submit(b, b->reporting_vq, put(b, &le, 4), 4, false));
    assert_pages(b, mem, "PPPP");
    g_assert_false(is_broken(b));
    report(b, mem + 3 * PAGE, PAGE);
    assert_pages(b, mem, "PPP0");
    balloon_quit(b);
}

static void test_reporting_poison(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    uint64_t mem = alloc_pages(b, 2);

    config_writel(b, CFG(poison_val), PATTERN);
    report(b, mem, PAGE);
    assert_pages(b, mem, "PP");
    /* The balloon itself does not care */
    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0");
    config_writel(b, CFG(poison_val), 0);
    report(b, mem, PAGE);
    assert_pages(b, mem, "00");
    balloon_quit(b);
}

/*
 * Free page hinting, and migration
 */

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
    /* The round has begun, so there is nothing to ask for any more */
    g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_STOP);
    for (int i = 0; i < 16; i++) {
        hint(b, mem + i * PAGE);
    }
    /* Pages are only skipped, not discarded */
    assert_pages(b, mem, "PPPPPPPPPPPPPPPP");

    /* The driver has no more */
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);

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

/* The driver does not remember anything of the round when it is back */
static void test_hinting_reset(const void *data)
{
    Balloon *b = balloon_start_hinting(data);
    uint64_t mem = alloc_pages(b, 2);

    for (HintState state = 0; state < HINT_STATES; state++) {
        hint_until(b, state);
        /* What if hints are in flight is not the same with each device */
        hint(b, mem);
        balloon_restart(b, F_BALLOON);
        g_assert_cmphex(config_readl(b, CFG(free_page_hint_cmd_id)), ==,
                        VIRTIO_BALLOON_CMD_ID_STOP);
        hint(b, mem);
        if (state != HINT_DONE) {
            cancel_hinting(b);
        }
    }
    assert_pages(b, mem, "PP");
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

/* The device goes away in the middle of it, when there is nothing in flight */
static void test_hinting_unplug(const void *data)
{
    for (HintState state = 0; state < HINT_STATES; state++) {
        Balloon *b = balloon_start_hinting(data);
        uint64_t mem = alloc_pages(b, 1);

        if (state == HINT_START) {
            /* There is no time at which the C device does nothing. */
            balloon_quit(b);
            continue;
        }
        /* The user can only ask for it before migration */
        qtest_qmp_device_del_send(b->qts, "balloon");
        hint_until(b, state);
        hint(b, mem);
        qtest_outl(b->qts, 0xae08, 1 << 4);
        qtest_qmp_eventwait(b->qts, "DEVICE_DELETED");
        assert_error(qtest_qmp(b->qts, "{ 'execute': 'query-balloon' }"),
                     "No balloon device has been activated");
        if (state != HINT_DONE) {
            cancel_migration(b);
        }
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
    Balloon *src = balloon_start(data, options), *dst;
    uint64_t mem = alloc_pages(src, 2);
    Stat stats[] = { stat_entry(1, 11) };

    set_balloon(src, RAM_SIZE - 50 * PAGE);
    config_writel(src, CFG(actual), 40);
    config_writel(src, CFG(poison_val), 0xcafe);
    send_pfns(src, IVQ, &(uint32_t){ pfn(mem) }, 1);
    send_stats(src, stats, 1);
    sync_stats(src, "stat-swap-out", 11);

    dst = balloon_migrate(src, options);
    g_assert_cmpint(query_balloon(dst), ==, RAM_SIZE - 40 * PAGE);
    dst->dev->features_negotiated = true;
    dst->dev->features = src->dev->features;
    g_assert_cmpint(config_readl(dst, CFG(num_pages)), ==, 50);
    g_assert_cmpint(config_readl(dst, CFG(actual)), ==, 40);
    g_assert_cmphex(config_readl(dst, CFG(poison_val)), ==, 0xcafe);
    g_assert_cmphex(config_readl(dst, CFG(free_page_hint_cmd_id)), ==,
                    VIRTIO_BALLOON_CMD_ID_DONE);
    assert_pages(dst, mem, "0P");
    /* Statistics are read again from the buffer that is in the queue */
    sync_stats(dst, "stat-swap-out", 11);

    balloon_quit(src);
    balloon_quit(dst);
}

/*
 * Errors, and other tests that need no driver
 */

/* The machine, and the balloon with its proxy, for tests without a driver */
static const char *machine, *proxy;
/* Where devices can be plugged in later, if that is not the default bus */
static const char *hotplug_bus;

static QTestState *boot_machine(const char *options)
{
    return qtest_initf("-machine %s %s %s", machine,
                       hotplug_bus ? "-device pcie-root-port,id=rp0" : "",
                       options);
}

static QTestState *boot_proxy(const char *options)
{
    g_autofree char *all = g_strdup_printf("-object iothread,id=io0"
                                           " -device %s,id=balloon%s",
                                           proxy, options);

    return boot_machine(all);
}

/* Arguments for device_add, to which properties can be added */
static QDict *device_args(void)
{
    QDict *args = qdict_new();

    qdict_put_str(args, "driver", proxy);
    if (hotplug_bus) {
        qdict_put_str(args, "bus", hotplug_bus);
    }
    return args;
}

/* Add a device, which has to fail.  Takes ownership of the arguments. */
static void assert_device_add_error(QTestState *qts, QDict *args,
                                    const char *expected)
{
    assert_error(qtest_qmp(qts, "{ 'execute': 'device_add',"
                           " 'arguments': %p }", args), expected);
}

static void test_hint_without_iothread(void)
{
    QTestState *qts = boot_machine("-object iothread,id=io0");
    QDict *args = device_args();

    qdict_put_bool(args, "free-page-hint", true);
    assert_device_add_error(qts, args,
                            "'free-page-hint' requires 'iothread' to be set");
    qtest_quit(qts);
}

static void test_only_one(void)
{
    QTestState *qts = boot_proxy("");

    assert_device_add_error(qts, device_args(),
                            "Only one balloon device is supported");
    /* The first one still works */
    qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
    qtest_quit(qts);
}

static void test_hotplug(void)
{
    QTestState *qts = qtest_init("-machine pc -object iothread,id=io0");

    assert_error(qtest_qmp(qts, "{ 'execute': 'query-balloon' }"),
                 "No balloon device has been activated");
    for (int i = 0; i < 3; i++) {
        qtest_qmp_device_add(qts, "virtio-balloon-pci", "balloon",
                             "{ 'free-page-hint': true, 'iothread': 'io0',"
                             " 'free-page-reporting': true,"
                             " 'addr': '06.0' }");
        qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
        qtest_qmp_device_del_send(qts, "balloon");
        /* A PC unplugs PCI devices when the guest says so */
        qtest_outl(qts, 0xae08, 1 << 6);
        qtest_qmp_eventwait(qts, "DEVICE_DELETED");
        assert_error(qtest_qmp(qts, "{ 'execute': 'query-balloon' }"),
                     "No balloon device has been activated");
    }
    qtest_quit(qts);
}

static void test_bad_properties(void)
{
    QTestState *qts = boot_machine("");
    QDict *args = device_args();

    qdict_put_str(args, "deflate-on-oom", "maybe");
    assert_device_add_error(qts, args,
                            "Invalid parameter type for 'deflate-on-oom',"
                            " expected: boolean");
    args = device_args();
    qdict_put_str(args, "iothread", "nothing");
    assert_device_add_error(qts, args, "Device 'nothing' not found");
    assert_error(qtest_qmp(qts, "{ 'execute': 'query-balloon' }"),
                 "No balloon device has been activated");
    qtest_quit(qts);
}

/* Properties of the device cannot be changed once it is there */
static void test_realized_properties(void)
{
    QTestState *qts = boot_proxy("");
    QDict *resp = qtest_qmp(
        qts, "{ 'execute': 'qom-set', 'arguments': {"
        " 'path': '/machine/peripheral/balloon/virtio-backend',"
        " 'property': 'deflate-on-oom', 'value': true } }");

    g_assert_true(qdict_haskey(resp, "error"));
    qobject_unref(resp);
    g_assert_false(qtest_qom_get_bool(qts, "/machine/peripheral/balloon",
                                      "deflate-on-oom"));
    qtest_quit(qts);
}

/* The properties that are features, as seen through the proxy */
static void test_proxy_properties(void)
{
    static const struct {
        const char *options;
        bool oom, hint, poison, reporting;
    } cases[] = {
        { "", false, false, true, false },
        { ",deflate-on-oom=on", true, false, true, false },
        { ",deflate-on-oom=off,page-poison=off", false, false, false, false },
        { ",free-page-hint=on,iothread=io0", false, true, true, false },
        { ",free-page-reporting=on", false, false, true, true },
        { ",deflate-on-oom=on,free-page-hint=on,iothread=io0,"
          "page-poison=off,free-page-reporting=on", true, true, false, true },
    };
    static const char *paths[] = {
        "/machine/peripheral/balloon",
        "/machine/peripheral/balloon/virtio-backend",
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        QTestState *qts = boot_proxy(cases[i].options);

        for (int j = 0; j < ARRAY_SIZE(paths); j++) {
            g_assert_cmpint(qtest_qom_get_bool(qts, paths[j],
                                               "deflate-on-oom"), ==,
                            cases[i].oom);
            g_assert_cmpint(qtest_qom_get_bool(qts, paths[j],
                                               "free-page-hint"), ==,
                            cases[i].hint);
            g_assert_cmpint(qtest_qom_get_bool(qts, paths[j],
                                               "page-poison"), ==,
                            cases[i].poison);
            g_assert_cmpint(qtest_qom_get_bool(qts, paths[j],
                                               "free-page-reporting"), ==,
                            cases[i].reporting);
        }
        qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
        qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
        qtest_qmp_eventwait(qts, "RESET");
        qtest_quit(qts);
    }
}

/*
 * https://gitlab.com/qemu-project/qemu/-/issues/2576
 * Used to trigger:
 *   virtio_address_space_lookup: Assertion `mrs.mr' failed.
 */
static void oss_fuzz_71649(void)
{
    QTestState *s = qtest_init("-device virtio-balloon -machine q35"
                               " -nodefaults");

    qtest_outl(s, 0xcf8, 0x80000890);
    qtest_outl(s, 0xcfc, 0x2);
    qtest_outl(s, 0xcf8, 0x80000891);
    qtest_inl(s, 0xcfc);
    qtest_quit(s);
}

static void query_stats(void)
{
    QTestState *s = boot_proxy("");
    QDict *ret = qtest_qmp_assert_success_ref(
        s,
        "{ 'execute': 'qom-get', 'arguments': "     \
        "{ 'path': '/machine/peripheral/balloon', " \
        "  'property': 'guest-stats' } }");
    QDict *stats = qdict_get_qdict(ret, "stats");

    /* We expect 1 entry in the dict for each known kernel stat */
    assert(qdict_size(stats) == VIRTIO_BALLOON_S_NR);

    qobject_unref(ret);
    qtest_quit(s);
}

static void add_feature_tests(const Transport *t)
{
    static const struct {
        const char *property;
        const char *name;
        int bit;
        bool def;
    } properties[] = {
        { "deflate-on-oom", "VIRTIO_BALLOON_F_DEFLATE_ON_OOM",
          VIRTIO_BALLOON_F_DEFLATE_ON_OOM, false },
        { "free-page-hint", "VIRTIO_BALLOON_F_FREE_PAGE_HINT",
          VIRTIO_BALLOON_F_FREE_PAGE_HINT, false },
        { "page-poison", "VIRTIO_BALLOON_F_PAGE_POISON",
          VIRTIO_BALLOON_F_PAGE_POISON, true },
        { "free-page-reporting", "VIRTIO_BALLOON_F_REPORTING",
          VIRTIO_BALLOON_F_REPORTING, false },
    };
    static const char *values[] = { "on", "off", NULL };

    for (int i = 0; i < ARRAY_SIZE(properties); i++) {
        for (int j = 0; j < ARRAY_SIZE(values); j++) {
            FeatureCase *c = g_new0(FeatureCase, 1);
            g_autofree char *path =
                g_strdup_printf("virtio-balloon/%s/features/%s/%s", t->name,
                                properties[i].property,
                                values[j] ? values[j] : "default");

            c->t = t;
            c->property = properties[i].property;
            c->name = properties[i].name;
            c->value = values[j];
            c->bit = BIT64(properties[i].bit);
            c->expected = values[j] ? !strcmp(values[j], "on") :
                                      properties[i].def;
            qtest_add_data_func_full(path, c, test_feature, g_free);
        }
    }
}

static void add_config_tests(const Transport *t)
{
    static const struct {
        const char *name;
        const char *options;
        int size;
        int queues;
    } cases[] = {
        { "default", "", 16, 3 },
        { "minimal", ",page-poison=off", 8, 3 },
        { "oom", ",page-poison=off,deflate-on-oom=on", 8, 3 },
        { "reporting", ",page-poison=off,free-page-reporting=on", 8, 4 },
        { "hint", ",page-poison=off,free-page-hint=on,iothread=io0", 12, 4 },
        { "hint-poison", ",free-page-hint=on,iothread=io0", 16, 4 },
        { "all", ",free-page-hint=on,iothread=io0,free-page-reporting=on,"
                 "deflate-on-oom=on", 16, 5 },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        ConfigCase *c = g_new0(ConfigCase, 1);
        g_autofree char *path = g_strdup_printf("virtio-balloon/%s/config/%s",
                                                t->name, cases[i].name);

        c->t = t;
        c->options = cases[i].options;
        c->size = cases[i].size;
        c->queues = cases[i].queues;
        qtest_add_data_func_full(path, c, test_config, g_free);
    }
}

static const TransportTest transport_tests[] = {
    { "target", test_target },
    { "poison/config", test_poison_config },
    { "inflate/one", test_inflate_one },
    { "inflate/many", test_inflate_many },
    { "inflate/batch", test_inflate_batch },
    { "inflate/chain", test_inflate_chain },
    { "inflate/indirect", test_inflate_indirect },
    { "inflate/bad-pfns", test_bad_pfns },
    { "inflate/rom", test_rom, .pc_only = true },
    { "inflate/truncated", test_truncated },
    { "inflate/in-only", test_in_only },
    { "inflate/zero-length", test_zero_length },
    { "inflate/bad-rings", test_bad_rings },
    { "inflate/bad-buffer", test_bad_buffer },
    { "inflate/interrupt", test_interrupt },
    { "deflate", test_deflate },
    { "stats/all", test_stats },
    { "stats/interval", test_stats_interval },
    { "stats/twice", test_stats_twice },
    { "stats/truncated", test_stats_truncated },
    { "stats/reset", test_stats_reset },
    { "stop-cont", test_stop_cont },
    { "reporting/good", test_reporting },
    { "reporting/bad", test_reporting_bad },
    { "reporting/poison", test_reporting_poison },
    { "hinting/migrate", test_hinting },
    { "hinting/reset", test_hinting_reset },
    { "hinting/stop-cont", test_hinting_stop_cont },
    { "hinting/unplug", test_hinting_unplug, .pc_only = true },
    { "hinting/bad-command", test_hinting_bad_command },
    { "migrate", test_migrate },
};

int main(int argc, char **argv)
{
    const Transport *const *t;
    const char *arch;

    g_test_init(&argc, &argv, NULL);
    arch = qtest_get_arch();

    if (!strcmp(arch, "x86_64") || !strcmp(arch, "i386")) {
        machine = "pc";
        proxy = "virtio-balloon-pci";
        qtest_add_func("virtio-balloon/oss_fuzz_71649", oss_fuzz_71649);
        qtest_add_func("virtio-balloon/hotplug", test_hotplug);
    } else if (!strcmp(arch, "aarch64")) {
        machine = "virt";
        proxy = "virtio-balloon-pci";
        hotplug_bus = "rp0";
    } else if (!strcmp(arch, "s390x")) {
        machine = "s390-ccw-virtio";
        proxy = "virtio-balloon-ccw";
    } else {
        return 0;
    }

    for (t = transports(); *t; t++) {
        if (qtest_has_machine((*t)->machine)) {
            add_feature_tests(*t);
            add_config_tests(*t);
        }
        add_transport_tests(*t, transport_tests, ARRAY_SIZE(transport_tests));
    }

    if (qtest_has_machine(machine)) {
        qtest_add_func("virtio-balloon/query-stats", query_stats);
        qtest_add_func("virtio-balloon/hint-without-iothread",
                       test_hint_without_iothread);
        qtest_add_func("virtio-balloon/only-one", test_only_one);
        qtest_add_func("virtio-balloon/bad-properties", test_bad_properties);
        qtest_add_func("virtio-balloon/realized-properties",
                       test_realized_properties);
        qtest_add_func("virtio-balloon/proxy-properties",
                       test_proxy_properties);
    }

    return g_test_run();
}
