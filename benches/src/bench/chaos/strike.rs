//! Finding what a fault is about, and ending it.

use super::super::hosts::{Host, Hosts};
use super::super::rss::find;
use super::Fault;
use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Where to find the processes of a run: by what nobody else has in their command lines.
#[derive(Debug)]
pub(super) struct Marks<'a> {
    pub(super) pageferry: &'a str,
    pub(super) workload: &'a str,
    /// Journal directories of both sides.
    pub(super) source: &'a str,
    pub(super) destination: &'a str,
    /// State file of the program.
    pub(super) state: &'a str,
}

/// Ends what the fault names; false when nothing of it is there any more.
pub(super) fn strike(fault: Fault, marks: &Marks<'_>, hosts: &Hosts) -> anyhow::Result<bool> {
    let engine = |journal| find(marks.pageferry, journal);
    let criu = |journal| engine(journal).and_then(criu_of);
    Ok(match fault {
        Fault::SourceEngine => kill(engine(marks.source)),
        Fault::DestinationEngine => kill(engine(marks.destination)),
        Fault::BothEngines => {
            let (source, destination) = (engine(marks.source), engine(marks.destination));
            let first = kill(source);
            kill(destination) && first
        }
        Fault::SourceCriu => kill(criu(marks.source)),
        Fault::DestinationCriu => kill(criu(marks.destination)),
        Fault::Target => {
            let mut struck = false;
            // At the destination it may be one more, being restored.
            while let Some(pid) = find(marks.workload, marks.state) {
                if !kill(Some(pid)) {
                    break;
                }
                struck = true;
                while Path::new(&format!("/proc/{pid}/exe")).exists() {
                    std::thread::yield_now();
                }
            }
            struck
        }
        Fault::Link => {
            link(hosts, "down")?;
            true
        }
    })
}

/// Takes the source's end of the link down or up.
pub(super) fn link(hosts: &Hosts, state: &str) -> anyhow::Result<()> {
    let script = format!(
        "ip link set $(ip -o link show type veth | sed 's/^[0-9]*: //; s/[@:].*//' | head -n 1) {state}"
    );
    let status = hosts.exec(Host::Source, ["sh", "-c", &script]).status().context("starting ip")?;
    anyhow::ensure!(status.success(), "the link could not be set {state}");
    Ok(())
}

fn kill(pid: Option<u32>) -> bool {
    let pid = pid.and_then(|pid| Pid::from_raw(pid as i32));
    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

/// The CRIU that an engine has started, nearest to it.
fn criu_of(engine: u32) -> Option<u32> {
    let mut seen = BTreeSet::new();
    let mut generation = vec![engine];
    while !generation.is_empty() {
        let children: Vec<u32> = generation.iter().flat_map(|&pid| children(pid)).collect();
        // Its first word may be the loader that started it.
        let is_criu = |pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains("criu")
        };
        if let Some(pid) = children.iter().copied().find(|pid| is_criu(pid)) {
            return Some(pid);
        }
        generation = children.into_iter().filter(|pid| seen.insert(*pid)).collect();
    }
    None
}

fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    found
}
