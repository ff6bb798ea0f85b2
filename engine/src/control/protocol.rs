//! What goes over the socket of a migration, or a receiver: one JSON object a line, a question and then its answer (docs/CONTROL.md).

use super::{Control, ReceiverStatus, Refused, Status};
use crate::destination::ReceiverControl;
use serde::{Deserialize, Deserializer, Serialize};

/// Grows when a field changes its meaning or goes away.
pub const PROTOCOL: u32 = 1;

/// Bytes of a line at most, its end included. Both sides refuse longer ones.
pub const MAX_LINE: usize = 4096;

/// Characters of a message at most: each takes up to six bytes of a line.
const MOST_WORDS: usize = 500;

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Only how far it is, which every other answer says too.
    Status {},
    /// [`Control::pause`].
    Pause {},
    /// [`Control::resume`].
    Resume {},
    /// [`Control::cancel`].
    Cancel {},
    /// [`Control::post_copy_now`].
    PostCopy {},
    /// [`Control::set_bandwidth`].
    Bandwidth {
        /// `null` is no limit; it cannot be left out.
        #[serde(deserialize_with = "said")]
        bytes_per_second: Option<u64>,
    },
    /// [`Control::set_max_slowdown`].
    MaxSlowdown {
        /// Of 1; `null` is as much as it takes, and it cannot be left out.
        #[serde(deserialize_with = "said")]
        share: Option<f64>,
    },
    /// [`Control::set_cpu`], [`ReceiverControl::set_cpu`].
    Cpu {
        /// Of one processor; `null` is as much as it takes, and it cannot be left out.
        #[serde(deserialize_with = "said")]
        percent: Option<u32>,
    },
    /// [`Control::set_engine_memory`], [`ReceiverControl::set_engine_memory`].
    EngineMemory {
        /// `null` is as much as it takes, and it cannot be left out.
        #[serde(deserialize_with = "said")]
        bytes: Option<u64>,
    },
    /// [`ReceiverControl::set_memory_limit`].
    MemoryLimit {
        /// `null` is what the machine has, and it cannot be left out.
        #[serde(deserialize_with = "said")]
        bytes: Option<u64>,
    },
}

/// A field that may be null and may not be missing.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(deserializer)
}

/// Why there is no status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// It was understood, and cannot be done now.
    Refused,
    /// It was not understood.
    BadRequest,
    /// A line does not end. The connection is closed.
    TooLong,
    /// Another user's client. The connection is closed.
    NotAllowed,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// [`PROTOCOL`] of the one who answers.
    pub protocol: u32,
    /// Whether it was done.
    pub ok: bool,
    /// How a migration is after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// How a receiver is after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<ReceiverStatus>,
    /// Why it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorKind>,
    /// The same in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Answer {
    /// The words may repeat what was asked for, which may be long.
    pub(super) fn no(error: ErrorKind, message: impl Into<String>) -> Self {
        let message: String = message.into().chars().take(MOST_WORDS).collect();
        Self { error: Some(error), message: Some(message), ..Self::empty(false) }
    }

    fn empty(ok: bool) -> Self {
        Self { protocol: PROTOCOL, ok, status: None, receiver: None, error: None, message: None }
    }

    /// As a line.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("numbers, words and no maps");
        line.push(b'\n');
        line
    }
}

/// How something is that runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// A migration.
    Migration(Status),
    /// A receiver.
    Receiver(ReceiverStatus),
}

/// What a [`super::ControlSocket`] answers for.
pub trait Controlled: Send + 'static {
    /// Does what is asked for.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    fn obey(&self, request: Request) -> Result<(), Refused>;

    /// How it is now.
    fn tell(&self) -> Told;
}

/// Does what a line asks for, and answers.
pub(super) fn answer(control: &impl Controlled, line: &[u8]) -> Answer {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return Answer::no(ErrorKind::BadRequest, error.to_string()),
    };
    match control.obey(request).map(|()| control.tell()) {
        Ok(Told::Migration(status)) => Answer { status: Some(status), ..Answer::empty(true) },
        Ok(Told::Receiver(status)) => Answer { receiver: Some(status), ..Answer::empty(true) },
        Err(refused) => Answer::no(ErrorKind::Refused, refused.to_string()),
    }
}

impl Controlled for Control {
    fn obey(&self, request: Request) -> Result<(), Refused> {
        match request {
            Request::Status {} => Ok(()),
            Request::Pause {} => self.pause(),
            Request::Resume {} => self.resume(),
            Request::Cancel {} => self.cancel(),
            Request::PostCopy {} => self.post_copy_now(),
            Request::Bandwidth { bytes_per_second } => self.set_bandwidth(bytes_per_second),
            Request::MaxSlowdown { share } => self.set_max_slowdown(share),
            Request::Cpu { percent } => self.set_cpu(percent),
            Request::EngineMemory { bytes } => self.set_engine_memory(bytes),
            Request::MemoryLimit { .. } => Err(Refused::AtReceiver),
        }
    }

    fn tell(&self) -> Told {
        Told::Migration(self.status())
    }
}

impl Controlled for ReceiverControl {
    fn obey(&self, request: Request) -> Result<(), Refused> {
        match request {
            Request::Status {} => Ok(()),
            Request::Cpu { percent } => self.set_cpu(percent),
            Request::EngineMemory { bytes } => self.set_engine_memory(bytes),
            Request::MemoryLimit { bytes } => self.set_memory_limit(bytes),
            Request::Pause {}
            | Request::Resume {}
            | Request::Cancel {}
            | Request::PostCopy {}
            | Request::Bandwidth { .. }
            | Request::MaxSlowdown { .. } => Err(Refused::AtSource),
        }
    }

    fn tell(&self) -> Told {
        Told::Receiver(self.status())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cancel;

    fn control() -> Control {
        Control::new(Cancel::new().unwrap())
    }

    #[test]
    fn every_request_does_what_it_says() {
        let control = control();
        let ask = |text: &str| answer(&control, text.as_bytes());
        assert!(ask(r#"{"command":"pause"}"#).status.unwrap().paused);
        assert!(!ask(r#"{"command":"resume"}"#).status.unwrap().paused);
        let limited = ask(r#"{"command":"bandwidth","bytes_per_second":12500000}"#).status.unwrap();
        assert_eq!(limited.bandwidth, Some(12_500_000));
        let free = ask(r#"{"bytes_per_second":null,"command":"bandwidth"}"#).status.unwrap();
        assert_eq!(free.bandwidth, None);
        let slow = ask(r#"{"command":"max-slowdown","share":0.05}"#).status.unwrap();
        assert_eq!(slow.max_slowdown, Some(0.05));
        assert_eq!(ask(r#"{"command":"max-slowdown","share":null}"#).status.unwrap().max_slowdown, None);
        let memory = ask(r#"{"command":"engine-memory","bytes":67108864}"#).status.unwrap();
        assert_eq!(memory.engine_memory, Some(64 << 20));
        let half = ask(r#"{"command":"cpu","percent":50}"#).status.unwrap();
        assert_eq!(half.cpu, Some(50));
        assert_eq!(ask(r#"{"command":"cpu","percent":0}"#).error, Some(ErrorKind::Refused));
        assert_eq!(ask(r#"{"command":"cpu"}"#).error, Some(ErrorKind::BadRequest));
        assert_eq!(ask(r#"{"command":"cpu","percent":null}"#).status.unwrap().cpu, None);
        let little = ask(r#"{"command":"engine-memory","bytes":1048576}"#);
        assert_eq!((little.ok, little.error), (false, Some(ErrorKind::Refused)));
        let memory = ask(r#"{"command":"engine-memory","bytes":null}"#).status.unwrap();
        assert_eq!(memory.engine_memory, None);
        let pages = ask(r#"{"command":"memory-limit","bytes":1048576}"#);
        assert!(pages.message.unwrap().contains("ask the receiver"));
        for share in ["0", "-0.1", "1.1"] {
            let no = ask(&format!("{{\"command\":\"max-slowdown\",\"share\":{share}}}"));
            assert_eq!((no.ok, no.error), (false, Some(ErrorKind::Refused)), "{share}");
        }
        assert!(ask(r#"{"command":"post-copy"}"#).status.unwrap().post_copy);
        assert!(ask(r#"{"command":"cancel"}"#).status.unwrap().cancelled);
        let status = ask(" {\"command\": \"status\"}\r");
        assert!(status.ok && status.protocol == PROTOCOL && status.error.is_none());
        let refused = ask(r#"{"command":"bandwidth","bytes_per_second":0}"#);
        assert_eq!((refused.ok, refused.error), (false, Some(ErrorKind::Refused)));
        assert!(refused.message.unwrap().contains("more than zero"));
    }

    #[test]
    fn a_receiver_is_told_what_it_may_take() {
        let receiver = ReceiverControl::for_tests();
        let ask = |line: &str| answer(&receiver, line.as_bytes());
        let status = ask(r#"{"command":"cpu","percent":50}"#).receiver.unwrap();
        assert_eq!((status.cpu, status.memory_limit), (Some(50), None));
        let status = ask(r#"{"command":"memory-limit","bytes":1048576}"#).receiver.unwrap();
        assert_eq!((status.cpu, status.memory_limit), (Some(50), Some(1 << 20)));
        let status = ask(r#"{"command":"engine-memory","bytes":67108864}"#).receiver.unwrap();
        assert_eq!(status.engine_memory, Some(64 << 20));
        let said = ask(r#"{"command":"status"}"#);
        assert!(said.ok && said.status.is_none() && said.receiver == Some(status));
        for command in ["pause", "resume", "cancel", "post-copy"] {
            let no = ask(&format!("{{\"command\":\"{command}\"}}"));
            assert_eq!((no.ok, no.error, no.receiver), (false, Some(ErrorKind::Refused), None), "{command}");
        }
        assert_eq!(ask(r#"{"command":"memory-limit"}"#).error, Some(ErrorKind::BadRequest));
        receiver.begin(&"\u{1}".repeat(10_000));
        let said = ask(r#"{"command":"status"}"#);
        assert!(said.line().len() <= MAX_LINE && said.receiver.as_ref().unwrap().program.is_some());
        assert_eq!(serde_json::from_slice::<Answer>(&said.line()).unwrap(), said);
    }

    #[test]
    fn what_is_no_request_changes_nothing() {
        let control = control();
        let before = control.status();
        for line in [
            "",
            "pause",
            "{}",
            "[]",
            "\"pause\"",
            "null",
            r#"{"command":"stop"}"#,
            r#"{"command":"pause","for":5}"#,
            r#"{"command":"pause"}{"command":"pause"}"#,
            r#"{"command":"bandwidth"}"#,
            r#"{"command":"max-slowdown"}"#,
            r#"{"command":"bandwidth","bytes_per_second":-1}"#,
            r#"{"command":"bandwidth","bytes_per_second":1.5}"#,
            r#"{"command":"bandwidth","bytes_per_second":"1Gbit"}"#,
            "\u{0}\u{1b}[2J",
        ] {
            let answer = answer(&control, line.as_bytes());
            assert_eq!((answer.ok, answer.error), (false, Some(ErrorKind::BadRequest)), "{line:?}");
            assert!(answer.message.is_some_and(|message| !message.is_empty()));
        }
        let deep = "[".repeat(MAX_LINE);
        assert_eq!(answer(&control, deep.as_bytes()).error, Some(ErrorKind::BadRequest));
        assert_eq!(answer(&control, &[0xff; 20]).error, Some(ErrorKind::BadRequest));
        assert_eq!(control.status(), before);
    }

    #[test]
    fn lines_are_short_and_come_back_as_they_went() {
        let control = control();
        control.begin(&crate::SendPlan::new(1, std::net::SocketAddr::from(([1, 2, 3, 4], 5))));
        control.predicted(std::time::Duration::from_secs(1 << 40));
        control.throttled(1.0 / 3.0);
        let yes = answer(&control, br#"{"command":"status"}"#);
        let no = answer(&control, format!("{{\"command\":\"{}\"}}", "x".repeat(MAX_LINE - 20)).as_bytes());
        for answer in [yes, no] {
            let line = answer.line();
            assert!(line.len() <= MAX_LINE && line.ends_with(b"\n"), "{} bytes", line.len());
            assert_eq!(serde_json::from_slice::<Answer>(&line).unwrap(), answer);
        }
        let request = Request::Bandwidth { bytes_per_second: None };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"command":"bandwidth","bytes_per_second":null}"#);
        assert_eq!(serde_json::to_string(&Request::PostCopy {}).unwrap(), r#"{"command":"post-copy"}"#);
    }
}
