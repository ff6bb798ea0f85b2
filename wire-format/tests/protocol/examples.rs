//! Frames of every kind, for the tests of the protocol.

use pageferry_wire_format::version::Versions;
use pageferry_wire_format::*;

/// A frame without its payload, as it would be taken off a link.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Pages, and the length of their payload.
    Pages(PageBatch, usize),
    /// A piece of an image, and the length of its payload.
    Image(ImageChunk, usize),
    Control(ControlMessage),
    Digests(DigestBatch),
    Owned(OwnedBatch),
    Owed(OwedBatch),
}

impl Frame {
    /// The frame's bytes, without its payload, as the first of a direction.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        self.encode_at(&mut Sequencer::default())
    }

    /// The frame's bytes, without its payload, as the next of a direction.
    pub fn encode_at(&self, at: &mut Sequencer) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        match self {
            Self::Pages(batch, payload) => batch.encode(*payload, at, &mut out),
            Self::Image(chunk, payload) => chunk.encode(*payload, at, &mut out),
            Self::Control(message) => message.encode(at, &mut out),
            Self::Digests(batch) => batch.encode(at, &mut out),
            Self::Owned(batch) => batch.encode(at, &mut out),
            Self::Owed(batch) => batch.encode(at, &mut out),
        }?;
        Ok(out)
    }
}

/// Takes the next frame off the front of `bytes`, without its payload. `None`: they end too early.
pub fn take(decoder: &mut Decoder, bytes: &mut &[u8]) -> Option<Result<Frame, FrameError>> {
    let (raw, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let announced = match decoder.header(raw) {
        Ok(announced) => announced,
        Err(error) => return Some(Err(error)),
    };
    let (head, rest) = rest.split_at_checked(announced.head_len())?;
    *bytes = rest;
    let mut batch = PageBatch::default();
    Some(decoder.head(&announced, head, &mut batch).map(|head| match head {
        Head::Pages { payload_len } => Frame::Pages(batch, payload_len),
        Head::Image { chunk, payload_len } => Frame::Image(chunk, payload_len),
        Head::Control(message) => Frame::Control(message),
        Head::Digests(batch) => Frame::Digests(batch),
        Head::Owned(batch) => Frame::Owned(batch),
        Head::Owed(batch) => Frame::Owed(batch),
    }))
}

/// Reads the one frame that `bytes` are.
pub fn decode(mut bytes: &[u8]) -> Option<Result<Frame, FrameError>> {
    let frame = take(&mut Decoder::default(), &mut bytes)?;
    assert!(frame.is_err() || bytes.is_empty());
    Some(frame)
}

/// A batch of pages whose bytes are all `content`.
pub fn batch(space: u32, coding: Coding, pages: &[(u64, u8)]) -> PageBatch {
    let mut batch = PageBatch::default();
    batch.clear(SpaceId(space), 7, coding);
    for (page, content) in pages {
        let after = digest::page(&[*content; PAGE_SIZE]);
        match (coding, content) {
            (Coding::Delta | Coding::ZstdOnBase, 1..) => {
                let from = PageRef { space: SpaceId(space), page: PageNo(*page) };
                batch.push_on_base(PageNo(*page), after, from, digest::page(&[content ^ 0x80; PAGE_SIZE]));
            }
            (Coding::Copy, 1..) => {
                let from = PageRef { space: SpaceId(space.wrapping_add(1)), page: PageNo(*page / 2) };
                batch.push_copy(PageNo(*page), after, from);
            }
            _ => batch.push(PageNo(*page), *content == 0, after),
        }
    }
    batch
}

fn runs() -> Vec<PageRun> {
    vec![PageRun { start: PageNo(5), len: 2 }, PageRun { start: PageNo(9), len: 1 }]
}

/// Frames of every kind and every message, by name.
pub fn examples() -> Vec<(&'static str, Frame)> {
    let raw = batch(3, Coding::Raw, &[(0x7f00, 1), (0x7f01, 0), (0x7f05, 2)]);
    let zstd = batch(0, Coding::Zstd, &[(0x10, 1), (0x11, 2)]);
    let zeros = batch(1, Coding::Raw, &[(0x10, 0), (0x12, 0)]);
    let mut deltas = PageBatch::default();
    deltas.clear(SpaceId(2), 4, Coding::Delta);
    let from = |space, page| PageRef { space, page: PageNo(page) };
    let before = digest::page(&[1; PAGE_SIZE]);
    deltas.push_on_base(PageNo(0x20), digest::page(&[2; PAGE_SIZE]), from(SpaceId(2), 0x20), before);
    deltas.push_on_base(
        PageNo(0x23),
        digest::page(&[4; PAGE_SIZE]),
        from(SpaceId(0), 0x23),
        digest::ZERO_PAGE,
    );
    let mut copies = PageBatch::default();
    copies.clear(SpaceId(2), 4, Coding::Copy);
    copies.push_copy(PageNo(0x20), digest::page(&[2; PAGE_SIZE]), from(SpaceId(1), 0x7f05));
    copies.push_copy(PageNo(0x21), digest::page(&[3; PAGE_SIZE]), from(SpaceId::KEPT, 0));
    let on_base = batch(2, Coding::ZstdOnBase, &[(0x20, 1), (0x21, 2)]);
    let digests = DigestBatch {
        space: SpaceId(1),
        runs: runs(),
        digests: vec![digest::ZERO_PAGE, digest::page(&[1; PAGE_SIZE]), digest::page(&[2; PAGE_SIZE])],
        more: false,
    };
    let kept = DigestBatch {
        space: SpaceId::KEPT,
        runs: vec![PageRun { start: PageNo(0), len: 2 }],
        digests: vec![digest::page(&[1; PAGE_SIZE]), digest::page(&[2; PAGE_SIZE])],
        more: true,
    };
    let mut out = vec![
        ("pages-raw", Frame::Pages(raw, 2 * PAGE_SIZE)),
        ("pages-zstd", Frame::Pages(zstd, 100)),
        ("pages-delta", Frame::Pages(deltas, 40)),
        ("pages-copy", Frame::Pages(copies, 0)),
        ("pages-zstd-on-base", Frame::Pages(on_base, 100)),
        ("pages-zero", Frame::Pages(zeros, 0)),
        ("image", Frame::Image(ImageChunk::new("p0/pagemap-1.img", 1 << 20, b"abc"), 3)),
        ("image-empty", Frame::Image(ImageChunk::new("fs.img", 0, b""), 0)),
        ("packed-image", Frame::Image(ImageChunk::packed("pages-1.img", 1 << 20, &[7; 4096]), 19)),
        ("owned", Frame::Owned(OwnedBatch { space: SpaceId(1), runs: runs(), more: true })),
        ("owed", Frame::Owed(OwedBatch { space: SpaceId(1), runs: runs(), more: false })),
        ("digests", Frame::Digests(digests)),
        ("digests-kept", Frame::Digests(kept)),
    ];
    out.extend(messages().into_iter().map(|(name, message)| (name, Frame::Control(message))));
    out
}

fn messages() -> Vec<(&'static str, ControlMessage)> {
    let mut sum = SpaceDigest::default();
    sum.insert(PageNo(5), &digest::ZERO_PAGE);
    vec![
        (
            "hello",
            ControlMessage::Hello(Hello {
                versions: Versions { oldest: 2, newest: 2 },
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
        (
            "welcome",
            ControlMessage::Welcome(Welcome {
                version: 2,
                engine: "0.1.0".into(),
                memory: 8 << 30,
                streams: 4,
                kept: 1000,
            }),
        ),
        (
            "spaces",
            ControlMessage::Spaces {
                round: 2,
                spaces: vec![SpaceInfo { space: SpaceId(1), vpid: 42, name: "worker".into(), pages: 1000 }],
            },
        ),
        ("space-gone", ControlMessage::SpaceGone { space: SpaceId(1) }),
        ("discard", ControlMessage::Discard { space: SpaceId(1), runs: runs() }),
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
        (
            "ready-verified",
            ControlMessage::Ready {
                timings: [Part::Restore, Part::Prefill, Part::Verify, Part::Resume, Part::Run]
                    .into_iter()
                    .zip(1..)
                    .collect(),
                verified_pages: 1000,
            },
        ),
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
        ("abort-later-code", ControlMessage::abort(AbortCode::Unknown(900), "")),
        ("query", ControlMessage::Query { session: 0x0123_4567_89ab_cdef }),
        ("state", ControlMessage::State(HandoverState::Resumed { pid: 42 })),
        ("state-unknown", ControlMessage::State(HandoverState::Unknown)),
        ("state-receiving", ControlMessage::State(HandoverState::Receiving)),
        ("state-ready-to-run", ControlMessage::State(HandoverState::ReadyToRun)),
        ("state-discarded", ControlMessage::State(HandoverState::Discarded)),
        ("state-filled", ControlMessage::State(HandoverState::Filled { pid: 42 })),
        ("state-ended", ControlMessage::State(HandoverState::Ended)),
        ("ping", ControlMessage::Ping { n: 1 }),
        ("join", ControlMessage::Join { session: 0x0123_4567_89ab_cdef, stream: 1 }),
        ("joined", ControlMessage::Joined),
        (
            "again",
            ControlMessage::Again {
                spaces: vec![(SpaceId(1), runs()), (SpaceId(4), vec![PageRun { start: PageNo(1), len: 1 }])],
            },
        ),
        ("unsealed", ControlMessage::Unsealed),
        ("late", ControlMessage::Late { session: 0x0123_4567_89ab_cdef, stream: 0 }),
        ("want", ControlMessage::Want { space: SpaceId(1), runs: runs() }),
        ("unwanted", ControlMessage::Unwanted { space: SpaceId(1), runs: runs() }),
        ("take-up", ControlMessage::TakeUp),
        ("taken", ControlMessage::Taken { space: SpaceId(1), vpid: 42, pages: 1, digest: sum }),
        ("taken-up", ControlMessage::TakenUp { spaces: 1 }),
        ("late-seal", ControlMessage::LateSeal { space: SpaceId(1), pages: 1, digest: sum }),
        ("late-seal-end", ControlMessage::LateSealEnd { spaces: 1 }),
        ("late-sealed", ControlMessage::LateSealed { pages: 1 }),
        (
            "network",
            ControlMessage::Network {
                addresses: vec![
                    MovingAddress {
                        address: "10.0.0.9".parse().unwrap(),
                        prefix: 24,
                        device: Some("eth0".into()),
                        owner: [2, 0, 0, 0, 0, 7],
                    },
                    MovingAddress {
                        address: "2001:db8::9".parse().unwrap(),
                        prefix: 64,
                        device: None,
                        owner: [0; 6],
                    },
                ],
                keep_tcp: true,
            },
        ),
        ("network-ready", ControlMessage::NetworkReady),
        ("announce", ControlMessage::Announce),
        ("announced", ControlMessage::Announced { us: 700 }),
        (
            "delivered",
            ControlMessage::Delivered { packets: 12, bytes: 3456, lost: 0, release_us: 300, deliver_us: 150 },
        ),
        ("fault-times", ControlMessage::FaultTimes { count: 1000, p50_us: 90, p99_us: 400, max_us: 2000 }),
        (
            "hello-of-now",
            ControlMessage::Hello(Hello {
                versions: version::supported(),
                session: 0x0123_4567_89ab_cdef,
                engine: "0.1.0".into(),
                program: "redis-server".into(),
                verify: true,
                choices: RestoreChoices::default(),
            }),
        ),
        ("hold", ControlMessage::Hold { ms: 90_000 }),
        ("rejoin", ControlMessage::Rejoin { session: 0x0123_4567_89ab_cdef }),
        ("rejoined", ControlMessage::Rejoined),
        (
            "standing",
            ControlMessage::Standing {
                info: SpaceInfo { space: SpaceId(1), vpid: 42, name: "worker".into(), pages: 1000 },
                pages: 1,
                digest: sum,
            },
        ),
        ("standing-end", ControlMessage::StandingEnd { spaces: 1 }),
        ("stands", ControlMessage::Stands { pages: 3 }),
        (
            "prepared",
            ControlMessage::Prepared {
                timings: vec![
                    (Preparation::Criu, 31_000),
                    (Preparation::Memory, 198_000),
                    (Preparation::Addresses, 700),
                ],
            },
        ),
    ]
}
