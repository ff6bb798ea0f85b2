//! Every frame: its golden bytes, and its way there and back.
#![expect(clippy::disallowed_methods, reason = "the golden bytes are files")]

use crate::examples::{Frame, batch, decode, examples};
use pageferry_wire_format::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt::Write;
use std::path::Path;

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(32) {
        for byte in line {
            write!(text, "{byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

/// The bytes of the protocol are written down: a change of a frame has to be a change of the version.
/// `PAGEFERRY_WRITE_GOLDEN=1` writes the files anew.
#[test]
fn frames_have_their_golden_bytes() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut names = Vec::new();
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        let file = format!("v{}-{name}.hex", u16::from_le_bytes([bytes[4], bytes[5]]));
        let path = dir.join(&file);
        if std::env::var_os("PAGEFERRY_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, hex(&bytes)).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(hex(&bytes), golden, "the bytes of `{name}` have moved: that needs a new version");
        names.push(file);
    }
    for file in std::fs::read_dir(dir).unwrap() {
        let file = file.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&file), "{file} belongs to no example");
    }
}

#[test]
fn every_frame_comes_back() {
    for (name, frame) in examples() {
        assert_eq!(decode(&frame.encode().unwrap()), Some(Ok(frame)), "{name}");
    }
}

/// Everything at its limit fits into its frame, and one more of anything is refused by the sender.
#[test]
fn the_largest_frames_come_back_and_larger_ones_are_not_written() {
    let scattered = |count: usize| (0..count as u64).map(|n| PageRun { start: PageNo(2 * n), len: 1 });
    let pages =
        |count: usize| batch(1, Coding::Raw, &(0..count as u64).map(|n| (2 * n, 1)).collect::<Vec<_>>());
    let owned = |count| OwnedBatch { space: SpaceId(1), runs: scattered(count).collect(), more: false };
    let owed = |count| OwedBatch { space: SpaceId(1), runs: scattered(count).collect(), more: false };
    let want = |count| ControlMessage::Want { space: SpaceId(1), runs: scattered(count).collect() };
    let late = |stream| ControlMessage::Late { session: 1, stream };
    let digests = |count| DigestBatch {
        space: SpaceId(1),
        runs: scattered(count).collect(),
        digests: vec![digest::ZERO_PAGE; count],
        more: true,
    };
    let spaces = |count: usize, name: usize| ControlMessage::Spaces {
        round: 0,
        spaces: (0..count as u32)
            .map(|n| SpaceInfo { space: SpaceId(n), vpid: 1, name: "x".repeat(name), pages: 1 })
            .collect(),
    };
    let again =
        |count: usize| ControlMessage::Again { spaces: vec![(SpaceId(1), scattered(count).collect())] };
    let asking = |count: u32| ControlMessage::Again {
        spaces: (0..count).map(|n| (SpaceId(n), scattered(1).collect())).collect(),
    };
    let discard = |count| ControlMessage::Discard { space: SpaceId(1), runs: scattered(count).collect() };
    let seal = |count: u64| ControlMessage::SpaceSeal {
        space: SpaceId(1),
        vpid: 1,
        pages: 0,
        digest: SpaceDigest::default(),
        regions: (0..count)
            .map(|n| RegionInfo { start: n << 12, end: (n + 1) << 12, comparable: true })
            .collect(),
    };
    let ready = |count| ControlMessage::Ready { timings: vec![(Part::Run, 1); count], verified_pages: 0 };
    let image = |name: usize, len| Frame::Image(ImageChunk::new(&"x".repeat(name), 0, b""), len);
    let packed = |name: usize, len: usize| {
        let chunk = ImageChunk { unpacked: Some(len as u32), ..ImageChunk::new(&"x".repeat(name), 0, b"") };
        Frame::Image(chunk, len - 1)
    };
    let fits = [
        Frame::Pages(pages(limits::MAX_BATCH_PAGES), limits::MAX_PAYLOAD_BYTES),
        Frame::Owned(owned(limits::MAX_RUNS_PER_FRAME)),
        Frame::Owed(owed(limits::MAX_RUNS_PER_FRAME)),
        Frame::Control(want(limits::MAX_RUNS_PER_FRAME)),
        Frame::Control(late(limits::MAX_STREAMS)),
        Frame::Digests(digests(limits::MAX_DIGESTS_PER_FRAME)),
        Frame::Control(spaces(limits::MAX_SPACES, limits::MAX_NAME_BYTES)),
        Frame::Control(discard(limits::MAX_RUNS_PER_FRAME)),
        Frame::Control(again(limits::MAX_RUNS_PER_FRAME)),
        Frame::Control(asking(limits::MAX_SPACES as u32)),
        Frame::Pages(
            batch(
                1,
                Coding::ZstdOnBase,
                &(0..limits::MAX_BATCH_PAGES as u64).map(|n| (2 * n, 1)).collect::<Vec<_>>(),
            ),
            limits::MAX_PAYLOAD_BYTES,
        ),
        Frame::Control(seal(limits::MAX_REGIONS as u64)),
        Frame::Control(ready(limits::MAX_TIMINGS)),
        Frame::Control(ControlMessage::abort(AbortCode::Busy, &"x".repeat(limits::MAX_DETAIL_BYTES))),
        image(limits::MAX_IMAGE_NAME, limits::MAX_IMAGE_CHUNK),
        packed(limits::MAX_IMAGE_NAME, limits::MAX_IMAGE_CHUNK),
    ];
    for frame in fits {
        assert_eq!(decode(&frame.encode().unwrap()), Some(Ok(frame)));
    }
    let too_large = [
        Frame::Pages(pages(limits::MAX_BATCH_PAGES + 1), limits::MAX_PAYLOAD_BYTES + PAGE_SIZE),
        Frame::Owned(owned(limits::MAX_RUNS_PER_FRAME + 1)),
        Frame::Owed(owed(limits::MAX_RUNS_PER_FRAME + 1)),
        Frame::Control(want(limits::MAX_RUNS_PER_FRAME + 1)),
        Frame::Control(late(limits::MAX_STREAMS + 1)),
        Frame::Digests(digests(limits::MAX_DIGESTS_PER_FRAME + 1)),
        Frame::Control(spaces(limits::MAX_SPACES + 1, 1)),
        Frame::Control(spaces(1, limits::MAX_NAME_BYTES + 1)),
        Frame::Control(discard(limits::MAX_RUNS_PER_FRAME + 1)),
        Frame::Control(again(limits::MAX_RUNS_PER_FRAME + 1)),
        Frame::Control(asking(limits::MAX_SPACES as u32 + 1)),
        Frame::Control(seal(limits::MAX_REGIONS as u64 + 1)),
        Frame::Control(ready(limits::MAX_TIMINGS + 1)),
        Frame::Control(ControlMessage::Abort {
            code: AbortCode::Busy,
            detail: "x".repeat(limits::MAX_DETAIL_BYTES + 1),
        }),
        image(limits::MAX_IMAGE_NAME + 1, 1),
        image(1, limits::MAX_IMAGE_CHUNK + 1),
        packed(limits::MAX_IMAGE_NAME + 1, 2),
        packed(1, limits::MAX_IMAGE_CHUNK + 1),
    ];
    for (index, frame) in too_large.iter().enumerate() {
        let error = frame.encode().unwrap_err();
        assert!(matches!(error, EncodeError::Invalid(DecodeError::Limit { .. })), "{index}: {error:?}");
    }
}

/// A tree of processes names most of its pages as copies: neither scattered pages nor many of them may take many bytes.
#[test]
fn names_of_pages_take_few_bytes() {
    let head = |coding, pages: &[(u64, u8)], from: &dyn Fn(u64) -> PageRef| {
        let mut batch = PageBatch::default();
        batch.clear(SpaceId(1), 7, coding);
        for (page, content) in pages {
            batch.push_copy(PageNo(*page), digest::page(&[*content; PAGE_SIZE]), from(*page));
        }
        Frame::Pages(batch, 0).encode().unwrap().len() - HEADER_BYTES
    };
    let scattered: Vec<_> = (0..256).map(|n| (0x7f12_3456_7000 + 10 * n, 1)).collect();
    let same_place = |page| PageRef { space: SpaceId(0), page: PageNo(page) };
    assert!(head(Coding::Copy, &scattered, &same_place) < 3 * 256);
    let row: Vec<_> = (0..256).map(|n| (0x7f12_3456_7000 + n, 1)).collect();
    assert!(head(Coding::Copy, &row, &same_place) < 100);
    assert!(
        head(Coding::Copy, &row, &|page| PageRef { space: SpaceId::KEPT, page: PageNo(page % 4096) }) < 100
    );
    // The worst: no two pages are neighbours, and no two sources are at the same distance.
    let elsewhere =
        |page: u64| PageRef { space: SpaceId((page % 7) as u32), page: PageNo((1 << 51) - 3 * page) };
    assert!(head(Coding::Copy, &scattered, &elsewhere) <= limits::MAX_BATCH_HEAD);
}

#[test]
fn an_abort_is_cut_to_its_limit_at_a_character() {
    let ControlMessage::Abort { detail, .. } = ControlMessage::abort(AbortCode::Internal, &"é".repeat(5000))
    else {
        unreachable!()
    };
    assert!(detail.len() <= limits::MAX_DETAIL_BYTES && detail.len() > limits::MAX_DETAIL_BYTES - 4);
}

#[test]
fn the_codes_of_aborts_are_numbers_that_stay() {
    use AbortCode::*;
    let known = [
        Busy,
        VersionMismatch,
        OutOfMemory,
        BadFrame,
        DigestMismatch,
        SealMismatch,
        RestoreFailed,
        VerifyFailed,
        Cancelled,
        SourceFailed,
        Internal,
        Ended,
    ];
    for (code, number) in known.into_iter().zip(1..) {
        assert_eq!((code.number(), AbortCode::from_number(number)), (number, code));
    }
    assert_eq!(AbortCode::from_number(13), Unknown(13));
    assert_eq!(AbortCode::from_number(0), Unknown(0));
}

/// Pages in ascending order, with gaps and without.
fn pages(longest: usize) -> impl Strategy<Value = Vec<(u64, u8)>> {
    (0u64..1 << 50, vec((1u64..5, 0u8..4), 1..longest)).prop_map(|(mut page, steps)| {
        let step = |(step, content)| {
            page += step;
            (page, content)
        };
        steps.into_iter().map(step).collect()
    })
}

fn page_runs() -> impl Strategy<Value = Vec<PageRun>> {
    (0u64..1 << 50, vec((0u64..9, 1u64..9), 0..60)).prop_map(|(mut at, steps)| {
        let step = |(gap, len)| {
            let start = PageNo(at + gap);
            at += gap + len;
            PageRun { start, len }
        };
        steps.into_iter().map(step).collect()
    })
}

fn control() -> impl Strategy<Value = ControlMessage> {
    let seal = ((0..u32::MAX, any::<i32>(), any::<u64>(), any::<[u8; 16]>()), page_runs(), any::<bool>())
        .prop_map(|((space, vpid, pages, digest), runs, comparable)| ControlMessage::SpaceSeal {
            space: SpaceId(space),
            vpid,
            pages,
            digest: SpaceDigest::from_bytes(digest),
            regions: runs
                .into_iter()
                .map(|run| RegionInfo { start: run.start.0 << 12, end: run.end() << 12, comparable })
                .collect(),
        });
    let spaces = (any::<u32>(), vec(((0..u32::MAX, any::<i32>(), any::<u64>()), "[a-zé\n]{0,100}"), 0..20))
        .prop_map(|(round, list)| ControlMessage::Spaces {
            round,
            spaces: list
                .into_iter()
                .map(|((space, vpid, pages), name)| SpaceInfo { space: SpaceId(space), vpid, name, pages })
                .collect(),
        });
    let welcome = (1..=limits::MAX_STREAMS, 0..=limits::MAX_KEPT_PAGES, any::<u64>()).prop_map(
        |(streams, kept, memory)| {
            let (version, engine) = (version::CURRENT, "0.2".to_owned());
            ControlMessage::Welcome(Welcome { version, engine, memory, streams, kept })
        },
    );
    let some_runs = page_runs().prop_filter("nothing", |runs| !runs.is_empty());
    let again = proptest::collection::btree_map(0..u32::MAX, some_runs, 1..9).prop_map(|spaces| {
        ControlMessage::Again {
            spaces: spaces.into_iter().map(|(space, runs)| (SpaceId(space), runs)).collect(),
        }
    });
    prop_oneof![
        seal,
        spaces,
        welcome,
        again,
        (any::<u128>(), 1..limits::MAX_STREAMS)
            .prop_map(|(session, stream)| ControlMessage::Join { session, stream }),
        (0..u32::MAX, page_runs())
            .prop_map(|(space, runs)| ControlMessage::Discard { space: SpaceId(space), runs }),
        (any::<u16>(), any::<String>())
            .prop_map(|(code, detail)| ControlMessage::abort(AbortCode::from_number(code), &detail)),
        any::<u128>().prop_map(|session| ControlMessage::Query { session }),
        any::<(u32, u64, u64)>().prop_map(|(round, pages, bytes)| ControlMessage::RoundEnd {
            round,
            pages,
            bytes
        }),
    ]
}

proptest! {
    #[test]
    fn batches_come_back(space in 0..u32::MAX, pages in pages(limits::MAX_BATCH_PAGES), way in 0usize..5) {
        let coding = [Coding::Raw, Coding::Zstd, Coding::Delta, Coding::Copy, Coding::ZstdOnBase][way];
        let has_no_zeros = matches!(coding, Coding::Copy | Coding::ZstdOnBase);
        let pages: Vec<(u64, u8)> =
            pages.into_iter().map(|(page, content)| (page, content | u8::from(has_no_zeros))).collect();
        let batch = batch(space, coding, &pages);
        prop_assert_eq!(batch.len(), pages.len());
        let payload = match coding {
            Coding::Raw => batch.nonzero() * PAGE_SIZE,
            Coding::Zstd | Coding::ZstdOnBase => 17,
            Coding::Copy => 0,
            Coding::Delta => batch.nonzero() * 12,
        };
        let listed: Vec<(u64, bool)> = batch.pages().map(|(page, zero)| (page.0, zero)).collect();
        let wanted: Vec<(u64, bool)> = pages.iter().map(|(page, content)| (*page, *content == 0)).collect();
        prop_assert_eq!(listed, wanted);
        prop_assert!(batch.stored().eq(pages.iter().filter(|(_, content)| *content != 0).map(|(page, _)| PageNo(*page))));
        let plain = matches!(coding, Coding::Raw | Coding::Zstd);
        prop_assert_eq!(batch.sources().len(), if plain { 0 } else { batch.nonzero() });
        prop_assert_eq!(batch.each().len(), if plain || coding == Coding::Copy { 0 } else { batch.nonzero() });
        let nothing_to_pack = coding != Coding::Raw && batch.nonzero() == 0;
        let frame = Frame::Pages(batch, payload);
        match frame.encode() {
            Ok(bytes) => prop_assert_eq!(decode(&bytes), Some(Ok(frame))),
            Err(_) => prop_assert!(nothing_to_pack),
        }
    }

    #[test]
    fn a_batch_is_used_again_without_a_trace(first in pages(40), second in pages(40)) {
        let bytes = batch(1, Coding::Zstd, &second);
        prop_assume!(bytes.nonzero() > 0);
        let mut frame = Vec::new();
        bytes.encode(1, &mut Sequencer::default(), &mut frame).unwrap();
        let mut used = batch(9, Coding::Raw, &first);
        used.decode_into(&frame[HEADER_BYTES..], 1).unwrap();
        prop_assert_eq!(&used, &bytes);
        prop_assert!(used.decode_into(&frame[HEADER_BYTES..frame.len() - 1], 1).is_err());
        prop_assert!(used.is_empty(), "nothing is left of a batch that could not be read");
    }

    #[test]
    fn lists_come_back(space in 0..u32::MAX, runs in page_runs(), more: bool, seed: u8) {
        let count: u64 = runs.iter().map(|run| run.len).sum();
        let space = SpaceId(space);
        let digests = (0..count).map(|n| digest::page(&[seed, n as u8])).collect();
        for frame in [
            Frame::Owned(OwnedBatch { space, runs: runs.clone(), more }),
            Frame::Digests(DigestBatch { space, runs, digests, more }),
        ] {
            prop_assert_eq!(decode(&frame.encode().unwrap()), Some(Ok(frame)));
        }
    }

    #[test]
    fn messages_come_back(message in control()) {
        let frame = Frame::Control(message);
        prop_assert_eq!(decode(&frame.encode().unwrap()), Some(Ok(frame)));
    }

    #[test]
    fn packed_images_come_back(name in "[a-z0-9-]{1,9}(/[a-z0-9-]{1,9}){0,5}", offset in 0u64..1 << 60, len in 0usize..1 << 20, payload in 0usize..1 << 20) {
        let chunk = ImageChunk { unpacked: Some(len as u32), ..ImageChunk::new(&name, offset, name.as_bytes()) };
        let frame = Frame::Image(chunk, payload);
        match frame.encode() {
            Ok(bytes) => prop_assert_eq!(decode(&bytes), Some(Ok(frame))),
            Err(_) => prop_assert!(payload == 0 || payload >= len),
        }
    }

    #[test]
    fn images_come_back(name in "[a-z0-9.-]{1,9}(/[a-z0-9-]{1,9}){0,5}", offset in 0u64..1 << 60, len in 0usize..1 << 20) {
        let frame = Frame::Image(ImageChunk::new(&name, offset, name.as_bytes()), len);
        match frame.encode() {
            Ok(bytes) => prop_assert_eq!(decode(&bytes), Some(Ok(frame))),
            Err(_) => prop_assert!(name.split('/').any(|part| part == "." || part == "..")),
        }
    }
}
