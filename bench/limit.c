/*
 * The system calls that discard memory, without a device around them
 *
 * Reads runs of pages ("offset count", in pages, one per line) from standard
 * input.  An empty line ends a group of runs that is discarded with one call.
 * Prints how long it takes to discard all groups, in nanoseconds: with one call
 * for each run, and with process_madvise() (0 if that is not possible).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
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
#define MAX_RUNS    1024
/* the budget of a turn for shared memory in small pages */
#define MAX_BYTES   (16ULL << 20)

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

static uint64_t vectored(int pidfd)
{
    uint64_t start = now();
    size_t i = 0, g;

    for (g = 0; g < num_groups; g++) {
        while (i < groups[g]) {
            size_t n = 0;
            uint64_t bytes = 0;

            while (i + n < groups[g] && n < MAX_RUNS && bytes < MAX_BYTES) {
                bytes += runs[i + n++].iov_len;
            }
            if (syscall(SYS_process_madvise, pidfd, runs + i, n,
                        MADV_DONTNEED, 0) != bytes) {
                return 0;
            }
            i += n;
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
    uint64_t single, vector = 0;
    const char *backing;

    if (argc != 3 && (argc != 4 || strcmp(argv[3], "willneed"))) {
        fprintf(stderr, "usage: %s thp|nothp|memfd MIB [willneed] < RUNS\n",
                argv[0]);
        return 1;
    }
    backing = argv[1];
    size = strtoul(argv[2], NULL, 0) << 20;

    if (!strcmp(backing, "memfd")) {
        fd = memfd_create("limit", 0);
        check(fd < 0 || ftruncate(fd, size), "memfd_create");
        mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        check(mem == MAP_FAILED, "mmap");
    } else {
        mem = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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

    memset(mem, 1, size);
    single = one_by_one();
    if (fd < 0) {
        int pidfd = syscall(SYS_pidfd_open, getpid(), 0);

        memset(mem, 1, size);
        vector = vectored(pidfd);
    }
    printf("%lu %lu\n", (unsigned long)single, (unsigned long)vector);
    return 0;
}
