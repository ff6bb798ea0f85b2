//! Commands of a person's own at each stage of a handover: for networks whose addresses are moved by somebody else (an
//! overlay, a load balancer, a router).

use std::io;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long to sleep between two looks at a command.
const LOOK: Duration = Duration::from_millis(2);
/// Bytes of what a command says that an error shows.
const WORDS: usize = 2000;

/// Commands for `/bin/sh -c`, each at its stage. docs/NETWORK.md has what they are told in their environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// When the receiver has been reached, before anything of the program is sent: at the destination the address has to be
    /// there when it is over, and nobody may notice.
    pub prepare: Option<String>,
    /// The program is about to stop: clients have to be sent to the destination from now on.
    pub before_freeze: Option<String>,
    /// The program runs at the destination.
    pub after_resume: Option<String>,
    /// It does not, and never will: everything has to be as before.
    pub rollback: Option<String>,
}

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HookStage {
    Prepare,
    BeforeFreeze,
    AfterResume,
    Rollback,
}

impl HookStage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::BeforeFreeze => "before-freeze",
            Self::AfterResume => "after-resume",
            Self::Rollback => "rollback",
        }
    }
}

/// What hooks are told of a migration.
pub(crate) fn environment(
    side: &'static str,
    session: u128,
    program: &str,
    pid: Option<i32>,
    addresses: &[IpAddr],
    peer: &str,
) -> Vec<(&'static str, String)> {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let mut all = vec![
        ("PAGEFERRY_SIDE", side.to_owned()),
        ("PAGEFERRY_SESSION", format!("{session:032x}")),
        // What a peer says is not to be trusted in a shell's hands.
        (
            "PAGEFERRY_PROGRAM",
            program.chars().filter(|c| c.is_alphanumeric() || "-_.".contains(*c)).collect(),
        ),
        ("PAGEFERRY_ADDRESSES", addresses.join(" ")),
        ("PAGEFERRY_PEER", peer.to_owned()),
    ];
    all.extend(pid.map(|pid| ("PAGEFERRY_PID", pid.to_string())));
    all
}

/// A hook that did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    #[error("the {stage} hook could not be started")]
    Start {
        stage: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the {stage} hook failed ({status}){said}")]
    Failed { stage: &'static str, status: String, said: String },
    #[error("the {stage} hook was not done after {limit:?}, and was killed")]
    TooLong { stage: &'static str, limit: Duration },
}

impl Hooks {
    /// Whether there is any.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }

    fn of(&self, stage: HookStage) -> Option<&str> {
        match stage {
            HookStage::Prepare => self.prepare.as_deref(),
            HookStage::BeforeFreeze => self.before_freeze.as_deref(),
            HookStage::AfterResume => self.after_resume.as_deref(),
            HookStage::Rollback => self.rollback.as_deref(),
        }
    }

    /// Runs the stage's command, if there is one, until it ends or `limit` is over. Says how long it took.
    pub(crate) fn run(
        &self,
        stage: HookStage,
        environment: &[(&str, String)],
        limit: Duration,
    ) -> Result<Duration, HookError> {
        let Some(command) = self.of(stage) else { return Ok(Duration::ZERO) };
        let (name, started) = (stage.name(), Instant::now());
        let failed = |source| HookError::Start { stage: name, source };
        // A file and no pipe: what a hook leaves in the background may keep it as long as it likes.
        let words = rustix::fs::memfd_create("pageferry-hook", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let words = std::fs::File::from(words);
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", command]).stdin(Stdio::null()).process_group(0);
        shell.stdout(words.try_clone().map_err(failed)?).stderr(words.try_clone().map_err(failed)?);
        shell.env("PAGEFERRY_STAGE", name);
        shell.envs(environment.iter().map(|(key, value)| (key, value)));
        let mut child = shell.spawn().map_err(failed)?;
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                return match status.success() {
                    true => Ok(started.elapsed()),
                    false => {
                        Err(HookError::Failed { stage: name, status: status.to_string(), said: said(&words) })
                    }
                };
            }
            if started.elapsed() > limit {
                // The whole group, which is the hook's own.
                let group = nix::unistd::Pid::from_raw(child.id() as i32);
                let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
                child.wait().map_err(failed)?;
                return Err(HookError::TooLong { stage: name, limit });
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// The end of what a hook has said.
fn said(words: &std::fs::File) -> String {
    use std::os::unix::fs::FileExt;
    let len = words.metadata().map_or(0, |metadata| metadata.len());
    let from = len.saturating_sub(WORDS as u64);
    let mut bytes = vec![0; (len - from) as usize];
    let text = match words.read_exact_at(&mut bytes, from) {
        Ok(()) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(_) => String::new(),
    };
    if text.is_empty() { text } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn hooks(command: &str) -> Hooks {
        Hooks { prepare: Some(command.to_owned()), ..Hooks::default() }
    }

    #[test]
    fn a_hook_is_told_what_it_is_about() {
        let environment = [("PAGEFERRY_ADDRESSES", "10.0.0.9".to_owned())];
        let script = "test \"$PAGEFERRY_STAGE:$PAGEFERRY_ADDRESSES\" = prepare:10.0.0.9";
        hooks(script).run(HookStage::Prepare, &environment, LIMIT).unwrap();
        assert_eq!(hooks("false").run(HookStage::Rollback, &[], LIMIT).unwrap(), Duration::ZERO);
    }

    #[test]
    fn a_hook_that_fails_says_why() {
        let error = hooks("echo no such route >&2; exit 3").run(HookStage::Prepare, &[], LIMIT).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("prepare hook") && text.contains("no such route") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn a_hook_that_does_not_end_is_killed_with_all_that_it_started() {
        let started = Instant::now();
        let error = hooks("sleep 300 & sleep 300").run(HookStage::Prepare, &[], Duration::from_millis(50));
        assert!(matches!(error, Err(HookError::TooLong { .. })));
        assert!(started.elapsed() < Duration::from_secs(100));
    }
}
