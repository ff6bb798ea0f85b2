//! From the first frame to the last image: pages into the store, images into RAM.

use super::failure::ReceiveError;
use super::store::{PageStore, StoreError};
use crate::link::{Channel, Incoming};
use crate::observe::{Event, Observer};
use pageferry_criu_glue::ImageDir;
use pageferry_wire_format::{
    ControlMessage, OwnedBatch, PageRun, RegionInfo, SpaceDigest, SpaceId, digest, limits,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Write};

/// A space of the incoming program.
#[derive(Debug, Default)]
pub(super) struct Incomer {
    pub(super) vpid: i32,
    /// Filled at the seal.
    pub(super) owned: Vec<PageRun>,
    pub(super) owned_complete: bool,
    pub(super) regions: Vec<RegionInfo>,
    pub(super) sealed: bool,
}

/// What was received when the images are complete.
pub(super) struct Cargo {
    pub(super) spaces: BTreeMap<SpaceId, Incomer>,
}

/// Receives everything up to the end of the images.
pub(super) struct Reception<'a> {
    pub(super) channel: &'a mut Channel,
    pub(super) store: &'a mut PageStore,
    pub(super) images: &'a ImageDir,
    pub(super) observer: &'a dyn Observer,
    spaces: BTreeMap<SpaceId, Incomer>,
    all_sealed: bool,
    files: BTreeMap<String, u64>,
    open_image: Option<(String, File)>,
    /// Pages that were stored so far, with repetitions.
    stored_pages: u64,
    /// Bytes of all spaces as they were announced.
    announced: u64,
    /// Pages of the sealed spaces.
    sealed_pages: u64,
}

impl<'a> Reception<'a> {
    pub(super) fn new(
        channel: &'a mut Channel,
        store: &'a mut PageStore,
        images: &'a ImageDir,
        observer: &'a dyn Observer,
    ) -> Self {
        Self {
            channel,
            store,
            images,
            observer,
            spaces: BTreeMap::new(),
            all_sealed: false,
            files: BTreeMap::new(),
            open_image: None,
            stored_pages: 0,
            announced: 0,
            sealed_pages: 0,
        }
    }

    /// The receiving loop.
    pub(super) fn run(mut self) -> Result<Cargo, ReceiveError> {
        loop {
            match self.channel.receive()? {
                Incoming::Pages(payload) => self.pages(payload)?,
                Incoming::Owned(batch) => self.owned(batch)?,
                Incoming::Image(chunk, payload) => {
                    if !self.all_sealed {
                        return Err(ReceiveError::Order("an image before the seal"));
                    }
                    let mut bytes = vec![0; payload];
                    self.channel.link_mut().receive_all(&mut [IoSliceMut::new(&mut bytes)])?;
                    if digest::page(&bytes) != chunk.digest {
                        return Err(ReceiveError::ImageDigest { name: chunk.name, offset: chunk.offset });
                    }
                    self.image(&chunk.name, chunk.offset, &bytes)?;
                }
                Incoming::Digests(_) => return Err(ReceiveError::Order("digests before the images")),
                Incoming::Control(message) => {
                    if self.control(message)? {
                        return Ok(Cargo { spaces: self.spaces });
                    }
                }
            }
        }
    }

    fn pages(&mut self, payload: usize) -> Result<(), ReceiveError> {
        crate::fault::point("dest-pages");
        let (batch, link) = self.channel.batch_and_link();
        let space = batch.space();
        if self.spaces.get(&space).is_none_or(|incomer| incomer.sealed) {
            return Err(ReceiveError::UnknownSpace(space));
        }
        let mut landing = self.store.begin_batch(batch, payload)?;
        link.receive_all(&mut landing.slices())?;
        self.stored_pages += self.store.finish_batch(landing)?.stored;
        Ok(())
    }

    fn owned(&mut self, batch: OwnedBatch) -> Result<(), ReceiveError> {
        let incomer = self.spaces.get_mut(&batch.space).ok_or(ReceiveError::UnknownSpace(batch.space))?;
        if incomer.sealed || incomer.owned_complete {
            return Err(ReceiveError::Order("owned pages after the last ones"));
        }
        if incomer.owned.len() + batch.runs.len() > limits::MAX_OWNED_RUNS {
            return Err(ReceiveError::Order("more owned runs than a space may have"));
        }
        incomer.owned.extend(batch.runs);
        incomer.owned_complete = !batch.more;
        Ok(())
    }

    fn image(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), ReceiveError> {
        let known = self.files.get(name).copied();
        let failed = |source| ReceiveError::Image { name: name.to_owned(), source };
        if known.unwrap_or(0) != offset {
            return Err(ReceiveError::Order("a piece of an image at the wrong place"));
        }
        // A file stays open until another one begins: its pieces come in a row.
        if known.is_none() {
            let file = self.images.create(name).map_err(failed)?;
            self.open_image = Some((name.to_owned(), file));
        }
        match &mut self.open_image {
            Some((open, file)) if open == name => file.write_all(bytes).map_err(failed)?,
            _ => return Err(ReceiveError::Order("a piece of an image after another image has begun")),
        }
        self.files.insert(name.to_owned(), offset + bytes.len() as u64);
        Ok(())
    }

    /// Handles a control message; says whether it was the last of the reception.
    fn control(&mut self, message: ControlMessage) -> Result<bool, ReceiveError> {
        match message {
            ControlMessage::Spaces { spaces, .. } => {
                for info in spaces {
                    if self.all_sealed || self.spaces.contains_key(&info.space) {
                        return Err(ReceiveError::Order("a space that is known already"));
                    }
                    self.announced = self.announced.saturating_add(info.pages.saturating_mul(4096));
                    self.store.reserve(self.announced)?;
                    self.spaces.insert(info.space, Incomer { vpid: info.vpid, ..Incomer::default() });
                }
            }
            ControlMessage::SpaceGone { space } => {
                self.spaces.remove(&space).ok_or(ReceiveError::UnknownSpace(space))?;
                self.store.remove_space(space);
            }
            ControlMessage::Discard { space, runs } => {
                if self.spaces.get(&space).is_none_or(|incomer| incomer.sealed) {
                    return Err(ReceiveError::UnknownSpace(space));
                }
                self.store.discard(space, &runs);
            }
            ControlMessage::RoundEnd { round, .. } => {
                crate::fault::point("dest-round");
                self.store.settle();
                self.channel.control(&ControlMessage::RoundAck { round })?;
                self.observer.event(&Event::Received { round, stored_pages: self.stored_pages });
            }
            ControlMessage::SpaceSeal { space, vpid, pages, digest, regions } => {
                self.seal(space, vpid, pages, digest, regions)?;
            }
            ControlMessage::SealEnd { spaces } => {
                crate::fault::point("dest-seal");
                let sealed = self.spaces.values().filter(|incomer| incomer.sealed).count();
                if sealed != spaces as usize || sealed != self.spaces.len() {
                    return Err(ReceiveError::SealCount { sealed, announced: spaces });
                }
                self.all_sealed = true;
                self.channel.control(&ControlMessage::Sealed { pages: self.sealed_pages })?;
            }
            ControlMessage::ImagesEnd { files, bytes } => {
                let (have, size) = (self.files.len(), self.files.values().sum::<u64>());
                if !self.all_sealed || have != files as usize || size != bytes {
                    return Err(ReceiveError::ImageCount { have, announced: files });
                }
                return Ok(true);
            }
            ControlMessage::Ping { .. } => {}
            ControlMessage::Abort { code, detail } => {
                return Err(ReceiveError::SourceAborted { code, detail });
            }
            other => return Err(ReceiveError::Unexpected(format!("{other:?}"))),
        }
        Ok(false)
    }

    fn seal(
        &mut self,
        space: SpaceId,
        vpid: i32,
        pages: u64,
        digest: SpaceDigest,
        regions: Vec<RegionInfo>,
    ) -> Result<(), ReceiveError> {
        let incomer = self.spaces.get_mut(&space).ok_or(ReceiveError::UnknownSpace(space))?;
        if incomer.sealed || !(incomer.owned_complete || incomer.owned.is_empty()) {
            return Err(ReceiveError::Order("a seal in the middle of a space"));
        }
        let outcome = self.store.seal(space, &incomer.owned).map_err(|source| match source {
            StoreError::Missing { .. } => ReceiveError::Seal { space, source: Some(source) },
            other => ReceiveError::Store(other),
        })?;
        if outcome.pages != pages || outcome.digest != digest {
            return Err(ReceiveError::Seal { space, source: None });
        }
        self.sealed_pages += pages;
        incomer.vpid = vpid;
        incomer.regions = regions;
        incomer.sealed = true;
        Ok(())
    }
}
