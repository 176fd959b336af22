/*
 * QTest test cases for virtio-balloon: system calls of QEMU that fail, and
 * events in the middle of an element
 *
 * The guest always gets its elements back, and memory that is not in the
 * balloon is never changed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-faults.h"
#include "virtio-balloon-migration.h"
#include <glib/gstdio.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/statfs.h>
#include <sys/syscall.h>

#define LIBRARY         "virtio-balloon-faults.so"
#define NO_LIBRARY      "there is no " LIBRARY " beside the test program"
#define FOREVER         INT32_MAX
#define REPORTING       ",free-page-reporting=on"

/* Enough ranges for two turns of the device */
#define RANGES          600

static const Transport *transport;
static bool rust_device;
/* Why system calls of QEMU cannot fail here, or NULL */
static const char *no_faults;
static Faults *faults;
static char *dir, *faults_path, *log_path, *memory_path, *library_path;

/*
 * QEMU with the library
 */

static void remove_files(void *opaque)
{
    g_unlink(faults_path);
    g_unlink(log_path);
    g_unlink(memory_path);
    g_rmdir(dir);
}

static void create_files(void)
{
    int fd;

    dir = g_dir_make_tmp("virtio-balloon-XXXXXX", NULL);
    g_assert_nonnull(dir);
    log_path = g_build_filename(dir, "log", NULL);
    memory_path = g_build_filename(dir, "memory", NULL);
    faults_path = g_build_filename(dir, "faults", NULL);
    library_path = g_test_build_filename(G_TEST_BUILT, LIBRARY, NULL);
    fd = open(faults_path, O_RDWR | O_CREAT, 0600);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, sizeof(Faults)), ==, 0);
    faults = mmap(NULL, sizeof(Faults), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                  0);
    g_assert_true(faults != MAP_FAILED);
    close(fd);
    qtest_add_abrt_handler(remove_files, NULL);
}

static void set_library(bool on)
{
    if (on) {
        g_setenv(FAULTS_ENV, faults_path, true);
        g_setenv("LD_PRELOAD", library_path, true);
    } else {
        g_unsetenv("LD_PRELOAD");
        g_unsetenv(FAULTS_ENV);
    }
}

/*
 * Whether QEMU exits with success with these arguments.  As in libqtest, a
 * shell starts it, which the library is preloaded into, too.
 */
static bool run_qemu(const char *arguments)
{
    g_autofree char *command = g_strdup_printf(
        "sh -c 'exec %s %s'", getenv("QTEST_QEMU_BINARY"), arguments);
    g_autofree char *out = NULL, *err = NULL;
    int status;

    return g_spawn_command_line_sync(command, &out, &err, &status, NULL) &&
           status == 0;
}

/* Find out whether the library works. */
static const char *find_library(void)
{
    bool ok;

    if (!g_file_test(library_path, G_FILE_TEST_EXISTS)) {
        return NO_LIBRARY;
    }
    set_library(true);
    ok = run_qemu("-version");
    set_library(false);
    if (!ok) {
        /* AddressSanitizer has to be the first library. */
        return "QEMU does not start with a library that is preloaded";
    }
    return faults->loaded ? NULL : "QEMU does not use the library";
}

/* The build must not lose the library, because all tests would be skipped. */
static void test_library(void)
{
    g_assert_cmpstr(no_faults, !=, NO_LIBRARY);
}

/*
 * Start QEMU with the library, and without faults.  Its messages go to a file.
 */
static Balloon *start_with_library(const char *options)
{
    g_autofree char *all = g_strdup_printf("%s 2>%s", options, log_path);
    Balloon *b;

    memset(faults, 0, sizeof(*faults));
    set_library(true);
    b = balloon_start(transport, all);
    set_library(false);
    g_assert_cmpint(faults->loaded, ==, 1);
    /* What happened while QEMU started does not count. */
    memset(faults, 0, sizeof(*faults));
    return b;
}

static Balloon *start_with_log(const char *options)
{
    g_autofree char *all = g_strdup_printf("%s 2>%s", options, log_path);

    return balloon_start(transport, all);
}

/* How many lines of the log contain both strings */
static int count_lines(const char *text, const char *other)
{
    g_autofree char *log = NULL;
    g_auto(GStrv) lines = NULL;
    int n = 0;

    g_assert_true(g_file_get_contents(log_path, &log, NULL, NULL));
    lines = g_strsplit(log, "\n", -1);
    for (char **line = lines; *line; line++) {
        n += **line && strstr(*line, text) && strstr(*line, other);
    }
    return n;
}

/*
 * QEMU has printed nothing.  What migration prints when it is canceled, and
 * what sanitizers print, does not matter.
 */
static void assert_no_messages(void)
{
    g_autofree char *log = NULL;

    g_assert_true(g_file_get_contents(log_path, &log, NULL, NULL));
    if (count_lines("qemu-system", "") != count_lines("SaveStateEntry", "")) {
        g_assert_cmpstr(log, ==, "");
    }
}

/* Whether QEMU could use process_madvise() without faults */
static bool have_process_madvise(void)
{
    bool ok = false;
#ifdef SYS_process_madvise
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct iovec iov = { page, PAGE };
    int fd = syscall(SYS_pidfd_open, getpid(), 0);

    ok = fd >= 0 && syscall(SYS_process_madvise, fd, &iov, 1, MADV_DONTNEED,
                            0) == PAGE;
    munmap(page, PAGE);
    close(fd);
#endif
    return ok;
}

/*
 * Memory that is given to the device: @n ranges of one unit each, with one unit
 * around them that the guest keeps
 */

typedef struct Area {
    uint64_t mem;
    uint64_t unit;
    int n;
    /* Elements with all ranges, for inflating and deflating and for reports */
    Buffer pfns, table;
} Area;

static uint64_t range_addr(const Area *area, int i)
{
    return area->mem + (2 * i + 1) * area->unit;
}

static void area_fill(Balloon *b, const Area *area)
{
    qtest_memset(b->qts, area->mem, PATTERN, (2 * area->n + 1) * area->unit);
}

static Area area_new(Balloon *b, uint64_t unit, int n)
{
    const int parts = unit / PAGE;
    g_autofree uint32_t *le = g_new(uint32_t, n * parts);
    g_autofree struct vring_desc *desc = g_new(struct vring_desc, n);
    Area area = { .unit = unit, .n = n };
    size_t size = n * sizeof(*desc);

    area.mem = QEMU_ALIGN_UP(guest_alloc(b->alloc, (2 * n + 2) * unit), unit);
    area_fill(b, &area);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < parts; j++) {
            le[i * parts + j] = cpu_to_le32(pfn(range_addr(&area, i)) + j);
        }
        desc[i] = (struct vring_desc) {
            .addr = cpu_to_le64(range_addr(&area, i)),
            .len = cpu_to_le32(unit),
            .flags = cpu_to_le16(VRING_DESC_F_WRITE |
                                 (i < n - 1 ? VRING_DESC_F_NEXT : 0)),
            .next = cpu_to_le16(i + 1),
        };
    }
    area.pfns.len = n * parts * sizeof(*le);
    area.pfns.addr = guest_alloc(b->alloc, area.pfns.len);
    qtest_bufwrite(b->qts, area.pfns.addr, le, area.pfns.len);
    area.table = (Buffer) { put(b, desc, size), size };
    return area;
}

/*
 * Check that all ranges were discarded, except for some, and that nothing else
 * was.
 */
static void area_check(Balloon *b, const Area *area, int kept, int n_kept)
{
    const uint64_t size = (2 * area->n + 1) * area->unit;
    g_autofree char *expected = g_malloc(area->unit);
    g_autofree char *found = NULL;
    gsize length;

    /* Much faster than qtest_bufread() */
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'pmemsave', 'arguments': { 'val': %" PRIu64 ","
        " 'size': %" PRIu64 ", 'filename': %s } }", area->mem, size,
        memory_path);
    g_assert_true(g_file_get_contents(memory_path, &found, &length, NULL));
    g_assert_cmpint(length, ==, size);
    for (int i = 0; i < 2 * area->n + 1; i++) {
        int range = i / 2;
        bool zero = i % 2 && !(range >= kept && range - kept < n_kept);

        memset(expected, zero ? 0 : PATTERN, area->unit);
        if (memcmp(found + i * area->unit, expected, area->unit)) {
            g_test_message("unit %d should%s have been discarded", i,
                           zero ? "" : " not");
            g_test_fail();
            return;
        }
    }
}

/* Submit an element that consists of a table of descriptors. */
static uint32_t submit_table(Balloon *b, int q, Buffer table)
{
    QVirtQueue *vq = b->vq[q];
    uint32_t head = add_element(b, q, &table, 1);

    make_indirect(b, q, head);
    qvirtqueue_kick(b->qts, b->dev, vq, head);
    return head;
}

/* Send all ranges with one element, and wait until it is used. */
static void area_send(Balloon *b, int q, const Area *area)
{
    wait_used(b, q, q == b->reporting_vq ?
              submit_table(b, q, area->table) :
              submit_element(b, q, &area->pfns, 1));
}

/*
 * Faults of one element
 */

typedef enum Memory {
    ANONYMOUS, SHARED_RAM, MEMFD, PRIVATE_FILE, READ_ONLY_FILE, HUGE, MEMORIES
} Memory;

static const struct {
    const char *options;
    /* Several ranges are discarded at once, with process_madvise(). */
    bool vectored;
    bool file;
    /* A message that QEMU prints once, whether there are faults or not */
    const char *message;
} memories[MEMORIES] = {
    [ANONYMOUS] = { "", .vectored = true },
    [SHARED_RAM] = { "ram,share=on", .vectored = true },
    [MEMFD] = { "memfd,share=on", .vectored = true },
    [PRIVATE_FILE] = { "file,share=off,mem-path=", .file = true,
                       .message = "Discarding RAM in private file mappings" },
    [READ_ONLY_FILE] = { "file,share=off,readonly=on,rom=off,mem-path=",
                         .file = true },
    [HUGE] = { "memfd,hugetlb=on,hugetlbsize=2M",
               .message = "Balloon used with backing page size > 4kiB" },
};

typedef struct Fault {
    FaultCall call;
    FaultKind kind;
    int error;
    /* The first call that fails; the first process_madvise() is a probe. */
    int first, times;
    int bytes;
} Fault;

typedef struct Case {
    const char *name;
    Memory memory;
    Fault fault[3];
    /* Ranges that keep their contents */
    int kept, n_kept;
    /* How many ranges fail */
    int errors;
    /* The text of the message for them */
    const char *message;
    /* Only for the Rust device, which works in turns */
    bool turns_only;
    /* Have the call fail with other errors, too. */
    bool more_errors;
} Case;

#define PM              FAULT_PROCESS_MADVISE
#define RANGE_FAILED    "Failed to discard range "
#define FALLOCATE       "Failed to fallocate "
#define ALWAYS(call, error) { call, FAULT_ERROR, error, 0, FOREVER }
/* Only process_madvise() fails: everything is discarded in another way. */
#define LATER(name, memory, error, more)                                \
    {                                                                   \
        name, memory, { { PM, FAULT_ERROR, error, 1, FOREVER } },       \
        .more_errors = more,                                            \
    }
#define PROBE(name, error)                                              \
    { "probe-" name, ANONYMOUS, { ALWAYS(PM, error) } }

static const Case cases[] = {
    /* The first use finds that process_madvise() does not work. */
    PROBE("einval", EINVAL),
    PROBE("enosys", ENOSYS),
    PROBE("eperm", EPERM),
    { "probe-lie", ANONYMOUS, { { PM, FAULT_LIE, 0, 0, FOREVER } } },
    { "probe-partial", ANONYMOUS,
      { { PM, FAULT_PARTIAL, 0, 0, FOREVER, 100 } } },

    /* It works at first. */
    LATER("errors", ANONYMOUS, EINVAL, true),
    LATER("memfd-errors", MEMFD, EINVAL, true),
    LATER("shared-ram-einval", SHARED_RAM, EINVAL, false),
    /* in the middle of the element */
    { "second-turn", ANONYMOUS, { { PM, FAULT_ERROR, EINVAL, 2, 1 } },
      .turns_only = true },
    /* some whole ranges, no range, a part of a range */
    { "partial", ANONYMOUS, { { PM, FAULT_PARTIAL, 0, 1, 1, 3 * PAGE } } },
    { "partial-none", ANONYMOUS, { { PM, FAULT_PARTIAL, 0, 1, 1, 0 } } },
    { "partial-odd", ANONYMOUS,
      { { PM, FAULT_PARTIAL, 0, 1, 1, 2 * PAGE + 100 } } },
    { "partial-memfd", MEMFD,
      { { PM, FAULT_PARTIAL, 0, 1, 1, 2 * PAGE + 100 } } },

    /* What is used instead fails as well, always or for some ranges. */
    { "dontneed-einval", ANONYMOUS,
      { ALWAYS(PM, ENOSYS), ALWAYS(FAULT_DONTNEED, EINVAL) },
      0, RANGES, RANGES, RANGE_FAILED },
    { "dontneed-enomem", ANONYMOUS,
      { { PM, FAULT_ERROR, ENOMEM, 1, FOREVER },
        ALWAYS(FAULT_DONTNEED, ENOMEM) },
      0, RANGES, RANGES, RANGE_FAILED },
    { "dontneed-eagain", ANONYMOUS,
      { ALWAYS(PM, ENOSYS), ALWAYS(FAULT_DONTNEED, EAGAIN) },
      0, RANGES, RANGES, RANGE_FAILED },
    { "dontneed-some", ANONYMOUS,
      { ALWAYS(PM, ENOSYS),
        { FAULT_DONTNEED, FAULT_ERROR, ENOMEM, 500, 50 } },
      500, 50, 50, RANGE_FAILED },
    { "partial-dontneed", ANONYMOUS,
      { { PM, FAULT_PARTIAL, 0, 1, 1, 8 * PAGE },
        { FAULT_DONTNEED, FAULT_ERROR, ENOMEM, 2, 3 } },
      10, 3, 3, RANGE_FAILED },

    /* Shared memory */
    { "memfd-fallocate-enospc", MEMFD,
      { ALWAYS(PM, ENOSYS), ALWAYS(FAULT_PUNCH_HOLE, ENOSPC) },
      0, RANGES, RANGES, FALLOCATE },
    { "memfd-fallocate-eopnotsupp", MEMFD,
      { ALWAYS(PM, ENOSYS), ALWAYS(FAULT_PUNCH_HOLE, EOPNOTSUPP) },
      0, RANGES, RANGES, FALLOCATE },
    { "memfd-fallocate-eintr", MEMFD,
      { { PM, FAULT_ERROR, EINTR, 2, FOREVER },
        { FAULT_PUNCH_HOLE, FAULT_ERROR, EINTR, 3, 5 } },
      515, 5, 5, FALLOCATE, .turns_only = true },
    /* The file has holes then, so the contents are gone. */
    { "memfd-dontneed", MEMFD,
      { ALWAYS(PM, ENOSYS),
        { FAULT_DONTNEED, FAULT_ERROR, EINVAL, 1, 4 } },
      0, 0, 4, RANGE_FAILED },
    { "shared-ram-fallocate", SHARED_RAM,
      { ALWAYS(PM, ENOSYS), ALWAYS(FAULT_PUNCH_HOLE, ENOSPC) },
      0, RANGES, RANGES, FALLOCATE },

    /* Files for which process_madvise() is not used */
    { "private-file", PRIVATE_FILE, { } },
    { "private-file-eopnotsupp", PRIVATE_FILE,
      { ALWAYS(FAULT_PUNCH_HOLE, EOPNOTSUPP) },
      0, RANGES, RANGES, FALLOCATE },
    { "private-file-some", PRIVATE_FILE,
      { { FAULT_PUNCH_HOLE, FAULT_ERROR, ENOSPC, 100, 7 } },
      100, 7, 7, FALLOCATE },
    { "read-only-file", READ_ONLY_FILE, { }, 0, RANGES, RANGES,
      "Discarding RAM with readonly files is not supported" },

    /* Huge pages: ranges of 2 MiB */
    { "huge", HUGE, { } },
    { "huge-enospc", HUGE, { ALWAYS(FAULT_PUNCH_HOLE, ENOSPC) }, 0, 3, 3,
      FALLOCATE },
    { "huge-eopnotsupp", HUGE, { ALWAYS(FAULT_PUNCH_HOLE, EOPNOTSUPP) }, 0, 3,
      3, FALLOCATE },
    { "huge-eintr", HUGE,
      { { FAULT_PUNCH_HOLE, FAULT_ERROR, EINTR, 1, 1 } }, 1, 1, 1, FALLOCATE },
};

typedef struct CaseOnQueue {
    const Case *c;
    bool report;
} CaseOnQueue;

static char *backend_options(Memory memory, const char *file)
{
    if (memory == ANONYMOUS) {
        return g_strdup(REPORTING);
    }
    return g_strdup_printf(
        REPORTING " -object memory-backend-%s%s,id=ram0,size=%dM"
        " -machine memory-backend=ram0",
        memories[memory].options, memories[memory].file ? file : "", RAM_MB);
}

static void set_faults(const Case *c)
{
    for (int i = 0; i < ARRAY_SIZE(c->fault) && c->fault[i].times; i++) {
        const Fault *f = &c->fault[i];
        FaultState *state = &faults->state[f->call];

        state->first = f->first;
        state->kind = f->kind;
        state->error = f->error;
        state->bytes = f->bytes;
        state->times = f->times;
    }
}

static void clear_faults(void)
{
    for (int i = 0; i < FAULT_CALLS; i++) {
        faults->state[i].times = 0;
    }
}

/* One message for all ranges */
static void check_log(const Case *c, bool report)
{
    const char *message = memories[c->memory].message;
    int all = count_lines("", ""), expected = 0;

    if (message && !(report && c->memory == HUGE)) {
        g_assert_cmpint(count_lines(message, ""), ==, 1);
        expected++;
    }
    if (c->errors) {
        g_autofree char *number = NULL;

        for (int i = 0; i < ARRAY_SIZE(c->fault); i++) {
            if (c->fault[i].call != PM && c->fault[i].times) {
                number = g_strdup_printf("(-%d)", c->fault[i].error);
            }
        }
        g_assert_cmpint(count_lines(c->message, number ?: ""), ==, 1);
        g_assert_cmpint(count_lines(rust_device ?
                                    "Couldn't discard memory of the balloon: " :
                                    report ?
                                    "virtio-balloon: free page reporting: " :
                                    "virtio-balloon: inflating: ", ""), ==, 1);
        expected++;
    }
    g_assert_cmpint(all, ==, expected);
}

static void check_calls(const Case *c)
{
    const bool vectored = memories[c->memory].vectored &&
                          have_process_madvise();

    for (int i = 0; i < ARRAY_SIZE(c->fault) && c->fault[i].times; i++) {
        const Fault *f = &c->fault[i];

        /* A fault that does not happen would make the test useless. */
        if (f->call != PM || vectored) {
            g_assert_cmpint(faults->state[f->call].failed, >, 0);
        }
    }
}

static void check_more_errors(Balloon *b, int q, const Area *area)
{
    static const int errors[] = { ENOMEM, EPERM, ENOSYS, EINTR, EAGAIN, EBADF };

    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        uint32_t failed = faults->state[PM].failed;

        faults->state[PM].error = errors[i];
        area_fill(b, area);
        area_send(b, q, area);
        area_check(b, area, 0, 0);
        if (have_process_madvise()) {
            g_assert_cmpint(faults->state[PM].failed, >, failed);
        }
    }
}

static void test_case(const void *data)
{
    const CaseOnQueue *on = data;
    const Case *c = on->c;
    const bool huge = c->memory == HUGE;
    const bool probe = c->fault[0].call == PM && !c->fault[0].first &&
                       c->fault[0].times;
    g_autofree char *file = g_build_filename(dir, "ram", NULL);
    g_autofree char *options = backend_options(c->memory, file);
    FaultState *pm = &faults->state[PM];
    uint32_t calls;
    Balloon *b;
    Area area;
    int q;

    if (no_faults) {
        g_test_skip(no_faults);
        return;
    }
    if (huge && !qtest_take_huge_pages(RAM_SIZE)) {
        return;
    }
    if (memories[c->memory].file) {
        int fd = open(file, O_RDWR | O_CREAT, 0600);

        g_assert_cmpint(fd, >=, 0);
        g_assert_cmpint(ftruncate(fd, RAM_SIZE), ==, 0);
        close(fd);
    }

    b = start_with_library(options);
    q = on->report ? b->reporting_vq : IVQ;
    area = huge ? area_new(b, HUGE_PAGE, 3) : area_new(b, PAGE, RANGES);
    set_faults(c);
    area_send(b, q, &area);
    area_check(b, &area, c->kept, c->n_kept);
    if (c->more_errors) {
        check_more_errors(b, q, &area);
    }
    check_log(c, on->report);
    check_calls(c);
    g_assert_false(is_broken_for_qmp(b));
    if (rust_device) {
        g_assert_cmpint(get_counter(b, "discard-errors"), ==, c->errors);
    }

    /* Without the faults, everything works as before. */
    clear_faults();
    if (!on->report) {
        area_send(b, DVQ, &area);
        area_check(b, &area, c->kept, c->n_kept);
    }
    area_fill(b, &area);
    area_check(b, &area, 0, area.n);
    calls = pm->calls;
    area_send(b, q, &area);
    if (c->memory == READ_ONLY_FILE) {
        area_check(b, &area, 0, area.n);
    } else {
        area_check(b, &area, 0, 0);
        check_log(c, on->report);
        if (rust_device) {
            g_assert_cmpint(get_counter(b, "discard-errors"), ==, c->errors);
        }
    }
    if (memories[c->memory].vectored && have_process_madvise()) {
        if (probe) {
            /* It is not tried again. */
            g_assert_cmpint(pm->calls, ==, 1);
        } else {
            g_assert_cmpint(pm->calls, >, calls);
        }
    } else {
        /* In C, it is also used for deflating, whatever the memory is. */
        g_assert_cmpint(pm->calls, ==, rust_device ? 0 : calls);
    }
    balloon_quit(b);
    g_unlink(file);
}

/*
 * Advice that goes with deflating in C: the Rust device does not need it.
 */
static void test_deflate(void)
{
    static const int errors[] = { EINVAL, ENOMEM, EIO, EBADF, EAGAIN };
    Balloon *b;
    Area area;

    if (no_faults) {
        g_test_skip(no_faults);
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        b = start_with_library("");
        area = area_new(b, PAGE, 20);
        area_send(b, IVQ, &area);
        for (int call = 0; call < FAULT_CALLS; call++) {
            faults->state[call].first = 0;
            faults->state[call].error = errors[i];
            faults->state[call].times = FOREVER;
        }
        area_send(b, DVQ, &area);
        area_check(b, &area, 0, 0);
        g_assert_cmpint(faults->state[FAULT_WILLNEED].failed, ==,
                        rust_device ? 0 : area.n);
        g_assert_cmpint(count_lines("", ""), ==, rust_device ? 0 : 1);
        area_fill(b, &area);
        area_check(b, &area, 0, area.n);
        clear_faults();
        area_send(b, IVQ, &area);
        area_check(b, &area, 0, 0);
        balloon_quit(b);
    }
}

/* In C, the advice is given for all pages at once, as far as that works. */
static void test_deflate_partial(void)
{
    FaultState *pm = &faults->state[PM];
    Balloon *b;
    Area area;

    if (no_faults || !have_process_madvise()) {
        g_test_skip(no_faults ?: "the host has no process_madvise()");
        return;
    }
    b = start_with_library("");
    area = area_new(b, PAGE, 20);
    area_send(b, IVQ, &area);
    for (int done = 0; done <= 20; done += 4) {
        memset(&faults->state[FAULT_WILLNEED], 0, sizeof(FaultState));
        pm->first = pm->calls;
        pm->kind = FAULT_PARTIAL;
        pm->bytes = done * PAGE;
        pm->failed = 0;
        pm->times = 1;
        area_send(b, DVQ, &area);
        g_assert_cmpint(pm->failed, ==, 1);
        g_assert_cmpint(faults->state[FAULT_WILLNEED].calls, ==,
                        area.n - done);
        area_check(b, &area, 0, 0);
        assert_no_messages();
    }
    balloon_quit(b);
}

/*
 * Populating huge pages that leave the balloon
 */

#define HUGE_BACKEND \
    " -object memory-backend-memfd,id=ram0,size=128M,hugetlb=on," \
    "hugetlbsize=2M -machine memory-backend=ram0"

static void check_populate(int error, int times)
{
    Balloon *b = start_with_library(",huge-pages=on" HUGE_BACKEND);
    FaultState *state = &faults->state[FAULT_POPULATE];
    Area area = area_new(b, HUGE_PAGE, 3);
    uint32_t head;

    area_send(b, IVQ, &area);
    area_check(b, &area, 0, 0);
    /* The second of the three huge pages */
    state->first = 1;
    state->error = error;
    state->times = times;
    head = submit_element(b, DVQ, &area.pfns, 1);
    if (times == FOREVER) {
        for (int i = 1; i < 4; i++) {
            WAIT_FOR(state->failed >= i);
            assert_not_used(b, DVQ);
            g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 1);
            qtest_clock_step(b->qts, 2 * SECOND);
        }
        /* Meanwhile, the guest can inflate. */
        area_send(b, IVQ, &area);
        clear_faults();
    }
    for (int i = 0; i < 4; i++) {
        qtest_clock_step(b->qts, 2 * SECOND);
    }
    wait_used(b, DVQ, head);
    g_assert_cmpint(get_counter(b, "waiting-for-memory"), ==, 0);
    g_assert_cmpint(get_counter(b, "populate-errors"), ==, state->failed);
    g_assert_cmpint(count_lines("the host has no memory for pages that leave"
                                " the balloon", ""), ==, 1);
    g_assert_cmpint(count_lines("", ""), ==, 1);
    area_fill(b, &area);
    area_check(b, &area, 0, area.n);
    area_send(b, IVQ, &area);
    area_check(b, &area, 0, 0);
    balloon_quit(b);
}

/* Whether populating can be tested; if not, the test is skipped. */
static bool can_populate(void)
{
    if (no_faults) {
        g_test_skip(no_faults);
        return false;
    }
    return qtest_take_huge_pages(RAM_SIZE);
}

static void test_populate(void)
{
    if (!can_populate()) {
        return;
    }
    check_populate(ENOMEM, 2);
    check_populate(ENOMEM, FOREVER);
    check_populate(EFAULT, 2);
    check_populate(EFAULT, FOREVER);
    check_populate(EAGAIN, 2);
}

/*
 * Errors that do not go away, because of which the guest would wait for ever
 */
static void test_populate_permanent(void)
{
    static const int errors[] = { EHWPOISON, EPERM, ENOSYS, EIO };

    if (!can_populate()) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        Balloon *b = start_with_library(",huge-pages=on" HUGE_BACKEND);
        FaultState *state = &faults->state[FAULT_POPULATE];
        Area area = area_new(b, HUGE_PAGE, 3);
        uint32_t head, idx;

        area_send(b, IVQ, &area);
        state->error = errors[i];
        state->times = FOREVER;
        head = submit_element(b, DVQ, &area.pfns, 1);
        for (int j = 0; j < 5; j++) {
            qtest_clock_step(b->qts, 2 * SECOND);
            qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
        }
        g_assert_true(qvirtqueue_get_buf(b->qts, b->vq[DVQ], &idx, NULL));
        g_assert_cmpint(idx, ==, head);
        g_assert_cmpint(count_lines("", ""), ==, 1);
        balloon_quit(b);
    }
}

/*
 * Without the library
 */

/* A file system that has no room left can still have memory back. */
static void test_full_tmpfs(void)
{
    g_autofree char *mnt = g_build_filename(dir, "mnt", NULL);
    g_autofree char *ram = g_build_filename(mnt, "ram", NULL);
    g_autofree char *other = g_build_filename(mnt, "other", NULL);
    g_autofree char *options = NULL;
    const int n = 200;
    struct statfs st;
    off_t size;
    Balloon *b;
    Area area;
    int fd;

    /* In a mount namespace, the file system does not outlive the test. */
    if (unshare(CLONE_NEWNS) ||
        mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        g_test_skip("mounting is not permitted");
        return;
    }
    g_assert_cmpint(g_mkdir(mnt, 0700), ==, 0);
    if (mount("none", mnt, "tmpfs", 0, "size=32M")) {
        g_rmdir(mnt);
        g_test_skip("no tmpfs");
        return;
    }
    fd = open(ram, O_RDWR | O_CREAT, 0600);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, RAM_SIZE), ==, 0);
    close(fd);
    options = g_strdup_printf(
        REPORTING " -object memory-backend-file,id=ram0,size=%dM,share=on,"
        "mem-path=%s -machine memory-backend=ram0", RAM_MB, ram);
    b = start_with_log(options);
    area = area_new(b, PAGE, n);
    /* The memory that the driver needs for an element */
    area_send(b, IVQ, &area);
    area_send(b, b->reporting_vq, &area);
    area_fill(b, &area);

    fd = open(other, O_RDWR | O_CREAT, 0600);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(statfs(mnt, &st), ==, 0);
    size = st.f_bfree * st.f_bsize;
    g_assert_cmpint(fallocate(fd, 0, 0, size), ==, 0);
    for (int i = 0; i < 2; i++) {
        int q = i ? b->reporting_vq : IVQ;

        g_assert_cmpint(statfs(mnt, &st), ==, 0);
        g_assert_cmpint(st.f_bfree, ==, 0);
        area_send(b, q, &area);
        g_assert_cmpint(statfs(mnt, &st), ==, 0);
        g_assert_cmpint(st.f_bfree, ==, n);
        area_send(b, DVQ, &area);
        area_fill(b, &area);
    }
    area_send(b, IVQ, &area);
    area_check(b, &area, 0, 0);
    assert_no_messages();
    balloon_quit(b);
    close(fd);
    umount2(mnt, MNT_DETACH);
    g_rmdir(mnt);
}

/* QEMU's own filter for system calls permits what the balloon needs. */
static void test_sandbox(void)
{
    Balloon *b;
    Area area;

    if (!run_qemu("-sandbox on -version")) {
        g_test_skip("QEMU was built without seccomp");
        return;
    }
    for (Memory memory = ANONYMOUS; memory <= MEMFD; memory++) {
        g_autofree char *backend = backend_options(memory, NULL);
        g_autofree char *options = g_strdup_printf(
            "%s -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,"
            "resourcecontrol=deny", backend);

        b = start_with_log(options);
        area = area_new(b, PAGE, RANGES);
        area_send(b, IVQ, &area);
        area_check(b, &area, 0, 0);
        area_send(b, DVQ, &area);
        area_fill(b, &area);
        area_send(b, b->reporting_vq, &area);
        area_check(b, &area, 0, 0);
        assert_no_messages();
        balloon_quit(b);
    }
}

/*
 * Events while the device works on elements that keep it busy for many turns;
 * the C device handles all elements of a queue in one turn.
 */

/* The queues, by the name in balloon-status */
static const char *const queue_names[] = { "inflate", "deflate", "reports" };

typedef struct Busy {
    Balloon *b;
    int queue, q;
    /* The first and the last page of each element, with pages of the guest */
    Area area;
    uint32_t heads[16];
    int n;
    /* The device was done before the test has done what it is for. */
    bool late;
} Busy;

static int64_t in_flight(Busy *busy)
{
    return get_in_flight(busy->b, queue_names[busy->queue]);
}

/* Linux sends the same ranges again, but not in one element. */
static Buffer put_reports(Balloon *b, const Area *area)
{
    enum { N = 1024, LARGE = 32 * 1024 * 1024 };
    g_autofree struct vring_desc *desc = g_new(struct vring_desc, N);
    uint64_t large = guest_alloc(b->alloc, LARGE);

    for (int i = 0; i < N; i++) {
        bool page = i == 0 || i == N - 1;

        desc[i] = (struct vring_desc) {
            .addr = cpu_to_le64(page ? range_addr(area, i ? 1 : 0) : large),
            .len = cpu_to_le32(page ? PAGE : LARGE),
            .flags = cpu_to_le16(VRING_DESC_F_WRITE |
                                 (i < N - 1 ? VRING_DESC_F_NEXT : 0)),
            .next = cpu_to_le16(i + 1),
        };
    }
    return (Buffer) { put(b, desc, N * sizeof(*desc)), N * sizeof(*desc) };
}

/* PFNs of which the first and the last are of the area; others are 0. */
static Buffer put_pfns(Balloon *b, const Area *area)
{
    uint32_t len = rust_device ? 16 * 1024 * 1024 : 64 * 1024;
    uint64_t addr = guest_alloc(b->alloc, len);
    uint32_t first = cpu_to_le32(pfn(range_addr(area, 0)));
    uint32_t last = cpu_to_le32(pfn(range_addr(area, 1)));

    qtest_memwrite(b->qts, addr, &first, sizeof(first));
    qtest_memwrite(b->qts, addr + len - sizeof(last), &last, sizeof(last));
    return (Buffer) { addr, len };
}

static void busy_start(Busy *busy, const char *options, int queue)
{
    Balloon *b = start_with_log(options);
    Buffer buffer;

    *busy = (Busy) {
        .b = b,
        .queue = queue,
        .q = queue == 2 ? b->reporting_vq : queue,
        .area = area_new(b, PAGE, 2),
        .n = ARRAY_SIZE(busy->heads),
    };
    buffer = queue == 2 ? put_reports(b, &busy->area)
                        : put_pfns(b, &busy->area);
    for (int i = 0; i < busy->n; i++) {
        busy->heads[i] = add_element(b, busy->q, &buffer, 1);
        if (queue == 2) {
            make_indirect(b, busy->q, busy->heads[i]);
        }
    }
    make_available(b, busy->q, busy->heads, busy->n);
}

/* All elements are used, in order; the work on them is done. */
static void busy_finish(Busy *busy)
{
    for (int i = 0; i < busy->n; i++) {
        wait_used(busy->b, busy->q, busy->heads[i]);
    }
    if (rust_device) {
        g_assert_cmpint(in_flight(busy), ==, 0);
    }
    area_check(busy->b, &busy->area, 0, busy->queue == DVQ ? 2 : 0);
}

/* The device works, and the log is empty. */
static void check_works(Balloon *b)
{
    Area area = area_new(b, PAGE, 4);

    area_send(b, IVQ, &area);
    area_check(b, &area, 0, 0);
    area_send(b, DVQ, &area);
    area_fill(b, &area);
    area_send(b, b->reporting_vq, &area);
    area_check(b, &area, 0, 0);
    g_assert_false(is_broken_for_qmp(b));
    assert_no_messages();
}

/* Whatever was discarded, the memory around it was not. */
static void check_guard(Busy *busy)
{
    uint64_t mem = busy->area.mem;

    assert_pages(busy->b, mem, "P");
    assert_pages(busy->b, mem + 2 * PAGE, "P");
    assert_pages(busy->b, mem + 4 * PAGE, "P");
    if (busy->queue == DVQ) {
        assert_pages(busy->b, mem, "PPPPP");
    }
}

static void do_stop(Busy *busy)
{
    Balloon *b = busy->b;
    uint16_t used;

    for (int i = 0; i < 5; i++) {
        stop_vm(b);
        used = qtest_readw(b->qts, b->vq[busy->q]->used + 2);
        if (rust_device) {
            g_assert_cmpint(in_flight(busy), ==, 0);
        }
        g_assert_cmpint(queue_status(b, busy->q, "inuse"), ==, 0);
        for (int j = 0; j < 5; j++) {
            qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
            g_assert_cmpint(qtest_readw(b->qts, b->vq[busy->q]->used + 2), ==,
                            used);
        }
        continue_vm(b);
    }
    busy_finish(busy);
    check_works(b);
}

static void do_driver_reset(Busy *busy)
{
    balloon_restart(busy->b, F_BALLOON);
    if (rust_device) {
        g_assert_cmpint(in_flight(busy), ==, 0);
    }
    check_guard(busy);
    check_works(busy->b);
}

static void do_system_reset(Busy *busy)
{
    Balloon *b = busy->b;

    qtest_qmp_assert_success(b->qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(b->qts, "RESET");
    check_guard(busy);
    if (rust_device) {
        g_assert_cmpint(in_flight(busy), ==, 0);
    }
    /* The bus has forgotten the device. */
    qvirtio_pci_device_enable(b->pci);
    balloon_restart(b, F_BALLOON);
    check_guard(busy);
    check_works(b);
}

static void do_migrate(Busy *busy)
{
    busy->b = balloon_migrate(busy->b, REPORTING);
    busy_finish(busy);
    check_works(busy->b);
}

static void do_snapshot(Busy *busy)
{
    Balloon *b = busy->b;
    QDict *resp = qtest_qmp(b->qts, "{ 'execute': 'migrate-set-capabilities',"
                            " 'arguments': { 'capabilities': [ {"
                            " 'capability': 'background-snapshot',"
                            " 'state': true } ] } }");
    bool supported = qdict_haskey(resp, "return");
    Area area = area_new(b, PAGE, 4);
    uint16_t used;

    qobject_unref(resp);
    if (!supported) {
        g_test_skip("the host does not support background snapshots");
        return;
    }
    start_migration(b);
    qtest_qmp_eventwait(b->qts, "RESUME");
    /* Nothing is discarded, although the guest gets its elements back. */
    area_send(b, busy->queue == 2 ? IVQ : b->reporting_vq, &area);
    area_check(b, &area, 0, area.n);
    /* While discarding is inhibited, reports take no time. */
    used = qtest_readw(b->qts, b->vq[busy->q]->used + 2);
    g_test_message("%d of %d elements were used before the snapshot is"
                   " canceled", used, busy->n);
    cancel_migration(b);
    if (rust_device && busy->queue != 2) {
        busy->late |= used == busy->n;
    }
    for (int i = 0; i < busy->n; i++) {
        wait_used(b, busy->q, busy->heads[i]);
    }
    check_guard(busy);
    area_send(b, IVQ, &area);
    area_check(b, &area, 0, 0);
    check_works(b);
}

static void do_unplug(Busy *busy)
{
    QTestState *qts = busy->b->qts;

    qtest_qmp_device_del_send(qts, "balloon");
    /* The guest ejects the device; see docs/specs/acpi_pci_hotplug.rst. */
    qtest_outl(qts, 0xae08, 1 << 4);
    qtest_qmp_eventwait(qts, "DEVICE_DELETED");
    assert_no_balloon(qts);
    check_guard(busy);
    assert_no_messages();
}

/* QEMU must not crash: the caller checks that. */
static void do_quit(Busy *busy)
{
}

static const struct {
    const char *name;
    void (*fn)(Busy *busy);
} events[] = {
    { "stop", do_stop },
    { "driver-reset", do_driver_reset },
    { "system-reset", do_system_reset },
    { "migrate", do_migrate },
    { "snapshot", do_snapshot },
    { "unplug", do_unplug },
    { "quit", do_quit },
};

typedef struct EventOnQueue {
    int event, queue;
} EventOnQueue;

static void test_event(const void *data)
{
    const EventOnQueue *on = data;
    int attempts = 0;
    Busy busy;

    do {
        begin_attempt(&attempts);
        busy_start(&busy, REPORTING, on->queue);
        busy.late = rust_device && in_flight(&busy) == 0;
        events[on->event].fn(&busy);
        balloon_quit(busy.b);
    } while (busy.late);
}

int main(int argc, char **argv)
{
    static const char *const queues[] = { "inflate", "report" };
    int ret;

    g_test_init(&argc, &argv, NULL);
    /* Faults do not depend on the transport. */
    transport = pci_transport();
    if (!transport) {
        return g_test_run();
    }
    rust_device = is_rust_device();
    create_files();
    no_faults = find_library();
    qtest_add_func("virtio-balloon/faults/library", test_library);

    for (int report = 0; report < 2; report++) {
        for (int i = 0; i < ARRAY_SIZE(cases); i++) {
            g_autofree char *path = g_strdup_printf(
                "virtio-balloon/faults/%s/%s", queues[report], cases[i].name);
            CaseOnQueue *on;

            if (!rust_device && cases[i].turns_only) {
                continue;
            }
            on = g_new(CaseOnQueue, 1);
            *on = (CaseOnQueue) { &cases[i], report };
            qtest_add_data_func_full(path, on, test_case, g_free);
        }
    }
    qtest_add_func("virtio-balloon/faults/deflate", test_deflate);
    if (rust_device) {
        qtest_add_func("virtio-balloon/faults/populate", test_populate);
        qtest_add_func("virtio-balloon/faults/populate-permanent",
                       test_populate_permanent);
    } else {
        qtest_add_func("virtio-balloon/faults/deflate-partial",
                       test_deflate_partial);
    }
    qtest_add_func("virtio-balloon/faults/full-tmpfs", test_full_tmpfs);
    qtest_add_func("virtio-balloon/faults/sandbox", test_sandbox);
    for (int queue = 0; queue < ARRAY_SIZE(queue_names); queue++) {
        for (int i = 0; i < ARRAY_SIZE(events); i++) {
            g_autofree char *path = g_strdup_printf(
                "virtio-balloon/events/%s/%s", queue_names[queue],
                events[i].name);
            EventOnQueue *on = g_new(EventOnQueue, 1);

            *on = (EventOnQueue) { i, queue };
            qtest_add_data_func_full(path, on, test_event, g_free);
        }
    }
    ret = g_test_run();
    qtest_remove_abrt_handler(NULL);
    remove_files(NULL);
    return ret;
}
