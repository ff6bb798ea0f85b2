//! What is read beyond what was asked for: a frame comes in fewer system calls when the next one begins with the end of a large payload.

use std::io::IoSliceMut;

/// Bytes that have come and were not asked for yet.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

impl ReadAhead {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.to - self.from
    }

    /// Those that there are.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.from..self.to]
    }

    /// Fills `slices` from the front as far as it goes; says with how many bytes.
    pub(super) fn take(&mut self, slices: &mut [IoSliceMut<'_>]) -> usize {
        let before = self.from;
        for slice in slices {
            let len = slice.len().min(self.len());
            slice[..len].copy_from_slice(&self.bytes[self.from..self.from + len]);
            self.from += len;
        }
        self.from - before
    }

    /// Room for `len` bytes more; nothing may be left of those before.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        debug_assert_eq!(self.len(), 0);
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        &mut self.bytes[..len]
    }

    /// So many bytes have come into the room.
    pub(super) fn came(&mut self, bytes: usize) {
        (self.from, self.to) = (0, bytes);
    }
}
