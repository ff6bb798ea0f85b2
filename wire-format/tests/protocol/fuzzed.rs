//! The entries of the fuzzing targets on stable Rust: over the corpus, and over a million inputs that a seeded generator makes
//! of it. A failure prints what is needed to have the same input again.
#![expect(clippy::disallowed_methods, reason = "the corpus is files")]

#[path = "../../fuzz/src/lib.rs"]
mod entries;

use crate::examples::{Frame, batch, examples};
use entries::ENTRIES;
use pageferry_wire_format::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// Inputs for each target, a million in all: fewer where one takes longer.
const INPUTS: [(&str, usize); 5] =
    [("decoder", 150_000), ("delta", 250_000), ("zstd", 20_000), ("control", 280_000), ("batch", 300_000)];
/// Bytes of an input: what is longer takes longer and is not otherwise.
const LONGEST: usize = 16 << 10;

fn corpus_dir(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// The corpus, in the order of its names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = corpus_dir(target);
    let list = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = list.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 4, "{} is nearly empty", dir.display());
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Splitmix64 (Steele, Lea, Flood 2014).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers at which something happens: limits, and those beside them.
const NUMBERS: [u64; 14] =
    [0, 1, 2, 0x7f, 0xff, 255, 256, 4096, 65_536, 1 << 20, 1 << 28, u32::MAX as u64, 1 << 52, u64::MAX];

fn mutate(input: &mut Vec<u8>, other: &[u8], noise: &mut Noise) {
    for _ in 0..=noise.below(4) {
        if input.is_empty() {
            input.push(noise.next() as u8);
        }
        let at = noise.below(input.len());
        match noise.below(8) {
            0 => input[at] ^= 1 << noise.below(8),
            1 => input[at] = noise.next() as u8,
            2 | 3 => {
                let number =
                    NUMBERS[noise.below(NUMBERS.len())].wrapping_add(noise.next() % 3).wrapping_sub(1);
                let width = [1, 2, 4, 8][noise.below(4)];
                let to = &mut input[at..];
                let width = width.min(to.len());
                to[..width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            4 => input.truncate(at),
            5 => drop(input.drain(at..(at + 1 + noise.below(24)).min(input.len()))),
            6 => {
                let piece: Vec<u8> = input[at..(at + 1 + noise.below(24)).min(input.len())].to_vec();
                drop(input.splice(at..at, piece));
            }
            _ => {
                let from = noise.below(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from.min(other.len())..]);
            }
        }
    }
    input.truncate(LONGEST);
}

fn run(target: &str) {
    let entry = ENTRIES.iter().find(|(name, _)| *name == target).expect("a target").1;
    let count = INPUTS.iter().find(|(name, _)| *name == target).expect("a number").1;
    let corpus = corpus(target);
    let check = |input: &[u8], what: &dyn Fn() -> String| {
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| entry(input))) {
            let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{target}, {}: {hex}", what());
            std::panic::resume_unwind(cause);
        }
    };
    for (number, input) in corpus.iter().enumerate() {
        check(input, &|| format!("file {number} of the corpus"));
    }
    for number in 0..count {
        // Each input has a seed of its own, so that one can be had again without those before it.
        let mut noise = Noise(number as u64);
        let mut input = corpus[noise.below(corpus.len())].clone();
        let other = &corpus[noise.below(corpus.len())];
        mutate(&mut input, other, &mut noise);
        check(&input, &|| format!("input {number}"));
    }
}

#[test]
fn streams_of_frames() {
    run("decoder");
}

#[test]
fn deltas() {
    run("delta");
}

#[test]
fn compressed_pages() {
    run("zstd");
}

#[test]
fn control_messages() {
    run("control");
}

#[test]
fn heads_of_lists_and_batches() {
    run("batch");
}

#[test]
fn a_million_inputs_in_a_small_corpus() {
    assert_eq!(INPUTS.iter().map(|(_, count)| count).sum::<usize>(), 1_000_000);
    let bytes: usize = ENTRIES.iter().flat_map(|(name, _)| corpus(name)).map(|input| input.len()).sum();
    assert!(bytes < 200 << 10, "{bytes} bytes: `cargo fuzz cmin` makes it smaller");
}

/// What the targets begin with, from the frames of the other tests; a frame that is new belongs to it.
/// `PAGEFERRY_WRITE_CORPUS=1` writes the files.
#[test]
fn every_frame_is_in_the_corpus() {
    let mut seeds: Vec<(&str, String, Vec<u8>)> = Vec::new();
    let (mut stream, mut at) = (Vec::new(), Sequencer::default());
    for (name, frame) in examples() {
        let head = frame.encode().unwrap()[HEADER_BYTES..].to_vec();
        let payload = match &frame {
            Frame::Pages(_, len) | Frame::Image(_, len) => *len,
            _ => 0,
        };
        if matches!(frame, Frame::Control(_)) {
            seeds.push(("control", name.to_owned(), head));
        } else {
            let with_len = [&(payload as u32).to_le_bytes()[..], &head].concat();
            seeds.push(("batch", name.to_owned(), with_len));
        }
        // The payloads are what the heads say in length only, and short, so that the corpus stays small.
        if payload <= 100 {
            stream.extend(frame.encode_at(&mut at).unwrap());
            stream.resize(stream.len() + payload, 0);
        }
    }
    seeds.push(("decoder", "all".to_owned(), stream));
    for (name, frame) in real_batches() {
        seeds.push(("decoder", name.to_owned(), frame));
    }
    let (content, mut packed) = (b"a piece of an image ".repeat(40), Vec::new());
    ZstdEncoder::new().unwrap().encode(1, &content, &mut packed).unwrap();
    let frame = Frame::Image(ImageChunk::packed("pages-1.img", 4096, &content), packed.len());
    seeds.push(("decoder", "packed-image".to_owned(), [frame.encode().unwrap(), packed].concat()));
    let mut change = vec![1, 0x80];
    change.extend([16, 0, 9, 17, 0, 9, 0, 8, 1]);
    seeds.push(("delta", "changes".to_owned(), change));
    for (name, step) in [("few-words", 1024), ("many-words", 40), ("bytes", 9), ("all", 1)] {
        let base = [7; PAGE_SIZE];
        let mut page = base;
        page.iter_mut().step_by(step).for_each(|byte| *byte = 200);
        let mut input = vec![7, 0];
        delta::encode(&base, &page, &mut input);
        seeds.push(("delta", name.to_owned(), input));
    }
    let mut zstd = ZstdEncoder::new().unwrap();
    for (name, level, on_base) in
        [("one", 1, false), ("six", 6, false), ("one-on-base", 1, true), ("six-on-base", 6, true)]
    {
        let (base, mut packed) = ([5; PAGE_SIZE], Vec::new());
        let mut page = base;
        (0..PAGE_SIZE).step_by(7).for_each(|at| page[at] = ((at * at) >> 4) as u8);
        match on_base {
            true => zstd.encode_on(level, &base, &page, &mut packed).unwrap(),
            false => zstd.encode(level, &page, &mut packed).unwrap(),
        }
        seeds.push(("zstd", name.to_owned(), [&[0, 5, 0][..], &packed].concat()));
    }
    seeds.push(("zstd", "content".to_owned(), b"\x09\x05\xc0a page that begins so".to_vec()));

    for (target, name, bytes) in seeds {
        let path = corpus_dir(target).join(format!("seed-{name}"));
        if std::env::var_os("PAGEFERRY_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(corpus_dir(target)).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let stored = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(stored == bytes, "{} is not what this version writes", path.display());
    }
}

/// Batches with the payload that their coding gives, each as a stream of its own.
fn real_batches() -> Vec<(&'static str, Vec<u8>)> {
    let (base, mut content) = ([0x33; PAGE_SIZE], [0x33; PAGE_SIZE]);
    content[100..120].fill(0x34);
    let mut zstd = ZstdEncoder::new().unwrap();
    let (mut plain, mut on_base, mut deltas) = (Vec::new(), Vec::new(), Vec::new());
    zstd.encode(1, &content, &mut plain).unwrap();
    zstd.encode_on(1, &[0x44; PAGE_SIZE], &content, &mut on_base).unwrap();
    delta::encode(&base, &content, &mut deltas);
    [
        ("zstd", Coding::Zstd, plain),
        ("zstd-on-base", Coding::ZstdOnBase, on_base),
        ("delta", Coding::Delta, deltas),
    ]
    .into_iter()
    .map(|(name, coding, payload)| {
        let mut bytes = Frame::Pages(batch(1, coding, &[(9, 0x34)]), payload.len()).encode().unwrap();
        bytes.extend(payload);
        (name, bytes)
    })
    .collect()
}
