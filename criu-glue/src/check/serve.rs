//! Serves the memory of one restored process from a buffer: the smallest thing that a lazy restore needs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::PAGE_SIZE;
use crate::image::ImageError;
use crate::image::pagemap::{Pagemap, pages_name};
use crate::image_dir::ImageDir;
use crate::lazy::{LazyEvent, LazyListener};
use crate::service::poll_until;
use crate::sys::uffd::{self, Event};

/// The memory that is brought in late: what was hidden from the dump, and what is in criu's images, because of a
/// mapping that can be filled late the restorer takes nothing from its images.
pub(super) struct Memory {
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
    imaged: BTreeMap<u64, Vec<u8>>,
}

impl Memory {
    /// Memory of which nothing is known but where it begins.
    pub(super) fn at(address: u64) -> Self {
        Self { address, bytes: Vec::new(), imaged: BTreeMap::new() }
    }

    /// Learns the pages of a task from its images.
    pub(super) fn add_images(&mut self, images: &ImageDir, vpid: i32) -> Result<(), ImageError> {
        let pagemap = Pagemap::read(images, vpid)?;
        let name = pages_name(pagemap.pages_id);
        let bytes = images.read(&name).map_err(|source| ImageError::Io { name, source })?;
        let mut pages = bytes.chunks_exact(PAGE_SIZE as usize);
        for entry in pagemap.entries.iter().filter(|entry| entry.is_present()) {
            for (n, page) in (0..entry.pages).zip(&mut pages) {
                self.imaged.insert(entry.address + n * PAGE_SIZE, page.to_vec());
            }
        }
        Ok(())
    }

    fn page(&self, address: u64) -> Option<&[u8]> {
        let offset = address.checked_sub(self.address).and_then(|o| usize::try_from(o).ok());
        let hidden = offset.and_then(|o| self.bytes.get(o..o.checked_add(PAGE_SIZE as usize)?));
        hidden.or_else(|| self.imaged.get(&address).map(Vec::as_slice))
    }
}

/// How the serving went.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Tasks whose userfaultfd came.
    pub(super) tasks: usize,
    /// Faults answered with bytes of the buffer.
    pub(super) pages: u64,
    /// Faults answered with a zero page.
    pub(super) zeroes: u64,
}

/// Serves until criu has no more to say and `stop` is closed.
pub(super) fn serve(mut listener: LazyListener, memory: &Memory, stop: &OwnedFd) -> Result<Served, String> {
    let mut served = Served::default();
    let mut uffds: Vec<OwnedFd> = Vec::new();
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        scope.spawn(move || {
            loop {
                let event = listener.next().map_err(|e| e.to_string());
                // After `Restored` nothing comes but the end, and that only when the restore is over: waiting for it
                // here would have each side wait for the other.
                let last = matches!(event, Ok(LazyEvent::Restored | LazyEvent::End) | Err(_));
                if sender.send(event).is_err() || last {
                    break;
                }
            }
        });
        loop {
            while let Ok(event) = receiver.try_recv() {
                if let LazyEvent::Task { uffd, .. } = event? {
                    served.tasks += 1;
                    uffds.push(uffd);
                }
            }
            let mut polled: Vec<PollFd<'_>> = uffds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            polled.push(PollFd::new(stop, PollFlags::IN));
            // The channel has no descriptor, so it is looked at in between.
            let _ = poll_until(&mut polled, Instant::now() + Duration::from_millis(5))
                .map_err(|e| e.to_string())?;
            let stopped = polled.last().is_some_and(|p| !p.revents().is_empty());
            for uffd in &uffds {
                while let Some(event) = uffd::next_event(uffd).map_err(|e| e.to_string())? {
                    if let Event::Fault(address) = event {
                        answer(uffd, address & !(PAGE_SIZE - 1), memory, &mut served)
                            .map_err(|e| e.to_string())?;
                    }
                }
            }
            if stopped {
                return Ok(served);
            }
        }
    })
}

fn answer(fd: &OwnedFd, address: u64, memory: &Memory, served: &mut Served) -> io::Result<()> {
    let result = match memory.page(address) {
        Some(page) => {
            served.pages += 1;
            uffd::copy(fd, address, page)
        }
        None => {
            served.zeroes += 1;
            uffd::zero(fd, address, PAGE_SIZE)
        }
    };
    match result.as_ref().map_err(io::Error::raw_os_error) {
        // Two faults on one page; the task is gone.
        Err(Some(libc::EEXIST | libc::ESRCH | libc::ENOSPC)) => Ok(()),
        _ => result,
    }
}
