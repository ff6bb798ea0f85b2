//! What a load client was told by redis, kept for the verification.

use super::{Look, Values};
use crate::workload::content::Entropy;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::{fs, io};

/// Versions of one key. Version 0 is: never written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The newest that redis acknowledged: it or a later one must be there.
    pub acknowledged: u64,
    /// The newest that was sent: nothing later can be there.
    pub sent: u64,
}

impl Versions {
    /// Whether a value of this version may be what redis holds.
    pub fn allow(&self, version: Option<u64>) -> bool {
        (self.acknowledged..=self.sent).contains(&version.unwrap_or(0))
    }
}

/// Everything that a load client knows about its keys, `load:0` and following.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Journal {
    /// Seed of the values.
    pub seed: u64,
    /// Size of the values in bytes.
    pub value_size: usize,
    /// Writes that were acknowledged, of all keys together.
    pub acknowledged: u64,
    /// Every key's versions.
    pub keys: Vec<Versions>,
}

impl Journal {
    /// For `keys` keys that were never written.
    pub fn new(seed: u64, value_size: usize, keys: usize) -> Self {
        Self { seed, value_size, acknowledged: 0, keys: vec![Versions::default(); keys] }
    }

    /// How values are made.
    pub fn values(&self) -> Values {
        Values { seed: self.seed, size: self.value_size, look: Look::Words(Entropy::Incompressible) }
    }

    /// Name of a key.
    pub fn name(key: usize) -> String {
        format!("load:{key}")
    }

    /// Writes it to a file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }

    /// Reads it from a file.
    ///
    /// # Errors
    /// What the file system says; `InvalidData` if it is no journal.
    pub fn read(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(path)?).map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_version_or_a_later_one_that_was_sent_is_allowed() {
        let versions = Versions { acknowledged: 3, sent: 5 };
        let allowed: Vec<_> = (0..8).filter(|&version| versions.allow(Some(version))).collect();
        assert_eq!(allowed, [3, 4, 5]);
        assert!(!versions.allow(None));
        assert!(Versions { acknowledged: 0, sent: 2 }.allow(None), "never acknowledged: may be missing");
    }
}
