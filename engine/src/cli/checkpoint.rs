//! `pageferry checkpoint`: `pageferry migrate` into a directory, with what matters there.

use super::arguments::{Arguments, CheckpointVerb, Verb};
use super::migrate;
use clap::Parser;
use std::ffi::OsString;

/// Runs the verb.
pub(super) fn run(verb: &CheckpointVerb) -> anyhow::Result<u8> {
    // One place knows what an option means and what it is when it is not given: the command line of `migrate`.
    match Arguments::try_parse_from(as_migrate(verb))?.verb {
        Verb::Migrate(verb) => migrate::run(&verb),
        _ => unreachable!("the second word is migrate"),
    }
}

fn as_migrate(verb: &CheckpointVerb) -> Vec<OsString> {
    let mut to = OsString::from("dir:");
    to.push(&verb.to);
    let pid = verb.pid.to_string();
    let mut words: Vec<OsString> = ["pageferry", "migrate", "--pid", &pid, "--to"].map(OsString::from).into();
    words.push(to);
    let flags = [
        ("--keep-running", verb.keep_running),
        ("--incremental", verb.incremental),
        ("--verify", verb.verify),
        ("--shell-job", verb.shell_job),
        ("--json", verb.json),
        ("--quiet", verb.quiet),
    ];
    words.extend(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| OsString::from(flag)));
    let values = [
        ("--downtime", verb.downtime.as_ref().map(OsString::from)),
        ("--bandwidth", verb.bandwidth.as_ref().map(OsString::from)),
        ("--cpu", verb.cpu.as_ref().map(OsString::from)),
        ("--nice", verb.nice.map(|nice| OsString::from(nice.to_string()))),
        ("--tcp", verb.tcp.as_ref().map(OsString::from)),
        ("--report", verb.report.as_ref().map(|path| path.clone().into_os_string())),
        ("--criu", verb.criu.as_ref().map(|path| path.clone().into_os_string())),
    ];
    for (option, value) in values {
        // In one word: a value may begin with a dash.
        words.extend(value.map(|value| {
            let mut word = OsString::from(option);
            word.push("=");
            word.push(value);
            word
        }));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_checkpoint_is_said_of_the_migration() {
        let line = "pageferry checkpoint --pid 7 --to /srv/c --incremental --keep-running --bandwidth 1Gbit --nice 5 --cpu 50% \
                    --tcp close --report r.json --downtime 20ms";
        let Verb::Checkpoint(verb) = Arguments::try_parse_from(line.split_whitespace()).unwrap().verb else {
            panic!("another verb")
        };
        let Verb::Migrate(verb) = Arguments::try_parse_from(as_migrate(&verb)).unwrap().verb else {
            panic!("another verb")
        };
        assert_eq!((verb.pid, verb.to.as_str()), (7, "dir:/srv/c"));
        assert!(verb.incremental && verb.keep_running && verb.tcp.is_some() && verb.bandwidth.is_some());
        assert_eq!(verb.cpu.map(|percent| percent.0), Some(50));
        assert_eq!((verb.nice, verb.downtime.0.as_millis()), (5, 20));
        assert_eq!(verb.report.as_deref(), Some(std::path::Path::new("r.json")));
    }
}
