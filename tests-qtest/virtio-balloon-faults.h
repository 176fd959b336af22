/*
 * System calls of QEMU that fail, for tests of virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_VIRTIO_BALLOON_FAULTS_H
#define TESTS_VIRTIO_BALLOON_FAULTS_H

#include <stdint.h>

/* The environment variable with the path of the file that is shared */
#define FAULTS_ENV      "VIRTIO_BALLOON_FAULTS"

/* Kinds of calls, which are counted, and can fail independently */
typedef enum FaultCall {
    FAULT_PROCESS_MADVISE,
    /* madvise() and posix_madvise(), by the advice */
    FAULT_DONTNEED,
    FAULT_REMOVE,
    FAULT_WILLNEED,
    FAULT_POPULATE,
    /* fallocate() that punches a hole */
    FAULT_PUNCH_HOLE,
    FAULT_CALLS,
} FaultCall;

/* What a call does instead */
typedef enum FaultKind {
    /* Return the error, and do nothing */
    FAULT_ERROR,
    /*
     * process_madvise(): process only the first bytes, in whole pages, and
     * return their number
     */
    FAULT_PARTIAL,
    /* Do nothing, and return what the caller wants to see. */
    FAULT_LIE,
} FaultKind;

/*
 * What is known about one kind of calls.  The test writes to it while no call
 * of this kind can happen, except to @times.
 */
typedef struct FaultState {
    /* How many calls there were, and how many of them have failed */
    uint32_t calls, failed;
    /* The first call that fails, counted from 0 */
    uint32_t first;
    /* How many calls fail from then on; 0 to have none fail */
    uint32_t times;
    uint32_t kind;
    int32_t error;
    uint64_t bytes;
} FaultState;

/* The contents of the file */
typedef struct Faults {
    /* The library is loaded into QEMU. */
    uint32_t loaded;
    FaultState state[FAULT_CALLS];
} Faults;

#endif
