//! `pageferry check`: what this machine can do, by trying.

use super::arguments::CheckVerb;
use super::failure::REFUSED;
use super::render::table;
use pageferry_criu_glue::{Criu, check};
use pageferry_tracker::probe::Kernel;
use serde::Serialize;
use std::process::Command;

/// The argument by which this program is the process that is dumped and restored.
pub(super) const SUBJECT: &str = "__check-subject";

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    ok: bool,
    /// A migration cannot do without it.
    needed: bool,
    detail: String,
}

#[derive(Debug, Serialize)]
struct Answer {
    ok: bool,
    tracker: Option<String>,
    hide: Option<&'static str>,
    checks: Vec<Line>,
}

/// Runs the verb.
pub(super) fn run(verb: &CheckVerb) -> anyhow::Result<u8> {
    let answer = look(verb);
    let text = if verb.json { format!("{}\n", serde_json::to_string(&answer)?) } else { describe(&answer) };
    super::print(text.as_bytes())?;
    Ok(if answer.ok { 0 } else { REFUSED })
}

fn look(verb: &CheckVerb) -> Answer {
    let mut checks = Vec::new();
    let root = nix::unistd::geteuid().is_root();
    let detail = if root { "this is root" } else { "run it as root: tracking and CRIU are privileged" };
    checks.push(Line { name: "privileges", ok: root, needed: true, detail: detail.to_owned() });

    let kernel = Kernel::probe();
    for (name, feature) in [
        ("soft-dirty", &kernel.soft_dirty),
        ("soft-dirty-scan", &kernel.scan_soft_dirty),
        ("userfaultfd", &kernel.uffd_wp_async),
        ("pagemap-scan", &kernel.pagemap_scan),
    ] {
        checks.push(Line { name, ok: feature.works, needed: false, detail: feature.reason.clone() });
    }
    let tracker = match kernel.choose(None) {
        Ok((kind, _)) => {
            checks.push(Line {
                name: "tracker",
                ok: true,
                needed: true,
                detail: format!("{kind} will be used"),
            });
            Some(kind.to_string())
        }
        Err(error) => {
            let detail = error.to_string();
            checks.push(Line { name: "tracker", ok: false, needed: true, detail });
            None
        }
    };

    let mut works = (false, false, false);
    match Criu::find(verb.criu.as_deref()) {
        Err(error) => {
            checks.push(Line { name: "criu", ok: false, needed: true, detail: chain(&error) });
        }
        Ok(_) if !root => {
            let detail = "not tried without root".to_owned();
            checks.push(Line { name: "criu", ok: false, needed: true, detail });
        }
        Ok(criu) => {
            let subject = || {
                let mut command = Command::new("/proc/self/exe");
                command.arg(SUBJECT);
                command
            };
            for check in check::by_trying(&criu, subject) {
                match check.name {
                    "dump-restore" => works.0 = check.ok,
                    "shim" => works.1 = check.ok,
                    "synthetic-parent" => works.2 = check.ok,
                    _ => {}
                }
                let needed = matches!(check.name, "criu" | "dump-restore");
                checks.push(Line { name: check.name, ok: check.ok, needed, detail: check.detail });
            }
        }
    }
    let (dump, shim, parent) = works;
    let hide = match (shim, parent) {
        (true, _) => Some("shim"),
        (false, true) => Some("synthetic-parent"),
        (false, false) => None,
    };
    Answer { ok: root && tracker.is_some() && dump && hide.is_some(), tracker, hide, checks }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn describe(answer: &Answer) -> String {
    let rows = answer.checks.iter().map(|line| {
        let mark = match (line.ok, line.needed) {
            (true, _) => "yes",
            (false, true) => "NO",
            (false, false) => "no",
        };
        vec![line.name.to_owned(), mark.to_owned(), line.detail.trim_end().replace('\n', "\n    ")]
    });
    let mut text = table(&["what", "works", "seen"], &[], rows);
    text.push('\n');
    text += match answer.ok {
        true => "This machine can send and receive programs.\n",
        false => {
            "This machine cannot migrate programs: see the lines that say NO. tools/setup installs what is missing.\n"
        }
    };
    text
}
