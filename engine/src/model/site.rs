//! What a migration goes through: the link, the hosts, and how small the program's pages become.

use crate::policy::estimate::FreezeCost;
use std::time::Duration;

/// What a page costs on its way, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageCost {
    /// Reading, hashing, coding, sending and storing, shared between all workers: what it takes on a link without limits.
    pub time: Duration,
    /// Bytes on the wire, frames included: a page of zeros counts as the mark that it is, and one that has the same bytes
    /// as before as none.
    pub bytes: f64,
}

/// The conditions of a migration.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// What the link carries, bytes a second, without the heads of packets ([`Site::payload`]).
    pub bandwidth: f64,
    /// From one host to the other and back.
    pub round_trip: Duration,
    /// A page that is sent for the first time.
    pub first: PageCost,
    /// A page that was sent before and is dirty again.
    pub again: PageCost,
    /// One of these of which the sender has kept no bytes, so that it cannot go as what differs.
    pub anew: PageCost,
    /// Reading and hashing a page that turns out to be as it was sent.
    pub look: Duration,
    /// What a page of [`Site::first`] takes in the freeze of stop-and-copy, in which the program leaves the processors to the
    /// migration and memory is ready; `None`: as much as while it runs.
    pub still: Option<Duration>,
    /// Making memory for a page ready at the destination, which stop-and-copy waits for before the program stands still.
    pub prepare: Duration,
    /// What a page takes that follows after the program, which runs beside.
    pub late: Duration,
    /// Putting a page in place that was there before the program was.
    pub place: Duration,
    /// The same where others follow after the program.
    pub place_beside: Duration,
    /// From the start until the first round: connecting, attaching, CRIU's preparations.
    pub setup: Duration,
    /// Time of a round beside its pages: the scan and the acknowledgement.
    pub round_overhead: Duration,
    /// What the freeze costs beside the pages.
    pub freeze: FreezeCost,
    /// Bytes of CRIU's images for a process, beside memory that is in them.
    pub image_bytes: f64,
    /// What is left of images on the wire where they are packed: where the link is slower than packing.
    pub image_ratio: f64,
    /// Time that the program loses when it writes to a page for the first time after a scan.
    pub write_fault: Duration,
    /// Time until a page that the program waits for in post-copy is there, beside the round trip and its bytes.
    pub read_fault: Duration,
}

/// Pages that are sent together, by what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Never sent before.
    pub first: u64,
    /// Sent before, and dirty again.
    pub again: u64,
    /// ... of which no bytes were kept.
    pub anew: u64,
    /// As they were sent: they are only looked at.
    pub unchanged: u64,
}

impl Load {
    /// All of them.
    pub fn pages(&self) -> u64 {
        self.first + self.again + self.anew + self.unchanged
    }
}

/// What is left of a link's rate for what goes over it, where frames of Ethernet (1514 bytes) carry TCP with time stamps.
const PAYLOAD: f64 = 1448.0 / 1514.0;

/// Bytes of images that are packed in a second (docs/BENCHMARKS.md).
const PACKING: f64 = 500e6;
/// Bytes of a page.
const PAGE: f64 = 4096.0;
/// A page's part of the head of a frame, in batches of many pages: 1 byte in those of a first round, 5 in smaller ones.
pub const HEAD: f64 = 4.0;

impl Default for Site {
    /// Loopback between two processors, pages that do not compress, a receiver that has no memory ready: figures of
    /// docs/BENCHMARKS.md.
    fn default() -> Self {
        Self {
            bandwidth: f64::INFINITY,
            round_trip: Duration::from_micros(100),
            first: PageCost { time: Duration::from_nanos(5000), bytes: PAGE + HEAD },
            again: PageCost { time: Duration::from_nanos(1600), bytes: PAGE + HEAD },
            anew: PageCost { time: Duration::from_nanos(1600), bytes: PAGE + HEAD },
            look: Duration::from_nanos(400),
            still: Some(Duration::from_nanos(1600)),
            prepare: Duration::from_nanos(3400),
            late: Duration::from_micros(6),
            place: Duration::from_nanos(1500),
            place_beside: Duration::from_nanos(1500),
            setup: Duration::from_millis(60),
            round_overhead: Duration::from_micros(500),
            freeze: FreezeCost::default(),
            image_bytes: 40e3,
            image_ratio: 0.25,
            write_fault: Duration::from_nanos(700),
            read_fault: Duration::from_micros(100),
        }
    }
}

impl Site {
    /// What is left for the engine of a link that is said to carry `rate` bytes a second.
    pub fn payload(rate: u64) -> f64 {
        rate as f64 * PAYLOAD
    }

    /// How long it takes to send these pages, and their bytes: the processors and the link work at the same time, so it takes
    /// as long as the slower of them.
    pub fn send(&self, load: Load) -> (Duration, f64) {
        let kinds = [(load.first, self.first), (load.again, self.again), (load.anew, self.anew)];
        let bytes = kinds.iter().map(|(pages, cost)| *pages as f64 * cost.bytes).sum();
        let work = kinds.iter().map(|(pages, cost)| *pages as f64 * cost.time.as_secs_f64()).sum::<f64>()
            + load.unchanged as f64 * self.look.as_secs_f64();
        (Duration::from_secs_f64(work.max(self.carry(bytes))), bytes)
    }

    /// The same while the program stands still.
    pub fn send_still(&self, load: Load) -> (Duration, f64) {
        let first = PageCost { time: self.still.unwrap_or(self.first.time), ..self.first };
        Self { first, ..*self }.send(load)
    }

    /// The same after the program: whole pages.
    pub fn fill(&self, load: Load) -> (Duration, f64) {
        let kinds = [(load.first, self.first), (load.pages() - load.first, self.anew)];
        let bytes = kinds.iter().map(|(pages, cost)| *pages as f64 * cost.bytes).sum();
        let work = self.late.mul_f64(load.pages() as f64).as_secs_f64();
        (Duration::from_secs_f64(work.max(self.carry(bytes))), bytes)
    }

    /// Seconds that the link takes for `bytes`.
    pub fn carry(&self, bytes: f64) -> f64 {
        bytes / self.bandwidth
    }

    /// Standing still when no page has to be sent, and the bytes of it: CRIU's images, with `in_images` pages of memory that
    /// only they can carry.
    pub fn stand(&self, processes: u32, resident_pages: u64, in_images: u64) -> (Duration, f64) {
        let plain = self.image_bytes * f64::from(processes.max(1)) + in_images as f64 * PAGE;
        // Packing and the link work at the same time.
        let packing = plain / PACKING;
        let packed = packing.max(self.carry(plain * self.image_ratio)) < self.carry(plain);
        let (bytes, work) = if packed { (plain * self.image_ratio, packing) } else { (plain, 0.0) };
        let carried = Duration::from_secs_f64(self.carry(bytes).max(work)) + self.round_trip * ROUND_TRIPS;
        (self.freeze.of(processes, resident_pages) + carried, bytes)
    }
}

/// The last round, the seal, the images with `Ready`, and the commit each wait for an answer.
const ROUND_TRIPS: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_follow_go_whole() {
        let small = PageCost { bytes: 100.0, ..Site::default().again };
        let site = Site { bandwidth: 12.5e6, again: small, ..Site::default() };
        let load = Load { again: 1000, ..Load::default() };
        assert_eq!(site.send(load).1, 100e3);
        let (time, bytes) = site.fill(load);
        assert_eq!(bytes, 1000.0 * (PAGE + HEAD));
        assert!((time.as_secs_f64() - bytes / 12.5e6).abs() < 1e-6, "the link is slower than the sender");
        let quick = Site { bandwidth: f64::INFINITY, ..site };
        assert_eq!(quick.fill(load).0, 1000 * quick.late);
    }

    #[test]
    fn images_are_packed_where_the_link_is_slower() {
        let at = |bandwidth: f64| Site { bandwidth, ..Site::default() }.stand(1, 0, 1000).1;
        let plain = 40e3 + 4096e3;
        assert_eq!((at(f64::INFINITY), at(12.5e6), at(125e6)), (plain, plain / 4.0, plain / 4.0));
        let (slow, quick) = (Site { bandwidth: 12.5e6, ..Site::default() }, Site::default());
        let took = slow.stand(1, 0, 1000).0 - quick.stand(1, 0, 1000).0;
        assert_eq!(took.as_millis(), (plain / 4.0 / 12.5e3) as u128);
    }
}
