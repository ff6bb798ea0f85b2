//! Migration by plain CRIU, as one would script it: dump to a tmpfs, copy the images, restore.
//!
//! Both sides run before anything is frozen and hand over to each other without delay, so that what is measured
//! is CRIU and the link.

use super::beside_this;
use super::child::{Running, output};
use super::hosts::{Host, Hosts};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

pub mod bare;
pub mod destination;
pub mod source;
pub mod xbzrle;

/// Longest time that one step takes here.
const LIMIT: Duration = Duration::from_secs(600);
/// Port of the destination.
const PORT: u16 = 7078;
/// Buffer for images on their way.
const BUFFER: usize = 1 << 20;
/// Longest name of an image file.
const NAME_LIMIT: usize = 255;

/// How long the steps took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// `criu dump`, from its start to its end.
    pub dump_us: u64,
    /// From the first byte on the link until the destination has everything.
    pub copy_us: u64,
    /// `criu restore`, from its start to its end.
    pub restore_us: u64,
    /// Bytes of all images.
    pub image_bytes: u64,
}

/// The CRIU to compare with, in the order in which pageferry looks.
///
/// # Errors
/// That there is none.
pub fn find_criu(explicit: Option<&Path>) -> anyhow::Result<PathBuf> {
    let known = [
        "/usr/local/lib/pageferry/criu/criu",
        "/usr/local/sbin/criu",
        "/usr/local/bin/criu",
        "/usr/sbin/criu",
        "/usr/bin/criu",
    ];
    let candidates = explicit.into_iter().chain(known.iter().map(Path::new).filter(|_| explicit.is_none()));
    let found = candidates.into_iter().find(|path| path.is_file());
    let found =
        found.context("there is no criu to compare with: run tools/setup, or name one with --criu")?;
    found.canonicalize().with_context(|| format!("looking for {}", found.display()))
}

/// Moves a process by plain CRIU.
///
/// # Errors
/// What failed, with the last words of both sides.
pub fn migrate(hosts: &Hosts, criu: &Path, pid: i32) -> anyhow::Result<Steps> {
    let program = beside_this("pageferry-bench")?.to_string_lossy().into_owned();
    let criu = criu.to_string_lossy().into_owned();
    let address = format!("{}:{PORT}", Host::Destination.address());
    // What the kernel can do is known to a criu that has run on its machine before: nobody waits for that every time.
    for host in [Host::Source, Host::Destination] {
        let mut look = hosts.exec(host, [criu.as_str(), "check", "--feature", "lazy_pages"]);
        // That a feature is missing is no failure.
        look.stdout(Stdio::null()).stderr(Stdio::null()).status().context("starting criu check")?;
    }
    // A host's /dev/shm is a tmpfs of its own.
    let images = "/dev/shm/pageferry-criu";
    let common = ["--criu", &criu, "--images", images];
    let receive = [program.as_str(), "criu-destination", "--listen", &address];
    let mut receiver = Running::start(
        "the destination of plain CRIU",
        &mut hosts.exec(Host::Destination, receive.iter().chain(&common)),
    )?;
    receiver.wait_line("listening", Duration::from_secs(30))?;
    let pid = pid.to_string();
    let send = [program.as_str(), "criu-source", "--pid", &pid, "--to", &address];
    let steps =
        output("the source of plain CRIU", &mut hosts.exec(Host::Source, send.iter().chain(&common)), LIMIT)
            .with_context(|| format!("the destination's last words:\n{}", receiver.last_words()))?;
    receiver.finish(LIMIT)?;
    serde_json::from_str(&steps).with_context(|| format!("the source of plain CRIU said {steps:?}"))
}

/// Writes one file to the link: name, length, content.
fn send_file(link: &mut impl Write, name: &str, content: &mut impl Read, len: u64) -> io::Result<()> {
    link.write_all(&[name.len() as u8])?;
    link.write_all(name.as_bytes())?;
    link.write_all(&len.to_le_bytes())?;
    let copied = pump(&mut content.take(len), link)?;
    if copied == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Takes one file's name and length from the link; `None` at the end.
fn receive_header(link: &mut impl Read) -> io::Result<Option<(String, u64)>> {
    let mut len = [0];
    link.read_exact(&mut len)?;
    if len[0] == 0 {
        return Ok(None);
    }
    let mut name = vec![0; usize::from(len[0])];
    link.read_exact(&mut name)?;
    let name = String::from_utf8(name).ok().filter(|name| !name.contains('/') && !name.starts_with('.'));
    let name = name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a file name that is none"))?;
    let mut bytes = [0; 8];
    link.read_exact(&mut bytes)?;
    Ok(Some((name, u64::from_le_bytes(bytes))))
}

/// Copies until the end of `from`; `io::copy` would use 8 KiB at a time.
fn pump(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(len) => {
                to.write_all(&buffer[..len])?;
                copied += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The end of one of criu's logs, for error texts.
fn log_tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// A directory that is removed with all that is in it.
struct Images(PathBuf);

impl Images {
    fn create(path: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir(path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("removing {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_go_over_the_link_and_names_stay_in_their_directory() {
        let mut link = Vec::new();
        send_file(&mut link, "pages-1.img", &mut &b"content"[..], 7).expect("send");
        link.push(0);
        let mut link = &link[..];
        assert_eq!(receive_header(&mut link).expect("header"), Some(("pages-1.img".to_owned(), 7)));
        let mut content = Vec::new();
        pump(&mut link.by_ref().take(7), &mut content).expect("content");
        assert_eq!(content, b"content");
        assert_eq!(receive_header(&mut link).expect("end"), None);
        for name in ["../x", "a/b", ".hidden"] {
            let mut link = vec![name.len() as u8];
            link.extend_from_slice(name.as_bytes());
            link.extend_from_slice(&[0; 8]);
            assert!(receive_header(&mut &link[..]).is_err(), "{name}");
        }
        assert!(send_file(&mut Vec::new(), "x", &mut &b"short"[..], 7).is_err());
    }
}
