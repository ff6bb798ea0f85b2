//! What a migration would bring, without one: watches a program for a while, and moves it in virtual time.

mod content;
mod images;

use crate::calibration::{Calibration, PageKind};
use crate::cancel::Cancel;
use crate::destination::store::populating;
use crate::model::{self, Doubt, Forecast, HEAD, PageCost, Site, Trace, Wish};
use crate::plan::{PolicyChoice, Strategy};
pub use content::ContentError;
use content::{Content, Cost, Way};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::probe::Kernel;
use pageferry_tracker::{
    AttachError, ChooseError, CollectError, OpenError, Target, Tracker, TrackerKind, TreeState,
};
use serde::Serialize;
use std::thread;
use std::time::{Duration, Instant};

/// Moments of the trace at which migrations begin.
const STARTS: u32 = 15;
/// A scan may take this share of the time.
const SCANNING: u32 = 20;
/// The interval that this gives lies between these.
const INTERVALS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Sending a page as it is through a socket, in seconds.
const SENDING: f64 = 1.4e-6;
/// What the other side does with a page beside decoding it and fresh memory for it, in seconds (docs/BENCHMARKS.md, goodput: 0.203 s for a
/// GB).
const RECEIVING: f64 = 0.83e-6;
/// Of the time of the first round, what fresh memory for a page takes where that cannot be measured.
const STORING: Duration = Duration::from_nanos(3400);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct PredictPlan {
    /// Root of the process tree.
    pub pid: i32,
    /// Dirty tracker to use; `None` lets the probe choose.
    pub tracker: Option<TrackerKind>,
    /// How long to watch.
    pub duration: Duration,
    /// Between two scans; `None` is as short as takes a twentieth of the time, from 20 ms to half a second.
    pub interval: Option<Duration>,
    /// What the link carries, bytes a second, the heads of packets included; `None` if it is no limit.
    pub bandwidth: Option<u64>,
    /// From one host to the other and back.
    pub round_trip: Duration,
    /// Connections; `None` is one for each processor, eight at most.
    pub streams: Option<u16>,
    /// Downtime to aim for.
    pub downtime: Duration,
    /// Time to aim for until all of it is there.
    pub total_time: Option<Duration>,
    /// Rounds at most.
    pub max_rounds: u32,
    /// Who decides between another round and the freeze.
    pub policy: PolicyChoice,
    /// The receiver has memory for the program ready (`receive --standby`).
    pub standby: bool,
}

/// What would come of it.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Name of the program.
    pub program: String,
    /// Processes with memory of their own.
    pub processes: u32,
    /// Memory that a migration sends by itself, bytes.
    pub memory_bytes: u64,
    /// Memory that travels in CRIU's images while the program stands still (shared memory, changed pages of files), bytes.
    pub image_memory_bytes: u64,
    /// Scans that were made.
    pub scans: u64,
    /// Pages that became dirty between two scans, a second.
    pub dirty_rate: f64,
    /// Bytes on the wire for a page that is sent for the first time.
    pub first_page_bytes: f64,
    /// Bytes on the wire for one that was sent before and is dirty again.
    pub again_page_bytes: f64,
    /// Earlier migrations that the constants are from.
    pub learned_from: usize,
    /// What each strategy would bring.
    pub strategies: Vec<Forecast>,
}

/// Why nothing can be predicted. The program runs on as it was.
#[derive(Debug, thiserror::Error)]
pub enum PredictError {
    /// The process cannot be a target.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No tracker works here.
    #[error(transparent)]
    Choose(#[from] ChooseError),
    /// It cannot be tracked.
    #[error("the process tree cannot be tracked")]
    Attach(#[from] AttachError),
    /// A scan failed.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// Its pages could not be looked at.
    #[error("could not look at the contents of its pages")]
    Content(#[from] ContentError),
    /// It ended.
    #[error("the program ended while it was watched")]
    Exited,
    /// Somebody wanted it to end.
    #[error("interrupted")]
    Cancelled,
    /// There was no time for two scans.
    #[error("{0:?} is too short to see what the program writes: watch it for longer")]
    TooShort(Duration),
}

/// Watches the tree of `plan.pid` and says what each strategy would bring. Takes as long as `plan.duration`.
///
/// # Errors
/// [`PredictError`]; the program runs on as it was.
pub fn predict(
    plan: &PredictPlan,
    calibration: &Calibration,
    cancel: &Cancel,
) -> Result<Prediction, PredictError> {
    let root = Target::open(plan.pid)?;
    let program = root.name();
    let (kind, _) = Kernel::probe().choose(plan.tracker)?;
    let (trace, content) = watch(plan, root, kind, cancel)?;
    if trace.intervals() < 2 {
        return Err(PredictError::TooShort(plan.duration));
    }
    let site = site(plan, &trace, &content, calibration, &program);
    let now = trace.duration();
    let doubt = Doubt { freeze: calibration.spread(), bytes: content.doubt().max(Doubt::LEAST) };
    let forecast = |strategy| {
        let wish = Wish {
            strategy,
            policy: plan.policy,
            downtime: plan.downtime,
            total_time: plan.total_time,
            max_rounds: plan.max_rounds,
        };
        let site = Site { freeze: calibration.freeze_cost_by(&program, strategy), ..site };
        model::forecast(&trace, &site, &wish, STARTS, doubt)
    };
    let strategies = Strategy::ALL.map(forecast).to_vec();
    Ok(Prediction {
        program,
        processes: trace.processes(now),
        memory_bytes: trace.existing(now).values().map(|pages| pages.len() * 4096).sum(),
        image_memory_bytes: trace.in_images(now) * 4096,
        scans: trace.intervals() as u64 + 1,
        dirty_rate: trace.dirty_rate(),
        first_page_bytes: site.first.bytes,
        again_page_bytes: site.again.bytes,
        learned_from: calibration.runs(),
        strategies,
    })
}

/// Scans for as long as the plan says.
fn watch(
    plan: &PredictPlan,
    root: Target,
    kind: TrackerKind,
    cancel: &Cancel,
) -> Result<(Trace, Content), PredictError> {
    let mut tracker = Tracker::attach(root, kind)?;
    let (mut trace, mut content) = (Trace::new(), Content::default());
    // Before the first interval begins: it takes half a second.
    let collected = tracker.collect(TreeState::Running)?;
    content.look(&collected)?;
    tracker.acknowledge(collected.ticket);
    let start = Instant::now();
    loop {
        if cancel.is_cancelled() {
            return Err(PredictError::Cancelled);
        }
        let begin = Instant::now();
        let collected = tracker.collect(TreeState::Running)?;
        if collected.spaces.is_empty() {
            return Err(PredictError::Exited);
        }
        let took = begin.elapsed();
        trace.add(&Observation::of(&collected, start.elapsed(), took));
        content.look_again(&collected)?;
        let interval = plan.interval.unwrap_or_else(|| (took * SCANNING).clamp(INTERVALS.0, INTERVALS.1));
        if start.elapsed() + interval > plan.duration {
            // What it holds now is nearest to what would be sent.
            content.look(&collected)?;
            content.look_closely()?;
            trace.add_in_images(images::pages(&collected));
            return Ok((trace, content));
        }
        tracker.acknowledge(collected.ticket);
        thread::sleep(interval.saturating_sub(begin.elapsed()));
    }
}

/// The conditions: the link as it was given, the pages as they were seen, and the rest from earlier runs.
fn site(
    plan: &PredictPlan,
    trace: &Trace,
    content: &Content,
    calibration: &Calibration,
    program: &str,
) -> Site {
    let processors = thread::available_parallelism().map_or(1, usize::from).min(8);
    let workers = plan.streams.map_or(processors, usize::from).max(1) as f64;
    let bandwidth = plan.bandwidth.map_or(f64::INFINITY, Site::payload);
    let way = Way { workers, bandwidth, sending: SENDING / 4096.0 };
    let first = content.first(way);
    let anew = content.anew(way);
    let again = match (content.again(way), trace.unchanged_share()) {
        (Some(again), _) => again,
        (None, Some(unchanged)) => Cost { bytes: first.bytes * (1.0 - unchanged), ..first },
        (None, None) => first,
    };
    let time = |cost: &Cost| Duration::from_secs_f64((cost.seconds + RECEIVING) / workers);
    // The other machine is taken for one like this.
    let prepare = match plan.standby {
        true => Duration::ZERO,
        false => populating().unwrap_or(STORING.mul_f64(workers)),
    };
    let storing = prepare.div_f64(workers);
    let own = Site {
        bandwidth,
        round_trip: plan.round_trip,
        first: PageCost { time: time(&first) + storing, bytes: first.bytes + HEAD },
        again: PageCost { time: time(&again), bytes: again.bytes + HEAD },
        anew: PageCost { time: time(&anew), bytes: anew.bytes + HEAD },
        still: Some(time(&first)),
        prepare,
        ..Site::default()
    };
    let learned = calibration.site(own, program);
    // What coding costs was measured now, and of this program; where it was moved before, what that took says more: who else wanted the
    // processors meanwhile.
    let compresses = first.bytes < content.first(Way { bandwidth: f64::INFINITY, ..way }).bytes;
    let knows = |kind, cost: PageCost| calibration.knows(kind, program, cost.bytes);
    let slower = |own: PageCost, learned: PageCost, is_own: bool| PageCost {
        time: match compresses && !is_own {
            true => own.time.max(learned.time),
            false => learned.time,
        },
        ..own
    };
    let first = slower(own.first, learned.first, knows(PageKind::First, own.first));
    let again_is_own = knows(PageKind::Again, own.again);
    let late_is_own = knows(PageKind::Late, own.first);
    Site {
        first,
        again: slower(own.again, learned.again, again_is_own),
        anew: slower(own.anew, learned.anew, again_is_own),
        late: if late_is_own { learned.late } else { learned.late.max(first.time) },
        ..learned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_ready_takes_no_time() {
        let plan = |standby| PredictPlan {
            pid: 1,
            tracker: None,
            duration: Duration::ZERO,
            interval: None,
            bandwidth: None,
            round_trip: Duration::ZERO,
            streams: Some(1),
            downtime: Duration::ZERO,
            total_time: None,
            max_rounds: 1,
            policy: PolicyChoice::Adaptive,
            standby,
        };
        let first = |standby| {
            let (trace, content) = (Trace::new(), Content::default());
            site(&plan(standby), &trace, &content, &Calibration::default(), "program").first.time
        };
        // Clearing a page alone takes more than a tenth of a microsecond on any machine.
        assert!(
            first(true) + Duration::from_nanos(100) < first(false),
            "{:?} {:?}",
            first(true),
            first(false)
        );
    }
}
