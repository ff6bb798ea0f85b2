//! From the first frame to the last image: pages into the store, images into RAM.

use super::failure::ReceiveError;
use super::hub::{Hub, LAST_WORDS};
use super::keep::Lists;
use super::network::Arrival;
use super::pieces::Pieces;
use super::store::StoreError;
use crate::effort::{CpuMeter, Entered};
use crate::link::{Channel, ChannelError, Incoming};
use crate::observe::{Event, Observer};
use pageferry_criu_glue::ImageDir;
use pageferry_tracker::{PageSet, Run};
use pageferry_wire_format::{
    ControlMessage, ImageChunk, OwedBatch, OwnedBatch, PageRun, Preparation, RegionInfo, SpaceDigest,
    SpaceId, SpaceInfo, limits,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

/// Memory is asked about for so many bytes of images at a time: most programs have less, and the program stands still meanwhile.
const IMAGES_AHEAD: u64 = 8 << 20;

/// So long a source that has sent nothing waits for memory at most: that of the remainder is made ready as it comes.
const MEMORY_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether it is ready, and how often the source hears that it is being waited for.
const MEMORY_POLL: Duration = Duration::from_millis(2);
const SIGN_OF_LIFE: Duration = Duration::from_millis(250);

/// What a run in a list takes, with the copies that are made of it for comparisons.
const LIST_BYTES: usize = 4 * size_of::<PageRun>();

/// A space of the incoming program.
#[derive(Debug, Default)]
pub(super) struct Incomer {
    pub(super) vpid: i32,
    /// Filled at the seal.
    pub(super) owned: Vec<PageRun>,
    pub(super) owned_complete: bool,
    /// Of these, the ones that come when the program runs.
    pub(super) owed: Vec<PageRun>,
    owed_complete: bool,
    pub(super) regions: Vec<RegionInfo>,
    pub(super) sealed: bool,
}

impl Incomer {
    /// The owned pages that are not owed: those that have to be here.
    pub(super) fn held(&self) -> Result<Vec<PageRun>, ReceiveError> {
        if self.owed.is_empty() {
            return Ok(self.owned.clone());
        }
        let (owned, owed) = (page_set(&self.owned), page_set(&self.owed));
        if owed.runs().iter().any(|run| !owned.contains_run(*run)) {
            return Err(ReceiveError::Order("owed pages that are not owned"));
        }
        Ok(crate::source::sent::wire_runs(&owned.subtract(&owed)))
    }
}

/// Runs of the wire as a set.
pub(super) fn page_set(runs: &[PageRun]) -> PageSet {
    runs.iter().map(|run| Run { start: run.start.0, len: run.len }).collect()
}

/// What was received when the images are complete.
pub(super) struct Cargo {
    pub(super) spaces: BTreeMap<SpaceId, Incomer>,
    /// What had been done here when the source said that the program is about to stop, and what it took.
    pub(super) prepared: Vec<(Preparation, u64)>,
}

/// Receives everything up to the end of the images.
pub(super) struct Reception<'a, 'b> {
    pub(super) channel: &'a mut Channel,
    pub(super) hub: &'a Hub,
    /// From the first announced space on: commands that make the network ready, and CRIU, have the priority of their own.
    entered: Option<Entered<'a>>,
    pub(super) images: &'a ImageDir,
    pub(super) observer: &'a dyn Observer,
    /// Whether the session is still wanted, while it has no connection over which to say otherwise.
    pub(super) still: &'a dyn Fn() -> Result<(), ReceiveError>,
    network: &'a mut Arrival<'b>,
    /// How long CRIU took to be ready, or has taken so far.
    criu: &'a dyn Fn() -> Duration,
    /// What lists of pages take that are kept elsewhere, and here.
    lists: Lists,
    list_bytes: u64,
    prepared: Vec<(Preparation, u64)>,
    pub(super) spaces: BTreeMap<SpaceId, Incomer>,
    all_sealed: bool,
    files: BTreeMap<String, u64>,
    open_image: Option<(String, File)>,
    pieces: Pieces,
    /// The round that was completed last; pages that were asked for again then are still to come.
    pub(super) asked_again: bool,
    /// Bytes of images, and as many as there is memory for without asking again.
    image_bytes: u64,
    image_room: u64,
    /// Bytes of all spaces as they were announced.
    announced: u64,
    /// Pages of the sealed spaces.
    sealed_pages: u64,
}

impl<'a, 'b> Reception<'a, 'b> {
    pub(super) fn new(
        channel: &'a mut Channel,
        hub: &'a Hub,
        images: &'a ImageDir,
        observer: &'a dyn Observer,
        still: &'a dyn Fn() -> Result<(), ReceiveError>,
        network: &'a mut Arrival<'b>,
        criu: &'a dyn Fn() -> Duration,
    ) -> Self {
        Self {
            channel,
            hub,
            entered: None,
            images,
            observer,
            still,
            network,
            criu,
            lists: Lists::default(),
            list_bytes: 0,
            prepared: Vec::new(),
            spaces: BTreeMap::new(),
            all_sealed: false,
            files: BTreeMap::new(),
            open_image: None,
            pieces: Pieces::new(),
            asked_again: false,
            image_bytes: 0,
            image_room: IMAGES_AHEAD,
            announced: 0,
            sealed_pages: 0,
        }
    }

    /// Counts these lists too.
    pub(super) fn beside(self, lists: Lists) -> Self {
        Self { lists, ..self }
    }

    /// Lists grow by so many bytes.
    fn keep_list(&mut self, bytes: usize) -> Result<(), ReceiveError> {
        self.list_bytes = self.list_bytes.saturating_add(bytes as u64);
        let of_pages = (self.announced / 4096).saturating_mul(self.lists.page);
        let all = self.list_bytes.saturating_add(self.lists.bytes).saturating_add(of_pages);
        self.hub.with_store(|store| store.keep_lists(all))
    }

    /// The receiving loop.
    pub(super) fn run(mut self) -> Result<Cargo, ReceiveError> {
        let mut received = self.receive_all();
        loop {
            let error = match received {
                Ok(()) => return Ok(Cargo { spaces: self.spaces, prepared: self.prepared }),
                Err(error @ ReceiveError::SourceAborted { .. }) => return Err(error),
                // Where another connection failed first, that is the reason.
                Err(error) => self.explain(self.hub.failure().unwrap_or(error)),
            };
            if !self.is_held_after(&error) {
                return Err(error);
            }
            // The new link may be lost too.
            received = self.go_on_after(error).and_then(|()| self.receive_all());
        }
    }

    /// The source has begun to say what the memory is in the end: the program stands still.
    pub(super) fn is_sealing(&self) -> bool {
        self.all_sealed || self.spaces.values().any(|incomer| incomer.owned_complete || incomer.sealed)
    }

    /// A connection that broke says nothing; the source may have said why on the first one, while nobody read there.
    fn explain(&mut self, error: ReceiveError) -> ReceiveError {
        if !error.is_link() || !self.hub.alarm().is_cancelled() {
            return error;
        }
        self.channel.link_mut().set_alarm(None);
        match self.channel.last_words(LAST_WORDS) {
            Some(ChannelError::Aborted { code, detail }) => ReceiveError::SourceAborted { code, detail },
            _ => error,
        }
    }

    fn receive_all(&mut self) -> Result<(), ReceiveError> {
        let mut meter = CpuMeter::new(self.hub.effort().cpu());
        // Until somebody waits for the end of this connection besides.
        self.channel.read_ahead(true);
        loop {
            match self.channel.receive()? {
                Incoming::Pages(payload) => {
                    // What the last ones took is paid for here, where nothing but pages has to wait.
                    meter.pay(|| (self.still)().is_err());
                    self.hub.pages(self.channel, payload, 0)?;
                }
                Incoming::Owned(batch) => self.owned(batch)?,
                Incoming::Owed(batch) => self.owed(batch)?,
                Incoming::Image(chunk, payload) => {
                    if !self.all_sealed {
                        return Err(ReceiveError::Order("an image before the seal"));
                    }
                    self.image(&chunk, payload)?;
                }
                Incoming::Digests(_) => return Err(ReceiveError::Order("digests before the images")),
                Incoming::Control(message) => {
                    if self.control(message)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn owned(&mut self, batch: OwnedBatch) -> Result<(), ReceiveError> {
        let incomer = self.spaces.get_mut(&batch.space).ok_or(ReceiveError::UnknownSpace(batch.space))?;
        if incomer.sealed || incomer.owned_complete {
            return Err(ReceiveError::Order("owned pages after the last ones"));
        }
        if incomer.owned.len() + batch.runs.len() > limits::MAX_OWNED_RUNS {
            return Err(ReceiveError::Order("more owned runs than a space may have"));
        }
        // An older source does not say that the program is about to stop.
        self.hub.effort().lift(true);
        let bytes = batch.runs.len() * LIST_BYTES;
        incomer.owned.extend(batch.runs);
        incomer.owned_complete = !batch.more;
        self.keep_list(bytes)
    }

    fn owed(&mut self, batch: OwedBatch) -> Result<(), ReceiveError> {
        let incomer = self.spaces.get_mut(&batch.space).ok_or(ReceiveError::UnknownSpace(batch.space))?;
        if incomer.sealed || incomer.owed_complete || !incomer.owned_complete {
            return Err(ReceiveError::Order("owed pages that do not follow the owned ones"));
        }
        if incomer.owed.len() + batch.runs.len() > limits::MAX_OWNED_RUNS {
            return Err(ReceiveError::Order("more owed runs than a space may have"));
        }
        let bytes = batch.runs.len() * LIST_BYTES;
        incomer.owed.extend(batch.runs);
        incomer.owed_complete = !batch.more;
        self.keep_list(bytes)
    }

    fn image(&mut self, chunk: &ImageChunk, payload: usize) -> Result<(), ReceiveError> {
        let bytes = self.pieces.receive(self.channel.link_mut(), chunk, payload)?;
        let (name, offset) = (chunk.name.as_str(), chunk.offset);
        // They are kept in memory too, and a file system in memory does not say no before the machine is out of it.
        self.image_bytes += bytes.len() as u64;
        if self.image_bytes > self.image_room {
            self.hub.with_store(|store| store.check_beside(IMAGES_AHEAD))?;
            self.image_room = self.image_bytes + IMAGES_AHEAD;
        }
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
                self.entered.get_or_insert_with(|| self.hub.effort().enter());
                spaces.into_iter().try_for_each(|info| self.open_space(info))?;
            }
            ControlMessage::SpaceGone { space } => self.close_space(space)?,
            ControlMessage::Hold { ms } => {
                self.hub.set_hold(Duration::from_millis(ms));
                self.hub.effort().lift(ms == 0);
                self.channel.read_ahead(ms > 0);
                if ms == 0 {
                    self.note_prepared()?;
                }
            }
            ControlMessage::Discard { space, runs } => {
                if self.spaces.get(&space).is_none_or(|incomer| incomer.sealed) {
                    return Err(ReceiveError::UnknownSpace(space));
                }
                self.hub.with_store(|store| {
                    store.discard(space, &runs);
                    Ok(())
                })?;
            }
            ControlMessage::RoundEnd { round, pages, .. } => {
                crate::fault::point("dest-round");
                let again = self.hub.complete(round, pages)?;
                self.asked_again = !again.is_empty();
                self.ask_again(again)?;
                let is_empty = round == 0 && pages == 0;
                if is_empty {
                    self.wait_for_memory()?;
                }
                self.channel.control(&ControlMessage::RoundAck { round })?;
                if !is_empty {
                    self.observer.event(&Event::Received { round, stored_pages: self.hub.stored_pages() });
                }
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
                if std::mem::take(&mut self.asked_again) {
                    self.unseal();
                    self.channel.control(&ControlMessage::Unsealed)?;
                    return Ok(false);
                }
                self.all_sealed = true;
                self.spaces.keys().for_each(|space| self.hub.shut(*space));
                self.channel.control(&ControlMessage::Sealed { pages: self.sealed_pages })?;
            }
            ControlMessage::ImagesEnd { files, bytes } => {
                let (have, size) = (self.files.len(), self.files.values().sum::<u64>());
                if !self.all_sealed || have != files as usize || size != bytes {
                    return Err(ReceiveError::ImageCount { have, announced: files });
                }
                return Ok(true);
            }
            ControlMessage::Network { addresses, keep_tcp } => {
                if !self.spaces.is_empty() {
                    return Err(ReceiveError::Order("what moves of the network after a space"));
                }
                self.network.prepare(addresses, keep_tcp)?;
                self.channel.control(&ControlMessage::NetworkReady)?;
            }
            ControlMessage::Announce => {
                let us = self.network.announce()?;
                self.channel.control(&ControlMessage::Announced { us })?;
            }
            ControlMessage::Ping { .. } => {}
            ControlMessage::Abort { code, detail } => {
                return Err(ReceiveError::SourceAborted { code, detail });
            }
            other => return Err(ReceiveError::Unexpected(format!("{other:?}"))),
        }
        Ok(false)
    }

    /// Nothing was sent, and the source stops the program when this is acknowledged: waits until memory for all that was announced is ready,
    /// unless the source does not want to wait any more.
    fn wait_for_memory(&mut self) -> Result<(), ReceiveError> {
        let (began, mut told) = (Instant::now(), Instant::now());
        while !self.hub.with_store(|store| Ok(store.is_ready()))?
            && began.elapsed() < MEMORY_PATIENCE
            && !self.channel.link_mut().readable_within(MEMORY_POLL)
        {
            if told.elapsed() >= SIGN_OF_LIFE {
                self.channel.control(&ControlMessage::Ping { n: 0 })?;
                told = Instant::now();
            }
        }
        Ok(())
    }

    /// The program is about to stop: what has been done here until now is no part of its downtime.
    fn note_prepared(&mut self) -> Result<(), ReceiveError> {
        let memory = self.hub.with_store(|store| Ok(store.ready_in()))?;
        let addresses = self.network.prepared_in().map(|time| (Preparation::Addresses, time));
        let prepared = [(Preparation::Criu, (self.criu)()), (Preparation::Memory, memory)];
        let prepared = prepared.into_iter().chain(addresses);
        self.prepared = prepared.map(|(what, time)| (what, time.as_micros() as u64)).collect();
        Ok(())
    }

    /// A space that will come.
    pub(super) fn open_space(&mut self, info: SpaceInfo) -> Result<(), ReceiveError> {
        if self.all_sealed || self.spaces.contains_key(&info.space) {
            return Err(ReceiveError::Order("a space that is known already"));
        }
        self.announced = self.announced.saturating_add(info.pages.saturating_mul(4096));
        let announced = self.announced;
        self.keep_list(0)?;
        self.hub.with_store(|store| store.reserve(announced))?;
        self.spaces.insert(info.space, Incomer { vpid: info.vpid, ..Incomer::default() });
        self.hub.open(info.space, announced / 4096);
        Ok(())
    }

    /// A space that is gone.
    pub(super) fn close_space(&mut self, space: SpaceId) -> Result<(), ReceiveError> {
        self.spaces.remove(&space).ok_or(ReceiveError::UnknownSpace(space))?;
        self.hub.shut(space);
        self.hub.with_store(|store| {
            store.remove_space(space);
            Ok(())
        })
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
        let complete = |complete: bool, runs: &[PageRun]| complete || runs.is_empty();
        if incomer.sealed
            || !complete(incomer.owned_complete, &incomer.owned)
            || !complete(incomer.owed_complete, &incomer.owed)
        {
            return Err(ReceiveError::Order("a seal in the middle of a space"));
        }
        // Where pages are still to come again, nothing can be compared yet: the answer to the end of the seal is no.
        if !self.asked_again {
            let held = incomer.held()?;
            // What it has of owed pages is of no use: it is dropped as what is not owned is.
            let sealed = self.hub.with_store(|store| store.seal(space, &held));
            let outcome = sealed.map_err(|error| match error {
                ReceiveError::Store(source @ StoreError::Missing { .. }) => {
                    ReceiveError::Seal { space, source: Some(source) }
                }
                other => other,
            })?;
            if outcome.pages != pages || outcome.digest != digest {
                return Err(ReceiveError::Seal { space, source: None });
            }
        }
        let bytes = regions.len() * size_of::<RegionInfo>();
        self.sealed_pages += pages;
        incomer.vpid = vpid;
        incomer.regions = regions;
        incomer.sealed = true;
        self.keep_list(bytes)
    }

    /// The source seals anew when it has sent what was asked for.
    fn unseal(&mut self) {
        self.sealed_pages = 0;
        self.list_bytes = 0;
        for incomer in self.spaces.values_mut() {
            *incomer = Incomer { vpid: incomer.vpid, ..Incomer::default() };
        }
    }

    fn ask_again(&mut self, again: Vec<(SpaceId, Vec<PageRun>)>) -> Result<(), ReceiveError> {
        for (space, runs) in again {
            tracing::warn!(space = space.0, runs = runs.len(), "asking for pages again");
            for runs in runs.chunks(limits::MAX_RUNS_PER_FRAME) {
                self.channel.control(&ControlMessage::Again { spaces: vec![(space, runs.to_vec())] })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReceivePlan;
    use crate::destination::store::PageStore;
    use crate::effort::Effort;
    use crate::link::TcpLink;
    use crate::observe::Silent;
    use pageferry_wire_format::AbortCode;

    /// A destination that works as hard as `effort` says hears of a program with `pages` and of a round in which none of them came, and then
    /// `next`; gives how many bytes are ready when it acknowledges that round.
    fn ready_at_the_acknowledgement(pages: u64, effort: &Effort, next: Option<ControlMessage>) -> u64 {
        const STALL: Duration = Duration::from_secs(30);
        let (ours, theirs) = TcpLink::pair().unwrap();
        let (mut ours, mut theirs) = (Channel::new(ours), Channel::new(theirs));
        ours.link_mut().set_stall(STALL);
        let hub = Hub::new(7, PageStore::sparing(Default::default(), effort).unwrap(), STALL).unwrap();
        hub.begin(theirs.link(), "program").unwrap();
        let images = ImageDir::new().expect("this test makes a file system, which needs root");
        let plan = ReceivePlan::new("127.0.0.1:0".parse().unwrap());
        std::thread::scope(|scope| {
            let hub = &hub;
            let destination = scope.spawn(move || {
                let mut network = Arrival::new(&plan, &Silent, 7, "program", String::new());
                let none = || Duration::ZERO;
                Reception::new(&mut theirs, hub, &images, &Silent, &|| Ok(()), &mut network, &none)
                    .run()
                    .map(drop)
            });
            let info = SpaceInfo { space: SpaceId(0), vpid: 1, name: "program".to_owned(), pages };
            ours.control(&ControlMessage::Spaces { round: 0, spaces: vec![info] }).unwrap();
            ours.control(&ControlMessage::RoundEnd { round: 0, pages: 0, bytes: 0 }).unwrap();
            let last = next.is_some();
            next.iter().for_each(|next| ours.control(next).unwrap());
            assert_eq!(ours.answer("the end of the round").unwrap(), ControlMessage::RoundAck { round: 0 });
            let ready = hub.with_store(|store| Ok(store.ready_bytes())).unwrap();
            if !last {
                ours.control(&ControlMessage::abort(AbortCode::Cancelled, "")).unwrap();
            }
            assert!(matches!(destination.join().unwrap(), Err(ReceiveError::SourceAborted { .. })));
            ready
        })
    }

    #[test]
    fn memory_is_ready_before_a_source_that_has_sent_nothing_stops_its_program() {
        const PAGES: u64 = 30_000;
        assert!(ready_at_the_acknowledgement(PAGES, &Effort::default(), None) >= PAGES * 4096);
    }

    #[test]
    fn a_source_that_does_not_wait_any_more_is_heard() {
        // With a hundredth of a processor that takes seconds.
        const PAGES: u64 = 1 << 17;
        let cancelled = ControlMessage::abort(AbortCode::Cancelled, "");
        let began = Instant::now();
        let ready = ready_at_the_acknowledgement(PAGES, &Effort::new(Some(1), 0), Some(cancelled));
        assert!(ready < PAGES * 4096, "{ready} bytes");
        assert!(began.elapsed() < MEMORY_PATIENCE);
    }
}
