/*
 * The system calls that discard memory, without a device around them
 *
 * Reads runs of pages ("offset count", in pages, one per line) from standard
 * input.  An empty line ends a group of runs that the device gets at once.
 * Prints how long it takes to discard all groups, in nanoseconds, with
 *
 * - one call for each run; fallocate() and madvise() if the memory is shared
 * - process_madvise() for many runs: MADV_REMOVE if the memory is shared,
 *   MADV_DONTNEED otherwise
 *
 * The second value is 0 if Linux refuses process_madvise(): before 6.13 it does
 * not allow this advice.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE        4096ULL
#define HUGE_PAGE   (2ULL << 20)

/*
 * What the device discards in a turn, and thus with one call (Budget::TURN and
 * charge_range() in hw-virtio-balloon/core/src/budget.rs)
 */
#define MAX_RUNS            512
#define MAX_BYTES           (128ULL << 20)
#define MAX_BYTES_SHARED    (16ULL << 20)

static char *mem;
static size_t size;
static int fd = -1;

static struct iovec *runs;
static size_t *groups;
static size_t num_runs, num_groups;

static void check(int failed, const char *what)
{
    if (failed) {
        perror(what);
        exit(1);
    }
}

static uint64_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

static void read_runs(void)
{
    size_t room = 1 << 17;
    char line[64];

    runs = calloc(room, sizeof(*runs));
    groups = calloc(room, sizeof(*groups));
    check(!runs || !groups, "calloc");
    while (fgets(line, sizeof(line), stdin)) {
        unsigned long offset, count;

        if (line[0] == '\n') {
            groups[num_groups++] = num_runs;
            continue;
        }
        if (sscanf(line, "%lu %lu", &offset, &count) != 2 ||
            num_runs == room || num_groups == room ||
            (offset + count) * PAGE > size) {
            fprintf(stderr, "bad run: %s", line);
            exit(1);
        }
        runs[num_runs].iov_base = mem + offset * PAGE;
        runs[num_runs++].iov_len = count * PAGE;
    }
    groups[num_groups++] = num_runs;
}

/*
 * Write to all huge pages in which there are runs.  Other memory is not used,
 * because a large guest may have more of it than the host.
 */
static void use_runs(void)
{
    bool *used = calloc(size / HUGE_PAGE, sizeof(*used));
    size_t i, page;

    check(!used, "calloc");
    for (i = 0; i < num_runs; i++) {
        size_t start = (char *)runs[i].iov_base - mem;
        size_t end = start + runs[i].iov_len;

        for (page = start / HUGE_PAGE; page * HUGE_PAGE < end; page++) {
            if (!used[page]) {
                memset(mem + page * HUGE_PAGE, 1, HUGE_PAGE);
                used[page] = true;
            }
        }
    }
    free(used);
}

static uint64_t one_by_one(void)
{
    uint64_t start = now();
    size_t i;

    for (i = 0; i < num_runs; i++) {
        if (fd >= 0) {
            check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                            (char *)runs[i].iov_base - mem, runs[i].iov_len),
                  "fallocate");
        }
        check(madvise(runs[i].iov_base, runs[i].iov_len, MADV_DONTNEED),
              "madvise");
    }
    return now() - start;
}

/*
 * Take runs until there are as many as the device discards with one call.  A
 * run that is too large is divided, at the end of a huge page if possible.
 *
 * @next: the first run that is left
 * @done: how much of it was taken before, in bytes
 */
static size_t take_runs(size_t *next, size_t *done, size_t end,
                        struct iovec *call)
{
    size_t left = fd < 0 ? MAX_BYTES : MAX_BYTES_SHARED;
    size_t n = 0;

    while (*next < end && n < MAX_RUNS && left) {
        char *start = (char *)runs[*next].iov_base + *done;
        size_t len = runs[*next].iov_len - *done;

        if (len > left) {
            size_t rest = (start - mem + left) & (HUGE_PAGE - 1);

            len = rest < left ? left - rest : left;
            left = 0;
            *done += len;
        } else {
            left -= len;
            *done = 0;
            ++*next;
        }
        call[n].iov_base = start;
        call[n++].iov_len = len;
    }
    return n;
}

static uint64_t vectored(int pidfd)
{
    const int advice = fd < 0 ? MADV_DONTNEED : MADV_REMOVE;
    static struct iovec call[MAX_RUNS];
    uint64_t start = now();
    size_t next = 0, done = 0, g, i;

    for (g = 0; g < num_groups; g++) {
        while (next < groups[g]) {
            size_t n = take_runs(&next, &done, groups[g], call);
            size_t bytes = 0;

            for (i = 0; i < n; i++) {
                bytes += call[i].iov_len;
            }
            if (syscall(SYS_process_madvise, pidfd, call, n, advice, 0) !=
                bytes) {
                return 0;
            }
        }
    }
    return now() - start;
}

/* Measure how long it takes to use all memory again, with and without a hint */
static uint64_t use_again(int hint)
{
    uint64_t start;
    size_t i;

    memset(mem, 1, size);
    if (fd >= 0) {
        check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                        size), "fallocate");
    }
    check(madvise(mem, size, MADV_DONTNEED), "madvise");
    if (hint) {
        check(madvise(mem, size, MADV_WILLNEED), "madvise");
    }
    start = now();
    for (i = 0; i < size; i += PAGE) {
        mem[i] = 1;
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    const char *backing;
    uint64_t single;
    int pidfd;

    if (argc != 3 && (argc != 4 || strcmp(argv[3], "willneed"))) {
        fprintf(stderr, "usage: %s thp|nothp|memfd MIB [willneed] < RUNS\n",
                argv[0]);
        return 1;
    }
    backing = argv[1];
    size = strtoul(argv[2], NULL, 0) << 20;
    size = (size + HUGE_PAGE - 1) & -HUGE_PAGE;

    if (!strcmp(backing, "memfd")) {
        fd = memfd_create("limit", 0);
        check(fd < 0 || ftruncate(fd, size), "memfd_create");
        mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        check(mem == MAP_FAILED, "mmap");
    } else {
        mem = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        check(mem == MAP_FAILED, "mmap");
        mem += -(uintptr_t)mem & (HUGE_PAGE - 1);
        madvise(mem, size, strcmp(backing, "thp") ? MADV_NOHUGEPAGE :
                                                    MADV_HUGEPAGE);
    }
    if (argc == 4) {
        printf("%lu %lu\n", (unsigned long)use_again(0),
               (unsigned long)use_again(1));
        return 0;
    }
    read_runs();

    use_runs();
    single = one_by_one();
    pidfd = syscall(SYS_pidfd_open, getpid(), 0);
    use_runs();
    printf("%lu %lu\n", (unsigned long)single, (unsigned long)vectored(pidfd));
    return 0;
}
