/*
 * QTest test cases for virtqueues
 *
 * libqos does not support packed virtqueues, and cannot violate the
 * specification, so this file has a minimal driver of its own.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "hw/pci/pci_regs.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio-pci.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "standard-headers/linux/input.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_mmio.h"
#include "standard-headers/linux/virtio_pci.h"
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
    /* The slot of the next descriptor that the driver adds */
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

static void write_features(QTestState *qts, uint64_t mmio, uint64_t features)
{
    for (int i = 0; i < 2; i++) {
        uint32_t word = features >> (i * 32);

        qtest_writel(qts, mmio + VIRTIO_MMIO_DEVICE_FEATURES_SEL, i);
        g_assert_cmphex(qtest_readl(qts, mmio + VIRTIO_MMIO_DEVICE_FEATURES) &
                        word, ==, word);
        qtest_writel(qts, mmio + VIRTIO_MMIO_DRIVER_FEATURES_SEL, i);
        qtest_writel(qts, mmio + VIRTIO_MMIO_DRIVER_FEATURES, word);
    }
}

/* Start the device with one queue, with its areas at RING, @avail and @used. */
static void start_device(QTestState *qts, uint64_t mmio, uint64_t features,
                         uint16_t index, uint16_t size, uint64_t avail,
                         uint64_t used)
{
    uint32_t status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;

    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, 0);
    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, status);
    write_features(qts, mmio, features | 1ull << VIRTIO_F_VERSION_1);
    status |= VIRTIO_CONFIG_S_FEATURES_OK;
    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, status);
    g_assert_cmphex(qtest_readl(qts, mmio + VIRTIO_MMIO_STATUS), ==, status);

    qtest_memset(qts, RING, 0, DATA - RING);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_SEL, index);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_NUM, size);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_DESC_LOW, RING);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_USED_LOW, used);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_READY, 1);

    status |= VIRTIO_CONFIG_S_DRIVER_OK;
    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, status);
}

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

    start_device(qts, vq.mmio, features | 1ull << VIRTIO_F_RING_PACKED, index,
                 size, EVENTS, EVENTS + 4);
    return vq;
}

/* Add one descriptor */
static void packed_add_desc(PackedQueue *vq, uint16_t id, uint16_t flags,
                            uint64_t addr, uint32_t len)
{
    struct vring_packed_desc desc = {
        .addr = cpu_to_le64(addr),
        .len = cpu_to_le32(len),
        .id = cpu_to_le16(id),
        .flags = cpu_to_le16(flags | (vq->wrap ? F_AVAIL : F_USED)),
    };

    qtest_memwrite(vq->qts, RING + vq->next * sizeof(desc), &desc,
                   sizeof(desc));
    vq->next++;
    if (vq->next == vq->size) {
        vq->next = 0;
        vq->wrap = !vq->wrap;
    }
}

/* Add an element that consists of @count buffers of @len bytes each */
static void packed_add(PackedQueue *vq, uint16_t id, uint16_t flags,
                       uint64_t addr, uint32_t len, unsigned int count)
{
    for (unsigned int i = 0; i < count; i++) {
        packed_add_desc(vq, id,
                        flags | (i + 1 < count ? VRING_DESC_F_NEXT : 0),
                        addr + i * len, len);
    }
}

static void packed_kick(PackedQueue *vq)
{
    qtest_writel(vq->qts, vq->mmio + VIRTIO_MMIO_QUEUE_NOTIFY, vq->index);
}

/*
 * Check that the device has used the element @id, and has written it to slot
 * @slot
 */
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

/*
 * Check that the device has not written slot @slot since the driver cleared it
 */
static void packed_assert_empty(PackedQueue *vq, uint16_t slot)
{
    struct vring_packed_desc desc;

    qtest_memread(vq->qts, RING + slot * sizeof(desc), &desc, sizeof(desc));
    g_assert_cmphex(le16_to_cpu(desc.flags), ==, 0);
}

static void assert_broken(QTestState *qts, uint64_t mmio)
{
    g_assert_cmphex(qtest_readl(qts, mmio + VIRTIO_MMIO_STATUS) &
                    VIRTIO_CONFIG_S_NEEDS_RESET, !=, 0);
}

static void press_key(QTestState *qts, const char *key)
{
    qtest_qmp_assert_success(qts,
        "{ 'execute': 'input-send-event', 'arguments': { 'events': ["
        "    { 'type': 'key', 'data': { 'down': true,"
        "      'key': { 'type': 'qcode', 'data': %s } } } ] } }", key);
}

/*
 * virtio-input needs two elements for a key press: one for the key, one for
 * SYN_REPORT.  If there is no second element, it puts the first one back.
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
 * With VIRTIO_F_IN_ORDER, the device looks for an element among those in
 * flight.
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

        /* Two elements that fill the ring, one for each event */
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

/* The same, with as many elements as the ring has descriptors */
static void in_order_balloon(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-balloon-device,"
                                 "packed=on,indirect_desc=off,in_order=on");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON,
                                  1ull << VIRTIO_F_IN_ORDER, 0, 128);

    /* A page that is not used for anything else */
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

#define BLK_HEADER      DATA
#define BLK_DATA        (DATA + 0x100)
#define BLK_STATUS      (DATA + 0x400)

/* The status is written to BLK_STATUS + @id. */
static void add_blk_request(PackedQueue *vq, uint16_t id, uint32_t type,
                            uint32_t len)
{
    uint64_t header = BLK_HEADER + id * sizeof(struct virtio_blk_outhdr);

    qtest_memset(vq->qts, header, 0, sizeof(struct virtio_blk_outhdr));
    qtest_writel(vq->qts, header, type);
    qtest_writeb(vq->qts, BLK_STATUS + id, 0xff);
    packed_add_desc(vq, id, VRING_DESC_F_NEXT, header,
                    sizeof(struct virtio_blk_outhdr));
    packed_add_desc(vq, id, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, BLK_DATA,
                    len);
    packed_add_desc(vq, id, VRING_DESC_F_WRITE, BLK_STATUS + id, 1);
}

/*
 * An element completes before an older one, and then the driver resets the
 * device.  After that, the element must not be returned.
 */
static void in_order_reset(void)
{
    QTestState *qts = qtest_init(MICROVM
        "-blockdev driver=blkdebug,node-name=disk,image.driver=null-co,"
        "image.read-zeroes=on,inject-error.0.event=none,"
        "inject-error.0.iotype=read,inject-error.0.errno=5 "
        "-device virtio-blk-device,drive=disk,rerror=stop,packed=on,"
        "indirect_desc=off,in_order=on");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_BLOCK,
                                  1ull << VIRTIO_F_IN_ORDER, 0, 16);

    /* The first request fails, and is kept until the VM continues. */
    add_blk_request(&vq, 1, VIRTIO_BLK_T_IN, 512);
    add_blk_request(&vq, 2, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID_BYTES);
    packed_kick(&vq);
    qtest_qmp_eventwait(qts, "STOP");
    g_assert_cmphex(qtest_readb(qts, BLK_STATUS + 1), ==, 0xff);
    g_assert_cmphex(qtest_readb(qts, BLK_STATUS + 2), ==, VIRTIO_BLK_S_OK);

    vq = packed_start(qts, VIRTIO_ID_BLOCK, 1ull << VIRTIO_F_IN_ORDER, 0, 16);
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    add_blk_request(&vq, 3, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID_BYTES);
    packed_kick(&vq);
    wait_used(&vq, 0, true);
    packed_assert_used(&vq, 0, true, 3, VIRTIO_BLK_ID_BYTES + 1);
    packed_assert_empty(&vq, 3);

    /* The next request follows in the ring. */
    add_blk_request(&vq, 4, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID_BYTES);
    packed_kick(&vq);
    wait_used(&vq, 3, true);
    packed_assert_used(&vq, 3, true, 4, VIRTIO_BLK_ID_BYTES + 1);
    qtest_quit(qts);
}

/* A chain continues in descriptors that the device has already popped. */
static void chain_in_use(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-keyboard-device,"
                                 "packed=on,indirect_desc=off");
    PackedQueue vq = packed_start(qts, VIRTIO_ID_INPUT, 0, 0, 4);

    packed_add(&vq, 10, VRING_DESC_F_WRITE, DATA, 4, 2);
    packed_add_desc(&vq, 11, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, DATA, 4);
    packed_add_desc(&vq, 11, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, DATA, 4);
    packed_kick(&vq);
    /* This needs two elements, see unpop_chain(). */
    press_key(qts, "a");
    assert_broken(qts, vq.mmio);
    qtest_quit(qts);
}

static void set_size(QTestState *qts, uint64_t mmio, uint16_t index,
                     uint16_t size)
{
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_SEL, index);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_NUM, size);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_READY, 1);
}

/*
 * A driver changes the size of a ring while it is in use.  The device keeps the
 * old size.
 */
static void resize(void)
{
    QTestState *qts = qtest_init(MICROVM "-device virtio-balloon-device,"
                                 "packed=on,indirect_desc=off");
    static const uint16_t sizes[][2] = { { 64, 128 }, { 128, 16 } };

    qtest_writel(qts, DATA, (DATA + 1 * MiB) >> VIRTIO_BALLOON_PFN_SHIFT);
    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON, 0, 0,
                                      sizes[i][0]);

        for (int j = 0; j < 300; j++) {
            uint16_t slot = vq.next;
            bool wrap = vq.wrap;

            packed_add(&vq, j, 0, DATA, sizeof(uint32_t), 1);
            packed_kick(&vq);
            wait_used(&vq, slot, wrap);
            packed_assert_used(&vq, slot, wrap, j, 0);
            if (j == 40) {
                set_size(qts, vq.mmio, vq.index, sizes[i][1]);
            }
            if (j == 45) {
                /* Clearing FEATURES_OK and DRIVER_OK must not help */
                qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS,
                             VIRTIO_CONFIG_S_ACKNOWLEDGE);
                set_size(qts, vq.mmio, vq.index, sizes[i][1]);
                qtest_writel(qts, vq.mmio + VIRTIO_MMIO_STATUS,
                             VIRTIO_CONFIG_S_ACKNOWLEDGE |
                             VIRTIO_CONFIG_S_DRIVER |
                             VIRTIO_CONFIG_S_FEATURES_OK |
                             VIRTIO_CONFIG_S_DRIVER_OK);
            }
        }
    }
    qtest_quit(qts);
}

#define SPLIT_SIZE      128
#define AVAIL           EVENTS
#define USED            (EVENTS + 0x400)

/* Add the element with index @idx to a split ring. */
static void split_add(QTestState *qts, uint64_t mmio, uint16_t index,
                      uint16_t idx, uint64_t addr, uint32_t len)
{
    uint16_t i = idx % SPLIT_SIZE;
    struct vring_desc desc = {
        .addr = cpu_to_le64(addr),
        .len = cpu_to_le32(len),
    };

    qtest_memwrite(qts, RING + i * sizeof(desc), &desc, sizeof(desc));
    qtest_writew(qts, AVAIL + offsetof(struct vring_avail, ring[i]), i);
    qtest_writew(qts, AVAIL + offsetof(struct vring_avail, idx), idx + 1);
    qtest_writel(qts, mmio + VIRTIO_MMIO_QUEUE_NOTIFY, index);
}

/*
 * A driver changes the format of a ring while it is in use.  The device keeps
 * the old format.
 */
static void change_format(const void *data)
{
    const uint64_t features = 1ull << VIRTIO_F_VERSION_1 |
                              1ull << VIRTIO_BALLOON_F_STATS_VQ |
                              GPOINTER_TO_UINT(data) * 1ull *
                              (1ull << VIRTIO_F_IN_ORDER);
    const uint32_t status = VIRTIO_CONFIG_S_ACKNOWLEDGE |
                            VIRTIO_CONFIG_S_DRIVER;
    QTestState *qts = qtest_init(MICROVM "-device virtio-balloon-device,"
                                 "packed=on,in_order=on");
    uint64_t mmio = find_device(qts, VIRTIO_ID_BALLOON);
    uint16_t idx = 0;

    start_device(qts, mmio, features, 2, SPLIT_SIZE, AVAIL, USED);
    /*
     * More elements than the ring has entries; the device keeps the last one.
     */
    while (idx < 3 * SPLIT_SIZE / 2) {
        split_add(qts, mmio, 2, idx++, DATA, 10);
    }
    g_assert_cmpuint(qtest_readw(qts, USED + offsetof(struct vring_used, idx)),
                     ==, idx - 1);

    /* Change the features without a reset */
    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, status);
    write_features(qts, mmio, features ^ (1ull << VIRTIO_F_RING_PACKED |
                                          1ull << VIRTIO_F_IN_ORDER));
    qtest_writel(qts, mmio + VIRTIO_MMIO_STATUS, status |
                 VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);

    for (int i = 0; i < SPLIT_SIZE; i++) {
        split_add(qts, mmio, 2, idx++, DATA, 10);
        g_assert_cmpuint(qtest_readw(qts, USED +
                                     offsetof(struct vring_used, idx)),
                         ==, idx - 1);
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
 * virtio-balloon keeps the element with the statistics and does not migrate
 * it.  The destination pops the element from the queue again.
 */
static void rewind_chain(void)
{
    const size_t size = sizeof(struct virtio_balloon_stat);
    const char *args = MICROVM "-device virtio-balloon-device,id=balloon,"
                       "packed=on,indirect_desc=off";
    g_autofree char *dir = g_dir_make_tmp("virtio-ring-XXXXXX", NULL);
    g_autofree char *file = g_strdup_printf("%s/state", dir);
    g_autofree char *uri = g_strdup_printf("file:%s", file);
    QTestState *qts = qtest_init(args);
    PackedQueue vq = packed_start(qts, VIRTIO_ID_BALLOON,
                                  1ull << VIRTIO_BALLOON_F_STATS_VQ, 2, 4);

    write_stat(qts, DATA, VIRTIO_BALLOON_S_MEMFREE, 0x1111);
    write_stat(qts, DATA + size, VIRTIO_BALLOON_S_MEMTOT, 0x2222);

    /* The device returns an element when it pops the next one */
    for (int i = 0; i < 3; i++) {
        packed_add(&vq, i, 0, DATA, size, 1);
        packed_kick(&vq);
        assert_stats(qts, 0x1111, -1);
    }
    /* An element in the last descriptor of the ring and the first one */
    packed_add(&vq, 3, 0, DATA, size, 2);
    packed_kick(&vq);
    assert_stats(qts, 0x1111, 0x2222);
    for (int i = 1; i < 3; i++) {
        packed_assert_used(&vq, i, true, i, 0);
    }

    /* Only descriptors that are in use may be read */
    qtest_writew(qts, RING + 2 * sizeof(struct vring_packed_desc) +
                 offsetof(struct vring_packed_desc, flags), VRING_DESC_F_NEXT);

    migrate_to_file(qts, uri);
    qtest_quit(qts);

    vq.qts = qts = qtest_initf("%s -incoming defer", args);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-incoming',"
                             "  'arguments': { 'uri': %s } }", uri);
    qtest_qmp_eventwait(qts, "RESUME");
    assert_stats(qts, 0x1111, 0x2222);

    /* The whole chain is returned, and the next element is found */
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

#define ROOT_PORT       QPCI_DEVFN(3, 0)
#define ECAM            0xb0000000ULL
#define MCH_PCIEXBAR    0x60
#define WINDOW          0xe000

static void enable_queue(QVirtioPCIDevice *pci, uint16_t size, uint64_t used)
{
    uint64_t common = pci->common_cfg_offset;

    qpci_io_writew(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_SELECT, 0);
    qpci_io_writew(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_SIZE,
                   size);
    qpci_io_writel(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_DESCLO,
                   RING);
    qpci_io_writel(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_AVAILLO,
                   AVAIL);
    qpci_io_writel(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_USEDLO,
                   used);
    qpci_io_writew(pci->pdev, pci->bar, common + VIRTIO_PCI_COMMON_Q_ENABLE, 1);
}

static void notify_queue(QVirtioPCIDevice *pci, uint16_t idx)
{
    qtest_writew(pci->pdev->bus->qts,
                 AVAIL + offsetof(struct vring_avail, idx), idx);
    qpci_io_writew(pci->pdev, pci->bar, pci->notify_cfg_offset, 0);
}

/*
 * virtqueue_pop() writes the index of an element to avail_event.  Here, that is
 * the register with which the slot of the device is powered off.
 */
static void unplug_in_pop(void)
{
    /* Power and indicator off: the device is unplugged at once */
    const uint16_t power_off = PCI_EXP_SLTCTL_PCC | PCI_EXP_SLTCTL_PWR_IND_OFF;
    QTestState *qts = qtest_init("-machine q35 -nodefaults -m 64M "
        "-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off "
        "-device pcie-root-port,id=rp,addr=3.0 "
        "-device virtio-balloon-pci,id=balloon,bus=rp,disable-legacy=on");
    QPCIBus *bus = qpci_new_pc(qts, NULL);
    QPCIDevice *mch = qpci_device_find(bus, QPCI_DEVFN(0, 0));
    QPCIDevice *port = qpci_device_find(bus, ROOT_PORT);
    /* Bus 1 */
    QPCIAddress addr = { .devfn = 1 << 8 };
    struct vring_desc desc = { .addr = cpu_to_le64(DATA),
                               .len = cpu_to_le32(sizeof(uint32_t)) };
    QVirtioPCIDevice *pci;
    uint16_t idx;
    uint64_t used;
    uint8_t cap;

    qpci_config_writel(mch, MCH_PCIEXBAR, ECAM | 1);
    qpci_config_writeb(port, PCI_SECONDARY_BUS, 1);
    qpci_config_writeb(port, PCI_SUBORDINATE_BUS, 1);
    qpci_config_writew(port, PCI_MEMORY_BASE, WINDOW);
    qpci_config_writew(port, PCI_MEMORY_LIMIT, WINDOW + 0xff0);
    qpci_device_enable(port);
    cap = qpci_find_capability(port, PCI_CAP_ID_EXP, 0);
    g_assert_cmphex(cap, !=, 0);

    pci = virtio_pci_new(bus, &addr);
    g_assert_nonnull(pci);
    qvirtio_pci_device_enable(pci);
    qvirtio_start_device(&pci->vdev);
    qvirtio_set_features(&pci->vdev, 1ull << VIRTIO_F_VERSION_1 |
                         1ull << VIRTIO_RING_F_EVENT_IDX);

    qtest_memset(qts, RING, 0, DATA - RING);
    qtest_memwrite(qts, RING, &desc, sizeof(desc));
    qtest_writel(qts, DATA, (DATA + 1 * MiB) >> VIRTIO_BALLOON_PFN_SHIFT);
    enable_queue(pci, 1, USED);
    qvirtio_set_driver_ok(&pci->vdev);
    for (idx = 1; idx < power_off; idx++) {
        notify_queue(pci, idx);
    }

    /* The avail_event of a ring with one entry follows this entry. */
    used = ECAM + (ROOT_PORT << 12) + cap + PCI_EXP_SLTCTL -
           offsetof(struct vring_used, ring[1]);
    enable_queue(pci, 1, used);
    notify_queue(pci, power_off);
    qtest_qmp_eventwait(qts, "DEVICE_DELETED");

    g_free(pci->pdev);
    g_free(pci);
    g_free(port);
    g_free(mch);
    qpci_free_pc(bus);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    if (qtest_has_machine("microvm")) {
        if (qtest_has_device("virtio-keyboard-device")) {
            qtest_add_func("virtio-ring/unpop-chain", unpop_chain);
            qtest_add_func("virtio-ring/in-order/full-ring",
                           in_order_full_ring);
            qtest_add_func("virtio-ring/chain-in-use", chain_in_use);
        }
        if (qtest_has_device("virtio-blk-device")) {
            qtest_add_func("virtio-ring/in-order/reset", in_order_reset);
        }
        if (qtest_has_device("virtio-balloon-device")) {
            qtest_add_func("virtio-ring/rewind-chain", rewind_chain);
            qtest_add_func("virtio-ring/in-order/balloon", in_order_balloon);
            qtest_add_func("virtio-ring/resize", resize);
            qtest_add_data_func("virtio-ring/change-format/split",
                                GUINT_TO_POINTER(0), change_format);
            qtest_add_data_func("virtio-ring/change-format/in-order",
                                GUINT_TO_POINTER(1), change_format);
        }
    }
    if (qtest_has_machine("q35") && qtest_has_device("virtio-balloon-pci")) {
        qtest_add_func("virtio-ring/unplug-in-pop", unplug_in_pop);
    }

    return g_test_run();
}
