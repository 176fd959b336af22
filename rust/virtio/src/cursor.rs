// SPDX-License-Identifier: GPL-2.0-or-later

//! A position in the buffers of an element

use std::{ffi::c_void, marker::PhantomData};

use crate::bindings;

/// A position in an array of buffers, from which data can be copied.  The
/// memory is only copied, and only by C code: the guest can change it at any
/// time, so there must not be any references to it.
#[derive(Clone)]
pub struct Cursor<'a> {
    /// Points to `count` entries
    sg: *const bindings::iovec,
    /// Number of entries left in `sg`
    count: u32,
    /// How many bytes of the first entry were already copied; less than its
    /// size, or 0
    offset: usize,
    _marker: PhantomData<&'a bindings::iovec>,
}

impl Cursor<'_> {
    /// # Safety
    ///
    /// `sg` must point to `count` entries that do not change, and refer to
    /// memory that stays mapped, for as long as the caller chooses the
    /// lifetime to be.
    pub const unsafe fn new(sg: *const bindings::iovec, count: u32) -> Self {
        Self {
            sg,
            count,
            offset: 0,
            _marker: PhantomData,
        }
    }

    /// Whether there is nothing left
    pub const fn is_at_end(&self) -> bool {
        self.count == 0
    }

    /// The number of bytes that are left in the first entry
    fn left_in_entry(&self) -> Option<usize> {
        // SAFETY: there is at least one entry left if the count is not zero
        (self.count > 0).then(|| unsafe { (*self.sg).iov_len } - self.offset)
    }

    /// Advance by a number of bytes, or to the end if fewer bytes are left.
    /// Returns how many bytes were missing.
    pub fn advance(&mut self, mut bytes: usize) -> usize {
        while let Some(left) = self.left_in_entry() {
            if bytes < left {
                self.offset += bytes;
                return 0;
            }
            bytes -= left;
            self.offset = 0;
            self.count -= 1;
            // SAFETY: there was an entry left, so this is at most one past the
            // end of the array
            self.sg = unsafe { self.sg.add(1) };
        }
        bytes
    }

    /// Copy as much data as is left, or fits into the argument, and advance by
    /// that.  Returns the number of bytes.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        if self.count == 0 {
            return 0;
        }

        // SAFETY: the caller of new() has promised `count` mapped entries.  The
        // offset is less than the size of the first (or zero), as the function
        // demands; and it copies at most `data.len()` bytes.
        let copied = unsafe {
            bindings::iov_to_buf_full(
                self.sg,
                self.count,
                self.offset,
                data.as_mut_ptr().cast::<c_void>(),
                data.len(),
            )
        };
        self.advance(copied);
        copied
    }

    /// Copy all of the argument to the buffers, and advance by its size.  Does
    /// nothing and returns false if there is not enough room.
    pub fn write(&mut self, data: &[u8]) -> bool {
        let mut end = self.clone();
        if end.advance(data.len()) != 0 {
            return false;
        }
        if self.count > 0 {
            // SAFETY: see read().  Rust code has no references to guest memory,
            // hence `data` does not overlap it.
            unsafe {
                bindings::iov_from_buf_full(
                    self.sg,
                    self.count,
                    self.offset,
                    data.as_ptr().cast::<c_void>(),
                    data.len(),
                );
            }
        }
        *self = end;
        true
    }
}
