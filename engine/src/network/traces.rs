//! What a destination does to its machine's network, written down while it lasts, so that an engine that died leaves nothing
//! for good: the next one that starts here takes it away.
//!
//! The source needs none of this: its rules end with its process, and its address goes with the commit only.

use super::ground::Place;
use super::netlink::Netlink;
use super::{NetworkError, addresses, filter};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where it is written down. Of this start of the machine, like what it is about.
const FOLDER: &str = "/run/pageferry-network";
/// What the names of all tables and traces begin with.
const PREFIX: &str = "pageferry-";
/// The line behind the addresses that are to stay.
const KEPT: &str = "kept";

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    address: IpAddr,
    prefix: u8,
    device: String,
}

/// The name of a session's tables and trace.
pub(crate) fn name(session: u128) -> String {
    format!("{PREFIX}{:016x}", (session >> 64) as u64)
}

/// What is being done. While this lives its file is locked, by which others see that its engine lives.
#[derive(Debug)]
pub(crate) struct Trace {
    path: PathBuf,
    file: File,
}

impl Trace {
    /// Writes down, before it is done, that these addresses will be here and that there will be tables of this name.
    pub(crate) fn write(name: &str, places: &[Place]) -> Result<Self, NetworkError> {
        Self::write_in(Path::new(FOLDER), name, places).map_err(NetworkError::Trace)
    }

    fn write_in(folder: &Path, name: &str, places: &[Place]) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join(name);
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        // Whoever sees the file before it is locked finds nothing in it, and leaves it.
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let written: Vec<Written> = places
            .iter()
            .filter_map(|place| {
                let (device, _) = place.device.as_ref()?;
                Some(Written { address: place.address, prefix: place.prefix, device: device.clone() })
            })
            .collect();
        let mut line = serde_json::to_vec(&written)?;
        line.push(b'\n');
        file.write_all(&line)?;
        Ok(Self { path, file })
    }

    /// The program has come: the addresses stay.
    pub(crate) fn keep(&mut self) -> Result<(), NetworkError> {
        self.file.write_all(KEPT.as_bytes()).map_err(NetworkError::Trace)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a trace that is of no use any more is still there");
        }
    }
}

/// Takes away what engines that died have left on this machine, and says what that was.
pub(crate) fn clean() -> Vec<String> {
    clean_in(Path::new(FOLDER), &mut |name, written, kept| take_away(name, written, kept))
}

/// Takes away what a trace of this name says: which addresses, and whether they stay.
type TakeAway<'a> = &'a mut dyn FnMut(&str, Vec<Written>, bool) -> Result<String, NetworkError>;

fn clean_in(folder: &Path, take_away: TakeAway<'_>) -> Vec<String> {
    let mut said = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(name) =
            path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with(PREFIX))
        else {
            continue;
        };
        match abandoned(&path) {
            Ok(Some((written, kept))) => match take_away(name, written, kept) {
                Ok(text) => {
                    said.push(text);
                    let _ = fs::remove_file(&path);
                }
                Err(error) => tracing::warn!(%error, name, "what a dead engine left could not be taken away"),
            },
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, name, "what a dead engine left could not be read"),
        }
    }
    said
}

/// What stands in a trace that nobody holds.
fn abandoned(path: &Path) -> io::Result<Option<(Vec<Written>, bool)>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let Some((addresses, rest)) = text.split_once('\n') else {
        // Its writer came no further, or is about to: nothing was done.
        return Ok(None);
    };
    Ok(Some((serde_json::from_str(addresses)?, rest == KEPT)))
}

fn take_away(name: &str, written: Vec<Written>, kept: bool) -> Result<String, NetworkError> {
    let mut gone = Vec::new();
    let mut netlink = Netlink::addresses().map_err(NetworkError::List)?;
    for one in written.into_iter().filter(|_| !kept) {
        let Some(device) = addresses::device(&one.device).map_err(NetworkError::List)? else { continue };
        match addresses::delete(&mut netlink, device.index, one.address, one.prefix) {
            Ok(()) => gone.push(format!("the address {} of {}", one.address, one.device)),
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            Err(source) => {
                let (address, device) = (one.address, one.device);
                return Err(NetworkError::Remove { address, device, source });
            }
        }
    }
    // Last, as in any undoing: the address must not be there when its packets are let in.
    if filter::remove(name).map_err(NetworkError::Release)? {
        gone.push(format!("the rules {name}"));
    }
    let gone = if gone.is_empty() { "nothing but a note".to_owned() } else { gone.join(" and ") };
    Ok(format!("an engine that died had left {gone}, which has been taken away"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::addresses::Device;

    fn place() -> Place {
        let device = Some(("eth0".to_owned(), Device { index: 2, mac: [2; 6] }));
        Place { address: "10.0.0.9".parse().unwrap(), prefix: 24, device, owner: None }
    }

    fn clean(folder: &Path) -> Vec<(String, usize, bool)> {
        let mut found = Vec::new();
        clean_in(folder, &mut |name, written, kept| {
            found.push((name.to_owned(), written.len(), kept));
            Ok(String::new())
        });
        found
    }

    #[test]
    fn what_a_living_engine_does_is_left_alone_and_what_a_dead_one_left_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let trace = Trace::write_in(folder.path(), "pageferry-1", &[place()]).unwrap();
        assert_eq!(clean(folder.path()), []);
        // As if the process had been killed: the lock goes, the file stays.
        let Trace { file, .. } = &trace;
        rustix::fs::flock(file, FlockOperation::Unlock).unwrap();
        assert_eq!(clean(folder.path()), [("pageferry-1".to_owned(), 1, false)]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        std::mem::forget(trace);
    }

    #[test]
    fn addresses_that_stay_are_known_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let mut trace = Trace::write_in(folder.path(), "pageferry-2", &[place()]).unwrap();
        trace.keep().unwrap();
        rustix::fs::flock(&trace.file, FlockOperation::Unlock).unwrap();
        assert_eq!(clean(folder.path()), [("pageferry-2".to_owned(), 1, true)]);
        std::mem::forget(trace);
    }

    #[test]
    fn a_trace_ends_with_what_it_is_about() {
        let folder = tempfile::tempdir().unwrap();
        drop(Trace::write_in(folder.path(), "pageferry-3", &[place()]).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(clean(&folder.path().join("never made")), []);
    }
}
