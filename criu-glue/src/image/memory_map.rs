//! `mm-N.img`: the task's memory areas as criu sees them.

use super::frame::{self, Messages};
use super::{ImageError, format};
use crate::image_dir::ImageDir;

const MAP_PRIVATE: u32 = 0x02;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;
/// Status bits of `criu/include/image.h`.
const AREA_VSYSCALL: u32 = 1 << 2;
const AREA_VDSO: u32 = 1 << 3;
const AREA_VVAR: u32 = 1 << 12;
/// Not an area but a note about guard pages inside of others, after all areas.
const AREA_GUARD: u32 = 1 << 16;

/// One memory area of a dumped task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `MAP_*` bits.
    pub flags: u32,
    /// criu's own bits about its kind.
    pub status: u32,
}

impl Area {
    /// criu's own rule for what may be brought in late, through userfaultfd; only such memory may be hidden
    /// from a dump. It must be this rule exactly: the restore registers these areas and no others, and a
    /// hidden page elsewhere would silently be zero.
    pub fn can_be_lazy(&self) -> bool {
        let needed = MAP_PRIVATE | MAP_ANONYMOUS;
        self.flags & needed == needed
            && self.flags & (MAP_LOCKED | MAP_HUGETLB) == 0
            && self.status & (AREA_VDSO | AREA_VVAR | AREA_VSYSCALL) == 0
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct MemoryMessage {
    #[prost(message, repeated, tag = "14")]
    areas: Vec<AreaMessage>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct AreaMessage {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
}

/// The memory areas of a task, ascending. `vpid` is its pid in its own pid namespace.
pub fn areas(images: &ImageDir, vpid: i32) -> Result<Vec<Area>, ImageError> {
    let name = format!("mm-{vpid}.img");
    decode(&super::read(images, &name)?).map_err(format(&name))
}

fn decode(bytes: &[u8]) -> Result<Vec<Area>, super::FormatError> {
    let memory: MemoryMessage = Messages::new(bytes, &[frame::COMMON, frame::MM])?.one("memory map")?;
    let areas: Vec<Area> = memory
        .areas
        .into_iter()
        .filter(|a| a.status & AREA_GUARD == 0)
        .map(|a| Area { start: a.start, end: a.end, flags: a.flags, status: a.status })
        .collect();
    let sound = areas.iter().all(|a| a.start < a.end) && areas.windows(2).all(|w| w[0].end <= w[1].start);
    if !sound {
        return Err(super::FormatError::Value("memory areas that overlap or are out of order".to_owned()));
    }
    Ok(areas)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(flags: u32, status: u32) -> Area {
        Area { start: 0, end: 4096, flags, status }
    }

    #[test]
    fn the_rule() {
        assert!(area(0x22, 0x201).can_be_lazy());
        assert!(area(0x122, 0x203).can_be_lazy());
        for (flags, status) in [
            (0x21, 0x101),
            (0x02, 0x41),
            (0x2022, 0x201),
            (0x4_0022, 0x201),
            (0x22, 0x209),
            (0x22, 0x1201),
            (0x22, 0x204),
        ] {
            assert!(!area(flags, status).can_be_lazy(), "{flags:#x} {status:#x}");
        }
    }

    #[test]
    fn golden() {
        let one = [
            0x08, 0x80, 0x20, 0x10, 0x80, 0x40, 0x18, 0, 0x20, 0, 0x28, 3, 0x30, 0x22, 0x38, 0x81, 4, 0x40, 1,
        ];
        let mm = [&[0x08, 1, 0x72, one.len() as u8][..], &one].concat();
        let mut bytes = frame::begin(&[frame::COMMON, frame::MM]);
        bytes.extend((mm.len() as u32).to_le_bytes());
        bytes.extend(mm);
        assert_eq!(
            decode(&bytes).unwrap(),
            [Area { start: 0x1000, end: 0x2000, flags: 0x22, status: 0x201 }]
        );
        for end in 8..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{end}");
        }
    }
}
