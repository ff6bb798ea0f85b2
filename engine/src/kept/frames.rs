//! Frames with their bytes, off a link or out of a file.

use super::error::{KeptError, Spot};
use crate::link::TcpLink;
use pageferry_wire_format::{Decoder, HEADER_BYTES, Head, PageBatch};
use std::fs::File;
use std::io::{BufReader, IoSliceMut, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes that are read from a file at a time.
const READ_AHEAD: usize = 1 << 20;

/// Where frames come from.
pub(super) trait Source {
    /// Fills the buffer; says how much there was when the stream ends before.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, KeptError>;

    /// Passes over bytes; says how many of them there were.
    fn skip(&mut self, bytes: usize) -> Result<usize, KeptError>;
}

impl Source for TcpLink {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, KeptError> {
        self.receive_all(&mut [IoSliceMut::new(buffer)])?;
        Ok(buffer.len())
    }

    fn skip(&mut self, bytes: usize) -> Result<usize, KeptError> {
        self.fill(&mut vec![0; bytes])
    }
}

/// A kept stream.
pub(super) struct StreamFile {
    path: PathBuf,
    file: BufReader<File>,
    left: u64,
}

impl StreamFile {
    pub(super) fn open(path: &Path) -> Result<Self, KeptError> {
        let failed = |source| KeptError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(failed(std::io::ErrorKind::InvalidInput.into()));
        }
        let file = BufReader::with_capacity(READ_AHEAD, file);
        Ok(Self { path: path.to_owned(), file, left: about.len() })
    }
}

impl Source for StreamFile {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, KeptError> {
        let mut got = 0;
        while got < buffer.len() {
            match self.file.read(&mut buffer[got..]) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(KeptError::Read { path: self.path.clone(), source }),
            }
        }
        self.left = self.left.saturating_sub(got as u64);
        Ok(got)
    }

    fn skip(&mut self, bytes: usize) -> Result<usize, KeptError> {
        let there = self.left.min(bytes as u64);
        let moved = self.file.seek(SeekFrom::Current(there as i64));
        moved.map_err(|source| KeptError::Read { path: self.path.clone(), source })?;
        self.left -= there;
        Ok(there as usize)
    }
}

/// The frames of one direction, each checked against the one before it.
pub(super) struct Frames<S> {
    source: S,
    decoder: Decoder,
    batch: PageBatch,
    /// Header and head of the last frame.
    head: Vec<u8>,
    /// Its payload.
    payload: Vec<u8>,
    /// Where the last frame begins.
    spot: Spot,
    /// Where the next one does.
    end: u64,
}

impl<S: Source> Frames<S> {
    pub(super) fn new(source: S) -> Self {
        Self {
            source,
            decoder: Decoder::default(),
            batch: PageBatch::default(),
            head: Vec::new(),
            payload: Vec::new(),
            spot: Spot::default(),
            end: 0,
        }
    }

    /// The next frame with its payload; `None` where the stream ends between two frames.
    pub(super) fn next(&mut self) -> Result<Option<Head>, KeptError> {
        let Some((head, payload)) = self.advance()? else { return Ok(None) };
        self.payload.resize(payload, 0);
        let got = self.source.fill(&mut self.payload)?;
        self.whole(got, payload)?;
        Ok(Some(head))
    }

    /// The next frame, without looking at its payload.
    pub(super) fn next_head(&mut self) -> Result<Option<Head>, KeptError> {
        let Some((head, payload)) = self.advance()? else { return Ok(None) };
        self.payload.clear();
        let got = self.source.skip(payload)?;
        self.whole(got, payload)?;
        Ok(Some(head))
    }

    /// Header and head; gives the length of the payload.
    fn advance(&mut self) -> Result<Option<(Head, usize)>, KeptError> {
        self.spot = Spot { frame: self.decoder.sequencer().next(), offset: self.end };
        let mut raw = [0; HEADER_BYTES];
        let got = self.source.fill(&mut raw)?;
        if got == 0 {
            return Ok(None);
        }
        self.whole(got, HEADER_BYTES)?;
        let announced = self.decoder.header(&raw)?;
        self.head.clear();
        self.head.extend_from_slice(&raw);
        self.head.resize(HEADER_BYTES + announced.head_len(), 0);
        let got = self.source.fill(&mut self.head[HEADER_BYTES..])?;
        self.whole(got, announced.head_len())?;
        let head = self.decoder.head(&announced, &self.head[HEADER_BYTES..], &mut self.batch)?;
        let payload = match &head {
            Head::Pages { payload_len } | Head::Image { payload_len, .. } => *payload_len,
            _ => 0,
        };
        Ok(Some((head, payload)))
    }

    fn whole(&mut self, got: usize, wanted: usize) -> Result<(), KeptError> {
        self.end += got as u64;
        if got < wanted {
            return Err(KeptError::Cut { spot: self.spot, end: self.end });
        }
        Ok(())
    }

    /// Header and head of the last frame, as they came.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Payload of the last frame.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The pages of the last frame, if it had some.
    pub(super) fn batch(&self) -> &PageBatch {
        &self.batch
    }

    /// The running digest of all heads so far.
    pub(super) fn digest(&self) -> u64 {
        self.decoder.sequencer().digest()
    }

    /// Where the last frame begins. After `None`: where the stream ends.
    pub(super) fn spot(&self) -> Spot {
        self.spot
    }

    /// Where frames come from, to answer.
    pub(super) fn source(&mut self) -> &mut S {
        &mut self.source
    }
}
