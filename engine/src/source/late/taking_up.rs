//! Going on after the connections were lost: what the destination has, and whether that is what is here.

use super::{Debt, DebtSpace, PAGE};
use crate::link::{Channel, ChannelError, Incoming};
use crate::page_bits::PageBits;
use crate::policy::Bubbling;
use crate::source::failure::SendError;
use pageferry_tracker::{PageSet, Run};
use pageferry_wire_format::digest::SpaceDigest;
use pageferry_wire_format::{ControlMessage, PageRun, SpaceId};
use std::collections::BTreeMap;

/// Pages that are read at a time.
const STEP: u64 = 256;

/// What the destination says of one space.
#[derive(Debug, Default)]
struct Standing {
    owed: PageSet,
    unwanted: PageSet,
    came: Option<(u64, SpaceDigest)>,
}

/// What has come late of each space, and what the destination thinks of it.
#[derive(Debug)]
pub(super) struct Taken(BTreeMap<SpaceId, (PageSet, u64, SpaceDigest)>);

/// Asks what is still owed, and has the debt go on from there.
pub(super) fn take_up(debt: &Debt, channel: &mut Channel) -> Result<Taken, SendError> {
    channel.control(&ControlMessage::TakeUp)?;
    let mut standing: BTreeMap<SpaceId, Standing> =
        debt.spaces.keys().map(|space| (*space, Standing::default())).collect();
    let unknown = |space: SpaceId| SendError::Protocol(format!("owed pages of space {}", space.0));
    let add =
        |set: &mut PageSet, runs: &[PageRun]| runs.iter().for_each(|run| set.insert(run.start.0, run.len));
    loop {
        match channel.receive()? {
            Incoming::Owed(batch) => {
                let space = standing.get_mut(&batch.space).ok_or_else(|| unknown(batch.space))?;
                add(&mut space.owed, &batch.runs);
            }
            Incoming::Control(ControlMessage::Unwanted { space, runs }) => {
                add(&mut standing.get_mut(&space).ok_or_else(|| unknown(space))?.unwanted, &runs);
            }
            Incoming::Control(ControlMessage::Taken { space, pages, digest, .. }) => {
                standing.get_mut(&space).ok_or_else(|| unknown(space))?.came = Some((pages, digest));
            }
            Incoming::Control(ControlMessage::TakenUp { .. }) => break,
            Incoming::Control(ControlMessage::Ping { .. }) => {}
            Incoming::Control(ControlMessage::Abort { code, detail }) => {
                return Err(ChannelError::Aborted { code, detail }.into());
            }
            other => return Err(SendError::Protocol(format!("{other:?} instead of what is owed"))),
        }
    }
    let (mut owed, mut taken) = (BTreeMap::new(), BTreeMap::new());
    for (id, space) in standing {
        let all = &debt.spaces[&id].owed;
        let came = all.subtract(&space.owed).subtract(&space.unwanted);
        let said = space.came.filter(|(pages, _)| *pages == came.len());
        let (Some((pages, digest)), true) = (said, space.owed.subtract(all).is_empty()) else {
            return Err(SendError::Protocol(format!(
                "another account of the owed pages of space {} than {} that it had",
                id.0,
                all.len()
            )));
        };
        owed.insert(id, space.owed.runs().iter().copied().collect::<PageBits>());
        taken.insert(id, (came, pages, digest));
    }
    debt.begin_anew(Bubbling::new(owed));
    Ok(Taken(taken))
}

/// Compares what has come with what stands still here, and counts it in.
pub(super) fn recount(debt: &Debt, taken: &Taken) -> Result<(), SendError> {
    let mut earlier = BTreeMap::new();
    let (mut bytes, mut pages) = (Vec::new(), Vec::new());
    for (id, (came, count, digest)) in &taken.0 {
        let mut here = SpaceDigest::default();
        for run in came.runs() {
            for start in (run.start..run.end()).step_by(STEP as usize) {
                let run = Run { start, len: STEP.min(run.end() - start) };
                debt.read(*id, &[run], &mut bytes, &mut pages)?;
                for (page, _, content) in &pages {
                    here.insert(pageferry_wire_format::PageNo(*page), content);
                }
            }
            if debt.stopped() {
                return Ok(());
            }
        }
        if here != *digest {
            let DebtSpace { pid, .. } = &debt.spaces[id];
            return Err(SendError::LateDiffers { pid: *pid, pages: *count });
        }
        earlier.insert(*id, (*count, here));
    }
    debug_assert!(bytes.len().is_multiple_of(PAGE));
    debt.recounted(&earlier);
    Ok(())
}
