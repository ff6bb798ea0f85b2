//! Every frame: its golden bytes, its way there and back, and what is made of it when it is damaged.

use pageferry_wire_format::*;
use proptest::prelude::*;
use std::fmt::Write;

/// A frame without its payload, as it would be taken off a link.
#[derive(Debug, PartialEq)]
enum Frame {
    Pages(PageBatch),
    Image(ImageChunk),
    Control(ControlMessage),
    Digests(DigestBatch),
    Owned(OwnedBatch),
}

fn decode(bytes: &[u8]) -> Result<Frame, DecodeError> {
    let raw: &[u8; HEADER_BYTES] = bytes
        .get(..HEADER_BYTES)
        .and_then(|b| b.try_into().ok())
        .ok_or(DecodeError::Truncated { at: bytes.len() })?;
    let header = Header::parse(raw)?;
    let head = bytes
        .get(HEADER_BYTES..HEADER_BYTES + header.head_len as usize)
        .ok_or(DecodeError::Truncated { at: bytes.len() })?;
    header.verify(raw, head)?;
    SequenceCheck::default().check(&header)?;
    let payload = header.payload_len as usize;
    Ok(match header.kind {
        FrameKind::PageBatch => {
            let mut batch = PageBatch::default();
            batch.decode_into(head, payload)?;
            Frame::Pages(batch)
        }
        FrameKind::Image => Frame::Image(ImageChunk::decode(head, payload)?),
        FrameKind::Control => Frame::Control(ControlMessage::decode(head)?),
        FrameKind::Digests => Frame::Digests(DigestBatch::decode(head)?),
        FrameKind::Owned => Frame::Owned(OwnedBatch::decode(head)?),
    })
}

fn batch(space: u32, coding: Coding, pages: &[(u64, u8)]) -> PageBatch {
    let mut batch = PageBatch::default();
    batch.clear(SpaceId(space), 7, coding);
    for (page, content) in pages {
        batch.push(PageNo(*page), *content == 0, digest::page(&[*content; PAGE_SIZE]));
    }
    batch
}

/// One frame of each kind, and what it means.
fn examples() -> Vec<(&'static str, Vec<u8>, Frame)> {
    let mut out = Vec::new();
    let mut add = |name, bytes: Vec<u8>, frame| out.push((name, bytes, frame));
    let mut bytes = Vec::new();

    let raw = batch(3, Coding::Raw, &[(0x7f00, 1), (0x7f01, 0), (0x7f05, 2)]);
    raw.encode(2 * PAGE_SIZE, 0, &mut bytes).unwrap();
    add("pages-raw", std::mem::take(&mut bytes), Frame::Pages(raw));
    let zstd = batch(0, Coding::Zstd, &[(0x10, 1), (0x11, 2)]);
    zstd.encode(100, 0, &mut bytes).unwrap();
    add("pages-zstd", std::mem::take(&mut bytes), Frame::Pages(zstd));
    let image = ImageChunk::new("p0/pagemap-1.img", 1 << 20, b"abc");
    image.encode(3, 0, &mut bytes).unwrap();
    add("image", std::mem::take(&mut bytes), Frame::Image(image));
    let runs = vec![PageRun { start: PageNo(5), len: 2 }, PageRun { start: PageNo(9), len: 1 }];
    let owned = OwnedBatch { space: SpaceId(1), runs: runs.clone(), more: true };
    owned.encode(0, &mut bytes).unwrap();
    add("owned", std::mem::take(&mut bytes), Frame::Owned(owned));
    let digests = DigestBatch {
        space: SpaceId(1),
        runs: runs.clone(),
        digests: vec![digest::ZERO_PAGE, digest::page(&[1; PAGE_SIZE]), digest::page(&[2; PAGE_SIZE])],
        more: false,
    };
    digests.encode(0, &mut bytes).unwrap();
    add("digests", std::mem::take(&mut bytes), Frame::Digests(digests));

    let mut sum = SpaceDigest::default();
    sum.insert(PageNo(5), &digest::ZERO_PAGE);
    let messages = [
        (
            "hello",
            ControlMessage::Hello(Hello {
                versions: version::supported(),
                session: 0x0123_4567_89ab_cdef,
                engine: "0.1.0".into(),
                program: "redis-server".into(),
                verify: true,
                choices: RestoreChoices {
                    shell_job: true,
                    tcp_close: true,
                    file_locks: false,
                    ext_unix_sk: false,
                },
            }),
        ),
        ("welcome", ControlMessage::Welcome(Welcome { version: 1, engine: "0.1.0".into(), memory: 8 << 30 })),
        (
            "spaces",
            ControlMessage::Spaces {
                round: 2,
                spaces: vec![SpaceInfo { space: SpaceId(1), vpid: 42, name: "worker".into(), pages: 1000 }],
            },
        ),
        ("space-gone", ControlMessage::SpaceGone { space: SpaceId(1) }),
        ("discard", ControlMessage::Discard { space: SpaceId(1), runs }),
        ("round-end", ControlMessage::RoundEnd { round: 2, pages: 10, bytes: 40960 }),
        ("round-ack", ControlMessage::RoundAck { round: 2 }),
        (
            "space-seal",
            ControlMessage::SpaceSeal {
                space: SpaceId(1),
                vpid: 42,
                pages: 1,
                digest: sum,
                regions: vec![RegionInfo { start: 0x5000, end: 0x6000, comparable: true }],
            },
        ),
        ("seal-end", ControlMessage::SealEnd { spaces: 1 }),
        ("sealed", ControlMessage::Sealed { pages: 1 }),
        ("images-end", ControlMessage::ImagesEnd { files: 12, bytes: 123_456 }),
        ("ready", ControlMessage::Ready { timings: vec![(Part::Restore, 30_000)], verified_pages: 0 }),
        ("commit", ControlMessage::Commit),
        ("resumed", ControlMessage::Resumed { pid: 42, timings: vec![(Part::Run, 900)] }),
        (
            "filled",
            ControlMessage::Filled {
                pages: 9,
                prefilled_pages: 3,
                faults: 2,
                max_fault_us: 80,
                duration_us: 5000,
            },
        ),
        ("abort", ControlMessage::abort(AbortCode::Busy, "another migration is being received")),
        ("query", ControlMessage::Query { session: 0x0123_4567_89ab_cdef }),
        ("state", ControlMessage::State(HandoverState::Resumed { pid: 42 })),
        ("ping", ControlMessage::Ping { n: 1 }),
    ];
    for (name, message) in messages {
        message.encode(0, &mut bytes).unwrap();
        add(name, std::mem::take(&mut bytes), Frame::Control(message));
    }
    out
}

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
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, bytes, _) in examples() {
        let path = dir.join(format!("v{}-{name}.hex", version::CURRENT));
        if std::env::var_os("PAGEFERRY_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, hex(&bytes)).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(hex(&bytes), golden, "the bytes of `{name}` have moved: that needs a new version");
    }
}

#[test]
fn every_frame_comes_back() {
    for (name, bytes, frame) in examples() {
        assert_eq!(decode(&bytes).as_ref(), Ok(&frame), "{name}");
    }
}

#[test]
fn a_frame_cut_anywhere_is_an_error() {
    for (name, bytes, _) in examples() {
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{name} cut at {len}");
        }
    }
}

#[test]
fn any_flipped_bit_is_an_error() {
    for (name, bytes, _) in examples() {
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "{name} with bit {bit} flipped");
        }
    }
}

/// Heads that pass the checksum but lie: as a peer with a bug would send them.
#[test]
fn lying_heads_are_errors() {
    for (name, bytes, frame) in examples() {
        let head = &bytes[HEADER_BYTES..];
        let payload = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap().payload_len as usize;
        let read = |head: &[u8]| match &frame {
            Frame::Pages(_) => PageBatch::default().decode_into(head, payload).map(|()| 0),
            Frame::Image(_) => ImageChunk::decode(head, payload).map(|_| 0),
            Frame::Control(_) => ControlMessage::decode(head).map(|_| 0),
            Frame::Digests(_) => DigestBatch::decode(head).map(|_| 0),
            Frame::Owned(_) => OwnedBatch::decode(head).map(|_| 0),
        };
        assert!(read(head).is_ok());
        for len in 0..head.len() {
            assert!(read(&head[..len]).is_err(), "{name}: a head of {len} bytes");
        }
        let longer = [head, &[0]].concat();
        assert!(read(&longer).is_err(), "{name}: a byte after the end");
        // Every 32-bit field set to the largest number: an error or a valid frame, but no panic and no
        // allocation to match.
        for at in 0..head.len().saturating_sub(3) {
            let mut lie = head.to_vec();
            lie[at..at + 4].fill(0xff);
            let _ = read(&lie);
        }
    }
}

#[test]
fn announced_sizes_are_limited_before_anything_is_allocated() {
    let (_, bytes, _) = examples().swap_remove(0);
    let with = |at: usize, value: u32| {
        let mut header: [u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Header::parse(&header)
    };
    assert!(matches!(with(8, u32::MAX), Err(DecodeError::Limit { what: "a head", .. })));
    assert!(matches!(with(12, u32::MAX), Err(DecodeError::Limit { what: "a payload", .. })));
    assert!(matches!(with(0, 0), Err(DecodeError::Magic(0))));

    let mut head = Vec::new();
    OwnedBatch { space: SpaceId(0), runs: vec![PageRun { start: PageNo(1), len: 1 }], more: false }
        .encode(0, &mut head)
        .unwrap();
    let mut head = head.split_off(HEADER_BYTES);
    head[20..28].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(matches!(OwnedBatch::decode(&head), Err(DecodeError::Invalid(_))), "2^60 pages");
}

#[test]
fn lost_and_repeated_frames_are_noticed() {
    let mut frames = Vec::new();
    for sequence in 0..3 {
        let mut bytes = Vec::new();
        ControlMessage::Ping { n: 0 }.encode(sequence, &mut bytes).unwrap();
        frames.push(Header::parse(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap());
    }
    let mut check = SequenceCheck::default();
    check.check(&frames[0]).unwrap();
    assert_eq!(check.check(&frames[0]), Err(DecodeError::Sequence { got: 0, wanted: 1 }), "repeated");
    assert_eq!(check.check(&frames[2]), Err(DecodeError::Sequence { got: 2, wanted: 1 }), "one lost");
    check.check(&frames[1]).unwrap();
}

#[test]
fn a_later_version_is_told_apart_from_garbage() {
    let mut bytes = Vec::new();
    ControlMessage::Commit.encode(0, &mut bytes).unwrap();
    bytes[4..6].copy_from_slice(&900u16.to_le_bytes());
    assert_eq!(decode(&bytes), Err(DecodeError::Version(900)));
}

#[test]
fn image_names_stay_inside_their_folder() {
    for name in ["", "/etc/passwd", "../x.img", "a/../../x", "a//b", "a/.", "x\n.img", "a/"] {
        let chunk = ImageChunk::new(name, 0, b"");
        assert!(chunk.encode(0, 0, &mut Vec::new()).is_err(), "{name:?}");
    }
    assert!(ImageChunk::new("x", u64::MAX, b"a").encode(1, 0, &mut Vec::new()).is_err());
}

#[test]
fn an_abort_is_cut_to_its_limit_at_a_character() {
    let ControlMessage::Abort { detail, .. } = ControlMessage::abort(AbortCode::Internal, &"é".repeat(5000))
    else {
        unreachable!()
    };
    assert!(detail.len() <= limits::MAX_DETAIL_BYTES && detail.len() > limits::MAX_DETAIL_BYTES - 4);
    assert_eq!(AbortCode::from_number(999), AbortCode::Unknown(999));
    assert_eq!(AbortCode::from_number(AbortCode::Busy.number()), AbortCode::Busy);
}

proptest! {
    #[test]
    fn batches_come_back(
        space: u32,
        start in 0u64..1 << 50,
        steps in proptest::collection::vec((1u64..5, any::<u8>()), 1..limits::MAX_BATCH_PAGES),
        zstd: bool,
    ) {
        let mut page = start;
        let mut pages = Vec::new();
        for (step, content) in steps {
            pages.push((page, content % 4));
            page += step;
        }
        let coding = if zstd { Coding::Zstd } else { Coding::Raw };
        let batch = batch(space, coding, &pages);
        prop_assert_eq!(batch.len(), pages.len());
        let payload = match coding {
            Coding::Raw => batch.nonzero() * PAGE_SIZE,
            Coding::Zstd => 17,
        };
        let mut bytes = Vec::new();
        let encoded = batch.encode(payload, 0, &mut bytes);
        if zstd && batch.nonzero() == 0 {
            prop_assert!(encoded.is_err());
            return Ok(());
        }
        encoded.unwrap();
        let listed: Vec<(u64, bool)> = batch.pages().map(|(page, zero, _)| (page.0, zero)).collect();
        let wanted: Vec<(u64, bool)> = pages.iter().map(|(page, content)| (*page, *content == 0)).collect();
        prop_assert_eq!(listed, wanted);
        prop_assert_eq!(decode(&bytes), Ok(Frame::Pages(batch)));
    }

    #[test]
    fn noise_is_never_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(decode(&bytes).is_err());
        let _ = ControlMessage::decode(&bytes);
        let _ = OwnedBatch::decode(&bytes);
        let _ = DigestBatch::decode(&bytes);
        let _ = ImageChunk::decode(&bytes, 0);
        let _ = PageBatch::default().decode_into(&bytes, 4096);
    }
}
