// SPDX-License-Identifier: GPL-2.0-or-later

//! Checked access to the data that the driver has sent

use crate::cursor::Cursor;

const BUF_SIZE: usize = 1024;

/// Reads the buffers of an element from start to end, regardless of how the
/// driver has divided the data into descriptors.  Multi-byte values are
/// converted from the device's endianness.
///
/// The data is copied, so the guest cannot change it after the device has
/// checked it.
pub struct OutReader<'a> {
    /// The position after the data in `buf`
    cursor: Cursor<'a>,
    buf: [u8; BUF_SIZE],
    /// The part of `buf` that was not read yet
    start: usize,
    end: usize,
    /// The number of bytes that were read
    position: usize,
    big_endian: bool,
}

macro_rules! impl_read {
    ($name:ident, $t:ty) => {
        /// Read an integer; `None` if there are not enough bytes left.
        #[inline]
        pub fn $name(&mut self) -> Option<$t> {
            self.read_array().map(if self.big_endian {
                <$t>::from_be_bytes
            } else {
                <$t>::from_le_bytes
            })
        }
    };
}

impl<'a> OutReader<'a> {
    pub(crate) const fn new(cursor: Cursor<'a>, big_endian: bool) -> Self {
        Self {
            cursor,
            buf: [0; BUF_SIZE],
            start: 0,
            end: 0,
            position: 0,
            big_endian,
        }
    }

    fn refill(&mut self) {
        self.start = 0;
        self.end = self.cursor.read(&mut self.buf).min(BUF_SIZE);
    }

    /// Number of bytes that were read so far; see [`skip`](Self::skip)
    pub const fn position(&self) -> usize {
        self.position
    }

    /// Whether everything was read
    pub const fn is_at_end(&self) -> bool {
        self.start == self.end && self.cursor.is_at_end()
    }

    /// Skip bytes, for example those that were read earlier with another
    /// reader.  If fewer bytes are left, skips all of them.
    #[must_use]
    pub fn skip(mut self, bytes: usize) -> Self {
        self.position = self.position.saturating_add(bytes);

        let buffered = bytes.min(self.end - self.start);
        self.start += buffered;
        self.cursor.advance(bytes - buffered);
        self
    }

    /// Read exactly `N` bytes; if fewer bytes are left, skips them and returns
    /// `None`.
    #[inline]
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if let Some(data) = self.buf[self.start..self.end].first_chunk::<N>() {
            self.start += N;
            self.position += N;
            return Some(*data);
        }

        self.read_array_slow()
    }

    /// Like [`read_array`](Self::read_array), for data that is not completely
    /// in `buf`
    fn read_array_slow<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut out = [0; N];
        let mut done = 0;
        while done < N {
            if self.start == self.end {
                self.refill();
                if self.end == 0 {
                    return None;
                }
            }
            let n = (N - done).min(self.end - self.start);
            out[done..done + n].copy_from_slice(&self.buf[self.start..self.start + n]);
            self.start += n;
            self.position += n;
            done += n;
        }
        Some(out)
    }

    impl_read!(read_u8, u8);
    impl_read!(read_u16, u16);
    impl_read!(read_u32, u32);
    impl_read!(read_u64, u64);
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::bindings;

    fn iovecs(parts: &[&[u8]]) -> Vec<bindings::iovec> {
        parts
            .iter()
            .map(|part| bindings::iovec {
                iov_base: part.as_ptr().cast::<c_void>().cast_mut(),
                iov_len: part.len(),
            })
            .collect()
    }

    fn reader(iov: &[bindings::iovec], big_endian: bool) -> OutReader<'_> {
        // SAFETY: the entries refer to slices that live as long as the test
        let cursor = unsafe { Cursor::new(iov.as_ptr(), iov.len() as u32) };
        OutReader::new(cursor, big_endian)
    }

    #[test]
    fn test_endianness() {
        let iov = iovecs(&[&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]);

        let mut r = reader(&iov, false);
        assert_eq!(r.read_u16(), Some(0x0201));
        assert_eq!(r.read_u32(), Some(0x0605_0403));
        assert_eq!(r.read_u64(), Some(0x0e0d_0c0b_0a09_0807));
        assert_eq!(r.read_u8(), None);

        let mut big = reader(&iov, true);
        assert_eq!(big.read_u16(), Some(0x0102));
        assert_eq!(big.read_u32(), Some(0x0304_0506));
        assert_eq!(big.read_u64(), Some(0x0708_090a_0b0c_0d0e));
    }

    #[test]
    fn test_values_across_descriptors() {
        let iov = iovecs(&[&[1], &[2, 3], &[4, 5, 6, 7, 8, 9], &[10]]);
        let mut r = reader(&iov, true);
        assert_eq!(r.read_u32(), Some(0x0102_0304));
        assert_eq!(r.read_u32(), Some(0x0506_0708));
        // two bytes are left, which are not enough for an integer
        assert_eq!(r.read_u32(), None);
        assert_eq!(r.read_u16(), None);
    }

    #[test]
    fn test_empty() {
        assert_eq!(reader(&[], false).read_u16(), None);
        assert_eq!(reader(&[], false).read_array::<0>(), Some([]));

        let iov = iovecs(&[&[], &[1], &[], &[2], &[]]);
        let mut r = reader(&iov, false);
        assert!(!r.is_at_end());
        assert_eq!(r.read_u16(), Some(0x0201));
        assert!(r.is_at_end());
        assert!(reader(&[], false).is_at_end());
    }

    // More data than the reader copies at once, in buffers of various sizes
    #[test]
    fn test_long() {
        let data: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        for step in [1, 3, 7, 1021, BUF_SIZE, BUF_SIZE + 1, 40_000] {
            let parts: Vec<_> = data.chunks(step).collect();
            let iov = iovecs(&parts);
            let mut r = reader(&iov, false);
            for i in 0..10_000 {
                assert_eq!(r.read_u32(), Some(i));
            }
            assert_eq!(r.read_u32(), None);
        }
    }

    #[test]
    fn test_skip() {
        let data: Vec<u8> = (0..3000u32).flat_map(u32::to_le_bytes).collect();
        for step in [1, 5, 1024, 1025, 5000, 12_000] {
            let parts: Vec<_> = data.chunks(step).collect();
            let iov = iovecs(&parts);
            for n in [0, 1, 255, 256, 257, 1250, 2999] {
                let mut first = reader(&iov, false);
                for _ in 0..n {
                    first.read_u32();
                }
                assert_eq!(first.position(), 4 * n);
                // with the same reader, and with a new one
                assert_eq!(first.skip(0).read_u32(), Some(n as u32));
                let mut r = reader(&iov, false).skip(2 * n).skip(2 * n);
                assert_eq!(r.position(), 4 * n);
                assert_eq!(r.read_u32(), Some(n as u32));
            }
            assert_eq!(reader(&iov, false).skip(12_000).read_u16(), None);
            let r = reader(&iov, false).skip(usize::MAX - 1);
            assert_eq!({ r }.read_u16(), None);
        }
    }
}
