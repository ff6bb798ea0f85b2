//! Observations as payloads. What seldom changes (names, mappings, which pages exist) is written when it does, as a
//! difference to the frame before; so writer and reader both remember every space.

use super::Header;
use super::fields::{Fields, Malformed, put, put_signed, put_text};
use super::page_runs::{pages, put_pages};
use crate::attach::SpaceKey;
use crate::observation::{ObjectId, Observation, ObservedObject, ObservedRegion, ObservedSpace, RegionKind};
use crate::page_set::PageSet;
use crate::scope::Scope;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

const IS_NEW: u8 = 1;
const IDENTITY: u8 = 2;
const REGIONS: u8 = 4;
const POPULATED: u8 = 8;
const ALL_DIRTY: u8 = 16;
const CONTENTS: u8 = 32;
const KNOWN: u8 = IS_NEW | IDENTITY | REGIONS | POPULATED | ALL_DIRTY | CONTENTS;

/// Of an object; the other flags mean the same as of a space.
const MAPPED_BY: u8 = 4;

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
    objects: HashMap<ObjectId, RememberedObject>,
}

#[derive(Clone, Debug, Default)]
struct Remembered {
    pid: i32,
    name: String,
    regions: Vec<ObservedRegion>,
    populated: PageSet,
}

#[derive(Clone, Debug, Default)]
struct RememberedObject {
    name: String,
    mapped_by: Vec<SpaceKey>,
    populated: PageSet,
}

pub(super) fn put_header(out: &mut Vec<u8>, header: &Header) {
    put(out, header.started_unix_ms);
    put_time(out, header.interval);
    put_signed(out, i64::from(header.root_pid));
    put_text(out, &header.source);
    put_text(out, &header.root_name);
    out.push(match header.scope {
        Scope::Lazy => 0,
        Scope::All => 1,
    });
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
        scope: match version {
            1 => Scope::Lazy,
            _ => match fields.byte()? {
                0 => Scope::Lazy,
                1 => Scope::All,
                _ => return Err(Malformed("its scope is unknown")),
            },
        },
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
        put(out, observation.objects.len() as u64);
        for object in &observation.objects {
            self.put_object(out, object);
        }
        self.keep(observation.objects.iter().map(|object| object.id).collect());
    }

    /// An object that a frame does not have is gone.
    fn keep(&mut self, ids: HashSet<ObjectId>) {
        self.objects.retain(|id, _| ids.contains(id));
    }

    fn put_object(&mut self, out: &mut Vec<u8>, object: &ObservedObject) {
        let known = self.objects.entry(object.id).or_default();
        if object.is_new {
            *known = RememberedObject::default();
        }
        let flags = flag(object.is_new, IS_NEW)
            | flag(known.name != object.name, IDENTITY)
            | flag(known.mapped_by != object.mapped_by, MAPPED_BY)
            | flag(known.populated != object.populated, POPULATED)
            | flag(object.dirty == object.populated, ALL_DIRTY)
            | flag(object.unchanged.is_some(), CONTENTS);
        put(out, u64::from(object.id.device.0));
        put(out, u64::from(object.id.device.1));
        put(out, object.id.inode);
        out.push(flags);
        if flags & IDENTITY != 0 {
            put_text(out, &object.name);
            known.name.clone_from(&object.name);
        }
        if flags & MAPPED_BY != 0 {
            put(out, object.mapped_by.len() as u64);
            object.mapped_by.iter().for_each(|key| put(out, u64::from(key.0)));
            known.mapped_by.clone_from(&object.mapped_by);
        }
        put_sets(out, flags, &mut known.populated, (&object.populated, &object.dirty, &object.unchanged));
    }

    fn put_space(&mut self, out: &mut Vec<u8>, space: &ObservedSpace) {
        let known = self.spaces.entry(space.key).or_default();
        if space.is_new {
            *known = Remembered::default();
        }
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
        put_sets(out, flags, &mut known.populated, (&space.populated, &space.dirty, &space.unchanged));
    }

    pub(super) fn observation(&mut self, payload: &[u8], version: u32) -> Result<Observation, Malformed> {
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
        let mut objects = Vec::new();
        if version >= 2 {
            let mut ids = HashSet::new();
            for _ in 0..fields.count(4)? {
                let object = self.object(&mut fields)?;
                if !ids.insert(object.id) {
                    return Err(Malformed("it has an object twice"));
                }
                objects.push(object);
            }
            self.keep(ids);
        }
        fields.end()?;
        Ok(Observation { at, took, pause, spaces, objects, exited })
    }

    fn object(&mut self, fields: &mut Fields<'_>) -> Result<ObservedObject, Malformed> {
        let mut part =
            || u32::try_from(fields.number()?).map_err(|_| Malformed("a device number is too large"));
        let device = (part()?, part()?);
        let id = ObjectId { device, inode: fields.number()? };
        let flags = fields.byte()?;
        if flags & !KNOWN != 0 {
            return Err(Malformed("an object has a field that is unknown"));
        }
        let is_new = flags & IS_NEW != 0;
        let known = self.objects.entry(id).or_default();
        if is_new {
            *known = RememberedObject::default();
        }
        if flags & IDENTITY != 0 {
            known.name = fields.text()?;
        }
        if flags & MAPPED_BY != 0 {
            known.mapped_by = (0..fields.count(1)?).map(|_| key(fields)).collect::<Result<_, _>>()?;
        }
        let (dirty, unchanged) = sets(fields, flags, &mut known.populated)?;
        let RememberedObject { name, mapped_by, populated } = known.clone();
        Ok(ObservedObject { id, name, is_new, mapped_by, populated, dirty, unchanged })
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
        let (dirty, unchanged) = sets(fields, flags, &mut known.populated)?;
        let Remembered { pid, name, regions, populated } = known.clone();
        Ok(ObservedSpace { key, pid, name, is_new, regions, populated, dirty, unchanged })
    }
}

fn flag(holds: bool, flag: u8) -> u8 {
    if holds { flag } else { 0 }
}

/// What a frame has of pages, at the end of a space and of an object: what has come and what has gone of those that
/// exist, what is dirty, and what of that is unchanged.
fn put_sets(
    out: &mut Vec<u8>,
    flags: u8,
    known: &mut PageSet,
    (populated, dirty, unchanged): (&PageSet, &PageSet, &Option<PageSet>),
) {
    if flags & POPULATED != 0 {
        put_pages(out, &populated.subtract(known));
        put_pages(out, &known.subtract(populated));
        known.clone_from(populated);
    }
    if flags & ALL_DIRTY == 0 {
        put_pages(out, dirty);
    }
    if let Some(unchanged) = unchanged {
        put_pages(out, unchanged);
    }
}

fn sets(
    fields: &mut Fields<'_>,
    flags: u8,
    known: &mut PageSet,
) -> Result<(PageSet, Option<PageSet>), Malformed> {
    if flags & POPULATED != 0 {
        let added = pages(fields)?;
        let removed = pages(fields)?;
        *known = known.subtract(&removed).union(&added);
    }
    let dirty = if flags & ALL_DIRTY != 0 { known.clone() } else { pages(fields)? };
    let unchanged = if flags & CONTENTS != 0 { Some(pages(fields)?) } else { None };
    Ok((dirty, unchanged))
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
