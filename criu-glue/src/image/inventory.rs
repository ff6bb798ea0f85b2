//! `inventory.img` of the synthetic parent.

use super::frame;

/// Newer than any dump can be, in microseconds of uptime: criu compares it with when a task was started, to
/// notice a pid that was given to another process since the parent was made. Our parent is made while the very
/// tasks are frozen.
const DUMP_UPTIME: u64 = 1 << 62;
/// `CRTOOLS_IMAGES_V1_1`.
const IMAGE_VERSION: u32 = 2;

#[derive(Clone, PartialEq, prost::Message)]
struct Inventory {
    #[prost(uint32, required, tag = "1")]
    version: u32,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
}

/// The bytes of a parent's `inventory.img`: version and time, nothing else.
pub fn parent() -> Vec<u8> {
    let mut image = frame::begin(&[frame::INVENTORY]);
    frame::push(&mut image, &Inventory { version: IMAGE_VERSION, dump_uptime: Some(DUMP_UPTIME) });
    image
}

#[cfg(test)]
mod tests {
    #[test]
    fn golden() {
        let expected = [
            0x16, 0x31, 0x31, 0x58, 12, 0, 0, 0, 0x08, 2, 0x40, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
            0x80, 0x40,
        ];
        assert_eq!(super::parent()[..], expected[..]);
    }
}
