//! One process with every kind of memory that is not plain, and with data in pipes and sockets.

use super::content::{Entropy, WORDS, mix, word};
use super::state::{Verdict, beside};
use super::{Common, entry, field::Field, field::Style, pace::Pace};
use crate::sys::memory::{Access, Backing, Mapping, PAGE};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Bytes that wait in the pipe: less than its 64 KiB, more than one of its buffers.
const PIPED: usize = 40_000;
/// Bytes that wait in each direction of the socket pair.
const QUEUED: usize = 20_000;
/// Pages of a huge page.
const HUGE: usize = 512;

/// A region, what it must hold, and what may be done with it outside of checks.
struct Region {
    name: &'static str,
    memory: Mapping,
    field: Field,
    access: Access,
}

impl Region {
    fn new(name: &'static str, memory: Mapping, seed: u64, style: Style) -> Self {
        let field = Field::new(mix(seed, name.len() as u64), memory.pages(), style);
        Self { name, memory, field, access: Access::ReadWrite }
    }

    fn filled(mut self) -> Self {
        self.field.fill(self.memory.words_mut());
        self
    }

    fn sealed(mut self, access: Access) -> io::Result<Self> {
        self.memory.protect(access)?;
        self.access = access;
        Ok(self)
    }

    fn check(&mut self) -> Result<(), String> {
        let hidden = self.access == Access::None;
        let protect = |memory: &mut Mapping, access| {
            memory.protect(access).map_err(|error| format!("{}: mprotect: {error}", self.name))
        };
        if hidden {
            protect(&mut self.memory, Access::Read)?;
        }
        let compared = self.field.check(self.memory.words());
        if hidden {
            protect(&mut self.memory, Access::None)?;
        }
        compared.map_err(|bad| format!("{} {bad}", self.name))
    }
}

/// Data on its way through the kernel.
struct Channels {
    seed: u64,
    pipe: (PipeReader, PipeWriter),
    sockets: (UnixStream, UnixStream),
}

/// Everything.
struct Mixed {
    regions: Vec<Region>,
    memfd: File,
    channels: Channels,
}

/// Builds all of it and dirties what can be written, in turn.
///
/// # Errors
/// What kept it from running.
pub fn run(common: &Common) -> anyhow::Result<ExitCode> {
    let mut state = common.begin()?;
    let mut mixed = Mixed::build(common)?;
    let entries: Vec<_> = mixed.regions.iter().map(|region| entry(region.name, &region.memory)).collect();
    state.describe(&entries)?;
    let mut pace = Pace::pages(common.rate);
    let mut progress = 0u64;
    loop {
        for _ in 0..pace.due() {
            mixed.write(progress);
            progress += 1;
        }
        if let Some(check) = state.beat(progress)? {
            let verdict = mixed.check().and_then(|details| state.agrees_with(progress).map(|()| details));
            state.answer(check, &verdict)?;
        }
    }
}

impl Mixed {
    fn build(common: &Common) -> anyhow::Result<Self> {
        let seed = common.seed;
        let style = common.style();
        // Eight parts; the huge one is rounded up so that at least one whole huge page is in it.
        let part = (common.pages() / 8).max(4);
        let map = |name, backing| -> io::Result<Region> {
            Ok(Region::new(name, Mapping::new(backing, part)?, seed, style))
        };
        let hidden = map("no-access", Backing::Private)?.filled().sealed(Access::None)?;
        let read_only = map("read-only", Backing::Private)?.filled().sealed(Access::Read)?;
        let locked = map("locked", Backing::Private)?;
        locked.memory.lock()?;
        let shared = map("shared-anonymous", Backing::Shared)?;
        let memfd: File = rustix::fs::memfd_create("pageferry-mixed", MemfdFlags::CLOEXEC)?.into();
        memfd.set_len((part * PAGE) as u64)?;
        let in_memfd = map("memfd", Backing::FileShared(memfd.as_fd()))?;
        let huge_pages = part.next_multiple_of(HUGE) + HUGE;
        let huge = Region::new("huge", Mapping::new(Backing::Private, huge_pages)?, seed, style);
        // Without huge pages in the kernel the region is an ordinary one.
        let _ = huge.memory.prefer_huge_pages();
        let plain = map("plain", Backing::Private)?;
        let mut regions = vec![hidden, read_only, file_private(common, part)?];
        regions.extend([locked, shared, in_memfd, huge, plain].map(Region::filled));
        Ok(Self { regions, memfd, channels: Channels::open(seed)? })
    }

    fn write(&mut self, n: u64) {
        let writable: usize = self.regions.iter().filter(|region| region.access == Access::ReadWrite).count();
        let turn = (n % writable as u64) as usize;
        let chosen = self.regions.iter_mut().filter(|region| region.access == Access::ReadWrite).nth(turn);
        if let Some(Region { memory, field, .. }) = chosen {
            field.write(memory.words_mut());
        }
    }

    fn check(&mut self) -> Verdict {
        for region in &mut self.regions {
            region.check()?;
        }
        // The descriptor and the mapping must still be the same memory.
        if let Some(region) = self.regions.iter().find(|region| region.name == "memfd") {
            let mut bytes = vec![0; region.memory.bytes()];
            self.memfd.read_exact_at(&mut bytes, 0).map_err(|error| format!("memfd: {error}"))?;
            let same = region.memory.words().iter().zip(bytes.as_chunks::<8>().0);
            if let Some(at) = same.clone().position(|(word, bytes)| word.to_ne_bytes() != *bytes) {
                return Err(format!("memfd: word {at} differs between its mapping and its descriptor"));
            }
        }
        self.channels.check()?;
        let writes: u64 = self.regions.iter().map(|region| region.field.done()).sum();
        Ok(format!("{} regions, {writes} writes, a pipe and a socket pair", self.regions.len()))
    }
}

/// A private mapping of a file in which every other page was written, so that half of it is the file's and half
/// is a copy.
fn file_private(common: &Common, pages: usize) -> anyhow::Result<Region> {
    let path = beside(&common.state, "data");
    let seed = mix(common.seed, 77);
    let field = Field::lattice(seed, pages, 1, 2, common.style());
    let mut words = vec![0u64; pages * WORDS];
    field.fill(&mut words);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    std::fs::write(&path, bytes)?;
    let memory = Mapping::new(Backing::FilePrivate(File::open(&path)?.as_fd()), pages)?;
    let mut region = Region { name: "file-private", memory, field, access: Access::ReadWrite };
    for _ in 0..pages / 2 {
        region.field.write(region.memory.words_mut());
    }
    Ok(region)
}

fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let words = (0..len.div_ceil(8)).map(|at| word(seed, at, Entropy::Incompressible));
    words.flat_map(u64::to_ne_bytes).take(len).collect()
}

impl Channels {
    fn open(seed: u64) -> io::Result<Self> {
        let mut channels = Self { seed, pipe: pipe()?, sockets: UnixStream::pair()? };
        channels.put_in()?;
        Ok(channels)
    }

    fn put_in(&mut self) -> io::Result<()> {
        self.pipe.1.write_all(&bytes_of(mix(self.seed, 1), PIPED))?;
        self.sockets.0.write_all(&bytes_of(mix(self.seed, 2), QUEUED))?;
        self.sockets.1.write_all(&bytes_of(mix(self.seed, 3), QUEUED))
    }

    /// Takes the data out, compares it and puts it in again.
    fn check(&mut self) -> Result<(), String> {
        // Not blocking: data that was lost must be a verdict, not a wait for ever.
        let bad = |what: &str, error: io::Error| format!("{what}: {error}");
        let available = |fd: &dyn AsFdIo, len| fd.waiting().is_ok_and(|waiting| waiting >= len as u64);
        if !available(&self.pipe.0, PIPED)
            || !available(&self.sockets.0, QUEUED)
            || !available(&self.sockets.1, QUEUED)
        {
            return Err("data is missing in the pipe or the socket pair".to_owned());
        }
        let mut piped = vec![0; PIPED];
        self.pipe.0.read_exact(&mut piped).map_err(|error| bad("pipe", error))?;
        let (mut right, mut left) = (vec![0; QUEUED], vec![0; QUEUED]);
        self.sockets.1.read_exact(&mut right).map_err(|error| bad("socket", error))?;
        self.sockets.0.read_exact(&mut left).map_err(|error| bad("socket", error))?;
        for (name, found, seed) in
            [("pipe", &piped, 1), ("socket, right", &right, 2), ("socket, left", &left, 3)]
        {
            let expected = bytes_of(mix(self.seed, seed), found.len());
            if let Some(at) = found.iter().zip(&expected).position(|(a, b)| a != b) {
                return Err(format!("{name}: byte {at} of {} is wrong", found.len()));
            }
        }
        self.put_in().map_err(|error| bad("putting the data back", error))
    }
}

/// How many bytes wait to be read.
trait AsFdIo {
    fn waiting(&self) -> io::Result<u64>;
}

impl<T: AsFd> AsFdIo for T {
    fn waiting(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_in_channels_survives_checks_and_its_loss_is_found() {
        let mut channels = Channels::open(3).expect("open");
        for _ in 0..3 {
            channels.check().expect("whole");
        }
        let mut one = [0];
        channels.sockets.0.read_exact(&mut one).expect("take a byte");
        assert!(channels.check().is_err());
    }

    #[test]
    fn swapped_data_is_found() {
        let mut channels = Channels::open(3).expect("open");
        let mut piped = vec![0; PIPED];
        channels.pipe.0.read_exact(&mut piped).expect("take all");
        piped[PIPED - 1] ^= 1;
        channels.pipe.1.write_all(&piped).expect("put back");
        assert_eq!(channels.check(), Err(format!("pipe: byte {} of {PIPED} is wrong", PIPED - 1)));
    }
}
