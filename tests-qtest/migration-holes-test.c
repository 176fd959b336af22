/*
 * QTest test cases for migration: holes in the file that is the guest's memory
 *
 * If a page of a shared file has never been written, the file has a hole there,
 * and no memory is allocated for it.  Migration has to find that such pages are
 * zero, and to make them zero at the destination, without allocating memory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "libqos/libqos.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include <glib/gstdio.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#define PAGE            4096
#define HUGE_PAGE       (2 * MiB)
#define RAM_SIZE        (64 * MiB)

/*
 * The memory that is looked at.  In a PC, what is below is not all RAM for the
 * CPU, and devices may write to it when QEMU starts.
 */
#define START           (1 * MiB)

/*
 * The memory is used in ranges of 2 MiB, so that the numbers are the same if
 * the host uses huge pages.  The other ranges are holes.
 */
static const uint64_t data_ranges[] = {
    10 * MiB, 12 * MiB, 26 * MiB, 28 * MiB, 46 * MiB, 60 * MiB,
};

/* A range with data that QEMU has not accessed */
#define OUTSIDE         (34 * MiB)

/* A range in which some pages are holes, unless the host uses huge pages */
#define MIXED           (20 * MiB)

/* Holes until a case writes to them */
#define HOLES           (38 * MiB)

/*
 * How much the allocated memory may differ: one huge page in MIXED, and one in
 * the memory below START.
 */
#define SLACK           (2 * HUGE_PAGE)

/*
 * Time after which a test fails.  Nothing takes nearly as long, and no test
 * passes because of this limit.
 */
#define TIMEOUT_US      (50 * G_USEC_PER_SEC)

typedef enum Memory {
    /* memory-backend-memfd */
    MEMFD,
    /* memory-backend-memfd with huge pages */
    HUGETLB,
    /* memory-backend-file with a new file in tmpfs */
    SHM_FILE,
    /* memory-backend-file with a device, whose contents only a mapping has */
    ZERO_DEVICE,
    /* memory-backend-file with a file that has contents; share=on and off */
    OLD_FILE,
    OLD_FILE_PRIVATE,
} Memory;

/* How the memory is transferred */
typedef enum Mode {
    PLAIN,
    XBZRLE,
    MULTIFD,
    /* with multifd, but zero pages are found by the main migration thread */
    MULTIFD_LEGACY,
} Mode;

typedef struct Case {
    const char *path;
    void (*fn)(const struct Case *c);
    /* Of both VMs, except that the source has a memfd instead of an old file */
    Memory memory;
    Mode mode;
    /* The capability "mapped-ram" is set */
    bool mapped_ram;
    /* If huge pages are used, the number of VMs that exist at the same time */
    int vms;
} Case;

typedef struct VM {
    QTestState *qts;
    /* The file that is the memory, or NULL if it is a device */
    char *file;
} VM;

static const Case *test_case;

/* For sockets, state, and old files; and in tmpfs, for new files */
static char *tmp_dir, *shm_dir;

/* What the memory should contain */
static uint8_t *expected;

/*
 * Files
 */

static void remove_dir(const char *path)
{
    GDir *dir = g_dir_open(path, 0, NULL);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *file = g_build_filename(path, name, NULL);

        g_unlink(file);
    }
    if (dir) {
        g_dir_close(dir);
    }
    g_rmdir(path);
}

static void remove_dirs(void *opaque)
{
    remove_dir(tmp_dir);
    if (shm_dir) {
        remove_dir(shm_dir);
    }
}

static void cleanup_dirs(void)
{
    qtest_remove_abrt_handler(tmp_dir);
    remove_dirs(NULL);
    g_clear_pointer(&tmp_dir, g_free);
    g_clear_pointer(&shm_dir, g_free);
}

static void make_dirs(void)
{
    g_autofree char *shm = g_strdup("/dev/shm/migration-holes-XXXXXX");
    g_autoptr(GError) err = NULL;
    struct statfs fs;

    tmp_dir = g_dir_make_tmp("migration-holes-XXXXXX", &err);
    g_assert_no_error(err);
    if (!statfs("/dev/shm", &fs) && fs.f_type == TMPFS_MAGIC &&
        g_mkdtemp(shm)) {
        shm_dir = g_steal_pointer(&shm);
    }
    /* Failed assertions do not get as far as cleanup_dirs(). */
    qtest_add_abrt_handler(remove_dirs, tmp_dir);
}

static char *tmp_file(const char *name)
{
    return g_build_filename(tmp_dir, name, NULL);
}

/* Create a file as large as the memory, all bytes of which are 0xff. */
static void make_old_file(const char *path)
{
    g_autofree uint8_t *data = g_malloc(MiB);
    FILE *file = fopen(path, "w");

    g_assert_nonnull(file);
    memset(data, 0xff, MiB);
    for (uint64_t i = 0; i < RAM_SIZE; i += MiB) {
        g_assert_cmpint(fwrite(data, MiB, 1, file), ==, 1);
    }
    g_assert_cmpint(fclose(file), ==, 0);
}

/*
 * VMs
 */

/* The memfd with the memory is only visible in /proc. */
static char *find_memfd(QTestState *qts)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", (int)qtest_pid(qts));
    GDir *dir = g_dir_open(path, 0, NULL);
    char *found = NULL;
    const char *name;

    g_assert_nonnull(dir);
    while (!found && (name = g_dir_read_name(dir))) {
        g_autofree char *fd = g_build_filename(path, name, NULL);
        g_autofree char *target = g_file_read_link(fd, NULL);
        struct stat st;

        if (target && g_str_has_prefix(target, "/memfd:") && !stat(fd, &st) &&
            st.st_size == RAM_SIZE) {
            found = g_steal_pointer(&fd);
        }
    }
    g_dir_close(dir);
    g_assert_nonnull(found);
    return found;
}

static void set_capability(VM *vm, const char *name)
{
    migrate_set_capability(vm->qts, name, true);
}

/* Set a capability.  If it is refused, skip the case, and return false. */
static bool set_capability_or_skip(VM *vm, const char *name)
{
    QDict *resp = qtest_qmp(
        vm->qts, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': %s, 'state': true } ] } }", name);
    QDict *error = qdict_get_qdict(resp, "error");

    if (error) {
        g_test_skip(qdict_get_str(error, "desc"));
    }
    qobject_unref(resp);
    return !error;
}

static VM *vm_start(const char *name, Memory memory, const char *options)
{
    g_autofree char *backend = NULL;
    VM *vm = g_new0(VM, 1);

    switch (memory) {
    case MEMFD:
        backend = g_strdup("memfd,share=on");
        break;
    case HUGETLB:
        backend = g_strdup("memfd,share=on,hugetlb=on,hugetlbsize=2M");
        break;
    case SHM_FILE:
        vm->file = g_build_filename(shm_dir, name, NULL);
        backend = g_strdup_printf("file,share=on,mem-path=%s", vm->file);
        break;
    case ZERO_DEVICE:
        backend = g_strdup("file,share=on,mem-path=/dev/zero");
        break;
    case OLD_FILE:
    case OLD_FILE_PRIVATE:
        vm->file = tmp_file(name);
        make_old_file(vm->file);
        backend = g_strdup_printf("file,share=%s,mem-path=%s",
                                  memory == OLD_FILE ? "on" : "off", vm->file);
        break;
    }
    vm->qts = qtest_initf("-nodefaults -machine pc,memory-backend=ram"
                          " -m %dM -object memory-backend-%s,id=ram,size=%dM"
                          " %s",
                          (int)(RAM_SIZE / MiB), backend, (int)(RAM_SIZE / MiB),
                          options);
    if (memory == MEMFD || memory == HUGETLB) {
        vm->file = find_memfd(vm->qts);
    }
    set_capability(vm, "events");
    if (test_case->mode == XBZRLE) {
        set_capability(vm, "xbzrle");
    }
    if (test_case->mode == MULTIFD || test_case->mode == MULTIFD_LEGACY) {
        set_capability(vm, "multifd");
        migrate_set_parameter_int(vm->qts, "multifd-channels", 2);
    }
    if (test_case->mode == MULTIFD_LEGACY) {
        migrate_set_parameter_str(vm->qts, "zero-page-detection", "legacy");
    }
    if (test_case->mapped_ram) {
        set_capability(vm, "mapped-ram");
    }
    return vm;
}

static void vm_quit(VM *vm)
{
    qtest_quit(vm->qts);
    if (vm->file && !g_str_has_prefix(vm->file, "/proc/")) {
        g_unlink(vm->file);
    }
    g_free(vm->file);
    g_free(vm);
}

/* Two QEMUs that quit at the same time take less than one after the other. */
static void quit_both(VM *src, VM *dst)
{
    g_assert_cmpint(kill(qtest_pid(src->qts), SIGTERM), ==, 0);
    vm_quit(dst);
    vm_quit(src);
}

/*
 * Memory
 */

/* Write to the guest's memory. */
static void fill(VM *vm, uint64_t addr, uint8_t value, uint64_t len)
{
    qtest_memset(vm->qts, addr, value, len);
    memset(expected + addr, value, len);
}

/* What is written to a page: not the same as close to it */
static uint8_t pattern(uint64_t addr)
{
    return 1 + addr / PAGE % 251;
}

/* Fill a range, four pages at a time, because each request takes some time. */
static void fill_range(VM *vm, uint64_t start)
{
    for (uint64_t addr = start; addr < start + HUGE_PAGE; addr += 4 * PAGE) {
        fill(vm, addr, pattern(addr), 4 * PAGE);
    }
}

/*
 * Fill a range from another process, as one with a vhost-user device does.  In
 * hugetlbfs, mincore() in QEMU does not see these pages.
 */
static void fill_range_from_outside(VM *vm, uint64_t start)
{
    int fd = open(vm->file, O_RDWR);
    uint8_t *map = mmap(NULL, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                        fd, start);

    g_assert_true(map != MAP_FAILED);
    for (uint64_t i = 0; i < HUGE_PAGE; i += PAGE) {
        memset(expected + start + i, pattern(start + i), PAGE);
    }
    memcpy(map, expected + start, HUGE_PAGE);
    g_assert_cmpint(munmap(map, HUGE_PAGE), ==, 0);
    close(fd);
}

static VM *start_source(const char *options)
{
    VM *vm = vm_start("source", test_case->memory >= OLD_FILE ?
                      MEMFD : test_case->memory, options);

    memset(expected, 0, RAM_SIZE);
    for (int i = 0; i < ARRAY_SIZE(data_ranges); i++) {
        fill_range(vm, data_ranges[i]);
    }
    if (vm->file) {
        fill_range_from_outside(vm, OUTSIDE);
    }
    for (uint64_t i = 0; i < HUGE_PAGE; i += 8 * PAGE) {
        fill(vm, MIXED + i, pattern(MIXED + i), PAGE);
    }
    return vm;
}

static VM *start_destination(void)
{
    return vm_start("destination", test_case->memory, "-incoming defer");
}

/* How much memory is allocated for the file */
static uint64_t allocated(VM *vm)
{
    struct stat st;

    g_assert_cmpint(stat(vm->file, &st), ==, 0);
    return st.st_blocks * 512ULL;
}

static void assert_allocated(VM *vm, const char *when, uint64_t before)
{
    uint64_t now = allocated(vm);

    if (now > before + SLACK || before > now + SLACK) {
        g_test_message("%s: %" PRIu64 " KiB are allocated %s, instead of %"
                       PRIu64 " KiB", test_case->path, now / KiB, when,
                       before / KiB);
        g_test_fail();
    }
}

/*
 * Compare all of the memory with what it should contain.  This allocates memory
 * for holes.
 */
static void assert_contents(VM *vm, const char *name)
{
    g_autofree char *path = tmp_file("memory");
    uint64_t wrong = 0, first = 0;
    uint8_t first_value = 0;
    uint8_t page[PAGE];
    FILE *file;

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'pmemsave', 'arguments': {"
        " 'val': %" PRIu64 ", 'size': %" PRIu64 ", 'filename': %s } }",
        (uint64_t)START, (uint64_t)(RAM_SIZE - START), path);
    file = fopen(path, "r");
    g_assert_nonnull(file);
    for (uint64_t addr = START; addr < RAM_SIZE; addr += PAGE) {
        g_assert_cmpint(fread(page, PAGE, 1, file), ==, 1);
        if (memcmp(page, expected + addr, PAGE) && !wrong++) {
            int i = 0;

            while (page[i] == expected[addr + i]) {
                i++;
            }
            first = addr + i;
            first_value = page[i];
        }
    }
    fclose(file);
    g_unlink(path);
    if (wrong) {
        g_test_message("%s: %" PRIu64 " of %d pages of the %s are wrong: at "
                       "0x%" PRIx64 ", there is 0x%02x instead of 0x%02x",
                       test_case->path, wrong,
                       (int)((RAM_SIZE - START) / PAGE), name, first,
                       first_value, expected[first]);
        g_test_fail();
    }
}

/*
 * Migration
 */

static char *socket_uri(void)
{
    g_autofree char *path = tmp_file("socket");

    return g_strdup_printf("unix:%s", path);
}

static char *file_uri(void)
{
    g_autofree char *path = tmp_file("state");

    return g_strdup_printf("file:%s", path);
}

static void remove_state(void)
{
    g_autofree char *path = tmp_file("state");

    g_unlink(path);
}

static void start_migration(VM *src, VM *dst)
{
    g_autofree char *uri = socket_uri();

    migrate_incoming_qmp(dst->qts, uri, NULL, "{}");
    migrate_qmp(src->qts, dst->qts, uri, NULL, "{}");
}

static void finish_migration(VM *src, VM *dst)
{
    wait_for_migration_complete(src->qts);
    wait_for_migration_complete(dst->qts);
}

/* Start a QEMU, and load the state from the file. */
static VM *load_state(void)
{
    g_autofree char *uri = file_uri();
    VM *vm = start_destination();

    migrate_incoming_qmp(vm->qts, uri, NULL, "{}");
    wait_for_migration_complete(vm->qts);
    remove_state();
    return vm;
}

/*
 * The memory is neither allocated at the source nor at the destination, unless
 * the destination has an old file, which has other contents before.
 */
static void test_holes(const Case *c)
{
    VM *src = start_source(""), *dst = start_destination();
    uint64_t before = allocated(src);

    start_migration(src, dst);
    finish_migration(src, dst);
    assert_allocated(src, "at the source after migration", before);
    if (c->memory < OLD_FILE) {
        assert_allocated(dst, "at the destination", before);
    }
    assert_contents(dst, "destination");
    quit_both(src, dst);
}

/*
 * Change pages to and from zero, in another way in each round.  Write few
 * bytes, so that XBZRLE sends the difference.
 */
static void change_pages(VM *vm, int round)
{
    const uint64_t ranges[] = { data_ranges[2], MIXED, HOLES };

    for (int i = 0; i < ARRAY_SIZE(ranges); i++) {
        for (int n = 0; n < HUGE_PAGE / PAGE; n++) {
            uint64_t addr = ranges[i] + n * PAGE;

            /* Some pages change in all rounds, and others only in this one. */
            if (n % 5 && n % 5 != round + 1) {
                continue;
            }
            switch ((n + round) % 4) {
            case 0:
                fill(vm, addr, 0, PAGE);
                break;
            case 1:
                fill(vm, addr + 8 * n % PAGE, 0x80 + round, 3);
                break;
            case 2:
                fill(vm, addr, pattern(addr), PAGE);
                break;
            }
        }
    }
}

/*
 * Wait until a pass over the memory has begun and ended, or migration waits for
 * migrate-continue.  To have enough to send, write to some memory all the time.
 */
static void wait_for_pass(VM *vm)
{
    gint64 deadline = g_get_monotonic_time() + TIMEOUT_US;
    uint64_t pass = get_migration_pass(vm->qts);
    static uint8_t value;

    for (;;) {
        g_autofree char *status = migrate_query_status(vm->qts);

        if (!strcmp(status, "pre-switchover") ||
            get_migration_pass(vm->qts) >= pass + 2) {
            break;
        }
        g_assert_cmpint(g_get_monotonic_time(), <, deadline);
        fill(vm, data_ranges[0], ++value, 2 * HUGE_PAGE);
        g_usleep(1000);
    }
}

/* Pages are sent more than once, as data and as zero pages. */
static void test_again(const Case *c)
{
    VM *src = start_source(""), *dst = start_destination();

    /* Migration cannot end before the last changes. */
    set_capability(src, "pause-before-switchover");
    /* A pass in which wait_for_pass() writes takes about 100 ms. */
    migrate_set_parameter_int(src->qts, "max-bandwidth", 40 * MiB);
    migrate_set_parameter_int(src->qts, "downtime-limit", 1);
    start_migration(src, dst);
    for (int round = 0; round < 2; round++) {
        wait_for_pass(src);
        change_pages(src, round);
    }
    wait_for_migration_status(src->qts, "pre-switchover", NULL);
    change_pages(src, 2);
    g_test_message("%" PRIu64 " passes, %" PRId64 " zero pages, %" PRId64
                   " other pages", get_migration_pass(src->qts),
                   read_ram_property_int(src->qts, "duplicate"),
                   read_ram_property_int(src->qts, "normal"));
    migrate_continue(src->qts, "pre-switchover");
    finish_migration(src, dst);
    assert_contents(dst, "destination");
    quit_both(src, dst);
}

/*
 * Data is written to the holes that were looked at last.  QEMU may remember
 * that they were holes, but has to find the data.
 */
static void test_late(const Case *c)
{
    VM *src = start_source(""), *dst = start_destination();

    set_capability(src, "pause-before-switchover");
    start_migration(src, dst);
    wait_for_migration_status(src->qts, "pre-switchover", NULL);
    for (uint64_t addr = RAM_SIZE - HUGE_PAGE; addr < RAM_SIZE;
         addr += 3 * PAGE) {
        fill(src, addr, pattern(addr), PAGE);
    }
    migrate_continue(src->qts, "pre-switchover");
    finish_migration(src, dst);
    assert_contents(dst, "destination");
    quit_both(src, dst);
}

/* Start two VMs that can use postcopy, or skip the case, and return false. */
static bool start_for_postcopy(VM **src, VM **dst)
{
    *dst = start_destination();
    if (!set_capability_or_skip(*dst, "postcopy-ram")) {
        vm_quit(*dst);
        return false;
    }
    *src = start_source("");
    set_capability(*src, "postcopy-ram");
    return true;
}

/*
 * Postcopy would be possible, but is not used.  The destination allocates all
 * of the memory.
 */
static void test_no_postcopy(const Case *c)
{
    uint64_t before;
    VM *src, *dst;

    if (!start_for_postcopy(&src, &dst)) {
        return;
    }
    before = allocated(src);
    start_migration(src, dst);
    finish_migration(src, dst);
    assert_allocated(src, "at the source after migration", before);
    assert_contents(dst, "destination");
    quit_both(src, dst);
}

/*
 * Holes are sent before the VM runs at the destination, and most of the memory
 * is sent after that.
 */
static void test_postcopy(const Case *c)
{
    uint64_t before, holes = (data_ranges[0] - START) / PAGE;
    VM *src, *dst;

    if (!start_for_postcopy(&src, &dst)) {
        return;
    }
    before = allocated(src);
    /* so slow that nothing ends while it is looked at */
    migrate_set_parameter_int(src->qts, "max-bandwidth", MiB);
    migrate_set_parameter_int(src->qts, "max-postcopy-bandwidth", MiB);
    migrate_set_parameter_int(src->qts, "downtime-limit", 1);
    start_migration(src, dst);
    while (read_ram_property_int(src->qts, "duplicate") < holes) {
        g_usleep(1000);
    }
    qtest_qmp_assert_success(src->qts,
                             "{ 'execute': 'migrate-start-postcopy' }");
    migration_event_wait(src->qts, "postcopy-active");
    migration_event_wait(dst->qts, "postcopy-active");
    /*
     * Pages that were sent are not sent again when they are missing: if they
     * had no memory, reading them would never return.
     */
    if (allocated(dst) < holes * PAGE) {
        g_test_message("%s: only %" PRIu64 " KiB are allocated when postcopy "
                       "has begun, although %" PRIu64 " KiB were sent",
                       c->path, allocated(dst) / KiB, holes * PAGE / KiB);
        g_test_fail();
    } else {
        for (uint64_t i = 0; i < holes; i++) {
            g_assert_cmphex(qtest_readb(dst->qts, START + i * PAGE), ==, 0);
        }
    }
    /* This page is sent now. */
    g_assert_cmphex(qtest_readb(dst->qts, data_ranges[5]), ==,
                    expected[data_ranges[5]]);
    migrate_set_parameter_int(src->qts, "max-postcopy-bandwidth", GiB);
    finish_migration(src, dst);
    assert_allocated(src, "at the source after migration", before);
    assert_contents(dst, "destination");
    quit_both(src, dst);
}

/* Migration to a file; the destination is started later. */
static void test_file(const Case *c)
{
    g_autofree char *uri = file_uri();
    VM *src = start_source(""), *dst;
    uint64_t before = allocated(src);

    migrate_qmp(src->qts, NULL, uri, NULL, "{}");
    wait_for_migration_complete(src->qts);
    assert_allocated(src, "at the source after migration", before);
    vm_quit(src);

    dst = load_state();
    if (c->memory < OLD_FILE) {
        assert_allocated(dst, "at the destination", before);
    }
    assert_contents(dst, "destination");
    vm_quit(dst);
}

/*
 * The memory is saved while the VM runs, with the contents that it had when
 * this began.
 */
static void test_background_snapshot(const Case *c)
{
    g_autofree uint8_t *snapshot = g_malloc(RAM_SIZE);
    g_autofree char *path = tmp_file("state"), *uri = NULL;
    VM *src = start_source(""), *dst;
    uint64_t before = allocated(src);
    /* Huge pages are populated before they are protected. */
    uint64_t during = c->memory == HUGETLB ? RAM_SIZE : before;
    uint8_t *now = expected;

    if (!set_capability_or_skip(src, "background-snapshot")) {
        vm_quit(src);
        return;
    }
    /*
     * Nothing limits the bandwidth of background snapshots.  While the state is
     * not read, most of the memory is not saved, and the writes have to wait.
     */
    uri = g_strdup_printf("exec:sleep 0.3; cat > %s", path);
    migrate_qmp(src->qts, NULL, uri, NULL, "{}");
    /* The VM is stopped for as long as it takes to protect the memory. */
    qtest_qmp_eventwait(src->qts, "STOP");
    qtest_qmp_eventwait(src->qts, "RESUME");
    assert_allocated(src, "when a snapshot has begun", during);

    memcpy(snapshot, expected, RAM_SIZE);
    for (uint64_t i = 0; i < 4 * PAGE; i += PAGE) {
        fill(src, data_ranges[5] + 2 * i, 0, PAGE);
        fill(src, HOLES + 3 * i, 0xee, PAGE);
    }
    wait_for_migration_complete(src->qts);
    assert_allocated(src, "after a snapshot", during);
    assert_contents(src, "source");
    vm_quit(src);

    dst = load_state();
    assert_allocated(dst, "after the snapshot was loaded", before);
    expected = snapshot;
    assert_contents(dst, "snapshot");
    expected = now;
    vm_quit(dst);
}

static void monitor_command(VM *vm, const char *command)
{
    g_autofree char *result = qtest_hmp(vm->qts, "%s", command);

    g_assert_cmpstr(result, ==, "");
}

/* Internal snapshots, which are loaded by the same QEMU */
static void test_internal_snapshot(const Case *c)
{
    g_autofree uint8_t *snapshot = NULL;
    g_autofree char *disk = tmp_file("disk"), *options = NULL;
    uint64_t before;
    VM *vm;

    if (!have_qemu_img()) {
        g_test_skip("QTEST_QEMU_IMG is not set, or there is no such program");
        return;
    }
    mkqcow2(disk, 1);
    options = g_strdup_printf("-drive if=none,id=disk,format=qcow2,file=%s",
                              disk);
    vm = start_source(options);
    before = allocated(vm);

    monitor_command(vm, "savevm s");
    assert_allocated(vm, "after savevm", before);
    snapshot = g_memdup2(expected, RAM_SIZE);
    change_pages(vm, 0);
    /* change_pages() writes to one more range. */
    before = allocated(vm);
    monitor_command(vm, "loadvm s");
    assert_allocated(vm, "after loadvm", before);
    memcpy(expected, snapshot, RAM_SIZE);
    assert_contents(vm, "snapshot");
    vm_quit(vm);
    g_unlink(disk);
}

static const Case cases[] = {
    { "plain/memfd", test_holes, MEMFD },
    { "plain/hugetlb", test_holes, HUGETLB, .vms = 2 },
    { "plain/file", test_holes, SHM_FILE },
    { "multifd/memfd", test_holes, MEMFD, MULTIFD },
    { "multifd/hugetlb", test_holes, HUGETLB, MULTIFD, .vms = 2 },
    { "multifd/file", test_holes, SHM_FILE, MULTIFD },
    { "multifd/legacy", test_holes, MEMFD, MULTIFD_LEGACY },
    { "again/plain", test_again, MEMFD, PLAIN },
    { "again/xbzrle", test_again, MEMFD, XBZRLE },
    { "again/multifd", test_again, MEMFD, MULTIFD },
    { "again/multifd-hugetlb", test_again, HUGETLB, MULTIFD, .vms = 2 },
    { "late/memfd", test_late, MEMFD, PLAIN },
    { "late/multifd", test_late, MEMFD, MULTIFD },
    { "late/device", test_late, ZERO_DEVICE, PLAIN },
    { "contents/plain", test_holes, OLD_FILE, PLAIN },
    { "contents/multifd", test_holes, OLD_FILE, MULTIFD },
    { "contents/multifd-private", test_holes, OLD_FILE_PRIVATE, MULTIFD },
    { "contents/mapped-ram", test_file, OLD_FILE, PLAIN, .mapped_ram = true },
    { "postcopy/unused", test_no_postcopy, MEMFD, PLAIN },
    { "postcopy/unused-multifd", test_no_postcopy, MEMFD, MULTIFD },
    { "postcopy/used", test_postcopy, MEMFD, PLAIN },
    { "mapped-ram/plain", test_file, MEMFD, PLAIN, .mapped_ram = true },
    { "mapped-ram/multifd", test_file, MEMFD, MULTIFD, .mapped_ram = true },
    { "mapped-ram/hugetlb", test_file, HUGETLB, PLAIN, .mapped_ram = true,
      .vms = 1 },
    { "background-snapshot/memfd", test_background_snapshot, MEMFD },
    { "background-snapshot/hugetlb", test_background_snapshot, HUGETLB,
      .vms = 1 },
    { "internal-snapshot/plain", test_internal_snapshot, MEMFD },
    { "internal-snapshot/mapped-ram", test_internal_snapshot, MEMFD,
      .mapped_ram = true },
};

static void run_case(const void *opaque)
{
    const Case *c = opaque;

    if (c->memory == HUGETLB && !qtest_take_huge_pages(c->vms * RAM_SIZE)) {
        return;
    }
    test_case = c;
    make_dirs();
    if (c->memory == SHM_FILE && !shm_dir) {
        g_test_skip("/dev/shm is not a tmpfs, or is not writable");
    } else {
        c->fn(c);
    }
    cleanup_dirs();
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    expected = g_malloc(RAM_SIZE);
    if (qtest_has_machine("pc")) {
        for (int i = 0; i < ARRAY_SIZE(cases); i++) {
            g_autofree char *path = g_strdup_printf("migration-holes/%s",
                                                    cases[i].path);

            qtest_add_data_func(path, &cases[i], run_case);
        }
    }
    ret = g_test_run();
    g_free(expected);
    return ret;
}
