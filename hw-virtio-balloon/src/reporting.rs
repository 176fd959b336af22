// SPDX-License-Identifier: GPL-2.0-or-later

//! Free page reporting (virtio 1.3, section 5.5.6.8)

use system::RamBlock;
use virtio::{events::trace_virtio_balloon_bad_addr, InBuffer, VirtQueue};

use crate::device::VirtIOBalloon;

impl VirtIOBalloon {
    /// The driver reports pages that are free at the moment.
    pub fn handle_reports(&self, vq: VirtQueue<'_>) {
        while let Some(elem) = vq.pop() {
            // A page that is discarded reads as zeroes when the guest uses it
            // again.  That is no good if somebody else is still using it, or
            // if the guest expects to find its poison there.
            if !Self::discard_inhibited() && self.poison_val.get() == 0 {
                elem.in_buffers().for_each(|buf| discard_reported(&buf));
            }
            elem.push(0);
            vq.notify();
        }
    }
}

fn discard_reported(buf: &InBuffer<'_>) {
    // Anything but RAM was mapped through a bounce buffer, and fails the lookup.
    let Some((block, offset)) = RamBlock::from_host(&buf.range) else {
        trace_virtio_balloon_bad_addr(buf.addr);
        return;
    };

    let len = buf.range.len() as u64;
    let in_block = offset
        .checked_add(len)
        .is_some_and(|end| end <= block.used_length());
    // Ignore parts of host pages, and what exceeds the block.
    if in_block && (offset | len) & (block.page_size() - 1) == 0 {
        // An error was reported already, and only means that the host does not
        // get the memory.
        let _ = block.discard_range(offset, len);
    }
}
