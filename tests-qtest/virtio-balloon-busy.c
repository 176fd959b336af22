/*
 * Elements that keep virtio-balloon busy, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-busy.h"
#include "qobject/qlist.h"
#include <sys/ptrace.h>
#include <sys/syscall.h>

#define LARGE_PFNS      (BUSY_MEMORY / PAGE)

const char *const busy_queues[QUEUES] = {
    "inflate", "deflate", "statistics", "hints", "reports"
};

int64_t busy_in_flight(Busy *busy)
{
    return get_in_flight(busy->b, busy_queues[busy->queue]);
}

/* A table of descriptors: one buffer, another one many times, and the last */
static Buffer put_table(Balloon *b, Buffer first, Buffer middle, Buffer last,
                        int n)
{
    g_autofree struct vring_desc *desc = g_new(struct vring_desc, n);

    for (int i = 0; i < n; i++) {
        Buffer buffer = i == 0 ? first : i < n - 1 ? middle : last;

        desc[i] = (struct vring_desc) {
            .addr = cpu_to_le64(buffer.addr),
            .len = cpu_to_le32(buffer.len),
            .flags = cpu_to_le16((buffer.write ? VRING_DESC_F_WRITE : 0) |
                                 (i < n - 1 ? VRING_DESC_F_NEXT : 0)),
            .next = cpu_to_le16(i + 1),
        };
    }
    return (Buffer) { put(b, desc, n * sizeof(*desc)), n * sizeof(*desc) };
}

Buffer put_pfns(Balloon *b, uint64_t mem, int n)
{
    g_autofree uint32_t *le = g_new(uint32_t, n);
    size_t len = n * sizeof(*le);
    uint64_t addr = guest_alloc(b->alloc, len);

    for (int i = 0; i < n; i++) {
        le[i] = cpu_to_le32(pfn(mem) + i);
    }
    qtest_bufwrite(b->qts, addr, le, len);
    return (Buffer) { addr, len };
}

Buffer put_stats(Balloon *b, uint64_t addr)
{
    struct virtio_balloon_stat stat = {
        .tag = cpu_to_le16(VIRTIO_BALLOON_S_MEMFREE),
        .val = cpu_to_le64(0x1234),
    };

    qtest_memwrite(b->qts, addr, &stat, sizeof(stat));
    return (Buffer) { addr, sizeof(stat) };
}

void busy_start(Busy *busy, Balloon *b, int queue, uint64_t large, int n)
{
    Buffer first, middle, last, table;

    *busy = (Busy) {
        .b = b,
        .queue = queue,
        .q = queue == HINT ? b->hint_vq :
             queue == REPORT ? b->reporting_vq : queue,
        .mem = alloc_pages(b, 5),
        .n = queue == STATS ? 1 : n,
    };
    if (queue == STATS) {
        table = put_stats(b, large);
    } else if (queue == HINT || queue == REPORT) {
        first = (Buffer) { busy->mem + PAGE, PAGE, true };
        middle = (Buffer) { large, BUSY_MEMORY, true };
        last = (Buffer) { busy->mem + 3 * PAGE, PAGE, true };
        table = put_table(b, first, middle, last, 1024);
    } else {
        first = put_pfns(b, busy->mem + PAGE, 1);
        middle = put_pfns(b, large, LARGE_PFNS);
        last = put_pfns(b, busy->mem + 3 * PAGE, 1);
        table = put_table(b, first, middle, last, is_rust_device() ? 512 : 3);
    }
    for (int i = 0; i < busy->n; i++) {
        busy->heads[i] = add_element(b, busy->q, &table, 1);
        if (queue != STATS) {
            make_indirect(b, busy->q, busy->heads[i]);
        }
    }
    busy->end = used_idx(busy->b, busy->q) + busy->n;
    make_available(b, busy->q, busy->heads, busy->n);
}

void busy_check_guard(Busy *busy)
{
    assert_pages(busy->b, busy->mem, "P");
    assert_pages(busy->b, busy->mem + 2 * PAGE, "P");
    assert_pages(busy->b, busy->mem + 4 * PAGE, "P");
}

void busy_finish(Busy *busy)
{
    const bool discarded = busy->queue == INFLATE || busy->queue == REPORT;

    if (busy->queue == STATS) {
        poll_stats(busy->b);
    }
    for (int i = 0; i < busy->n; i++) {
        wait_used(busy->b, busy->q, busy->heads[i]);
    }
    assert_not_used(busy->b, busy->q);
    g_assert_cmpint(used_idx(busy->b, busy->q), ==, busy->end);
    g_assert_cmpint(queue_status(busy->b, busy->q, "inuse"), ==, 0);
    busy_check_guard(busy);
    /* Hints are not discarded, but may not have been migrated. */
    if (busy->queue != HINT && !busy->stale) {
        assert_pages(busy->b, busy->mem, discarded ? "P0P0P" : "PPPPP");
    }
}

void check_works(Balloon *b)
{
    uint64_t mem = alloc_pages(b, 5);
    uint32_t head;

    send_pfns(b, IVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    assert_pages(b, mem, "P0PPP");
    send_pfns(b, DVQ, &(uint32_t){ pfn(mem) + 1 }, 1);
    qtest_memset(b->qts, mem + PAGE, PATTERN, PAGE);
    if (b->dev->features & F_REPORTING) {
        wait_used(b, b->reporting_vq, submit(b, b->reporting_vq, mem + 3 * PAGE,
                                             PAGE, true));
        assert_pages(b, mem, "PPP0P");
    }
    if (b->dev->features & F_HINT) {
        hint(b, mem);
    }
    if (b->dev->features & F_STATS) {
        head = submit_element(b, SVQ, (Buffer[]) { put_stats(b, mem) }, 1);
        poll_stats(b);
        wait_used(b, SVQ, head);
    }
    assert_pages(b, mem + PAGE, b->dev->features & F_REPORTING ? "PP0P"
                                                               : "PPPP");
    g_assert_false(is_broken_for_qmp(b));
}

uint64_t busy_alloc(Balloon *b)
{
    return QEMU_ALIGN_UP(guest_alloc(b->alloc, BUSY_MEMORY + PAGE), PAGE);
}

/*
 * An I/O thread that does not run
 */

static pid_t iothread_id(Balloon *b)
{
    QDict *resp = qtest_qmp(b->qts, "{ 'execute': 'query-iothreads' }");
    const QListEntry *entry = qlist_first(qdict_get_qlist(resp, "return"));
    pid_t tid = qdict_get_int(qobject_to(QDict, qlist_entry_obj(entry)),
                              "thread-id");

    qobject_unref(resp);
    return tid;
}

/* Whether a thread waits for something, and not for a lock */
static bool thread_is_idle(Balloon *b, pid_t tid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/task/%d/syscall",
                                            (int)qtest_pid(b->qts), (int)tid);
    g_autofree char *text = NULL;

    return !g_file_get_contents(path, &text, NULL, NULL) ||
           (g_ascii_isdigit(*text) && atoi(text) != SYS_futex);
}

pid_t stop_iothread(Balloon *b)
{
    pid_t tid = iothread_id(b);
    int status;

    WAIT_FOR(thread_is_idle(b, tid));
    if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) ||
        ptrace(PTRACE_INTERRUPT, tid, NULL, NULL)) {
        return 0;
    }
    g_assert_cmpint(waitpid(tid, &status, __WALL), ==, tid);
    g_assert_true(WIFSTOPPED(status));
    return tid;
}

void continue_iothread(pid_t tid)
{
    if (tid) {
        g_assert_cmpint(ptrace(PTRACE_DETACH, tid, NULL, NULL), ==, 0);
    }
}

typedef struct QueueTest {
    bool (*fn)(int queue);
    int queue;
} QueueTest;

static void run_queue_test(const void *data)
{
    const QueueTest *test = data;
    int attempts = 0;

    do {
        begin_attempt(&attempts);
    } while (!test->fn(test->queue));
}

void add_queue_tests(const char *name, bool (*fn)(int queue))
{
    for (int queue = 0; queue < QUEUES; queue++) {
        g_autofree char *path = g_strdup_printf(
            "virtio-balloon/lifecycle/%s/%s", name, busy_queues[queue]);
        QueueTest *test = g_new(QueueTest, 1);

        *test = (QueueTest) { fn, queue };
        qtest_add_data_func_full(path, test, run_queue_test, g_free);
    }
}

