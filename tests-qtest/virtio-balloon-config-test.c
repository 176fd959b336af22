/*
 * QTest test cases for virtio-balloon: features and configuration space
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-common.h"
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "standard-headers/linux/virtio_pci.h"

/*
 * Features
 */

typedef struct Feature {
    const char *property;
    const char *name;           /* in x-query-virtio-status */
    int bit;
    bool def;
} Feature;

typedef struct FeatureCase {
    const Transport *t;
    const Feature *feature;
    const char *value;          /* NULL for the default */
} FeatureCase;

/* Whether the device knows that the driver has accepted a feature */
static bool has_guest_feature(Balloon *b, const char *name)
{
    QDict *status = virtio_status(b);
    QDict *features = qdict_get_qdict(status, "guest-features");
    const QListEntry *entry;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(features, "dev-features"), entry) {
        QString *str = qobject_to(QString, qlist_entry_obj(entry));

        found = found || g_str_has_prefix(qstring_get_str(str), name);
    }
    qobject_unref(status);
    return found;
}

static void test_feature(const void *data)
{
    const FeatureCase *c = data;
    const char *property = c->feature->property, *name = c->feature->name;
    uint64_t bit = BIT64(c->feature->bit);
    bool expected = c->value ? !strcmp(c->value, "on") : c->feature->def;
    g_autofree char *options =
        c->value ? g_strdup_printf(",%s=%s,iothread=io0", property, c->value) :
                   g_strdup("");
    Balloon *b = balloon_boot(c->t, options);
    uint64_t offered = c->t->features | F_STATS | F_POISON;

    offered = expected ? offered | bit : offered & ~bit;
    g_assert_cmphex(b->offered, ==, offered);
    g_assert_cmpint(qtest_qom_get_bool(b->qts, backend_path(c->t), property),
                    ==, expected);
    g_assert_cmpint(qtest_qom_get_bool(b->qts, BALLOON_PATH, property), ==,
                    expected);

    /* The driver accepts the feature, */
    balloon_negotiate(b, F_BALLOON);
    g_assert_cmpint(!!(b->dev->features & bit), ==, expected);
    g_assert_cmpint(has_guest_feature(b, name), ==, expected);
    /* or all other features, */
    balloon_restart(b, F_BALLOON & ~bit);
    g_assert_false(has_guest_feature(b, name));
    /* or none. */
    balloon_restart(b, 0);
    g_assert_false(has_guest_feature(b, "VIRTIO_BALLOON_F"));

    /* A feature that is not offered cannot be accepted. */
    if (!expected) {
        qvirtio_start_device(b->dev);
        b->dev->bus->set_features(b->dev, (b->offered & ~F_BAD) | bit);
        b->dev->bus->set_status(b->dev, balloon_status(b) |
                                VIRTIO_CONFIG_S_FEATURES_OK);
        g_assert_false(has_guest_feature(b, name));
    }
    balloon_quit(b);
}

static void add_feature_tests(const Transport *t)
{
    static const Feature features[] = {
        { "deflate-on-oom", "VIRTIO_BALLOON_F_DEFLATE_ON_OOM",
          VIRTIO_BALLOON_F_DEFLATE_ON_OOM, false },
        { "free-page-hint", "VIRTIO_BALLOON_F_FREE_PAGE_HINT",
          VIRTIO_BALLOON_F_FREE_PAGE_HINT, false },
        { "page-poison", "VIRTIO_BALLOON_F_PAGE_POISON",
          VIRTIO_BALLOON_F_PAGE_POISON, true },
        { "free-page-reporting", "VIRTIO_BALLOON_F_REPORTING",
          VIRTIO_BALLOON_F_REPORTING, false },
        /* only in Rust */
        { "huge-pages", "VIRTIO_BALLOON_F_MUST_TELL_HOST",
          VIRTIO_BALLOON_F_MUST_TELL_HOST, false },
    };
    int n = ARRAY_SIZE(features) - !is_rust_device();
    static const char *const values[] = { "on", "off", NULL };

    for (int i = 0; i < n; i++) {
        for (int j = 0; j < ARRAY_SIZE(values); j++) {
            FeatureCase *c = g_new(FeatureCase, 1);
            g_autofree char *path =
                g_strdup_printf("virtio-balloon/%s/features/%s/%s", t->name,
                                features[i].property, values[j] ?: "default");

            c->t = t;
            c->feature = &features[i];
            c->value = values[j];
            qtest_add_data_func_full(path, c, test_feature, g_free);
        }
    }
}

/*
 * Configuration space
 */

typedef struct Layout {
    const char *name;
    const char *options;
    int size;
    int queues;
} Layout;

typedef struct LayoutCase {
    const Transport *t;
    const Layout *layout;
} LayoutCase;

static void test_layout(const void *data)
{
    const LayoutCase *c = data;
    Balloon *b = balloon_start(c->t, c->layout->options);

    g_assert_cmpint(b->num_queues, ==, c->layout->queues);
    for (int i = 0; i < 8; i++) {
        int size = i == b->hint_vq ? 1024 : i == b->reporting_vq ? 32 : 128;

        if (i >= b->num_queues) {
            /* libqos requires queues that are not set up yet. */
            b->dev->bus->queue_select(b->dev, i);
            g_assert_cmpint(b->dev->bus->get_queue_size(b->dev), ==, 0);
        } else {
            g_assert_cmpint(b->vq[i]->size, ==, size);
        }
    }

    set_balloon(b, RAM_SIZE - 5 * PAGE);
    config_writel(b, CFG(actual), 3);
    if (c->layout->size >= 16) {
        config_writel(b, CFG(poison_val), 0xaabbccdd);
    }
    for (int i = 0; i < c->layout->size; i += 4) {
        uint32_t expected = i == CFG(num_pages) ? 5 : i == CFG(actual) ? 3 :
            i == CFG(poison_val) && (b->dev->features & F_POISON) ?
            0xaabbccdd : 0;

        g_assert_cmphex(config_readl(b, i), ==, expected);
        g_assert_cmphex(qvirtio_config_readb(b->dev, i), ==, expected & 0xff);
        g_assert_cmphex(qvirtio_config_readw(b->dev, i), ==,
                        expected & 0xffff);
    }
    /* The end of the configuration space */
    g_assert_cmphex(qvirtio_config_readb(b->dev, c->layout->size), ==, 0xff);
    balloon_quit(b);
}

static void add_layout_tests(const Transport *t)
{
    static const Layout layouts[] = {
        { "default", "", 16, 3 },
        { "minimal", ",page-poison=off", 8, 3 },
        { "oom", ",page-poison=off,deflate-on-oom=on", 8, 3 },
        { "reporting", ",page-poison=off,free-page-reporting=on", 8, 4 },
        { "hint", ",page-poison=off,free-page-hint=on,iothread=io0", 12, 4 },
        { "hint-poison", ",free-page-hint=on,iothread=io0", 16, 4 },
        { "all", ",free-page-hint=on,iothread=io0,free-page-reporting=on,"
                 "deflate-on-oom=on", 16, 5 },
    };

    for (int i = 0; i < ARRAY_SIZE(layouts); i++) {
        LayoutCase *c = g_new(LayoutCase, 1);
        g_autofree char *path = g_strdup_printf("virtio-balloon/%s/config/%s",
                                                t->name, layouts[i].name);

        c->t = t;
        c->layout = &layouts[i];
        qtest_add_data_func_full(path, c, test_layout, g_free);
    }
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

    /* The driver reaches the target */
    config_writel(b, CFG(actual), RAM_SIZE / 4 / PAGE);
    event = qtest_qmp_eventwait_ref(b->qts, "BALLOON_CHANGE");
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(event, "data"), "actual"),
                    ==, RAM_SIZE - RAM_SIZE / 4);
    qobject_unref(event);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - RAM_SIZE / 4);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / 2 / PAGE);

    /* Targets that are not whole pages, and targets above the size of RAM */
    set_balloon(b, RAM_SIZE - 3 * PAGE + 1);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 2);
    set_balloon(b, 1);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, RAM_SIZE / PAGE - 1);
    set_balloon(b, RAM_SIZE * 4);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 0);

    /* A reset by the driver keeps both the target and the size */
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

/*
 * There is an event for each change of the size, in either direction, and none
 * otherwise.
 */
static void test_event(const void *data)
{
    static const uint32_t sizes[] = { 0x1000, 0x800, 0x800, 0x1800, 0 };
    Balloon *b = balloon_start(data, "");
    uint32_t old = 0;

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        uint64_t actual = RAM_SIZE - (uint64_t)sizes[i] * PAGE;
        QDict *event;

        config_writel(b, CFG(actual), sizes[i]);
        /* An event would come before the answer to this command. */
        g_assert_cmpint(query_balloon(b), ==, actual);
        event = qtest_qmp_event_ref(b->qts, "BALLOON_CHANGE");
        if (sizes[i] == old) {
            g_assert_null(event);
        } else {
            g_assert_nonnull(event);
            g_assert_cmpint(qdict_get_int(qdict_get_qdict(event, "data"),
                                          "actual"), ==, actual);
            qobject_unref(event);
        }
        old = sizes[i];
        /* Events are limited to one per second. */
        qtest_clock_step(b->qts, 2 * SECOND);
    }
    balloon_quit(b);
}

static void test_poison_config(const void *data)
{
    Balloon *b = balloon_start(data, "");

    config_writel(b, CFG(poison_val), 0x12345678);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0x12345678);

    /*
     * A reset clears the value.  Without the feature, the driver cannot set it
     */
    balloon_restart(b, F_BALLOON & ~F_POISON);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0);
    config_writel(b, CFG(poison_val), 0x12345678);
    g_assert_cmphex(config_readl(b, CFG(poison_val)), ==, 0);

    /* The driver cannot change the fields of the host */
    config_writel(b, CFG(num_pages), 0x1111);
    config_writel(b, CFG(actual), 0);
    g_assert_cmphex(config_readl(b, CFG(num_pages)), ==, 0);
    balloon_quit(b);
}

/*
 * Drivers for the legacy interface write byte by byte.  The device cannot tell
 * which byte is the last, but has to have the correct value after it.
 */
static void test_bytes(const void *data)
{
    Balloon *b = balloon_start(data, "");
    const uint32_t pages = 0x1234;
    QDict *event;

    config_writel(b, CFG(actual), 0x0fff);
    event = qtest_qmp_eventwait_ref(b->qts, "BALLOON_CHANGE");
    qobject_unref(event);
    for (int i = 0; i < 4; i++) {
        config_writeb(b, CFG(actual) + i, pages >> (8 * i));
    }
    g_assert_cmphex(config_readl(b, CFG(actual)), ==, pages);
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - pages * PAGE);

    /* Events are limited to one per second; the last one has the final size. */
    qtest_clock_step(b->qts, 2 * SECOND);
    event = qtest_qmp_eventwait_ref(b->qts, "BALLOON_CHANGE");
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(event, "data"), "actual"),
                    ==, RAM_SIZE - pages * PAGE);
    qobject_unref(event);
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "target", test_target },
    { "event", test_event },
    { "config/bytes", test_bytes },
    { "poison/config", test_poison_config },
};

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (const Transport *const *t = transports(); *t; t++) {
        add_feature_tests(*t);
        add_layout_tests(*t);
    }
    add_transport_tests(tests, ARRAY_SIZE(tests));
    return g_test_run();
}
