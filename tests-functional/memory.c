/*
 * A program that uses memory, for guests with most of their memory in the
 * balloon
 *
 *   memory touch MIB    writes once to each page of MIB MiB, and prints how
 *                       long that took, and how long the slowest write took
 *   memory hold MIB CHURN
 *                       keeps MIB MiB of memory, and allocates and frees CHURN
 *                       MiB twice a second until it is killed
 *
 * Runs in an initramfs, so it is linked statically.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB  (1UL << 20)

static uint64_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

/* Returns how long the slowest write took, in nanoseconds */
static uint64_t touch(volatile char *mem, size_t size)
{
    uint64_t longest = 0;

    for (size_t i = 0; i < size; i += PAGE) {
        uint64_t start = now();

        mem[i] = 1;
        uint64_t took = now() - start;
        if (took > longest) {
            longest = took;
        }
    }
    return longest;
}

static char *map(size_t size)
{
    char *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (mem == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return mem;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "touch")) {
        size_t size = strtoul(argv[2], NULL, 10) * MIB;
        char *mem = map(size);
        uint64_t start = now();
        uint64_t longest = touch(mem, size);

        printf("touched %zu pages in %lu us, longest %lu us\n", size / PAGE,
               (now() - start) / 1000, longest / 1000);
        return 0;
    }
    if (argc == 4 && !strcmp(argv[1], "hold")) {
        size_t size = strtoul(argv[2], NULL, 10) * MIB;
        size_t churn = strtoul(argv[3], NULL, 10) * MIB;

        touch(map(size), size);
        puts("holding");
        fflush(stdout);
        while (1) {
            if (churn) {
                char *mem = map(churn);

                touch(mem, churn);
                munmap(mem, churn);
            }
            usleep(500000);
        }
    }
    fprintf(stderr, "usage: memory touch MIB | memory hold MIB CHURN\n");
    return 2;
}
