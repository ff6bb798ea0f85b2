//! The cold messages, written with bincode (little-endian, fixed-width integers) under a limit.

mod abort;
mod check;

pub use abort::AbortCode;

use crate::digest::SpaceDigest;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, FrameKind, Sequencer, limit};
use crate::limits::{MAX_CONTROL_BYTES, MAX_DETAIL_BYTES};
use crate::page::{PageRun, SpaceId};
use crate::version::{self, Versions};
use bincode::{Decode, Encode};
use core::net::IpAddr;

fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_little_endian()
        .with_limit::<MAX_CONTROL_BYTES>()
}

/// The source opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// What it speaks.
    pub versions: Versions,
    /// Random identity of the session.
    pub session: u128,
    /// Version of its engine.
    pub engine: String,
    /// Name of the program that wants to move.
    pub program: String,
    /// Whether all memory is to be compared before the commit.
    pub verify: bool,
    /// How to restore.
    pub choices: RestoreChoices,
}

/// The destination takes the session.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version that will be spoken.
    pub version: u16,
    /// Version of its engine.
    pub engine: String,
    /// Bytes that its store can take.
    pub memory: u64,
    /// Connections that it takes for this session, at least 1 and at most [`MAX_STREAMS`](crate::limits::MAX_STREAMS).
    pub streams: u16,
    /// Pages of a store that it kept, at most [`MAX_KEPT_PAGES`](crate::limits::MAX_KEPT_PAGES): their digests follow in frames of
    /// [`SpaceId::KEPT`], as many as these.
    pub kept: u64,
}

/// A space that will come.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SpaceInfo {
    /// Its number.
    pub space: SpaceId,
    /// Pid in the innermost pid namespace.
    pub vpid: i32,
    /// Name of the program.
    pub name: String,
    /// Pages that it has now.
    pub pages: u64,
}

/// A mapping of a space.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RegionInfo {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Whether its content is the program's (and not the kernel's or a device's): it has to be there after the
    /// restore.
    pub comparable: bool,
}

/// What the restore has to know and CRIU's images do not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct RestoreChoices {
    /// The tree belongs to a shell's session.
    pub shell_job: bool,
    /// Established TCP connections are closed.
    pub tcp_close: bool,
    /// File locks are restored.
    pub file_locks: bool,
    /// Unix sockets may have a peer outside of the tree.
    pub ext_unix_sk: bool,
}

/// An address that moves with the program.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MovingAddress {
    /// Which.
    pub address: IpAddr,
    /// Bits of its network, from 1 on.
    pub prefix: u8,
    /// The destination's device that gets it; `None`: a hook puts it there, and the destination only holds back its packets.
    pub device: Option<String>,
    /// Ethernet address of the source's device, for who has to say that the address is there again.
    pub owner: [u8; 6],
}

/// A step of the destination in its part of the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Part {
    /// CRIU builds the tree up to the point where its memory can be filled.
    Restore,
    /// Hot pages are put in.
    Prefill,
    /// All memory is compared.
    Verify,
    /// CRIU goes on until the tree stands at its last instruction before the program.
    Resume,
    /// The tree is let go.
    Run,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Restore => "restore",
            Part::Prefill => "prefill",
            Part::Verify => "verify",
            Part::Resume => "resume",
            Part::Run => "run",
        })
    }
}

/// What a destination does before the freeze, so that it is no part of the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Preparation {
    /// CRIU is started, and learns what the kernel can do.
    Criu,
    /// Memory for pages is taken from the system.
    Memory,
    /// Addresses that will move are put in place, silently.
    Addresses,
}

impl std::fmt::Display for Preparation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Preparation::Criu => "criu",
            Preparation::Memory => "memory",
            Preparation::Addresses => "addresses",
        })
    }
}

/// What became of a session, as its destination says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum HandoverState {
    /// It never heard of it, or has forgotten.
    Unknown,
    /// The memory is on its way.
    Receiving,
    /// The commit is being carried out: ask again.
    ReadyToRun,
    /// The program runs there, and not all of its pages are in place: it still needs that engine.
    Resumed {
        /// Its pid.
        pid: i32,
    },
    /// There is no copy, and there will be none.
    Discarded,
    /// The program ran there, or was about to, and was ended: its pages had gone with the engine that held them.
    Ended,
    /// The program runs there, and every page of it is in place.
    Filled {
        /// Its pid.
        pid: i32,
    },
}

/// A control message.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ControlMessage {
    /// Source: opens a session.
    Hello(Hello),
    /// Destination: takes it.
    Welcome(Welcome),
    /// Source: spaces that will come.
    Spaces {
        /// The round in which they were found.
        round: u32,
        /// The spaces.
        spaces: Vec<SpaceInfo>,
    },
    /// Source: a space has ended.
    SpaceGone {
        /// Which.
        space: SpaceId,
    },
    /// Source: pages that are no longer there.
    Discard {
        /// Of which space.
        space: SpaceId,
        /// Which.
        runs: Vec<PageRun>,
    },
    /// Source, on every connection of the session: no more of this round comes here. The round in the freeze too.
    RoundEnd {
        /// Which.
        round: u32,
        /// Pages in the batches that it sent on this connection.
        pages: u64,
        /// Bytes of these.
        bytes: u64,
    },
    /// Destination, on the first connection: every connection has reached the end of the round, and every page of it is
    /// stored, or was asked for again. Of a first round without pages: memory for what was announced is ready.
    RoundAck {
        /// Which.
        round: u32,
    },
    /// Source: the space in its last state; its owned pages were sent before.
    SpaceSeal {
        /// Which.
        space: SpaceId,
        /// Pid in the innermost pid namespace.
        vpid: i32,
        /// Number of owned pages.
        pages: u64,
        /// Digest over them.
        digest: SpaceDigest,
        /// Its mappings.
        regions: Vec<RegionInfo>,
    },
    /// Source: all spaces are sealed.
    SealEnd {
        /// How many.
        spaces: u32,
    },
    /// Destination: it holds exactly these pages.
    Sealed {
        /// Of all spaces.
        pages: u64,
    },
    /// Source: the images are complete.
    ImagesEnd {
        /// Number of files.
        files: u32,
        /// Their bytes.
        bytes: u64,
    },
    /// Destination: the program could run here.
    Ready {
        /// Steps and their microseconds.
        timings: Vec<(Part, u64)>,
        /// Pages that were compared.
        verified_pages: u64,
    },
    /// Source: the program is yours. The point of no return.
    Commit,
    /// Destination: it runs.
    Resumed {
        /// As which process.
        pid: i32,
        /// Steps and their microseconds.
        timings: Vec<(Part, u64)>,
    },
    /// Destination: every page is in place.
    Filled {
        /// How many were put in.
        pages: u64,
        /// Of these, before the program ran.
        prefilled_pages: u64,
        /// Page faults that were served.
        faults: u64,
        /// The longest service, in microseconds.
        max_fault_us: u64,
        /// From the resume on, in microseconds.
        duration_us: u64,
    },
    /// Either: gives up.
    Abort {
        /// Why.
        code: AbortCode,
        /// In words, at most [`MAX_DETAIL_BYTES`].
        detail: String,
    },
    /// Source, on a new connection: what became of this session?
    Query {
        /// Which.
        session: u128,
    },
    /// Destination: this.
    State(HandoverState),
    /// Either: I am alive.
    Ping {
        /// Any number.
        n: u64,
    },
    /// Source, first on a further connection: it belongs to this session.
    Join {
        /// Which.
        session: u128,
        /// Number of the connection, from 1 and below [`Welcome::streams`]; the first connection is number 0.
        stream: u16,
    },
    /// Destination: it does.
    Joined,
    /// Destination, on the first connection and before a [`ControlMessage::RoundAck`] or
    /// [`ControlMessage::Unsealed`]: the base or the copied page of these was not there, or was another one.
    /// They have to be sent whole.
    Again {
        /// The pages of each space; spaces in ascending order, each once and with at least one page. At most
        /// [`MAX_RUNS_PER_FRAME`](crate::limits::MAX_RUNS_PER_FRAME) runs in all: more come in further messages.
        spaces: Vec<(SpaceId, Vec<PageRun>)>,
    },
    /// Destination, instead of [`ControlMessage::Sealed`]: pages that it asked for again are missing. The source
    /// sends these, and seals anew.
    Unsealed,
    /// Source, first on a further connection: pages that are owed come over it.
    Late {
        /// Of which session.
        session: u128,
        /// Number of the connection. Over number 0 goes what is asked for, and all that is said of owed pages; over the
        /// others, below [`Welcome::streams`] + 1, come pages that nobody has asked for.
        stream: u16,
    },
    /// Destination, on late connection 0: a thread of the program waits for these owed pages.
    Want {
        /// Of which space.
        space: SpaceId,
        /// Which.
        runs: Vec<PageRun>,
    },
    /// Destination, on late connection 0: the program has given this memory back, and these owed pages need not come. Those that
    /// are under way are taken all the same.
    Unwanted {
        /// Of which space.
        space: SpaceId,
        /// Which.
        runs: Vec<PageRun>,
    },
    /// Source, on a late connection 0 that was opened after another one was lost: what is still owed?
    TakeUp,
    /// Destination, behind the owed pages of a space and what was said to be unwanted of it: what has come of it so far.
    Taken {
        /// Which.
        space: SpaceId,
        /// Pid in the innermost pid namespace.
        vpid: i32,
        /// Pages that came late.
        pages: u64,
        /// Digest over them.
        digest: SpaceDigest,
    },
    /// Destination: that was every space with owed pages.
    TakenUp {
        /// How many.
        spaces: u32,
    },
    /// Source, on late connection 0: all pages of a space that had to come late were sent.
    LateSeal {
        /// Which.
        space: SpaceId,
        /// Pages that were sent late, each counted once.
        pages: u64,
        /// Digest over them.
        digest: SpaceDigest,
    },
    /// Source: that was every space with owed pages.
    LateSealEnd {
        /// How many.
        spaces: u32,
    },
    /// Destination, on late connection 0: nothing is owed any more, and what came is what was sent. The source's copy is of no use
    /// when this is followed by [`ControlMessage::Filled`]: until then the pages are in that engine only.
    LateSealed {
        /// Pages that came late.
        pages: u64,
    },
    /// Destination, on late connection 0 before [`ControlMessage::Filled`]: how long threads waited for owed pages that they
    /// touched, from when the fault was read to when the page was in place.
    FaultTimes {
        /// Faults on pages that had to be waited for.
        count: u64,
        /// The median, in microseconds.
        p50_us: u64,
        /// 99 of 100 were not longer than this, in microseconds.
        p99_us: u64,
        /// The longest, in microseconds.
        max_us: u64,
    },
    /// Source, after the welcome: what of the network moves with the program. Answered by [`ControlMessage::NetworkReady`].
    Network {
        /// Its addresses, at most [`MAX_MOVED_ADDRESSES`](crate::limits::MAX_MOVED_ADDRESSES).
        addresses: Vec<MovingAddress>,
        /// Established TCP connections are kept, instead of what [`RestoreChoices::tcp_close`] says.
        keep_tcp: bool,
    },
    /// Destination: the addresses are here, and nobody can tell.
    NetworkReady,
    /// Source, just before the freeze: clients are to send to the destination from now on.
    Announce,
    /// Destination: they were told.
    Announced {
        /// How long it took, in microseconds.
        us: u64,
    },
    /// Destination, before [`ControlMessage::Resumed`]: packets that had waited were delivered.
    Delivered {
        /// How many.
        packets: u64,
        /// Their bytes.
        bytes: u64,
        /// Packets for which there was no room.
        lost: u64,
        /// How long it took to let packets in, in microseconds.
        release_us: u64,
        /// How long it took to deliver those that had waited, in microseconds.
        deliver_us: u64,
    },
    /// Source, after the welcome: how long the session is to be held when its connections are lost from now on, because the source
    /// will try to make them anew. 0, as before the first of these messages: not at all.
    Hold {
        /// Milliseconds from when the loss is noticed, at most [`MAX_HOLD_MS`](crate::limits::MAX_HOLD_MS).
        ms: u64,
    },
    /// Source, first on a new connection: the connections of this session were lost, and this one takes the place of the first.
    Rejoin {
        /// Which.
        session: u128,
    },
    /// Destination: it does. All connections that there were are ended.
    Rejoined,
    /// Source, after [`ControlMessage::Rejoined`], for every space that there is: what it is sure that the destination holds of it.
    /// The pages came before, as owned ones; those of which it is not sure, as owed ones.
    Standing {
        /// The space, as in [`ControlMessage::Spaces`]: the destination may not have heard of it.
        info: SpaceInfo,
        /// Pages of which it is sure.
        pages: u64,
        /// Digest over them.
        digest: SpaceDigest,
    },
    /// Source: that was every space. One that the destination knows and that was not named is gone.
    StandingEnd {
        /// How many.
        spaces: u32,
    },
    /// Destination, behind the digests of what it holds of the pages in doubt: all of it is as the source says, and the rounds go on.
    Stands {
        /// Pages of which a digest was told.
        pages: u64,
    },
    /// Destination, once, between [`ControlMessage::Sealed`] and [`ControlMessage::Ready`]: what it had done when it heard that the
    /// program is about to stop.
    Prepared {
        /// What, and its microseconds; nothing twice.
        timings: Vec<(Preparation, u64)>,
    },
}

impl ControlMessage {
    /// An abort whose text is cut to its limit.
    pub fn abort(code: AbortCode, detail: &str) -> Self {
        let mut end = detail.len().min(MAX_DETAIL_BYTES);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        Self::Abort { code, detail: detail[..end].to_owned() }
    }

    /// The oldest version that has this message, in which it is written.
    pub fn version(&self) -> u16 {
        match self {
            Self::Hold { .. }
            | Self::Rejoin { .. }
            | Self::Rejoined
            | Self::Standing { .. }
            | Self::StandingEnd { .. }
            | Self::Stands { .. } => version::HOLDS,
            Self::Prepared { .. } => version::PREPARED,
            _ => version::FRAMES,
        }
    }

    /// Appends the next frame of a direction to `out`.
    ///
    /// # Errors
    /// A message that breaks a limit: a bug of the caller.
    pub fn encode(&self, at: &mut Sequencer, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.validate()?;
        frame::encode_in(self.version(), FrameKind::Control, 0, at, out, |out| {
            let bytes =
                bincode::encode_to_vec(self, config()).map_err(|e| EncodeError::Control(e.to_string()))?;
            out.extend_from_slice(&bytes);
            Ok(())
        })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Bytes that are no message, that are more than one, or that break a limit.
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        limit("a control message", head.len(), MAX_CONTROL_BYTES)?;
        let (message, used): (Self, usize) =
            bincode::decode_from_slice(head, config()).map_err(|e| DecodeError::Control(e.to_string()))?;
        if used != head.len() {
            return Err(DecodeError::Trailing(head.len() - used));
        }
        message.validate()?;
        Ok(message)
    }
}
