//! `pageferry track --replay`: the same numbers from a recording, and pictures of it.

use super::super::arguments::TrackVerb;
use super::super::units::Time;
use super::heat::{Heat, Regions};
use super::output::{self, Extent, Summary, Tally};
use super::plot::{self, CELLS, Picture};
use super::sinks::{self, Sinks};
use anyhow::{Context, bail};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::recording::{Ending, Header, Reader};
use pageferry_tracker::working_set::Estimator;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Runs the verb on a recording.
pub(super) fn run(verb: &TrackVerb, path: &Path) -> anyhow::Result<u8> {
    match replay(verb, path) {
        Err(error) if sinks::is_unread(&error) => Ok(0),
        done => done,
    }
}

fn replay(verb: &TrackVerb, path: &Path) -> anyhow::Result<u8> {
    // Before anything is read: a picture of a kind that nobody draws.
    if let Some(picture) = &verb.plot {
        plot::Format::of(picture)?;
    }
    let mut sinks = Sinks::open(verb)?;
    let mut estimator = Estimator::new();
    let (mut tally, mut extent, mut rates) = (Tally::default(), Extent::default(), Vec::new());
    let mut regions = Regions::default();
    let (header, ending) = each(path, |observation| {
        estimator.observe(observation);
        let line = tally.line(observation, &estimator);
        extent = Extent { scans: extent.scans + 1, duration: observation.at, written: tally.written() };
        regions.observe(observation);
        let rate = estimator.last_interval();
        rates.push((observation.at, rate.first_time, rate.repeated));
        // Thousands of plain lines help nobody: for people the summary is the answer.
        sinks.scan(observation, &line, false)
    })?;
    if extent.scans == 0 {
        bail!("the recording {} has no scan in it", path.display());
    }
    let end = match ending {
        Ending::Finished => format!("recording of {} (pid {})", header.root_name, header.root_pid),
        Ending::Interrupted { .. } => format!(
            "recording of {} (pid {}), cut off: everything up to its last whole scan",
            header.root_name, header.root_pid
        ),
    };
    if let Some(picture) = &verb.plot {
        let axis = regions.axis();
        // More columns than scans would be stripes.
        let columns = CELLS.0.min(extent.scans.saturating_sub(1).max(1) as usize);
        let mut heat = Heat::new(columns, CELLS.1, extent.duration);
        each(path, |observation| {
            heat.observe(&axis, observation);
            Ok(())
        })?;
        let title = format!(
            "{} (pid {}), {}: {} scans in {}, one every {}, by {}",
            header.root_name,
            header.root_pid,
            output::scope_words(header.scope),
            extent.scans,
            Time(extent.duration),
            Time(header.interval),
            header.source
        );
        let curve = estimator.curve().iter().map(|point| (point.tau, point.pages, point.error)).collect();
        plot::write(&Picture { title, duration: extent.duration, axis, heat, curve, rates }, picture)?;
    }
    let summary = Summary::of(&estimator, verb.link, extent, end);
    sinks.summary(&summary, &estimator)?;
    Ok(0)
}

/// Reads a recording from the front to the end.
fn each(
    path: &Path,
    mut take: impl FnMut(&Observation) -> anyhow::Result<()>,
) -> anyhow::Result<(Header, Ending)> {
    let failed = || format!("the recording {} cannot be read", path.display());
    let mut reader =
        Reader::new(BufReader::new(File::open(path).with_context(failed)?)).with_context(failed)?;
    let header = reader.header().clone();
    for observation in reader.by_ref() {
        take(&observation.with_context(failed)?)?;
    }
    Ok((header, reader.ending()))
}
