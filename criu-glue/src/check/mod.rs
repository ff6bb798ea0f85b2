//! What this machine's criu can really do: found out by doing it.

/// One thing that was tried.
#[derive(Clone, Debug)]
pub struct Check {
    /// What: `criu`, `dump-restore`, `shim`, `lazy-restore`, `synthetic-parent`.
    pub name: &'static str,
    /// Whether it works.
    pub ok: bool,
    /// How it went, or why it does not work.
    pub detail: String,
}
