//! Writes a recording, frame by frame.

use super::block::{self, END, HEADER, LIMIT, OBSERVATION};
use super::content::{Memory, put_header};
use super::fields::put;
use super::{Header, VERSION, WriteError};
use std::io::{self, Write};

pub(super) const MAGIC: &[u8; 8] = b"PFRECORD";

/// Writes observations. Each is given to the file in one piece, as soon as it is there: what a killed recorder leaves
/// behind is readable up to the last one.
pub struct Writer<W: Write> {
    pub(super) output: W,
    compressor: zstd::bulk::Compressor<'static>,
    memory: Memory,
    observations: u64,
    broken: bool,
}

impl<W: Write> Writer<W> {
    /// Begins a recording.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn new(output: W, header: &Header) -> Result<Self, WriteError> {
        if header.version != VERSION {
            return Err(WriteError::Version(header.version));
        }
        let failed = |source| WriteError::Io { whole_frames: 0, source };
        let compressor = zstd::bulk::Compressor::new(3).map_err(failed)?;
        let (memory, observations) = Default::default();
        let mut writer = Self { output, compressor, memory, observations, broken: false };
        let mut start = Vec::new();
        start.extend_from_slice(MAGIC);
        start.extend_from_slice(&VERSION.to_le_bytes());
        let mut payload = Vec::new();
        put_header(&mut payload, header);
        start.extend(block::encode(HEADER, 0, &payload, &mut writer.compressor).map_err(failed)?);
        writer.output.write_all(&start).map_err(failed)?;
        Ok(writer)
    }

    /// Adds an observation.
    ///
    /// # Errors
    /// [`WriteError`]; nothing can be added afterwards, and what was written before can be read.
    pub fn write(&mut self, observation: &crate::observation::Observation) -> Result<(), WriteError> {
        let mut payload = Vec::new();
        self.ensure_whole()?;
        self.memory.put(&mut payload, observation);
        if payload.len() > LIMIT {
            // The reader would not know of the changes in it.
            self.broken = true;
            return Err(WriteError::TooLarge { size: payload.len(), limit: LIMIT });
        }
        self.append(OBSERVATION, &payload)?;
        self.observations += 1;
        Ok(())
    }

    /// Ends the recording, and gives the file back.
    ///
    /// # Errors
    /// [`WriteError`]; what was written before can be read.
    pub fn finish(mut self) -> Result<W, WriteError> {
        self.ensure_whole()?;
        let mut payload = Vec::new();
        put(&mut payload, self.observations);
        self.append(END, &payload)?;
        let whole_frames = self.observations;
        self.output.flush().map_err(|source| WriteError::Io { whole_frames, source })?;
        Ok(self.output)
    }

    fn ensure_whole(&self) -> Result<(), WriteError> {
        if self.broken { Err(WriteError::Broken) } else { Ok(()) }
    }

    fn append(&mut self, kind: u8, payload: &[u8]) -> Result<(), WriteError> {
        let written = block::encode(kind, self.observations + 1, payload, &mut self.compressor)
            .and_then(|bytes| self.output.write_all(&bytes));
        written.map_err(|source: io::Error| {
            self.broken = true;
            WriteError::Io { whole_frames: self.observations, source }
        })
    }
}

impl<W: Write> std::fmt::Debug for Writer<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("observations", &self.observations).finish_non_exhaustive()
    }
}
