/*
 * QTest test cases for virtio-balloon: guests that run out of memory.  Only the
 * Rust implementation counts pages that leave the balloon for that reason, and
 * has the property oom-hold-time.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-migration.h"

#define OOM_OPTIONS     ",deflate-on-oom=on"
#define HOLD_OPTIONS    OOM_OPTIONS ",oom-hold-time=5"

/* The number of pages that the tests can inflate */
#define PAGES           1024

static void send_range(Balloon *b, int q, uint64_t mem, int n)
{
    g_autofree uint32_t *pfns = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        pfns[i] = pfn(mem) + i;
    }
    send_pfns(b, q, pfns, n);
}

/* Write the size as legacy drivers do, beginning with the lowest byte. */
static void write_bytes(Balloon *b, uint32_t actual)
{
    for (int i = 0; i < 4; i++) {
        config_writeb(b, CFG(actual) + i, actual >> (8 * i));
    }
}

/*
 * Inflate @n pages, and write the size. @actual pages are in the balloon
 * before.
 */
static uint32_t inflate(Balloon *b, uint64_t mem, uint32_t actual, int n)
{
    send_range(b, IVQ, mem + actual * PAGE, n);
    config_writel(b, CFG(actual), actual + n);
    return actual + n;
}

/*
 * Deflate @n pages, and write the size. @actual pages are in the balloon
 * before.
 */
static uint32_t deflate(Balloon *b, uint64_t mem, uint32_t actual, int n)
{
    send_range(b, DVQ, mem + (actual - n) * PAGE, n);
    config_writel(b, CFG(actual), actual - n);
    return actual - n;
}

static uint64_t unasked(Balloon *b)
{
    return get_counter(b, "pages-deflated-unasked");
}

/* Which pages count as unasked, and which do not */
static void test_unasked(const void *data)
{
    Balloon *b = balloon_start(data, OOM_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);
    uint32_t actual;

    set_balloon(b, RAM_SIZE - 500 * PAGE);
    actual = inflate(b, mem, 0, 256);
    actual = inflate(b, mem, actual, 144);

    /* Linux moves pages of the balloon. */
    for (int i = 0; i < 10; i++) {
        send_range(b, IVQ, mem + (500 + i) * PAGE, 1);
        send_range(b, DVQ, mem + i * PAGE, 1);
        send_range(b, IVQ, mem + i * PAGE, 1);
        send_range(b, DVQ, mem + (500 + i) * PAGE, 1);
    }
    config_writel(b, CFG(actual), actual);
    g_assert_cmpint(unasked(b), ==, 0);

    /* The guest is out of memory. */
    actual = deflate(b, mem, actual, 100);
    g_assert_cmpint(unasked(b), ==, 100);
    actual = inflate(b, mem, actual, 50);
    actual = deflate(b, mem, actual, 60);
    g_assert_cmpint(unasked(b), ==, 160);

    /* The host wants a smaller balloon, and changes its mind. */
    set_balloon(b, RAM_SIZE - 200 * PAGE);
    actual = deflate(b, mem, actual, 20);
    send_range(b, DVQ, mem + (actual - 20) * PAGE, 20);
    set_balloon(b, RAM_SIZE - 500 * PAGE);
    actual -= 20;
    config_writel(b, CFG(actual), actual);
    g_assert_cmpint(unasked(b), ==, 160);
    /* The guest takes out more pages than the host wants */
    set_balloon(b, RAM_SIZE - 240 * PAGE);
    actual = deflate(b, mem, actual, 50);
    g_assert_cmpint(actual, ==, 200);
    g_assert_cmpint(unasked(b), ==, 200);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);
    balloon_quit(b);
}

/* The driver empties the balloon, writes the size, and resets the device. */
static void check_removed(Balloon *b, uint64_t mem, uint32_t actual, bool bytes)
{
    send_range(b, DVQ, mem, actual / 2);
    send_range(b, DVQ, mem + actual / 2 * PAGE, actual - actual / 2);
    if (bytes) {
        write_bytes(b, 0);
    } else {
        config_writel(b, CFG(actual), 0);
    }
    g_assert_cmpint(unasked(b), ==, 0);
    balloon_restart(b, F_BALLOON);
    qtest_clock_step(b->qts, 5 * SECOND);
    g_assert_cmpint(unasked(b), ==, 0);
}

static void test_unasked_reset(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 500 * PAGE);
    check_removed(b, mem, inflate(b, mem, 0, 400), false);
    check_removed(b, mem, inflate(b, mem, 0, 300), true);
    /* the driver resets the device without emptying the balloon */
    inflate(b, mem, 0, 400);
    balloon_restart(b, F_BALLOON);
    inflate(b, mem, 0, 10);
    g_assert_cmpint(unasked(b), ==, 0);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);

    /* The balloon is empty, and there is no reset. */
    deflate(b, mem, 10, 10);
    g_assert_cmpint(unasked(b), ==, 0);
    qtest_clock_step(b->qts, 2 * SECOND);
    g_assert_cmpint(unasked(b), ==, 10);
    /* or the driver uses the balloon again */
    inflate(b, mem, 0, 10);
    deflate(b, mem, 10, 10);
    inflate(b, mem, 0, 1);
    g_assert_cmpint(unasked(b), ==, 20);
    balloon_quit(b);
}

/* The driver has not accepted the feature, or was not offered it */
static void test_unasked_feature(const void *data)
{
    for (int i = 0; i < 2; i++) {
        Balloon *b = balloon_start(data, i ? ",oom-hold-time=5" : HOLD_OPTIONS);
        uint64_t mem = alloc_pages(b, PAGES);

        balloon_restart(b, F_BALLOON & ~F_OOM);
        set_balloon(b, RAM_SIZE - 500 * PAGE);
        deflate(b, mem, inflate(b, mem, 0, 400), 300);
        qtest_clock_step(b->qts, 2 * SECOND);
        g_assert_cmpint(get_counter(b, "pages-deflated"), ==, 300);
        g_assert_cmpint(unasked(b), ==, 0);
        g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);
        balloon_quit(b);
    }
}

/* Legacy drivers write the size byte by byte. */
static void test_unasked_bytes(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 800 * PAGE);
    send_range(b, IVQ, mem, 512);
    write_bytes(b, 512);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 800);
    /* The lowest byte of the size stays the same, */
    send_range(b, DVQ, mem, 256);
    write_bytes(b, 256);
    g_assert_cmpint(unasked(b), ==, 256);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 1);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 256);
    /* or becomes larger. */
    send_range(b, DVQ, mem + 256 * PAGE, 10);
    write_bytes(b, 246);
    g_assert_cmpint(unasked(b), ==, 266);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 246);

    /* The size increases again */
    set_balloon(b, RAM_SIZE - 700 * PAGE);
    send_range(b, IVQ, mem, 300);
    write_bytes(b, 546);
    g_assert_cmpint(unasked(b), ==, 266);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 700);
    balloon_quit(b);
}

/* After migration, the device knows the size of the balloon. */
static void test_unasked_migrate(const void *data)
{
    Balloon *b = balloon_start(data, OOM_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);
    uint32_t actual;

    set_balloon(b, RAM_SIZE - 500 * PAGE);
    actual = inflate(b, mem, 0, 400);
    b = balloon_migrate(b, OOM_OPTIONS);
    actual = deflate(b, mem, actual, 30);
    g_assert_cmpint(unasked(b), ==, 30);
    balloon_quit(b);
}

static void assert_shown(Balloon *b, uint32_t pages, bool holds)
{
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, pages);
    g_assert_cmpint(get_counter(b, "oom-hold-active"), ==, holds);
    if (holds) {
        assert_summary(b, "the guest was out of memory and has deflated the"
                       " balloon: it is asked again later");
    }
}

/* Let time pass until the hold ends, and the target is shown again. */
static void assert_hold_ends(Balloon *b, int seconds, uint32_t held,
                             uint32_t target)
{
    qtest_clock_step(b->qts, seconds * SECOND - 1000 * 1000);
    assert_shown(b, held, true);
    qtest_clock_step(b->qts, 2 * 1000 * 1000);
    assert_shown(b, target, false);
    /* The driver gets a configuration change interrupt. */
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
}

static void test_oom_hold(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
    inflate(b, mem, 0, 60);
    assert_shown(b, 100, false);

    /* Linux moves a page of the balloon. */
    send_range(b, IVQ, mem + 500 * PAGE, 1);
    send_range(b, DVQ, mem, 1);
    config_writel(b, CFG(actual), 60);
    assert_shown(b, 100, false);

    /* The guest runs out of memory, and does so again during the hold */
    deflate(b, mem, 60, 2);
    assert_shown(b, 58, true);
    qvirtio_wait_config_isr(b->dev, TIMEOUT_US);
    qtest_clock_step(b->qts, 3 * SECOND);
    deflate(b, mem, 58, 8);
    assert_shown(b, 50, true);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 1);
    /* The hold does not affect what the user sees. */
    g_assert_cmpint(query_balloon(b), ==, RAM_SIZE - 50 * PAGE);
    assert_hold_ends(b, 5, 50, 100);

    /* Soon after a hold, the next one takes longer. */
    inflate(b, mem, 50, 10);
    deflate(b, mem, 60, 1);
    assert_hold_ends(b, 10, 59, 100);
    qtest_clock_step(b->qts, 11 * SECOND);
    deflate(b, mem, 59, 1);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 3);

    /* The user sets another target, which is shown at once. */
    set_balloon(b, RAM_SIZE - 90 * PAGE);
    assert_shown(b, 90, false);

    /* Deflating as far as the host wants does not begin a hold. */
    set_balloon(b, RAM_SIZE - 50 * PAGE);
    deflate(b, mem, 58, 8);
    assert_shown(b, 50, false);

    set_balloon(b, RAM_SIZE - 90 * PAGE);
    deflate(b, mem, 50, 1);
    assert_shown(b, 49, true);
    balloon_restart(b, F_BALLOON);
    assert_shown(b, 90, false);
    balloon_quit(b);
}

/*
 * Linux moves pages, and then deflates the balloon because the host wants that.
 */
static void test_oom_hold_asked(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    inflate(b, mem, 0, 100);
    for (int i = 0; i < 5; i++) {
        send_range(b, IVQ, mem + (500 + i) * PAGE, 1);
        send_range(b, DVQ, mem + i * PAGE, 1);
    }
    set_balloon(b, RAM_SIZE - 50 * PAGE);
    deflate(b, mem, 100, 50);
    assert_shown(b, 50, false);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);
    balloon_quit(b);
}

/*
 * If the driver has not yet read a new target when the VM is migrated, the
 * destination does not mistake the old target for a hold.
 */
static void test_migrate_target(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 50 * PAGE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 50);
    inflate(b, mem, 0, 50);
    stop_vm(b);
    set_balloon(b, RAM_SIZE - 100 * PAGE);
    b = balloon_migrate(b, HOLD_OPTIONS);
    assert_shown(b, 100, false);
    balloon_quit(b);
}

/* A hold continues after migration, if the destination has the property. */
static void test_migrate_oom_hold(const void *data)
{
    Balloon *b = balloon_start(data, HOLD_OPTIONS);
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    inflate(b, mem, 0, 60);
    deflate(b, mem, 60, 8);
    assert_shown(b, 52, true);

    b = balloon_migrate(b, HOLD_OPTIONS);
    assert_hold_ends(b, 5, 52, 100);
    deflate(b, mem, 52, 2);
    assert_shown(b, 50, true);

    b = balloon_migrate(b, ",deflate-on-oom=on");
    assert_shown(b, 100, false);
    balloon_quit(b);
}

static void test_oom_hold_off(const void *data)
{
    Balloon *b = balloon_start(data, ",deflate-on-oom=on");
    uint64_t mem = alloc_pages(b, PAGES);

    set_balloon(b, RAM_SIZE - 100 * PAGE);
    inflate(b, mem, 0, 60);
    deflate(b, mem, 60, 8);
    assert_shown(b, 100, false);
    g_assert_cmpint(get_counter(b, "oom-holds"), ==, 0);
    balloon_quit(b);
}

static const TransportTest tests[] = {
    { "oom/unasked", test_unasked },
    { "oom/unasked-reset", test_unasked_reset },
    { "oom/unasked-feature", test_unasked_feature },
    { "oom/unasked-bytes", test_unasked_bytes },
    { "oom/unasked-migrate", test_unasked_migrate },
    { "oom/hold", test_oom_hold },
    { "oom/hold-off", test_oom_hold_off },
    { "oom/hold-asked", test_oom_hold_asked },
    { "oom/migrate-hold", test_migrate_oom_hold },
    { "oom/migrate-target", test_migrate_target },
};

int main(int argc, char **argv)
{
    return run_rust_tests(argc, argv, "oom", tests, ARRAY_SIZE(tests));
}
