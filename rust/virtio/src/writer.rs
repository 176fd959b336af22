// SPDX-License-Identifier: GPL-2.0-or-later

//! Checked access to the buffers for the driver

use crate::cursor::Cursor;

/// Fills the buffers of an element from start to end, regardless of how the
/// driver has divided them into descriptors.  Multi-byte values are converted
/// to the device's endianness.
///
/// A value is written as a whole: if there is not enough room left for it, the
/// functions return `None` and do not write anything.
///
/// # Examples
///
/// ```no_run
/// # use virtio::prelude::*;
/// /// Answer a request with a status and the time, as far as they fit.
/// fn answer(elem: VirtQueueElement, time: u64) {
///     let mut writer = elem.in_writer();
///     let _ = writer.write_u32(0).and_then(|()| writer.write_u64(time));
///     let written = writer.position();
///     elem.push(written);
/// }
/// ```
pub struct InWriter<'a> {
    cursor: Cursor<'a>,
    /// The number of bytes that were written
    position: usize,
    big_endian: bool,
}

macro_rules! impl_write {
    ($name:ident, $t:ty) => {
        /// Write an integer; `None` if there is not enough room left.
        #[inline]
        #[must_use = "nothing was written if this is None"]
        pub fn $name(&mut self, value: $t) -> Option<()> {
            self.write_slice(&if self.big_endian {
                value.to_be_bytes()
            } else {
                value.to_le_bytes()
            })
        }
    };
}

impl<'a> InWriter<'a> {
    pub(crate) const fn new(cursor: Cursor<'a>, big_endian: bool) -> Self {
        Self {
            cursor,
            position: 0,
            big_endian,
        }
    }

    /// Number of bytes that were written so far; the argument for
    /// [`push`](crate::VirtQueueElement::push)
    pub const fn position(&self) -> usize {
        self.position
    }

    /// Write all bytes of a slice; `None` if there is not enough room left.
    #[must_use = "nothing was written if this is None"]
    pub fn write_slice(&mut self, data: &[u8]) -> Option<()> {
        self.cursor.write(data).then(|| self.position += data.len())
    }

    /// Write an array; `None` if there is not enough room left.
    #[inline]
    #[must_use = "nothing was written if this is None"]
    pub fn write_array<const N: usize>(&mut self, data: [u8; N]) -> Option<()> {
        self.write_slice(&data)
    }

    impl_write!(write_u8, u8);
    impl_write!(write_u16, u16);
    impl_write!(write_u32, u32);
    impl_write!(write_u64, u64);
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::bindings;

    /// Buffers of the given sizes, filled with 0xff
    struct Buffers {
        parts: Vec<Vec<u8>>,
        iov: Vec<bindings::iovec>,
    }

    impl Buffers {
        fn new(sizes: impl IntoIterator<Item = usize>) -> Self {
            let mut parts: Vec<_> = sizes.into_iter().map(|size| vec![0xff; size]).collect();
            let iov = parts
                .iter_mut()
                .map(|part| bindings::iovec {
                    iov_base: part.as_mut_ptr().cast::<c_void>(),
                    iov_len: part.len(),
                })
                .collect();
            Self { parts, iov }
        }

        fn writer(&self, big_endian: bool) -> InWriter<'_> {
            // SAFETY: the entries refer to memory that lives as long as `self`
            let cursor = unsafe { Cursor::new(self.iov.as_ptr(), self.iov.len() as u32) };
            InWriter::new(cursor, big_endian)
        }

        fn contents(&self) -> Vec<u8> {
            self.parts.concat()
        }
    }

    #[test]
    fn test_little_endian() {
        let buffers = Buffers::new([15]);
        let mut w = buffers.writer(false);
        assert_eq!(w.position(), 0);
        w.write_u16(0x0201).unwrap();
        w.write_u32(0x0605_0403).unwrap();
        w.write_u64(0x0e0d_0c0b_0a09_0807).unwrap();
        w.write_u8(0x0f).unwrap();
        assert_eq!(w.position(), 15);
        assert_eq!(buffers.contents(), (1..=15).collect::<Vec<_>>());
    }

    #[test]
    fn test_big_endian() {
        let buffers = Buffers::new([14]);
        let mut w = buffers.writer(true);
        w.write_u16(0x0102).unwrap();
        w.write_u32(0x0304_0506).unwrap();
        w.write_u64(0x0708_090a_0b0c_0d0e).unwrap();
        assert_eq!(buffers.contents(), (1..=14).collect::<Vec<_>>());
    }

    #[test]
    fn test_values_across_descriptors() {
        let buffers = Buffers::new([1, 0, 2, 6, 1]);
        let mut w = buffers.writer(true);
        w.write_u32(0x0102_0304).unwrap();
        w.write_u32(0x0506_0708).unwrap();
        // two bytes are left, so nothing is written
        assert_eq!(w.write_u32(0), None);
        assert_eq!(w.position(), 8);
        assert_eq!(buffers.contents(), [1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0xff]);
        // two bytes are enough for a smaller value
        w.write_array([9, 10]).unwrap();
        assert_eq!(w.position(), 10);
        assert_eq!(w.write_u8(0), None);
        assert_eq!(buffers.contents(), (1..=10).collect::<Vec<_>>());
    }

    #[test]
    fn test_empty() {
        for buffers in [Buffers::new([]), Buffers::new([0, 0])] {
            let mut w = buffers.writer(false);
            assert_eq!(w.write_array([]), Some(()));
            assert_eq!(w.write_slice(&[]), Some(()));
            assert_eq!(w.write_u8(1), None);
            assert_eq!(w.write_slice(&[1]), None);
            assert_eq!(w.position(), 0);
        }
    }

    // Slices and buffers of various sizes
    #[test]
    fn test_long() {
        let data: Vec<u8> = (0..3000u32).flat_map(u32::to_le_bytes).collect();
        for step in [1, 3, 7, 1021, 1024, 12_000] {
            for size in [1, 2, 5, 1000, 11_999, 12_000] {
                let full = 12_000 / size * size;
                let buffers = Buffers::new((0..12_000 / size).map(|_| size));
                let mut w = buffers.writer(false);
                let mut written = 0;
                for slice in data.chunks(step) {
                    let fits = written + slice.len() <= full;
                    assert_eq!(w.write_slice(slice).is_some(), fits);
                    if !fits {
                        break;
                    }
                    written += slice.len();
                }
                assert_eq!(w.position(), written);
                let contents = buffers.contents();
                assert_eq!(contents[..written], data[..written]);
                assert!(contents[written..].iter().all(|byte| *byte == 0xff));
            }
        }
    }
}
