//! Pages that outlive the migration: what the destination has kept from before, and what is kept here afterwards.

use super::failure::SendError;
use super::{Migration, Peer};
use crate::effort::CpuMeter;
use crate::kept::give_pages;
use crate::link::{ChannelError, Incoming};
use crate::observe::Event;
use pageferry_tracker::Collected;
use pageferry_wire_format::{ControlMessage, SpaceId};
use std::net::Shutdown;

impl Migration<'_> {
    /// The destination says what it has kept, if it has said that it did.
    pub(super) fn hear_of_kept(&mut self, announced: u64) -> Result<(), SendError> {
        let mut heard = 0;
        let mut more = announced > 0;
        while more {
            let batch = match self.channel().receive()? {
                Incoming::Digests(batch) if batch.space == SpaceId::KEPT => batch,
                Incoming::Control(ControlMessage::Ping { .. }) => continue,
                Incoming::Control(ControlMessage::Abort { code, detail }) => {
                    return Err(ChannelError::Aborted { code, detail }.into());
                }
                other => return Err(SendError::Protocol(format!("{other:?} instead of what it kept"))),
            };
            heard += batch.digests.len() as u64;
            if heard > announced {
                break;
            }
            let pages = batch.runs.iter().flat_map(pageferry_wire_format::PageRun::pages);
            for (page, content) in pages.zip(&batch.digests) {
                self.books().enter_kept(page, *content);
            }
            more = batch.more;
        }
        if heard != announced {
            return Err(SendError::Protocol(format!("{heard} digests of {announced} pages that it kept")));
        }
        self.report.kept_pages = announced;
        Ok(())
    }

    /// Notes what is to be kept: the pages of the frozen program.
    pub(super) fn note_what_to_keep(&mut self, collected: &Collected) {
        if self.store.is_some() {
            let spaces = collected.spaces.iter();
            self.to_keep = spaces.map(|scan| (scan.key.0, scan.populated.clone())).collect();
        }
    }

    /// Writes the pages of the program, which runs elsewhere by now and whose frozen copy is still here, into the store.
    /// That it fails changes nothing of the migration.
    pub(super) fn keep_pages(&mut self) {
        let Some(store) = &mut self.store else { return };
        if let (Some(channel), Peer::Receiver(_)) = (&self.channel, &self.peer) {
            // All was said; the destination must not wait for a disk here.
            let _ = channel.link().handle().map(|link| link.shutdown(Shutdown::Both));
        }
        // Nobody waits for this: the program runs there.
        let cpu = self.control.cpu();
        cpu.lift(false);
        let mut meter = CpuMeter::new(cpu);
        // Who gives the migration up now wants its end.
        let mut rest = || meter.pay(|| self.control.token().is_cancelled());
        let spaces = &self.spaces;
        let kept = store.refill(|take| {
            self.to_keep.iter().try_for_each(|(key, pages)| match spaces.get(key) {
                Some(space) => give_pages(&space.reader, pages.runs(), take, &mut rest),
                None => Ok(()),
            })
        });
        if let Err(error) = kept {
            let text = format!("the pages could not be kept: {}", error.chain());
            self.observer.event(&Event::Warning { text });
        }
    }
}
