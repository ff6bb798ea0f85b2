//! The absences that docs/ARCHITECTURE.md promises, read from the manifests and the sources.

use std::fs;
use std::path::{Path, PathBuf};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the engine lies in the workspace").to_owned()
}

fn sources(room: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&top().join(room), &mut paths);
    assert!(!paths.is_empty(), "{room} has no sources: the check would check nothing");
    paths
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(top()).expect("below the top").display().to_string();
            (name, fs::read_to_string(&path).expect("a readable source"))
        })
        .collect()
}

/// Lines of code without comments, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter_map(|(n, line)| {
        let line = line.split("//").next().unwrap_or("");
        (!line.trim().is_empty()).then_some((n + 1, line))
    })
}

fn forbid(room: &str, words: &[&str], except: impl Fn(&str) -> bool, why: &str) {
    let mut found = Vec::new();
    for (name, text) in sources(room) {
        if except(&name) {
            continue;
        }
        for (line, code) in code(&text) {
            if let Some(word) = words.iter().find(|word| code.contains(*word)) {
                found.push(format!("{name}:{line}: {word}"));
            }
        }
    }
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

fn manifest(krate: &str) -> String {
    let text = fs::read_to_string(top().join(krate).join("Cargo.toml")).expect("a manifest");
    // Tests may use what they like.
    text.split("[dev-dependencies]").next().expect("at least one part").to_owned()
}

#[test]
fn the_leaves_do_not_know_each_other() {
    for leaf in ["wire-format", "tracker", "criu-glue"] {
        let manifest = manifest(leaf);
        let own = format!("pageferry-{leaf}");
        for other in
            ["pageferry-wire-format", "pageferry-tracker", "pageferry-criu-glue", "pageferry.workspace"]
        {
            assert!(
                other == own || !manifest.lines().any(|line| line.starts_with(other)),
                "{leaf} depends on {other}"
            );
        }
    }
}

#[test]
fn nothing_runs_on_an_async_runtime() {
    for krate in ["wire-format", "tracker", "criu-glue", "engine", "benches"] {
        for runtime in ["tokio", "async-std", "smol", "futures"] {
            assert!(!manifest(krate).lines().any(|l| l.starts_with(runtime)), "{krate} depends on {runtime}");
        }
    }
}

#[test]
fn the_wire_format_does_no_io_and_reads_no_clock() {
    forbid(
        "wire-format/src",
        &["std::fs", "std::net", "std::thread", "Instant::now", "SystemTime", "std::env"],
        |_| false,
        "wire-format turns bytes into meaning and nothing else",
    );
}

#[test]
fn policies_and_machines_read_no_clock() {
    let clock = &["Instant::now", "SystemTime", "thread::sleep"];
    forbid("engine/src/policy", clock, |_| false, "time is a parameter of a policy");
    forbid("engine/src/model", clock, |_| false, "a model has a time of its own");
    forbid(
        "engine/src/source",
        clock,
        |name| !name.ends_with("machine.rs"),
        "time is a parameter of a machine",
    );
    forbid(
        "engine/src/link",
        clock,
        |name| !name.ends_with("shaper.rs"),
        "time is a parameter of the shaper",
    );
    for room in ["tracker/src/working_set", "tracker/src/recording"] {
        forbid(room, clock, |_| false, "a replay must give the answers that the run gave");
    }
}

/// Somebody may set it, and a machine may be started with a wrong one: no limit and no decision goes by it.
#[test]
fn the_time_of_day_is_written_down_and_decides_nothing() {
    for room in ["engine/src", "tracker/src", "criu-glue/src", "wire-format/src"] {
        forbid(
            room,
            &["SystemTime", "ClockId::Realtime", "UNIX_EPOCH"],
            |name| name.ends_with("journal/mod.rs") || name.ends_with("cli/track/mod.rs"),
            "limits are of the monotonic clock",
        );
    }
}

#[test]
fn the_tracker_knows_no_frames_and_criu_glue_no_rounds() {
    forbid(
        "tracker/src",
        &["Frame", "PageBatch", "TcpStream"],
        |_| false,
        "the tracker knows one process tree",
    );
    forbid(
        "criu-glue/src",
        &["RoundEnd", "RoundPolicy", "PageBatch", "Collected"],
        |_| false,
        "criu-glue does not know that rounds exist",
    );
}

#[test]
fn unsafe_lives_in_sys_rooms() {
    for room in ["wire-format", "tracker", "criu-glue", "engine", "benches"] {
        forbid(
            room,
            &["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"],
            |name| name.contains("/sys/") || name.ends_with("/sys.rs") || name.ends_with("layering.rs"),
            "unsafe code outside of a sys room",
        );
    }
}

#[test]
fn libraries_never_print() {
    let print = &["println!", "print!(", "eprint", "dbg!"];
    for room in ["wire-format/src", "tracker/src", "criu-glue/src"] {
        forbid(room, print, |_| false, "only the command line and the benches print");
    }
    forbid(
        "engine/src",
        print,
        |name| name.contains("/cli/") || name.ends_with("main.rs"),
        "only the command line and the benches print",
    );
}

#[test]
fn rooms_are_named_for_what_they_hold() {
    for krate in ["wire-format", "tracker", "criu-glue", "engine", "benches"] {
        for (name, text) in sources(krate) {
            for part in name.trim_end_matches(".rs").split('/') {
                assert!(
                    !["util", "utils", "common", "helpers", "helper", "misc", "types"].contains(&part),
                    "{name}: a room without a purpose in its name"
                );
            }
            assert!(text.lines().count() <= 700, "{name} is longer than 700 lines: perhaps it is two rooms");
        }
    }
}
