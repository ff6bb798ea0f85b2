//! Observations as payloads. What seldom changes (names, mappings, which pages exist) is written when it does, as a
//! difference to the frame before; so writer and reader both remember every space.

use super::Header;
use super::fields::{Fields, Malformed, put, put_signed, put_text};
use super::page_runs::{pages, put_pages};
use crate::attach::SpaceKey;
use crate::observation::{Observation, ObservedRegion, ObservedSpace, RegionKind};
use crate::page_set::PageSet;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

const IS_NEW: u8 = 1;
const IDENTITY: u8 = 2;
const REGIONS: u8 = 4;
const POPULATED: u8 = 8;
const ALL_DIRTY: u8 = 16;
const CONTENTS: u8 = 32;
const KNOWN: u8 = IS_NEW | IDENTITY | REGIONS | POPULATED | ALL_DIRTY | CONTENTS;

const KINDS: [RegionKind; 6] = [
    RegionKind::Heap,
    RegionKind::Stack,
    RegionKind::Anonymous,
    RegionKind::FilePrivate,
    RegionKind::Shared,
    RegionKind::Other,
];

/// The spaces as the last frame left them.
#[derive(Debug, Default)]
pub(super) struct Memory {
    spaces: HashMap<SpaceKey, Remembered>,
}

#[derive(Clone, Debug, Default)]
struct Remembered {
    pid: i32,
    name: String,
    regions: Vec<ObservedRegion>,
    populated: PageSet,
}

pub(super) fn put_header(out: &mut Vec<u8>, header: &Header) {
    put(out, header.started_unix_ms);
    put_time(out, header.interval);
    put_signed(out, i64::from(header.root_pid));
    put_text(out, &header.source);
    put_text(out, &header.root_name);
}

pub(super) fn header(payload: &[u8], version: u32) -> Result<Header, Malformed> {
    let mut fields = Fields(payload);
    let header = Header {
        version,
        started_unix_ms: fields.number()?,
        interval: time(&mut fields)?,
        root_pid: pid(&mut fields)?,
        source: fields.text()?,
        root_name: fields.text()?,
    };
    fields.end()?;
    Ok(header)
}

impl Memory {
    pub(super) fn put(&mut self, out: &mut Vec<u8>, observation: &Observation) {
        put_time(out, observation.at);
        put_time(out, observation.took);
        put_time(out, observation.pause);
        put(out, observation.exited.len() as u64);
        for key in &observation.exited {
            put(out, u64::from(key.0));
            self.spaces.remove(key);
        }
        put(out, observation.spaces.len() as u64);
        for space in &observation.spaces {
            self.put_space(out, space);
        }
    }

    fn put_space(&mut self, out: &mut Vec<u8>, space: &ObservedSpace) {
        let known = self.spaces.entry(space.key).or_default();
        if space.is_new {
            *known = Remembered::default();
        }
        let flag = |holds: bool, flag: u8| if holds { flag } else { 0 };
        let flags = flag(space.is_new, IS_NEW)
            | flag(known.pid != space.pid || known.name != space.name, IDENTITY)
            | flag(known.regions != space.regions, REGIONS)
            | flag(known.populated != space.populated, POPULATED)
            | flag(space.dirty == space.populated, ALL_DIRTY)
            | flag(space.unchanged.is_some(), CONTENTS);
        put(out, u64::from(space.key.0));
        out.push(flags);
        if flags & IDENTITY != 0 {
            put_signed(out, i64::from(space.pid));
            put_text(out, &space.name);
            (known.pid, known.name) = (space.pid, space.name.clone());
        }
        if flags & REGIONS != 0 {
            put_regions(out, &known.regions, &space.regions);
            known.regions.clone_from(&space.regions);
        }
        if flags & POPULATED != 0 {
            put_pages(out, &space.populated.subtract(&known.populated));
            put_pages(out, &known.populated.subtract(&space.populated));
            known.populated.clone_from(&space.populated);
        }
        if flags & ALL_DIRTY == 0 {
            put_pages(out, &space.dirty);
        }
        if let Some(unchanged) = &space.unchanged {
            put_pages(out, unchanged);
        }
    }

    pub(super) fn observation(&mut self, payload: &[u8]) -> Result<Observation, Malformed> {
        let mut fields = Fields(payload);
        let (at, took, pause) = (time(&mut fields)?, time(&mut fields)?, time(&mut fields)?);
        let mut exited = Vec::new();
        for _ in 0..fields.count(1)? {
            let key = key(&mut fields)?;
            self.spaces.remove(&key);
            exited.push(key);
        }
        let mut spaces = Vec::new();
        let mut keys = HashSet::new();
        for _ in 0..fields.count(2)? {
            let space = self.space(&mut fields)?;
            // Each time it would be copied anew: few bytes, much memory.
            if !keys.insert(space.key) {
                return Err(Malformed("it has a space twice"));
            }
            spaces.push(space);
        }
        fields.end()?;
        Ok(Observation { at, took, pause, spaces, exited })
    }

    fn space(&mut self, fields: &mut Fields<'_>) -> Result<ObservedSpace, Malformed> {
        let key = key(fields)?;
        let flags = fields.byte()?;
        if flags & !KNOWN != 0 {
            return Err(Malformed("a space has a field that is unknown"));
        }
        let is_new = flags & IS_NEW != 0;
        let known = self.spaces.entry(key).or_default();
        if is_new {
            *known = Remembered::default();
        }
        if flags & IDENTITY != 0 {
            (known.pid, known.name) = (pid(fields)?, fields.text()?);
        }
        if flags & REGIONS != 0 {
            known.regions = regions(fields, &known.regions)?;
        }
        if flags & POPULATED != 0 {
            let added = pages(fields)?;
            let removed = pages(fields)?;
            known.populated = known.populated.subtract(&removed).union(&added);
        }
        let dirty = if flags & ALL_DIRTY != 0 { known.populated.clone() } else { pages(fields)? };
        let unchanged = if flags & CONTENTS != 0 { Some(pages(fields)?) } else { None };
        let Remembered { pid, name, regions, populated } = known.clone();
        Ok(ObservedSpace { key, pid, name, is_new, regions, populated, dirty, unchanged })
    }
}

/// How many regions stay at the front and at the end, and those between.
fn put_regions(out: &mut Vec<u8>, before: &[ObservedRegion], now: &[ObservedRegion]) {
    let front = before.iter().zip(now).take_while(|(a, b)| a == b).count();
    let pairs = before[front..].iter().rev().zip(now[front..].iter().rev());
    let back = pairs.take_while(|(a, b)| a == b).count();
    let between = &now[front..now.len() - back];
    put(out, front as u64);
    put(out, back as u64);
    put(out, between.len() as u64);
    let mut end = front.checked_sub(1).map_or(0, |last| now[last].end);
    for region in between {
        put_signed(out, region.start.wrapping_sub(end) as i64);
        put_signed(out, region.end.wrapping_sub(region.start) as i64);
        out.push(KINDS.iter().position(|kind| *kind == region.kind).unwrap_or(KINDS.len()) as u8);
        put_text(out, &region.name);
        end = region.end;
    }
}

fn regions(fields: &mut Fields<'_>, before: &[ObservedRegion]) -> Result<Vec<ObservedRegion>, Malformed> {
    let missing = || Malformed("it keeps mappings that there are not");
    let (front, back) = (fields.number()?, fields.number()?);
    if front.checked_add(back).is_none_or(|kept| kept > before.len() as u64) {
        return Err(missing());
    }
    let (front, back) = (&before[..front as usize], &before[before.len() - back as usize..]);
    let mut regions = front.to_vec();
    let mut end = front.last().map_or(0, |last| last.end);
    for _ in 0..fields.count(4)? {
        let start = end.wrapping_add(fields.signed()? as u64);
        end = start.wrapping_add(fields.signed()? as u64);
        let kind =
            *KINDS.get(usize::from(fields.byte()?)).ok_or(Malformed("a mapping is of an unknown kind"))?;
        regions.push(ObservedRegion { start, end, kind, name: fields.text()? });
    }
    regions.extend_from_slice(back);
    Ok(regions)
}

fn put_time(out: &mut Vec<u8>, time: Duration) {
    put(out, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}

fn time(fields: &mut Fields<'_>) -> Result<Duration, Malformed> {
    Ok(Duration::from_nanos(fields.number()?))
}

fn pid(fields: &mut Fields<'_>) -> Result<i32, Malformed> {
    i32::try_from(fields.signed()?).map_err(|_| Malformed("a process id is too large"))
}

fn key(fields: &mut Fields<'_>) -> Result<SpaceKey, Malformed> {
    let key = u32::try_from(fields.number()?).map_err(|_| Malformed("the key of a space is too large"))?;
    Ok(SpaceKey(key))
}
