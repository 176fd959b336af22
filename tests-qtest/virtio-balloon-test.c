/*
 * QTest test cases for virtio balloon device
 *
 * Copyright (c) 2024 Gao Shiyuan <gaoshiyuan@baidu.com>
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-common.h"

/*
 * Properties, errors and hotplug: tests that need no driver, and run on one
 * machine only
 */

#define BACKEND_PATH    BALLOON_PATH "/virtio-backend"

/* The machine, and the type of the proxy, for tests without a driver */
static const char *machine, *proxy;
/* The bus for hotplug, if it is not the default bus */
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

/* Check that a device cannot be added.  Takes ownership of the arguments. */
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
    /*
     * The failed device has left nothing behind, and another one can be added.
     */
    assert_no_balloon(qts);
    args = device_args();
    qdict_put_bool(args, "free-page-hint", true);
    qdict_put_str(args, "iothread", "io0");
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add',"
                             " 'arguments': %p }", args);
    qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
    qtest_quit(qts);
}

static void test_only_one(void)
{
    QTestState *qts = boot_proxy("");

    assert_device_add_error(qts, device_args(),
                            "Only one balloon device is supported");
    /* The first device still works */
    qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
    qtest_quit(qts);
}

/* The timer of a device that was not realized is freed with the device. */
static void test_stats_timer(void)
{
    QTestState *qts = boot_proxy("");

    /* The next device may be allocated at the address of one that was freed. */
    for (int i = 0; i < 10; i++) {
        QDict *args = device_args();

        qdict_put_int(args, "guest-stats-polling-interval", 1);
        assert_device_add_error(qts, args,
                                "Only one balloon device is supported");
        qtest_clock_step(qts, 3 * SECOND);
    }
    qtest_quit(qts);
}

static void test_hotplug(void)
{
    QTestState *qts = qtest_init("-machine pc -object iothread,id=io0");

    assert_no_balloon(qts);
    /* Enough iterations for sanitizers to see leaks; each takes 20 ms. */
    for (int i = 0; i < 100; i++) {
        qtest_qmp_device_add(qts, "virtio-balloon-pci", "balloon",
                             "{ 'free-page-hint': true, 'iothread': 'io0',"
                             " 'free-page-reporting': true,"
                             " 'addr': '06.0' }");
        qtest_qmp_assert_success(qts, "{ 'execute': 'query-balloon' }");
        qpci_unplug_acpi_device_test(qts, "balloon", 6);
        assert_no_balloon(qts);
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
    assert_no_balloon(qts);
    qtest_quit(qts);
}

/* Properties cannot be changed after the device was realized */
static void test_realized_properties(void)
{
    QTestState *qts = boot_proxy("");
    QDict *resp = qtest_qmp(
        qts, "{ 'execute': 'qom-set', 'arguments': { 'path': %s,"
        " 'property': 'deflate-on-oom', 'value': true } }", BACKEND_PATH);

    g_assert_true(qdict_haskey(resp, "error"));
    qobject_unref(resp);
    g_assert_false(qtest_qom_get_bool(qts, BALLOON_PATH, "deflate-on-oom"));
    qtest_quit(qts);
}

/* Properties for features, as seen through the proxy */
static void test_proxy_properties(void)
{
    static const char *const names[] = {
        "deflate-on-oom", "free-page-hint", "page-poison",
        "free-page-reporting",
    };
    static const struct {
        const char *options;
        bool values[ARRAY_SIZE(names)];
    } cases[] = {
        { "", { false, false, true, false } },
        { ",deflate-on-oom=on", { true, false, true, false } },
        { ",deflate-on-oom=off,page-poison=off",
          { false, false, false, false } },
        { ",free-page-hint=on,iothread=io0", { false, true, true, false } },
        { ",free-page-reporting=on", { false, false, true, true } },
        { ",deflate-on-oom=on,free-page-hint=on,iothread=io0,"
          "page-poison=off,free-page-reporting=on",
          { true, true, false, true } },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        QTestState *qts = boot_proxy(cases[i].options);

        for (int j = 0; j < ARRAY_SIZE(names); j++) {
            g_assert_cmpint(qtest_qom_get_bool(qts, BALLOON_PATH, names[j]),
                            ==, cases[i].values[j]);
            g_assert_cmpint(qtest_qom_get_bool(qts, BACKEND_PATH, names[j]),
                            ==, cases[i].values[j]);
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
        s, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats' } }", BALLOON_PATH);
    QDict *stats = qdict_get_qdict(ret, "stats");

    /* We expect 1 entry in the dict for each known kernel stat */
    assert(qdict_size(stats) == VIRTIO_BALLOON_S_NR);

    qobject_unref(ret);
    qtest_quit(s);
}

int main(int argc, char **argv)
{
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

    if (qtest_has_machine(machine)) {
        qtest_add_func("virtio-balloon/query-stats", query_stats);
        qtest_add_func("virtio-balloon/hint-without-iothread",
                       test_hint_without_iothread);
        qtest_add_func("virtio-balloon/only-one", test_only_one);
        qtest_add_func("virtio-balloon/stats-timer", test_stats_timer);
        qtest_add_func("virtio-balloon/bad-properties", test_bad_properties);
        qtest_add_func("virtio-balloon/realized-properties",
                       test_realized_properties);
        qtest_add_func("virtio-balloon/proxy-properties",
                       test_proxy_properties);
    }

    return g_test_run();
}
