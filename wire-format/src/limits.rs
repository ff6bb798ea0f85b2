//! Every limit of the protocol, each with its reason. Checked before anything is allocated, on both sides.

use crate::{sources, varint};

/// Bytes of a page. Larger translation granules are sent as several of these.
pub const PAGE_SIZE: usize = 4096;

/// Page numbers are below this: 57-bit virtual addresses (5-level paging) have 45-bit page numbers, and the
/// sum of two of them never overflows.
pub const MAX_PAGE_NO: u64 = 1 << 52;

/// Pages of one batch: 1 MiB. Larger batches gain nothing on the link and fall out of a core's cache.
pub const MAX_BATCH_PAGES: usize = 256;

/// Pages of a store that the destination kept, which name themselves with their digests when a session begins: 1 TiB of
/// memory, in 4 GiB of digests, which is what the source takes for them at most.
pub const MAX_KEPT_PAGES: u64 = 1 << 28;

/// Connections of a session. Each takes a thread and buffers of some batches on both sides; more than there are
/// cores gain nothing.
pub const MAX_STREAMS: u16 = 256;

/// Addresses that move with a program: a service has a handful.
pub const MAX_MOVED_ADDRESSES: usize = 64;

/// zstd's window, as the logarithm of bytes, in a payload of pages: as long as the longest batch and the bases it is
/// coded on top of. A frame that asks for more is refused, whatever its content.
pub const MAX_ZSTD_WINDOW_LOG: u32 = 21;

/// Bytes of any frame's head. Each kind has a limit of its own below this one.
pub const MAX_HEAD_BYTES: usize = 4 << 20;

/// Bytes of the head of a page batch: what 256 pages have that are coded on top of others, none of them neighbours, none of
/// them zero, and each on top of a page at another distance in another space.
pub const MAX_BATCH_HEAD: usize = 16
    + MAX_BATCH_PAGES * (varint::MAX_PAGE_BYTES + 1)
    + MAX_BATCH_PAGES.div_ceil(8)
    + (MAX_BATCH_PAGES + 1) * 16
    + MAX_BATCH_PAGES * sources::MAX_RUN_BYTES;

/// Bytes of the head of a piece of an image: its place, its digest, and the longest name.
pub const MAX_IMAGE_HEAD: usize = 26 + MAX_IMAGE_NAME;

/// Bytes of the head of a packed piece of an image: how long the piece is, too.
pub const MAX_PACKED_IMAGE_HEAD: usize = MAX_IMAGE_HEAD + 4;

/// Bytes of the head of a list of owned pages: the longest list of runs.
pub const MAX_OWNED_HEAD: usize = 12 + MAX_RUNS_PER_FRAME * 16;

/// Bytes of the head of a list of digests: the longest list of runs, and the longest of digests.
pub const MAX_DIGESTS_HEAD: usize = MAX_OWNED_HEAD + MAX_DIGESTS_PER_FRAME * 16;

/// Bytes of a frame's payload: a whole raw batch. One that compression makes longer is sent raw.
pub const MAX_PAYLOAD_BYTES: usize = MAX_BATCH_PAGES * PAGE_SIZE;

/// Bytes of an image file in one frame, unpacked: as much as a batch of pages has.
pub const MAX_IMAGE_CHUNK: usize = 1 << 20;

/// Bytes of the name of an image file (as file systems have it).
pub const MAX_IMAGE_NAME: usize = 255;

/// Page runs in one frame of owned, discarded or wanted pages, or of digests.
pub const MAX_RUNS_PER_FRAME: usize = 65_536;

/// Page runs that the engine can own in one space: every second page of 64 GiB.
pub const MAX_OWNED_RUNS: usize = 8 << 20;

/// Digests in one frame: 1 MiB of them, for 256 MiB of memory.
pub const MAX_DIGESTS_PER_FRAME: usize = 65_536;

/// Bytes of a control message. The largest is a seal with the regions of a large process.
pub const MAX_CONTROL_BYTES: usize = MAX_HEAD_BYTES;

/// Regions of one space: the kernel's default limit (vm.max_map_count) is 65 530; some raise it. As many as these
/// fit into a control message.
pub const MAX_REGIONS: usize = 100_000;

/// Spaces that one message announces.
pub const MAX_SPACES: usize = 4096;

/// Bytes of the text of an abort: some lines of CRIU's log.
pub const MAX_DETAIL_BYTES: usize = 4096;

/// Bytes of a name (program, version).
pub const MAX_NAME_BYTES: usize = 256;

/// Milliseconds for which a session without connections is held: an hour, in which the destination takes no other.
pub const MAX_HOLD_MS: u64 = 3_600_000;

/// Named durations in one message.
pub const MAX_TIMINGS: usize = 64;

const _: () = assert!(MAX_IMAGE_CHUNK <= MAX_PAYLOAD_BYTES);
const _: () = assert!(2 * MAX_PAYLOAD_BYTES == 1 << MAX_ZSTD_WINDOW_LOG);
const _: () = assert!(MAX_BATCH_HEAD <= MAX_HEAD_BYTES && MAX_DIGESTS_HEAD <= MAX_HEAD_BYTES);
