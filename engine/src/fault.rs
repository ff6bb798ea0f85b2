//! Named points at which tests make things go wrong. Compiled out of release builds.
//!
//! `PAGEFERRY_FAULT="point=action"` in the environment arms one point, with one of the actions
//! `kill` (the engine dies by SIGKILL), `hang` (it stops answering), `cut` (the link's socket is shut down),
//! `delay:MS`, `flip` (one bit of the next frame that is sent) and `truncate` (half of the next frame is sent, and then the link is cut).
//! `lose` has the receiver not find the page that a delta or a copy is made from, and `lose-all` none from then on.
//! A number after the action (`cut@3`) waits for the third time that the point is reached.

/// What an armed point does to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(debug_assertions), allow(dead_code))]
pub(crate) enum Fault {
    /// Shut the link down.
    Cut,
    /// Damage the next frame.
    Flip,
    /// End the link in the middle of the next frame.
    Truncate,
    /// Be without the page that is asked for.
    Lose,
}

/// Runs what is armed for `point`: dies, hangs or sleeps here, or tells the caller what to do to its link.
#[cfg(debug_assertions)]
pub(crate) fn point(point: &str) -> Option<Fault> {
    armed::reached(point)
}

/// Nothing is ever armed in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn point(_point: &str) -> Option<Fault> {
    None
}

#[cfg(debug_assertions)]
mod armed {
    use super::Fault;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    #[derive(Debug, PartialEq, Eq)]
    enum Action {
        Kill,
        Hang,
        Delay(Duration),
        Tell(Fault),
    }

    #[derive(Debug)]
    struct Script {
        point: String,
        action: Action,
        /// Not once but from then on.
        lasting: bool,
        /// How often the point has to be reached still.
        countdown: AtomicU32,
    }

    fn parse(text: &str) -> Option<Script> {
        let (point, rest) = text.split_once('=')?;
        let (action, times) = match rest.split_once('@') {
            Some((action, times)) => (action, times.parse().ok()?),
            None => (rest, 1),
        };
        let action = match action.split_once(':') {
            Some(("delay", ms)) => Action::Delay(Duration::from_millis(ms.parse().ok()?)),
            _ => match action {
                "kill" => Action::Kill,
                "hang" => Action::Hang,
                "cut" => Action::Tell(Fault::Cut),
                "flip" => Action::Tell(Fault::Flip),
                "truncate" => Action::Tell(Fault::Truncate),
                "lose" | "lose-all" => Action::Tell(Fault::Lose),
                _ => return None,
            },
        };
        let lasting = rest.starts_with("lose-all");
        Some(Script { point: point.to_owned(), action, lasting, countdown: AtomicU32::new(times) })
    }

    pub(super) fn reached(point: &str) -> Option<Fault> {
        static SCRIPT: OnceLock<Option<Script>> = OnceLock::new();
        let script = SCRIPT
            .get_or_init(|| {
                let text = std::env::var("PAGEFERRY_FAULT").ok()?;
                // A misspelt script would make a test pass that tested nothing.
                Some(parse(&text).unwrap_or_else(|| panic!("PAGEFERRY_FAULT={text} is not a fault script")))
            })
            .as_ref()?;
        if script.point != point {
            return None;
        }
        let count = |left: u32| Some(left.saturating_sub(1));
        match script.countdown.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count) {
            Ok(1) => {}
            Ok(0) if script.lasting => {}
            _ => return None,
        }
        tracing::warn!(point, action = ?script.action, "a scripted fault");
        match script.action {
            Action::Kill => {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
                None
            }
            Action::Hang => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            Action::Delay(time) => {
                std::thread::sleep(time);
                None
            }
            Action::Tell(fault) => Some(fault),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn scripts_are_read() {
            let script = parse("frozen=cut@3").unwrap();
            assert_eq!(
                (script.point.as_str(), script.action, script.countdown.into_inner()),
                ("frozen", Action::Tell(Fault::Cut), 3)
            );
            assert_eq!(parse("a=delay:20").unwrap().action, Action::Delay(Duration::from_millis(20)));
            assert!(parse("a=explode").is_none());
            assert!(parse("a").is_none());
        }
    }
}
