//! The other end of a lazy restore: gives every restored task its memory, from what was read before.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libtest_mimic::Failed;
use pageferry_criu_glue::image::pagemap::{Pagemap, pages_name};
use pageferry_criu_glue::{ImageDir, LazyEvent, LazyListener, PAGE_SIZE};

use crate::uffd::{self, Event};

/// Page number to bytes.
pub type Pages = HashMap<u64, Vec<u8>>;

/// The memory of all tasks, by their pid.
#[derive(Default)]
pub struct Server {
    pub memory: HashMap<i32, Pages>,
    uffds: Mutex<Vec<(i32, OwnedFd)>>,
    stop: AtomicBool,
}

impl Server {
    /// The same memory for another restore.
    pub fn again(&self) -> Self {
        Self { memory: self.memory.clone(), ..Self::default() }
    }

    /// Adds what criu did put in its images: the restorer ignores it in areas that can be filled late.
    pub fn add_images(&mut self, images: &ImageDir) -> Result<(), Failed> {
        for (&vpid, pages) in &mut self.memory {
            let pagemap = Pagemap::read(images, vpid)?;
            let bytes = images.read(&pages_name(pagemap.pages_id))?;
            let mut bytes = bytes.chunks_exact(PAGE_SIZE as usize);
            for entry in pagemap.entries.iter().filter(|e| e.is_present()) {
                for (n, page) in (0..entry.pages).zip(&mut bytes) {
                    pages.entry(entry.address / PAGE_SIZE + n).or_insert_with(|| page.to_vec());
                }
            }
        }
        Ok(())
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Takes in the tasks. Returns how many came, and whether criu said that all are restored.
    pub fn accept(&self, mut listener: LazyListener) -> (usize, bool) {
        let (mut tasks, mut restored) = (0, false);
        loop {
            match listener.next() {
                Ok(LazyEvent::Task { vpid, uffd }) => {
                    tasks += 1;
                    self.uffds.lock().expect("nobody panicked").push((vpid, uffd));
                }
                Ok(LazyEvent::Restored) => restored = true,
                Ok(LazyEvent::Exited { .. }) => {}
                Ok(LazyEvent::End) | Err(_) => return (tasks, restored),
            }
        }
    }

    /// Puts everything in place at once, as can be done when nothing runs yet. (`/proc/PID/mem` cannot wait for a
    /// page: reading one that is not there yet is EIO.)
    pub fn fill(&self) -> Result<(), Failed> {
        for (vpid, fd) in self.uffds.lock().expect("nobody panicked").iter() {
            for (page, bytes) in self.memory.get(vpid).into_iter().flatten() {
                match uffd::copy(fd, page * PAGE_SIZE, bytes) {
                    // There already; or in an area that criu fills itself.
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)) => {}
                    done => done?,
                }
            }
        }
        Ok(())
    }

    /// Answers faults until [`Self::stop`].
    pub fn serve(&self) -> Result<(), Failed> {
        while !self.stop.load(Ordering::Acquire) {
            for (vpid, fd) in self.uffds.lock().expect("nobody panicked").iter() {
                while let Some(event) = uffd::next_event(fd)? {
                    let Event::Fault(address) = event else { continue };
                    let page = address / PAGE_SIZE;
                    let bytes = self.memory.get(vpid).and_then(|pages| pages.get(&page));
                    let done = match bytes {
                        Some(bytes) => uffd::copy(fd, page * PAGE_SIZE, bytes),
                        None => uffd::zero(fd, page * PAGE_SIZE, PAGE_SIZE),
                    };
                    match done.as_ref().map_err(std::io::Error::raw_os_error) {
                        Err(Some(libc::EEXIST | libc::ESRCH | libc::ENOSPC)) => {}
                        _ => done?,
                    }
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}
