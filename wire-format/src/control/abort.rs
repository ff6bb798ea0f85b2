//! Why a side gives up, as a number and in a word.

use bincode::{Decode, Encode};

/// Why one side gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortCode {
    /// Another migration is being received.
    Busy,
    /// No common version.
    VersionMismatch,
    /// The pages do not fit.
    OutOfMemory,
    /// A frame that is not valid, or came at the wrong time.
    BadFrame,
    /// Bytes that do not match their digest.
    DigestMismatch,
    /// The two sides do not agree on the memory.
    SealMismatch,
    /// CRIU could not restore.
    RestoreFailed,
    /// The restored memory is not that of the frozen source.
    VerifyFailed,
    /// Somebody asked to stop.
    Cancelled,
    /// The source failed.
    SourceFailed,
    /// Anything else.
    Internal,
    /// Destination: the commit had been accepted; the program ran there, or may have for a moment, and was ended.
    Ended,
    /// A code of a later version.
    Unknown(u16),
}

impl AbortCode {
    const KNOWN: [(AbortCode, u16, &'static str); 12] = [
        (AbortCode::Busy, 1, "busy"),
        (AbortCode::VersionMismatch, 2, "version mismatch"),
        (AbortCode::OutOfMemory, 3, "out of memory"),
        (AbortCode::BadFrame, 4, "bad frame"),
        (AbortCode::DigestMismatch, 5, "digest mismatch"),
        (AbortCode::SealMismatch, 6, "seal mismatch"),
        (AbortCode::RestoreFailed, 7, "restore failed"),
        (AbortCode::VerifyFailed, 8, "verify failed"),
        (AbortCode::Cancelled, 9, "cancelled"),
        (AbortCode::SourceFailed, 10, "source failed"),
        (AbortCode::Internal, 11, "internal"),
        (AbortCode::Ended, 12, "ended after the commit"),
    ];

    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            AbortCode::Unknown(number) => number,
            known => Self::KNOWN.iter().find(|(code, ..)| *code == known).map_or(0, |(_, number, _)| *number),
        }
    }

    /// The code of a number.
    pub fn from_number(number: u16) -> Self {
        Self::KNOWN.iter().find(|(_, n, _)| *n == number).map_or(Self::Unknown(number), |(code, ..)| *code)
    }
}

impl std::fmt::Display for AbortCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Self::KNOWN.iter().find(|(code, ..)| code == self) {
            Some((_, _, name)) => f.write_str(name),
            None => write!(f, "code {}", self.number()),
        }
    }
}

impl Encode for AbortCode {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.number().encode(encoder)
    }
}

impl<Context> Decode<Context> for AbortCode {
    fn decode<D: bincode::de::Decoder<Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        Ok(Self::from_number(u16::decode(decoder)?))
    }
}

bincode::impl_borrow_decode!(AbortCode);
