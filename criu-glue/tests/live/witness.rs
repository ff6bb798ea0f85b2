//! That whatever can change the flags of memory between the look ahead and the freeze is seen, and nothing else is.

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use libtest_mimic::Failed;
use pageferry_criu_glue::{ImageDir, PAGE_SIZE};

use crate::calls::{call, call_32, in_child};
use crate::{PATIENCE, begin, explain};

/// The argument by which the test program is the one that makes calls.
pub const CALLER: &str = "__calls";

const NONE: [u64; 6] = [0; 6];
const PAGES: u64 = 16;

/// What the calling program has.
struct Caller {
    region: memmap2::MmapMut,
    /// A call that has begun and not ended, and the descriptor that it ends with.
    under_way: Option<(i64, JoinHandle<()>)>,
}

/// The `main` of the program that makes the calls that it reads of, in a thread that is not its first.
pub fn run() -> std::io::Result<()> {
    let region = memmap2::MmapMut::map_anon((PAGES * PAGE_SIZE) as usize)?;
    let mut caller = Caller { region, under_way: None };
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        let mut order = [0; 64];
        reply("ready")?;
        // Nothing here allocates: the allocator makes calls of its own.
        loop {
            let length = rustix::io::read(rustix::stdio::stdin(), &mut order)?;
            let Some(order) = order.get(..length).filter(|order| !order.is_empty()) else { return Ok(()) };
            let order = std::str::from_utf8(order).unwrap_or_default().trim_end();
            let (door, rest) = order.split_once(' ').unwrap_or((order, ""));
            let words = rest.split(' ').filter_map(|word| word.parse::<u64>().ok());
            match caller.follow(door, words) {
                Ok(_) => reply("done")?,
                // Most calls are made with arguments that no kernel accepts.
                Err(error) => reply(error.raw_os_error().map_or("odd", |_| "failed"))?,
            }
        }
    });
    thread.join().map_err(|_| std::io::Error::other("the calling thread has panicked"))?
}

fn reply(word: &str) -> std::io::Result<()> {
    let mut line = [b'\n'; 16];
    line[..word.len()].copy_from_slice(word.as_bytes());
    rustix::io::write(rustix::stdio::stdout(), &line[..=word.len()])?;
    Ok(())
}

impl Caller {
    /// `64 NUMBER [ARGUMENTS]`, `32 NUMBER`, `child NUMBER`, or one by name.
    fn follow(&mut self, door: &str, mut words: impl Iterator<Item = u64>) -> std::io::Result<i64> {
        let mut word = || words.next().unwrap_or(0);
        let (start, length) = (self.region.as_ptr() as u64, self.region.len() as u64);
        match door {
            "64" => {
                let number = word() as i64;
                call(number, std::array::from_fn(|_| word()))
            }
            "32" => call_32(word() as i32),
            "child" => {
                let number = word() as i64;
                in_child(|| drop(call(number, NONE))).map(i64::from)
            }
            "advise" => call(libc::SYS_madvise, [start, length, word(), 0, 0, 0]),
            "protect" => call(libc::SYS_mprotect, [start, length, word(), 0, 0, 0]),
            "unmap" => call(libc::SYS_munmap, [start + length / 2, length / 4, 0, 0, 0, 0]),
            "write" => {
                self.region[0] += 1;
                Ok(0)
            }
            "exec" => Err(Command::new("/proc/self/exe").arg(CALLER).exec()),
            "begin" => self.begin(),
            // The parameters, 120 bytes, are zeros.
            "ring" => call(libc::SYS_io_uring_setup, [1, start, 0, 0, 0, 0]),
            "end" => {
                let (fd, thread) = self.under_way.take().expect("begun");
                call(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
                thread.join().map_err(|_| std::io::Error::other("the thread has panicked"))?;
                Ok(0)
            }
            _ => Err(std::io::Error::other("an unknown order")),
        }
    }

    /// Has a thread lock memory that a userfaultfd withholds from it: the call lasts as long as that is open.
    fn begin(&mut self) -> std::io::Result<i64> {
        const UFFDIO_API: u64 = 0xC018_AA3F;
        const UFFDIO_REGISTER: u64 = 0xC020_AA00;
        let start = self.region.as_ptr() as u64 + PAGE_SIZE;
        let fd = call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64, 0, 0, 0, 0, 0])?;
        let mut api = [0xAA_u64, 0, 0];
        call(libc::SYS_ioctl, [fd as u64, UFFDIO_API, api.as_mut_ptr() as u64, 0, 0, 0])?;
        let mut range = [start, PAGE_SIZE, 1, 0];
        call(libc::SYS_ioctl, [fd as u64, UFFDIO_REGISTER, range.as_mut_ptr() as u64, 0, 0, 0])?;
        let thread = std::thread::spawn(move || {
            let _ = call(libc::SYS_mlock, [start, PAGE_SIZE, 0, 0, 0, 0]);
        });
        self.under_way = Some((fd, thread));
        // The fault is a message for whoever reads the descriptor.
        let mut poll = [fd as u64 & 0xffff_ffff | (libc::POLLIN as u64) << 32];
        call(libc::SYS_poll, [poll.as_mut_ptr() as u64, 1, 20_000, 0, 0, 0])
    }
}

/// The calling program, seen from outside.
struct Subject {
    child: Child,
    orders: ChildStdin,
    told: Lines<BufReader<ChildStdout>>,
}

impl Subject {
    fn start() -> Result<Self, Failed> {
        let mut child = Command::new("/proc/self/exe")
            .arg(CALLER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let told = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let orders = child.stdin.take().ok_or("no input")?;
        let mut subject = Self { child, orders, told };
        subject.told("ready")?;
        Ok(subject)
    }

    fn told(&mut self, wanted: &str) -> Result<(), Failed> {
        match self.told.next() {
            Some(Ok(line)) if line == wanted => Ok(()),
            other => Err(format!("{other:?} instead of {wanted}").into()),
        }
    }

    fn order(&mut self, order: &str) -> Result<String, Failed> {
        // In one piece, as it is read.
        self.orders.write_all(format!("{order}\n").as_bytes())?;
        Ok(self.told.next().ok_or_else(|| format!("it ended at {order}"))??)
    }

    /// Why a freeze does not know that nothing has changed, with `act` between the look ahead and the freeze.
    fn doubt(&mut self, act: impl FnOnce(&mut Self) -> Result<(), Failed>) -> Result<Option<String>, Failed> {
        let images = ImageDir::new()?;
        let pid = self.child.id() as i32;
        let mut dump = begin(&images, pid)?;
        dump.look_ahead(&[pid]);
        act(self)?;
        dump.freeze(PATIENCE).map_err(explain)?;
        let doubt = dump.doubt().map(str::to_owned);
        dump.abort().map_err(explain)?;
        Ok(doubt)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What sets no flags and maps nothing is not taken for it: allocators and servers do it all the time.
pub fn harmless() -> Result<(), Failed> {
    let mut subject = Subject::start()?;
    let advice = [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_WILLNEED, libc::MADV_COLD]
        .map(|advice| format!("advise {advice}"));
    let calls = [libc::SYS_recvfrom, libc::SYS_openat, libc::SYS_getpid, libc::SYS_fsync]
        .map(|number| format!("64 {number}"));
    let others = ["write", "protect 1", "protect 3", "unmap", "child 39"].map(str::to_owned);
    for order in advice.iter().chain(&calls).chain(&others) {
        let mut was = String::new();
        let doubt = subject.doubt(|subject| {
            was = subject.order(order)?;
            Ok(())
        })?;
        if let Some(doubt) = doubt {
            return Err(format!("after {order} ({was}): {doubt}").into());
        }
        if was != "done" && others.contains(order) {
            return Err(format!("{order} could not be done").into());
        }
    }
    Ok(())
}

/// Each call that can change flags, or what is mapped, is seen, whatever thread or child makes it by whatever door. Whether it
/// succeeds is not known by then, so that most can be made with arguments that do no harm.
pub fn seen() -> Result<(), Failed> {
    let by_64 = [
        libc::SYS_mmap,
        libc::SYS_brk,
        libc::SYS_mremap,
        libc::SYS_shmat,
        libc::SYS_mlock,
        libc::SYS_munlock,
        libc::SYS_mlockall,
        libc::SYS_munlockall,
        libc::SYS_prctl,
        libc::SYS_arch_prctl,
        libc::SYS_io_setup,
        libc::SYS_remap_file_pages,
        libc::SYS_mlock2,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_process_madvise,
        453, // map_shadow_stack
        462, // mseal
    ];
    // mmap, madvise, mremap, mmap2, ipc, shmat, mlock, munlock, mlockall, munlockall, prctl, io_setup, mlock2.
    let by_32 = [90, 219, 163, 192, 117, 397, 150, 151, 152, 153, 172, 245, 376];
    let advice = [
        libc::MADV_NORMAL,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_DONTFORK,
        libc::MADV_DOFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_DODUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_KEEPONFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_MERGEABLE,
        libc::MADV_UNMERGEABLE,
    ];
    let x32 = libc::SYS_madvise | 1 << 30;
    let orders = by_64
        .map(|number| format!("64 {number}"))
        .into_iter()
        .chain(by_32.map(|number| format!("32 {number}")))
        .chain(advice.map(|advice| format!("advise {advice}")))
        .chain([format!("child {}", libc::SYS_mlock), format!("64 {x32}"), "exec".to_owned()]);
    let mut subject = Subject::start()?;
    for order in orders {
        let doubt = subject.doubt(|subject| subject.order(&order).map(drop))?;
        if !doubt.as_ref().is_some_and(|doubt| doubt.contains("in thread")) {
            return Err(format!("{order} was not seen: {doubt:?}").into());
        }
    }
    // It is not only always said so.
    subject.doubt(|_| Ok(()))?.map_or(Ok(()), |doubt| Err(format!("where nothing happened: {doubt}").into()))
}

/// A call that has begun before anybody looked is seen when it ends.
pub fn under_way() -> Result<(), Failed> {
    let mut subject = Subject::start()?;
    if subject.order("begin")? != "done" {
        return Err("memory could not be locked for a while".into());
    }
    let doubt = subject.doubt(|subject| match subject.order("end")?.as_str() {
        "done" => Ok(()),
        other => Err(format!("{other} at the end of a call").into()),
    })?;
    match doubt {
        // The thread gives advice on its stack when it ends, or not yet.
        Some(doubt) if doubt.contains("0 calls, 0 times advice and 0 new names") => Ok(()),
        other => Err(format!("{other:?} instead of the end of a call").into()),
    }
}

/// Who can give advice without a system call is not watched.
pub fn io_uring() -> Result<(), Failed> {
    let mut subject = Subject::start()?;
    if subject.order("ring")? != "done" {
        let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
        return match disabled.trim() {
            "" | "2" => Ok(()),
            _ => Err("an io_uring could not be made".into()),
        };
    }
    match subject.doubt(|_| Ok(()))? {
        Some(doubt) if doubt.contains("io_uring") => Ok(()),
        other => Err(format!("{other:?} instead of an io_uring").into()),
    }
}
