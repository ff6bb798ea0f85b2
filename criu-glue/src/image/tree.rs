//! `pstree.img` and `core-N.img`: the tasks of the tree, their threads, and where the kernel writes into their
//! memory by itself.

use super::frame::{self, Messages};
use super::{ImageError, format};
use crate::image_dir::ImageDir;

/// One process of the dumped tree, in its own pid namespace's numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id.
    pub vpid: i32,
    /// Parent's process id, 0 for the root.
    pub parent: i32,
    /// Thread ids, the process id among them; of a zombie only that.
    pub threads: Vec<i32>,
}

/// A thread's `struct rseq`: the kernel rewrites its first words whenever the thread runs on another CPU, so its
/// bytes differ between a frozen source and what was restored from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RseqArea {
    /// Process id in its own namespace.
    pub vpid: i32,
    /// Thread id in its own namespace.
    pub tid: i32,
    /// Address of the area.
    pub address: u64,
    /// Its length in bytes.
    pub length: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TaskMessage {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    parent: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CoreMessage {
    #[prost(message, optional, tag = "5")]
    thread: Option<ThreadMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ThreadMessage {
    #[prost(message, optional, tag = "15")]
    rseq: Option<RseqMessage>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RseqMessage {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    length: u32,
}

/// The tasks of the dumped tree, the root first.
pub fn tasks(images: &ImageDir) -> Result<Vec<Task>, ImageError> {
    let name = "pstree.img";
    decode_tasks(&super::read(images, name)?).map_err(format(name))
}

fn decode_tasks(bytes: &[u8]) -> Result<Vec<Task>, super::FormatError> {
    let mut messages = Messages::new(bytes, &[frame::COMMON, frame::PSTREE])?;
    let number =
        |n: u32| i32::try_from(n).map_err(|_| super::FormatError::Value(format!("{n} is no process id")));
    let mut tasks = Vec::new();
    while let Some(message) = messages.next::<TaskMessage>()? {
        let vpid = number(message.pid)?;
        let threads = match &message.threads[..] {
            // The only one is the process itself. Of a zombie criu (up to 4.2 at least) writes another number there, which
            // was never given a value: `dump_zombies` fills in the process id and not the thread's.
            [_] => vec![vpid],
            all => all.iter().copied().map(number).collect::<Result<_, _>>()?,
        };
        tasks.push(Task { vpid, parent: number(message.parent)?, threads });
    }
    if tasks.is_empty() {
        return Err(super::FormatError::Missing("task"));
    }
    Ok(tasks)
}

/// The root's process id in its own namespace.
pub fn root_vpid(images: &ImageDir) -> Result<i32, ImageError> {
    Ok(tasks(images)?[0].vpid)
}

/// The rseq areas of all threads that have one.
pub fn rseq_areas(images: &ImageDir) -> Result<Vec<RseqArea>, ImageError> {
    let mut areas = Vec::new();
    for task in tasks(images)? {
        for &tid in &task.threads {
            let name = format!("core-{tid}.img");
            if let Some(rseq) = decode_rseq(&super::read(images, &name)?).map_err(format(&name))? {
                areas.push(RseqArea {
                    vpid: task.vpid,
                    tid,
                    address: rseq.address,
                    length: rseq.length.into(),
                });
            }
        }
    }
    Ok(areas)
}

fn decode_rseq(bytes: &[u8]) -> Result<Option<RseqMessage>, super::FormatError> {
    let core: CoreMessage = Messages::new(bytes, &[frame::COMMON, frame::CORE])?.one("core")?;
    Ok(core.thread.and_then(|t| t.rseq).filter(|r| r.address != 0 && r.length != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_tree() {
        let bytes = [
            0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50, 13, 0, 0, 0, 0x08, 0xac, 2, 0x10, 0, 0x18, 5,
            0x20, 5, 0x28, 0xac, 2, 0x28, 6,
        ];
        let mut bytes = bytes.to_vec();
        bytes[8] = (bytes.len() - 12) as u8;
        assert_eq!(decode_tasks(&bytes).unwrap(), [Task { vpid: 300, parent: 0, threads: vec![300, 6] }]);
        for end in 8..bytes.len() {
            assert!(decode_tasks(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn the_thread_of_a_zombie_is_the_process_whatever_criu_wrote() {
        for garbage in [6, 0, u32::MAX] {
            let mut bytes = frame::begin(&[frame::COMMON, frame::PSTREE]);
            frame::push(&mut bytes, &TaskMessage { pid: 300, parent: 1, threads: vec![garbage] });
            assert_eq!(decode_tasks(&bytes).unwrap(), [Task { vpid: 300, parent: 1, threads: vec![300] }]);
        }
    }

    #[test]
    fn golden_rseq() {
        let rseq = [0x08, 0x80, 0x20, 0x10, 32, 0x18, 7];
        let thread = [&[0x08, 0, 0x10, 0, 0x7a, rseq.len() as u8][..], &rseq].concat();
        let core = [&[0x08, 1, 0x2a, thread.len() as u8][..], &thread].concat();
        let mut bytes = frame::begin(&[frame::COMMON, frame::CORE]);
        bytes.extend((core.len() as u32).to_le_bytes());
        bytes.extend(core);
        let rseq = decode_rseq(&bytes).unwrap().unwrap();
        assert_eq!((rseq.address, rseq.length), (0x1000, 32));
    }
}
