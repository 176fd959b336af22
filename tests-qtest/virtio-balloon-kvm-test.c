/*
 * QTest test cases for virtio-balloon: a guest that runs with KVM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The test is the driver of the device, and a virtual CPU writes to memory.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "virtio-balloon-bootblock.h"
#include "virtio-balloon-migration.h"

/* The first word of a page, to which the guest has not yet written */
#define PATTERN_WORD    0xa5a5a5a5

#define GUEST_MB        256

static const Transport *transport;

/*
 * The guest
 */

/* Files that the tests use, in a directory of their own */
static struct {
    char *dir;
    char *rom;
    char *socket;
    char *memory;
} files;

static void create_files(void)
{
    /* The size of the ROM has to be a multiple of this. */
    g_autofree char *rom = g_malloc0(64 * KiB);
    g_autoptr(GError) err = NULL;

    files.dir = g_dir_make_tmp("virtio-balloon-XXXXXX", &err);
    g_assert_no_error(err);
    files.rom = g_build_filename(files.dir, "rom", NULL);
    files.socket = g_build_filename(files.dir, "socket", NULL);
    files.memory = g_build_filename(files.dir, "memory", NULL);
    memcpy(rom + 64 * KiB - sizeof(bootblock), bootblock, sizeof(bootblock));
    g_file_set_contents(files.rom, rom, 64 * KiB, &err);
    g_assert_no_error(err);
}

static void remove_files(void *opaque)
{
    g_unlink(files.memory);
    g_unlink(files.socket);
    g_unlink(files.rom);
    g_rmdir(files.dir);
}

/* Start QEMU, with a guest that does not run. */
static Balloon *boot_stopped(const char *options)
{
    g_autofree char *all = g_strdup_printf(
        "%s -accel kvm -bios %s -m %d", options, files.rom, GUEST_MB);

    return balloon_boot(transport, all);
}

/* Start QEMU, initialize the device, and start the guest. */
static Balloon *start_kvm(const char *options)
{
    g_autofree char *stopped = g_strdup_printf("%s -S", options);
    Balloon *b = boot_stopped(stopped);

    balloon_negotiate(b, F_BALLOON);
    /*
     * Not before, because libqos finds out the size of the BARs while they are
     * enabled, so they are in the place of the ROM for a moment.
     */
    continue_vm(b);
    return b;
}

/* The number of passes that the guest has finished */
static uint32_t guest_done(Balloon *b)
{
    return qtest_readl(b->qts, GUEST_DONE);
}

/* Have the guest increment one word in each step. */
static void guest_run(Balloon *b, uint64_t start, uint64_t end, uint32_t step,
                      uint32_t passes)
{
    qtest_writel(b->qts, GUEST_START, start);
    qtest_writel(b->qts, GUEST_END, end);
    qtest_writel(b->qts, GUEST_STEP, step);
    qtest_writel(b->qts, GUEST_REQUEST, guest_done(b) + passes);
}

/* Have the guest finish the current pass, and no further one. */
static void guest_finish(Balloon *b)
{
    uint32_t request;

    stop_vm(b);
    request = guest_done(b) + 1;
    qtest_writel(b->qts, GUEST_REQUEST, request);
    continue_vm(b);
    WAIT_FOR(guest_done(b) == request);
}

/*
 * Hints and the dirty log
 */

static bool migration_has_completed(Balloon *b)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'query-migrate' }");
    const char *status = qdict_get_try_str(ret, "status");
    bool result = !g_strcmp0(status, "completed");

    g_assert_cmpstr(status, !=, "failed");
    qobject_unref(ret);
    return result;
}

/* Make elements available, but do not notify the device. */
static void make_available_quietly(Balloon *b, int q, const uint32_t *heads,
                                   int n)
{
    QVirtQueue *vq = b->vq[q];
    uint16_t idx = qtest_readw(b->qts, vq->avail + 2);

    for (int i = 0; i < n; i++) {
        qtest_writew(b->qts, vq->avail + 4 + 2 * ((idx + i) % vq->size),
                     heads[i]);
    }
    qvirtqueue_set_avail_idx(b->qts, b->dev, vq, idx + n);
}

/*
 * The guest sends a hint, and writes to the pages before the device has seen
 * the hint.  KVM must already record what the guest writes, or the migration
 * would not send the pages again; see qemu_guest_free_page_hint_start().
 *
 * With @started, the device knows before that hints follow.  The C device then
 * looks for them all the time, and will often be faster than the guest.
 */
static void check_hint_race(bool started)
{
    /*
     * Memory whose dirty log is cleared at once, because it has the smallest
     * size for which that can be done
     */
    enum { SHIFT = 6, PAGES = 1 << SHIFT, CHUNK = PAGES * PAGE };
    g_autofree char *uri = g_strdup_printf("unix:%s", files.socket);
    /* See balloon_start_hinting() for why there is no ioeventfd. */
    g_autofree char *options = g_strdup_printf(
        ",free-page-hint=on,iothread=io0 -global virtio-pci.ioeventfd=off"
        " -global migration.x-clear-bitmap-shift=%d", SHIFT);
    g_autofree char *incoming = g_strdup_printf("%s -incoming %s", options,
                                                uri);
    Balloon *b = start_kvm(options), *dst = boot_stopped(incoming);
    int written = 0, skipped = 0, n = 0;
    uint64_t mem, command;
    uint32_t le, id, heads[2];

    /*
     * Memory is sent in ascending order.  At the speed that is used at first,
     * it would take minutes to get this far.
     */
    mem = QEMU_ALIGN_UP(guest_alloc(b->alloc, 192 * MiB) + 190 * MiB, CHUNK);
    qtest_memset(b->qts, mem, PATTERN, 2 * CHUNK);

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'max-bandwidth': 10,"
        " 'zero-page-detection': 'none' } }");
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }", uri);
    id = wait_cmd_id(b, VIRTIO_BALLOON_CMD_ID_STOP);

    if (started) {
        hint_command(b, id);
    } else {
        le = cpu_to_le32(id);
        command = put(b, &le, sizeof(le));
        heads[n++] = add_element(b, b->hint_vq,
                                 &(Buffer){ command, sizeof(le), false }, 1);
    }
    heads[n++] = add_element(b, b->hint_vq,
                             &(Buffer){ mem, 2 * CHUNK, true }, 1);
    make_available_quietly(b, b->hint_vq, heads, n);
    guest_run(b, mem, mem + CHUNK, PAGE, 1);
    WAIT_FOR(guest_done(b) == 1);
    if (!started) {
        /* Otherwise the hint could have been processed before. */
        g_assert_false(qvirtqueue_get_buf(b->qts, b->vq[b->hint_vq], &le,
                                          NULL));
    }
    b->dev->bus->virtqueue_kick(b->dev, b->vq[b->hint_vq]);
    for (int i = 0; i < n; i++) {
        wait_used(b, b->hint_vq, heads[i]);
    }
    b->hints_polled = true;
    hint_command(b, VIRTIO_BALLOON_CMD_ID_STOP);

    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'max-bandwidth': 10000000000 } }");
    WAIT_FOR(migration_has_completed(b));
    WAIT_FOR(migration_has_completed(dst));
    for (int i = 0; i < PAGES; i++) {
        written += qtest_readl(dst->qts, mem + i * PAGE) == PATTERN_WORD + 1;
        skipped += !qtest_readl(dst->qts, mem + CHUNK + i * PAGE);
    }
    g_test_message("%d written pages were sent, %d others were not", written,
                   skipped);
    g_assert_cmpint(written, ==, PAGES);
    /* The hint had an effect: pages were skipped. */
    g_assert_cmpint(skipped, ==, PAGES);

    balloon_quit(dst);
    balloon_quit(b);
}

static void test_hint_race(void)
{
    check_hint_race(false);
}

static void test_hint_race_started(void)
{
    check_hint_race(true);
}

/*
 * A balloon beside memory to which the guest writes all the time
 */

/* Sizes in pages */
enum {
    /* What the guest writes to: every page, or one in each step */
    DIRTIED = 8192,
    STEP = 5,
    /* As much as fits into the ring in elements of the size that Linux uses */
    ELEMENTS = 128,
    PFNS = 256,
    BALLOONED = ELEMENTS * PFNS,
    /* This has to be all of them. */
    MIXED = DIRTIED * STEP,
    /* What is reported as free, and memory around it */
    REPORTED = 4096,
    /* Memory that is not touched */
    QUIET = 1024,
    TOTAL = MIXED + REPORTED + QUIET,
};

QEMU_BUILD_BUG_ON(MIXED != DIRTIED + BALLOONED);

typedef enum Kind {
    KIND_DIRTIED,
    KIND_BALLOONED,
    KIND_REPORTED,
    KIND_QUIET,
} Kind;

typedef struct Load {
    Balloon *b;
    /* Each page that is dirtied or reported has others beside it. */
    bool mixed;
    /* Pages may keep their contents when they are inflated. */
    bool kept;
    /* Pages of the balloon, and those that are reported, are not in use. */
    bool inflated;
    /* The number of passes in which the guest wrote to all pages */
    uint32_t whole;
    uint64_t mem;
    /* The PFNs, in one buffer for each element */
    uint64_t pfns;
} Load;

/* What page @i is used for, and how many pages from there on are alike */
static Kind get_kind(Load *l, int i, int *len)
{
    if (i < MIXED && l->mixed) {
        *len = i % STEP ? STEP - i % STEP : 1;
        return i % STEP ? KIND_BALLOONED : KIND_DIRTIED;
    }
    if (i < DIRTIED) {
        *len = DIRTIED - i;
        return KIND_DIRTIED;
    }
    if (i < MIXED) {
        *len = MIXED - i;
        return KIND_BALLOONED;
    }
    i -= MIXED;
    if (i < REPORTED && l->mixed) {
        *len = 8 - i % 8;
        return i % 16 < 8 ? KIND_REPORTED : KIND_QUIET;
    }
    if (i < REPORTED) {
        /* as large as Linux usually reports them */
        *len = HUGE_PAGE / PAGE - i % (HUGE_PAGE / PAGE);
        return KIND_REPORTED;
    }
    *len = REPORTED + QUIET - i;
    return KIND_QUIET;
}

static uint64_t put_pfns(Load *l)
{
    g_autofree uint32_t *le = g_new(uint32_t, BALLOONED);
    int n = 0, len;

    for (int i = 0; i < TOTAL; i++) {
        if (get_kind(l, i, &len) == KIND_BALLOONED) {
            /* They are usually in descending order. */
            le[(n | (PFNS - 1)) - n % PFNS] = cpu_to_le32(pfn(l->mem) + i);
            n++;
        }
    }
    g_assert_cmpint(n, ==, BALLOONED);
    return put(l->b, le, n * sizeof(*le));
}

/* Fill a ring with the whole balloon. */
static void add_pfns(Load *l, int q, uint32_t *heads)
{
    const uint32_t size = PFNS * sizeof(uint32_t);

    qvirtqueue_reset_pool(l->b->vq[q]);
    for (int i = 0; i < ELEMENTS; i++) {
        heads[i] = add_element(l->b, q,
                               &(Buffer){ l->pfns + i * size, size }, 1);
    }
}

static void report(Load *l)
{
    Balloon *b = l->b;
    int q = b->reporting_vq, n = 0, len;
    Buffer buffers[32];

    for (int i = 0; i < TOTAL; i += len) {
        if (get_kind(l, i, &len) == KIND_REPORTED) {
            buffers[n++] = (Buffer) { l->mem + i * PAGE, len * PAGE, true };
        }
        if (n == ARRAY_SIZE(buffers) || (n && i + len == TOTAL)) {
            /* An element can be as large as the ring. */
            qvirtqueue_reset_pool(b->vq[q]);
            wait_used(b, q, submit_element(b, q, buffers, n));
            n = 0;
        }
    }
}

static void inflate_and_report(Load *l)
{
    Balloon *b = l->b;
    uint32_t heads[ELEMENTS];

    add_pfns(l, IVQ, heads);
    make_available(b, IVQ, heads, ELEMENTS);
    report(l);
    for (int i = 0; i < ELEMENTS; i++) {
        wait_used(b, IVQ, heads[i]);
    }
    l->inflated = true;
}

static void deflate(Load *l)
{
    uint32_t heads[ELEMENTS];
    int len;

    add_pfns(l, DVQ, heads);
    send_batch(l->b, DVQ, heads, ELEMENTS);

    /* Use the memory again. */
    for (int i = 0; i < TOTAL; i += len) {
        Kind kind = get_kind(l, i, &len);

        if (kind == KIND_BALLOONED || kind == KIND_REPORTED) {
            qtest_memset(l->b->qts, l->mem + i * PAGE, PATTERN, len * PAGE);
        }
    }
    l->inflated = false;
}

/* What a page contains, apart from the word to which the guest writes */
static bool page_is_good(Load *l, Kind kind, uint32_t word)
{
    if (!l->inflated || kind == KIND_DIRTIED || kind == KIND_QUIET) {
        return word == PATTERN_WORD;
    }
    return !word ||
           (l->kept && kind == KIND_BALLOONED && word == PATTERN_WORD);
}

/* Check some words while the guest runs. */
static void check_samples(Load *l)
{
    Balloon *b = l->b;

    for (int n = 0; n < 500; n++) {
        int i = g_test_rand_int_range(0, TOTAL), len;
        uint64_t addr = l->mem + i * PAGE;
        Kind kind = get_kind(l, i, &len);
        uint32_t word;

        word = qtest_readl(b->qts, addr + g_test_rand_int_range(1, 1024) * 4);
        g_assert_true(page_is_good(l, kind, word));
        if (kind == KIND_DIRTIED) {
            uint32_t before = guest_done(b), after;

            word = qtest_readl(b->qts, addr) - PATTERN_WORD;
            after = guest_done(b);
            g_assert_cmpint(word, >=, before);
            g_assert_cmpint(word, <=, after + 1);
        }
    }
}

/* Stop the guest, and check all of the memory. */
static void check_all(Load *l)
{
    const uint64_t size = (uint64_t)TOTAL * PAGE;
    g_autofree char *data = NULL;
    g_autoptr(GError) err = NULL;
    Balloon *b = l->b;
    uint32_t done, last;
    gsize saved;

    stop_vm(b);
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'pmemsave', 'arguments': { 'filename': %s,"
        " 'val': %" PRId64 ", 'size': %" PRId64 " } }", files.memory,
        (int64_t)l->mem, (int64_t)size);
    g_file_get_contents(files.memory, &data, &saved, &err);
    g_assert_no_error(err);
    g_assert_cmpint(saved, ==, size);

    done = guest_done(b);
    last = done + 1;
    for (int i = 0; i < TOTAL; i++) {
        const uint32_t *page = (const uint32_t *)(data + (uint64_t)i * PAGE);
        int len;
        Kind kind = get_kind(l, i, &len);
        uint32_t first = ldl_le_p(&page[0]), rest = ldl_le_p(&page[1]);

        if (kind == KIND_DIRTIED) {
            /* The guest was stopped in the middle of a pass. */
            first -= PATTERN_WORD;
            g_assert_cmpint(first, <=, last);
            g_assert_cmpint(first, >=, done);
            last = first;
        } else {
            g_assert_cmphex(first, ==, rest + l->whole);
        }
        g_assert_true(page_is_good(l, kind, rest));
        g_assert_cmpint(memcmp(&page[1], &page[2], PAGE - 8), ==, 0);
    }
    continue_vm(b);
}

static void check_load(const char *options, bool mixed, bool kept)
{
    g_autofree char *all = g_strdup_printf(",free-page-reporting=on%s",
                                           options);
    Balloon *b = start_kvm(all);
    Load l = { .b = b, .mixed = mixed, .kept = kept };
    int cycles = 0;
    uint32_t done;
    gint64 end;

    l.mem = QEMU_ALIGN_UP(
        guest_alloc(b->alloc, (uint64_t)TOTAL * PAGE + HUGE_PAGE), HUGE_PAGE);
    l.pfns = put_pfns(&l);
    qtest_memset(b->qts, l.mem, PATTERN, (uint64_t)TOTAL * PAGE);

    /* The guest does not finish as many passes as this. */
    guest_run(b, l.mem, l.mem + (mixed ? MIXED : DIRTIED) * PAGE,
              mixed ? STEP * PAGE : PAGE, INT32_MAX);
    WAIT_FOR(guest_done(b) > 0);
    end = g_get_monotonic_time() + 2 * G_USEC_PER_SEC;
    do {
        inflate_and_report(&l);
        check_samples(&l);
        deflate(&l);
        check_samples(&l);
        cycles++;
    } while (g_get_monotonic_time() < end);
    g_test_message("%d times, while the guest wrote %u times", cycles,
                   guest_done(b));

    check_all(&l);
    inflate_and_report(&l);
    check_all(&l);

    /* The virtual CPU and QEMU use the same pages in place of the old ones. */
    guest_finish(b);
    done = guest_done(b);
    guest_run(b, l.mem, l.mem + (uint64_t)TOTAL * PAGE, PAGE, 1);
    WAIT_FOR(guest_done(b) == done + 1);
    l.whole = 1;
    check_all(&l);
    balloon_quit(b);
}

static void test_load(void)
{
    check_load("", false, false);
}

static void test_load_mixed(void)
{
    check_load("", true, false);
}

static void test_load_huge_pages(void)
{
    bool rust = is_rust_device();
    g_autofree char *options = g_strdup_printf(
        "%s -object memory-backend-memfd,id=ram0,size=%dM,hugetlb=on,"
        "hugetlbsize=2M -machine memory-backend=ram0",
        rust ? ",huge-pages=on" : "", GUEST_MB);

    /* The C device only discards huge pages that are in one element. */
    if (qtest_take_huge_pages(GUEST_MB * MiB)) {
        check_load(options, false, !rust);
    }
}

/*
 * Whether KVM can be used
 */

static const char *no_kvm;

static void skip_all(void)
{
    g_test_skip(no_kvm);
}

static const char *find_kvm(void)
{
    QTestState *qts;
    QDict *ret;
    bool enabled;

    for (const Transport *const *t = transports(); *t; t++) {
        if (!strcmp((*t)->name, "pci-modern")) {
            transport = *t;
        }
    }
    if (!transport || strcmp(qtest_get_arch(), "x86_64")) {
        return "only for x86-64";
    }
    if (!qtest_has_accel("kvm")) {
        return "/dev/kvm cannot be used";
    }
    /* If KVM does not work, QEMU uses another accelerator. */
    qts = qtest_init("-machine none -accel kvm");
    ret = qtest_qmp_assert_success_ref(qts, "{ 'execute': 'query-kvm' }");
    enabled = qdict_get_bool(ret, "enabled");
    qobject_unref(ret);
    qtest_quit(qts);
    return enabled ? NULL : "QEMU cannot use KVM";
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    no_kvm = find_kvm();
    if (no_kvm) {
        qtest_add_func("virtio-balloon/kvm", skip_all);
        return g_test_run();
    }

    create_files();
    /* Failed assertions do not get as far as the end of this function. */
    qtest_add_abrt_handler(remove_files, NULL);
    qtest_add_func("virtio-balloon/kvm/hint-race", test_hint_race);
    qtest_add_func("virtio-balloon/kvm/hint-race-started",
                   test_hint_race_started);
    qtest_add_func("virtio-balloon/kvm/load", test_load);
    qtest_add_func("virtio-balloon/kvm/load-mixed", test_load_mixed);
    qtest_add_func("virtio-balloon/kvm/load-huge-pages", test_load_huge_pages);
    ret = g_test_run();
    qtest_remove_abrt_handler(NULL);
    remove_files(NULL);
    g_free(files.dir);
    g_free(files.rom);
    g_free(files.socket);
    g_free(files.memory);
    return ret;
}
