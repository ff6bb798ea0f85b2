//! Links between the two engines, and the frames on them.

pub mod shaper;
pub mod tcp;

mod ahead;
pub(crate) mod channel;
mod limit;
mod sys;

pub(crate) use channel::{Channel, ChannelError, Incoming};
pub(crate) use limit::SharedShaper;
pub use tcp::{LinkError, TcpLink};
