//! Pages that outlive a session: what is offered to the source when it begins, and what is kept when the program runs.

use super::failure::ReceiveError;
use super::receive::Cargo;
use crate::effort::{CpuMeter, CpuShare};
use crate::kept::{KeptPages, KeptStore, give_pages};
use crate::link::Channel;
use pageferry_tracker::{self as tracker, PageReader, Run, Target};
use pageferry_wire_format::{DigestBatch, PageNo, PageRun, SpaceId, limits};
use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// The kept store during a session. Without one everything here does nothing.
pub(super) struct Keeper {
    store: Option<KeptStore>,
    /// What the program has, by vpid.
    owned: BTreeMap<i32, Vec<Run>>,
}

/// What lists of pages take.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lists {
    pub(super) bytes: u64,
    /// And for each page of the program.
    pub(super) page: u64,
}

/// What writing down a program's pages takes, each: their digests, some of them twice.
const KEEPING: u64 = 100;

/// Bytes of the digests of a store.
fn bytes(store: &KeptStore) -> u64 {
    std::mem::size_of_val(store.pages().digests()) as u64
}

impl Keeper {
    /// Takes the store. One that cannot be had is done without: only bytes are lost by that; as is one whose digests take more than half of
    /// the `room` that there is for them and the index.
    pub(super) fn take(dir: Option<&Path>, room: Option<u64>) -> Self {
        let store = dir.and_then(|dir| match KeptStore::open(dir) {
            Ok(store) if room.is_some_and(|room| bytes(&store) > room / 2) => {
                tracing::warn!(
                    "the digests of the kept store have no room in the memory that the engine may take"
                );
                None
            }
            Ok(store) => Some(store),
            Err(error) => {
                tracing::warn!(error = %error.chain(), "this session goes without the kept store");
                None
            }
        });
        Self { store, owned: BTreeMap::new() }
    }

    /// What its lists take besides, and what a page takes that will be kept.
    pub(super) fn lists(&self) -> Lists {
        let store = self.store.as_ref();
        Lists { bytes: store.map_or(0, bytes), page: store.map_or(0, |_| KEEPING) }
    }

    /// What is there from before.
    pub(super) fn pages(&self) -> Arc<KeptPages> {
        self.store.as_ref().map(|store| Arc::clone(store.pages())).unwrap_or_default()
    }

    /// Says what the kept pages look like.
    pub(super) fn offer(&self, channel: &mut Channel) -> Result<(), ReceiveError> {
        let pages = self.pages();
        let mut rest = pages.digests();
        let mut at = 0;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(limits::MAX_DIGESTS_PER_FRAME));
            let len = now.len() as u64;
            let runs = vec![PageRun { start: PageNo(at), len }];
            let (digests, more) = (now.to_vec(), !later.is_empty());
            channel.digests(&DigestBatch { space: SpaceId::KEPT, runs, digests, more })?;
            (rest, at) = (later, at + len);
        }
        Ok(())
    }

    /// Notes what the program consists of.
    pub(super) fn note(&mut self, cargo: &Cargo) {
        if self.store.is_some() {
            let runs =
                |runs: &[PageRun]| runs.iter().map(|run| Run { start: run.start.0, len: run.len }).collect();
            self.owned = cargo.spaces.values().map(|incomer| (incomer.vpid, runs(&incomer.owned))).collect();
        }
    }

    /// Puts what the program, which runs as `root` here, has in its pages by now into the store, within the engine's share of a processor
    /// unless `hurry` says that it is to end.
    pub(super) fn fill(
        self,
        root: i32,
        cpu: &CpuShare,
        hurry: impl Fn() -> bool,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Self { store: Some(mut store), owned } = self else { return Ok(()) };
        let mut readers = Vec::new();
        for target in tracker::tree::discover(&Target::open(root)?)? {
            if let Some(runs) = owned.get(&crate::layout::innermost_pid(&target)?) {
                readers.push((PageReader::new(&target)?, runs));
            }
        }
        let mut meter = CpuMeter::new(cpu);
        let mut rest = || meter.pay(&hurry);
        store.refill(|take| -> io::Result<()> {
            readers.iter().try_for_each(|(reader, runs)| give_pages(reader, runs, take, &mut rest))
        })?;
        Ok(())
    }
}
