//! Links between the two engines, and the frames on them.

pub mod shaper;
pub mod tcp;

pub(crate) mod channel;

pub(crate) use channel::{Channel, ChannelError, Incoming};
pub use tcp::{LinkError, TcpLink};
