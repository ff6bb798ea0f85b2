//! From a kept stream to a running program.

use super::archive::PATIENCE;
use super::chain;
use super::checkpoints::stream_of;
use super::error::KeptError;
use super::inspect::inspect;
use super::player::{play, survey};
use crate::destination::{Host, interrupted};
use crate::error::{CopyState, FailureKind};
use crate::link::TcpLink;
use crate::{Cancel, MigrationError, Observer, ReceivePlan};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How a kept program is to be brought back.
#[derive(Clone, Debug)]
pub struct RestorePlan {
    /// The stream, or a directory of checkpoints, whose last one is meant.
    pub path: PathBuf,
    /// Bytes of memory that the page store may take at most; `None` is what the machine has free.
    pub memory_limit: Option<u64>,
    /// CRIU to use; `None` searches for one.
    pub criu: Option<PathBuf>,
    /// How long CRIU may make no progress before the restore is given up.
    pub stall_timeout: Duration,
}

impl RestorePlan {
    /// A plan with the defaults of the command line.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let ReceivePlan { memory_limit, criu, stall_timeout, .. } =
            ReceivePlan::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        Self { path: path.into(), memory_limit, criu, stall_timeout }
    }
}

const PHASE: &str = "restoring a kept program";

/// Restores a program from a stream that [`crate::send`] has kept, by the same steps as at the end of a migration, and
/// returns when it runs and every page of it is in place. The stream stays as it is.
///
/// # Errors
/// A stream that is damaged, cut off, of another version, or empty is refused, with the frame and the place in the file; no
/// failure leaves anything of the program running.
pub fn restore(plan: &RestorePlan, observer: &dyn Observer, cancel: &Cancel) -> Result<(), MigrationError> {
    let refused = |error: KeptError| {
        let help = error.help();
        let mut refused = MigrationError::refused(PHASE, error);
        (refused.source_state, refused.help) = (CopyState::Unknown, help);
        refused
    };
    let stream = stream_of(&plan.path).map_err(refused)?;
    survey(&stream).map_err(refused)?;
    let base = chain::pages_below(&stream).map_err(refused)?;
    let mut host = ReceivePlan::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    (host.memory_limit, host.criu) = (plan.memory_limit, plan.criu.clone());
    host.stall_timeout = plan.stall_timeout;
    let host = Host::new(host, PHASE)?.on_top_of(Arc::clone(&base));
    let link = |source| refused(KeptError::Link(crate::link::LinkError::Lost(source)));
    let (mut ours, theirs) = TcpLink::pair().map_err(link)?;
    ours.set_stall(PATIENCE);
    let end = theirs.handle().map_err(link)?;
    let (played, ended) = std::thread::scope(|scope| {
        let player = scope.spawn(|| play(&stream, base.digests(), ours));
        let ended = host.receive_over(theirs, observer, cancel);
        // A receiver that has ended has nothing more to hear.
        let _ = end.shutdown(std::net::Shutdown::Both);
        match player.join() {
            Ok(played) => (played, ended),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    match (ended, played) {
        (Some(Ok(())), _) => Ok(()),
        // What is wrong with the file is the better explanation of why the receiver gave up.
        (_, Err(error @ (KeptError::Frame(_) | KeptError::Damaged { .. } | KeptError::Read { .. })))
        | (None, Err(error)) => {
            let mut failed = refused(error);
            failed.kind = FailureKind::RolledBack;
            Err(failed)
        }
        (Some(Err(mut error)), _) => {
            error.phase = PHASE.to_owned();
            // What only a receiver unpacks is found by it, and it does not know where in the file it was.
            if error.kind == FailureKind::RolledBack
                && let Ok(fault) = inspect(&stream).map(|inspection| inspection.fault)
                && let Some(fault) = fault
            {
                error.cause = fault.into();
            }
            Err(error)
        }
        (None, Ok(())) => Err(interrupted()),
    }
}
