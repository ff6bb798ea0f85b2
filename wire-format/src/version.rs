//! Versions of the protocol, newest first.
//!
//! | version | what changed, and why |
//! |---|---|
//! | 5 | Pieces of images may be packed. |
//! | 4 | A destination says what it had done before the freeze. |
//! | 3 | A session whose connections are lost while the program runs is held, and goes on over new ones. |
//! | 2 | Several connections for a session; copies of pages that the receiver has elsewhere, zstd on top of what was sent before, a store that was kept; pages that are asked for again; checks that are chained; an end of the round in the freeze. The reasons stand in docs/PROTOCOL.md. |
//! | 1 | Never released, and no longer understood. The first: page batches (raw, zstd, delta), images, owned pages, digests, control messages. |
//!
//! Every frame carries the oldest version that has it, so that what an older peer knows reads as it always did; the header is
//! readable without knowing it. `Hello` tells the range that the source speaks, `Welcome` the version that the destination
//! chose, and nothing newer than that is sent.

/// The version that is spoken.
pub const CURRENT: u16 = 5;

/// The oldest version that is still understood. Version 1 was never released: nobody speaks it.
pub const OLDEST: u16 = 2;

/// The version of all frames that have not changed since: all kinds but that of [`PACKED_IMAGES`], and all messages but those of
/// [`HOLDS`] and [`PREPARED`].
pub const FRAMES: u16 = 2;

/// The version from which on sessions are held ([`ControlMessage::Hold`](crate::ControlMessage::Hold)) and taken up again.
pub const HOLDS: u16 = 3;

/// The version from which on a destination says what it had done before the freeze
/// ([`ControlMessage::Prepared`](crate::ControlMessage::Prepared)).
pub const PREPARED: u16 = 4;

/// The version from which on a piece of an image may be packed ([`ImageChunk::packed`](crate::ImageChunk::packed)).
pub const PACKED_IMAGES: u16 = 5;

/// A range of versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "{}", self.newest)
        } else {
            write!(f, "{} to {}", self.oldest, self.newest)
        }
    }
}

/// What this implementation speaks.
pub fn supported() -> Versions {
    Versions { oldest: OLDEST, newest: CURRENT }
}

/// Whether this implementation speaks `version`.
pub fn is_spoken(version: u16) -> bool {
    (OLDEST..=CURRENT).contains(&version)
}

/// The newest version that both sides speak.
pub fn negotiate(theirs: &Versions) -> Option<u16> {
    let newest = theirs.newest.min(CURRENT);
    (newest >= theirs.oldest.max(OLDEST)).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_taken() {
        assert_eq!(negotiate(&supported()), Some(CURRENT));
        assert_eq!(negotiate(&Versions { oldest: 1, newest: 900 }), Some(CURRENT));
        assert_eq!(negotiate(&Versions { oldest: 2, newest: 4 }), Some(4), "and with it no packed image");
        assert_eq!(
            negotiate(&Versions { oldest: 2, newest: 2 }),
            Some(2),
            "an older peer is spoken to as it can be"
        );
        assert_eq!(negotiate(&Versions { oldest: 1, newest: 1 }), None, "nobody speaks version 1");
        assert_eq!(negotiate(&Versions { oldest: CURRENT + 1, newest: 900 }), None);
        assert_eq!(negotiate(&Versions { oldest: 5, newest: 2 }), None);
    }
}
