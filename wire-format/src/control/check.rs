//! What has to hold of every message, whoever wrote it.

use super::{AbortCode, ControlMessage, MovingAddress, RegionInfo, SpaceInfo};
use crate::error::DecodeError;
use crate::frame::limit;
use crate::limits::{
    MAX_DETAIL_BYTES, MAX_HOLD_MS, MAX_KEPT_PAGES, MAX_MOVED_ADDRESSES, MAX_NAME_BYTES, MAX_REGIONS,
    MAX_RUNS_PER_FRAME, MAX_SPACES, MAX_STREAMS, MAX_TIMINGS, PAGE_SIZE,
};
use crate::page::{PageRun, SpaceId, check_runs};
use crate::version;

impl ControlMessage {
    /// The same rules before sending and after receiving.
    pub(super) fn validate(&self) -> Result<(), DecodeError> {
        match self {
            Self::Hello(hello) => {
                if hello.versions.oldest > hello.versions.newest {
                    return Err(DecodeError::Invalid("a range of versions that ends before it begins"));
                }
                limit("a version's name", hello.engine.len(), MAX_NAME_BYTES)?;
                limit("a program's name", hello.program.len(), MAX_NAME_BYTES)
            }
            Self::Welcome(welcome) => {
                if !version::is_spoken(welcome.version) {
                    return Err(DecodeError::Version(welcome.version));
                }
                if welcome.streams == 0 {
                    return Err(DecodeError::Invalid("a welcome to no connection"));
                }
                limit("a session's connections", welcome.streams.into(), MAX_STREAMS.into())?;
                limit("a kept store's pages", to_usize(welcome.kept), to_usize(MAX_KEPT_PAGES))?;
                limit("a version's name", welcome.engine.len(), MAX_NAME_BYTES)
            }
            Self::Join { stream, .. } => match *stream {
                0 => Err(DecodeError::Invalid("a further connection under the number of the first")),
                stream => limit("a connection's number", stream.into(), usize::from(MAX_STREAMS) - 1),
            },
            Self::Late { stream, .. } => {
                limit("a late connection's number", (*stream).into(), MAX_STREAMS.into())
            }
            Self::Want { space, runs } | Self::Unwanted { space, runs } => {
                space.check_of_source()?;
                limit("a message's runs", runs.len(), MAX_RUNS_PER_FRAME)?;
                match check_runs(runs)? {
                    0 => Err(DecodeError::Invalid("a message about no page")),
                    _ => Ok(()),
                }
            }
            Self::Taken { space, .. } | Self::LateSeal { space, .. } => space.check_of_source(),
            Self::Again { spaces } => check_again(spaces),
            Self::Spaces { spaces, .. } => {
                limit("a list of spaces", spaces.len(), MAX_SPACES)?;
                spaces.iter().try_for_each(check_space)
            }
            Self::SpaceGone { space } => space.check_of_source(),
            Self::Discard { space, runs } => {
                space.check_of_source()?;
                limit("a message's runs", runs.len(), MAX_RUNS_PER_FRAME)?;
                check_runs(runs).map(|_| ())
            }
            Self::SpaceSeal { space, regions, .. } => {
                space.check_of_source()?;
                limit("a space's regions", regions.len(), MAX_REGIONS)?;
                check_regions(regions)
            }
            Self::Ready { timings, .. } | Self::Resumed { timings, .. } => {
                limit("a list of timings", timings.len(), MAX_TIMINGS)
            }
            Self::Prepared { timings } => {
                limit("a list of timings", timings.len(), MAX_TIMINGS)?;
                let twice = |n: usize| timings[..n].iter().any(|(one, _)| *one == timings[n].0);
                match (0..timings.len()).any(twice) {
                    true => Err(DecodeError::Invalid("a preparation that was made twice")),
                    false => Ok(()),
                }
            }
            Self::Abort { code, detail } => {
                if AbortCode::from_number(code.number()) != *code {
                    return Err(DecodeError::Invalid("a known code under the name of an unknown one"));
                }
                limit("an abort's text", detail.len(), MAX_DETAIL_BYTES)
            }
            Self::Hold { ms } => limit("a session's hold", to_usize(*ms), to_usize(MAX_HOLD_MS)),
            Self::Standing { info, .. } => check_space(info),
            Self::Network { addresses, .. } => check_addresses(addresses),
            Self::RoundEnd { .. }
            | Self::RoundAck { .. }
            | Self::SealEnd { .. }
            | Self::Sealed { .. }
            | Self::ImagesEnd { .. }
            | Self::Commit
            | Self::Filled { .. }
            | Self::Query { .. }
            | Self::State(_)
            | Self::Joined
            | Self::Unsealed
            | Self::TakeUp
            | Self::TakenUp { .. }
            | Self::LateSealEnd { .. }
            | Self::LateSealed { .. }
            | Self::FaultTimes { .. }
            | Self::NetworkReady
            | Self::Announce
            | Self::Announced { .. }
            | Self::Delivered { .. }
            | Self::Rejoin { .. }
            | Self::Rejoined
            | Self::StandingEnd { .. }
            | Self::Stands { .. }
            | Self::Ping { .. } => Ok(()),
        }
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn check_space(info: &SpaceInfo) -> Result<(), DecodeError> {
    info.space.check_of_source()?;
    limit("a program's name", info.name.len(), MAX_NAME_BYTES)
}

/// Each address comes once, with a network that it can have and a device that could be.
fn check_addresses(addresses: &[MovingAddress]) -> Result<(), DecodeError> {
    limit("a list of addresses", addresses.len(), MAX_MOVED_ADDRESSES)?;
    for (n, moving) in addresses.iter().enumerate() {
        let most = if moving.address.is_ipv4() { 32 } else { 128 };
        if !(1..=most).contains(&moving.prefix) {
            return Err(DecodeError::Invalid("an address in a network that it cannot have"));
        }
        if addresses[..n].iter().any(|other| other.address == moving.address) {
            return Err(DecodeError::Invalid("an address that moves twice"));
        }
        if let Some(device) = &moving.device {
            limit("a device's name", device.len(), MAX_NAME_BYTES)?;
        }
    }
    Ok(())
}

/// Something is asked for, there is one way to ask for it, and the answer can be bounded.
fn check_again(spaces: &[(SpaceId, Vec<PageRun>)]) -> Result<(), DecodeError> {
    limit("a list of spaces", spaces.len(), MAX_SPACES)?;
    limit("a message's runs", spaces.iter().map(|(_, runs)| runs.len()).sum(), MAX_RUNS_PER_FRAME)?;
    if spaces.is_empty() || spaces.iter().any(|(_, runs)| runs.is_empty()) {
        return Err(DecodeError::Invalid("a request for no page"));
    }
    if !spaces.is_sorted_by(|(before, _), (after, _)| before < after) {
        return Err(DecodeError::Invalid("spaces that are out of order or come twice"));
    }
    spaces.iter().try_for_each(|(space, runs)| {
        space.check_of_source()?;
        check_runs(runs).map(|_| ())
    })
}

/// Regions are whole pages, ascending, and apart from or next to each other: as the kernel lists them.
fn check_regions(regions: &[RegionInfo]) -> Result<(), DecodeError> {
    let mut end = 0;
    for region in regions {
        if region.start >= region.end {
            return Err(DecodeError::Invalid("a region that ends before it begins"));
        }
        if region.start % PAGE_SIZE as u64 != 0 || region.end % PAGE_SIZE as u64 != 0 {
            return Err(DecodeError::Invalid("a region that is not of whole pages"));
        }
        if region.start < end {
            return Err(DecodeError::Invalid("regions that overlap or are not in order"));
        }
        end = region.end;
    }
    Ok(())
}
