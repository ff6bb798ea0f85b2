//! SIGINT and SIGTERM become a request to stop; whoever waits hears it, and undoes what has to be undone.

use pageferry::Cancel;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A token that is cancelled by the first signal; later ones only say that it was heard.
pub(super) fn token() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new()?;
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let token = cancel.clone();
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            if token.is_cancelled() {
                eprintln!("stopping already: the program is being let go in order");
            }
            token.cancel_by_signal(signal);
        }
    })?;
    Ok(cancel)
}
