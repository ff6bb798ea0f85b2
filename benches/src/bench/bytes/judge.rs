//! What has to hold for the bytes and times of a program's migrations.

use super::program::Program;
use serde::Serialize;

/// Most that all the bytes of a migration may be, over the pages that have to be sent as they are: frames, CRIU's images.
const FRAMES: f64 = 1.02;
/// The same over the pages that differ from each other, where most of a tree is the names of pages that are sent already.
const FRAMES_AND_NAMES: f64 = 1.05;
/// Most time that choosing codings may cost where none helps.
const SLOWER: f64 = 1.05;

/// What is judged: medians.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes of the program's pages.
    pub raw_bytes: f64,
    /// Of these, of pages that differ from all others.
    pub distinct_bytes: f64,
    /// Bytes on the wire.
    pub sent_bytes: f64,
    /// What `zstd -3` makes of the pages.
    pub zstd3_bytes: f64,
    /// Bytes on the wire for the first process of a tree alone.
    pub alone_bytes: Option<f64>,
    /// Pre-copy of raw pages, in seconds.
    pub raw_s: f64,
    /// Pre-copy, in seconds.
    pub s: f64,
    /// Share of the migrations whose pre-copy ended because the downtime would be short enough.
    pub converged: f64,
    /// The same of raw pages.
    pub raw_converged: f64,
}

/// One thing that has to hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// What it is about.
    pub what: &'static str,
    /// What was measured; null if it could not be.
    pub value: Option<f64>,
    /// Most that it may be.
    pub at_most: Option<f64>,
    /// Least that it may be.
    pub at_least: Option<f64>,
    /// Whether it holds.
    pub pass: bool,
}

fn goal(what: &'static str, value: Option<f64>, at_least: Option<f64>, at_most: Option<f64>) -> Goal {
    let holds =
        |value: f64| at_least.is_none_or(|least| value >= least) && at_most.is_none_or(|most| value <= most);
    Goal { what, value, at_most, at_least, pass: value.is_some_and(holds) }
}

/// What has to hold for this program, and whether it does.
pub fn judge(program: Program, measured: &Measured) -> Vec<Goal> {
    let Measured { raw_bytes, distinct_bytes, sent_bytes, zstd3_bytes, raw_s, s, .. } = *measured;
    match program {
        Program::Redis => vec![
            goal("sent over zstd -3", Some(sent_bytes / zstd3_bytes), None, Some(1.0)),
            goal("raw time over time", Some(raw_s / s), Some(2.5), None),
        ],
        Program::SparseHot | Program::SparseAll => vec![
            goal("converged", Some(measured.converged), Some(1.0), None),
            goal("raw pages converged", Some(measured.raw_converged), None, Some(0.0)),
        ],
        Program::ForkedWords | Program::ForkedCompressible => {
            let times = measured.alone_bytes.map(|alone| sent_bytes / alone);
            vec![goal("tree over one of it", times, None, Some(1.15))]
        }
        // Eight tenths of new noise beside the shared pages: nothing can be nearer to one process than 1.8 times.
        Program::ForkedNoise => {
            vec![goal(
                "sent over distinct pages",
                Some(sent_bytes / distinct_bytes),
                None,
                Some(FRAMES_AND_NAMES),
            )]
        }
        Program::Noise => vec![
            goal("sent over raw", Some(sent_bytes / raw_bytes), None, Some(FRAMES)),
            goal("time over raw time", Some(s / raw_s), None, Some(SLOWER)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEASURED: Measured = Measured {
        raw_bytes: 1000.0,
        distinct_bytes: 900.0,
        sent_bytes: 90.0,
        zstd3_bytes: 100.0,
        alone_bytes: Some(80.0),
        raw_s: 10.0,
        s: 4.0,
        converged: 1.0,
        raw_converged: 0.0,
    };

    fn passes(program: Program, measured: &Measured) -> Vec<bool> {
        judge(program, measured).iter().map(|goal| goal.pass).collect()
    }

    #[test]
    fn limits_are_where_they_are_said_to_be() {
        assert_eq!(passes(Program::Redis, &MEASURED), [true, true]);
        let more = Measured { sent_bytes: 101.0, s: 4.1, ..MEASURED };
        assert_eq!(passes(Program::Redis, &more), [false, false]);
        assert_eq!(passes(Program::ForkedWords, &MEASURED), [true]);
        assert_eq!(passes(Program::ForkedWords, &Measured { alone_bytes: Some(78.0), ..MEASURED }), [false]);
        assert_eq!(
            passes(Program::Noise, &Measured { sent_bytes: 1021.0, s: 10.4, ..MEASURED }),
            [false, true]
        );
        assert_eq!(passes(Program::ForkedNoise, &Measured { sent_bytes: 917.0, ..MEASURED }), [true]);
    }

    #[test]
    fn raw_pages_must_not_converge_and_one_run_that_does_not_is_a_miss() {
        assert_eq!(passes(Program::SparseAll, &MEASURED), [true, true]);
        let mixed = Measured { converged: 0.5, raw_converged: 0.5, ..MEASURED };
        assert_eq!(passes(Program::SparseHot, &mixed), [false, false]);
    }

    #[test]
    fn what_was_not_measured_is_missed() {
        assert_eq!(passes(Program::ForkedCompressible, &Measured { alone_bytes: None, ..MEASURED }), [false]);
    }
}
