//! A witness that nothing has happened which could change the flags of memory: counters of system calls.
//!
//! What smaps says of flags is read before the freeze ([`crate::areas`]), and reading it again to prove that nothing has
//! changed in between takes as long as the first time, 10 ms for each GiB, now in the downtime. A witness makes that
//! unnecessary: it counts, from before the first reading until the freeze, the system calls of all threads of the tree
//! that can change what was read. Nothing counted, nothing changed. Whenever it saw anything, or could not look
//! everywhere, smaps is read again; so it has to see everything, and may see too much.
//!
//! # Why it sees everything
//!
//! Each address of an area keeps its flags until it is unmapped, or a call changes them. Since areas are told apart by
//! their line in maps, and one that grew or was cut is recognised by an address that it shares with what was known
//! ([`Areas::as_of`](crate::areas::Areas::as_of)), what matters is the following:
//!
//! * Calls that set flags: `madvise`, `process_madvise` (any advice to oneself, since Linux 6.13), `mlock`, `mlock2`,
//!   `mlockall` and their opposites, `prctl` (`PR_SET_MEMORY_MERGE`, `PR_SET_MM`), `mseal`. Of `madvise` only the
//!   advice that sets none is let pass ([`HARMLESS_ADVICE`]). `mprotect` is not counted: access is part of the line in
//!   maps, and the accounting that it changes besides (`ac`) is not read by criu. The registration with a userfaultfd
//!   and the soft-dirty mark are not compared either.
//! * Calls by which something else may be at an address that was known: `mmap`, `mremap`, `brk` (the heap may shrink and
//!   grow back without the flags it had), `shmat`, `remap_file_pages`, `io_setup` (maps a ring), `arch_prctl` (maps the
//!   vDSO), `map_shadow_stack`, and `execve`, by the new name that it gives to the thread: the memory is exchanged before that,
//!   and the counters of a program that may not be watched are closed after it. `munmap` alone puts nothing there. Nor does a stack that grows: it is one area with one set of flags, which is looked at
//!   ([`Areas::may_be_witnessed`](crate::areas::Areas::may_be_witnessed)).
//! * Calls by another door. A 64-bit process can call by 32-bit numbers (`int 0x80`) and x32 ones (bit 30). The tracepoint
//!   of all system calls sees them, but not which door it was, so the numbers of all are counted: what is another,
//!   rare, call by the other numbers is counted needlessly. Three 32-bit numbers are frequent calls in 64-bit: `execve` is
//!   `munmap`, and is counted by the name; `brk` is `recvfrom`, and `remap_file_pages` is `openat`. These two
//!   can only touch what is below 4 GiB. So the first is counted if the break is there, and for the second the areas
//!   have to be looked at ([`Areas::may_be_witnessed`](crate::areas::Areas::may_be_witnessed)).
//! * Calls that had begun when the counters were opened: their ends are counted too. A thread is in one call at a time,
//!   so one that ends without having begun makes one end more than beginnings.
//! * An io_uring, which can give advice without a system call: with its threads, or any descriptor of one, there is no
//!   witness, and the calls that make or drive one are counted.
//! * Threads and processes that come later inherit the counters from who creates them. Those that come while the counters
//!   are opened are found by listing again.
//! * A driver may map memory in an `ioctl` (graphics, virtual machines). criu does not dump a process that has such a device.
//! * Others than the tree: a tracer makes the tree's threads call, which is counted; `process_madvise` on somebody else
//!   accepts only advice that sets no flags.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::sys::perf;

/// Where the kernel tells the numbers of its tracepoints, if somebody has mounted that.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// More threads than these are not watched: each costs 0.1 to 0.5 ms before the freeze, and [`COUNTERS`] descriptors.
const MAX_THREADS: usize = 256;

/// Counters of a thread.
const COUNTERS: usize = 5;

/// How often the threads are listed until two lists agree.
const LISTINGS: usize = 20;

/// Numbers of calls that can change what is known of an area, by the 64-bit, the 32-bit (`_32`) or either table
/// (`syscall_64.tbl`, `syscall_32.tbl` of `arch/x86/entry/syscalls`), but for `madvise` in 64-bit.
const CALLS: [u32; 31] = [
    9,   // mmap
    12,  // brk
    25,  // mremap
    30,  // shmat
    86,  // uselib_32
    90,  // mmap_32
    117, // ipc_32, which is also shmat
    149, // mlock
    150, // munlock, mlock_32
    151, // mlockall, munlock_32
    152, // munlockall, mlockall_32
    153, // munlockall_32
    157, // prctl
    158, // arch_prctl
    163, // mremap_32
    172, // prctl_32
    192, // mmap2_32
    206, // io_setup
    216, // remap_file_pages
    219, // madvise_32
    245, // io_setup_32
    325, // mlock2
    376, // mlock2_32
    384, // arch_prctl_32
    397, // shmat_32
    425, // io_uring_setup
    426, // io_uring_enter
    427, // io_uring_register
    440, // process_madvise
    453, // map_shadow_stack
    462, // mseal
];
/// `brk` of the 32-bit table; `recvfrom` of the 64-bit one.
const BRK_32: u32 = 45;
/// `madvise` of the 64-bit table.
const MADVISE: u32 = 28;
/// Every number of an x32 call has this bit, and no other has.
const X32: u32 = 1 << 30;

/// Advice that sets no flag which criu reads: WILLNEED, DONTNEED, FREE, REMOVE, COLD, PAGEOUT, POPULATE_READ,
/// POPULATE_WRITE, DONTNEED_LOCKED, COLLAPSE, GUARD_INSTALL, GUARD_REMOVE. Allocators give it all the time.
const HARMLESS_ADVICE: [u32; 12] = [3, 4, 8, 9, 20, 21, 22, 23, 24, 25, 102, 103];

/// Why there is no witness; smaps has to be read twice then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoWitness {
    /// None is mounted, and none can be.
    #[error("there is no tracefs: {0}")]
    Tracefs(#[source] io::Error),
    /// A kernel without the tracepoints of system calls.
    #[error("the kernel's tracepoint {0} cannot be looked up: {1}")]
    Tracepoint(&'static str, #[source] io::Error),
    /// Not allowed, or out of descriptors.
    #[error("a counter for thread {0} cannot be opened: {1}")]
    Counter(i32, #[source] io::Error),
    /// More than the limit of this process on descriptors, or [`MAX_THREADS`], lets be watched.
    #[error("there are more than {0} threads to watch")]
    Threads(usize),
    /// Threads come and go faster than they are listed.
    #[error("no two lists of the threads agree")]
    Restless,
    /// A process that can do it without system calls.
    #[error("process {0} has an io_uring")]
    IoUring(i32),
    /// What has to be known of a process cannot be read.
    #[error("reading of process {0}: {1}")]
    Proc(i32, #[source] io::Error),
}

/// What is counted where.
struct Plan {
    /// Tracepoint numbers.
    any_enter: u64,
    any_exit: u64,
    madvise: u64,
    exec: u64,
    calls: CString,
    calls_and_madvise: CString,
    madvise_alone: CString,
    advice: CString,
}

impl Plan {
    fn new(low_break: bool) -> Result<Self, NoWitness> {
        let calls: Vec<String> = CALLS
            .iter()
            .chain(low_break.then_some(&BRK_32))
            .map(|call| format!("id=={call}"))
            .chain([format!("id>={X32}")])
            .collect();
        let calls = calls.join("||");
        let advice = HARMLESS_ADVICE.map(|advice| format!("behavior!={advice}")).join("&&");
        let text = |text: String| CString::new(text).expect("made of numbers");
        let tracepoints = Tracepoints::open().map_err(NoWitness::Tracefs)?;
        Ok(Self {
            any_enter: tracepoints.number("raw_syscalls/sys_enter")?,
            any_exit: tracepoints.number("raw_syscalls/sys_exit")?,
            madvise: tracepoints.number("syscalls/sys_enter_madvise")?,
            exec: tracepoints.number("task/task_rename")?,
            calls_and_madvise: text(format!("{calls}||id=={MADVISE}")),
            calls: text(calls),
            madvise_alone: text(format!("id=={MADVISE}")),
            advice: text(advice),
        })
    }
}

/// The numbers of tracepoints.
struct Tracepoints(OwnedFd);

impl Tracepoints {
    /// Where they stand: in a tracefs that is mounted, or else in one that is mounted for this alone. That mount is in no
    /// namespace, nobody else sees it, and it goes with the descriptor.
    fn open() -> io::Result<Self> {
        Ok(Self(match TRACEFS.iter().find(|root| Path::new(root).join("events").is_dir()) {
            Some(root) => File::open(root)?.into(),
            None => Self::mount()?,
        }))
    }

    fn mount() -> io::Result<OwnedFd> {
        let context = mount::fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    }

    fn number(&self, name: &'static str) -> Result<u64, NoWitness> {
        let path = format!("events/{name}/id");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let number = openat(&self.0, path, flags, Mode::empty()).map_err(io::Error::from).and_then(|file| {
            let text = io::read_to_string(File::from(file))?;
            text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
        });
        number.map_err(|source| NoWitness::Tracepoint(name, source))
    }
}

/// The counters of one thread and of all that come from it.
#[derive(Debug)]
struct Thread {
    tid: i32,
    /// Calls of [`CALLS`] that began.
    calls: OwnedFd,
    /// 64-bit `madvise` with advice that is not harmless.
    advice: OwnedFd,
    /// New names, which new programs come with.
    exec: OwnedFd,
    /// 64-bit `madvise` that began. Opened before `ends`: what begins in between is one end less, in a thread that was in
    /// no call at `ends`, where there is nothing to hide.
    madvise: OwnedFd,
    /// The ends of both kinds.
    ends: OwnedFd,
}

impl Thread {
    fn open(tid: i32, plan: &Plan) -> io::Result<Self> {
        let counter = |tracepoint, filter: Option<&CString>| {
            let counter = perf::open(tid, tracepoint)?;
            if let Some(filter) = filter {
                perf::filter(&counter, filter)?;
            }
            perf::enable(&counter)?;
            Ok::<OwnedFd, io::Error>(counter)
        };
        Ok(Self {
            tid,
            calls: counter(plan.any_enter, Some(&plan.calls))?,
            advice: counter(plan.madvise, Some(&plan.advice))?,
            exec: counter(plan.exec, None)?,
            madvise: counter(plan.any_enter, Some(&plan.madvise_alone))?,
            ends: counter(plan.any_exit, Some(&plan.calls_and_madvise))?,
        })
    }

    /// What it saw, in words; `None`: nothing.
    fn saw(&self) -> io::Result<Option<String>> {
        let (calls, advice, execs) =
            (perf::read(&self.calls)?, perf::read(&self.advice)?, perf::read(&self.exec)?);
        // In this order: a call that begins meanwhile must not hide the end of another.
        let (begun, ended) = (perf::read(&self.madvise)?, perf::read(&self.ends)?);
        if (calls, advice, execs) == (0, 0, 0) && ended <= begun {
            return Ok(None);
        }
        Ok(Some(format!(
            "{calls} calls, {advice} times advice and {execs} new names in thread {}, and {begun} advised while {ended} ended",
            self.tid
        )))
    }
}

/// Counts, in some processes and what comes from them, what can change the flags of memory.
///
/// To drop it takes one of the kernel's grace periods, some 100 ms, which a thread of its own waits for.
#[derive(Debug)]
pub(crate) struct Witness {
    threads: Vec<Thread>,
}

impl Witness {
    /// Watches these processes from now on.
    pub(crate) fn open(pids: &[i32]) -> Result<Self, NoWitness> {
        let low_break = any_low_break(pids)?;
        let plan = Plan::new(low_break)?;
        let mut witness = Self { threads: Vec::new() };
        let mut watched = BTreeSet::new();
        let mut last = BTreeSet::new();
        let limit = MAX_THREADS.min(room());
        for _ in 0..LISTINGS {
            let now = tasks(pids)?;
            let new: Vec<i32> = now.difference(&watched).copied().collect();
            if watched.len() + new.len() > limit {
                return Err(NoWitness::Threads(limit));
            }
            for tid in new {
                match Thread::open(tid, &plan) {
                    Ok(thread) => witness.threads.push(thread),
                    // It has ended, and what it created is in the next list.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(error) => return Err(NoWitness::Counter(tid, error)),
                }
                watched.insert(tid);
            }
            if now == last {
                for &pid in pids {
                    no_io_uring(pid)?;
                }
                // Only a call that is counted now can move it.
                if any_low_break(pids)? != low_break {
                    return Err(NoWitness::Restless);
                }
                return Ok(witness);
            }
            last = now;
        }
        Err(NoWitness::Restless)
    }

    /// What was seen until now; `None`: nothing. An answer for good if all that it watches stands still.
    pub(crate) fn saw(&self) -> Option<String> {
        self.threads.iter().find_map(|thread| match thread.saw() {
            Ok(seen) => seen,
            Err(error) => Some(format!("the counters of thread {} cannot be read: {error}", thread.tid)),
        })
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut self.threads);
        if !threads.is_empty() {
            // Should there be no thread, they are closed here, with what could not be started.
            let _ = std::thread::Builder::new().name("witness".to_owned()).spawn(move || drop(threads));
        }
    }
}

/// All threads of these processes; without those of a process that is gone.
fn tasks(pids: &[i32]) -> Result<BTreeSet<i32>, NoWitness> {
    let mut tids = BTreeSet::new();
    for &pid in pids {
        let folder = match fs::read_dir(format!("/proc/{pid}/task")) {
            Ok(folder) => folder,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(NoWitness::Proc(pid, error)),
        };
        for entry in folder {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if gone(&error) => break,
                Err(error) => return Err(NoWitness::Proc(pid, error)),
            };
            tids.extend(entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
        }
    }
    Ok(tids)
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Threads that this process has descriptors for: half of what is left of its limit may be taken.
fn room() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64;
    let free = limit.map_or(u64::MAX, |limit| limit.saturating_sub(open));
    usize::try_from(free / 2).unwrap_or(usize::MAX) / COUNTERS
}

/// The fields of `/proc/.../stat` behind the name, from the third (`state`) on; `None` if it is gone.
fn stat(pid: i32, path: &str) -> Result<Option<Vec<String>>, NoWitness> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let fields = text.rsplit_once(") ").map_or("", |(_, fields)| fields);
            Ok(Some(fields.split_ascii_whitespace().map(str::to_owned).collect()))
        }
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(NoWitness::Proc(pid, error)),
    }
}

/// The number in field `field` (`proc_pid_stat(5)` counts from one).
fn number(pid: i32, fields: &[String], field: usize) -> Result<u64, NoWitness> {
    fields.get(field - 3).and_then(|text| text.parse().ok()).ok_or_else(|| {
        NoWitness::Proc(pid, io::Error::new(io::ErrorKind::InvalidData, format!("no field {field} in stat")))
    })
}

/// Whether the break of any of these processes is where a 32-bit call can move it.
fn any_low_break(pids: &[i32]) -> Result<bool, NoWitness> {
    const START_BRK: usize = 47;
    for &pid in pids {
        if let Some(fields) = stat(pid, &format!("/proc/{pid}/stat"))?
            && number(pid, &fields, START_BRK)? < crate::areas::LOW
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An error if the process has one, or a thread of one.
fn no_io_uring(pid: i32) -> Result<(), NoWitness> {
    const FLAGS: usize = 9;
    /// `PF_IO_WORKER` of `linux/sched.h`.
    const IO_WORKER: u64 = 0x10;
    for tid in tasks(&[pid])? {
        if let Some(fields) = stat(pid, &format!("/proc/{pid}/task/{tid}/stat"))?
            && number(pid, &fields, FLAGS)? & IO_WORKER != 0
        {
            return Err(NoWitness::IoUring(pid));
        }
    }
    let folder = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(folder) => folder,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(NoWitness::Proc(pid, error)),
    };
    for entry in folder {
        let target = match entry.and_then(|entry| fs::read_link(entry.path())) {
            Ok(target) => target,
            // Closed meanwhile.
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(NoWitness::Proc(pid, error)),
        };
        if target.as_os_str() == "anon_inode:[io_uring]" {
            return Err(NoWitness::IoUring(pid));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_tracepoints_are_found_without_a_mount_that_others_see() {
        let before = fs::read_to_string("/proc/self/mounts").unwrap();
        let own = Tracepoints(Tracepoints::mount().expect("as root, on Linux 5.2 or later"));
        let name = "raw_syscalls/sys_enter";
        assert_eq!(own.number(name).unwrap(), Tracepoints::open().unwrap().number(name).unwrap());
        assert!(own.number("raw_syscalls/no_such").is_err());
        assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), before);
    }
}
