/*
 * A driver for virtio-balloon, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-common.h"
#include "hw/pci/pci_regs.h"
#include "qobject/qlist.h"
#include "standard-headers/linux/virtio_mmio.h"
#include "standard-headers/linux/virtio_pci.h"

/* Features that QEMU offers for all virtio devices */
#define F_RING      (BIT64(VIRTIO_RING_F_INDIRECT_DESC) | \
                     BIT64(VIRTIO_RING_F_EVENT_IDX))
/* not offered through the legacy interface, which has only 32 bits */
#define F_MODERN    (BIT64(VIRTIO_F_VERSION_1) | BIT64(VIRTIO_F_RING_RESET))
/* only offered through the legacy interface */
#define F_LEGACY    (BIT64(VIRTIO_F_NOTIFY_ON_EMPTY) | \
                     BIT64(VIRTIO_F_ANY_LAYOUT))

static const Transport pci_modern = {
    .name = "pci-modern",
    .machine = "pc",
    .device = "virtio-balloon-pci-non-transitional,addr=04.0",
    .features = F_RING | F_MODERN,
    .pci = true,
};

static const Transport pci_transitional = {
    .name = "pci-transitional",
    .machine = "pc",
    .device = "virtio-balloon-pci-transitional,addr=04.0",
    /* libqos prefers the modern interface */
    .features = F_RING | F_MODERN,
    .pci = true,
};

static const Transport pci_legacy = {
    .name = "pci-legacy",
    .machine = "pc",
    .device = "virtio-balloon-pci,disable-modern=on,addr=04.0",
    .features = F_RING | F_LEGACY | F_BAD,
    .pci = true,
};

static const Transport mmio_x86 = {
    .name = "mmio",
    .machine = "microvm",
    .device = "virtio-balloon-device",
    .features = F_RING | F_LEGACY,
};

static const Transport mmio_arm = {
    .name = "mmio",
    .machine = "virt",
    .device = "virtio-balloon-device",
    .features = F_RING | F_LEGACY,
};

const Transport *const *transports(void)
{
    static const Transport *const x86[] = {
        &pci_modern, &pci_transitional, &pci_legacy, &mmio_x86, NULL
    };
    static const Transport *const arm[] = { &mmio_arm, NULL };
    /* libqos has no driver for CCW */
    static const Transport *const none[] = { NULL };
    static const Transport *found[ARRAY_SIZE(x86)];
    const char *arch = qtest_get_arch();
    const Transport *const *known =
        !strcmp(arch, "x86_64") || !strcmp(arch, "i386") ? x86 :
        !strcmp(arch, "aarch64") ? arm : none;
    int n = 0;

    for (; *known; known++) {
        if (qtest_has_machine((*known)->machine)) {
            found[n++] = *known;
        }
    }
    found[n] = NULL;
    return found;
}

const Transport *pci_transport(void)
{
    const Transport *first = *transports();

    return first && first->pci ? first : NULL;
}

typedef struct TestData {
    const Transport *t;
    const TransportTest *test;
} TestData;

static void run_transport_test(const void *opaque)
{
    const TestData *data = opaque;

    if (!data->test->huge_vms ||
        qtest_take_huge_pages(data->test->huge_vms * RAM_SIZE)) {
        data->test->fn(data->t);
    }
}

void add_transport_tests(const TransportTest *tests, size_t n)
{
    for (const Transport *const *t = transports(); *t; t++) {
        for (size_t i = 0; i < n; i++) {
            g_autofree char *path = g_strdup_printf("virtio-balloon/%s/%s",
                                                    (*t)->name, tests[i].name);
            TestData *data;

            if ((tests[i].pc_only && !(*t)->pci) ||
                tests[i].features & ~(*t)->features) {
                continue;
            }
            data = g_new(TestData, 1);
            data->t = *t;
            data->test = &tests[i];
            qtest_add_data_func_full(path, data, run_transport_test, g_free);
        }
    }
}

static bool have_counters(void)
{
    QTestState *qts = qtest_init("-machine none");
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'device-list-properties',"
                            " 'arguments': {"
                            " 'typename': 'virtio-balloon-device' } }");
    const QListEntry *entry;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(resp, "return"), entry) {
        QDict *property = qobject_to(QDict, qlist_entry_obj(entry));

        found = found || !strcmp(qdict_get_str(property, "name"),
                                 "balloon-counters");
    }
    qobject_unref(resp);
    qtest_quit(qts);
    return found;
}

bool is_rust_device(void)
{
    /* "c" or "rust": the implementation that is expected, if set */
    const char *expected = getenv("QTEST_BALLOON_DEVICE");

    return expected ? !strcmp(expected, "rust") : have_counters();
}

static void test_device(void)
{
    g_assert_true(have_counters());
}

static void skip_all(void)
{
    g_test_skip("only for the implementation in Rust");
}

int run_rust_tests(int argc, char **argv, const char *name,
                   const TransportTest *tests, size_t n)
{
    g_autofree char *path = g_strdup_printf("virtio-balloon/%s", name);

    g_test_init(&argc, &argv, NULL);
    if (!is_rust_device()) {
        qtest_add_func(path, skip_all);
        return g_test_run();
    }
    qtest_add_func(path, test_device);
    add_transport_tests(tests, n);
    return g_test_run();
}

/*
 * Booting and initialization
 */

static void find_mmio(Balloon *b)
{
    bool arm = !strcmp(b->t->machine, "virt");
    uint64_t base = arm ? 0x0a000000 : 0xfeb00000;
    uint64_t ram = arm ? 0x40000000 : 0;
    int i;

    /* The order in which transports are used depends on the machine */
    for (i = 0; i < 32; i++) {
        uint64_t addr = base + i * 0x200;

        if (qtest_readl(b->qts, addr + QVIRTIO_MMIO_MAGIC_VALUE) ==
            ('v' | 'i' << 8 | 'r' << 16 | (uint32_t)'t' << 24) &&
            qtest_readl(b->qts, addr + QVIRTIO_MMIO_DEVICE_ID) ==
            VIRTIO_ID_BALLOON) {
            qvirtio_mmio_init_device(&b->mmio, b->qts, addr, PAGE);
            break;
        }
    }
    g_assert_cmpint(i, <, 32);

    alloc_init(&b->mmio_alloc, 0, ram + 0x1000000, ram + RAM_SIZE, PAGE);
    b->alloc = &b->mmio_alloc;
    b->dev = &b->mmio.vdev;
}

Balloon *balloon_boot(const Transport *t, const char *options)
{
    Balloon *b = g_new0(Balloon, 1);
    g_autofree char *cmdline =
        g_strdup_printf("-machine %s -m %d -object iothread,id=io0"
                        " -device %s,id=balloon%s", t->machine, RAM_MB,
                        t->device, options);

    b->t = t;
    if (t->pci) {
        QPCIAddress addr = { .devfn = QPCI_DEVFN(4, 0) };

        b->qs = qtest_pc_boot("%s", cmdline);
        b->qts = b->qs->qts;
        b->alloc = &b->qs->alloc;
        b->pci = virtio_pci_new(b->qs->pcibus, &addr);
        g_assert_nonnull(b->pci);
        qvirtio_pci_device_enable(b->pci);
        b->dev = &b->pci->vdev;
    } else {
        b->qts = qtest_initf("-nodefaults %s", cmdline);
        find_mmio(b);
    }

    qvirtio_start_device(b->dev);
    b->offered = qvirtio_get_features(b->dev);
    return b;
}

void balloon_free_queues(Balloon *b)
{
    for (int i = 0; i < b->num_queues; i++) {
        qvirtqueue_cleanup(b->dev->bus, b->vq[i], b->alloc);
    }
    b->num_queues = 0;
}

void balloon_quit(Balloon *b)
{
    balloon_free_queues(b);
    if (b->t->pci) {
        qvirtio_pci_device_disable(b->pci);
        g_free(b->pci->pdev);
        g_free(b->pci);
        qtest_shutdown(b->qs);
    } else {
        alloc_destroy(&b->mmio_alloc);
        qtest_quit(b->qts);
    }
    g_free(b);
}

void balloon_negotiate(Balloon *b, uint64_t wanted)
{
    uint64_t features = b->offered & ~F_BAD & ~BIT64(VIRTIO_RING_F_EVENT_IDX) &
                        ~BIT64(VIRTIO_F_NOTIFY_ON_EMPTY);

    qvirtio_set_features(b->dev, features & (wanted | ~F_BALLOON));
    b->hints_polled = false;
    b->num_queues = 3;
    b->hint_vq = b->offered & F_HINT ? b->num_queues++ : -1;
    b->reporting_vq = b->offered & F_REPORTING ? b->num_queues++ : -1;
    for (int i = 0; i < b->num_queues; i++) {
        b->vq[i] = qvirtqueue_setup(b->dev, b->alloc, i);
    }
    qvirtio_set_driver_ok(b->dev);
}

Balloon *balloon_start(const Transport *t, const char *options)
{
    Balloon *b = balloon_boot(t, options);

    balloon_negotiate(b, F_BALLOON);
    return b;
}

void balloon_restart(Balloon *b, uint64_t wanted)
{
    balloon_free_queues(b);
    qvirtio_start_device(b->dev);
    balloon_negotiate(b, wanted);
}

uint8_t balloon_status(Balloon *b)
{
    return b->dev->bus->get_status(b->dev);
}

bool is_broken(Balloon *b)
{
    return balloon_status(b) & VIRTIO_CONFIG_S_NEEDS_RESET;
}

bool is_broken_for_qmp(Balloon *b)
{
    QDict *status = virtio_status(b);
    bool broken = qdict_get_bool(status, "broken");

    qobject_unref(status);
    return broken;
}

void assert_broken(Balloon *b)
{
    g_assert_true(is_broken_for_qmp(b));
    if (b->offered & BIT64(VIRTIO_F_VERSION_1)) {
        g_assert_true(is_broken(b));
    }
}

/* Offset of the device-specific configuration in the BAR of a PCI device */
static uint64_t pci_config(Balloon *b, uint64_t offset)
{
    return offset + (b->offered & BIT64(VIRTIO_F_VERSION_1) ?
                     b->pci->device_cfg_offset : VIRTIO_PCI_CONFIG_OFF(false));
}

static uint64_t mmio_config(Balloon *b, uint64_t offset)
{
    return b->mmio.addr + QVIRTIO_MMIO_DEVICE_SPECIFIC + offset;
}

void config_writel(Balloon *b, uint64_t offset, uint32_t value)
{
    if (b->t->pci) {
        qpci_io_writel(b->pci->pdev, b->pci->bar, pci_config(b, offset), value);
    } else {
        qtest_writel(b->qts, mmio_config(b, offset), value);
    }
}

void config_writeb(Balloon *b, uint64_t offset, uint8_t value)
{
    if (b->t->pci) {
        qpci_io_writeb(b->pci->pdev, b->pci->bar, pci_config(b, offset), value);
    } else {
        qtest_writeb(b->qts, mmio_config(b, offset), value);
    }
}

uint32_t config_readl(Balloon *b, uint64_t offset)
{
    return qvirtio_config_readl(b->dev, offset);
}

/*
 * Queues
 */

void assert_not_used(Balloon *b, int q)
{
    uint32_t idx;

    qtest_clock_step(b->qts, 1000);
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'query-status' }");
    g_assert_false(qvirtqueue_get_buf(b->qts, b->vq[q], &idx, NULL));
}

static bool hint_queue_is_idle(Balloon *b)
{
    uint16_t flags = qtest_readw(b->qts, b->vq[b->hint_vq]->used);

    return !(flags & VRING_USED_F_NO_NOTIFY);
}

void wait_hint_queue_idle(Balloon *b)
{
    WAIT_FOR(hint_queue_is_idle(b));
}

uint16_t used_idx(Balloon *b, int q)
{
    return qtest_readw(b->qts, b->vq[q]->used +
                       offsetof(struct vring_used, idx));
}

void wait_used(Balloon *b, int q, uint32_t head)
{
    gint64 start = g_get_monotonic_time(), rekick = start + G_USEC_PER_SEC;
    uint32_t len = UINT32_MAX, idx;

    while (!qvirtqueue_get_buf(b->qts, b->vq[q], &idx, &len)) {
        gint64 now = g_get_monotonic_time();

        g_assert_cmpint(now, <, start + TIMEOUT_US);
        /*
         * The I/O thread of the C device does not look at the queue again after
         * it has turned notifications on, and may have missed the element.
         */
        if (q == b->hint_vq && b->hint_not_kicked && now > rekick &&
            hint_queue_is_idle(b)) {
            b->dev->bus->virtqueue_kick(b->dev, b->vq[q]);
            rekick = now + G_USEC_PER_SEC;
        }
        g_usleep(100);
    }
    g_assert_cmpint(idx, ==, head);
    /* The balloon never writes to buffers */
    g_assert_cmpint(len, ==, 0);
}

uint32_t add_element(Balloon *b, int q, const Buffer *buffers, int n)
{
    uint32_t head = UINT32_MAX;

    for (int i = 0; i < n; i++) {
        uint32_t desc = qvirtqueue_add(b->qts, b->vq[q], buffers[i].addr,
                                       buffers[i].len, buffers[i].write,
                                       i < n - 1);

        head = i ? head : desc;
    }
    return head;
}

void make_indirect(Balloon *b, int q, uint32_t head)
{
    qtest_writew(b->qts, b->vq[q]->desc + 16 * head + 12,
                 VRING_DESC_F_INDIRECT);
}

uint32_t submit_element(Balloon *b, int q, const Buffer *buffers, int n)
{
    uint32_t head = add_element(b, q, buffers, n);

    /*
     * If the VM is stopped, the I/O thread may be blocked, but will look at the
     * queue when the VM continues.
     */
    if (q == b->hint_vq && !b->hints_polled && !b->vm_stopped) {
        wait_hint_queue_idle(b);
    }
    if (q == b->hint_vq) {
        /*
         * Like qvirtqueue_kick(), but it has to be known whether the device was
         * notified, and the I/O thread can change the flag at any time.
         */
        QVirtQueue *vq = b->vq[q];
        uint16_t idx = qtest_readw(b->qts, vq->avail + 2);

        qtest_writew(b->qts, vq->avail + 4 + 2 * (idx % vq->size), head);
        qvirtqueue_set_avail_idx(b->qts, b->dev, vq, idx + 1);
        b->hint_not_kicked = !hint_queue_is_idle(b);
        if (!b->hint_not_kicked) {
            b->dev->bus->virtqueue_kick(b->dev, vq);
        }
    } else {
        qvirtqueue_kick(b->qts, b->dev, b->vq[q], head);
    }
    return head;
}

uint32_t submit(Balloon *b, int q, uint64_t addr, uint32_t len, bool write)
{
    return submit_element(b, q, &(Buffer){ addr, len, write }, 1);
}

void make_available(Balloon *b, int q, const uint32_t *heads, int n)
{
    QVirtQueue *vq = b->vq[q];
    uint16_t idx = qtest_readw(b->qts, vq->avail + 2);

    /* qvirtqueue_kick() makes the last element available. */
    for (int i = 0; i < n - 1; i++) {
        qtest_writew(b->qts, vq->avail + 4 + 2 * ((idx + i) % vq->size),
                     heads[i]);
    }
    qvirtqueue_set_avail_idx(b->qts, b->dev, vq, idx + n - 1);
    qvirtqueue_kick(b->qts, b->dev, vq, heads[n - 1]);
}

void send_batch(Balloon *b, int q, const uint32_t *heads, int n)
{
    make_available(b, q, heads, n);
    for (int i = 0; i < n; i++) {
        wait_used(b, q, heads[i]);
    }
}

uint64_t put(Balloon *b, const void *data, size_t len)
{
    uint64_t addr = guest_alloc(b->alloc, MAX(len, 1));

    qtest_memwrite(b->qts, addr, data, len);
    return addr;
}

void send_pfns(Balloon *b, int q, const uint32_t *pfns, int n)
{
    g_autofree uint32_t *le = g_new(uint32_t, n);
    uint64_t addr;

    for (int i = 0; i < n; i++) {
        le[i] = cpu_to_le32(pfns[i]);
    }
    addr = put(b, le, n * sizeof(*le));
    wait_used(b, q, submit(b, q, addr, n * sizeof(*le), false));
    guest_free(b->alloc, addr);
}

uint64_t alloc_pages(Balloon *b, int n)
{
    uint64_t addr = guest_alloc(b->alloc, n * PAGE);

    g_assert_cmphex(addr & (PAGE - 1), ==, 0);
    qtest_memset(b->qts, addr, PATTERN, n * PAGE);
    return addr;
}

uint32_t pfn(uint64_t addr)
{
    return addr >> VIRTIO_BALLOON_PFN_SHIFT;
}

bool is_zero(Balloon *b, uint64_t addr)
{
    uint8_t page[PAGE];
    bool zero;

    qtest_memread(b->qts, addr, page, PAGE);
    zero = !page[0];
    for (int i = 0; i < PAGE; i++) {
        g_assert_cmphex(page[i], ==, zero ? 0 : PATTERN);
    }
    return zero;
}

void assert_pages(Balloon *b, uint64_t addr, const char *expected)
{
    for (int i = 0; expected[i]; i++) {
        if (is_zero(b, addr + i * PAGE) != (expected[i] == '0')) {
            g_test_message("page %d", i);
            g_test_fail();
        }
    }
}

/*
 * QMP
 */

int64_t query_balloon(Balloon *b)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'query-balloon' }");
    int64_t actual = qdict_get_int(ret, "actual");

    qobject_unref(ret);
    return actual;
}

void set_balloon(Balloon *b, uint64_t value)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'balloon', 'arguments': { 'value': %" PRId64
        " } }", (int64_t)value);
}

uint64_t get_counter(Balloon *b, const char *name)
{
    /* This is the path of the proxy, which has an alias of the property */
    QDict *counters = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'balloon-counters' } }", BALLOON_PATH);
    uint64_t value = qdict_get_int(counters, name);

    qobject_unref(counters);
    return value;
}

void set_stats_interval(Balloon *b, int64_t seconds)
{
    qtest_qmp_assert_success(
        b->qts, "{ 'execute': 'qom-set', 'arguments': { 'path': %s,"
        " 'property': 'guest-stats-polling-interval', 'value': %" PRId64
        " } }", BALLOON_PATH, seconds);
}

void poll_stats(Balloon *b)
{
    set_stats_interval(b, 1);
    qtest_clock_step(b->qts, 3 * SECOND);
    set_stats_interval(b, 0);
}

QDict *get_status(Balloon *b)
{
    return qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'qom-get', 'arguments': { 'path': %s,"
        " 'property': 'balloon-status' } }", BALLOON_PATH);
}

int64_t get_in_flight(Balloon *b, const char *queue)
{
    QDict *status = get_status(b);
    int64_t n = qdict_get_int(qdict_get_qdict(status, "in-flight"), queue);

    qobject_unref(status);
    return n;
}

void begin_attempt(int *attempts)
{
    g_assert_cmpint((*attempts)++, <, 100);
}

void assert_summary(Balloon *b, const char *expected)
{
    QDict *status = get_status(b);

    g_assert_cmpstr(qdict_get_str(status, "summary"), ==, expected);
    qobject_unref(status);
}

void eject_balloon_start(Balloon *b)
{
    /* See docs/specs/acpi_pci_hotplug.rst. */
    qtest_outl(b->qts, 0xae08, 1 << 4);
    assert_no_balloon(b->qts);
}

void eject_balloon_wait(Balloon *b)
{
    qtest_qmp_eventwait(b->qts, "DEVICE_DELETED");
}

void eject_balloon(Balloon *b)
{
    eject_balloon_start(b);
    eject_balloon_wait(b);
}

void stop_vm(Balloon *b)
{
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'stop' }");
    b->vm_stopped = true;
}

void continue_vm(Balloon *b)
{
    qtest_qmp_assert_success(b->qts, "{ 'execute': 'cont' }");
    b->vm_stopped = false;
}

const char *backend_path(const Transport *t)
{
    return t->pci ? BALLOON_PATH "/virtio-backend" : BALLOON_PATH;
}

QDict *virtio_status(Balloon *b)
{
    return qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'x-query-virtio-status',"
        " 'arguments': { 'path': %s } }", backend_path(b->t));
}

int64_t queue_status(Balloon *b, int q, const char *name)
{
    QDict *ret = qtest_qmp_assert_success_ref(
        b->qts, "{ 'execute': 'x-query-virtio-queue-status',"
        " 'arguments': { 'path': %s, 'queue': %d } }", backend_path(b->t), q);
    int64_t value = qdict_get_int(ret, name);

    qobject_unref(ret);
    return value;
}

void assert_error(QDict *resp, const char *expected)
{
    g_assert_true(qdict_haskey(resp, "error"));
    g_assert_cmpstr(qdict_get_str(qdict_get_qdict(resp, "error"), "desc"), ==,
                    expected);
    qobject_unref(resp);
}

void assert_no_balloon(QTestState *qts)
{
    assert_error(qtest_qmp(qts, "{ 'execute': 'query-balloon' }"),
                 "No balloon device has been activated");
}
