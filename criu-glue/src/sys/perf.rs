//! Counters of tracepoints: as much of `perf_event_open(2)` as a [`crate::witness`] needs.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Of `linux/perf_event.h`.
const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FORMAT_TOTAL_TIME_ENABLED: u64 = 1 << 0;
const PERF_FORMAT_TOTAL_TIME_RUNNING: u64 = 1 << 1;
const DISABLED: u64 = 1 << 0;
const INHERIT: u64 = 1 << 1;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
const PERF_EVENT_IOC_ENABLE: libc::c_ulong = 0x2400;
const PERF_EVENT_IOC_SET_FILTER: libc::c_ulong = 0x4008_2406;

/// `struct perf_event_attr` as it was first (`PERF_ATTR_SIZE_VER0`), which every later kernel accepts.
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}
const _: () = assert!(size_of::<Attributes>() == 64);

/// A counter of one tracepoint in the thread `tid` and in all threads and processes that it creates from now on. It
/// does not count before [`enable`].
pub(crate) fn open(tid: i32, tracepoint: u64) -> io::Result<OwnedFd> {
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: tracepoint,
        sample_period: 0,
        sample_type: 0,
        read_format: PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING,
        flags: DISABLED | INHERIT,
        wakeup_events: 0,
        bp_type: 0,
        config1: 0,
    };
    let (any_cpu, no_group): (libc::c_int, libc::c_int) = (-1, -1);
    // SAFETY: the kernel reads `size` bytes of `attributes`, which lives through the call, and writes nothing but the
    // size it would accept, into the field of that name, when it accepts none.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            tid,
            any_cpu,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Counts from now on only what the filter (`Documentation/trace/events.rst`) lets through.
pub(crate) fn filter(counter: impl AsFd, filter: &CStr) -> io::Result<()> {
    let fd = counter.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `filter` to its final zero and keeps a copy.
    let result = unsafe { libc::ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Counts from now on: when this returns, also a thread that runs on another core is being counted.
pub(crate) fn enable(counter: impl AsFd) -> io::Result<()> {
    let fd = counter.as_fd().as_raw_fd();
    // SAFETY: takes an integer and touches no memory of ours.
    let result = unsafe { libc::ioctl(fd, PERF_EVENT_IOC_ENABLE, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What was counted; an error when the kernel did not count all of the time.
pub(crate) fn read(counter: impl AsFd) -> io::Result<u64> {
    let mut bytes = [0; 24];
    if rustix::io::read(counter, &mut bytes)? != bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let word = |i: usize| u64::from_ne_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
    let (count, enabled, running) = (word(0), word(1), word(2));
    if enabled != running {
        return Err(io::Error::other("the kernel did not count all of the time"));
    }
    Ok(count)
}
