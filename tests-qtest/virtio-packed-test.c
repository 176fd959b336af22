/*
 * QTest test cases for packed virtqueues
 *
 * libqos only knows split virtqueues, so this comes with a minimal driver.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "standard-headers/linux/input.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_mmio.h"
#include "standard-headers/linux/virtio_ring.h"

#define MICROVM "-machine microvm -nodefaults -m 64M " \
                "-global virtio-mmio.force-legacy=off "
/* VIRTIO_MMIO_BASE in hw/i386/microvm.h */
#define MMIO_BASE       0xfeb00000
#define MMIO_SIZE       512
#define MMIO_COUNT      24

#define RING            (16 * MiB)
#define EVENTS          (RING + 0x1000)
#define DATA            (RING + 0x2000)

#define F_AVAIL         (1 << VRING_PACKED_DESC_F_AVAIL)
#define F_USED          (1 << VRING_PACKED_DESC_F_USED)

typedef struct PackedQueue {
    QTestState *qts;
    uint64_t mmio;
    uint16_t index;
    uint16_t size;
    /* Where the driver adds the next descriptor */
    uint16_t next;
    bool wrap;
} PackedQueue;

static uint64_t find_device(QTestState *qts, uint32_t id)
{
    for (int i = 0; i < MMIO_COUNT; i++) {
        uint64_t mmio = MMIO_BASE + i * MMIO_SIZE;

        if (qtest_readl(qts, mmio + VIRTIO_MMIO_DEVICE_ID) == id) {
            return mmio;
        }
    }
    g_assert_not_reached();
}

/* Start the device, with one queue */
static PackedQueue packed_start(QTestState *qts, uint32_t id, uint64_t features,
                                uint16_t index, uint16_t size)
{
    PackedQueue vq = {
        .qts = qts,
        .mmio = find_device(qts, id),
        .index = index,
        .size = size,
        .wrap = true,
    };
    uint32_t status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;

    features |= 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_RING_PACKED;

    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS, 0);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS, status);
    for (int i = 0; i < 2; i++) {
        uint32_t word = features >> (i * 32);

        qtest_writel(qts, vq.mmio + VIRTIO_MMIO_DEVICE_FEATURES_SEL, i);
        g_assert_cmphex(qtest_readl(qts, vq.mmio +
                                    VIRTIO_MMIO_DEVICE_FEATURES) & word,
                        ==, word);
        qtest_writel(qts, vq.mmio + VIRTIO_MMIO_DRIVER_FEATURES_SEL, i);
        qtest_writel(qts, vq.mmio + VIRTIO_MMIO_DRIVER_FEATURES, word);
    }
    status |= VIRTIO_CONFIG_S_FEATURES_OK;
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS, status);
    g_assert_cmphex(qtest_readl(qts, vq.mmio + VIRTIO_MMIO_STATUS), ==, status);

    qtest_memset(qts, RING, 0, DATA - RING);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_SEL, index);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_NUM, size);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_DESC_LOW, RING);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_AVAIL_LOW, EVENTS);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_USED_LOW, EVENTS + 4);
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_QUEUE_READY, 1);

    status |= VIRTIO_CONFIG_S_DRIVER_OK;
    qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS, status);
    return vq;
}

/* Add an element that consists of @count buffers of @len bytes each */
static void packed_add(PackedQueue *vq, uint16_t id, uint16_t flags,
                       uint64_t addr, uint32_t len, unsigned int count)
{
    for (unsigned int i = 0; i < count; i++) {
        struct vring_packed_desc desc = {
            .addr = cpu_to_le64(addr + i * len),
            .len = cpu_to_le32(len),
            .id = cpu_to_le16(id),
            .flags = cpu_to_le16(flags | (vq->wrap ? F_AVAIL : F_USED) |
                                 (i + 1 < count ? VRING_DESC_F_NEXT : 0)),
        };

        qtest_memwrite(vq->qts, RING + vq->next * sizeof(desc), &desc,
                       sizeof(desc));
        vq->next++;
        if (vq->next == vq->size) {
            vq->next = 0;
            vq->wrap = !vq->wrap;
        }
    }
}

static void packed_kick(PackedQueue *vq)
{
    qtest_writel(vq->qts, vq->mmio + VIRTIO_MMIO_QUEUE_NOTIFY, vq->index);
}

/* The device has used the element @id and has written this to slot @slot */
static void packed_assert_used(PackedQueue *vq, uint16_t slot, bool wrap,
                               uint16_t id, uint32_t len)
{
    struct vring_packed_desc desc;

    qtest_memread(vq->qts, RING + slot * sizeof(desc), &desc, sizeof(desc));
    g_assert_cmphex(le16_to_cpu(desc.flags) & (F_AVAIL | F_USED), ==,
                    wrap ? F_AVAIL | F_USED : 0);
    g_assert_cmpuint(le16_to_cpu(desc.id), ==, id);
    g_assert_cmpuint(le32_to_cpu(desc.len), ==, len);
}

static void press_key(QTestState *qts, const char *key)
{
    qtest_qmp_assert_success(qts,
        "{ 'execute': 'input-send-event', 'arguments': { 'events': ["
        "    { 'type': 'key', 'data': { 'down': true,"
        "      'key': { 'type': 'qcode', 'data': %s } } } ] } }", key);
}

/*
 * virtio-input needs two elements for a key: one for the key, one for the
 * SYN_REPORT.  If there is no second one, it puts back the first one.
 */
static void unpop_chain(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-keyboard-device,"
                                 "packed=on,indirect_desc=off");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_INPUT, 0, 0, 8);
    uint8_t event[8];

    packed_add(&vq, 10, VRING_DESC_F_WRITE, DATA, 4, 2);
    packed_kick(&vq);
    press_key(qts, "a");

    packed_add(&vq, 11, VRING_DESC_F_WRITE, DATA + 8, 4, 2);
    packed_kick(&vq);
    press_key(qts, "b");

    packed_assert_used(&vq, 0, true, 10, 8);
    qtest_memread(qts, DATA, event, sizeof(event));
    g_assert_cmpuint(lduw_le_p(event), ==, EV_KEY);
    g_assert_cmpuint(lduw_le_p(event + 2), ==, KEY_B);
    g_assert_cmpuint(ldl_le_p(event + 4), ==, 1);

    packed_assert_used(&vq, 2, true, 11, 8);
    qtest_memread(qts, DATA + 8, event, sizeof(event));
    g_assert_cmpuint(lduw_le_p(event), ==, EV_SYN);

    qtest_quit(qts);
}

/*
 * With VIRTIO_F_IN_ORDER, the device looks for the place of an element among
 * those that it has.
 */
static void in_order_full_ring(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-keyboard-device,"
                                 "packed=on,indirect_desc=off,in_order=on");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_INPUT,
                                  1ull << VIRTIO_F_IN_ORDER, 0, 8);
    uint8_t event[8];

    for (int round = 0; round < 4; round++) {
        bool wrap = round % 2 == 0;

        /* Two elements that need all of the ring, one for each event */
        packed_add(&vq, 10, VRING_DESC_F_WRITE, DATA, 2, 4);
        packed_add(&vq, 11, VRING_DESC_F_WRITE, DATA + 8, 2, 4);
        packed_kick(&vq);
        press_key(qts, round % 2 ? "a" : "b");

        packed_assert_used(&vq, 0, wrap, 10, 8);
        qtest_memread(qts, DATA, event, sizeof(event));
        g_assert_cmpuint(lduw_le_p(event), ==, EV_KEY);
        g_assert_cmpuint(lduw_le_p(event + 2), ==, round % 2 ? KEY_A : KEY_B);

        packed_assert_used(&vq, 4, wrap, 11, 8);
        qtest_memread(qts, DATA + 8, event, sizeof(event));
        g_assert_cmpuint(lduw_le_p(event), ==, EV_SYN);
    }
    qtest_quit(qts);
}

static void wait_used(PackedQueue *vq, uint16_t slot, bool wrap)
{
    uint16_t expected = wrap ? F_AVAIL | F_USED : 0;

    for (;;) {
        uint16_t flags = qtest_readw(vq->qts, RING +
                                     slot * sizeof(struct vring_packed_desc) +
                                     offsetof(struct vring_packed_desc, flags));

        if ((flags & (F_AVAIL | F_USED)) == expected) {
            return;
        }
        g_usleep(100);
    }
}

/* The same with as many elements as the ring has descriptors */
static void in_order_balloon(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-balloon-device,"
                                 "packed=on,indirect_desc=off,in_order=on");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON,
                                  1ull << VIRTIO_F_IN_ORDER, 0, 128);

    /* A page that is not used otherwise */
    qtest_writel(qts, DATA, (DATA + 1 * MiB) >> VIRTIO_BALLOON_PFN_SHIFT);
    for (int round = 0; round < 3; round++) {
        bool wrap = round % 2 == 0;

        for (int i = 0; i < vq.size; i++) {
            packed_add(&vq, i, 0, DATA, sizeof(uint32_t), 1);
        }
        packed_kick(&vq);
        for (int i = 0; i < vq.size; i++) {
            wait_used(&vq, i, wrap);
            packed_assert_used(&vq, i, wrap, i, 0);
        }
    }
    qtest_quit(qts);
}

static void set_size(PackedQueue *vq, uint16_t size)
{
    qtest_writel(vq->qts, vq->mmio + VIRTIO_MMIO_QUEUE_SEL, vq->index);
    qtest_writel(vq->qts, vq->mmio + VIRTIO_MMIO_QUEUE_NUM, size);
}

/* A driver changes the size of a ring while it is in use.  QEMU survives. */
static void resize(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-balloon-device,"
                                 "packed=on,indirect_desc=off");
    static const uint16_t sizes[][2] = { { 64, 128 }, { 128, 16 } };

    qtest_writel(qts, DATA, (DATA + 1 * MiB) >> VIRTIO_BALLOON_PFN_SHIFT);
    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON, 0, 0,
                                      sizes[i][0]);

        for (int j = 0; j < 40; j++) {
            packed_add(&vq, j, 0, DATA, sizeof(uint32_t), 1);
        }
        packed_kick(&vq);
        wait_used(&vq, 39, true);

        set_size(&vq, sizes[i][1]);
        /* 128 descriptors, as far as the driver is concerned */
        vq.size = 128;
        for (int j = 40; j < 128; j++) {
            packed_add(&vq, j, 0, DATA, sizeof(uint32_t), 1);
        }
        packed_kick(&vq);
        qtest_clock_step(qts, 1000);
    }
    qtest_quit(qts);
}

static void write_stat(QTestState *qts, uint64_t addr, uint16_t tag,
                       uint64_t val)
{
    struct virtio_balloon_stat stat = {
        .tag = cpu_to_le16(tag),
        .val = cpu_to_le64(val),
    };

    qtest_memwrite(qts, addr, &stat, sizeof(stat));
}

static void assert_stats(QTestState *qts, uint64_t mem_free, uint64_t mem_total)
{
    QDict *ret = qtest_qmp_assert_success_ref(qts,
        "{ 'execute': 'qom-get', 'arguments': {"
        "    'path': '/machine/peripheral/balloon',"
        "    'property': 'guest-stats' } }");
    QDict *stats = qdict_get_qdict(ret, "stats");

    g_assert_cmpuint(qdict_get_uint(stats, "stat-free-memory"), ==, mem_free);
    g_assert_cmpuint(qdict_get_uint(stats, "stat-total-memory"), ==, mem_total);
    qobject_unref(ret);
}

static void migrate_to_file(QTestState *qts, const char *uri)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate',"
                             "  'arguments': { 'uri': %s } }", uri);
    for (;;) {
        QDict *ret = qtest_qmp_assert_success_ref(qts,
            "{ 'execute': 'query-migrate' }");
        const char *status = qdict_get_str(ret, "status");
        bool completed = g_str_equal(status, "completed");

        g_assert_cmpstr(status, !=, "failed");
        qobject_unref(ret);
        if (completed) {
            return;
        }
        g_usleep(1000);
    }
}

/*
 * virtio-balloon keeps the element with the statistics, does not migrate it,
 * and gets it from the queue again on the destination.
 */
static void rewind_chain(void)
{
    const size_t size = sizeof(struct virtio_balloon_stat);
    const char *args = MICROVM "-device virtio-balloon-device,id=balloon,"
                       "packed=on,indirect_desc=off";
    g_autofree char *dir = g_dir_make_tmp("virtio-packed-XXXXXX", NULL);
    g_autofree char *file = g_strdup_printf("%s/state", dir);
    g_autofree char *uri = g_strdup_printf("file:%s", file);
    QTestState *qts = qtest_init(args);
    PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON,
                                  1ull << VIRTIO_BALLOON_F_STATS_VQ, 2, 4);

    write_stat(qts, DATA, VIRTIO_BALLOON_S_MEMFREE, 0x1111);
    write_stat(qts, DATA + size, VIRTIO_BALLOON_S_MEMTOT, 0x2222);

    /* The device returns an element when it has got the next one */
    for (int i = 0; i < 3; i++) {
        packed_add(&vq, i, 0, DATA, size, 1);
        packed_kick(&vq);
        assert_stats(qts, 0x1111, -1);
    }
    /* The last descriptor of the ring, and the first one */
    packed_add(&vq, 3, 0, DATA, size, 2);
    packed_kick(&vq);
    assert_stats(qts, 0x1111, 0x2222);
    for (int i = 1; i < 3; i++) {
        packed_assert_used(&vq, i, true, i, 0);
    }

    /* Only as many descriptors as are in use are looked at */
    qtest_writew(qts, RING + 2 * sizeof(struct vring_packed_desc) +
                 offsetof(struct vring_packed_desc, flags), VRING_DESC_F_NEXT);

    migrate_to_file(qts, uri);
    qtest_quit(qts);

    vq.qts = qts = qtest_initf("%s -incoming defer", args);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-incoming',"
                             "  'arguments': { 'uri': %s } }", uri);
    qtest_qmp_eventwait(qts, "RESUME");
    assert_stats(qts, 0x1111, 0x2222);

    /* All of the chain is returned, and the next element is found */
    write_stat(qts, DATA, VIRTIO_BALLOON_S_MEMFREE, 0x3333);
    packed_add(&vq, 4, 0, DATA, size, 2);
    packed_kick(&vq);
    assert_stats(qts, 0x3333, 0x2222);
    packed_assert_used(&vq, 3, true, 3, 0);
    packed_add(&vq, 5, 0, DATA, size, 1);
    packed_kick(&vq);
    assert_stats(qts, 0x3333, -1);
    packed_assert_used(&vq, 1, false, 4, 0);

    qtest_quit(qts);
    unlink(file);
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    if (qtest_has_machine("microvm")) {
        if (qtest_has_device("virtio-keyboard-device")) {
            qtest_add_func("virtio-packed/unpop-chain", unpop_chain);
            qtest_add_func("virtio-packed/in-order/full-ring",
                           in_order_full_ring);
        }
        if (qtest_has_device("virtio-balloon-device")) {
            qtest_add_func("virtio-packed/rewind-chain", rewind_chain);
            qtest_add_func("virtio-packed/in-order/balloon", in_order_balloon);
            qtest_add_func("virtio-packed/resize", resize);
        }
    }

    return g_test_run();
}
