//! What is made of frames that are damaged, that lie, or that come in the wrong order.

use crate::examples::{Frame, batch, decode, examples, take};
use pageferry_wire_format::*;
use proptest::prelude::*;
use xxhash_rust::xxh3::Xxh3Default;

/// Makes the checksum right again, and the length of the head: as a peer with a bug would write the frame.
fn reseal(frame: &mut [u8]) {
    let head_len = (frame.len() - HEADER_BYTES) as u32;
    frame[8..12].copy_from_slice(&head_len.to_le_bytes());
    let mut check = Xxh3Default::new();
    check.update(&frame[..24]);
    check.update(&frame[HEADER_BYTES..]);
    frame[24..32].copy_from_slice(&check.digest().to_le_bytes());
}

/// A frame that is understood is exactly the one that its meaning is written as: nothing is overlooked.
fn understood_or_refused(bytes: &[u8]) -> Result<(), String> {
    let Some(Ok(frame)) = decode(bytes) else { return Ok(()) };
    match frame.encode() {
        Ok(again) if again == bytes => Ok(()),
        Ok(_) => Err(format!("{frame:?} is written in another way")),
        Err(error) => Err(format!("{frame:?} was understood and cannot be written: {error:?}")),
    }
}

#[test]
fn a_frame_cut_anywhere_is_not_taken() {
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "{name} cut at {len}");
        }
    }
}

#[test]
fn any_flipped_bit_is_an_error() {
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A head that is announced as longer is waited for.
            let longer = (64..96).contains(&bit) && decode(&damaged).is_none();
            assert!(longer || matches!(decode(&damaged), Some(Err(_))), "{name} with bit {bit} flipped");
        }
    }
}

#[test]
fn a_head_that_lies_in_one_bit_is_refused_or_means_what_it_says() {
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        for bit in 32..bytes.len() * 8 {
            let mut lie = bytes.clone();
            lie[bit / 8] ^= 1 << (bit % 8);
            reseal(&mut lie);
            understood_or_refused(&lie).unwrap_or_else(|e| panic!("{name}, bit {bit}: {e}"));
        }
    }
}

#[test]
fn a_head_of_another_length_is_refused() {
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        for len in HEADER_BYTES..bytes.len() + 20 {
            let mut lie = bytes.clone();
            lie.resize(len, 0);
            reseal(&mut lie);
            assert!(len == bytes.len() || matches!(decode(&lie), Some(Err(_))), "{name}: {len} bytes");
        }
    }
}

/// Every field of every width, set to its largest and to a large value: lengths of 2^60 among them.
#[test]
fn large_numbers_anywhere_are_refused_or_meant() {
    for (name, frame) in examples() {
        let bytes = frame.encode().unwrap();
        for width in [1, 2, 4, 8] {
            for at in 4..bytes.len().saturating_sub(width) {
                for top in [0xff, 0x10] {
                    let mut lie = bytes.clone();
                    lie[at..at + width].fill(0xff);
                    lie[at + width - 1] = top;
                    reseal(&mut lie);
                    understood_or_refused(&lie).unwrap_or_else(|e| panic!("{name}, byte {at}: {e}"));
                }
            }
        }
    }
}

#[test]
fn lengths_are_limited_before_anything_is_received_for_them() {
    let header = |frame: &Frame, at: usize, value: u32| {
        let bytes = frame.encode().unwrap();
        let mut raw = *bytes.first_chunk::<HEADER_BYTES>().unwrap();
        raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Header::parse(&raw)
    };
    for (name, frame) in examples() {
        let (head, payload) = match frame {
            Frame::Pages(..) => (limits::MAX_BATCH_HEAD, limits::MAX_PAYLOAD_BYTES),
            Frame::Image(ref chunk, _) if chunk.unpacked.is_some() => {
                (limits::MAX_PACKED_IMAGE_HEAD, limits::MAX_IMAGE_CHUNK)
            }
            Frame::Image(..) => (limits::MAX_IMAGE_HEAD, limits::MAX_IMAGE_CHUNK),
            Frame::Control(_) => (limits::MAX_CONTROL_BYTES, 0),
            Frame::Digests(_) => (limits::MAX_DIGESTS_HEAD, 0),
            Frame::Owned(_) | Frame::Owed(_) => (limits::MAX_OWNED_HEAD, 0),
        };
        for (at, most) in [(8, head as u32), (12, payload as u32)] {
            assert!(header(&frame, at, most).is_ok(), "{name}");
            for value in [most + 1, u32::MAX] {
                let refused = header(&frame, at, value);
                assert!(matches!(refused, Err(DecodeError::Limit { .. })), "{name}: {refused:?}");
            }
        }
    }
}

/// A list that announces 2^60 entries in a head of some bytes.
#[test]
fn announced_counts_are_checked_against_what_is_there() {
    let discard = ControlMessage::Discard { space: SpaceId(1), runs: vec![] };
    let mut bytes = Frame::Control(discard).encode().unwrap();
    let count = bytes.len() - 8;
    for entries in [1, 2, 60_000, 1u64 << 32, 1 << 60, u64::MAX] {
        bytes[count..].copy_from_slice(&entries.to_le_bytes());
        reseal(&mut bytes);
        let Some(Err(error)) = decode(&bytes) else { panic!("{entries} entries were believed") };
        assert!(matches!(error.source, DecodeError::Control(_)), "{entries}: {error:?}");
    }
    let run = |start, len| vec![PageRun { start: PageNo(start), len }];
    for runs in [run(1, 1 << 60), run(u64::MAX, u64::MAX), run(1 << 52, 1), run((1 << 52) - 1, 2), run(4, 0)]
    {
        let owned = Frame::Owned(OwnedBatch { space: SpaceId(1), runs: vec![runs[0]; 1], more: false });
        assert!(owned.encode().is_err(), "{runs:?}");
        let mut bytes =
            Frame::Owned(OwnedBatch { space: SpaceId(1), runs: run(4, 1), more: false }).encode().unwrap();
        let at = bytes.len() - 16;
        bytes[at..at + 8].copy_from_slice(&runs[0].start.0.to_le_bytes());
        bytes[at + 8..].copy_from_slice(&runs[0].len.to_le_bytes());
        reseal(&mut bytes);
        assert!(matches!(decode(&bytes), Some(Err(_))), "{runs:?}");
    }
}

#[test]
fn payloads_that_do_not_fit_their_pages_are_refused() {
    let raw = batch(1, Coding::Raw, &[(1, 1), (2, 0), (3, 1)]);
    let zstd = batch(1, Coding::Zstd, &[(1, 1), (2, 0), (3, 1)]);
    let encode = |batch: &PageBatch, len| Frame::Pages(batch.clone(), len).encode();
    for len in [0, PAGE_SIZE, 2 * PAGE_SIZE - 1, 2 * PAGE_SIZE + 1, 3 * PAGE_SIZE] {
        assert!(encode(&raw, len).is_err(), "{len}");
    }
    assert!(encode(&raw, 2 * PAGE_SIZE).is_ok());
    assert!(encode(&zstd, 0).is_err() && encode(&zstd, 2 * PAGE_SIZE + 1).is_err());
    assert!(encode(&zstd, 1).is_ok() && encode(&zstd, 2 * PAGE_SIZE).is_ok());
    let delta = batch(1, Coding::Delta, &[(1, 1), (2, 0), (3, 1)]);
    assert!(encode(&delta, 17).is_err() && encode(&delta, 2 * PAGE_SIZE + 1).is_err());
    assert!(encode(&delta, 18).is_ok() && encode(&delta, 2 * PAGE_SIZE).is_ok());
    let mut one_base = PageBatch::default();
    let own = PageRef { space: SpaceId(1), page: PageNo(1) };
    one_base.clear(SpaceId(1), 1, Coding::Delta);
    one_base.push_on_base(PageNo(1), digest::ZERO_PAGE, own, digest::ZERO_PAGE);
    one_base.push(PageNo(2), false, digest::ZERO_PAGE);
    assert!(encode(&one_base, 30).is_err(), "a delta without a base");
    one_base.set_coding(Coding::Raw);
    assert!(encode(&one_base, 2 * PAGE_SIZE).is_ok(), "its bases are forgotten");
    one_base.clear(SpaceId(1), 1, Coding::Raw);
    one_base.push_on_base(PageNo(1), digest::ZERO_PAGE, own, digest::ZERO_PAGE);
    assert!(encode(&one_base, PAGE_SIZE).is_err(), "a base without a delta");
    let zeros = batch(1, Coding::Zstd, &[(1, 0)]);
    assert!(encode(&zeros, 0).is_err() && encode(&zeros, 9).is_err());
    assert!(encode(&PageBatch::default(), 0).is_err(), "no pages");
}

#[test]
fn pages_out_of_order_are_not_written() {
    for pages in [&[(5, 1), (4, 1)][..], &[(5, 1), (5, 1)], &[(5, 1), (6, 1), (6, 0)], &[(1 << 52, 1)]] {
        let batch = batch(1, Coding::Raw, pages);
        let payload = batch.nonzero() * PAGE_SIZE;
        assert!(Frame::Pages(batch, payload).encode().is_err(), "{pages:?}");
    }
}

#[test]
fn image_names_stay_inside_their_folder() {
    for name in
        ["", "/etc/passwd", "../x.img", "a/../../x", "a//b", "a/.", "x\n.img", "a/", "..", ".", "a\0b"]
    {
        let chunk = ImageChunk::new(name, 0, b"");
        assert!(Frame::Image(chunk, 0).encode().is_err(), "{name:?}");
        let chunk = ImageChunk::packed(name, 0, &[0; 100]);
        assert!(Frame::Image(chunk, 19).encode().is_err(), "{name:?}");
    }
    assert!(Frame::Image(ImageChunk::new("x", u64::MAX, b"a"), 1).encode().is_err());
}

/// Each kind of piece has a version of its own, and the other's head makes no sense in it.
#[test]
fn a_piece_is_packed_in_its_own_kind_and_version_only() {
    for packed in [false, true] {
        let chunk = if packed { ImageChunk::packed } else { ImageChunk::new }("x.img", 0, &[0; 100]);
        let bytes = Frame::Image(chunk, 19).encode().unwrap();
        for (at, lie) in [(4, if packed { 2 } else { 5 }), (4, 4), (6, if packed { 2 } else { 7 })] {
            let mut bytes = bytes.clone();
            bytes[at] = lie;
            reseal(&mut bytes);
            assert!(matches!(decode(&bytes), Some(Err(_))), "packed: {packed}, byte {at} is {lie}");
        }
    }
    let bytes = Frame::Image(ImageChunk::packed("x.img", 0, &[0; 100]), 19).encode().unwrap();
    // After offset and digest: as long as the payload, shorter, and longer than any piece.
    for len in [19, 18, 0, limits::MAX_IMAGE_CHUNK as u32 + 1, u32::MAX] {
        let mut bytes = bytes.clone();
        bytes[HEADER_BYTES + 24..HEADER_BYTES + 28].copy_from_slice(&len.to_le_bytes());
        reseal(&mut bytes);
        assert!(matches!(decode(&bytes), Some(Err(_))), "{len}");
    }
}

#[test]
fn regions_and_codes_that_make_no_sense_are_refused() {
    let seal = |regions: &[(u64, u64)]| {
        writes(ControlMessage::SpaceSeal {
            space: SpaceId(1),
            vpid: 1,
            pages: 0,
            digest: SpaceDigest::default(),
            regions: regions
                .iter()
                .map(|&(start, end)| RegionInfo { start, end, comparable: true })
                .collect(),
        })
    };
    assert!(seal(&[(0, 0x1000), (0x1000, 0x3000)]));
    for regions in [
        &[(0x1000, 0x1000)][..],
        &[(0x2000, 0x1000)],
        &[(0x1000, 0x1fff)],
        &[(1, 0x1000)],
        &[(0x1000, 0x3000), (0x2000, 0x4000)],
        &[(0x2000, 0x3000), (0x1000, 0x2000)],
    ] {
        assert!(!seal(regions), "{regions:x?}");
    }
    let code = ControlMessage::Abort { code: AbortCode::Unknown(1), detail: String::new() };
    assert!(!writes(code), "number 1 has a name");
}

#[test]
fn a_welcome_promises_what_can_be_kept() {
    let welcome = |version, streams, kept| {
        writes(ControlMessage::Welcome(Welcome { version, engine: String::new(), memory: 0, streams, kept }))
    };
    assert!(welcome(version::CURRENT, 1, 0));
    assert!(welcome(version::CURRENT, limits::MAX_STREAMS, limits::MAX_KEPT_PAGES));
    assert!(!welcome(version::CURRENT + 1, 1, 0) && !welcome(version::OLDEST - 1, 1, 0), "another version");
    assert!(!welcome(version::CURRENT, 0, 0), "no connection");
    assert!(!welcome(version::CURRENT, limits::MAX_STREAMS + 1, 0));
    for kept in [limits::MAX_KEPT_PAGES + 1, 1 << 60, u64::MAX] {
        assert!(!welcome(version::CURRENT, 1, kept), "{kept} pages");
    }
}

#[test]
fn a_further_connection_has_a_number_of_its_own() {
    let join = |stream| writes(ControlMessage::Join { session: 1, stream });
    assert!(join(1) && join(limits::MAX_STREAMS - 1));
    assert!(!join(0), "the first connection says hello");
    assert!(!join(limits::MAX_STREAMS) && !join(u16::MAX));
}

#[test]
fn what_is_asked_for_again_is_something_and_is_asked_for_once() {
    let run = |start, len| PageRun { start: PageNo(start), len };
    let again = |spaces: &[(u32, &[PageRun])]| {
        let spaces = spaces.iter().map(|(space, runs)| (SpaceId(*space), runs.to_vec())).collect();
        writes(ControlMessage::Again { spaces })
    };
    let some = &[run(4, 1), run(7, 2)][..];
    assert!(again(&[(0, some)]) && again(&[(0, some), (9, some)]));
    assert!(!again(&[]) && !again(&[(0, &[])]) && !again(&[(0, some), (1, &[])]), "nothing");
    assert!(!again(&[(1, some), (1, some)]) && !again(&[(2, some), (1, some)]), "twice, or in disorder");
    assert!(!again(&[(1, &[run(7, 2), run(4, 1)])]) && !again(&[(1, &[run(4, 2), run(5, 2)])]));
    assert!(!again(&[(1, &[run(1 << 52, 1)])]) && !again(&[(1, &[run(0, 1 << 60)])]));
    assert!(!again(&[(SpaceId::KEPT.0, some)]), "the source has no such space");
}

#[test]
fn the_number_of_the_kept_store_is_no_space_of_the_source() {
    let (space, runs) = (SpaceId::KEPT, vec![PageRun { start: PageNo(0), len: 1 }]);
    let info = SpaceInfo { space, vpid: 1, name: String::new(), pages: 0 };
    let seal = ControlMessage::SpaceSeal {
        space,
        vpid: 1,
        pages: 0,
        digest: SpaceDigest::default(),
        regions: vec![],
    };
    for message in [
        ControlMessage::Spaces { round: 0, spaces: vec![info] },
        ControlMessage::SpaceGone { space },
        ControlMessage::Discard { space, runs: runs.clone() },
        seal,
    ] {
        assert!(!writes(message.clone()), "{message:?}");
    }
    assert!(Frame::Owned(OwnedBatch { space, runs, more: false }).encode().is_err());
    assert!(Frame::Pages(batch(space.0, Coding::Raw, &[(1, 1)]), PAGE_SIZE).encode().is_err());
    // Where it is allowed, it ends where a kept store ends.
    for (page, fits) in [(0, true), (limits::MAX_KEPT_PAGES - 1, true), (limits::MAX_KEPT_PAGES, false)] {
        let runs = vec![PageRun { start: PageNo(page), len: 1 }];
        let digests = DigestBatch { space, runs, digests: vec![digest::ZERO_PAGE], more: false };
        assert_eq!(Frame::Digests(digests.clone()).encode().is_ok(), fits, "{page}");
        let of_source = DigestBatch { space: SpaceId(1), ..digests };
        assert!(Frame::Digests(of_source.clone()).encode().is_ok());
        let mut lie = Frame::Digests(of_source).encode().unwrap();
        lie[HEADER_BYTES..HEADER_BYTES + 4].fill(0xff);
        reseal(&mut lie);
        assert_eq!(matches!(decode(&lie), Some(Ok(_))), fits, "{page}");
        let copy = |space| {
            let mut copy = PageBatch::default();
            copy.clear(SpaceId(1), 0, Coding::Copy);
            copy.push_copy(PageNo(9), digest::ZERO_PAGE, PageRef { space, page: PageNo(page) });
            Frame::Pages(copy, 0).encode()
        };
        assert_eq!(copy(space).is_ok(), fits, "{page}");
        assert!(copy(SpaceId(2)).is_ok());
    }
}

#[test]
fn copies_and_compression_on_a_base_are_whole() {
    let encode = |batch: &PageBatch, len| Frame::Pages(batch.clone(), len).encode();
    let copies = batch(1, Coding::Copy, &[(1, 1), (3, 1)]);
    assert!(encode(&copies, 0).is_ok());
    assert!(encode(&copies, 1).is_err() && encode(&copies, 2 * PAGE_SIZE).is_err(), "copies have no bytes");
    assert!(encode(&batch(1, Coding::Copy, &[(1, 1), (2, 0)]), 0).is_err(), "a zero page");
    assert!(encode(&batch(1, Coding::Copy, &[(1, 0)]), 0).is_err(), "only zero pages");
    let mut unnamed = copies.clone();
    unnamed.push(PageNo(9), false, digest::ZERO_PAGE);
    assert!(encode(&unnamed, 0).is_err(), "a copy of nothing");
    let mut beyond = PageBatch::default();
    beyond.clear(SpaceId(1), 0, Coding::Copy);
    let from = PageRef { space: SpaceId(1), page: PageNo(limits::MAX_PAGE_NO) };
    beyond.push_copy(PageNo(1), digest::ZERO_PAGE, from);
    assert!(encode(&beyond, 0).is_err(), "a copy from beyond the address space");

    let on_base = batch(1, Coding::ZstdOnBase, &[(1, 1), (3, 1)]);
    assert!(encode(&on_base, 1).is_ok() && encode(&on_base, 2 * PAGE_SIZE).is_ok());
    assert!(encode(&on_base, 0).is_err() && encode(&on_base, 2 * PAGE_SIZE + 1).is_err());
    assert!(encode(&batch(1, Coding::ZstdOnBase, &[(1, 1), (2, 0)]), 1).is_err(), "a zero page");
    let fits =
        |batch: &PageBatch| (0..=2 * PAGE_SIZE).step_by(PAGE_SIZE).any(|len| encode(batch, len).is_ok());
    for coding in [Coding::Delta, Coding::ZstdOnBase] {
        let mut copied = copies.clone();
        copied.set_coding(coding);
        assert!(!fits(&copied), "sources without bases under {coding:?}");
    }
    for coding in [Coding::Raw, Coding::Zstd] {
        let mut plain = on_base.clone();
        plain.set_coding(coding);
        assert!(fits(&plain) && plain.sources().is_empty() && plain.each().is_empty(), "{coding:?}");
        assert_eq!(plain.content(), on_base.content());
    }
    let mut both = copies.clone();
    both.push_on_base(PageNo(9), digest::ZERO_PAGE, from, digest::ZERO_PAGE);
    assert!(!fits(&both), "a base among copies");
}

/// Heads that say what they could say in fewer bytes, or nothing that makes sense, in the parts that have a length of their own.
#[test]
fn runs_and_sources_are_written_in_one_way() {
    let head = |coding: u16, pages: u32, rest: &[&[u8]]| {
        let mut head = [&[1, 0, 0, 0, 7, 0, 0, 0][..], &coding.to_le_bytes(), &[0; 2]].concat();
        head.extend_from_slice(&pages.to_le_bytes());
        rest.iter().for_each(|part| head.extend_from_slice(part));
        head
    };
    let read = |head: &[u8], payload| PageBatch::default().decode_into(head, payload);
    let digest = [5; 16];
    let copy = |runs: &[u8], sources: &[u8]| read(&head(3, 2, &[runs, &[0], &digest, sources]), 0);
    // Pages 4 and 5, both from space 1 at the same distance: pages 2 and 3.
    assert_eq!(copy(&[4, 2], &[2, 2, 3]), Ok(()));
    assert_eq!(copy(&[4, 2], &[1, 2, 3, 1, 2, 5]), Ok(()), "two distances");
    assert_eq!(copy(&[4, 2], &[1, 2, 3, 1, 0, 3]), Ok(()), "the second of the kept store");
    assert_eq!(copy(&[0, 1, 1, 1], &[2, 2, 0]), Ok(()), "pages 0 and 2");
    for (runs, sources, why) in [
        (&[4, 2][..], &[1, 2, 3, 1, 2, 3][..], "one run of sources in two"),
        (&[4, 1, 0, 1], &[2, 2, 3], "one run of pages in two"),
        (&[4, 2], &[2, 2, 9], "a source before page 0"),
        (&[4, 2], &[3, 2, 3], "a source too many"),
        (&[4, 2], &[1, 2, 3], "a source too few"),
        (&[4, 2], &[0, 2, 3, 2, 2, 3], "an empty run of sources"),
        (&[4, 0, 1, 2], &[2, 2, 3], "an empty run of pages"),
        (&[4, 3], &[2, 2, 3], "a page too many"),
        (&[0x84, 0, 2], &[2, 2, 3], "two bytes for what fits into one"),
        (&[4, 2], &[2, 0x82, 0x80, 0x80, 0x80, 0x10, 3], "a space beyond the last"),
        (&[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 8, 2], &[2, 2, 3], "a page beyond the last"),
        (
            &[4, 2],
            &[2, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
            "a distance beyond everything",
        ),
        (&[4, 2], &[2, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 3], "more than 64 bits"),
    ] {
        assert!(copy(runs, sources).is_err(), "{why}");
    }
    for cut in 0..head(3, 2, &[&[4, 2], &[0], &digest, &[2, 2, 3]]).len() {
        assert!(read(&head(3, 2, &[&[4, 2], &[0], &digest, &[2, 2, 3]])[..cut], 0).is_err(), "cut at {cut}");
    }
}

#[test]
fn an_encoder_that_fails_leaves_no_trace() {
    let ping = ControlMessage::Ping { n: 1 };
    let (mut at, mut out) = (Sequencer::default(), Vec::new());
    ping.encode(&mut at, &mut out).unwrap();
    let (before, len) = (at.clone(), out.len());
    let runs = vec![PageRun { start: PageNo(1), len: 0 }];
    let wrong = OwnedBatch { space: SpaceId(1), runs, more: false };
    assert!(wrong.encode(&mut at, &mut out).is_err());
    assert_eq!((&at, out.len()), (&before, len));
    ping.encode(&mut at, &mut out).unwrap();
    assert_eq!(read(&out), (vec![Frame::Control(ping.clone()), Frame::Control(ping)], None));
}

fn writes(message: ControlMessage) -> bool {
    Frame::Control(message).encode().is_ok()
}

fn payload_len(frame: &Frame) -> usize {
    match frame {
        Frame::Pages(_, payload) | Frame::Image(_, payload) => *payload,
        _ => 0,
    }
}

/// A stream of frames, each with its payload.
fn pieces(frames: &[Frame]) -> Vec<Vec<u8>> {
    let mut at = Sequencer::default();
    let piece = |frame: &Frame| {
        let mut bytes = frame.encode_at(&mut at).unwrap();
        bytes.resize(bytes.len() + payload_len(frame), 0x5a);
        bytes
    };
    frames.iter().map(piece).collect()
}

/// Where each piece begins.
fn begins(pieces: &[Vec<u8>]) -> Vec<usize> {
    let begin = |at: &mut usize, piece: &Vec<u8>| Some(std::mem::replace(at, *at + piece.len()));
    pieces.iter().scan(0, begin).collect()
}

/// Reads frames until the end or the first error.
fn read(mut bytes: &[u8]) -> (Vec<Frame>, Option<FrameError>) {
    let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
    while let Some(next) = take(&mut decoder, &mut bytes) {
        match next {
            Ok(frame) => {
                bytes = &bytes[payload_len(&frame).min(bytes.len())..];
                frames.push(frame);
            }
            Err(error) => return (frames, Some(error)),
        }
    }
    (frames, None)
}

#[test]
fn frames_that_are_lost_repeated_or_swapped_are_named() {
    let frames: Vec<Frame> = examples().into_iter().map(|(_, frame)| frame).collect();
    let whole = pieces(&frames);
    assert_eq!(read(&whole.concat()), (frames.clone(), None));

    for index in 0..frames.len() - 1 {
        let (mut lost, mut repeated, mut swapped) = (whole.clone(), whole.clone(), whole.clone());
        lost.remove(index);
        repeated.insert(index, whole[index].clone());
        swapped.swap(index, index + 1);
        for (wrong, at, got) in
            [(lost, index, index + 1), (repeated, index + 1, index), (swapped, index, index + 1)]
        {
            let (understood, error) = read(&wrong.concat());
            assert_eq!(understood.len(), at);
            let error = error.expect("the order is wrong");
            assert_eq!(error.source, DecodeError::Sequence { got: got as u64, wanted: at as u64 });
            assert_eq!((error.sequence, error.offset), (at as u64, begins(&wrong)[at] as u64));
        }
    }
}

#[test]
fn frames_of_another_stream_are_found_although_their_numbers_fit() {
    let ping = |n| Frame::Control(ControlMessage::Ping { n });
    let ours = pieces(&[ping(1), ping(2), ping(3)]);
    // The same messages but one, an equal stream that lacks its first frame, and one with the payload elsewhere.
    let theirs = pieces(&[ping(7), ping(2), ping(3)]);
    let shorter = pieces(&[ping(2), ping(3)]);
    for (frames, bad) in [
        ([&ours[0], &theirs[1], &theirs[2]], 1),
        ([&ours[0], &ours[1], &theirs[2]], 2),
        ([&ours[0], &shorter[1], &ours[2]], 1),
    ] {
        let bytes: Vec<u8> = frames.iter().flat_map(|piece| piece.iter().copied()).collect();
        let (understood, error) = read(&bytes);
        assert_eq!(understood.len(), bad);
        assert_eq!(error.unwrap().source, DecodeError::Checksum { sequence: bad as u64 });
    }
    // Both sides of a direction agree about what went over it.
    let (mut at, mut decoder) = (Sequencer::default(), Decoder::default());
    for n in 0..4 {
        let bytes = ping(n).encode_at(&mut at).unwrap();
        take(&mut decoder, &mut &bytes[..]).unwrap().unwrap();
        assert_eq!(decoder.sequencer(), &at);
        assert_eq!((at.next(), at.digest() != 0), (n + 1, true));
    }
}

#[test]
fn errors_name_the_frame_and_the_place() {
    let ping = Frame::Control(ControlMessage::Ping { n: 1 });
    let pages = Frame::Pages(batch(1, Coding::Raw, &[(1, 1)]), PAGE_SIZE);
    let pieces = pieces(&[pages, ping]);
    let (mut bytes, begins) = (pieces.concat(), begins(&pieces));
    bytes[begins[1] + HEADER_BYTES] ^= 1;
    let error = read(&bytes).1.unwrap();
    assert_eq!(error.to_string(), "frame 1 (control), at byte 4163 of what was received, is not valid");
    assert_eq!(
        error.source.to_string(),
        "the checksum of frame 1 does not match: it was damaged on the way, or is of another stream"
    );
    bytes[begins[1]] = b'X';
    let error = read(&bytes).1.unwrap();
    assert_eq!(error.to_string(), "frame 1, at byte 4163 of what was received, is not valid");
    assert_eq!(error.source, DecodeError::Magic(u32::from_le_bytes(*b"XGFY")));
}

#[test]
fn another_version_is_told_apart_from_garbage() {
    for spoken in [0, 1, version::CURRENT + 1, 900] {
        let mut bytes = Frame::Control(ControlMessage::Commit).encode().unwrap();
        bytes[4..6].copy_from_slice(&spoken.to_le_bytes());
        reseal(&mut bytes);
        let Some(Err(error)) = decode(&bytes) else { panic!("version {spoken} was understood") };
        assert_eq!(error.source, DecodeError::Version(spoken));
    }
}

#[test]
fn a_frame_is_written_in_the_oldest_version_that_has_it_and_in_no_other() {
    for (name, frame) in crate::examples::examples() {
        let mut bytes = frame.encode().unwrap();
        let written = u16::from_le_bytes([bytes[4], bytes[5]]);
        let oldest = match &frame {
            Frame::Control(message) => message.version(),
            Frame::Image(chunk, _) if chunk.unpacked.is_some() => version::PACKED_IMAGES,
            _ => version::FRAMES,
        };
        assert_eq!(written, oldest, "{name}");
        for other in (version::OLDEST..=version::CURRENT).filter(|version| *version != oldest) {
            bytes[4..6].copy_from_slice(&other.to_le_bytes());
            reseal(&mut bytes);
            assert!(matches!(decode(&bytes), Some(Err(_))), "{name} in version {other}");
        }
    }
}

#[test]
fn nothing_is_prepared_twice() {
    let prepared = |timings| writes(ControlMessage::Prepared { timings });
    assert!(prepared(Vec::new()) && prepared(vec![(Preparation::Memory, 1), (Preparation::Criu, 2)]));
    assert!(!prepared(vec![(Preparation::Criu, 1), (Preparation::Memory, 2), (Preparation::Criu, 3)]));
}

#[test]
fn nobody_is_asked_to_hold_a_session_for_ever() {
    assert!(
        writes(ControlMessage::Hold { ms: 0 }) && writes(ControlMessage::Hold { ms: limits::MAX_HOLD_MS })
    );
    assert!(!writes(ControlMessage::Hold { ms: limits::MAX_HOLD_MS + 1 }));
    let standing = |space, name: String| {
        let info = SpaceInfo { space, vpid: 1, name, pages: 0 };
        writes(ControlMessage::Standing { info, pages: 0, digest: SpaceDigest::default() })
    };
    assert!(standing(SpaceId(1), String::new()) && !standing(SpaceId::KEPT, String::new()));
    assert!(!standing(SpaceId(1), "x".repeat(limits::MAX_NAME_BYTES + 1)));
}

proptest! {
    #[test]
    fn noise_is_never_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(!matches!(decode(&bytes), Some(Ok(_))));
    }

    /// Noise behind a header that is right: as a head that nobody meant to be one.
    #[test]
    fn noise_with_a_right_checksum_is_refused_or_meant(
        kind in 1u16..6,
        payload in prop_oneof![Just(0u32), Just(1), Just(4096), any::<u32>()],
        head in proptest::collection::vec(prop_oneof![3 => Just(0u8), 1 => 0u8..3, 1 => any::<u8>()], 0..300),
    ) {
        let mut bytes = Frame::Control(ControlMessage::Commit).encode().unwrap();
        bytes.truncate(HEADER_BYTES);
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[12..16].copy_from_slice(&payload.to_le_bytes());
        bytes.extend(head);
        reseal(&mut bytes);
        if let Err(error) = understood_or_refused(&bytes) {
            return Err(TestCaseError::fail(error));
        }
    }

    #[test]
    fn a_frame_with_many_wrong_bytes_is_refused_or_meant(
        which in any::<prop::sample::Index>(),
        wrong in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let all = examples();
        let mut bytes = which.get(&all).1.encode().unwrap();
        for (at, byte) in wrong {
            let at = 4 + at.index(bytes.len() - 4);
            bytes[at] = byte;
        }
        reseal(&mut bytes);
        if let Err(error) = understood_or_refused(&bytes) {
            return Err(TestCaseError::fail(error));
        }
    }
}

#[test]
fn a_page_that_is_waited_for_has_to_be_one() {
    for message in [
        ControlMessage::Want { space: SpaceId(1), runs: vec![] },
        ControlMessage::Unwanted { space: SpaceId(1), runs: vec![] },
        ControlMessage::Want { space: SpaceId::KEPT, runs: vec![PageRun { start: PageNo(1), len: 1 }] },
        ControlMessage::LateSeal { space: SpaceId::KEPT, pages: 1, digest: SpaceDigest::default() },
    ] {
        assert!(Frame::Control(message.clone()).encode().is_err(), "{message:?}");
    }
}

#[test]
fn addresses_that_could_not_move_are_refused() {
    let moving = |address: &str, prefix| MovingAddress {
        address: address.parse().unwrap(),
        prefix,
        device: Some("eth0".to_owned()),
        owner: [0; 6],
    };
    let writes = |addresses: Vec<MovingAddress>| {
        ControlMessage::Network { addresses, keep_tcp: true }
            .encode(&mut Sequencer::default(), &mut Vec::new())
            .is_ok()
    };
    assert!(writes(vec![moving("10.0.0.9", 24), moving("2001:db8::9", 128)]));
    assert!(!writes(vec![moving("10.0.0.9", 33)]));
    assert!(!writes(vec![moving("10.0.0.9", 0)]));
    assert!(!writes(vec![moving("2001:db8::9", 129)]));
    assert!(!writes(vec![moving("10.0.0.9", 24), moving("10.0.0.9", 32)]), "one address twice");
    let many = |count: usize| (0..count).map(|n| moving(&format!("10.0.0.{n}"), 24)).collect();
    assert!(writes(many(limits::MAX_MOVED_ADDRESSES)));
    assert!(!writes(many(limits::MAX_MOVED_ADDRESSES + 1)));
    let long =
        MovingAddress { device: Some("x".repeat(limits::MAX_NAME_BYTES + 1)), ..moving("10.0.0.9", 24) };
    assert!(!writes(vec![long]));
}
