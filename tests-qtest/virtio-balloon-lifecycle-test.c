/*
 * QTest test cases for virtio-balloon: memory, the driver or QEMU itself goes
 * away while elements are in flight
 *
 * The driver always gets its elements back, once, unless it has reset the
 * device.  Memory that is not in the balloon is never changed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "virtio-balloon-busy.h"
#include "standard-headers/linux/virtio_mem.h"
#include "standard-headers/linux/virtio_pci.h"
#include <glib/gstdio.h>

#define OPTIONS         BUSY_OPTIONS
#define VM_SIZE         BUSY_VM_SIZE

static const Transport *transport;
static bool rust_device;

/*
 * Before there are hints, begin a round of hinting, and stop the I/O thread,
 * which would be done too soon.  The thread of the C device polls, and may have
 * taken a lock.
 */
static pid_t begin_round(Balloon *b, int queue)
{
    if (queue == HINT) {
        hint_until(b, HINT_START);
    }
    return queue == HINT && rust_device ? stop_iothread(b) : 0;
}

/* The I/O thread goes on, and then the round ends. */
static void end_round(Busy *busy, pid_t tid)
{
    if (busy->queue == HINT) {
        if (tid) {
            g_assert_cmpint(busy_in_flight(busy), >, 0);
            continue_iothread(tid);
        }
        cancel_hinting(busy->b);
    }
}

/*
 * Whether the Rust device was done too early.  With hints, the I/O thread is
 * stopped, if that is permitted.
 */
static bool is_late(Busy *busy)
{
    return rust_device && busy->queue != HINT && busy_in_flight(busy) == 0;
}

/*
 * Memory hotplug
 */

/* The address of a DIMM in a PC with little RAM, and its size */
#define DIMM_ADDR       (4ULL * GiB)
#define DIMM_SIZE       (2ULL * BUSY_MEMORY)

static void plug_dimm(Balloon *b)
{
    qtest_qmp_device_add(b->qts, "pc-dimm", "dimm0", "{ 'memdev': 'mem0',"
                         " 'addr': %" PRIu64 " }", (uint64_t)DIMM_ADDR);
}

static void eject_dimm(Balloon *b)
{
    /* See docs/specs/acpi_mem_hotplug.rst. */
    qtest_outl(b->qts, 0xa00, 0);
    qtest_outb(b->qts, 0xa14, 1 << 3);
    qtest_qmp_eventwait(b->qts, "DEVICE_DELETED");
}

/* What the user and the driver see of the size of the balloon */
static void check_size(Balloon *b, uint64_t size)
{
    g_assert_cmpint(query_balloon(b), ==, size - 50 * PAGE);
    set_balloon(b, size - 60 * PAGE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 60);
    set_balloon(b, VM_SIZE + DIMM_SIZE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 0);
}

static bool test_dimm(int queue)
{
    const uint64_t guard = DIMM_ADDR + DIMM_SIZE - 2 * PAGE;
    Balloon *b;
    bool late;
    Busy busy;
    pid_t tid;

    if (queue == HINT && !rust_device) {
        g_test_skip("the C device may pop elements when their memory is gone");
        return true;
    }
    b = balloon_start(transport, OPTIONS " -m slots=1,maxmem=2G"
                      " -object memory-backend-ram,id=mem0,size=32M,share=on");
    config_writel(b, CFG(actual), 50);
    check_size(b, VM_SIZE);
    plug_dimm(b);
    check_size(b, VM_SIZE + DIMM_SIZE);
    qtest_memset(b->qts, guard, PATTERN, 2 * PAGE);
    /* Some of it is in the balloon. */
    send_pfns(b, IVQ, &(uint32_t){ pfn(guard) }, 1);
    assert_pages(b, guard, "0P");

    /* The user cannot ask for it during migration. */
    qtest_qmp_device_del_send(b->qts, "dimm0");
    tid = begin_round(b, queue);
    /*
     * Elements that consist of the memory itself cannot be popped when it is
     * gone, so there is only one.
     */
    busy_start(&busy, b, queue, DIMM_ADDR, queue <= DEFLATE ? 16 : 1);
    eject_dimm(b);
    end_round(&busy, tid);
    busy_check_guard(&busy);
    check_size(b, VM_SIZE);
    late = queue <= DEFLATE && is_late(&busy);
    if (rust_device && queue <= DEFLATE && !late) {
        /* The memory comes back while there are elements that name it. */
        plug_dimm(b);
        busy_finish(&busy);
        g_assert_cmpint(get_counter(b, "bad-pfns"), >, 0);
    } else {
        busy_finish(&busy);
        check_works(b);
        plug_dimm(b);
    }
    check_size(b, VM_SIZE + DIMM_SIZE);
    assert_pages(b, guard, "0P");
    send_pfns(b, DVQ, &(uint32_t){ pfn(guard) }, 1);
    qtest_memset(b->qts, guard, PATTERN, PAGE);
    send_pfns(b, IVQ, &(uint32_t){ pfn(guard) + 1 }, 1);
    assert_pages(b, guard, "P0");
    check_works(b);
    balloon_quit(b);
    return !late;
}

/*
 * virtio-mem: blocks come and go, and their memory stays mapped.
 */

#define VMEM_OPTIONS \
    " -m slots=1,maxmem=2G -object memory-backend-ram,id=mem0,size=64M" \
    " -device virtio-mem-pci,id=vmem0,memdev=mem0,addr=05.0,block-size=2M," \
    "requested-size=64M"
#define VMEM_BLOCK      (2 * MiB)
#define VMEM_BLOCKS     32
/* Those that elements name */
#define VMEM_BUSY       (BUSY_MEMORY / VMEM_BLOCK)

typedef struct VirtioMem {
    Balloon *b;
    QVirtioPCIDevice *pci;
    QVirtQueue *vq;
    uint64_t addr;
} VirtioMem;

static void vmem_init(VirtioMem *m, Balloon *b)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(5, 0) };

    m->b = b;
    m->pci = virtio_pci_new(b->qs->pcibus, &addr);
    g_assert_nonnull(m->pci);
    qvirtio_pci_device_enable(m->pci);
    qvirtio_start_device(&m->pci->vdev);
    qvirtio_set_features(&m->pci->vdev,
                         qvirtio_get_features(&m->pci->vdev) &
                         ~BIT64(VIRTIO_RING_F_EVENT_IDX));
    m->vq = qvirtqueue_setup(&m->pci->vdev, b->alloc, 0);
    qvirtio_set_driver_ok(&m->pci->vdev);
    m->addr = qvirtio_config_readq(&m->pci->vdev,
                                   offsetof(struct virtio_mem_config, addr));
}

static void vmem_cleanup(VirtioMem *m)
{
    qvirtqueue_cleanup(m->pci->vdev.bus, m->vq, m->b->alloc);
    qvirtio_pci_device_disable(m->pci);
    g_free(m->pci->pdev);
    g_free(m->pci);
}

/* Plug or unplug the first blocks.  Returns the answer of the device. */
static uint16_t vmem_request(VirtioMem *m, uint16_t type, uint16_t blocks)
{
    struct virtio_mem_req req = {
        .type = cpu_to_le16(type),
        .u.plug.addr = cpu_to_le64(m->addr),
        .u.plug.nb_blocks = cpu_to_le16(blocks),
    };
    struct virtio_mem_resp resp = { .type = cpu_to_le16(UINT16_MAX) };
    uint64_t resp_addr = put(m->b, &resp, sizeof(resp));
    uint32_t head = qvirtqueue_add(m->b->qts, m->vq,
                                   put(m->b, &req, sizeof(req)), sizeof(req),
                                   false, true);

    qvirtqueue_add(m->b->qts, m->vq, resp_addr, sizeof(resp), true, false);
    qvirtqueue_kick(m->b->qts, &m->pci->vdev, m->vq, head);
    qvirtio_wait_used_elem(m->b->qts, &m->pci->vdev, m->vq, head, NULL,
                           TIMEOUT_US);
    return qtest_readw(m->b->qts, resp_addr);
}

static bool test_virtio_mem(int queue)
{
    uint64_t guard;
    VirtioMem m;
    Balloon *b;
    bool late;
    Busy busy;
    pid_t tid;

    if (!qtest_has_device("virtio-mem-pci")) {
        g_test_skip("QEMU was built without virtio-mem");
        return true;
    }
    b = balloon_start(transport, OPTIONS VMEM_OPTIONS);
    vmem_init(&m, b);
    config_writel(b, CFG(actual), 50);
    g_assert_cmpint(vmem_request(&m, VIRTIO_MEM_REQ_PLUG, VMEM_BLOCKS), ==,
                    VIRTIO_MEM_RESP_ACK);
    /* Only DIMMs count. */
    check_size(b, VM_SIZE);
    guard = m.addr + VMEM_BUSY * VMEM_BLOCK;
    qtest_memset(b->qts, guard, PATTERN, 2 * PAGE);
    send_pfns(b, IVQ, &(uint32_t){ pfn(guard) + 1 }, 1);

    tid = begin_round(b, queue);
    busy_start(&busy, b, queue, m.addr, ARRAY_SIZE(busy.heads));
    if (queue == HINT) {
        g_assert_cmpint(vmem_request(&m, VIRTIO_MEM_REQ_UNPLUG, VMEM_BUSY), ==,
                        VIRTIO_MEM_RESP_BUSY);
    }
    end_round(&busy, tid);
    g_assert_cmpint(vmem_request(&m, VIRTIO_MEM_REQ_UNPLUG, VMEM_BUSY), ==,
                    VIRTIO_MEM_RESP_ACK);
    late = is_late(&busy);
    busy_check_guard(&busy);
    g_assert_cmpint(vmem_request(&m, VIRTIO_MEM_REQ_PLUG, VMEM_BUSY), ==,
                    VIRTIO_MEM_RESP_ACK);
    check_size(b, VM_SIZE);
    busy_finish(&busy);
    assert_pages(b, guard, "P0");
    check_works(b);
    vmem_cleanup(&m);
    balloon_quit(b);
    return !late;
}

/*
 * A new driver that does not know of the previous one, as after kexec
 */

typedef struct NewDriver {
    uint64_t features;
    /* The size of the rings, unless the device only has smaller ones */
    int size;
    bool packed;
} NewDriver;

static const NewDriver new_drivers[] = {
    { F_BALLOON, 64 },
    { F_BALLOON & ~F_STATS & ~F_REPORTING, 8 },
    { F_BALLOON & ~F_HINT, 16 },
    { F_BALLOON & ~F_REPORTING, 32, true },
};

/* A checksum of the memory of the rings */
static char *rings_checksum(Balloon *b, QVirtQueue *const *vq, int n)
{
    g_autoptr(GChecksum) sum = g_checksum_new(G_CHECKSUM_SHA256);

    for (int i = 0; i < n; i++) {
        size_t size = qvring_size(vq[i]->size, vq[i]->align);
        g_autofree uint8_t *ring = g_malloc(size);

        qtest_memread(b->qts, vq[i]->desc, ring, size);
        g_checksum_update(sum, ring, size);
    }
    return g_strdup(g_checksum_get_string(sum));
}

/* Reset and initialize the device, with rings in other memory. */
static void start_new_driver(Balloon *b, const NewDriver *driver)
{
    qvirtio_start_device(b->dev);
    for (int i = 0; i < b->num_queues; i++) {
        b->dev->bus->queue_select(b->dev, i);
        qpci_io_writew(b->pci->pdev, b->pci->bar, b->pci->common_cfg_offset +
                       offsetof(struct virtio_pci_common_cfg, queue_size),
                       MIN(driver->size, b->dev->bus->get_queue_size(b->dev)));
    }
    b->offered = qvirtio_get_features(b->dev);
    if (!driver->packed) {
        b->offered &= ~BIT64(VIRTIO_F_RING_PACKED);
    }
    balloon_negotiate(b, driver->features);
    for (int i = 0; i < b->num_queues; i++) {
        g_assert_cmpint(b->vq[i]->size, <=, driver->size);
        if (driver->packed) {
            /* libqos has initialized the ring as a split ring. */
            qtest_memset(b->qts, b->vq[i]->desc, 0, b->vq[i]->size *
                         sizeof(struct vring_packed_desc));
        }
    }
}

/* Use a slot of a packed ring, of which none was used before. */
static void packed_submit(Balloon *b, int q, int slot, Buffer buffer)
{
    struct vring_packed_desc desc = {
        .addr = cpu_to_le64(buffer.addr),
        .len = cpu_to_le32(buffer.len),
        .flags = cpu_to_le16(1 << VRING_PACKED_DESC_F_AVAIL |
                             (buffer.write ? VRING_DESC_F_WRITE : 0)),
    };

    qtest_memwrite(b->qts, b->vq[q]->desc + slot * sizeof(desc), &desc,
                   sizeof(desc));
    b->dev->bus->virtqueue_kick(b->dev, b->vq[q]);
}

static bool packed_is_used(Balloon *b, int q, int slot)
{
    return qtest_readw(b->qts, b->vq[q]->desc +
                       slot * sizeof(struct vring_packed_desc) +
                       offsetof(struct vring_packed_desc, flags)) &
           1 << VRING_PACKED_DESC_F_USED;
}

static void check_packed_works(Balloon *b)
{
    uint64_t mem = alloc_pages(b, 3);
    Buffer page = put_pfns(b, mem + PAGE, 1);

    for (int slot = 0; slot < 2; slot++) {
        for (int q = IVQ; q <= DVQ; q++) {
            packed_submit(b, q, slot, page);
            WAIT_FOR(packed_is_used(b, q, slot));
            assert_pages(b, mem, "P0P");
        }
        packed_submit(b, b->hint_vq, slot, (Buffer) { mem, PAGE, true });
        WAIT_FOR(packed_is_used(b, b->hint_vq, slot));
        packed_submit(b, SVQ, slot, put_stats(b, put(b, "", 1)));
        g_assert_false(packed_is_used(b, SVQ, slot));
        poll_stats(b);
        WAIT_FOR(packed_is_used(b, SVQ, slot));
    }
    g_assert_false(is_broken_for_qmp(b));
}

static bool check_new_driver(int queue, const NewDriver *driver)
{
    Balloon *b = balloon_boot(transport, ",packed=on" OPTIONS);
    g_autofree char *before = NULL, *after = NULL;
    QVirtQueue *old[ARRAY_SIZE(b->vq)];
    bool late;
    int n;
    Busy busy;
    pid_t tid;

    b->offered &= ~BIT64(VIRTIO_F_RING_PACKED);
    balloon_negotiate(b, F_BALLOON);
    memcpy(old, b->vq, sizeof(old));
    n = b->num_queues;
    set_balloon(b, VM_SIZE - 100 * PAGE);
    config_writel(b, CFG(actual), 50);
    tid = begin_round(b, queue);
    busy_start(&busy, b, queue, busy_alloc(b), 16);

    late = is_late(&busy);
    if (tid) {
        g_assert_cmpint(busy_in_flight(&busy), >, 0);
    }
    b->dev->bus->set_status(b->dev, 0);
    continue_iothread(tid);
    before = rings_checksum(b, old, n);
    busy_check_guard(&busy);
    if (rust_device) {
        g_assert_cmpint(busy_in_flight(&busy), ==, 0);
    }
    b->hints_polled = false;
    start_new_driver(b, driver);
    g_assert_cmpint(query_balloon(b), ==,
                    VM_SIZE - config_readl(b, CFG(actual)) * PAGE);
    g_assert_cmpint(config_readl(b, CFG(num_pages)), ==, 100);
    config_writel(b, CFG(actual), 0);
    g_assert_cmpint(query_balloon(b), ==, VM_SIZE);
    if (driver->packed) {
        check_packed_works(b);
    } else {
        check_works(b);
    }
    if (queue == HINT) {
        cancel_migration(b);
    }
    after = rings_checksum(b, old, n);
    g_assert_cmpstr(before, ==, after);
    busy_check_guard(&busy);
    for (int i = 0; i < n; i++) {
        qvirtqueue_cleanup(b->dev->bus, old[i], b->alloc);
    }
    balloon_quit(b);
    return !late;
}

static bool test_new_driver(int queue)
{
    for (int i = 0; i < ARRAY_SIZE(new_drivers); i++) {
        if (!check_new_driver(queue, &new_drivers[i])) {
            return false;
        }
    }
    return true;
}

/*
 * QEMU is killed, and the VM is restored from a file.
 */

static char *dir, *state_path;

static void remove_files(void *opaque)
{
    g_unlink(state_path);
    g_rmdir(dir);
}

/* libqtest cannot release a QEMU that was killed. */
static GList *killed;

static void kill_qemu(Balloon *b)
{
    pid_t pid = qtest_pid(b->qts);

    qtest_remove_abrt_handler(b->qts);
    kill(pid, SIGKILL);
    g_assert_cmpint(waitpid(pid, NULL, 0), ==, pid);
    killed = g_list_prepend(killed, b);
}

/* Load the VM in the QEMU that QTEST_QEMU_BINARY_DST names, if it is set. */
static Balloon *restore(Balloon *src)
{
    g_autofree char *binary = g_strdup(getenv("QTEST_QEMU_BINARY"));
    const char *other = getenv("QTEST_QEMU_BINARY_DST");
    /*
     * The C device does not look at its queues when it arrives; ioeventfd
     * notifies it.
     */
    const char *options = rust_device && !other ? OPTIONS :
                          OPTIONS " -global virtio-pci.ioeventfd=on";
    Balloon *dst;

    if (other) {
        g_setenv("QTEST_QEMU_BINARY", other, true);
    }
    dst = balloon_load(src, state_path, options);
    g_setenv("QTEST_QEMU_BINARY", binary, true);
    return dst;
}

/* QEMU is killed while the VM is stopped, after it was saved. */
static bool test_kill_stopped(int queue)
{
    Balloon *b = balloon_start(transport, OPTIONS);
    bool late = false;
    Busy busy;

    if (queue == HINT) {
        /* Otherwise the I/O thread could be done before. */
        stop_vm(b);
    }
    busy_start(&busy, b, queue, busy_alloc(b), 16);
    stop_vm(b);
    if (rust_device && queue != STATS) {
        g_assert_cmpint(busy_in_flight(&busy), ==, 0);
        late = used_idx(busy.b, busy.q) == busy.end;
    }
    balloon_save(b, state_path);
    kill_qemu(b);

    busy.b = restore(b);
    busy_check_guard(&busy);
    continue_vm(busy.b);
    busy_finish(&busy);
    check_works(busy.b);
    balloon_quit(busy.b);
    return !late;
}

/*
 * The VM is saved while it runs, and goes on.  QEMU is killed later: what has
 * happened meanwhile happens again.
 */
static bool test_kill_running(int queue)
{
    Balloon *b = balloon_start(transport, OPTIONS);
    uint64_t large = busy_alloc(b);
    uint16_t used;
    bool late;
    Busy busy;

    if (queue == HINT) {
        stop_vm(b);
    }
    busy_start(&busy, b, queue, large, 16);
    if (queue == HINT) {
        continue_vm(b);
    }
    late = is_late(&busy);
    balloon_save(b, state_path);
    used = used_idx(busy.b, busy.q);
    /* Each element names all pages. */
    busy.stale = used == busy.end && queue != STATS;
    continue_vm(b);
    if (queue == STATS) {
        poll_stats(b);
    }
    if (used < busy.end) {
        WAIT_FOR(used_idx(busy.b, busy.q) > used);
    }
    /* These are not in the file. */
    set_balloon(b, VM_SIZE - PAGE);
    qtest_memset(b->qts, busy.mem, 0, PAGE);
    kill_qemu(b);

    busy.b = restore(b);
    g_assert_cmpint(config_readl(busy.b, CFG(num_pages)), ==, 0);
    busy_check_guard(&busy);
    busy_finish(&busy);
    check_works(busy.b);
    balloon_quit(busy.b);
    return !late;
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    /* None of this depends on the transport. */
    transport = pci_transport();
    if (!transport) {
        return g_test_run();
    }
    rust_device = is_rust_device();
    dir = g_dir_make_tmp("virtio-balloon-XXXXXX", NULL);
    g_assert_nonnull(dir);
    state_path = g_build_filename(dir, "state", NULL);
    qtest_add_abrt_handler(remove_files, NULL);

    add_queue_tests("dimm", test_dimm);
    add_queue_tests("virtio-mem", test_virtio_mem);
    add_queue_tests("new-driver", test_new_driver);
    add_queue_tests("kill-stopped", test_kill_stopped);
    add_queue_tests("kill-running", test_kill_running);
    ret = g_test_run();
    qtest_remove_abrt_handler(NULL);
    remove_files(NULL);
    return ret;
}
