//! The command line, as people and programs meet it. Texts are snapshots: a change of them is meant.

use assert_cmd::Command;

fn pageferry(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("pageferry")
        .expect("the command is built with its tests")
        .args(arguments)
        .env("COLUMNS", "100")
        .env_remove("RUST_LOG")
        .timeout(std::time::Duration::from_secs(60))
        .output()
        .expect("it can be started");
    (
        output.status.code().expect("it ends by itself"),
        String::from_utf8(output.stdout).expect("text"),
        String::from_utf8(output.stderr).expect("text"),
    )
}

#[test]
fn help_texts() {
    for verb in [
        "check",
        "receive",
        "migrate",
        "control",
        "checkpoint",
        "restore",
        "recover",
        "inspect",
        "track",
        "predict",
        "simulate",
        "completions",
        "man",
    ] {
        let (code, out, err) = pageferry(&[verb, "--help"]);
        assert_eq!((code, err.as_str()), (0, ""), "{verb}");
        assert!(out.contains("Example:"), "{verb} shows an example");
        insta::assert_snapshot!(format!("help-{verb}"), out);
    }
    let (code, out, _) = pageferry(&["--help"]);
    assert_eq!(code, 0);
    insta::assert_snapshot!("help", out);
}

#[test]
fn wrong_command_lines_are_explained_and_exit_with_2() {
    for (arguments, says) in [
        (&["migrate"][..], "--pid <PID>"),
        (&["migrate", "--pid", "x", "--to", "127.0.0.1:1"], "invalid value 'x'"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--downtime", "100"], "the unit is missing"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--bandwidth", "5 parsecs"], "is not known"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--cpu", "half"], "write it like 50%"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--cpu", "0%"], "write it like 50%"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--max-rounds", "0"], "at least 1"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--engine-memory", "8MiB"], "it needs 34 MiB"),
        (&["receive", "--engine-memory", "8MiB"], "it needs 26 MiB"),
        (&["receive", "--cpu", "0%"], "write it like 50%"),
        (&["receive", "--nice", "20"], "20 is no nice value to copy at"),
        (&["control", "--pid", "5", "cpu", "much"], "write it like 50%"),
        (&["migrate", "--pid", "-5", "--to", "127.0.0.1:1"], "-5 is not a process id"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:0"], "has no port"),
        (&["migrate", "--pid", "5", "--to", "no such host"], "is no receiver"),
        (&["migrate", "--pid", "5", "--to", "file:"], "names no path"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--keep-running"], "file:PATH or dir:PATH"),
        (&["migrate", "--pid", "5", "--to", "127.0.0.1:1", "--nice", "20"], "0 to 19"),
        (&["control", "status"], "--pid <PID>"),
        (&["control", "--pid", "5"], "Usage: pageferry control"),
        (&["control", "--pid", "5", "bandwidth", "fast"], "number is missing"),
        (&["receive", "--listen", "here"], "is no address to listen on"),
        (&["receive", "--listen", "0.0.0.0:0"], "--insecure"),
        (&["receive", "--memory-limit", "lots"], "number is missing"),
        (&["track"], "--pid PID"),
        (&["track", "--pid", "5", "--interval", "10us"], "1ms or more"),
        (&["track", "--pid", "5", "--plot", "x.svg"], "--replay"),
        (&["track", "--pid", "5", "--json", "--csv", "-"], "standard output"),
        (&["track", "--pid", "5", "--", "ls"], "cannot be used with"),
        (&["predict"], "--pid <PID>"),
        (&["predict", "--pid", "5", "--bandwidth", "fast"], "number is missing"),
        (&["simulate"], "--trace <FILE>"),
        (&["simulate", "--trace", "x", "--again-ratio", "1.5"], "from 0 to 1"),
        (&["simulate", "--trace", "x", "--page-time", "12"], "unit"),
        (&["simulate", "--trace", "x", "--policy", "fixed:0"], "is not a number of rounds"),
        (&["ferry"], "unrecognized subcommand"),
    ] {
        let (code, out, err) = pageferry(arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(says), "{arguments:?} should say {says:?}:\n{err}");
    }
}

#[test]
fn processes_that_cannot_move_are_refused_with_the_reason() {
    if !nix::unistd::geteuid().is_root() {
        let (code, _, err) = pageferry(&["migrate", "--pid", "1", "--to", "127.0.0.1:1"]);
        assert_eq!(code, 3);
        assert!(err.contains("needs root") && err.contains("run it as root"), "{err}");
        return;
    }
    let own = std::process::id().to_string();
    for (pid, says) in [
        ("2147483647", "there is no process"),
        ("2", "kernel thread"),
        (own.as_str(), "this program itself, or one that it descends from"),
    ] {
        // In a pid namespace of its own there is no process 2 that is a kernel thread.
        if pid == "2" && !std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd")
        {
            continue;
        }
        let (code, out, err) = pageferry(&["migrate", "--pid", pid, "--to", "127.0.0.1:1"]);
        assert_eq!((code, out.as_str()), (3, ""), "{err}");
        assert!(err.contains(says), "{err}");
        assert!(err.contains("the program: running at the source"), "{err}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_found_out_first() {
    let (code, _, err) = pageferry(&[
        "migrate",
        "--pid",
        "2147483647",
        "--to",
        "127.0.0.1:1",
        "--report",
        "/no/such/folder/r",
    ]);
    assert_eq!(code, 3);
    assert!(err.contains("/no/such/folder/r cannot be written"), "{err}");
}

#[test]
fn a_migration_that_is_not_there_is_not_controlled() {
    let nobodys = [&["--pid", "2147483647"][..], &["--receiver", "1"], &["--socket", "/no/such/socket"]];
    for arguments in nobodys {
        for what in [&["status"][..], &["pause"], &["bandwidth", "none"]] {
            let (code, out, err) = pageferry(&[&["control"], arguments, what, &["--json"]].concat());
            assert_eq!((code, out.as_str()), (3, ""), "{err}");
            // Of another user's directory it cannot be known.
            assert!(err.contains("no engine answers") || err.contains("not allowed"), "{err}");
            assert!(err.contains("  try: "), "{err}");
        }
    }
}

#[test]
fn a_missing_criu_is_named_with_what_to_do() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (code, _, err) = pageferry(&["receive", "--listen", "127.0.0.1:0", "--criu", "/no/such/criu"]);
    assert_eq!(code, 3);
    assert!(err.contains("/no/such/criu") && err.contains("pageferry check"), "{err}");
}

#[test]
fn check_speaks_json_with_a_verdict() {
    let (code, out, err) = pageferry(&["check", "--json"]);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"));
    let ok = answer["ok"].as_bool().expect("a verdict");
    assert_eq!(code, if ok { 0 } else { 3 });
    assert!(answer["checks"].as_array().is_some_and(|checks| checks.len() >= 5));
}

#[test]
fn completions_and_manual_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = pageferry(&["completions", shell]);
        assert!(code == 0 && out.contains("pageferry"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, _, err) = pageferry(&["man", "--dir", dir.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
    assert!(dir.path().join("pageferry-migrate.1").exists());
}
