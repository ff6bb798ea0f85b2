//! `pageferry receive`.

use super::arguments::ReceiveVerb;
use super::control::open_socket;
use super::failure::{USAGE, describe, exit_code};
use super::progress::{JsonLines, Plain};
use super::signals;
use pageferry::control::receiver_path_of;
use pageferry::{Observer, ReceivePlan, Receiver};
use std::net::ToSocketAddrs;

/// Runs the verb.
pub(super) fn run(verb: ReceiveVerb) -> anyhow::Result<u8> {
    let listen = match verb.listen.to_socket_addrs().map(|mut addresses| addresses.next()) {
        Ok(Some(address)) => address,
        Ok(None) | Err(_) => {
            eprintln!(
                "error: {:?} is no address to listen on (write it like 127.0.0.1:7077 or [::1]:7077)",
                verb.listen
            );
            return Ok(USAGE);
        }
    };
    let mut plan = ReceivePlan::new(listen);
    plan.insecure = verb.insecure;
    plan.memory_limit = verb.memory_limit.map(|bytes| bytes.0);
    plan.engine_memory = verb.engine_memory.map(|bytes| bytes.0);
    plan.cpu = verb.cpu.map(|percent| percent.0);
    plan.nice = verb.nice;
    plan.standby = verb.standby.0;
    plan.keep_store = verb.keep_store;
    plan.hooks = verb.hooks.hooks();
    plan.criu = verb.criu;
    plan.stall_timeout = verb.stall_timeout.0;
    plan.journal = verb.journal.0;
    plan.post_copy_timeout = verb.post_copy_timeout.0;
    let cancel = signals::token()?;
    let observer: &dyn Observer = if verb.json { &JsonLines } else { &Plain };
    let result = Receiver::bind(plan).and_then(|receiver| {
        let usual = receiver_path_of(receiver.local_addr().port());
        let _socket = open_socket(verb.control.as_deref(), usual, receiver.control(), observer);
        receiver.serve(verb.once, observer, &cancel)
    });
    match result {
        Ok(()) => Ok(0),
        Err(error) => {
            eprint!("{}", describe(&error));
            Ok(exit_code(&error, cancel.signal()))
        }
    }
}
