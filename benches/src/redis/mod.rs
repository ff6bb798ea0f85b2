//! A redis client that knows what it wrote: it fills, loads and verifies.

use crate::workload::content::{Entropy, mix, word};

pub mod fill;
pub mod journal;
pub mod load;
pub mod resp;
pub mod session;
pub mod verify;

/// Bytes at the start of a value that name its key and version.
const HEADER: usize = 16;
/// A value must hold some content after that, or nothing would vouch for the version.
pub const SHORTEST: usize = 32;

/// How a value looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// A header that names its key and version, and words.
    Words(Entropy),
    /// JSON, as of a web session.
    Session,
}

/// What a value must be, for a family of keys.
#[derive(Clone, Copy, Debug)]
pub struct Values {
    /// Seed of the family.
    pub seed: u64,
    /// Length of each value in bytes ([`SHORTEST`] at least; sessions are a little longer).
    pub size: usize,
    /// Look of the bytes.
    pub look: Look,
}

impl Values {
    /// The value of key number `key` as it was written the `version`-th time.
    pub fn value(&self, key: u64, version: u64) -> Vec<u8> {
        let entropy = match self.look {
            Look::Session => return session::session(self.seed, key, version, self.size),
            Look::Words(entropy) => entropy,
        };
        let mut bytes = Vec::with_capacity(self.size.max(SHORTEST) + 8);
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&version.to_le_bytes());
        let content = mix(mix(self.seed, key), version);
        let mut at = 0;
        while bytes.len() < self.size.max(SHORTEST) {
            bytes.extend_from_slice(&word(content, at, entropy).to_le_bytes());
            at += 1;
        }
        bytes.truncate(self.size.max(SHORTEST));
        bytes
    }

    /// The version that a value says it is, if all of its bytes are right for that version of this key.
    pub fn version_of(&self, key: u64, value: &[u8]) -> Option<u64> {
        let version = match self.look {
            Look::Words(_) => u64::from_le_bytes(value.get(8..HEADER)?.try_into().ok()?),
            Look::Session => session::version(value)?,
        };
        (value == self.value(key, version)).then_some(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_names_its_version_and_no_byte_of_it_may_differ() {
        for size in [SHORTEST, 33, 100, 4096] {
            let values = Values { seed: 3, size, look: Look::Words(Entropy::Incompressible) };
            let mut value = values.value(9, 4);
            assert_eq!(value.len(), size);
            assert_eq!(values.version_of(9, &value), Some(4));
            assert_eq!(values.version_of(8, &value), None);
            for at in 0..size {
                value[at] ^= 0x20;
                assert_eq!(values.version_of(9, &value), None, "byte {at}");
                value[at] ^= 0x20;
            }
            assert_eq!(values.version_of(9, &value[..size - 1]), None);
        }
    }

    #[test]
    fn no_byte_of_a_session_may_differ_either() {
        let values = Values { seed: 3, size: 900, look: Look::Session };
        let mut value = values.value(9, 4);
        assert_eq!(values.version_of(9, &value), Some(4));
        assert_eq!(values.version_of(8, &value), None);
        for at in 0..value.len() {
            value[at] ^= 1;
            assert_eq!(values.version_of(9, &value), None, "byte {at}");
            value[at] ^= 1;
        }
    }
}
