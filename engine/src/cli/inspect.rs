//! `pageferry inspect`.

use super::arguments::InspectVerb;
use super::render::{printable, table};
use super::units::Bytes;
use pageferry::kept::{Inspection, Share, SpaceReport, inspect};
use std::error::Error;
use std::fmt::Write;

/// Something is wrong with the stream.
const DAMAGED: u8 = 1;

/// Rows of regions and of images that are shown; the smaller ones share a row.
const ROWS: usize = 8;

/// Runs the verb.
pub(super) fn run(verb: &InspectVerb) -> anyhow::Result<u8> {
    let inspection = match inspect(&verb.path) {
        Ok(inspection) => inspection,
        Err(error) => {
            eprintln!("error: {}", printable(&error.to_string()));
            if let Some(cause) = error.source() {
                eprintln!("  because: {cause}");
            }
            return Ok(super::failure::REFUSED);
        }
    };
    if verb.json {
        let mut line = serde_json::to_vec(&inspection)?;
        line.push(b'\n');
        super::print(&line)?;
    } else {
        super::print(report(&inspection).as_bytes())?;
    }
    Ok(match &inspection.fault {
        None => 0,
        Some(fault) => {
            eprintln!("error: {}", printable(fault));
            DAMAGED
        }
    })
}

/// The tables for people.
fn report(inspection: &Inspection) -> String {
    let mut text = String::new();
    let pages: u64 = inspection.spaces.iter().map(|space| space.pages).sum();
    let _ = writeln!(
        text,
        "{}: {} in {} frames, of pageferry {}, session {}{}",
        printable(&inspection.program),
        Bytes(inspection.bytes),
        inspection.frames,
        printable(&inspection.engine),
        inspection.session,
        if inspection.verify { ", with digests for a comparison" } else { "" }
    );
    let _ = match inspection.fault {
        None => writeln!(
            text,
            "all of it is right: every frame, {pages} pages ({}), every space and image\n",
            Bytes(pages * 4096)
        ),
        Some(_) => writeln!(text, "what follows is what comes before the first thing that is wrong\n"),
    };
    text += &shares("frames of", "frames", &inspection.kinds);
    text.push('\n');
    text += &shares("coding", "pages", &inspection.codings);
    let rows = inspection.rounds.iter().map(|round| {
        vec![
            round.round.to_string(),
            round.pages.to_string(),
            round.zero_pages.to_string(),
            Bytes(round.bytes).to_string(),
        ]
    });
    text.push('\n');
    text += &table(&["round", "pages", "zero", "bytes"], &[0, 1, 2, 3], rows);
    text.push('\n');
    text += &spaces(inspection);
    text.push('\n');
    text += &shares("image", "pieces", &largest(&inspection.images));
    text
}

fn shares(what: &str, of: &str, shares: &[Share]) -> String {
    let rows =
        shares.iter().map(|share| vec![printable(&share.name), share.count.to_string(), size(share.bytes)]);
    table(&[what, of, "bytes"], &[1, 2], rows)
}

/// The spaces, each with its largest regions.
fn spaces(inspection: &Inspection) -> String {
    let mut rows = Vec::new();
    for space in &inspection.spaces {
        let SpaceReport { space: number, vpid, name, pages, zero_pages, bytes, gone_bytes, regions } = space;
        let name = format!("space {number}, process {vpid} ({})", printable(name));
        rows.push(vec![name, pages.to_string(), zero_pages.to_string(), size(*bytes)]);
        let mut regions: Vec<_> = regions.iter().collect();
        regions.sort_by_key(|region| std::cmp::Reverse((region.bytes, region.pages)));
        let rest = regions.split_off(regions.len().min(ROWS));
        regions.sort_by_key(|region| region.start);
        for region in regions {
            rows.push(vec![
                format!("  {:012x}-{:012x}", region.start, region.end),
                region.pages.to_string(),
                region.zero_pages.to_string(),
                size(region.bytes),
            ]);
        }
        if !rest.is_empty() {
            let sum =
                |what: fn(&pageferry::kept::RegionReport) -> u64| rest.iter().map(|r| what(r)).sum::<u64>();
            rows.push(vec![
                format!("  {} more", rest.len()),
                sum(|region| region.pages).to_string(),
                sum(|region| region.zero_pages).to_string(),
                size(sum(|region| region.bytes)),
            ]);
        }
        if *gone_bytes > 0 {
            let what = "  gone before the end".to_owned();
            rows.push(vec![what, "-".to_owned(), "-".to_owned(), size(*gone_bytes)]);
        }
    }
    if inspection.ended_bytes > 0 {
        let what = "processes that ended".to_owned();
        rows.push(vec![what, "-".to_owned(), "-".to_owned(), size(inspection.ended_bytes)]);
    }
    table(&["memory", "pages", "zero", "bytes"], &[1, 2, 3], rows)
}

/// The largest ones, and one row for the others.
fn largest(shares: &[Share]) -> Vec<Share> {
    let mut sorted = shares.to_vec();
    sorted.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    let rest = sorted.split_off(sorted.len().min(ROWS));
    if !rest.is_empty() {
        sorted.push(Share {
            name: format!("{} more", rest.len()),
            count: rest.iter().map(|share| share.count).sum(),
            bytes: rest.iter().map(|share| share.bytes).sum(),
        });
    }
    sorted
}

fn size(bytes: u64) -> String {
    if bytes == 0 { "-".to_owned() } else { Bytes(bytes).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::kept::{RegionReport, Round};

    fn share(name: &str, count: u64, bytes: u64) -> Share {
        Share { name: name.to_owned(), count, bytes }
    }

    #[test]
    fn an_inspection_lines_up() {
        let region = |start: u64, pages: u64, bytes: u64| RegionReport {
            start: start << 12,
            end: (start + pages) << 12,
            pages,
            zero_pages: pages / 10,
            bytes,
        };
        let inspection = Inspection {
            session: format!("{:032x}", 7),
            engine: "0.1.0".to_owned(),
            program: "redis-server".to_owned(),
            verify: true,
            frames: 271,
            bytes: 68_538_383,
            kinds: vec![
                share("control", 9, 1123),
                share("images", 30, 120_714),
                share("pages", 232, 68_416_546),
            ],
            codings: vec![
                share("raw", 16_435, 67_599_375),
                share("zero", 300, 0),
                share("zstd", 800, 817_171),
            ],
            rounds: vec![
                Round { round: 0, pages: 16_435, zero_pages: 300, bytes: 67_599_375 },
                Round { round: 1, pages: 800, zero_pages: 0, bytes: 817_171 },
            ],
            spaces: vec![SpaceReport {
                space: 0,
                vpid: 4711,
                name: "redis-server".to_owned(),
                pages: 16_800,
                zero_pages: 300,
                bytes: 68_400_000,
                gone_bytes: 16_546,
                regions: (1..=10).map(|n| region(0x7f00_0000 * n, 1680 * n, 1_243_636 * n)).collect(),
            }],
            ended_bytes: 0,
            images: (0..10).map(|n| share(&format!("core-{n}.img"), 1, 1000 + n)).collect(),
            fault: None,
        };
        insta::assert_snapshot!(report(&inspection));
    }
}
