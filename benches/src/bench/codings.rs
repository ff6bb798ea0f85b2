//! How fast pages are digested and coded, and into how many bytes; and the same of page pairs beside QEMU's XBZRLE.

use super::baseline::xbzrle;
use super::machine;
use super::stats::Runs;
use super::table::Table;
use crate::workload::content::mix;
use clap::Args;
use pageferry_wire_format::{PAGE_SIZE, ZstdDecoder, ZstdEncoder, delta, digest};
use serde::Serialize;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

/// Pages that are coded in turn: what stays in a core's second cache, with the pages they are compared with.
const PAGES: usize = 64;
/// Least time of one run, in seconds.
const RUN: f64 = 0.02;

/// Options of these measurements.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Runs of everything; the table shows medians
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// One JSON object a row instead of the table
    #[arg(long)]
    json: bool,
}

type Page = [u8; PAGE_SIZE];

/// Pages as programs have them: words that look like pointers, counters, text and noise.
fn pages(seed: u64) -> Vec<Page> {
    (0..PAGES as u64)
        .map(|page| {
            std::array::from_fn(|at| {
                let word = mix(seed ^ page << 20, (at / 8) as u64);
                word.to_le_bytes()[at % 8]
            })
        })
        .collect()
}

/// What is changed in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// All of its bytes.
    Word,
    /// Its lowest byte, as of a counter.
    Counter,
}

/// The same pages with words changed, spread evenly.
fn changed(base: &[Page], words: usize, change: Change) -> Vec<Page> {
    let mut pages = base.to_vec();
    for page in &mut pages {
        for k in 0..words {
            let at = k * 512 / words * 8;
            let len = if change == Change::Word { 8 } else { 1 };
            page[at..at + len].iter_mut().for_each(|byte| *byte ^= 0x5a);
        }
    }
    pages
}

/// Bytes of pages a second, in 10^6, of something that is done to each page in turn.
fn speed(runs: usize, mut each: impl FnMut(usize)) -> Runs {
    let once = |each: &mut dyn FnMut(usize)| (0..PAGES).for_each(each);
    once(&mut each);
    let runs = (0..runs.max(1)).map(|_| {
        let start = Instant::now();
        let mut rounds = 0u64;
        while rounds == 0 || start.elapsed().as_secs_f64() < RUN {
            for _ in 0..16 {
                once(&mut each);
            }
            rounds += 16;
        }
        (rounds * (PAGES * PAGE_SIZE) as u64) as f64 / 1e6 / start.elapsed().as_secs_f64()
    });
    Runs::new(runs.collect())
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    coding: &'static str,
    data: String,
    encode_mb_s: Runs,
    decode_mb_s: Option<Runs>,
    bytes_per_page: f64,
    /// What it has to reach, in 10^6 bytes a second; 0 for no limit.
    limit_mb_s: f64,
    pass: bool,
}

/// Measures codings and prints the table; fails if a goal was missed.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let base = pages(1);
    let runs = options.runs;
    let mut rows = Vec::new();
    let row = |coding, data: &str, encode: Runs, decode: Option<Runs>, bytes: f64, limit_mb_s: f64| {
        let quick = decode.as_ref().is_none_or(|decode| limit_mb_s == 0.0 || decode.median >= encode.median);
        let pass = encode.median >= limit_mb_s && quick;
        Row {
            coding,
            data: data.to_owned(),
            encode_mb_s: encode,
            decode_mb_s: decode,
            bytes_per_page: bytes,
            limit_mb_s,
            pass,
        }
    };
    let digests = speed(runs, |at| {
        black_box(digest::page(black_box(&base[at])));
    });
    rows.push(row("digest", "any", digests, None, 16.0, 20e3));
    let zeros = vec![[0u8; PAGE_SIZE]; PAGES];
    // Four pages in turn: a zero page is found before it is anywhere but in the first cache.
    let zero = speed(runs, |at| {
        black_box(digest::is_zero(black_box(&zeros[at % 4])));
    });
    rows.push(row("zero", "zeros", zero, None, 0.0, 60e3));
    for (words, limit) in [(1, 8e3), (8, 8e3), (64, 2.5e3), (512, 0.0)] {
        for change in [Change::Word, Change::Counter] {
            let new = changed(&base, words, change);
            let (encode, decode, bytes) = pairs(
                runs,
                &base,
                &new,
                |old, new, out| {
                    delta::encode(old, new, out);
                },
                |bytes, page| delta::apply(bytes, page).map(drop).expect("what was encoded"),
            );
            let data = format!("{words} {}", if change == Change::Word { "words" } else { "counters" });
            let mut made = row("delta", &data, encode, Some(decode), bytes, limit);
            made.pass &= words > 8 || bytes <= 100.0;
            rows.push(made);
        }
    }
    rows.push(zstd(runs, "noise", &base, &row)?);
    let text: Vec<Page> = (0..PAGES as u64)
        .map(|page| {
            std::array::from_fn(|at| b"key:value, "[(at + (mix(page, at as u64 / 40) % 7) as usize) % 11])
        })
        .collect();
    rows.push(zstd(runs, "text", &text, &row)?);
    let mut copy = [0u8; PAGE_SIZE];
    let raw = speed(runs, |at| black_box(&mut copy).copy_from_slice(black_box(&base[at])));
    rows.push(row("raw", "any", raw, None, PAGE_SIZE as f64, 0.0));
    show(options.json, &rows, || {
        let mut table =
            Table::new(&["coding", "data", "encode MB/s", "decode MB/s", "bytes a page", "at least", "goal"]);
        for row in &rows {
            table.row(vec![
                row.coding.to_owned(),
                row.data.clone(),
                row.encode_mb_s.display(0),
                row.decode_mb_s.as_ref().map_or("-".to_owned(), |decode| decode.display(0)),
                format!("{:.0}", row.bytes_per_page),
                if row.limit_mb_s > 0.0 { format!("{:.0}", row.limit_mb_s) } else { "-".to_owned() },
                verdict(row.limit_mb_s > 0.0, row.pass),
            ]);
        }
        table.render()
    })?;
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verdict(wanted: bool, pass: bool) -> String {
    match (wanted, pass) {
        (false, true) => "-",
        (_, true) => "met",
        (_, false) => "missed",
    }
    .to_owned()
}

fn zstd(
    runs: usize,
    data: &str,
    pages: &[Page],
    row: &impl Fn(&'static str, &str, Runs, Option<Runs>, f64, f64) -> Row,
) -> anyhow::Result<Row> {
    let all = pages.as_flattened();
    let (mut encoder, mut decoder) = (ZstdEncoder::new()?, ZstdDecoder::new()?);
    let (mut packed, mut back) = (Vec::new(), vec![0; all.len()]);
    let mut failed = Ok(());
    // One batch of all pages for each page that is counted: so only every 64th does anything.
    let encode = speed(runs, |at| {
        if at == 0 {
            failed = encoder.encode(1, black_box(all), &mut packed);
        }
    });
    failed?;
    let mut failed = Ok(());
    let decode = speed(runs, |at| {
        if at == 0 {
            failed = decoder.decode(black_box(&packed), &mut back);
        }
    });
    failed?;
    Ok(row("zstd", data, encode, Some(decode), packed.len() as f64 / PAGES as f64, 0.0))
}

/// Speeds and size of a coding of page pairs.
fn pairs(
    runs: usize,
    base: &[Page],
    new: &[Page],
    mut encode: impl FnMut(&Page, &Page, &mut Vec<u8>),
    mut apply: impl FnMut(&[u8], &mut Page),
) -> (Runs, Runs, f64) {
    let mut out = Vec::with_capacity(2 * PAGE_SIZE);
    let encoded = speed(runs, |at| {
        out.clear();
        encode(black_box(&base[at]), black_box(&new[at]), &mut out);
        black_box(&out);
    });
    let deltas: Vec<Vec<u8>> = base
        .iter()
        .zip(new)
        .map(|(old, new)| {
            let mut out = Vec::new();
            encode(old, new, &mut out);
            out
        })
        .collect();
    let mut targets = base.to_vec();
    let decoded = speed(runs, |at| apply(black_box(&deltas[at]), black_box(&mut targets[at])));
    assert!(targets == new, "the coding is wrong");
    let bytes = deltas.iter().map(Vec::len).sum::<usize>() as f64 / PAGES as f64;
    (encoded, decoded, bytes)
}

#[derive(Clone, Debug, Serialize)]
struct Versus {
    changed_words: usize,
    change: &'static str,
    ours_mb_s: Runs,
    theirs_mb_s: Runs,
    ours_decode_mb_s: Runs,
    theirs_decode_mb_s: Runs,
    ours_bytes: f64,
    theirs_bytes: f64,
    /// At least as fast in both directions.
    pass: bool,
}

/// Measures page pairs beside XBZRLE and prints the table; fails if it is slower.
///
/// # Errors
/// What kept it from measuring.
pub fn run_xbzrle(options: &Options) -> anyhow::Result<ExitCode> {
    let base = pages(1);
    let mut rows = Vec::new();
    for words in [1, 8, 64, 256, 512] {
        for change in [Change::Word, Change::Counter] {
            let new = changed(&base, words, change);
            let encode = |old: &Page, new: &Page, out: &mut Vec<u8>| {
                delta::encode(old, new, out);
            };
            let apply = |bytes: &[u8], page: &mut Page| delta::apply(bytes, page).map(drop).expect("a delta");
            let (ours_mb_s, ours_decode_mb_s, ours_bytes) = pairs(options.runs, &base, &new, encode, apply);
            let apply = |bytes: &[u8], page: &mut Page| xbzrle::apply(bytes, page).expect("what was encoded");
            let (theirs_mb_s, theirs_decode_mb_s, theirs_bytes) =
                pairs(options.runs, &base, &new, xbzrle::encode, apply);
            let pass = ours_mb_s.median >= theirs_mb_s.median;
            let change = if change == Change::Word { "whole words" } else { "lowest bytes" };
            rows.push(Versus {
                changed_words: words,
                change,
                ours_mb_s,
                theirs_mb_s,
                ours_decode_mb_s,
                theirs_decode_mb_s,
                ours_bytes,
                theirs_bytes,
                pass,
            });
        }
    }
    show(options.json, &rows, || {
        let head = [
            "changed words",
            "change",
            "delta MB/s",
            "XBZRLE MB/s",
            "delta decode MB/s",
            "XBZRLE decode MB/s",
            "delta bytes",
            "XBZRLE bytes",
            "goal",
        ];
        let mut table = Table::new(&head);
        for row in &rows {
            table.row(vec![
                row.changed_words.to_string(),
                row.change.to_owned(),
                row.ours_mb_s.display(0),
                row.theirs_mb_s.display(0),
                row.ours_decode_mb_s.display(0),
                row.theirs_decode_mb_s.display(0),
                format!("{:.0}", row.ours_bytes),
                format!("{:.0}", row.theirs_bytes),
                verdict(true, row.pass),
            ]);
        }
        table.render()
    })?;
    Ok(if rows.iter().all(|row| row.pass) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show<R: Serialize>(json: bool, rows: &[R], table: impl FnOnce() -> String) -> anyhow::Result<()> {
    if json {
        for row in rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(());
    }
    print!(
        "{}\n{PAGES} pages in turn, one thread; median (smallest..largest); 10^6 bytes of pages a second\n\n{}",
        machine::describe(),
        table()
    );
    Ok(())
}
