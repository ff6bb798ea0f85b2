//! Magic numbers and length-prefixed messages.

use prost::Message;

/// Begins every image but the inventory.
pub(crate) const COMMON: u32 = 0x5456_4319;
/// `inventory.img`.
pub(crate) const INVENTORY: u32 = 0x5831_3116;
/// `pstree.img`.
pub(crate) const PSTREE: u32 = 0x5027_3030;
/// `pagemap-N.img`.
pub(crate) const PAGEMAP: u32 = 0x5608_4025;
/// `core-N.img`.
pub(crate) const CORE: u32 = 0x5505_3847;
/// `mm-N.img`.
pub(crate) const MM: u32 = 0x5749_2820;

/// What is wrong with an image's bytes.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It does not begin as it should.
    #[error("magic numbers {found:08x?} instead of {expected:08x?}")]
    Magic {
        /// What was expected.
        expected: Vec<u32>,
        /// What was found.
        found: Vec<u32>,
    },
    /// It ends inside a message.
    #[error("it ends inside the message at byte {at}")]
    Truncated {
        /// Where that message begins.
        at: usize,
    },
    /// A message does not decode.
    #[error("the message at byte {at} does not decode")]
    Message {
        /// Where it begins.
        at: usize,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// A message that must be there is not.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{0}")]
    Value(String),
}

/// Walks the messages of an image.
pub(crate) struct Messages<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Messages<'a> {
    /// Checks the magic numbers.
    pub(crate) fn new(bytes: &'a [u8], magic: &[u32]) -> Result<Self, FormatError> {
        let found: Vec<u32> = bytes
            .chunks_exact(4)
            .take(magic.len())
            .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]))
            .collect();
        if found != magic {
            return Err(FormatError::Magic { expected: magic.to_vec(), found });
        }
        Ok(Self { bytes, at: 4 * magic.len() })
    }

    /// The next message, `None` at the end.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FormatError> {
        let at = self.at;
        let rest = &self.bytes[at..];
        if rest.is_empty() {
            return Ok(None);
        }
        let truncated = FormatError::Truncated { at };
        let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Err(truncated) };
        let length = u32::from_le_bytes(*length) as usize;
        let Some(body) = rest.get(..length) else { return Err(truncated) };
        self.at = at + 4 + length;
        M::decode(body).map(Some).map_err(|source| FormatError::Message { at, source })
    }

    /// The next message, which must be there.
    pub(crate) fn one<M: Message + Default>(&mut self, what: &'static str) -> Result<M, FormatError> {
        self.next()?.ok_or(FormatError::Missing(what))
    }
}

/// The beginning of an image.
pub(crate) fn begin(magic: &[u32]) -> Vec<u8> {
    magic.iter().flat_map(|m| m.to_le_bytes()).collect()
}

/// Appends one message.
pub(crate) fn push<M: Message>(image: &mut Vec<u8>, message: &M) {
    image.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
    message.encode(image).expect("a Vec grows as needed");
}
