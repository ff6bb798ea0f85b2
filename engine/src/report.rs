//! The report of a migration: what was sent, how long the program stood still, and why it ended.
//! The JSON schema is documented in docs/REPORT.md.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Version of the JSON schema; grows when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 2;

/// A whole migration as its source saw it. Times are microseconds, sizes bytes, pages 4 KiB.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MigrationReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of the engine.
    pub version: String,
    /// Random identity of the session, hexadecimal.
    pub session: String,
    /// Root process at the source.
    pub pid: i32,
    /// Name of the program.
    pub program: String,
    /// Processes that moved.
    pub processes: u32,
    /// Address of the receiver, or `file:PATH`, or `dir:PATH`.
    pub to: String,
    /// `stop-and-copy`, `pre-copy`, `post-copy`, `hybrid`, or `checkpoint` into a file: of `auto`, what was chosen, and `auto` when
    /// nothing was chosen before it failed.
    pub strategy: String,
    /// What was asked for: one of these, or `auto`.
    #[serde(default)]
    pub strategy_asked: String,
    /// Why it was chosen, as a word ([`crate::policy::reasons::Reason::name`]); empty if it was asked for.
    #[serde(default)]
    pub strategy_reason: String,
    /// The same as a sentence with its figures.
    #[serde(default)]
    pub strategy_because: String,
    /// `userfaultfd`, `soft-dirty-scan`, `soft-dirty` or `compare`.
    pub tracker: String,
    /// Why that tracker.
    pub tracker_reason: String,
    /// How CRIU was kept from the engine's pages: `shim` or `synthetic-parent`.
    pub hide: String,
    /// Why that way.
    pub hide_reason: String,
    /// Version of CRIU at the source.
    pub criu: String,
    /// Kernel release of the source.
    pub kernel: String,
    /// What happened to established TCP connections: `none` (there were none, or the program would have been refused), `closed`
    /// (clients have to reconnect) or `kept`.
    pub tcp: String,
    /// Memory that the engine carried (pages that the destination holds when the tree is frozen).
    pub memory_bytes: u64,
    /// Every pre-copy round, and last the one in the freeze.
    pub rounds: Vec<RoundReport>,
    /// Bytes on the wire from first to last.
    pub bytes_sent: u64,
    /// Connections that pages went over.
    pub streams: u32,
    /// Pages that the destination asked for again, because it could not make them of what it was sent.
    pub repeated_pages: u64,
    /// Pages that the destination had kept from before, and offered.
    pub kept_pages: u64,
    /// Bytes of CRIU's images on the wire, where some of them are packed.
    pub image_bytes: u64,
    /// Bytes of the files that they are.
    #[serde(default)]
    pub image_file_bytes: u64,
    /// From the start of `send` until the program ran at the destination.
    pub total_us: u64,
    /// From the start of `send` until every page was in place at the destination; 0 if that did not happen.
    #[serde(default)]
    pub complete_us: u64,
    /// How long the program stood still.
    pub downtime_us: Downtime,
    /// What was done for the freeze before it, and so is no part of the downtime.
    #[serde(default)]
    pub prepared_us: Prepared,
    /// How long it was to stand still at most.
    #[serde(default)]
    pub downtime_goal_us: u64,
    /// Whether it did not stand still for longer; absent unless completed.
    #[serde(default)]
    pub downtime_goal_met: Option<bool>,
    /// How long the whole was to take at most, to compare with `complete_us`; absent if nobody cared.
    #[serde(default)]
    pub total_time_goal_us: Option<u64>,
    /// Whether it did not take longer.
    #[serde(default)]
    pub total_time_goal_met: Option<bool>,
    /// Share of its running time that the program lost to the rounds (docs/DESIGN.md); absent if the kernel does not tell, or there were
    /// none.
    #[serde(default)]
    pub slowdown: Option<f64>,
    /// How much that was to be at most; absent if nobody cared.
    #[serde(default)]
    pub max_slowdown: Option<f64>,
    /// Whether it was not more.
    #[serde(default)]
    pub max_slowdown_met: Option<bool>,
    /// Share of the time for which the program was made to stand still in the end, because it outran the link; 0 if it was not.
    #[serde(default)]
    pub throttle_share: f64,
    /// How long it stood still for that altogether, before the freeze.
    #[serde(default)]
    pub throttled_us: u64,
    /// How long the migration was held up by hand, before the freeze.
    #[serde(default)]
    pub paused_us: u64,
    /// How often the link was lost in the rounds, and waited for.
    #[serde(default)]
    pub interruptions: u32,
    /// How long it was away altogether, as the source has noticed it.
    #[serde(default)]
    pub interrupted_us: u64,
    /// What the policy expected the downtime to be when it ended pre-copy.
    pub predicted_downtime_us: u64,
    /// Why pre-copy ended: `target-met`, `no-progress`, `max-rounds`, `total-time`, `post-copy`, `stop-and-copy`.
    pub stop_reason: String,
    /// Whether the whole restored memory was compared with the frozen source before the commit.
    pub verified: bool,
    /// Pages that this comparison covered.
    pub verified_pages: u64,
    /// `completed`, `rolled-back`, `interrupted`, `refused` or `in-doubt`.
    pub outcome: String,
    /// Why it is not `completed`.
    pub error: Option<String>,
    /// Pid at the destination.
    pub destination_pid: Option<i32>,
    /// How the rest of the pages got in place after the program ran again.
    pub fill: Option<FillReport>,
    /// Pages that came to the destination only after the program ran there; absent if there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
    /// What moved of the network, and what it cost; absent if nothing did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkReport>,
    /// Largest resident size of the sending engine.
    pub engine_peak_rss_bytes: u64,
    /// How much memory it was to take for itself at most; absent if nobody cared.
    #[serde(default)]
    pub engine_memory_bytes: Option<u64>,
    /// What the delta cache might take of it in the last round.
    #[serde(default)]
    pub delta_cache_bytes: u64,
}

/// One round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// From 0; the last one ran while the tree was frozen.
    pub round: u32,
    /// Whether the tree was frozen.
    pub frozen: bool,
    /// Pages that had to be looked at: dirty, or never given to the destination.
    pub dirty_pages: u64,
    /// Pages that were given to the destination, by whatever coding, and are not zeros.
    pub sent_pages: u64,
    /// Pages that were dirty but have the content that the destination already has.
    pub unchanged_pages: u64,
    /// Pages of zeros (sent as a bit).
    pub zero_pages: u64,
    /// Pages that went away (unmapped, or given back).
    pub gone_pages: u64,
    /// Pages that were dirty, and held back until the freeze because they are written all the time.
    pub held_pages: u64,
    /// Pages that had to be looked at, and were left for the next round: this one was a sample.
    #[serde(default)]
    pub left_pages: u64,
    /// Pages that were written again before their turn came, as many of their neighbours were, and were left for the next round:
    /// sent now, they would have been sent twice.
    #[serde(default)]
    pub ahead_pages: u64,
    /// How many pages, and how many bytes, went by each coding.
    pub codings: Codings,
    /// Share of its running time that the program lost from the scan of this round to the next; not known yet when the round ends.
    #[serde(default)]
    pub slowdown: Option<f64>,
    /// Share of the sending threads' time for which they, or what they had sent, were held up by others than processors: by the link, the
    /// limit on it, or the share of a processor that they may take. Near 1 the link decides how long the round takes, near 0 the
    /// processors of either side do. Absent if the kernel does not tell.
    #[serde(default)]
    pub held_up: Option<f64>,
    /// Bytes on the wire, frames included.
    pub sent_bytes: u64,
    /// From the scan until the destination acknowledged.
    pub duration_us: u64,
    /// How long the tree stood still for the scan (soft-dirty), or 0.
    pub pause_us: u64,
    /// Pages that became dirty per second while the round before this one ran.
    pub dirty_rate: f64,
    /// Bytes a second that went over the link.
    pub link_rate: f64,
    /// Downtime that the policy expected after this round.
    pub predicted_downtime_us: u64,
}

/// Pages and bytes that went by one coding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Pages.
    pub pages: u64,
    /// Bytes on the wire, heads of frames included. Zero pages are marks in the frames of others.
    pub bytes: u64,
}

/// How the pages of a round travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Codings {
    /// Not at all: the destination had them as they were.
    pub unchanged: Share,
    /// As a mark that they are zeros.
    pub zero: Share,
    /// As the name of another page that the destination held, with the same content.
    pub copy: Share,
    /// As what differed from what was sent of them before.
    pub delta: Share,
    /// By zstd, on top of what was sent of them before.
    pub zstd_on_base: Share,
    /// By zstd.
    pub zstd: Share,
    /// As they were.
    pub raw: Share,
}

impl RoundReport {
    /// Bytes of its pages on the wire, heads of frames included, and nothing that went beside them.
    pub fn codings_bytes(&self) -> u64 {
        self.codings.shares().iter().map(|(_, share)| share.bytes).sum()
    }
}

impl Codings {
    /// Name and count of every coding, from the one that costs the link least.
    pub fn shares(&self) -> [(&'static str, Share); 7] {
        [
            ("unchanged", self.unchanged),
            ("zero", self.zero),
            ("copy", self.copy),
            ("delta", self.delta),
            ("zstd on base", self.zstd_on_base),
            ("zstd", self.zstd),
            ("raw", self.raw),
        ]
    }

    /// Adds what another part of the same round counted.
    pub fn add(&mut self, other: &Codings) {
        let pairs = [
            (&mut self.unchanged, other.unchanged),
            (&mut self.zero, other.zero),
            (&mut self.copy, other.copy),
            (&mut self.delta, other.delta),
            (&mut self.zstd_on_base, other.zstd_on_base),
            (&mut self.zstd, other.zstd),
            (&mut self.raw, other.raw),
        ];
        for (share, more) in pairs {
            share.pages += more.pages;
            share.bytes += more.bytes;
        }
    }
}

/// Downtime: from just before the source is told to stop until the source hears that the program runs at the
/// destination, on the source's monotonic clock. `total` is the sum of the parts by construction: each part
/// ends where the next begins.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Downtime {
    /// Sum of the parts.
    pub total: u64,
    /// CRIU stops every task of the tree.
    pub freeze: u64,
    /// The last dirty pages are found.
    pub collect: u64,
    /// They are read and sent.
    pub last_pages: u64,
    /// The destination confirms that it holds exactly the memory of the frozen tree.
    pub seal: u64,
    /// CRIU writes everything that is not the engine's.
    pub dump: u64,
    /// The images go over the link.
    pub images: u64,
    /// The destination restores, and compares if asked to, until it is ready to run.
    pub restore: u64,
    /// What was left, after all that, of comparing the flags of memory areas that were read before the freeze with
    /// what they are inside it. Zero where there was nothing to compare.
    pub confirm: u64,
    /// Commit: the source is held for good, the destination lets the program run and says so.
    pub commit: u64,
    /// What the destination did inside `restore` and `commit`, on its own clock.
    pub destination: Vec<TimedPart>,
}

impl Downtime {
    /// Name and length of every part, in order.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("freeze", self.freeze),
            ("collect", self.collect),
            ("last pages", self.last_pages),
            ("seal", self.seal),
            ("dump", self.dump),
            ("images", self.images),
            ("restore", self.restore),
            ("confirm", self.confirm),
            ("commit", self.commit),
        ]
    }

    /// Makes `total` what it is defined to be.
    pub fn add_up(&mut self) {
        self.total = self.parts().iter().map(|(_, us)| us).sum();
    }

    /// The whole as a duration.
    pub fn total(&self) -> Duration {
        Duration::from_micros(self.total)
    }
}

/// What both sides did for the freeze while the program still ran; the rounds are not among it. Each side times its own, by its own
/// clock, up to when the program was about to be stopped. The two sides, and threads of the destination, work side by side: `total` is
/// work that was taken out of the downtime, and not a stretch of time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Prepared {
    /// Sum of all parts of both sides.
    pub total: u64,
    /// Parts of the source, in order: each begins when the one before is over.
    pub source: Vec<TimedPart>,
    /// Parts of the destination; empty where there is none, or an older one.
    pub destination: Vec<TimedPart>,
}

impl Prepared {
    /// Makes `total` what it is defined to be.
    pub fn add_up(&mut self) {
        self.total = self.source.iter().chain(&self.destination).map(|part| part.us).sum();
    }

    /// What was done at both sides or either, in order, and how long each side took for it.
    pub fn parts(&self) -> Vec<(&str, Option<u64>, Option<u64>)> {
        let of =
            |parts: &[TimedPart], name: &str| parts.iter().find(|part| part.name == name).map(|part| part.us);
        let there = self.destination.iter().filter(|part| of(&self.source, &part.name).is_none());
        let names = self.source.iter().chain(there).map(|part| part.name.as_str());
        names.map(|name| (name, of(&self.source, name), of(&self.destination, name))).collect()
    }
}

/// A step, and how long it took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TimedPart {
    /// What it was.
    pub name: String,
    /// How long it took.
    pub us: u64,
}

/// Pages that were owed when the program ran at the destination.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that were owed.
    pub owed_pages: u64,
    /// Pages that were sent because a thread waited for them.
    pub demanded_pages: u64,
    /// Pages that were sent before anybody asked for them.
    pub pushed_pages: u64,
    /// Pages that were sent a second time, because a thread waited for them while they were under way.
    #[serde(default)]
    pub repeated_pages: u64,
    /// Of the first two, pages of zeros. What is neither was given back by the program before it came.
    pub zero_pages: u64,
    /// Bytes on the wire for them, frames included.
    pub sent_bytes: u64,
    /// As [`RoundReport::held_up`], of the threads that sent what nobody had asked for.
    #[serde(default)]
    pub held_up: Option<f64>,
    /// From the resume until the destination had all of them.
    pub duration_us: u64,
    /// How often the connections were lost and made anew.
    pub reconnections: u32,
    /// How long threads waited for owed pages.
    pub faults: FaultReport,
}

/// Times of page faults on owed pages at the destination, each from reading the fault to waking the thread.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct FaultReport {
    /// How many there were.
    pub count: u64,
    /// The median.
    pub p50_us: u64,
    /// 99 of 100 were not longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// The network's part of a handover.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetworkReport {
    /// Addresses that moved, as they were asked for; those that hooks moved, without a device.
    pub addresses: Vec<String>,
    /// Established TCP connections that the program had just before the freeze, and that were kept.
    pub connections: u64,
    /// How long the destination took to announce the addresses, hook included, just before the freeze.
    pub announce_us: u64,
    /// How long the source took to stop everything in and out of the addresses (inside `downtime_us.seal`).
    pub block_us: u64,
    /// How long the destination took to let packets in (inside `downtime_us.commit`).
    pub release_us: u64,
    /// How long it took to deliver those that had waited (inside `downtime_us.commit`).
    pub deliver_us: u64,
    /// Packets that had waited.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Packets for which there was no room while they waited: their senders send them again.
    pub lost_packets: u64,
    /// From when the destination was told to announce the addresses until the source heard that what had waited was delivered.
    pub away_us: u64,
}

/// What happened after the program ran again.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FillReport {
    /// Pages that were put in place, before and after the resume.
    pub pages: u64,
    /// Of these, before it.
    pub prefilled_pages: u64,
    /// Page faults that were served.
    pub faults: u64,
    /// Longest time from reading a fault to its answer.
    pub max_fault_us: u64,
    /// From the resume until every page was there.
    pub duration_us: u64,
}
