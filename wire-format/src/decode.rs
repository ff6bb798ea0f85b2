//! The frames of one direction, as they are taken off a link: first the header, then the head, and the payload,
//! if there is one, straight to where it belongs.

use crate::batch::PageBatch;
use crate::control::ControlMessage;
use crate::error::{DecodeError, FrameError};
use crate::frame::{FrameKind, HEADER_BYTES, Header, Sequencer};
use crate::image::ImageChunk;
use crate::lists::{DigestBatch, OwedBatch, OwnedBatch};

/// Knows where in the stream it is, so that an error can say which frame it means.
///
/// ```
/// # use pageferry_wire_format::*;
/// # let mut link = Vec::new();
/// # ControlMessage::Ping { n: 7 }.encode(&mut Sequencer::default(), &mut link).unwrap();
/// let (mut decoder, mut batch) = (Decoder::default(), PageBatch::default());
/// let (raw, rest) = link.split_first_chunk::<HEADER_BYTES>().unwrap();
/// let header = decoder.header(raw)?;
/// let head = decoder.head(&header, &rest[..header.head_len()], &mut batch)?;
/// assert_eq!(head, Head::Control(ControlMessage::Ping { n: 7 }));
/// # Ok::<(), FrameError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    sequencer: Sequencer,
    offset: u64,
}

/// A header whose lengths are within their limits. It is not checked yet, so it gives nothing else away.
#[derive(Debug)]
#[must_use = "the head follows, and with it the check"]
pub struct Announced {
    header: Header,
    raw: [u8; HEADER_BYTES],
}

impl Announced {
    /// Bytes of the head that has to be received next.
    pub fn head_len(&self) -> usize {
        self.header.head_len as usize
    }
}

/// The meaning of a frame whose payload has not been received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// Pages: their head is in the batch that was lent to [`Decoder::head`].
    Pages {
        /// Bytes of payload that follow.
        payload_len: usize,
    },
    /// A piece of an image file.
    Image {
        /// Where it belongs, and whether it is packed.
        chunk: ImageChunk,
        /// Bytes of payload that follow.
        payload_len: usize,
    },
    /// Digests: for the verification, or of what the destination kept.
    Digests(DigestBatch),
    /// Pages that the engine owns in the end.
    Owned(OwnedBatch),
    /// Those of them that come after the program runs.
    Owed(OwedBatch),
    /// A control message.
    Control(ControlMessage),
}

impl Decoder {
    /// Reads a header.
    ///
    /// # Errors
    /// As [`Header::parse`], with the place of the frame.
    pub fn header(&self, raw: &[u8; HEADER_BYTES]) -> Result<Announced, FrameError> {
        match Header::parse(raw) {
            Ok(header) => Ok(Announced { header, raw: *raw }),
            Err(source) => Err(self.blame(None, source)),
        }
    }

    /// Sees that header and head are whole and the next ones of this stream, and reads the head. Pages are read into
    /// `batch`, which is left alone otherwise.
    ///
    /// # Errors
    /// A damaged, lost or repeated frame, or a head that the encoder would not have written. The stream is of
    /// no use after an error.
    pub fn head(
        &mut self,
        announced: &Announced,
        head: &[u8],
        batch: &mut PageBatch,
    ) -> Result<Head, FrameError> {
        let Announced { header, raw } = announced;
        let (next, read) = header
            .verify(raw, head, &self.sequencer)
            .and_then(|next| Ok((next, read(header, head, batch)?)))
            .map_err(|source| self.blame(Some(header.kind), source))?;
        self.sequencer = next;
        let len = HEADER_BYTES as u64 + u64::from(header.head_len) + u64::from(header.payload_len);
        self.offset = self.offset.saturating_add(len);
        Ok(read)
    }

    /// How far the stream was understood: the number of the next frame, and the running digest of the heads.
    pub fn sequencer(&self) -> &Sequencer {
        &self.sequencer
    }

    fn blame(&self, kind: Option<FrameKind>, source: DecodeError) -> FrameError {
        FrameError { sequence: self.sequencer.next(), kind, offset: self.offset, source }
    }
}

fn read(header: &Header, head: &[u8], batch: &mut PageBatch) -> Result<Head, DecodeError> {
    let written_in = |version: u16| match header.version == version {
        true => Ok(()),
        false => Err(DecodeError::Invalid("a frame in another version than the oldest that has it")),
    };
    if header.kind != FrameKind::Control {
        written_in(header.kind.version())?;
    }
    let payload_len = header.payload_len as usize;
    Ok(match header.kind {
        FrameKind::PageBatch => {
            batch.decode_into(head, payload_len)?;
            Head::Pages { payload_len }
        }
        FrameKind::Image => Head::Image { chunk: ImageChunk::decode(head, payload_len)?, payload_len },
        FrameKind::PackedImage => {
            Head::Image { chunk: ImageChunk::decode_packed(head, payload_len)?, payload_len }
        }
        FrameKind::Digests => Head::Digests(DigestBatch::decode(head)?),
        FrameKind::Owned => Head::Owned(OwnedBatch::decode(head)?),
        FrameKind::Owed => Head::Owed(OwedBatch::decode(head)?),
        FrameKind::Control => {
            let message = ControlMessage::decode(head)?;
            written_in(message.version())?;
            Head::Control(message)
        }
    })
}
