//! What is put in place beside the faults while the program runs, and in which order.
//!
//! 1. Around pages that the program goes through one after the other: it will want those next.
//! 2. What was sent more than once, the latest first: what was written lately will be touched again soon. In the store these pages lie
//!    scattered among the others, because they took the places of what they replaced; with them gone, the others empty its
//!    memory piece by piece, in their order.
//! 3. The rest, in the order of its addresses.

use super::{Put, Worker};
use crate::destination::serve::error::ServeError;
use crate::destination::serve::latest::Found;
use pageferry_wire_format::PageNo;

impl Worker {
    /// One piece of it, of each task.
    pub(super) fn fill(&mut self) {
        let mut near = false;
        for at in 0..self.views.len() {
            if let Some(piece) = self.views[at].next_near() {
                near = true;
                if !self.put_in_order(at, piece.origin, piece.start, piece.len) {
                    return;
                }
            }
        }
        if near || self.fill_latest() {
            return;
        }
        for at in 0..self.views.len() {
            if let Some(piece) = self.views[at].next() {
                if !self.put_in_order(at, piece.origin, piece.start, piece.len) {
                    return;
                }
            } else if self.views[at].pending.pages() > 0 {
                let lost = self.views[at].pending.next(0, u64::MAX).unwrap_or(0);
                self.fail(ServeError::Lost { space: self.views[at].space, page: PageNo(lost) });
            }
        }
    }

    /// The next of what was sent more than once. Whether there is more of it.
    fn fill_latest(&mut self) -> bool {
        let Some(mut latest) = self.latest.take() else { return false };
        match latest.next(self) {
            Found::Nothing => return false,
            Found::Later => {}
            Found::Pages { view, origin, run } => {
                // Who knows no place for it finds that out when it is its turn by address.
                let Some((page, together)) = self.views[view].map.find(origin) else { return false };
                self.put_in_order(view, origin, page, run.min(together));
            }
        }
        self.latest = Some(latest);
        true
    }

    /// Puts pages in place that nobody waits for. Whether the views are still the same ones.
    fn put_in_order(&mut self, at: usize, origin: u64, page: u64, most: u64) -> bool {
        match self.put_briefly(at, origin, page, most) {
            Put::Done(_) | Put::Events | Put::Waits => true,
            Put::NotRegistered => {
                // No unread event (that would be `Events`), and nothing there waits for pages: a child that was
                // forked without this memory (MADV_DONTFORK), or memory that a call without an event took away.
                self.views[at].pending.remove(origin);
                self.release(self.views[at].space, &[origin]);
                self.stats.vanished += 1;
                tracing::warn!(space = self.views[at].space.0, page, "a page's memory is gone");
                true
            }
            Put::Gone => {
                self.drop_view(at);
                false
            }
            Put::Failed(error) => {
                self.fail(error);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Command;
    use super::*;
    use crate::destination::late::Late;
    use crate::destination::serve::Status;
    use crate::destination::serve::tests::{SPACE, send, together};
    use crate::destination::store::{PageRef, PageStore};
    use crate::destination::sys::test_memory::{TestMemory, new_uffd};
    use pageferry_tracker::uffd::Uffd;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    #[test]
    fn what_was_sent_again_goes_before_the_rest_and_what_is_near_before_both() {
        let _guard = together();
        let memory = TestMemory::map(4096);
        let first = memory.first_page();
        let mut store = PageStore::new(None, None).unwrap();
        send(&mut store, memory, 0, 0..4096, 1);
        send(&mut store, memory, 1, 3000..3003, 1);
        send(&mut store, memory, 2, 2000..2002, 1);
        let uffd = new_uffd();
        memory.register(&uffd);
        let (commands, receiver) = channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let late = Arc::new(Late::new(0, Duration::from_secs(30)));
        let (store, status) = (Arc::new(Mutex::new(store)), Arc::<Status>::default());
        let mut worker = Worker::new(Arc::clone(&store), status, receiver, wake, late);
        commands.send(Command::Add { space: SPACE, uffd: Uffd::from_fd(uffd) }).unwrap();
        worker.obey();
        let mut so_far = Vec::new();
        let mut next = |worker: &mut Worker| {
            worker.fill();
            let store = store.lock().unwrap();
            let there = |page: &u64| store.page(SPACE, PageNo(first + page)) == Some(PageRef::Delivered);
            let all: Vec<u64> = (0..4096).filter(there).collect();
            let new = all.iter().copied().filter(|page| !so_far.contains(page)).collect::<Vec<_>>();
            so_far = all;
            new
        };
        assert_eq!(next(&mut worker), [2000, 2001]);
        worker.views[0].locality.waited(first + 1);
        assert_eq!(next(&mut worker), [3000, 3001, 3002], "one wait says nothing of its neighbours");
        worker.views[0].locality.waited(first + 2);
        let near = next(&mut worker);
        let from = |page: u64| (first + page) / 64;
        assert!(!near.is_empty() && near.iter().all(|page| from(*page) == from(2)), "{near:?}");
        while worker.views[0].next_near().is_some() {
            worker.fill();
        }
        // Then in the order of addresses.
        let mut last = 0;
        while worker.views[0].pending.pages() > 0 {
            let some = next(&mut worker);
            let some = some.iter().filter(|page| from(**page) != from(2));
            for page in some {
                assert!(*page >= last, "{page} after {last}");
                last = *page;
            }
        }
        drop(commands);
    }
}
