//! criu's remote procedure calls: one protobuf message a packet over a SOCK_SEQPACKET socket.

pub(crate) mod message;

pub(crate) use message::{Options, Request, RequestKind, Response};
