//! Frames on a link: numbered, checked, and with the page bytes passed through untouched.

use super::{LinkError, SharedShaper, TcpLink};
use crate::fault::{self, Fault};
use pageferry_wire_format::{
    AbortCode, ControlMessage, Decoder, DigestBatch, EncodeError, FrameError, HEADER_BYTES, Head, Header,
    ImageChunk, OwedBatch, OwnedBatch, PageBatch, Sequencer,
};
use std::io::{IoSlice, IoSliceMut};
use std::time::{Duration, Instant};

/// Bytes that the system buffers for a connection whatever its settings, as good as always.
const BUFFERED: usize = 40 << 10;

/// How talking to the peer fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The link failed.
    #[error("the link to the peer failed")]
    Link(#[from] LinkError),
    /// What came is not a valid frame.
    #[error("what the peer sent cannot be read")]
    Frame(#[from] FrameError),
    /// What was to be sent is not a valid frame: a bug on this side.
    #[error("a frame could not be written")]
    Encode(#[from] EncodeError),
    /// The peer gave up and said why.
    #[error("the peer gave up ({code}): {detail}")]
    Aborted {
        /// The reason as a code.
        code: AbortCode,
        /// ... and in its words.
        detail: String,
    },
    /// A valid frame at the wrong time.
    #[error("the peer sent {got} where {wanted} was expected")]
    Unexpected {
        /// What came.
        got: String,
        /// What may come.
        wanted: &'static str,
    },
}

/// A frame whose head has arrived; the payload, if there is one, is still in the link.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// Pages; [`Channel::batch_and_link`] lends the head; so many payload bytes follow.
    Pages(usize),
    /// A piece of an image file, and the length of its payload.
    Image(ImageChunk, usize),
    /// Digests for the verification.
    Digests(DigestBatch),
    /// Pages that the engine owns in the end.
    Owned(OwnedBatch),
    /// Pages that come after the program runs.
    Owed(OwedBatch),
    /// Everything else.
    Control(ControlMessage),
}

/// One connection that speaks the protocol.
#[derive(Debug)]
pub(crate) struct Channel {
    link: TcpLink,
    sequencer: Sequencer,
    decoder: Decoder,
    head_out: Vec<u8>,
    head_in: Vec<u8>,
    batch: PageBatch,
    shaper: Option<SharedShaper>,
    /// How long that has been waited for.
    shaped: Duration,
    reads_ahead: bool,
}

impl Channel {
    pub(crate) fn new(link: TcpLink) -> Self {
        Self {
            link,
            sequencer: Sequencer::default(),
            decoder: Decoder::default(),
            head_out: Vec::new(),
            head_in: Vec::new(),
            batch: PageBatch::default(),
            shaper: None,
            shaped: Duration::ZERO,
            reads_ahead: false,
        }
    }

    pub(crate) fn link(&self) -> &TcpLink {
        &self.link
    }

    pub(crate) fn link_mut(&mut self) -> &mut TcpLink {
        &mut self.link
    }

    /// The head of the frame behind a large payload is read with its end from now on, or not any more: for one who does nothing but
    /// receive, because the link does not wake who waits at its descriptor for a frame that has been read already.
    pub(crate) fn read_ahead(&mut self, reads: bool) {
        self.reads_ahead = reads;
        self.link.read_ahead(0);
    }

    /// Limits what page batches take of the link, together with other channels that share the limit; `None` lifts it.
    pub(crate) fn set_shaper(&mut self, shaper: Option<SharedShaper>) {
        self.shaper = shaper;
    }

    /// How long the link, or the limit on what it may carry, has held up what was sent so far. `None` where the system does not say.
    pub(crate) fn held_up(&self) -> Option<Duration> {
        Some(self.link.busy()? + self.shaped)
    }

    /// Lends the batch's head and the link at the same time.
    pub(crate) fn batch_and_link(&mut self) -> (&PageBatch, &mut TcpLink) {
        (&self.batch, &mut self.link)
    }

    /// Sends a control message.
    pub(crate) fn control(&mut self, message: &ControlMessage) -> Result<(), ChannelError> {
        self.head_out.clear();
        message.encode(&mut self.sequencer, &mut self.head_out)?;
        self.send(&[])?;
        Ok(())
    }

    /// Sends pages; `payload` is what the batch's coding makes of them. Says how many bytes went out.
    pub(crate) fn pages(
        &mut self,
        batch: &PageBatch,
        payload: &[IoSlice<'_>],
    ) -> Result<usize, ChannelError> {
        self.head_out.clear();
        let bytes: usize = payload.iter().map(|slice| slice.len()).sum();
        batch.encode(bytes, &mut self.sequencer, &mut self.head_out)?;
        self.send_by(self.shaper.clone().as_ref(), payload)
    }

    /// Sends a piece of an image file.
    pub(crate) fn image(&mut self, chunk: &ImageChunk, payload: &[u8]) -> Result<usize, ChannelError> {
        self.head_out.clear();
        chunk.encode(payload.len(), &mut self.sequencer, &mut self.head_out)?;
        self.send(&[IoSlice::new(payload)])
    }

    /// Sends digests for the verification.
    pub(crate) fn digests(&mut self, batch: &DigestBatch) -> Result<usize, ChannelError> {
        self.head_out.clear();
        batch.encode(&mut self.sequencer, &mut self.head_out)?;
        self.send(&[])
    }

    /// Sends pages that the engine owns.
    pub(crate) fn owned(&mut self, batch: &OwnedBatch) -> Result<usize, ChannelError> {
        self.head_out.clear();
        batch.encode(&mut self.sequencer, &mut self.head_out)?;
        self.send(&[])
    }

    /// Sends pages that come after the program runs.
    pub(crate) fn owed(&mut self, batch: &OwedBatch) -> Result<usize, ChannelError> {
        self.head_out.clear();
        batch.encode(&mut self.sequencer, &mut self.head_out)?;
        self.send(&[])
    }

    fn send(&mut self, payload: &[IoSlice<'_>]) -> Result<usize, ChannelError> {
        self.send_by(None, payload)
    }

    /// Sends the frame whose head is ready, in pieces that the limit lets pass.
    fn send_by(
        &mut self,
        limit: Option<&SharedShaper>,
        payload: &[IoSlice<'_>],
    ) -> Result<usize, ChannelError> {
        match fault::point("frame") {
            Some(Fault::Cut) => self.link.shutdown(),
            Some(Fault::Flip) => *self.head_out.last_mut().expect("a header is never empty") ^= 0x10,
            Some(Fault::Truncate) => {
                let half = self.head_out.len() / 2;
                let _ = self.link.send_all(&mut [IoSlice::new(&self.head_out[..half])]);
                self.link.shutdown();
            }
            Some(Fault::Lose) | None => {}
        }
        let before = self.link.sent();
        let mut slices = Vec::with_capacity(payload.len() + 1);
        slices.push(IoSlice::new(&self.head_out));
        slices.extend(payload.iter().map(|slice| IoSlice::new(slice)));
        let sent = match limit {
            Some(limit) => send_in_pieces(&mut self.link, limit, &slices).map(|waited| self.shaped += waited),
            None => self.link.send_all(&mut slices),
        };
        if let Err(error) = sent {
            return Err(self.explain(error));
        }
        Ok((self.link.sent() - before) as usize)
    }

    /// A peer that gives up says why before it closes: that tells more than a broken connection.
    fn explain(&mut self, error: LinkError) -> ChannelError {
        if matches!(error, LinkError::Lost(_) | LinkError::Closed)
            && let Some(reason) = self.last_words(Duration::ZERO)
        {
            return reason;
        }
        ChannelError::Link(error)
    }

    /// Why the peer gave up, if it says so within `patience`. The channel is of no use after this.
    pub(crate) fn last_words(&mut self, patience: Duration) -> Option<ChannelError> {
        let end = Instant::now() + patience;
        self.link.set_stall(Duration::from_millis(200));
        while self.link.readable_within(end.saturating_duration_since(Instant::now())) {
            match self.receive() {
                Ok(Incoming::Control(ControlMessage::Abort { code, detail })) => {
                    return Some(ChannelError::Aborted { code, detail });
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Receives the next frame's head. The payload of a [`Incoming::Pages`] or [`Incoming::Image`] has to be
    /// taken from the link before the next call.
    pub(crate) fn receive(&mut self) -> Result<Incoming, ChannelError> {
        let mut raw = [0; HEADER_BYTES];
        self.link.receive_all(&mut [IoSliceMut::new(&mut raw)])?;
        let announced = self.decoder.header(&raw)?;
        self.head_in.resize(announced.head_len(), 0);
        self.link.receive_all(&mut [IoSliceMut::new(&mut self.head_in)])?;
        if self.reads_ahead {
            // The next one is mostly of the same kind, and a frame's payload is not to be copied twice.
            self.link.read_ahead(HEADER_BYTES + announced.head_len());
        }
        Ok(match self.decoder.head(&announced, &self.head_in, &mut self.batch)? {
            Head::Pages { payload_len } => Incoming::Pages(payload_len),
            Head::Image { chunk, payload_len } => Incoming::Image(chunk, payload_len),
            Head::Digests(batch) => Incoming::Digests(batch),
            Head::Owned(batch) => Incoming::Owned(batch),
            Head::Owed(batch) => Incoming::Owed(batch),
            Head::Control(message) => Incoming::Control(message),
        })
    }

    /// Whether the next frame is here to its last byte, so that receiving it does not wait. One that is larger than what the system is
    /// sure to buffer is never here as a whole: its beginning counts.
    pub(crate) fn whole_frame_waits(&self) -> Result<bool, ChannelError> {
        let mut raw = [0; HEADER_BYTES];
        if self.link.peek(&mut raw)? < raw.len() {
            return Ok(false);
        }
        // A header that makes no sense is found out by receiving it.
        let len =
            Header::parse(&raw).map_or(0, |header| header.head_len as usize + header.payload_len as usize);
        Ok(len > BUFFERED || self.link.waiting()? >= HEADER_BYTES + len)
    }

    /// Waits for a control message; an abort is an error, and signs of life are passed over.
    pub(crate) fn answer(&mut self, wanted: &'static str) -> Result<ControlMessage, ChannelError> {
        loop {
            match self.receive()? {
                Incoming::Control(ControlMessage::Abort { code, detail }) => {
                    return Err(ChannelError::Aborted { code, detail });
                }
                Incoming::Control(ControlMessage::Ping { .. }) => {}
                Incoming::Control(message) => return Ok(message),
                other => return Err(ChannelError::Unexpected { got: format!("{other:?}"), wanted }),
            }
        }
    }

    /// Hears a peer that gives up in the middle of our sending. Costs one system call.
    pub(crate) fn hear_abort(&mut self) -> Result<(), ChannelError> {
        while self.link.readable() {
            match self.receive()? {
                Incoming::Control(ControlMessage::Ping { .. }) => {}
                Incoming::Control(ControlMessage::Abort { code, detail }) => {
                    return Err(ChannelError::Aborted { code, detail });
                }
                other => {
                    return Err(ChannelError::Unexpected { got: format!("{other:?}"), wanted: "nothing" });
                }
            }
        }
        Ok(())
    }
}

/// Sends `slices`, as much at a time as the limit lets pass, and says how long the limit was waited for.
fn send_in_pieces(
    link: &mut TcpLink,
    limit: &SharedShaper,
    slices: &[IoSlice<'_>],
) -> Result<Duration, LinkError> {
    let (mut next, mut offset, mut waited) = (0, 0, Duration::ZERO);
    while next < slices.len() {
        // Asked for anew each time: it may have changed.
        let most = limit.piece();
        let (mut piece, mut bytes) = (Vec::with_capacity(slices.len() - next), 0);
        while bytes < most
            && let Some(slice) = slices.get(next)
        {
            let len = (slice.len() - offset).min(most - bytes);
            piece.push(IoSlice::new(&slice[offset..offset + len]));
            bytes += len;
            offset += len;
            if offset == slice.len() {
                (next, offset) = (next + 1, 0);
            }
        }
        waited += limit.wait(bytes);
        link.send_all(&mut piece)?;
    }
    Ok(waited)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole_in_order() {
        let (mut ours, mut theirs) = TcpLink::pair().unwrap();
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n / 7) as u8).collect();
        let sent = bytes.clone();
        let thread = std::thread::spawn(move || {
            let (head, rest) = sent.split_at(33);
            let (middle, end) = rest.split_at(500_001);
            let slices = [head, &[], middle, end].map(IoSlice::new);
            let limit = SharedShaper::new(Some(10_000_000));
            assert!(limit.piece() < middle.len(), "it takes several pieces");
            send_in_pieces(&mut ours, &limit, &slices).unwrap();
            (ours.sent(), limit.carried())
        });
        let mut got = vec![0; bytes.len()];
        theirs.receive_all(&mut [IoSliceMut::new(&mut got)]).unwrap();
        assert_eq!(thread.join().unwrap(), (1_000_000, 1_000_000));
        assert!(got == bytes);
    }
}
