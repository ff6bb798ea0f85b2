//! What is done with arbitrary bytes: once under libFuzzer, and once, over the corpus and what a seeded generator makes of
//! it, in the crate's tests (`tests/fuzzed.rs`), which need no nightly compiler. An entry returns, or panics where a
//! promise is broken.

use pageferry_wire_format::*;
use std::cell::RefCell;

/// Pages that a payload is unpacked for: more takes longer and shows nothing new.
const MOST_PAGES: usize = 8;

/// What is done with one input.
pub type Entry = fn(&[u8]);

/// All entries, by the name of their target.
pub const ENTRIES: [(&str, Entry); 5] =
    [("decoder", decoder), ("delta", delta), ("zstd", zstd), ("control", control), ("batch", batch)];

/// A stream of frames with their payloads: as it is, and again with the numbers and checks made right, so that what is
/// wrong in the heads is seen by those who read them.
pub fn decoder(data: &[u8]) {
    read_stream(data);
    let mut sealed = data.to_vec();
    seal_stream(&mut sealed);
    read_stream(&sealed);
}

/// Makes of each header one that is right for the head that follows it, as far as its lengths allow.
fn seal_stream(bytes: &mut [u8]) {
    let (mut at, mut chain) = (0, 0);
    for sequence in 0u64.. {
        let Some((header, rest)) =
            bytes.get_mut(at..).and_then(|rest| rest.split_at_mut_checked(HEADER_BYTES))
        else {
            return;
        };
        let len = |from: usize| u32::from_le_bytes(header[from..from + 4].try_into().expect("four bytes"));
        let (head_len, payload_len) = (len(8) as usize, len(12) as usize);
        let Some(head) = rest.get(..head_len) else { return };
        header[..4].copy_from_slice(&MAGIC.to_le_bytes());
        // A newer one is right for few messages: what it is stays where it is one that is spoken.
        if !version::is_spoken(u16::from_le_bytes([header[4], header[5]])) {
            header[4..6].copy_from_slice(&version::FRAMES.to_le_bytes());
        }
        header[16..24].copy_from_slice(&sequence.to_le_bytes());
        let mut check = xxhash_rust::xxh3::Xxh3::with_seed(chain);
        check.update(&header[..24]);
        check.update(head);
        chain = check.digest();
        header[24..].copy_from_slice(&chain.to_le_bytes());
        at = at.saturating_add(HEADER_BYTES + head_len).saturating_add(payload_len);
    }
}

fn read_stream(mut bytes: &[u8]) {
    let (mut decoder, mut batch, mut at) = (Decoder::default(), PageBatch::default(), Sequencer::default());
    while let Some((raw, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let Ok(announced) = decoder.header(raw) else { return };
        let Some((head, rest)) = rest.split_at_checked(announced.head_len()) else { return };
        let before = decoder.sequencer().clone();
        let Ok(meaning) = decoder.head(&announced, head, &mut batch) else {
            assert_eq!(decoder.sequencer(), &before, "a frame that was refused moved the stream on");
            return;
        };
        let (mut again, mut payload_len) = (Vec::new(), 0);
        match &meaning {
            Head::Pages { payload_len: len } => {
                payload_len = *len;
                batch.encode(payload_len, &mut at, &mut again)
            }
            Head::Image { chunk, payload_len: len } => {
                payload_len = *len;
                chunk.encode(payload_len, &mut at, &mut again)
            }
            Head::Digests(digests) => digests.encode(&mut at, &mut again),
            Head::Owned(owned) => owned.encode(&mut at, &mut again),
            Head::Owed(owed) => owed.encode(&mut at, &mut again),
            Head::Control(message) => message.encode(&mut at, &mut again),
        }
        .expect("what was understood can be written");
        assert!(again == bytes[..HEADER_BYTES + head.len()], "{meaning:?} is written in another way");
        assert_eq!(decoder.sequencer(), &at, "the two sides of the stream differ");
        let (payload, rest) = rest.split_at(payload_len.min(rest.len()));
        match &meaning {
            _ if payload.len() < payload_len => {}
            Head::Pages { .. } => unpack(&batch, payload),
            Head::Image { chunk, .. } => unpack_image(chunk, payload),
            _ => {}
        }
        bytes = rest;
    }
}

/// Does with a payload what a receiver does, on bases of its own.
fn unpack(batch: &PageBatch, payload: &[u8]) {
    let pages = batch.nonzero();
    if pages > MOST_PAGES {
        return;
    }
    let mut plain = vec![0x33; pages * PAGE_SIZE];
    match batch.coding() {
        Coding::Raw => assert_eq!(payload.len(), plain.len()),
        Coding::Copy => assert!(payload.is_empty() && batch.sources().len() == pages),
        Coding::Zstd => drop(with_zstd(|_, decoder| decoder.decode(payload, &mut plain))),
        Coding::ZstdOnBase => {
            let prefix = vec![0x44; plain.len()];
            drop(with_zstd(|_, decoder| decoder.decode_on(&prefix, payload, &mut plain)));
        }
        Coding::Delta => {
            let mut rest = payload;
            for page in plain.as_chunks_mut::<PAGE_SIZE>().0 {
                let Ok(used) = delta::apply(rest, page) else { return };
                rest = &rest[used..];
            }
        }
    }
}

/// A piece of an image is as long as it says, or an error.
fn unpack_image(chunk: &ImageChunk, payload: &[u8]) {
    let len = chunk.unpacked.map_or(payload.len(), |len| len as usize);
    assert!(len <= limits::MAX_IMAGE_CHUNK);
    if len > MOST_PAGES * PAGE_SIZE {
        return;
    }
    let mut room = Vec::new();
    with_zstd(|_, decoder| {
        if let Ok(piece) = chunk.piece(payload, decoder, &mut room) {
            assert_eq!(piece.len(), len);
        }
    });
}

/// Deltas: the bytes as one, on a page made from the first of them, and as changes of that page, there and back.
pub fn delta(data: &[u8]) {
    let Some((seed, rest)) = data.split_first_chunk::<2>() else { return };
    let base = page_of(u16::from_le_bytes(*seed));
    let mut page = base;
    match delta::apply(rest, &mut page) {
        Err(_) => assert!(page == base, "a delta that is none was applied"),
        Ok(used) => {
            assert!((delta::MIN_DELTA_BYTES..=delta::MAX_DELTA_BYTES).contains(&used) && used <= rest.len());
            let mut cut = base;
            assert!(delta::apply(&rest[..used - 1], &mut cut).is_err(), "its last byte does nothing");
            there_and_back(&base, &page);
        }
    }
    let mut changed = base;
    for change in rest.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        changed[at % PAGE_SIZE] = change[2];
    }
    there_and_back(&base, &changed);
}

fn there_and_back(base: &delta::Page, page: &delta::Page) {
    let mut out = vec![7];
    let len = delta::encode(base, page, &mut out);
    assert_eq!((out.len(), out[0]), (1 + len, 7), "what was there before is left alone");
    assert!(len <= delta::MAX_DELTA_BYTES);
    let mut back = *base;
    assert_eq!(delta::apply(&out[1..], &mut back), Ok(len));
    assert!(back == *page, "a delta makes another page");
}

/// A page that depends on a few bytes: of one byte, of words that count, or of noise.
fn page_of(seed: u16) -> delta::Page {
    let mut page = [seed as u8; PAGE_SIZE];
    let mut state = u64::from(seed) | 1;
    for (number, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        match seed >> 14 {
            0 | 1 => {}
            2 => *word = (number as u64 + u64::from(seed)).to_le_bytes(),
            _ => {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *word = state.to_le_bytes();
            }
        }
    }
    page
}

fn with_zstd<T>(use_them: impl FnOnce(&mut ZstdEncoder, &mut ZstdDecoder) -> T) -> T {
    thread_local! {
        static ZSTD: RefCell<Option<(ZstdEncoder, ZstdDecoder)>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|pair| {
        let (encoder, decoder) = pair.get_or_insert_with(|| {
            (ZstdEncoder::new().expect("memory"), ZstdDecoder::new().expect("memory"))
        });
        use_them(encoder, decoder)
    })
}

/// zstd: the bytes as a frame, with and without a prefix, and as content, there and back.
pub fn zstd(data: &[u8]) {
    let Some(([how, seed @ ..], rest)) = data.split_first_chunk::<3>() else { return };
    let seed = u16::from_le_bytes(*seed);
    let pages = usize::from(how & 3) + 1;
    let prefix = page_of(seed).repeat(pages);
    let mut out = vec![0xee; pages * PAGE_SIZE + 1];
    with_zstd(|encoder, decoder| {
        let (room, guard) = out.split_at_mut(pages * PAGE_SIZE);
        let plain = decoder.decode(rest, room).is_ok();
        if plain || decoder.decode_on(&prefix, rest, room).is_ok() {
            let mut packed = Vec::new();
            encoder.encode(1, room, &mut packed).expect("pages can be packed");
            let mut back = vec![0; room.len()];
            decoder.decode(&packed, &mut back).expect("what was packed can be unpacked");
            assert!(back == room);
        }
        assert_eq!(guard, [0xee], "written beyond the end");
        // The other way round, one time in some: it takes longer.
        if how >> 5 == 0 {
            let level = [1, 2, 3, 6][usize::from(how >> 3 & 3)];
            let mut content = prefix.clone();
            content.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            let (mut packed, mut back) = (Vec::new(), vec![0; content.len()]);
            encoder.encode(level, &content, &mut packed).expect("pages can be packed");
            decoder.decode(&packed, &mut back).expect("what was packed can be unpacked");
            assert!(back == content);
            back.fill(0);
            encoder.encode_on(level, &prefix, &content, &mut packed).expect("pages can be packed");
            decoder.decode_on(&prefix, &packed, &mut back).expect("what was packed can be unpacked");
            assert!(back == content);
        }
    });
}

fn head_of(written: Result<(), EncodeError>, frame: &[u8]) -> &[u8] {
    written.expect("what was understood can be written");
    &frame[HEADER_BYTES..]
}

/// A control message's head.
pub fn control(data: &[u8]) {
    let Ok(message) = ControlMessage::decode(data) else { return };
    let mut frame = Vec::new();
    let written = message.encode(&mut Sequencer::default(), &mut frame);
    assert!(head_of(written, &frame) == data, "{message:?} is written in another way");
}

/// The length of a payload, and the head of pages, owned pages, digests, or a piece of an image.
pub fn batch(data: &[u8]) {
    let Some((len, head)) = data.split_first_chunk::<4>() else { return };
    let payload_len = u32::from_le_bytes(*len) as usize;
    let first = Sequencer::default;
    let mut frame = Vec::new();
    let mut pages = PageBatch::default();
    match pages.decode_into(head, payload_len) {
        Err(_) => assert!(pages.is_empty(), "something is left of a batch that was refused"),
        Ok(()) => {
            let written = pages.encode(payload_len, &mut first(), &mut frame);
            assert!(head_of(written, &frame) == head, "{pages:?} is written in another way");
            assert_eq!(pages.pages().count(), pages.len());
        }
    }
    if let Ok(owned) = OwnedBatch::decode(head) {
        frame.clear();
        let written = owned.encode(&mut first(), &mut frame);
        assert!(head_of(written, &frame) == head, "{owned:?} is written in another way");
    }
    if let Ok(digests) = DigestBatch::decode(head) {
        frame.clear();
        let written = digests.encode(&mut first(), &mut frame);
        assert!(head_of(written, &frame) == head, "{digests:?} is written in another way");
    }
    for read in [ImageChunk::decode, ImageChunk::decode_packed] {
        let Ok(chunk) = read(head, payload_len) else { continue };
        frame.clear();
        let written = chunk.encode(payload_len, &mut first(), &mut frame);
        assert!(head_of(written, &frame) == head, "{chunk:?} is written in another way");
    }
}
