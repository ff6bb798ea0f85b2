//! A server whose connections must survive a move, and the client that would notice if one did not.
//!
//! What a connection is for is said by its first byte, [`Kind`]. Every byte after it can be computed by the other side, so
//! that one which is lost, repeated or damaged is found.

pub mod client;
pub mod server;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Eight bytes there, the same eight back.
    Echo,
    /// The server sends as much as gets through.
    Bulk,
    /// The client sends as much as gets through, and hears after each [`CHUNK`] how much was right.
    Upload,
    /// The client has said all it has to say; the server counts, every [`TICK_MS`] milliseconds.
    Ticks,
}

/// Bytes of an upload between two answers.
pub const CHUNK: u64 = 1 << 20;
/// Milliseconds between two numbers on a connection whose client has closed its half.
pub const TICK_MS: u64 = 10;

impl Kind {
    /// Its byte.
    pub fn byte(self) -> u8 {
        match self {
            Self::Echo => b'E',
            Self::Bulk => b'B',
            Self::Upload => b'U',
            Self::Ticks => b'T',
        }
    }

    /// What a byte says.
    pub fn of(byte: u8) -> Option<Self> {
        [Self::Echo, Self::Bulk, Self::Upload, Self::Ticks].into_iter().find(|kind| kind.byte() == byte)
    }
}

/// The byte at a place of an endless stream. No two near blocks are equal.
pub fn stream_byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Fills `into` with the stream from a place on.
pub fn fill(into: &mut [u8], from: u64) {
    for (byte, at) in into.iter_mut().zip(from..) {
        *byte = stream_byte(at);
    }
}

/// Whether these bytes are the stream from a place on.
pub fn is_stream(bytes: &[u8], from: u64) -> bool {
    bytes.iter().zip(from..).all(|(byte, at)| *byte == stream_byte(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_lost_or_repeated_something_is_noticed() {
        let mut bytes = [0; 4096];
        fill(&mut bytes, 777);
        assert!(is_stream(&bytes, 777));
        for wrong in [776, 778, 777 + 1448, 0] {
            assert!(!is_stream(&bytes, wrong), "{wrong}");
        }
        bytes[4000] ^= 1;
        assert!(!is_stream(&bytes, 777));
    }
}
