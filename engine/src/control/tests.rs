use super::*;

fn control() -> Control {
    Control::new(Cancel::new().unwrap())
}

fn plan() -> SendPlan {
    SendPlan::new(1, std::net::SocketAddr::from(([127, 0, 0, 1], 7077)))
}

/// Something that must not be waited for takes less.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_pause_that_was_granted_keeps_the_freeze_away() {
    let control = control();
    control.begin(&plan());
    control.enter(Stage::PreCopy);
    control.pause().unwrap();
    assert!(control.is_paused() && control.status().paused);
    assert!(!control.freeze(false), "it is paused");
    assert!(control.wait(Duration::from_millis(1)), "it still is");
    control.resume().unwrap();
    control.resume().unwrap();
    assert!(!control.is_paused() && !control.wait(LIMIT));
    assert!(control.freeze(false));
    assert_eq!(control.pause(), Err(Refused::Freezing));
    assert!(!control.status().paused);
}

#[test]
fn who_waits_hears_of_the_end_of_a_pause() {
    for end in [Control::resume, Control::cancel] {
        let control = control();
        control.begin(&plan());
        control.pause().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let its = control.clone();
        let thread = std::thread::spawn(move || {
            tell.send(()).unwrap();
            its.wait(Duration::from_secs(3600));
            tell.send(()).unwrap();
        });
        told.recv_timeout(LIMIT).unwrap();
        end(&control).unwrap();
        told.recv_timeout(LIMIT).expect("it goes on");
        thread.join().unwrap();
    }
}

#[test]
fn post_copy_that_was_granted_is_what_happens() {
    let control = control();
    control.begin(&plan());
    control.pause().unwrap();
    control.post_copy_now().unwrap();
    assert!(!control.wants_post_copy(), "not while it is paused");
    control.resume().unwrap();
    assert!(control.wants_post_copy() && control.status().post_copy);
    assert!(!control.freeze(false), "a freeze that owes nothing was not what was asked for");
    assert!(control.freeze(true));
    assert_eq!(control.post_copy_now(), Err(Refused::Freezing));
}

#[test]
fn into_a_file_nothing_is_owed() {
    let control = control();
    let plan = SendPlan::new(1, SendTo::File("/x".into()));
    // Asked for before it was known: it cannot be.
    control.post_copy_now().unwrap();
    control.begin(&plan);
    assert!(!control.wants_post_copy());
    assert_eq!(control.post_copy_now(), Err(Refused::OwedToFile));
    assert!(control.freeze(false));
}

#[test]
fn what_comes_too_late_is_refused_with_the_reason() {
    let control = control();
    control.begin(&plan());
    assert!(control.freeze(false));
    assert_eq!(control.set_bandwidth(Some(1)), Err(Refused::Freezing));
    assert!(control.commit());
    assert_eq!(control.pause(), Err(Refused::Moved));
    assert_eq!(control.cancel(), Err(Refused::Moved));
    assert_eq!(control.set_bandwidth(Some(1)), Err(Refused::Moved));
    assert!(!control.token().is_cancelled());
    // What is owed goes by the limit.
    control.enter(Stage::PostCopy);
    control.set_bandwidth(Some(7)).unwrap();
    assert_eq!(control.post_copy_now(), Err(Refused::Moved));
    control.enter(Stage::Ended);
    for refused in [control.pause(), control.resume(), control.cancel(), control.set_bandwidth(None)] {
        assert_eq!(refused, Err(Refused::Ended));
    }
    assert_eq!(control.status().bandwidth, Some(7));
}

#[test]
fn a_cancelled_migration_is_not_committed() {
    let control = control();
    control.begin(&plan());
    assert!(control.freeze(false));
    control.cancel().unwrap();
    assert!(!control.commit());
    assert!(control.status().cancelled);
}

#[test]
fn the_plans_bandwidth_holds_unless_another_was_asked_for() {
    let mut plan = plan();
    plan.bandwidth = Some(5);
    let before = control();
    before.begin(&plan);
    assert_eq!((before.status().bandwidth, before.paces()), (Some(5), 0));
    assert_eq!(before.set_bandwidth(Some(0)), Err(Refused::NoBandwidth));
    before.set_bandwidth(None).unwrap();
    assert_eq!((before.status().bandwidth, before.paces()), (None, 1));
    let asked = control();
    asked.set_bandwidth(Some(9)).unwrap();
    asked.begin(&plan);
    assert_eq!(asked.status().bandwidth, Some(9));
    // The next migration begins as if there had been none.
    asked.pause().unwrap();
    asked.enter(Stage::Ended);
    asked.begin(&plan);
    let status = asked.status();
    assert_eq!((status.bandwidth, status.paused, status.stage), (Some(5), false, Stage::Preparing));
}
