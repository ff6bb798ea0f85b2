//! Which pieces of CRIU's images are packed on their way. Pure: when bytes arrived is told.
//!
//! The program stands still while the images are sent, so what counts is when the last byte is at the other end and unpacked. A piece of `b`
//! bytes that a link takes at `w` seconds a byte is there after `b * w` as it is, and after `c + b * ratio * w + b * u` packed in the time `c`
//! and unpacked at `u` a byte. What was sent before and still waits is carried meanwhile: while there is enough of that, packing
//! takes no time.

/// Bytes that are packed in one piece. The link carries one while the next is packed, so they are small; zstd makes no more of them than
/// of 1 MiB (13 % of the pages of libraries that a redis-server has changed).
pub(crate) const PIECE: usize = 64 << 10;

/// What zstd's level 1 makes of images, and how quickly, until some were packed. Of pages of libraries, which are most of the images of most
/// programs, it makes less: 13 % of those of a redis-server, at 520 MB/s here.
const FIRST_RATIO: f64 = 0.3;
const FIRST_CODING: f64 = 1.0 / 500e6;
/// That guess counts as so many bytes that were packed.
const GUESS: f64 = 256.0 * 1024.0;
/// Of so many bytes that were packed the older half is forgotten: files differ.
const REMEMBER: f64 = 4.0 * 1_048_576.0;
/// Seconds that a piece takes beside its bytes.
const EACH: f64 = 10e-6;
/// Seconds that unpacking takes a byte at the other end, until the last piece is there.
const UNPACKING: f64 = 0.8e-9;
/// What does not compress is tried again after so many bytes.
const LOOK_AGAIN: u64 = 8 << 20;
/// A link that has carried so many bytes in half of the time that it was thought to take, or less, is another one: more than queues on the way
/// let through at once.
const ENOUGH: f64 = 1_048_576.0;
const MUCH_FASTER: f64 = 0.5;
/// A link is believed to have the pace at which bytes arrived while it was busy for so many seconds.
const SURELY: f64 = 1.5e-3;
/// Less than this that was sent and is not known to have arrived says nothing of the pace: acknowledgements of the last packets may come late.
const TAIL: u64 = 16 << 10;
/// Over a link that nobody knows, what is smaller goes as it is: it is a packet or two either way.
const SMALL: usize = 4096;
/// A link that has carried so many bytes without ever being waited for is quicker than any packing.
pub(crate) const MUCH: u64 = 8 << 20;

/// What is known of the link before the images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pace {
    /// Nothing.
    Unknown,
    /// It was never waited for, though much was sent.
    Quick,
    /// It takes so many seconds a byte.
    Seconds(f64),
}

/// When pieces are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packed {
    /// Never: nobody could read it, or it is not wanted.
    Never,
    /// Where that makes them shorter.
    Always,
    /// Where that is quicker.
    WhereQuicker,
}

/// Decides piece by piece.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    packed: Packed,
    pace: Pace,
    /// What was packed lately: bytes, what became of them, seconds.
    bytes: f64,
    out: f64,
    time: f64,
    /// Bytes that went as they are since the last piece that was packed.
    plain: u64,
    /// Over a link that nobody knows: bytes that go as they are until the next piece is packed, and how many the next time; whether what was
    /// sent was there when a piece was packed, if that is news.
    left: usize,
    run: usize,
    arrived: Option<bool>,
    /// Whether any piece was packed and sent, and whether one was packed since the last look.
    began: bool,
    has_packed: bool,
    /// Seconds and bytes at the last look, and of the link while it was busy.
    last: Option<(f64, u64)>,
    busy: (f64, f64),
    passed: (f64, f64),
}

impl Packing {
    pub(crate) fn new(packed: Packed) -> Self {
        Self {
            packed,
            pace: Pace::Unknown,
            bytes: GUESS,
            out: GUESS * FIRST_RATIO,
            time: GUESS * FIRST_CODING,
            plain: 0,
            left: 0,
            run: PIECE,
            arrived: None,
            began: false,
            has_packed: false,
            last: None,
            busy: (0.0, 0.0),
            passed: (0.0, 0.0),
        }
    }

    /// Whether any piece may be packed.
    pub(crate) fn is_possible(&self) -> bool {
        self.packed != Packed::Never
    }

    /// The images begin, over a link of which this is known.
    pub(crate) fn begin(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Just before a piece is sent, at `now`, in seconds since any fixed point in time: so many bytes have arrived at the other end so far, and
    /// so many that were sent have not.
    pub(crate) fn look(&mut self, now: f64, arrived: u64, waiting: u64) {
        let has_packed = std::mem::take(&mut self.has_packed);
        let began = self.began;
        self.began |= has_packed;
        let Some((then, arrived_then)) = self.last.replace((now, arrived)) else { return };
        let (time, bytes) = ((now - then).max(0.0), arrived.saturating_sub(arrived_then) as f64);
        if began && has_packed {
            let quick = bytes > 0.0 && !is_quicker(PIECE, time / bytes, 0, self.seen());
            self.arrived = Some(quick || waiting < SMALL as u64);
        }
        self.passed = (self.passed.0 + time, self.passed.1 + bytes);
        if self.passed.1 >= ENOUGH {
            if let Pace::Seconds(link) = self.pace
                && self.passed.0 < MUCH_FASTER * link * self.passed.1
            {
                self.pace = Pace::Unknown;
            }
            self.passed = (0.0, 0.0);
        }
        if waiting < TAIL {
            // It was idle for some of the time.
            self.busy = (0.0, 0.0);
            return;
        }
        self.busy = (self.busy.0 + time, self.busy.1 + bytes);
        if self.busy.0 >= SURELY {
            self.pace = Pace::Seconds(self.busy.0 / self.busy.1.max(1.0));
            // What was seen goes on to count, and what comes counts more.
            self.busy = (self.busy.0 / 2.0, self.busy.1 / 2.0);
        }
    }

    /// Whether the next piece, of so many bytes, is packed, where so many that were sent have not arrived.
    pub(crate) fn choose(&mut self, bytes: usize, waiting: u64) -> bool {
        match (self.packed, self.pace) {
            _ if bytes == 0 => false,
            (Packed::Never, _) | (Packed::WhereQuicker, Pace::Quick) => false,
            (Packed::Always, _) => true,
            (Packed::WhereQuicker, Pace::Unknown) => bytes >= SMALL && self.try_out(bytes),
            (Packed::WhereQuicker, Pace::Seconds(link)) => {
                let guess = (FIRST_CODING, FIRST_RATIO);
                is_quicker(bytes, link, waiting, self.seen())
                    || self.plain >= LOOK_AGAIN && is_quicker(bytes, link, waiting, guess)
            }
        }
    }

    /// What was seen to be made of images: seconds a byte, and what is left of one.
    fn seen(&self) -> (f64, f64) {
        (self.time / self.bytes, self.out / self.bytes)
    }

    /// Whether a piece is packed over a link that nobody knows. Over a slow one it would be wrong to begin otherwise. When what was sent is there
    /// after the next piece was packed, some bytes are tried as they are, and twice as many the next time; a queue on the way may let the
    /// first ones through at once.
    fn try_out(&mut self, bytes: usize) -> bool {
        if self.left == 0 {
            match self.arrived.take() {
                Some(true) => (self.left, self.run) = (self.run, self.run * 2),
                Some(false) => self.run = PIECE,
                None => {}
            }
        }
        let packs = self.left == 0;
        self.left = self.left.saturating_sub(bytes);
        packs
    }

    /// Whether a piece that is not to be packed may be a large one: what the next ones do is known by now.
    pub(crate) fn is_sure(&self) -> bool {
        self.pace != Pace::Unknown
    }

    /// So many bytes are sent as they are, because that was chosen.
    pub(crate) fn observe_plain(&mut self, bytes: usize) {
        self.plain += bytes as u64;
    }

    /// So many bytes became `out` bytes in `time` seconds.
    pub(crate) fn observe(&mut self, bytes: usize, out: usize, time: f64) {
        (self.plain, self.has_packed) = (0, true);
        self.bytes += bytes as f64;
        self.out += out.min(bytes) as f64;
        self.time += (time - EACH).max(0.0);
        if self.bytes > REMEMBER {
            (self.bytes, self.out, self.time) = (self.bytes / 2.0, self.out / 2.0, self.time / 2.0);
        }
    }
}

/// Whether a piece is there sooner when it is packed, at so many seconds a byte and to so much of it, over a link that takes `link` seconds
/// a byte and has `waiting` bytes before it.
fn is_quicker(bytes: usize, link: f64, waiting: u64, (coding, ratio): (f64, f64)) -> bool {
    let (bytes, ahead) = (bytes as f64, waiting as f64 * link);
    let packed = (EACH + bytes * coding).max(ahead) + bytes * ratio * link + bytes * UNPACKING;
    packed < ahead + bytes * link
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGABIT: f64 = 1.0 / 118e6;

    fn packing(pace: Pace) -> Packing {
        let mut packing = Packing::new(Packed::WhereQuicker);
        packing.begin(pace);
        packing
    }

    /// A link of `rate` bytes a second in virtual time, which buffers what it is given, and zstd of `speed` and `ratio`. Gives the seconds until
    /// all pieces are there and unpacked, and how many of them were packed.
    fn carry(packing: &mut Packing, pieces: &[usize], rate: f64, speed: f64, ratio: f64) -> (f64, usize) {
        let (mut now, mut free, mut sent, mut last) = (0.0f64, 0.0f64, 0u64, 0.0);
        let mut packed = 0;
        for &bytes in pieces {
            let waits = |now: f64| ((free - now).max(0.0) * rate) as u64;
            let mut out = bytes;
            last = 0.0;
            if !packing.choose(bytes, waits(now)) {
                packing.observe_plain(bytes);
            } else {
                let time = 10e-6 + bytes as f64 / speed;
                out = (bytes as f64 * ratio) as usize;
                packing.observe(bytes, out, time);
                now += time;
                packed += 1;
                last = bytes as f64 * UNPACKING;
            }
            let waiting = waits(now).min(sent);
            packing.look(now, sent - waiting, waiting);
            // A call of the system, and its copy.
            now += 5e-6 + out as f64 * 0.2e-9;
            free = free.max(now) + out as f64 / rate;
            sent += out as u64;
            // Its buffer has 4 MB.
            now = now.max(free - 4e6 / rate);
        }
        (free + last, packed)
    }

    /// The images of a server: some small files, and 1.1 MB of pages of libraries.
    fn server() -> Vec<usize> {
        let mut pieces = vec![300; 30];
        pieces.extend([PIECE; 18]);
        pieces
    }

    #[test]
    fn over_a_slow_link_images_are_packed_whether_its_pace_is_known_or_not() {
        for (rate, most) in [(118e6, 0.5), (12e6, 0.35)] {
            for pace in [Pace::Unknown, Pace::Seconds(1.0 / rate)] {
                let plain = carry(&mut Packing::new(Packed::Never), &server(), rate, 600e6, 0.15).0;
                let (time, packed) = carry(&mut packing(pace), &server(), rate, 600e6, 0.15);
                assert!(packed >= 15, "{packed} over {rate}, {pace:?}");
                assert!(time < most * plain, "{time} of {plain} over {rate}, {pace:?}");
            }
        }
    }

    #[test]
    fn over_a_quick_link_they_go_as_they_are() {
        for rate in [1e9, 3e9] {
            for pace in [Pace::Quick, Pace::Seconds(1.0 / rate)] {
                assert_eq!(carry(&mut packing(pace), &server(), rate, 600e6, 0.15).1, 0, "{rate}, {pace:?}");
            }
            // One that nobody knows costs some pieces of eighteen.
            let (_, packed) = carry(&mut packing(Pace::Unknown), &server(), rate, 600e6, 0.15);
            assert!((1..=7).contains(&packed), "{packed} over {rate}");
        }
    }

    #[test]
    fn what_does_not_compress_is_found_out_and_looked_at_again() {
        // A GB of shared memory.
        let pieces = vec![PIECE; 16384];
        let plain = carry(&mut Packing::new(Packed::Never), &pieces, 118e6, 1e9, 1.0).0;
        let (time, packed) = carry(&mut packing(Pace::Seconds(GIGABIT)), &pieces, 118e6, 1e9, 1.0);
        assert!(time < 1.01 * plain, "{time} of {plain}");
        assert!((100..600).contains(&packed), "{packed}");
        // Half of it does after all.
        let mut packing = packing(Pace::Seconds(GIGABIT));
        carry(&mut packing, &pieces[..8192], 118e6, 1e9, 1.0);
        let (_, packed) = carry(&mut packing, &pieces[..8192], 118e6, 500e6, 0.2);
        assert!(packed > 6000, "{packed}");
    }

    #[test]
    fn a_wrong_belief_about_the_link_is_corrected_by_what_it_carries() {
        let pieces = vec![PIECE; 16384];
        // Believed to be a hundred times slower than it is, and quicker.
        for (believed, rate) in [(1.0 / 30e6, 3e9), (1.0 / 3e9, 30e6)] {
            let plain = carry(&mut Packing::new(Packed::Never), &pieces, rate, 500e6, 0.3).0;
            let (time, packed) = carry(&mut packing(Pace::Seconds(believed)), &pieces, rate, 500e6, 0.3);
            let right = if rate > 1e9 { 1.1 * plain } else { 0.35 * plain };
            assert!(time < right, "{time} of {plain} over {rate}, {packed} packed");
        }
    }

    /// While enough waits, packing takes no time: also over links that are quicker than zstd can gain from otherwise.
    #[test]
    fn what_waits_makes_packing_free() {
        let (link, seen) = (1.0 / 400e6, (1.0 / 500e6, 0.3));
        assert!(!is_quicker(PIECE, link, 0, seen));
        assert!(is_quicker(PIECE, link, 4 << 20, seen));
        assert!(
            !is_quicker(PIECE, link, 4 << 20, (1.0 / 500e6, 0.9)),
            "unpacking takes more than that gains"
        );
    }

    #[test]
    fn small_files_are_packed_where_a_packet_takes_long() {
        let seen = (FIRST_CODING, FIRST_RATIO);
        assert!(!is_quicker(300, GIGABIT, 0, seen));
        assert!(is_quicker(4096, 1.0 / 12e6, 0, seen));
        assert!(!is_quicker(0, GIGABIT, 1 << 20, seen));
    }

    #[test]
    fn never_and_always_are_what_they_say() {
        for (packed, wanted) in [(Packed::Never, 0), (Packed::Always, 48)] {
            for rate in [12e6, 3e9] {
                let mut packing = Packing::new(packed);
                packing.begin(Pace::Seconds(1.0 / rate));
                assert_eq!(carry(&mut packing, &server(), rate, 500e6, 0.3).1, wanted);
            }
        }
        assert!(!Packing::new(Packed::Always).choose(0, 0), "an empty file is what it is");
    }
}
