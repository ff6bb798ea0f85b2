use super::*;
use crate::effort::Effort;

const MIB: u64 = 1 << 20;

fn control(memory_limit: Option<u64>, engine_memory: Option<u64>) -> ReceiverControl {
    let mut plan = ReceivePlan::new(([127, 0, 0, 1], 7077).into());
    (plan.memory_limit, plan.engine_memory) = (memory_limit, engine_memory);
    ReceiverControl::new(&plan, Effort::default())
}

fn needed(refused: Result<(), Refused>) -> u64 {
    match refused {
        Err(Refused::Pages { needed } | Refused::OwnMemory { needed }) => needed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_program_whatever_is_asked_for_holds_for_the_next() {
    let control = control(Some(64 * MIB), None);
    assert_eq!(control.status().stage, ReceiverStage::Waiting);
    control.set_memory_limit(Some(8 * MIB)).unwrap();
    control.begin("one");
    let store = control.new_store().unwrap();
    assert!(store.reserve(16 * MIB).is_err() && store.reserve(4 * MIB).is_ok());
    control.end();
    drop(store);
    control.set_memory_limit(None).unwrap();
    control.begin("another");
    control.new_store().unwrap().reserve(16 * MIB).unwrap();
    let status = control.status();
    assert_eq!((status.program.as_deref(), status.memory_limit), (Some("another"), None));
}

#[test]
fn what_was_promised_stays_and_more_can_be_had() {
    let control = control(Some(32 * MIB), None);
    control.begin("one");
    let store = control.new_store().unwrap();
    store.reserve(16 * MIB).unwrap();
    assert!(store.reserve(48 * MIB).is_err());
    let least = needed(control.set_memory_limit(Some(16 * MIB)));
    assert!(least > 16 * MIB && least < 33 * MIB, "{least}");
    assert_eq!(control.status().memory_limit, Some(32 * MIB), "nothing has changed");
    control.set_memory_limit(Some(least)).unwrap();
    assert!(store.reserve(32 * MIB).is_err(), "and it holds from then on");
    control.set_memory_limit(Some(64 * MIB)).unwrap();
    store.reserve(48 * MIB).unwrap();
    assert_eq!(control.status().announced_bytes, 48 * MIB);
    // Between what is there and what is needed more is never refused.
    assert!(needed(control.set_memory_limit(Some(40 * MIB))) >= 48 * MIB);
    control.set_memory_limit(None).unwrap();
}

#[test]
fn from_the_freeze_on_a_change_is_for_the_next_program() {
    let control = control(None, None);
    control.begin("one");
    let store = control.new_store().unwrap();
    store.reserve(16 * MIB).unwrap();
    control.enter(ReceiverStage::Freezing);
    control.set_memory_limit(Some(MIB)).unwrap();
    control.set_engine_memory(Some(memory::LEAST_AT_DESTINATION)).unwrap();
    store.reserve(32 * MIB).expect("a program that runs here loses no page for that");
    control.enter(ReceiverStage::Filling);
    assert_eq!(control.status().stage, ReceiverStage::Filling);
    control.end();
    let own = control.begin("another");
    assert_eq!((own.streams, own.later), (1, memory::at_destination(Some(26 * MIB), 1).later));
    assert!(control.new_store().unwrap().reserve(16 * MIB).is_err());
}

#[test]
fn the_engines_own_memory_is_shared_out_anew() {
    let control = control(None, Some(64 * MIB));
    let own = control.begin("one");
    let later = || control.later().load(Ordering::Relaxed) as u64;
    assert_eq!(later(), own.later);
    let store = control.new_store().unwrap();
    // Its index takes 12 MiB.
    store.reserve(2048 * MIB).unwrap();
    let least = needed(control.set_engine_memory(Some(memory::LEAST_AT_DESTINATION)));
    assert!(least > 32 * MIB && least < 64 * MIB, "{least}");
    assert_eq!((control.status().engine_memory, later()), (Some(64 * MIB), own.later));
    control.set_engine_memory(Some(least)).unwrap();
    assert_eq!(later(), 0, "the index is all that there is room for");
    store.reserve(2176 * MIB).expect_err("and no more than that");
    control.set_engine_memory(None).unwrap();
    assert_eq!(later(), memory::LATER);
    store.reserve(2176 * MIB).unwrap();
    assert_eq!(needed(control.set_engine_memory(Some(MIB))), memory::LEAST_AT_DESTINATION);
}

#[test]
fn memory_that_waits_for_a_program_keeps_its_index() {
    let control = control(None, None);
    let store = control.new_store().unwrap();
    store.reserve(2048 * MIB).unwrap();
    let least = needed(control.set_engine_memory(Some(32 * MIB)));
    control.set_engine_memory(Some(least)).unwrap();
    let own = control.begin("one");
    assert!(own.index.unwrap() >= store.bounds().taken().index);
    store.reserve(2048 * MIB).unwrap();
}

#[test]
fn before_there_is_a_store_a_change_is_for_it() {
    let control = control(None, Some(256 * MIB));
    let own = control.begin("one");
    assert!(own.streams > 1);
    let connections = needed(control.set_engine_memory(Some(memory::LEAST_AT_DESTINATION)));
    control.set_engine_memory(Some(connections + 4 * MIB)).unwrap();
    let store = control.new_store().unwrap();
    assert!(store.reserve(1024 * MIB).is_err() && store.reserve(256 * MIB).is_ok());
}

#[test]
fn a_share_of_a_processor_is_lifted_while_a_program_stands_still() {
    let control = control(None, None);
    assert_eq!(control.set_cpu(Some(0)), Err(Refused::NoProcessor));
    control.begin("one");
    control.set_cpu(Some(50)).unwrap();
    assert_eq!(control.effort().cpu().limit(), Some(50));
    control.effort().lift(true);
    control.set_cpu(Some(20)).unwrap();
    assert_eq!((control.effort().cpu().limit(), control.status().cpu), (None, Some(20)));
    assert_eq!(control.status().stage, ReceiverStage::Freezing);
    control.enter(ReceiverStage::Filling);
    assert_eq!(control.effort().cpu().limit(), Some(20));
}
