/*
 * A library that is preloaded into QEMU, and has system calls fail
 *
 * Unlike with a seccomp filter, faults can begin and end while QEMU runs, and a
 * call can have a partial result.  virtio-balloon-faults.h describes the file
 * through which a test controls the library.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

/*
 * This is not linked with QEMU or glib, so it does not use qemu/osdep.h.  With
 * _FILE_OFFSET_BITS, fallocate() would be another name for fallocate64().
 */
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "virtio-balloon-faults.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE     23
#endif

#define EXPORT __attribute__((visibility("default")))

/* NULL in all processes but QEMU itself */
static Faults *faults;

static __attribute__((constructor)) void load(void)
{
    const char *path = getenv(FAULTS_ENV);
    void *map;
    FILE *file;

    /*
     * libqtest starts QEMU by way of a shell, which has to pass the environment
     * on.  Processes that QEMU starts do not need it.
     */
    if (!path ||
        strncmp(program_invocation_short_name, "qemu-system", 11) != 0) {
        return;
    }
    unsetenv("LD_PRELOAD");
    file = fopen(path, "r+");
    if (!file) {
        return;
    }
    map = mmap(NULL, sizeof(Faults), PROT_READ | PROT_WRITE, MAP_SHARED,
               fileno(file), 0);
    fclose(file);
    if (map != MAP_FAILED) {
        faults = map;
        __atomic_store_n(&faults->loaded, 1, __ATOMIC_SEQ_CST);
    }
}

/* The next function of that name, which is the one of the C library */
static void *next(void **cache, const char *name)
{
    void *fn = __atomic_load_n(cache, __ATOMIC_RELAXED);

    if (!fn) {
        fn = dlsym(RTLD_NEXT, name);
        if (!fn) {
            abort();
        }
        __atomic_store_n(cache, fn, __ATOMIC_RELAXED);
    }
    return fn;
}

/* Count a call.  Returns what it has to do instead if it has to fail. */
static FaultState *enter(FaultCall call)
{
    FaultState *state;
    uint32_t number, times;

    if (!faults || call == FAULT_CALLS) {
        return NULL;
    }
    state = &faults->state[call];
    number = __atomic_fetch_add(&state->calls, 1, __ATOMIC_SEQ_CST);
    times = __atomic_load_n(&state->times, __ATOMIC_SEQ_CST);
    if (number < state->first || number - state->first >= times) {
        return NULL;
    }
    __atomic_fetch_add(&state->failed, 1, __ATOMIC_SEQ_CST);
    return state;
}

static FaultCall call_of_advice(int advice)
{
    switch (advice) {
    case MADV_DONTNEED:
        return FAULT_DONTNEED;
    case MADV_REMOVE:
        return FAULT_REMOVE;
    case MADV_WILLNEED:
        return FAULT_WILLNEED;
    case MADV_POPULATE_WRITE:
        return FAULT_POPULATE;
    default:
        return FAULT_CALLS;
    }
}

EXPORT int madvise(void *addr, size_t len, int advice)
{
    static void *cache;
    int (*real)(void *, size_t, int) = next(&cache, "madvise");
    FaultState *fault = enter(call_of_advice(advice));

    if (!fault) {
        return real(addr, len, advice);
    }
    errno = fault->error;
    return fault->kind == FAULT_LIE ? 0 : -1;
}

EXPORT int posix_madvise(void *addr, size_t len, int advice)
{
    static void *cache;
    int (*real)(void *, size_t, int) = next(&cache, "posix_madvise");
    FaultState *fault = enter(call_of_advice(advice));

    if (!fault) {
        return real(addr, len, advice);
    }
    return fault->kind == FAULT_LIE ? 0 : fault->error;
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t len)
{
    static void *cache;
    int (*real)(int, int, off_t, off_t) = next(&cache, "fallocate");
    FaultState *fault = enter(mode & FALLOC_FL_PUNCH_HOLE ? FAULT_PUNCH_HOLE
                                                          : FAULT_CALLS);

    if (!fault) {
        return real(fd, mode, offset, len);
    }
    errno = fault->error;
    return fault->kind == FAULT_LIE ? 0 : -1;
}

#ifdef __GLIBC__
/* QEMU only supports hosts on which both are the same. */
EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t len)
{
    return fallocate(fd, mode, offset, len);
}
#endif

#ifdef SYS_process_madvise
/*
 * The first @bytes of a vector, in whole pages, without changing the vector of
 * the caller: the kernel would process all of a page.
 */
static size_t cut(const struct iovec *iov, size_t count, uint64_t bytes,
                  struct iovec *result)
{
    const size_t page = sysconf(_SC_PAGESIZE);
    size_t i;

    for (i = 0; i < count && bytes >= page; i++) {
        result[i] = iov[i];
        if (result[i].iov_len > bytes) {
            result[i].iov_len = bytes / page * page;
        }
        bytes -= result[i].iov_len;
    }
    return i;
}

static uint64_t total(const struct iovec *iov, size_t count)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < count; i++) {
        bytes += iov[i].iov_len;
    }
    return bytes;
}
#endif

EXPORT long syscall(long number, ...)
{
    static void *cache;
    long (*real)(long, ...) = next(&cache, "syscall");
    long a[6];
    va_list ap;

    /* Whatever the call does not have, the kernel does not look at. */
    va_start(ap, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(ap, long);
    }
    va_end(ap);

#ifdef SYS_process_madvise
    if (number == SYS_process_madvise) {
        FaultState *fault = enter(FAULT_PROCESS_MADVISE);
        const struct iovec *iov = (const struct iovec *)a[1];
        struct iovec part[1024];

        if (fault && fault->kind == FAULT_ERROR) {
            errno = fault->error;
            return -1;
        } else if (fault && fault->kind == FAULT_LIE) {
            return total(iov, a[2]);
        } else if (fault) {
            size_t n = cut(iov, a[2], fault->bytes, part);

            if (n && real(number, a[0], part, n, a[3], a[4]) < 0) {
                return -1;
            }
            return fault->bytes;
        }
    }
#endif
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
