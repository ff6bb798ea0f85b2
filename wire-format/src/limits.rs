//! Every limit of the protocol, each with its reason. Checked before anything is allocated, on both sides.

/// Bytes of a page. Larger translation granules are sent as several of these.
pub const PAGE_SIZE: usize = 4096;

/// Page numbers are below this: 57-bit virtual addresses (5-level paging) have 45-bit page numbers, and the
/// sum of two of them never overflows.
pub const MAX_PAGE_NO: u64 = 1 << 52;

/// Pages of one batch: 1 MiB. Larger batches gain nothing on the link and fall out of a core's cache.
pub const MAX_BATCH_PAGES: usize = 256;

/// Bytes of a frame's head: a batch of 256 single pages has about 9 KiB, the rest is room for long lists.
pub const MAX_HEAD_BYTES: usize = 4 << 20;

/// Bytes of a frame's payload: a whole raw batch, or the most that zstd makes of it.
pub const MAX_PAYLOAD_BYTES: usize = (MAX_BATCH_PAGES * PAGE_SIZE) + (64 << 10);

/// Bytes of an image file in one frame.
pub const MAX_IMAGE_CHUNK: usize = 1 << 20;

/// Bytes of the name of an image file (as file systems have it).
pub const MAX_IMAGE_NAME: usize = 255;

/// Page runs in one frame of owned or discarded pages, or of digests.
pub const MAX_RUNS_PER_FRAME: usize = 65_536;

/// Page runs that the engine can own in one space: every second page of 64 GiB.
pub const MAX_OWNED_RUNS: usize = 8 << 20;

/// Digests in one frame: 1 MiB of them, for 256 MiB of memory.
pub const MAX_DIGESTS_PER_FRAME: usize = 65_536;

/// Bytes of a control message. The largest is a seal with the regions of a large process.
pub const MAX_CONTROL_BYTES: usize = MAX_HEAD_BYTES;

/// Regions of one space: the kernel's default limit (vm.max_map_count) is 65 530; some raise it.
pub const MAX_REGIONS: usize = 100_000;

/// Spaces that one message announces.
pub const MAX_SPACES: usize = 4096;

/// Bytes of the text of an abort: some lines of CRIU's log.
pub const MAX_DETAIL_BYTES: usize = 4096;

/// Bytes of a name (program, version).
pub const MAX_NAME_BYTES: usize = 256;

/// Named durations in one message.
pub const MAX_TIMINGS: usize = 64;
