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
#include <sys/mman.h>
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "virtio-balloon-migration.h"

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

    b->dev->bus->set_status(b->dev, VIRTIO_CONFIG_S_ACKNOWLEDGE |
                            VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED);
    assert_member(b, "driver", "failed");
    assert_summary(b, "the guest's driver has given up on the balloon");

    b->dev->bus->set_status(b->dev, 0);
    assert_member(b, "driver", "none");
    assert_summary(b, "the guest has no balloon driver");
    /* Linux does this even if it has no driver. */
    b->dev->bus->set_status(b->dev, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    assert_member(b, "driver", "none");
    b->dev->bus->set_status(b->dev, 0);

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

/*
 * Memory
 */

#define LOCKED          "memory is not returned to the host, because it is" \
                        " locked"
#define READ_ONLY_FILE  "memory is not returned to the host, because its file" \
                        " is open for reading only"
#define HUGE_PAGES      "memory is not returned to the host, because it" \
                        " consists of huge pages: see huge-pages"
#define OTHER           " -object memory-backend-ram,id=other,size=64M"

/* The block of a memory backend, and only that, is in the list. */
static void assert_memory(Balloon *b, int64_t page_size, const char *file,
                          const char *discarding)
{
    QDict *status = get_status(b);
    QList *memory = qdict_get_qlist(status, "memory");
    QDict *block = qobject_to(QDict, qlist_entry_obj(qlist_first(memory)));

    g_assert_cmpint(qlist_size(memory), ==, 1);
    g_assert_cmpint(qdict_get_int(block, "size"), ==, RAM_SIZE);
    g_assert_cmpint(qdict_get_int(block, "page-size"), ==, page_size);
    g_assert_cmpstr(qdict_get_str(block, "file"), ==, file);
    g_assert_cmpstr(qdict_get_str(block, "discarding"), ==, discarding);
    qobject_unref(status);
}

typedef struct MemoryCase {
    const char *options;
    int64_t page_size;
    const char *file, *discarding;
    /* The summary when a page is in the balloon, and should be */
    const char *summary;
} MemoryCase;

static void check_memory(const void *data, const MemoryCase *c)
{
    Balloon *b = balloon_start(data, c->options);
    uint64_t addr = alloc_pages(b, 1);

    assert_memory(b, c->page_size, c->file, c->discarding);
    /* Nobody wants to have memory back. */
    assert_summary(b, GOOD);
    set_balloon(b, RAM_SIZE - PAGE);
    send_pfns(b, IVQ, &(uint32_t){ pfn(addr) }, 1);
    config_writel(b, CFG(actual), 1);
    assert_summary(b, c->summary);
    /* The status tells the truth. */
    g_assert_cmpint(is_zero(b, addr), ==, g_str_equal(c->summary, GOOD));
    balloon_quit(b);
}

#define MEMORY_BACKEND(type, options)                                   \
    " -object memory-backend-" type ",id=ram0,size=128M" options        \
    " -machine memory-backend=ram0"

static void test_memory(const void *data)
{
    g_autofree char *name = NULL;
    g_autofree char *private = NULL;
    g_autofree char *read_only = NULL;
    int fd = g_file_open_tmp("balloon-XXXXXX", &name, NULL);
    const MemoryCase cases[] = {
        { "", PAGE, "none", "pages", GOOD },
        { MEMORY_BACKEND("memfd", ",share=on"), PAGE, "shared", "pages", GOOD },
    };
    MemoryCase file = { NULL, PAGE, "private", "pages", GOOD };

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, RAM_SIZE), ==, 0);
    close(fd);
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        check_memory(data, &cases[i]);
    }

    private = g_strdup_printf(
        MEMORY_BACKEND("file", ",share=off,mem-path=%s"), name);
    file.options = private;
    check_memory(data, &file);

    read_only = g_strdup_printf(
        MEMORY_BACKEND("file", ",share=off,readonly=on,rom=off,mem-path=%s"),
        name);
    file = (MemoryCase) {
        read_only, PAGE, "private", "read-only-file", READ_ONLY_FILE
    };
    check_memory(data, &file);
    unlink(name);
}

/* Locking more memory than is allowed would end QEMU. */
static void test_locked(const void *data)
{
    const MemoryCase anonymous = {
        " -overcommit mem-lock=on", PAGE, "none", "locked", LOCKED
    };
    const MemoryCase file = {
        " -overcommit mem-lock=on" MEMORY_BACKEND("memfd", ",share=on"),
        PAGE, "shared", "pages", GOOD
    };
    /* More than QEMU needs */
    const size_t size = 4 * RAM_SIZE;
    g_autofree void *memory = g_malloc(size);

#ifdef QEMU_SANITIZE_ADDRESS
    g_test_skip("AddressSanitizer has mlockall() do nothing");
    return;
#endif
    if (mlock(memory, size) < 0) {
        g_test_skip("memory cannot be locked");
        return;
    }
    munlock(memory, size);
    check_memory(data, &anonymous);
    check_memory(data, &file);
}

static void test_huge_pages(const void *data)
{
    const MemoryCase off = {
        MEMORY_BACKEND("memfd", ",hugetlb=on,hugetlbsize=2M"), HUGE_PAGE,
        "shared", "host-pages-of-element", HUGE_PAGES
    };
    Balloon *b;

    check_memory(data, &off);

    b = balloon_start(data, ",huge-pages=on"
                      MEMORY_BACKEND("memfd", ",hugetlb=on,hugetlbsize=2M"));
    assert_memory(b, HUGE_PAGE, "shared", "host-pages");
    set_balloon(b, RAM_SIZE - PAGE);
    config_writel(b, CFG(actual), 1);
    assert_summary(b, GOOD);
    balloon_quit(b);
}

/* Blocks of several kinds, of which some can be discarded */
static void test_blocks(const void *data)
{
    Balloon *b = balloon_start(
        data, " -object memory-backend-memfd,id=huge,size=64M,hugetlb=on,"
        "hugetlbsize=2M" OTHER " -numa node,memdev=huge"
        " -numa node,memdev=other");
    QDict *status;

    set_balloon(b, RAM_SIZE - PAGE);
    config_writel(b, CFG(actual), 1);
    status = get_status(b);
    g_assert_cmpint(qlist_size(qdict_get_qlist(status, "memory")), ==, 2);
    qobject_unref(status);
    assert_summary(b, GOOD);
    balloon_quit(b);
}

static void test_in_flight(const void *data)
{
    const int large = 16 * 1024 * 1024;
    Balloon *b = balloon_start(data, ",free-page-reporting=on");
    const uint8_t none[1] = { };
    uint64_t pfns = guest_alloc(b->alloc, large);
    int64_t inflate;
    uint32_t head;
    int attempts = 0;

    g_assert_cmpint(get_in_flight(b, "statistics"), ==, 0);
    submit(b, SVQ, put(b, none, sizeof(none)), sizeof(none), false);
    g_assert_cmpint(get_in_flight(b, "statistics"), ==, 1);

    do {
        begin_attempt(&attempts);
        head = submit(b, IVQ, pfns, large, false);
        inflate = get_in_flight(b, "inflate");
        g_assert_cmpint(get_in_flight(b, "deflate"), ==, 0);
        g_assert_cmpint(get_in_flight(b, "reports"), ==, 0);
        g_assert_cmpint(get_in_flight(b, "hints"), ==, 0);
        wait_used(b, IVQ, head);
        g_assert_cmpint(get_in_flight(b, "inflate"), ==, 0);
    } while (inflate == 0);
    g_assert_cmpint(inflate, ==, 1);
    balloon_quit(b);
}

/* Reports are not discarded if the guest relies on the contents. */
static void test_poison(const void *data)
{
    Balloon *b = balloon_start(data, ",free-page-reporting=on");

    assert_summary(b, GOOD);
    config_writel(b, CFG(poison_val), 0xaaaaaaaa);
    assert_summary(b, "reported memory is not returned to the host, because"
                   " the guest fills free pages");
    balloon_quit(b);
}

/* A guest that is out of memory */
static void test_unasked(const void *data)
{
    Balloon *b = balloon_start(data, ",deflate-on-oom=on");
    uint64_t addr = alloc_pages(b, 2);
    QDict *status;

    set_balloon(b, RAM_SIZE - 2 * PAGE);
    send_pfns(b, IVQ, (uint32_t[]){ pfn(addr), pfn(addr + PAGE) }, 2);
    config_writel(b, CFG(actual), 2);
    assert_summary(b, GOOD);
    status = get_status(b);
    g_assert_false(qdict_haskey(status, "unasked-ago"));
    qobject_unref(status);

    send_pfns(b, DVQ, &(uint32_t){ pfn(addr) }, 1);
    config_writel(b, CFG(actual), 1);
    assert_size(b, "unasked-ago", 0);
    assert_summary(b, "the guest is out of memory, and cannot give back as much"
                   " as it is asked for");
    qtest_clock_step(b->qts, 11 * SECOND);
    assert_size(b, "unasked-ago", 11);
    assert_summary(b, "the guest has not given back as much memory as it is"
                   " asked for");
    balloon_quit(b);
}

/*
 * Statistics that are requested
 */

static void request_stats(QTestState *qts)
{
    qtest_qmp_send(qts, "{ 'execute': 'qom-set', 'arguments': { 'path': %s,"
                   " 'property': 'guest-stats-request', 'value': true } }",
                   BALLOON_PATH);
}

static void assert_stats_event(Balloon *b, bool answered)
{
    QDict *event = qtest_qmp_eventwait_ref(b->qts, "BALLOON_STATS");

    g_assert_cmpint(qdict_get_bool(qdict_get_qdict(event, "data"), "answered"),
                    ==, answered);
    qobject_unref(event);
}

static void request_fails(Balloon *b, const char *message)
{
    request_stats(b->qts);
    assert_error(qtest_qmp_receive(b->qts), message);
}

/* Ten at a time, as ten agents would do */
static void request_ten(Balloon *b)
{
    for (int i = 0; i < 10; i++) {
        request_stats(b->qts);
    }
    for (int i = 0; i < 10; i++) {
        QDict *resp = qtest_qmp_receive(b->qts);

        g_assert_true(qdict_haskey(resp, "return"));
        qobject_unref(resp);
    }
}

static void test_request(const void *data)
{
    Balloon *b = balloon_boot(data, "");
    const struct virtio_balloon_stat stat = {
        .tag = VIRTIO_BALLOON_S_MEMFREE, .val = 0x1200,
    };
    uint64_t addr;
    uint32_t head;
    gint64 begin;

    request_fails(b, "the guest has no driver that sends statistics");
    balloon_negotiate(b, F_BALLOON);
    addr = put(b, &stat, sizeof(stat));

    /* The driver has not sent its buffer yet: this is the answer. */
    request_ten(b);
    head = submit(b, SVQ, addr, sizeof(stat), false);
    assert_stats_event(b, true);
    g_assert_cmpint(get_counter(b, "stats-requests"), ==, 0);

    /* One buffer is returned for all of them, without an interval. */
    for (int i = 1; i < 3; i++) {
        request_ten(b);
        wait_used(b, SVQ, head);
        g_assert_cmpint(get_counter(b, "stats-requests"), ==, i);
        /* The monitor does not wait. */
        g_assert_cmpint(query_balloon(b), ==, RAM_SIZE);
        head = submit(b, SVQ, addr, sizeof(stat), false);
        assert_stats_event(b, true);
    }
    g_assert_cmpint(get_counter(b, "stats-answers"), ==, 3);

    /* The driver does not answer, and the VM is stopped meanwhile. */
    begin = g_get_monotonic_time();
    request_ten(b);
    stop_vm(b);
    request_fails(b, "the VM is stopped");
    assert_stats_event(b, false);
    /* QEMU's timers count whole milliseconds: it is up to one less. */
    g_assert_cmpint(g_get_monotonic_time() - begin, >=,
                    G_USEC_PER_SEC - 1000);
    continue_vm(b);
    wait_used(b, SVQ, head);
    /* It answers later; nobody waits for that, but the next one is told. */
    request_ten(b);
    submit(b, SVQ, addr, sizeof(stat), false);
    assert_stats_event(b, true);
    g_assert_cmpint(get_counter(b, "stats-requests"), ==, 3);

    /* The driver resets the device instead of answering. */
    request_ten(b);
    balloon_restart(b, F_BALLOON & ~F_STATS);
    assert_stats_event(b, false);
    request_fails(b, "the guest has no driver that sends statistics");
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
    { "status/memory", test_memory },
    { "status/locked", test_locked },
    { "status/huge-pages", test_huge_pages, .huge_vms = 1 },
    { "status/blocks", test_blocks, .pc_only = true, .huge_vms = 1 },
    { "status/in-flight", test_in_flight },
    { "status/poison", test_poison },
    { "status/unasked", test_unasked },
    { "status/request", test_request },
    { "status/snapshot", test_snapshot },
};

int main(int argc, char **argv)
{
    return run_rust_tests(argc, argv, "status", tests, ARRAY_SIZE(tests));
}
