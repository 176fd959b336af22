/*
 * Fuzz virtio-balloon
 *
 * An input is a list of operations of a driver, of an operator and of the host.
 * Rings are built from it so that they are valid, because a device hardly ever
 * gets elements from random ones; an operation can then damage what was built.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/madvise.h"
#include "qemu/main-loop.h"
#include "qemu/memfd.h"
#include "qemu/rcu.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-machine.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-commands-misc.h"
#include "qapi/qapi-commands-yank.h"
#include "qobject/qobject.h"
#include "qom/object.h"
#include "qom/qom-qobject.h"
#include "hw/pci/pci.h"
#include "hw/pci/pci_bus.h"
#include "hw/pci/pci_device.h"
#include "hw/core/qdev.h"
#include "hw/virtio/virtio-pci.h"
#include "io/channel-buffer.h"
#include "migration/misc.h"
#include "migration/qemu-file.h"
#include "migration/vmstate.h"
#include "system/memory.h"
#include "system/runstate.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"
#include "tests/qtest/libqtest.h"
#include "fuzz.h"

#define QUEUES          5
#define PAGE_BITS       12
#define RAM_MB          64
#define RAM_PAGES       (RAM_MB << (20 - PAGE_BITS))

/* The host bridge, and its registers that map RAM or ROM below 1 MiB */
#define HOST_BRIDGE     PCI_DEVFN(0, 0)
#define PAM             0x58

/* The slot of the device, and where its BARs are */
#define DEVFN           PCI_DEVFN(4, 0)
#define LEGACY          0xc000
#define MSIX            0xfe010000
#define MODERN          0xfe000000
#define COMMON          MODERN
#define DEVICE_CONFIG   (MODERN + 0x2000)
#define NOTIFY          (MODERN + 0x3000)
#define MODERN_SIZE     0x4000

/* Guest memory for a queue, and for buffers */
#define QUEUE_SIZE      0x8000
#define BUFFERS         0x40000
#define BUFFERS_END     0x9f000

/* How often an element that is valid may find the device busy, 1 ms each */
#define PATIENCE        2000

typedef struct Queue {
    uint64_t desc;
    uint64_t avail;
    uint64_t used;
    uint16_t size;
    /* The next descriptor */
    uint16_t next;
    /* Split rings */
    uint16_t avail_idx;
    /* Packed rings */
    bool wrap;
} Queue;

typedef struct Fuzz {
    QTestState *s;
    const uint8_t *data;
    size_t size;
    DeviceState *dev;
    bool legacy;
    bool discard_disabled;
    uint64_t features;
    uint64_t next_buffer;
    Queue queues[QUEUES];
} Fuzz;

/*
 * The input
 */

static uint8_t take8(Fuzz *f)
{
    if (!f->size) {
        return 0;
    }
    f->size--;
    return *f->data++;
}

static uint16_t take16(Fuzz *f)
{
    uint16_t low = take8(f);

    return low | take8(f) << 8;
}

static uint32_t take32(Fuzz *f)
{
    uint32_t low = take16(f);

    return low | (uint32_t)take16(f) << 16;
}

/*
 * The device
 */

static void let_others_run(Fuzz *f, int us)
{
    flush_events(f->s);
    bql_unlock();
    g_usleep(us);
    bql_lock();
    flush_events(f->s);
}

static void set_bool(Fuzz *f, const char *name, bool value)
{
    /* Only one of the implementations has all of them. */
    if (object_property_find(OBJECT(f->dev), name)) {
        object_property_set_bool(OBJECT(f->dev), name, value, &error_abort);
    }
}

static void pci_config_write(Fuzz *f, int devfn, uint8_t reg, uint32_t value)
{
    qtest_outl(f->s, 0xcf8, 0x80000000 | devfn << 8 | (reg & ~3));
    qtest_outl(f->s, 0xcfc, value);
}

static void set_bars(Fuzz *f)
{
    pci_config_write(f, DEVFN, PCI_BASE_ADDRESS_0, LEGACY);
    pci_config_write(f, DEVFN, PCI_BASE_ADDRESS_1, MSIX);
    pci_config_write(f, DEVFN, PCI_BASE_ADDRESS_4, MODERN);
    pci_config_write(f, DEVFN, PCI_BASE_ADDRESS_5, 0);
    pci_config_write(f, DEVFN, PCI_COMMAND, PCI_COMMAND_IO |
                     PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
}

static void plug(Fuzz *f)
{
    static const char *const bits[] = {
        "deflate-on-oom", "free-page-reporting", "page-poison", "huge-pages",
        "packed", "in_order", "event_idx", "indirect_desc",
    };
    BusState *bus = BUS(object_resolve_path_type("", TYPE_PCI_BUS, NULL));
    uint8_t wanted = take8(f), more = take8(f);

    f->dev = qdev_new("virtio-balloon-pci");
    object_property_add_child(object_get_root(), "balloon", OBJECT(f->dev));
    for (int i = 0; i < ARRAY_SIZE(bits); i++) {
        /* In a corpus, 0 is what is most useful. */
        set_bool(f, bits[i], !(wanted & 1 << i));
    }
    object_property_set_int(OBJECT(f->dev), "addr", DEVFN, &error_abort);
    object_property_set_link(OBJECT(f->dev), "iothread",
                             object_resolve_path("/objects/iothread", NULL),
                             &error_abort);
    set_bool(f, "free-page-hint", !(more & 1));
    f->legacy = more & 2;
    if (more & 4 && object_property_find(OBJECT(f->dev), "oom-hold-time")) {
        object_property_set_int(OBJECT(f->dev), "oom-hold-time", 1,
                                &error_abort);
    }
    /* Without it, the device is notified at once. */
    set_bool(f, "ioeventfd", more & 8);
    /* Update the memory map only once. */
    memory_region_transaction_begin();
    qdev_realize_and_unref(f->dev, bus, &error_abort);
    set_bars(f);
    memory_region_transaction_commit();
}

static void unplug(Fuzz *f)
{
    static unsigned int n;

    memory_region_transaction_begin();
    object_unparent(OBJECT(f->dev));
    memory_region_transaction_commit();
    f->dev = NULL;
    flush_events(f->s);
    /* This takes longer than everything else. */
    if (++n % 64 == 0) {
        drain_call_rcu();
    }
}

static void set_status(Fuzz *f, uint8_t status)
{
    if (f->legacy) {
        qtest_outb(f->s, LEGACY + VIRTIO_PCI_STATUS, status);
    } else {
        qtest_writeb(f->s, COMMON + VIRTIO_PCI_COMMON_STATUS, status);
    }
}

static uint64_t offered(Fuzz *f)
{
    uint64_t features = 0;

    if (f->legacy) {
        return qtest_inl(f->s, LEGACY + VIRTIO_PCI_HOST_FEATURES);
    }
    for (int i = 0; i < 2; i++) {
        qtest_writel(f->s, COMMON + VIRTIO_PCI_COMMON_DFSELECT, i);
        features |= (uint64_t)qtest_readl(f->s, COMMON + VIRTIO_PCI_COMMON_DF)
                    << 32 * i;
    }
    return features;
}

static void accept_features(Fuzz *f, uint64_t features)
{
    f->features = features;
    if (f->legacy) {
        qtest_outl(f->s, LEGACY + VIRTIO_PCI_GUEST_FEATURES, features);
        return;
    }
    for (int i = 0; i < 2; i++) {
        qtest_writel(f->s, COMMON + VIRTIO_PCI_COMMON_GFSELECT, i);
        qtest_writel(f->s, COMMON + VIRTIO_PCI_COMMON_GF, features >> 32 * i);
    }
}

static bool has(Fuzz *f, int feature)
{
    return f->features & 1ULL << feature;
}

/* Set up a queue; @shape is 0 for a usual one. */
static void set_up_queue(Fuzz *f, int i, uint8_t shape)
{
    /* 0: the one that the device proposes */
    static const uint16_t sizes[] = { 0, 1, 2, 4, 8, 32, 1024, 3 };
    /* low memory, memory that can be in the balloon, BARs, nothing */
    static const uint64_t bases[] = {
        0x10000, 0x800000, MODERN, 0xd0000000,
    };
    Queue *q = &f->queues[i];
    uint64_t base = bases[shape >> 3 & 3] + i * QUEUE_SIZE;
    uint64_t rings[3];

    *q = (Queue) { .desc = base, .size = sizes[shape & 7], .wrap = true };
    if (f->legacy) {
        qtest_outw(f->s, LEGACY + VIRTIO_PCI_QUEUE_SEL, i);
        q->size = qtest_inw(f->s, LEGACY + VIRTIO_PCI_QUEUE_NUM) ?: 1;
        q->avail = base + q->size * sizeof(struct vring_desc);
        q->used = ROUND_UP(q->avail + 6 + q->size * 2, 4096);
        qtest_memset(f->s, base, 0, QUEUE_SIZE);
        qtest_outl(f->s, LEGACY + VIRTIO_PCI_QUEUE_PFN, base >> PAGE_BITS);
        return;
    }
    q->avail = base + 0x4000;
    q->used = base + 0x5000;
    qtest_memset(f->s, base, 0, QUEUE_SIZE);
    qtest_writew(f->s, COMMON + VIRTIO_PCI_COMMON_Q_SELECT, i);
    if (!q->size) {
        q->size = qtest_readw(f->s, COMMON + VIRTIO_PCI_COMMON_Q_SIZE);
    }
    if (!q->size || q->size > 1024) {
        /* There is no such queue. */
        q->size = 1;
    }
    qtest_writew(f->s, COMMON + VIRTIO_PCI_COMMON_Q_SIZE, q->size);
    rings[0] = q->desc;
    rings[1] = q->avail;
    rings[2] = q->used;
    for (int j = 0; j < 3; j++) {
        uint64_t reg = COMMON + VIRTIO_PCI_COMMON_Q_DESCLO + j * 8;

        qtest_writel(f->s, reg, rings[j]);
        qtest_writel(f->s, reg + 4, rings[j] >> 32);
    }
    qtest_writew(f->s, COMMON + VIRTIO_PCI_COMMON_Q_ENABLE, 1);
}

static void negotiate(Fuzz *f, uint16_t refused, uint8_t shape)
{
    /* All that the device and the rings have */
    static const int bits[] = {
        VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_STATS_VQ,
        VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
        VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING,
        VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_RESET,
        VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1,
    };
    /* A legacy driver that accepts this bit gets no feature at all. */
    uint64_t wanted = ~(1ULL << VIRTIO_F_BAD_FEATURE);

    for (int i = 0; i < ARRAY_SIZE(bits); i++) {
        if (refused & 1 << i) {
            wanted &= ~(1ULL << bits[i]);
        }
    }
    set_status(f, 0);
    set_status(f, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    set_status(f, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    accept_features(f, offered(f) & wanted);
    if (!f->legacy) {
        set_status(f, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                   VIRTIO_CONFIG_S_FEATURES_OK);
    }
    for (int i = 0; i < QUEUES; i++) {
        set_up_queue(f, i, shape);
    }
    set_status(f, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
               (f->legacy ? 0 : VIRTIO_CONFIG_S_FEATURES_OK) |
               VIRTIO_CONFIG_S_DRIVER_OK);
}

static void kick(Fuzz *f, int q)
{
    if (f->legacy) {
        qtest_outw(f->s, LEGACY + VIRTIO_PCI_QUEUE_NOTIFY, q);
    } else {
        qtest_writew(f->s, NOTIFY + q * 4, q);
    }
}

static uint32_t config_read(Fuzz *f, int offset)
{
    return f->legacy
        ? qtest_inl(f->s, LEGACY + VIRTIO_PCI_CONFIG_OFF(false) + offset)
        : qtest_readl(f->s, DEVICE_CONFIG + offset);
}

static void config_write(Fuzz *f, int offset, uint32_t value)
{
    if (f->legacy) {
        qtest_outl(f->s, LEGACY + VIRTIO_PCI_CONFIG_OFF(false) + offset,
                   value);
    } else {
        qtest_writel(f->s, DEVICE_CONFIG + offset, value);
    }
}

/*
 * Elements
 */

static uint64_t put(Fuzz *f, const void *data, size_t len)
{
    uint64_t addr = f->next_buffer;

    if (addr + len > BUFFERS_END) {
        addr = BUFFERS;
    }
    if (len) {
        qtest_memwrite(f->s, addr, data, len);
    }
    /* What follows is aligned, if its length is. */
    f->next_buffer = addr + ROUND_UP(len, 16);
    return addr;
}

static uint64_t put_pfns(Fuzz *f, bool anywhere, size_t *len)
{
    static const int steps[] = { 1, -1, 0, 2, -3, 512, 0x4001, 7 };
    uint32_t pfns[1024];
    uint32_t pfn = take16(f) & (anywhere ? UINT16_MAX : RAM_PAGES - 1);
    int n = 4 * take8(f) + 1;
    uint8_t shape = take8(f);

    for (int i = 0; i < n; i++) {
        pfns[i] = cpu_to_le32(pfn);
        /* Runs can be longer than one page. */
        pfn += i & shape >> 3 ? 1 : steps[shape & 7];
    }
    *len = n * sizeof(*pfns);
    return put(f, pfns, *len);
}

static uint64_t put_stats(Fuzz *f, size_t *len)
{
    struct virtio_balloon_stat stats[16];
    int n = take8(f) % ARRAY_SIZE(stats);

    for (int i = 0; i < n; i++) {
        stats[i].tag = cpu_to_le16(take8(f));
        stats[i].val = cpu_to_le64(take32(f));
    }
    *len = n * sizeof(*stats);
    return put(f, stats, *len);
}

/* A buffer of an element: what a driver of this device sends, or something */
static struct vring_desc take_buffer(Fuzz *f)
{
    uint8_t kind = take8(f), raw[256];
    uint64_t addr;
    uint32_t id;
    size_t len;

    switch (kind & 7) {
    case 0:
        addr = put_pfns(f, kind & 0x80, &len);
        break;
    case 1:
        len = MIN(take8(f), f->size);
        for (int i = 0; i < len; i++) {
            raw[i] = take8(f);
        }
        addr = put(f, raw, len);
        break;
    case 2:
        addr = (uint64_t)take16(f) << PAGE_BITS;
        len = (take8(f) + 1) << PAGE_BITS;
        break;
    case 3:
        /* Longer buffers seldom are in RAM as a whole. */
        addr = (uint64_t)(take8(f) % (RAM_MB / 2 + 1)) << 21;
        len = (take8(f) % 8 + 1) << 21;
        break;
    case 4:
        id = config_read(f, offsetof(struct virtio_balloon_config,
                                     free_page_hint_cmd_id));
        id = cpu_to_le32(id + (int8_t)take8(f));
        len = sizeof(id);
        addr = put(f, &id, len);
        break;
    case 5:
        addr = put_stats(f, &len);
        break;
    case 6:
        addr = (kind & 0x10 ? MODERN : 0xa0000) + take8(f);
        len = take16(f);
        break;
    default:
        addr = (uint64_t)take32(f) << 8;
        len = take32(f);
        break;
    }
    return (struct vring_desc) {
        .addr = addr, .len = len, .flags = kind & 8 ? VRING_DESC_F_WRITE : 0,
    };
}

static void desc_to_le(struct vring_desc *d)
{
    d->addr = cpu_to_le64(d->addr);
    d->len = cpu_to_le32(d->len);
    d->flags = cpu_to_le16(d->flags);
    d->next = cpu_to_le16(d->next);
}

/* Change a descriptor or the ring so that the element is not valid any more. */
static void damage(Fuzz *f, Queue *q, struct vring_desc *descs, int n)
{
    struct vring_desc *d = &descs[take8(f) % n];
    uint8_t what = take8(f);
    uint16_t value = take16(f);

    switch (what % 6) {
    case 0:
        d->addr ^= (uint64_t)value << (what & 0x30);
        break;
    case 1:
        d->len = what & 0x40 ? (uint32_t)value << 16 : value;
        break;
    case 2:
        d->flags ^= value;
        break;
    case 3:
        d->next = value;
        d->flags |= VRING_DESC_F_NEXT;
        break;
    case 4:
        q->avail_idx += value;
        break;
    case 5:
        q->next += value;
        break;
    }
}

static void add_packed(Fuzz *f, Queue *q, struct vring_desc *descs, int n)
{
    uint64_t first = q->desc + q->next % q->size * sizeof(*descs);
    uint16_t id = q->next, first_flags = 0;

    for (int i = 0; i < n; i++) {
        struct vring_packed_desc d = {
            .addr = cpu_to_le64(descs[i].addr),
            .len = cpu_to_le32(descs[i].len),
            .id = cpu_to_le16(id),
        };
        uint16_t flags = descs[i].flags |
                         (i < n - 1 ? VRING_DESC_F_NEXT : 0) |
                         1 << (q->wrap ? VRING_PACKED_DESC_F_AVAIL
                                       : VRING_PACKED_DESC_F_USED);
        uint16_t slot = q->next;

        if (++q->next >= q->size) {
            q->next = 0;
            q->wrap = !q->wrap;
        }
        if (i == 0) {
            /* Only then can the device see the element. */
            first_flags = flags;
            flags = 0;
        }
        d.flags = cpu_to_le16(flags);
        qtest_memwrite(f->s, q->desc + slot % q->size * sizeof(d), &d,
                       sizeof(d));
    }
    qtest_writew(f->s, first + offsetof(struct vring_packed_desc, flags),
                 first_flags);
}

static void add_split(Fuzz *f, Queue *q, struct vring_desc *descs, int n)
{
    uint16_t head = q->next;

    for (int i = 0; i < n; i++) {
        uint16_t slot = q->next;

        q->next = (q->next + 1) % q->size;
        if (i < n - 1) {
            descs[i].flags |= VRING_DESC_F_NEXT;
            descs[i].next = descs[i].next ?: q->next;
        }
        desc_to_le(&descs[i]);
        qtest_memwrite(f->s, q->desc + slot % q->size * sizeof(*descs),
                       &descs[i], sizeof(*descs));
    }
    qtest_writew(f->s, q->avail + 4 + q->avail_idx % q->size * 2, head);
    q->avail_idx++;
    qtest_writew(f->s, q->avail + 2, q->avail_idx);
}

static void add_element(Fuzz *f, Queue *q, struct vring_desc *descs, int n,
                        bool indirect)
{
    bool packed = has(f, VIRTIO_F_RING_PACKED);

    if (indirect) {
        struct vring_desc table = {
            .len = n * sizeof(*descs), .flags = VRING_DESC_F_INDIRECT,
        };

        for (int i = 0; i < n; i++) {
            if (i < n - 1 && !packed) {
                descs[i].flags |= VRING_DESC_F_NEXT;
                descs[i].next = descs[i].next ?: i + 1;
            }
            desc_to_le(&descs[i]);
            if (packed) {
                /* The members are in another order. */
                struct vring_packed_desc d = {
                    .addr = descs[i].addr, .len = descs[i].len,
                    .flags = descs[i].flags,
                };

                memcpy(&descs[i], &d, sizeof(d));
            }
        }
        table.addr = put(f, descs, table.len);
        descs[0] = table;
        n = 1;
    }
    if (packed) {
        add_packed(f, q, descs, n);
    } else {
        add_split(f, q, descs, n);
    }
}

static void op_element(Fuzz *f)
{
    uint8_t shape = take8(f);
    int i = take8(f) % QUEUES;
    Queue *q = &f->queues[i];
    struct vring_desc descs[64];
    int n = (shape & 7) + 1;

    if (shape & 8) {
        n += take8(f) % (ARRAY_SIZE(descs) - 7);
    }
    for (int j = 0; j < n; j++) {
        descs[j] = take_buffer(f);
    }
    if (shape & 0x10) {
        damage(f, q, descs, n);
    }
    add_element(f, q, descs, n, shape & 0x20);
    if (!(shape & 0x40)) {
        kick(f, i);
        flush_events(f->s);
    }
    if (shape & 0x80) {
        let_others_run(f, 100);
    }
}

/*
 * Operations of the host
 */

static void read_properties(Fuzz *f)
{
    static const char *const names[] = {
        "guest-stats", "guest-stats-polling-interval", "balloon-status",
        "balloon-counters",
    };

    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        if (object_property_find(OBJECT(f->dev), names[i])) {
            qobject_unref(object_property_get_qobject(OBJECT(f->dev),
                                                      names[i], NULL));
        }
    }
    qapi_free_BalloonInfo(qmp_query_balloon(NULL));
}

static void request_stats(Fuzz *f)
{
    object_property_set_bool(OBJECT(f->dev), "guest-stats-request", true, NULL);
}

static void set_discard_disabled(Fuzz *f, bool disabled)
{
    if (f->discard_disabled != disabled) {
        ram_block_discard_disable(disabled);
        f->discard_disabled = disabled;
    }
}

/*
 * Whether there still is something of a migration.  migration_is_running() is
 * false before everything is cleaned up; another migration would abort then.
 */
static bool is_migrating(void)
{
    YankInstanceList *list = qmp_query_yank(NULL), *i;
    bool found = false;

    for (i = list; i; i = i->next) {
        found |= i->value->type == YANK_INSTANCE_TYPE_MIGRATION;
    }
    qapi_free_YankInstanceList(list);
    return found;
}

static void start_migration(Fuzz *f)
{
    static char *uri;
    Error *err = NULL;

    if (is_migrating()) {
        return;
    }
    if (!uri) {
        uri = g_strdup_printf("file:/proc/self/fd/%d",
                              qemu_memfd_create("stream", 0, false, 0, 0,
                                                &error_abort));
    }
    /*
     * It is limited to so few bytes in a second that it only ends by itself if
     * the driver has hinted nearly all memory.
     */
    qmp_migrate(uri, false, NULL, false, false, false, false, &err);
    /* There are states of the VM in which it cannot be migrated. */
    if (err && runstate_is_running()) {
        error_report_err(err);
        abort();
    }
    error_free(err);
    /* If the device is to get a request for hints, this is enough. */
    for (int i = 0; i < 20 && migration_is_running(); i++) {
        let_others_run(f, 100);
    }
}

static void cancel_migration(Fuzz *f)
{
    if (migration_is_running()) {
        qmp_migrate_cancel(NULL);
    }
    while (is_migrating()) {
        let_others_run(f, 100);
    }
    flush_events(f->s);
}

/* Have the host run out of memory for what leaves the balloon. */
static bool no_memory;

int __real_qemu_madvise(void *addr, size_t len, int advice);
int __wrap_qemu_madvise(void *addr, size_t len, int advice);

int __wrap_qemu_madvise(void *addr, size_t len, int advice)
{
    if (no_memory && advice == QEMU_MADV_POPULATE_WRITE) {
        errno = ENOMEM;
        return -1;
    }
    return __real_qemu_madvise(addr, len, advice);
}

static void run_vm(bool run)
{
    RunState state;

    /* The device can stop the VM. */
    if (qemu_vmstop_requested(&state)) {
        vm_stop(state);
    }
    if (run) {
        qmp_cont(NULL);
    } else {
        qmp_stop(NULL);
    }
}

/* Save the device, and load it again after a reset, as migration does. */
static void save_and_load(Fuzz *f, uint16_t at, uint8_t change)
{
    VirtIODevice *vdev = virtio_bus_get_device(&VIRTIO_PCI(f->dev)->bus);
    const VMStateDescription *vmsd = qdev_get_vmsd(DEVICE(vdev));
    QIOChannelBuffer *bioc = qio_channel_buffer_new(0x1000);
    PCIBus *pci_bus = pci_get_bus(PCI_DEVICE(f->dev));
    bool running = runstate_is_running(), loaded;
    QEMUFile *file, *input;

    cancel_migration(f);
    run_vm(false);
    file = qemu_file_new_output(QIO_CHANNEL(bioc));
    vmstate_save_state(file, vmsd, vdev, NULL, &error_abort);
    qemu_fflush(file);
    if (change) {
        bioc->data[at % bioc->usage] ^= change;
    }
    /* What looks for another subsection must not meet the end. */
    qemu_put_buffer(file, (const uint8_t[512]) {}, 512);
    qemu_fflush(file);
    qio_channel_io_seek(QIO_CHANNEL(bioc), 0, SEEK_SET, &error_abort);
    device_cold_reset(f->dev);
    input = qemu_file_new_input(QIO_CHANNEL(bioc));
    /* It is refused if the input has damaged it, or the rings. */
    loaded = vmstate_load_state(input, vmsd, vdev, vmsd->version_id, NULL) >= 0;
    /* The bus, which is not migrated here, counts the interrupts. */
    PCI_DEVICE(f->dev)->irq_state = 0;
    memset(pci_bus->irq_count, 0, pci_bus->nirq * sizeof(*pci_bus->irq_count));
    if (!loaded) {
        device_cold_reset(f->dev);
    }
    /* This closes the channel, and what is in it is lost. */
    qemu_fclose(file);
    qemu_fclose(input);
    object_unref(OBJECT(bioc));
    run_vm(running);
}

static void reset_queue(Fuzz *f, uint8_t i, uint8_t shape)
{
    qtest_writew(f->s, COMMON + VIRTIO_PCI_COMMON_Q_SELECT, i);
    qtest_writew(f->s, COMMON + VIRTIO_PCI_COMMON_Q_RESET, 1);
    if (i < QUEUES && !(shape & 0x80)) {
        set_up_queue(f, i, shape);
    }
}

static void raw_write(Fuzz *f, uint64_t base, uint32_t size, bool io)
{
    uint8_t width = take8(f);
    uint64_t addr = base + take16(f) % size;
    uint32_t value = take32(f);

    switch (width % 3) {
    case 0:
        if (io) {
            qtest_outb(f->s, addr, value);
        } else {
            qtest_writeb(f->s, addr, value);
        }
        break;
    case 1:
        if (io) {
            qtest_outw(f->s, addr, value);
        } else {
            qtest_writew(f->s, addr, value);
        }
        break;
    case 2:
        if (io) {
            qtest_outl(f->s, addr, value);
        } else {
            qtest_writel(f->s, addr, value);
        }
        break;
    }
}

static void operation(Fuzz *f)
{
    uint8_t op = take8(f), arg;
    uint16_t more;

    switch (op % 32) {
    case 0 ... 9:
        op_element(f);
        break;
    case 10:
        kick(f, take8(f) % 8);
        break;
    case 11:
        let_others_run(f, 1000);
        break;
    case 12:
        qtest_clock_step(f->s, (take8(f) + 1) * 100LL * SCALE_MS);
        flush_events(f->s);
        break;
    case 13:
        qmp_balloon((int64_t)take16(f) << 12, NULL);
        break;
    case 14:
        arg = take8(f) % sizeof(struct virtio_balloon_config);
        config_write(f, arg & ~3, take32(f));
        break;
    case 15:
        config_read(f, take8(f) & 0xfc);
        break;
    case 16:
        set_status(f, take8(f));
        break;
    case 17:
        more = take16(f);
        negotiate(f, more, take8(f));
        break;
    case 18:
        run_vm(take8(f) & 1);
        break;
    case 19:
        arg = take8(f);
        object_property_set_int(OBJECT(f->dev), "guest-stats-polling-interval",
                                arg < 0xc0 ? arg : (arg - 0xe0) * (1LL << 32),
                                NULL);
        break;
    case 20:
        if (op & 0x80) {
            more = take16(f);
            save_and_load(f, more, take8(f));
        } else {
            read_properties(f);
        }
        break;
    case 21:
        request_stats(f);
        break;
    case 22:
        start_migration(f);
        break;
    case 23:
        cancel_migration(f);
        break;
    case 24:
        arg = take8(f) % 8;
        reset_queue(f, arg, take8(f));
        break;
    case 25:
        raw_write(f, MODERN, MODERN_SIZE, false);
        break;
    case 26:
        raw_write(f, LEGACY, 0x40, true);
        break;
    case 27:
        raw_write(f, 0x10000, QUEUES * QUEUE_SIZE, false);
        break;
    case 28:
        unplug(f);
        plug(f);
        negotiate(f, 0, 0);
        break;
    case 29:
        arg = take8(f);
        set_discard_disabled(f, arg & 1);
        no_memory = arg & 2;
        break;
    case 30:
        /* What is mapped, or the window to the BARs */
        arg = take8(f);
        if (arg < 0x40) {
            pci_config_write(f, HOST_BRIDGE, PAM + (arg & 4), take32(f));
        } else {
            pci_config_write(f, DEVFN, arg, take32(f));
        }
        break;
    case 31:
        qemu_system_reset(SHUTDOWN_CAUSE_GUEST_RESET);
        set_bars(f);
        negotiate(f, 0, 0);
        break;
    }
}

/* Whatever happened: after a reset, the device does what it is for. */
static void check_that_it_works(Fuzz *f)
{
    struct vring_desc d = { .len = 4 };
    uint32_t pfn = cpu_to_le32(0x900);
    Queue *q = &f->queues[0];

    f->legacy = false;
    negotiate(f, 1 << 8, 0);
    d.addr = put(f, &pfn, sizeof(pfn));
    add_split(f, q, &d, 1);
    kick(f, 0);
    for (int i = 0; qtest_readw(f->s, q->used + 2) != 1; i++) {
        if (i == PATIENCE) {
            fprintf(stderr, "the device does not work after a reset\n");
            abort();
        }
        let_others_run(f, i ? 1000 : 0);
    }
}

static void virtio_balloon_fuzz(QTestState *s, const unsigned char *data,
                                size_t size)
{
    Fuzz f = { .s = s, .data = data, .size = size, .next_buffer = BUFFERS };
    uint16_t refused;

    plug(&f);
    refused = take16(&f);
    negotiate(&f, refused, take8(&f));
    while (f.size) {
        operation(&f);
    }

    cancel_migration(&f);
    set_discard_disabled(&f, false);
    no_memory = false;
    run_vm(true);
    pci_config_write(&f, HOST_BRIDGE, PAM, 0);
    pci_config_write(&f, HOST_BRIDGE, PAM + 4, 0);
    set_bars(&f);
    check_that_it_works(&f);
    unplug(&f);
}

static GString *get_cmd_line(FuzzTarget *t)
{
    GString *cmd_line = g_string_new(TARGET_NAME);
    /* for the last part of the memory */
    bool huge = qtest_available_huge_pages() >= 12;

    g_string_append_printf(cmd_line,
        " -machine pc,accel=qtest -nodefaults -display none -m %d"
        " -object iothread,id=iothread"
        " -object memory-backend-ram,id=private,size=24M"
        " -object memory-backend-memfd,id=shared,size=16M"
        " -object memory-backend-memfd,id=other,size=24M%s"
        " -numa node,memdev=private -numa node,memdev=shared"
        " -numa node,memdev=other -global migration.x-max-bandwidth=1",
        RAM_MB, huge ? ",hugetlb=on,hugetlbsize=2M" : "");
    return cmd_line;
}

static void register_virtio_balloon_fuzz_target(void)
{
    fuzz_add_target(&(FuzzTarget) {
        .name = "virtio-balloon",
        .description = "Fuzz virtio-balloon with elements of a driver",
        .get_init_cmdline = get_cmd_line,
        .fuzz = virtio_balloon_fuzz,
    });
}

fuzz_target_init(register_virtio_balloon_fuzz_target);
