/*
 * The reset of single queues (VIRTIO_F_RING_RESET), for tests of virtio-balloon
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "virtio-balloon-queue-reset.h"
#include "standard-headers/linux/virtio_pci.h"

uint16_t read_common(Balloon *b, int q, uint64_t field)
{
    b->dev->bus->queue_select(b->dev, q);
    return qpci_io_readw(b->pci->pdev, b->pci->bar,
                         b->pci->common_cfg_offset + field);
}

void write_common(Balloon *b, int q, uint64_t field, uint16_t value)
{
    b->dev->bus->queue_select(b->dev, q);
    qpci_io_writew(b->pci->pdev, b->pci->bar,
                   b->pci->common_cfg_offset + field, value);
}

bool is_enabled(Balloon *b, int q)
{
    return read_common(b, q, VIRTIO_PCI_COMMON_Q_ENABLE);
}

void reset_queue(Balloon *b, int q)
{
    write_common(b, q, VIRTIO_PCI_COMMON_Q_RESET, 1);
    WAIT_FOR(!read_common(b, q, VIRTIO_PCI_COMMON_Q_RESET));
    g_assert_false(is_enabled(b, q));
}

void reenable_queue(Balloon *b, int q, uint32_t size)
{
    QVirtQueue *vq = b->vq[q];

    g_assert_false(is_enabled(b, q));
    vq->size = size;
    qvring_init(b->qts, b->alloc, vq,
                guest_alloc(b->alloc, qvring_size(size, vq->align)));
    qvirtqueue_reset_pool(vq);
    vq->last_used_idx = 0;
    write_common(b, q, VIRTIO_PCI_COMMON_Q_SIZE, size);
    b->dev->bus->set_queue_address(b->dev, vq);
    write_common(b, q, VIRTIO_PCI_COMMON_Q_ENABLE, 1);
    g_assert_true(is_enabled(b, q));
}

void replace_ring(Balloon *b, int q, uint32_t size)
{
    uint64_t old = b->vq[q]->desc;

    reset_queue(b, q);
    reenable_queue(b, q, size);
    guest_free(b->alloc, old);
}

OldRing save_ring(Balloon *b, int q)
{
    QVirtQueue *vq = b->vq[q];
    OldRing ring = {
        .addr = vq->desc, .len = qvring_size(vq->size, vq->align),
    };

    ring.data = g_malloc(ring.len);
    qtest_memread(b->qts, ring.addr, ring.data, ring.len);
    return ring;
}

void assert_ring_unchanged(Balloon *b, const OldRing *ring)
{
    g_autofree uint8_t *data = g_malloc(ring->len);

    qtest_memread(b->qts, ring->addr, data, ring->len);
    g_assert_cmpmem(data, ring->len, ring->data, ring->len);
}

void release_ring(Balloon *b, OldRing *ring)
{
    assert_ring_unchanged(b, ring);
    guest_free(b->alloc, ring->addr);
    g_free(ring->data);
}
