//! docs/PROTOCOL.md says what the code does: its numbers are compared with the code's.
#![expect(clippy::disallowed_methods, reason = "the document is a file")]

use crate::examples::{Frame, examples};
use pageferry_wire_format::*;

/// The rows of all tables, cell by cell.
fn rows() -> Vec<Vec<String>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PROTOCOL.md");
    let text = std::fs::read_to_string(path).unwrap();
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    text.lines().filter(|line| line.starts_with('|')).map(cells).collect()
}

fn stands(wanted: &[&str]) {
    let begins = |row: &Vec<String>| row.len() >= wanted.len() && row.iter().zip(wanted).all(|(a, b)| a == b);
    assert!(rows().iter().any(begins), "no row of docs/PROTOCOL.md begins with {wanted:?}");
}

#[test]
fn limits_stand_in_the_document() {
    macro_rules! limits {
        ($($name:ident)*) => { $( stands(&[&format!("`{}`", stringify!($name)), &limits::$name.to_string()]); )* };
    }
    limits! {
        MAX_PAGE_NO MAX_BATCH_PAGES MAX_PAYLOAD_BYTES MAX_IMAGE_CHUNK MAX_IMAGE_NAME MAX_RUNS_PER_FRAME
        MAX_OWNED_RUNS MAX_DIGESTS_PER_FRAME MAX_CONTROL_BYTES MAX_REGIONS MAX_SPACES MAX_DETAIL_BYTES
        MAX_NAME_BYTES MAX_TIMINGS MAX_KEPT_PAGES MAX_STREAMS MAX_MOVED_ADDRESSES MAX_HOLD_MS MAX_ZSTD_WINDOW_LOG
    }
}

#[test]
fn kinds_stand_in_the_document() {
    for (kind, from, head, payload) in [
        (FrameKind::PageBatch, "source", limits::MAX_BATCH_HEAD, limits::MAX_PAYLOAD_BYTES),
        (FrameKind::Image, "source", limits::MAX_IMAGE_HEAD, limits::MAX_IMAGE_CHUNK),
        (FrameKind::Control, "both", limits::MAX_CONTROL_BYTES, 0),
        (FrameKind::Digests, "both", limits::MAX_DIGESTS_HEAD, 0),
        (FrameKind::Owned, "source", limits::MAX_OWNED_HEAD, 0),
        (FrameKind::Owed, "both", limits::MAX_OWNED_HEAD, 0),
        (FrameKind::PackedImage, "source", limits::MAX_PACKED_IMAGE_HEAD, limits::MAX_IMAGE_CHUNK),
    ] {
        let number = (kind as u16).to_string();
        stands(&[&number, &kind.to_string(), from, &head.to_string(), &payload.to_string()]);
    }
}

#[test]
fn messages_stand_in_the_document() {
    let mut numbers = std::collections::BTreeSet::new();
    for (_, frame) in examples() {
        let Frame::Control(message) = &frame else { continue };
        let bytes = frame.encode().unwrap();
        let number = u32::from_le_bytes(bytes[HEADER_BYTES..HEADER_BYTES + 4].try_into().unwrap());
        let name: String = format!("{message:?}").chars().take_while(char::is_ascii_alphanumeric).collect();
        stands(&[&number.to_string(), &format!("`{name}`")]);
        numbers.insert(number);
    }
    assert!(numbers.iter().copied().eq(0..numbers.len() as u32), "a message without an example: {numbers:?}");
}

#[test]
fn abort_codes_stand_in_the_document() {
    let known = (1..).map(AbortCode::from_number).take_while(|code| !matches!(code, AbortCode::Unknown(_)));
    for code in known {
        stands(&[&code.number().to_string(), &code.to_string()]);
    }
}

#[test]
fn versions_stand_in_the_document_newest_first() {
    let rows = rows();
    let begin = rows.iter().position(|row| row[0] == "version").unwrap() + 2;
    // What is no longer spoken keeps its row.
    for (row, version) in rows[begin..].iter().zip((1..=version::CURRENT).rev()) {
        assert_eq!(row[0], version.to_string());
    }
}
