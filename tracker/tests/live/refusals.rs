//! Who cannot be tracked is told so, and why.

use crate::Case;
use crate::subject::Subject;
use pageferry_tracker::{OpenError, Target, Tracker, TrackerKind, TreeState};
use std::error::Error;

pub const CASES: &[Case] = &[
    ("not_targets", not_targets),
    ("who_has_a_debugger_already", who_has_a_debugger_already),
    ("who_has_lost_its_first_thread", who_has_lost_its_first_thread),
];

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn not_targets(_kind: TrackerKind) {
    let ours = std::process::id() as i32;
    let error = Target::open(ours).expect_err("ourselves");
    assert!(matches!(error, OpenError::Ourselves(pid) if pid == ours), "{error}");
    let parent = std::os::unix::process::parent_id() as i32;
    let error = Target::open(parent).expect_err("who waits for us");
    assert!(matches!(error, OpenError::Ourselves(_)), "{error}");
    let error = Target::open(i32::MAX).expect_err("nobody");
    assert!(error.to_string().contains("there is no process"), "{error}");
    // The kernel's own are to be seen only where the first process is init.
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        let error = Target::open(2).expect_err("a kernel thread");
        assert_eq!(error.to_string(), "process 2 (kthreadd) is a kernel thread");
    }
    let mut subject = Subject::start();
    let at = subject.number("map 1");
    subject.tell(&format!("thread {at} 0"));
    let pid = subject.pid();
    let tids = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let tid = tids
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|tid| *tid != pid)
        .expect("a second thread");
    let error = Target::open(tid).expect_err("a thread");
    assert_eq!(error.to_string(), format!("{tid} is a thread of process {pid}"));
    let mut subject = Subject::start();
    let child = subject.number("fork") as i32;
    assert_eq!(subject.ask("child exit"), "gone");
    subject.until("a zombie", |_| {
        std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    });
    let error = Target::open(child).expect_err("a zombie");
    assert!(error.to_string().contains("a zombie"), "{error}");
    subject.tell("reap");
    assert!(matches!(Target::open(child), Err(OpenError::NoSuchProcess(_))));
}

fn who_has_a_debugger_already(kind: TrackerKind) {
    let subject = Subject::start();
    let mut debugger = Subject::start();
    debugger.tell(&format!("trace {}", subject.pid()));
    // Soft-dirty needs to stop the program only when it looks.
    let outcome =
        Tracker::attach(subject.target(), kind).map_err(|error| chain(&error)).and_then(|mut tracker| {
            tracker.collect(TreeState::Running).map(|_| ()).map_err(|error| chain(&error))
        });
    match kind {
        // It stops nobody, and takes nothing away from a debugger.
        TrackerKind::Compare => outcome.expect("a look"),
        _ => {
            let text = outcome.expect_err("somebody else traces it");
            assert!(
                text.contains(&format!("of process {} is traced by somebody else", subject.pid())),
                "{text}"
            );
        }
    }
    assert_eq!(subject.field("TracerPid"), debugger.pid().to_string());
    drop(debugger);
    subject.until("the debugger's end", |subject| subject.field("TracerPid") == "0");
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    tracker.collect(TreeState::Running).expect("collect");
}

fn who_has_lost_its_first_thread(kind: TrackerKind) {
    let mut subject = Subject::start();
    let child = subject.number("fork") as i32;
    let mut tracker = Tracker::attach(subject.target(), kind).expect("attach");
    tracker.collect(TreeState::Running).expect("collect");
    assert_eq!(subject.ask("child leave-it-to-a-thread"), "ready");
    let leaderless = |pid| matches!(Target::open(pid), Err(OpenError::LeaderEnded { .. }));
    subject.until("a first thread's end", |_| leaderless(child));
    for state in [TreeState::Running, TreeState::Frozen] {
        let error = chain(&tracker.collect(state).expect_err("its memory cannot be seen"));
        assert!(error.contains("has ended while others run"), "{error}");
    }
    // The root itself.
    assert_eq!(subject.ask("child exit"), "gone");
    subject.tell("reap");
    let target = subject.target();
    assert_eq!(subject.ask("leave-it-to-a-thread"), "ready");
    subject.until("a first thread's end", |subject| leaderless(subject.pid()));
    for state in [TreeState::Running, TreeState::Frozen] {
        tracker.collect(state).expect_err("its memory cannot be seen");
    }
    // Soft-dirty has nothing to do before it looks.
    let outcome = Tracker::attach(target, kind).map_err(|error| chain(&error)).and_then(|mut tracker| {
        tracker.collect(TreeState::Running).map(|_| ()).map_err(|error| chain(&error))
    });
    outcome.expect_err("its memory cannot be seen");
}
