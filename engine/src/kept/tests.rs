//! A small program of one space and one image, kept without a program.

use super::archive::Archive;
use super::chain::pages_below;
use super::error::KeptError;
use super::frames::{Frames, StreamFile};
use super::inspect::inspect;
use super::player::survey;
use crate::effort::CpuShare;
use crate::link::{Channel, ChannelError, Incoming};
use pageferry_wire_format::{
    Coding, ControlMessage, Hello, ImageChunk, OwnedBatch, PageBatch, PageDigest, PageNo, PageRef, PageRun,
    RestoreChoices, SpaceDigest, SpaceId, SpaceInfo, ZstdEncoder, delta, digest, version,
};
use std::fs;
use std::io::IoSlice;
use std::path::Path;
use std::time::Duration;

const SPACE: SpaceId = SpaceId(3);

type Said = Result<Option<ControlMessage>, ChannelError>;

/// The source's side of a session.
struct Speaker {
    archive: Archive,
    channel: Channel,
    /// What is there from before.
    offered: Vec<PageDigest>,
    /// A piece of a second image, and what it travels as.
    piece: Option<(ImageChunk, Vec<u8>)>,
}

impl Speaker {
    fn new(path: &Path) -> Self {
        Self::to(Archive::in_file(path).unwrap())
    }

    fn to(mut archive: Archive) -> Self {
        let mut link = archive.connect(&CpuShare::new(None)).unwrap();
        link.set_stall(Duration::from_secs(20));
        Self { archive, channel: Channel::new(link), offered: Vec::new(), piece: None }
    }

    fn say(&mut self, message: ControlMessage) -> Said {
        self.channel.control(&message)?;
        Ok(None)
    }

    fn ask(&mut self, message: ControlMessage) -> Said {
        self.channel.control(&message)?;
        self.channel.answer("an answer").map(Some)
    }

    fn begin(&mut self) -> Said {
        self.begin_on(0)
    }

    /// Begins where so many pages are there from before.
    fn begin_on(&mut self, pages: u64) -> Said {
        let welcome = self.ask(ControlMessage::Hello(Hello {
            versions: version::supported(),
            session: 7,
            engine: "test".to_owned(),
            program: "program".to_owned(),
            verify: false,
            choices: RestoreChoices {
                shell_job: false,
                tcp_close: true,
                file_locks: true,
                ext_unix_sk: false,
            },
        }))?;
        assert!(
            matches!(welcome, Some(ControlMessage::Welcome(welcome)) if welcome.streams == 1 && welcome.kept == pages)
        );
        if pages > 0 {
            let Incoming::Digests(offered) = self.channel.receive()? else { panic!("no digests") };
            assert_eq!(
                (offered.space, offered.digests.len() as u64, offered.more),
                (SpaceId::KEPT, pages, false)
            );
            self.offered = offered.digests;
        }
        let spaces = vec![SpaceInfo { space: SPACE, vpid: 9, name: "program".to_owned(), pages: 4 }];
        self.say(ControlMessage::Spaces { round: 0, spaces })
    }

    fn whole(&mut self, page: u64, bytes: &[u8]) -> Result<usize, ChannelError> {
        let mut batch = PageBatch::default();
        batch.clear(SPACE, 0, Coding::Raw);
        batch.push(PageNo(page), false, digest::page(bytes));
        self.channel.pages(&batch, &[IoSlice::new(bytes)])
    }

    fn round(&mut self) -> Said {
        self.ask(ControlMessage::RoundEnd { round: 0, pages: 0, bytes: 0 })
    }

    /// Everything after the last round; `pages` are what the program has.
    fn end(&mut self, pages: &[(u64, &[u8])]) -> Said {
        let mut sum = SpaceDigest::default();
        pages.iter().for_each(|(page, bytes)| sum.insert(PageNo(*page), &digest::page(bytes)));
        let runs = pages.iter().map(|(page, _)| PageRun { start: PageNo(*page), len: 1 }).collect();
        self.channel.owned(&OwnedBatch { space: SPACE, runs, more: false })?;
        let count = pages.len() as u64;
        let (space, vpid, regions) = (SPACE, 9, Vec::new());
        self.say(ControlMessage::SpaceSeal { space, vpid, pages: count, digest: sum, regions })?;
        let sealed = self.ask(ControlMessage::SealEnd { spaces: 1 })?;
        assert!(matches!(sealed, Some(ControlMessage::Sealed { pages }) if pages == count), "{sealed:?}");
        self.channel.image(&ImageChunk::new("core-9.img", 0, b"registers"), b"registers")?;
        let (mut files, mut bytes) = (1, 9);
        if let Some((chunk, payload)) = self.piece.take() {
            self.channel.image(&chunk, &payload)?;
            (files, bytes) = (2, bytes + u64::from(chunk.unpacked.unwrap()));
        }
        let ready = self.ask(ControlMessage::ImagesEnd { files, bytes })?;
        assert!(matches!(ready, Some(ControlMessage::Ready { .. })), "{ready:?}");
        self.ask(ControlMessage::Commit)
    }
}

fn at(page: u64) -> PageRef {
    PageRef { space: SPACE, page: PageNo(page) }
}

fn bytes(n: u8) -> [u8; 4096] {
    std::array::from_fn(|at| n.wrapping_mul(31).wrapping_add((at % 251) as u8))
}

/// Three checkpoints, each on top of the one before: page 5 is always the same, page 6 another one each time, page 8 the page 6 of the
/// one before.
fn checkpoints(dir: &Path) {
    for n in 1..=3u8 {
        let mut source = Speaker::to(Archive::in_directory(dir, Some("program")).unwrap());
        source.begin_on([0, 2, 3][usize::from(n) - 1]).unwrap();
        let (same, new, old) = (bytes(100), bytes(n), bytes(n - 1));
        let mut pages: Vec<(u64, &[u8])> = vec![(5, &same), (6, &new)];
        source.whole(6, &new).unwrap();
        if n == 1 {
            source.whole(5, &same).unwrap();
        } else {
            pages.push((8, &old));
            let mut batch = PageBatch::default();
            batch.clear(SPACE, 0, Coding::Copy);
            for (page, content) in [(5, digest::page(&same)), (8, digest::page(&old))] {
                let number = source.offered.iter().position(|offered| *offered == content).unwrap();
                let from = PageRef { space: SpaceId::KEPT, page: PageNo(number as u64) };
                batch.push_copy(PageNo(page), content, from);
            }
            source.channel.pages(&batch, &[]).unwrap();
        }
        assert!(matches!(source.round().unwrap(), Some(ControlMessage::RoundAck { .. })));
        source.end(&pages).unwrap();
        assert!(source.archive.is_kept());
    }
}

#[test]
fn checkpoints_on_top_of_each_other_have_what_is_new() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("checkpoints");
    checkpoints(&dir);
    let path = |n: u8| dir.join(format!("00000{n}.pageferry"));
    for n in 1..=3 {
        let right = inspect(&path(n)).unwrap();
        assert_eq!(
            (right.fault, right.spaces[0].pages),
            (None, [2, 3, 3][usize::from(n) - 1]),
            "checkpoint {n}"
        );
    }
    assert_eq!(inspect(&dir).unwrap().spaces[0].pages, 3, "the last one");
    let sizes: Vec<u64> = (1..=3).map(|n| fs::metadata(path(n)).unwrap().len()).collect();
    assert!(sizes[1] + 3500 < sizes[0] && sizes[2] == sizes[1], "{sizes:?}");
    let below = pages_below(&path(3)).unwrap();
    let mut page = [0; 4096];
    for content in [bytes(100), bytes(2), bytes(1)] {
        let digest = digest::page(&content);
        let number = below.digests().iter().position(|known| *known == digest).unwrap();
        assert!(below.read(number as u64, &digest, &mut page) && page == content);
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 4, "three streams and the index");
    // Another program begins anew.
    let mut other = Speaker::to(Archive::in_directory(&dir, Some("another")).unwrap());
    other.begin().unwrap();
}

#[test]
fn a_checkpoint_below_that_is_damaged_gone_or_another_one_is_named() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("checkpoints");
    checkpoints(&dir);
    let path = |n: u8| dir.join(format!("00000{n}.pageferry"));
    let says = |wanted: &str| {
        for refused in [inspect(&path(3)).map(drop), pages_below(&path(3)).map(drop)] {
            let (error, help) = refused.map_err(|error| (error.chain(), error.help())).unwrap_err();
            assert!(error.contains(wanted) && error.contains("000001.pageferry"), "{error}");
            assert!(help.unwrap().contains("000001.pageferry"));
        }
        let refused = Archive::in_directory(&dir, Some("program")).unwrap_err().chain();
        assert!(refused.contains("000001.pageferry"), "{refused}");
    };
    let whole = fs::read(path(1)).unwrap();
    // Within the bytes of its first page.
    let mut damaged = whole.clone();
    let at = damaged.windows(64).position(|bytes_here| bytes_here == &bytes(1)[..64]).unwrap();
    damaged[at + 5] ^= 1;
    fs::write(path(1), &damaged).unwrap();
    says("does not have the bytes");
    fs::write(path(1), &whole[..whole.len() - 7]).unwrap();
    says("cut off");
    fs::remove_file(path(1)).unwrap();
    says("could not read");
    stream(&path(1));
    says("another");
    fs::write(path(1), &whole).unwrap();
    assert_eq!(inspect(&path(3)).unwrap().fault, None, "as it was");
    // Without its index nobody knows what it is on top of.
    fs::remove_file(dir.join("index")).unwrap();
    let fault = inspect(&path(3)).unwrap().fault.unwrap();
    assert!(fault.contains("on top of an earlier checkpoint"), "{fault}");
}

/// A stream with a page in each of the codings that lean on others.
fn stream(path: &Path) -> u64 {
    let mut source = Speaker::new(path);
    source.begin().unwrap();
    let (one, two) = (bytes(1), bytes(2));
    source.whole(5, &one).unwrap();
    let mut batch = PageBatch::default();
    batch.clear(SPACE, 0, Coding::Copy);
    // The original comes later in the same round.
    batch.push_copy(PageNo(6), digest::page(&two), at(7));
    source.channel.pages(&batch, &[]).unwrap();
    source.whole(7, &two).unwrap();
    assert!(matches!(source.round().unwrap(), Some(ControlMessage::RoundAck { .. })));
    let mut changed = one;
    changed[77] ^= 1;
    let mut packed = Vec::new();
    delta::encode(&one, &changed, &mut packed);
    batch.clear(SPACE, 1, Coding::Delta);
    batch.push_on_base(PageNo(5), digest::page(&changed), at(5), digest::page(&one));
    source.channel.pages(&batch, &[IoSlice::new(&packed)]).unwrap();
    source.round().unwrap();
    let resumed = source.end(&[(5, &changed), (6, &two), (7, &two)]).unwrap();
    assert!(matches!(resumed, Some(ControlMessage::Resumed { .. })));
    assert!(path.exists(), "whoever hears that it is resumed finds the file");
    assert!(source.archive.is_kept());
    source.channel.link().sent()
}

#[test]
fn a_file_is_what_was_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let sent = stream(&path);
    assert_eq!(fs::metadata(&path).unwrap().len(), sent);
    survey(&path).unwrap();
}

#[test]
fn a_stream_that_was_cut_anywhere_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    stream(&path);
    let whole = fs::read(&path).unwrap();
    let cut = dir.path().join("cut");
    let mut frames = Frames::new(StreamFile::open(&path).unwrap());
    let mut lengths: Vec<usize> = (0..whole.len()).step_by(97).collect();
    while frames.next_head().unwrap().is_some() {
        let at = frames.spot().offset as usize;
        lengths.extend((at.saturating_sub(2)..at + 34).filter(|len| *len < whole.len()));
    }
    for len in lengths {
        fs::write(&cut, &whole[..len]).unwrap();
        match survey(&cut).unwrap_err() {
            KeptError::Empty => assert_eq!(len, 0),
            KeptError::Cut { spot, end } => {
                assert!(
                    end == len as u64 && spot.offset < end && spot.offset > 0 || spot.frame == 0,
                    "{len}"
                );
            }
            KeptError::Unfinished { frame, end } => assert!(frame > 0 && end == len as u64),
            other => panic!("cut after {len} bytes: {other}"),
        }
    }
}

#[test]
fn the_independent_reader_finds_every_byte_that_was_changed_and_every_end_that_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let sent = stream(&path);
    let right = inspect(&path).unwrap();
    assert_eq!((right.fault.as_deref(), right.bytes), (None, sent));
    let space = &right.spaces[0];
    assert_eq!((space.pages, space.zero_pages, space.vpid), (3, 0, 9));
    let coded: Vec<(&str, u64)> = right.codings.iter().map(|row| (row.name.as_str(), row.count)).collect();
    assert_eq!(coded, [("copy", 1), ("delta", 1), ("raw", 2)]);
    assert_eq!(space.bytes, right.rounds.iter().map(|round| round.bytes).sum::<u64>());
    let whole = fs::read(&path).unwrap();
    let mut frames = Frames::new(StreamFile::open(&path).unwrap());
    // All of the heads and of what is small; of pages a byte here and there.
    let mut places: Vec<usize> = (0..whole.len()).step_by(61).collect();
    while frames.next().unwrap().is_some() {
        let at = frames.spot().offset as usize;
        let len = frames.head().len() + frames.payload().len().min(64);
        places.extend(at..at + len);
    }
    let damaged = dir.path().join("damaged");
    for at in places {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&damaged, &bytes).unwrap();
        let found = inspect(&damaged).unwrap();
        assert!(found.fault.is_some() && found.bytes <= at as u64, "byte {at}: {:?}", found.fault);
        fs::write(&damaged, &whole[..at]).unwrap();
        assert!(inspect(&damaged).unwrap().fault.is_some(), "cut after {at} bytes");
    }
}

/// A file of ten thousand bytes, packed.
fn packed_piece() -> (ImageChunk, Vec<u8>) {
    let (bytes, mut packed) = (b"libraries ".repeat(1000), Vec::new());
    ZstdEncoder::new().unwrap().encode(1, &bytes, &mut packed).unwrap();
    (ImageChunk::packed("pages-1.img", 0, &bytes), packed)
}

#[test]
fn a_packed_piece_of_an_image_is_kept_as_it_came_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let mut source = Speaker::new(&path);
    source.begin().unwrap();
    source.whole(5, &bytes(1)).unwrap();
    source.round().unwrap();
    let (chunk, packed) = packed_piece();
    source.piece = Some((chunk, packed.clone()));
    source.end(&[(5, &bytes(1))]).unwrap();
    assert!(source.archive.is_kept());
    survey(&path).unwrap();
    let right = inspect(&path).unwrap();
    assert_eq!((right.fault, right.bytes), (None, source.channel.link().sent()));
    let image = right.images.iter().find(|image| image.name == "pages-1.img").unwrap();
    assert!(image.count == 1 && image.bytes < 500, "the bytes of the stream: {image:?}");
    // Damage of what is packed.
    let mut whole = fs::read(&path).unwrap();
    let at = whole.windows(packed.len()).position(|window| window == packed).unwrap();
    whole[at + packed.len() - 5] ^= 0x55;
    fs::write(&path, &whole).unwrap();
    let fault = inspect(&path).unwrap().fault.unwrap();
    assert!(fault.contains("pages-1.img"), "{fault}");
}

#[test]
fn a_packed_piece_that_is_not_what_it_says_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let (chunk, packed) = packed_piece();
    let longer = ImageChunk { unpacked: Some(10_001), ..chunk.clone() };
    let other = ImageChunk { digest: digest::ZERO_PAGE, ..chunk.clone() };
    let none = vec![0; packed.len()];
    for (piece, says) in [
        ((longer, packed.clone()), "cannot be unpacked"),
        ((chunk, none), "cannot be unpacked"),
        ((other, packed), "does not have the bytes"),
    ] {
        let mut source = Speaker::new(&path);
        source.begin().unwrap();
        source.whole(5, &bytes(1)).unwrap();
        source.round().unwrap();
        source.piece = Some(piece);
        let error = source.end(&[(5, &bytes(1))]).unwrap_err();
        assert!(matches!(&error, ChannelError::Aborted { detail, .. } if detail.contains(says)), "{error}");
        assert!(!source.archive.is_kept() && fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}

#[test]
fn a_page_whose_base_or_original_is_missing_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Speaker::new(&dir.path().join("stream"));
    source.begin().unwrap();
    let (one, mut two) = (bytes(1), bytes(1));
    two[9] ^= 1;
    let mut batch = PageBatch::default();
    batch.clear(SPACE, 0, Coding::Delta);
    batch.push_on_base(PageNo(5), digest::page(&one), at(5), digest::page(&two));
    let mut packed = Vec::new();
    delta::encode(&two, &one, &mut packed);
    source.channel.pages(&batch, &[IoSlice::new(&packed)]).unwrap();
    batch.clear(SPACE, 0, Coding::Copy);
    batch.push_copy(PageNo(6), digest::page(&two), at(7));
    source.channel.pages(&batch, &[]).unwrap();
    let Some(ControlMessage::Again { spaces }) = source.round().unwrap() else { panic!("not asked for") };
    assert_eq!(spaces, [(SPACE, vec![PageRun { start: PageNo(5), len: 2 }])]);
}

#[test]
fn what_is_wrong_is_refused_with_the_reason_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    type Wrong = fn(&mut Speaker) -> Said;
    let cases: [(&str, Wrong); 5] = [
        ("does not have the bytes", |source| {
            let mut batch = PageBatch::default();
            batch.clear(SPACE, 0, Coding::Raw);
            batch.push(PageNo(5), false, digest::page(&bytes(1)));
            source.channel.pages(&batch, &[IoSlice::new(&bytes(2))])?;
            source.round()
        }),
        ("space 4 is not known", |source| source.ask(ControlMessage::SpaceGone { space: SpaceId(4) })),
        ("not those that the source sealed", |source| {
            source.whole(5, &bytes(1))?;
            source.round()?;
            source.end(&[(5, &bytes(2))])
        }),
        ("an image before the seal", |source| {
            source.channel.image(&ImageChunk::new("x", 0, b"y"), b"y")?;
            source.round()
        }),
        ("announced twice", |source| {
            let spaces = vec![SpaceInfo { space: SPACE, vpid: 9, name: String::new(), pages: 4 }];
            source.say(ControlMessage::Spaces { round: 0, spaces })?;
            source.round()
        }),
    ];
    for (says, wrong) in cases {
        let mut source = Speaker::new(&path);
        source.begin().unwrap();
        let error = wrong(&mut source).unwrap_err();
        assert!(matches!(&error, ChannelError::Aborted { detail, .. } if detail.contains(says)), "{error}");
        assert!(!source.archive.is_kept());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{says}");
    }
    // A source that goes away.
    let mut source = Speaker::new(&path);
    source.begin().unwrap();
    drop(source);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
