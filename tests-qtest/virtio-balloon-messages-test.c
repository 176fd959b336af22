/*
 * QTest test cases for virtio-balloon: the text of all messages that the Rust
 * implementation prints, or returns as errors of commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-migration.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE     23
#endif

#define MEMFD_OPTIONS \
    " -object memory-backend-memfd,id=ram0,size=128M%s" \
    " -machine memory-backend=ram0"

static const Transport *transport;

/*
 * Errors that commands return
 */

static void test_errors(void)
{
    static const struct {
        const char *name;
        const char *value;
        const char *error;
    } cases[] = {
        { "oom-hold-time", "86401",
          "'oom-hold-time' must not be more than 86400 seconds" },
        { "oom-hold-time", "4294967296",
          "Parameter 'oom-hold-time' expects uint32_t" },
        { "huge-pages", "'2M'",
          "Invalid parameter type for 'huge-pages', expected: boolean" },
        { "free-page-hint", "true",
          "'free-page-hint' requires 'iothread' to be set" },
        { "guest-stats-polling-interval", "-1",
          "timer value must be greater than zero" },
        { "guest-stats-polling-interval", "4294967296",
          "timer value is too big" },
    };
    QTestState *qts = qtest_initf("-machine %s", transport->machine);

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *command =
            g_strdup_printf("{ 'execute': 'device_add', 'arguments': {"
                            " 'driver': 'virtio-balloon-pci', '%s': %s } }",
                            cases[i].name, cases[i].value);

        qtest_qmp_send_raw(qts, "%s", command);
        assert_error(qtest_qmp_receive(qts), cases[i].error);
        assert_no_balloon(qts);
    }
    qtest_qmp_device_add(qts, "virtio-balloon-pci", "balloon", "{}");
    assert_error(qtest_qmp(qts, "{ 'execute': 'device_add', 'arguments': {"
                           " 'driver': 'virtio-balloon-pci' } }"),
                 "Only one balloon device is supported");
    qtest_quit(qts);
}

/*
 * Messages on stderr.  Each message is caused in a process of its own, so that
 * the output can be compared.
 */

/* From now on, madvise() fails for @advice, also in QEMU. */
static void fail_madvise(int advice, int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_process_madvise
        /* without process_madvise(), QEMU uses madvise() */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_madvise, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
#endif
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                 offsetof(struct seccomp_data, args[2])
                 + (HOST_BIG_ENDIAN ? sizeof(uint32_t) : 0)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, advice, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { ARRAY_SIZE(code), code };

    g_assert_cmpint(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), ==, 0);
    g_assert_cmpint(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), ==,
                    0);
}

/* Inflate and deflate twice: each message is printed once. */
static void inflate_and_deflate(const char *options, int n)
{
    Balloon *b = balloon_start(transport, options);
    uint64_t mem = QEMU_ALIGN_UP(alloc_pages(b, n + HUGE_PAGE / PAGE),
                                 HUGE_PAGE);
    g_autofree uint32_t *pfns = g_new(uint32_t, n);

    for (int i = 0; i < n; i++) {
        pfns[i] = pfn(mem) + i;
    }
    for (int i = 0; i < 2; i++) {
        send_pfns(b, IVQ, pfns, n);
        send_pfns(b, DVQ, pfns, n);
    }
    balloon_quit(b);
}

static void cause_discard(void)
{
    fail_madvise(MADV_DONTNEED, EINVAL);
    inflate_and_deflate("", 1);
}

static void cause_populate(void)
{
    g_autofree char *options =
        g_strdup_printf(",huge-pages=on" MEMFD_OPTIONS,
                        ",hugetlb=on,hugetlbsize=2M");

    fail_madvise(MADV_POPULATE_WRITE, EINVAL);
    inflate_and_deflate(options, HUGE_PAGE / PAGE);
}

static void cause_page_size(void)
{
    g_autofree char *options = g_strdup_printf(MEMFD_OPTIONS,
                                               ",hugetlb=on,hugetlbsize=2M");

    inflate_and_deflate(options, 1);
}

static void cause_bad_command(void)
{
    Balloon *b = balloon_start(transport, HINT_OPTIONS);

    submit(b, b->hint_vq, put(b, "abc", 3), 3, false);
    WAIT_FOR(is_broken_for_qmp(b));
    balloon_quit(b);
}

static void cause_bad_pfn(void)
{
    Balloon *b = balloon_start(transport, " -d guest_errors");

    /* the log has the message each time */
    for (int i = 0; i < 2; i++) {
        send_pfns(b, IVQ, &(uint32_t){ 0xfffff000 }, 1);
    }
    balloon_quit(b);
}

typedef struct Message {
    const char *name;
    void (*cause)(void);
    /*
     * The expected output; unless it comes from the log, it follows the name of
     * the program
     */
    const char *text;
    bool log;
    bool huge_pages;
} Message;

static const Message messages[] = {
    { "discard", cause_discard,
      "warning: Couldn't discard memory of the balloon: Failed to discard range"
      " pc.ram:200000 +1000 (-22)\n" },
    { "populate", cause_populate,
      "warning: virtio-balloon: cannot allocate huge pages before the guest"
      " uses them, which needs Linux 5.14\n", .huge_pages = true },
    { "page-size", cause_page_size,
      "warning: Balloon used with backing page size > 4kiB, this may not be"
      " reliable\n", .huge_pages = true },
    { "bad-command", cause_bad_command, "received an incorrect cmd id\n" },
    { "bad-pfn", cause_bad_pfn,
      "virtio-balloon: no RAM at 0xfffff000000 to 0xfffff000fff\n"
      "virtio-balloon: no RAM at 0xfffff000000 to 0xfffff000fff\n",
      .log = true },
};

static void test_message(const void *data)
{
    const Message *message = data;
    g_autofree char *path =
        g_strdup_printf("/%s/virtio-balloon/messages/cause/subprocess/%s",
                        qtest_get_arch(), message->name);
    g_autofree char *name = g_path_get_basename(getenv("QTEST_QEMU_BINARY"));
    g_autofree char *expected = g_strdup_printf("%s%s%s",
                                                message->log ? "" : name,
                                                message->log ? "" : ": ",
                                                message->text);

    if (message->huge_pages && !qtest_take_huge_pages(RAM_SIZE)) {
        return;
    }
    g_test_trap_subprocess(path, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr(expected);
}

static void cause(const void *data)
{
    const Message *message = data;

    message->cause();
}

int main(int argc, char **argv)
{
    const Transport *const *all;

    g_test_init(&argc, &argv, NULL);
    all = transports();
    /* libqos can only find the device by itself on PCI. */
    if (!is_rust_device() || !*all || !(*all)->pci) {
        return g_test_run();
    }
    transport = *all;
    qtest_add_func("virtio-balloon/messages/errors", test_errors);
    for (int i = 0; i < ARRAY_SIZE(messages); i++) {
        g_autofree char *path =
            g_strdup_printf("virtio-balloon/messages/%s", messages[i].name);
        g_autofree char *sub =
            g_strdup_printf("virtio-balloon/messages/cause/subprocess/%s",
                            messages[i].name);

        qtest_add_data_func(path, &messages[i], test_message);
        qtest_add_data_func(sub, &messages[i], cause);
    }
    return g_test_run();
}
