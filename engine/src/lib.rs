//! Live migration of Linux process trees: iterative pre-copy of dirty pages, one short freeze, and a
//! two-phase commit, with CRIU only at the edges.
//!
//! [`send`] moves a running process tree to a [`Receiver`] (or [`receive`]) on the destination host, or into a file, from
//! which [`restore`] brings it back.
//! Both take a plan in which every knob is explicit, an [`Observer`] that is told what happens, and a
//! [`Cancel`] token; a [`Control`] holds a migration up, or changes it, while it runs ([`send_controlled`]), and a [`ReceiverControl`] what a receiver may take. Libraries never print: the `pageferry` command is one user of this one.

pub mod calibration;
pub mod cancel;
pub mod control;
pub mod destination;
pub mod error;
pub mod journal;
pub mod kept;
pub mod observe;
pub mod plan;
pub mod report;
pub mod source;

mod effort;
mod fault;
mod layout;
pub mod link;
pub mod model;
pub mod network;
mod page_bits;
pub mod policy;
pub mod predict;
mod urgency;
mod verify;

pub use cancel::Cancel;
pub use control::Control;
pub use destination::{Receiver, ReceiverControl, receive};
pub use error::{FailureKind, MigrationError};
pub use kept::{RestorePlan, inspect, restore};
pub use network::{Hooks, MovedAddress};
pub use observe::{Event, Observer, Silent};
pub use plan::{
    CodingChoice, NoConvergence, PolicyChoice, ReceivePlan, SendPlan, SendTo, Strategy, TcpChoice,
};
pub use report::MigrationReport;
pub use source::{send, send_controlled};
