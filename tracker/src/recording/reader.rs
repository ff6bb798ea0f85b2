//! Reads a recording, whole or not.

use super::block::{self, Block, END, HEADER, OBSERVATION};
use super::content::{self, Memory};
use super::fields::Fields;
use super::writer::MAGIC;
use super::{Ending, Header, ReadError, VERSION};
use crate::observation::Observation;
use std::io::Read;

/// Reads the observations of a recording, as an iterator. After the last, or after an error, it has no more.
#[derive(Debug)]
pub struct Reader<R: Read> {
    input: R,
    header: Header,
    memory: Memory,
    /// Of the next frame.
    pub(super) offset: u64,
    observations: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    More,
    Finished,
    Interrupted,
}

impl<R: Read> Reader<R> {
    /// Begins to read a recording.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn new(mut input: R) -> Result<Self, ReadError> {
        let start = block::read_up_to(&mut input, MAGIC.len() + 4)?;
        let (magic, version) = start.split_at(start.len().min(MAGIC.len()));
        if !MAGIC.starts_with(magic) {
            return Err(ReadError::NotARecording);
        }
        let version = u32::from_le_bytes(version.try_into().map_err(|_| ReadError::NoHeader)?);
        if version > VERSION {
            return Err(ReadError::Newer { version });
        }
        let mut offset = start.len() as u64;
        let damaged = |what| ReadError::Damaged { frame: 0, offset, what };
        if version == 0 {
            return Err(ReadError::Damaged { frame: 0, offset: 8, what: "there is no version 0" });
        }
        let block = block::read(&mut input, 0, offset)?.ok_or(ReadError::NoHeader)?;
        if block.kind != HEADER {
            return Err(damaged("it is no header"));
        }
        let header = content::header(&block.payload, version).map_err(|error| damaged(error.0))?;
        offset += block.size;
        Ok(Self { input, header, memory: Memory::default(), offset, observations: 0, state: State::More })
    }

    /// What the recording is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How it ends. Known when there are no more observations; before that, it counts as interrupted.
    pub fn ending(&self) -> Ending {
        match self.state {
            State::Finished => Ending::Finished,
            _ => Ending::Interrupted { whole_frames: self.observations },
        }
    }

    fn advance(&mut self) -> Result<Option<Observation>, ReadError> {
        let (frame, offset) = (self.observations + 1, self.offset);
        let damaged = |what| ReadError::Damaged { frame, offset, what };
        let Some(Block { kind, payload, size }) = block::read(&mut self.input, frame, offset)? else {
            return Ok(None);
        };
        match kind {
            OBSERVATION => {
                let observation = self
                    .memory
                    .observation(&payload, self.header.version)
                    .map_err(|error| damaged(error.0))?;
                self.offset += size;
                self.observations += 1;
                Ok(Some(observation))
            }
            END => {
                let mut fields = Fields(&payload);
                let count = fields.number().map_err(|error| damaged(error.0))?;
                fields.end().map_err(|error| damaged(error.0))?;
                if count != self.observations {
                    return Err(damaged("it counts other observations than there are"));
                }
                if !block::read_up_to(&mut self.input, 1)?.is_empty() {
                    return Err(damaged("something follows the end"));
                }
                self.state = State::Finished;
                Ok(None)
            }
            _ => Err(damaged("its kind is unknown")),
        }
    }
}

impl<R: Read> Iterator for Reader<R> {
    type Item = Result<Observation, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state != State::More {
            return None;
        }
        let next = self.advance().transpose();
        if !matches!(next, Some(Ok(_))) && self.state == State::More {
            self.state = State::Interrupted;
        }
        next
    }
}
