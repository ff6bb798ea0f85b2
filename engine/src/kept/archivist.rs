//! The other end of a migration to a file: answers as a receiver does, and writes down what it hears.
//!
//! A frame is written after it was checked as a receiver would check it, as far as that goes without keeping pages. What
//! this end refuses, or cannot write, the source hears of as of any receiver that gives up: it rolls back.

use super::archive::Checkpoint;
use super::draft::Draft;
use super::error::{Damage, KeptError};
use super::flusher::Flusher;
use super::frames::Frames;
use super::ledger::{Ledger, Verdict};
use crate::effort::{CpuMeter, CpuShare};
use crate::link::TcpLink;
use pageferry_wire_format::{
    AbortCode, ControlMessage, DigestBatch, Head, PageDigest, PageNo, PageRun, Sequencer, SpaceId, Welcome,
    limits, version,
};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often the source hears that the disk is still being waited for.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// How long to wait for the source to read why this end gave up.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs the session on `link`. `kept` is set from the moment on at which the file has its name.
pub(super) fn run(
    link: TcpLink,
    draft: Draft,
    checkpoint: Option<Checkpoint>,
    kept: &AtomicBool,
    cpu: &CpuShare,
) -> Result<(), KeptError> {
    let base = checkpoint.as_ref().and_then(|checkpoint| checkpoint.base.as_ref());
    let base = base.map_or(Vec::new(), |base| base.digests.clone());
    let mut archivist = Archivist {
        frames: Frames::new(link),
        voice: Voice::default(),
        offered: base.clone(),
        ledger: Ledger::on(base),
        meter: CpuMeter::new(cpu),
        verify: false,
    };
    let result = archivist.record(draft, checkpoint, kept);
    let link = archivist.frames.source();
    if let Err(error) = &result {
        // The draft is gone by now, so this is true when the source hears it.
        link.set_stall(LAST_WORDS);
        if !matches!(error, KeptError::Abandoned(_)) {
            let _ = archivist.voice.say(link, &ControlMessage::abort(AbortCode::Internal, &error.chain()));
        }
        link.close_gently(LAST_WORDS);
    }
    result
}

/// What this end says.
#[derive(Default)]
struct Voice {
    sequencer: Sequencer,
    out: Vec<u8>,
}

impl Voice {
    fn say(&mut self, link: &mut TcpLink, message: &ControlMessage) -> Result<(), KeptError> {
        self.out.clear();
        let encoded = message.encode(&mut self.sequencer, &mut self.out);
        encoded.map_err(|error| KeptError::Refused(error.to_string()))?;
        Ok(link.send_all(&mut [IoSlice::new(&self.out)])?)
    }

    fn digests(&mut self, link: &mut TcpLink, batch: &DigestBatch) -> Result<(), KeptError> {
        self.out.clear();
        let encoded = batch.encode(&mut self.sequencer, &mut self.out);
        encoded.map_err(|error| KeptError::Refused(error.to_string()))?;
        Ok(link.send_all(&mut [IoSlice::new(&self.out)])?)
    }
}

struct Archivist {
    /// What the pages below look like, until the source has heard it.
    offered: Vec<PageDigest>,
    frames: Frames<TcpLink>,
    voice: Voice,
    ledger: Ledger,
    meter: CpuMeter,
    /// Digests of all pages follow the images.
    verify: bool,
}

impl Archivist {
    fn record(
        &mut self,
        mut draft: Draft,
        checkpoint: Option<Checkpoint>,
        kept: &AtomicBool,
    ) -> Result<(), KeptError> {
        let failed = |source| KeptError::Write { path: draft.path().to_owned(), source };
        let flusher = Flusher::start(draft.handle()?).map_err(failed)?;
        let mut program = String::new();
        loop {
            let head = self.frames.next()?.ok_or(crate::link::LinkError::Closed)?;
            if let Head::Control(ControlMessage::Abort { detail, .. }) = head {
                return Err(KeptError::Abandoned(detail));
            }
            let spot = self.frames.spot();
            let damaged = |source| KeptError::Damaged { spot, source };
            self.check(&head).map_err(damaged)?;
            draft.write(self.frames.head())?;
            draft.write(self.frames.payload())?;
            self.meter.pay(|| false);
            match &head {
                Head::Control(ControlMessage::Hello(hello)) => {
                    let Some(version) = version::negotiate(&hello.versions) else {
                        return Err(damaged(Damage::Order("a version that is not spoken")));
                    };
                    self.verify = hello.verify;
                    program.clone_from(&hello.program);
                    self.say(&ControlMessage::Welcome(Welcome {
                        version,
                        engine: env!("CARGO_PKG_VERSION").to_owned(),
                        // What does not fit is found out when it is written: it depends on how the pages travel.
                        memory: u64::MAX,
                        streams: 1,
                        kept: self.offered.len() as u64,
                    }))?;
                    self.offer()?;
                }
                Head::Control(ControlMessage::RoundEnd { round, .. }) => {
                    draft.flush()?;
                    flusher.begin();
                    for (space, runs) in self.ledger.end_round() {
                        for runs in runs.chunks(limits::MAX_RUNS_PER_FRAME) {
                            self.say(&ControlMessage::Again { spaces: vec![(space, runs.to_vec())] })?;
                        }
                    }
                    self.say(&ControlMessage::RoundAck { round: *round })?;
                }
                Head::Control(ControlMessage::SealEnd { spaces }) => {
                    let answer = match self.ledger.end_seal(*spaces).map_err(damaged)? {
                        Verdict::Sealed(pages) => ControlMessage::Sealed { pages },
                        Verdict::Unsealed => ControlMessage::Unsealed,
                    };
                    self.say(&answer)?;
                }
                Head::Control(ControlMessage::ImagesEnd { .. }) if !self.verify => {
                    self.ready(&mut draft, &flusher)?;
                }
                Head::Digests(batch) if !batch.more => self.ready(&mut draft, &flusher)?,
                Head::Control(ControlMessage::Commit) => break,
                _ => {}
            }
        }
        drop(flusher);
        draft.keep()?;
        if let Some(Checkpoint { entry, base }) = checkpoint
            && let below = base.as_ref().map(|base| &base.below)
            && let Err(error) = entry.enter(draft.path(), draft.bytes(), below, &program)
        {
            draft.discard();
            return Err(error);
        }
        kept.store(true, Ordering::SeqCst);
        // The file is there, whatever becomes of these words.
        let _ = self.say(&ControlMessage::Resumed { pid: 0, timings: Vec::new() });
        let filled = ControlMessage::Filled {
            pages: 0,
            prefilled_pages: 0,
            faults: 0,
            max_fault_us: 0,
            duration_us: 0,
        };
        let _ = self.say(&filled);
        Ok(())
    }

    fn check(&mut self, head: &Head) -> Result<(), Damage> {
        match head {
            Head::Pages { .. } => self.ledger.pages(self.frames.batch(), self.frames.payload()),
            Head::Image { chunk, .. } => self.ledger.image(chunk, self.frames.payload()),
            other => self.ledger.take(other),
        }
    }

    /// Says what the pages below look like, as a receiver does of those that it kept.
    fn offer(&mut self) -> Result<(), KeptError> {
        let offered = std::mem::take(&mut self.offered);
        let (mut rest, mut at) = (&offered[..], 0);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(limits::MAX_DIGESTS_PER_FRAME));
            let len = now.len() as u64;
            let (runs, digests) = (vec![PageRun { start: PageNo(at), len }], now.to_vec());
            let batch = DigestBatch { space: SpaceId::KEPT, runs, digests, more: !later.is_empty() };
            self.voice.digests(self.frames.source(), &batch)?;
            (rest, at) = (later, at + len);
        }
        Ok(())
    }

    /// All of it is there but the commit: has it on the disk before the source decides.
    fn ready(&mut self, draft: &mut Draft, flusher: &Flusher) -> Result<(), KeptError> {
        draft.flush()?;
        let Self { frames, voice, .. } = self;
        let link = frames.source();
        let alive = || {
            let _ = voice.say(link, &ControlMessage::Ping { n: 0 });
        };
        let written = flusher.finish(SIGN_OF_LIFE, alive);
        written.map_err(|source| KeptError::Write { path: draft.path().to_owned(), source })?;
        self.say(&ControlMessage::Ready { timings: Vec::new(), verified_pages: 0 })
    }

    fn say(&mut self, message: &ControlMessage) -> Result<(), KeptError> {
        self.voice.say(self.frames.source(), message)
    }
}
