//! The cold messages, written with bincode (little-endian, fixed-width integers) under a limit.

use crate::digest::SpaceDigest;
use crate::error::{DecodeError, EncodeError};
use crate::frame::{self, FrameKind, Sequencer, limit};
use crate::limits::{
    MAX_CONTROL_BYTES, MAX_DETAIL_BYTES, MAX_KEPT_PAGES, MAX_MOVED_ADDRESSES, MAX_NAME_BYTES, MAX_REGIONS,
    MAX_RUNS_PER_FRAME, MAX_SPACES, MAX_STREAMS, MAX_TIMINGS, PAGE_SIZE,
};
use crate::page::{PageRun, SpaceId, check_runs};
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
    /// Connections that it takes for this session, at least 1 and at most [`MAX_STREAMS`].
    pub streams: u16,
    /// Pages of a store that it kept, at most [`MAX_KEPT_PAGES`]: their digests follow in frames of
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

/// Why one side gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortCode {
    /// Another migration is being received.
    Busy,
    /// No common version.
    VersionMismatch,
    /// The pages do not fit.
    OutOfMemory,
    /// A frame that is not valid, or came at the wrong time.
    BadFrame,
    /// Bytes that do not match their digest.
    DigestMismatch,
    /// The two sides do not agree on the memory.
    SealMismatch,
    /// CRIU could not restore.
    RestoreFailed,
    /// The restored memory is not that of the frozen source.
    VerifyFailed,
    /// Somebody asked to stop.
    Cancelled,
    /// The source failed.
    SourceFailed,
    /// Anything else.
    Internal,
    /// A code of a later version.
    Unknown(u16),
}

impl AbortCode {
    const KNOWN: [(AbortCode, u16, &'static str); 11] = [
        (AbortCode::Busy, 1, "busy"),
        (AbortCode::VersionMismatch, 2, "version mismatch"),
        (AbortCode::OutOfMemory, 3, "out of memory"),
        (AbortCode::BadFrame, 4, "bad frame"),
        (AbortCode::DigestMismatch, 5, "digest mismatch"),
        (AbortCode::SealMismatch, 6, "seal mismatch"),
        (AbortCode::RestoreFailed, 7, "restore failed"),
        (AbortCode::VerifyFailed, 8, "verify failed"),
        (AbortCode::Cancelled, 9, "cancelled"),
        (AbortCode::SourceFailed, 10, "source failed"),
        (AbortCode::Internal, 11, "internal"),
    ];

    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            AbortCode::Unknown(number) => number,
            known => Self::KNOWN.iter().find(|(code, ..)| *code == known).map_or(0, |(_, number, _)| *number),
        }
    }

    /// The code of a number.
    pub fn from_number(number: u16) -> Self {
        Self::KNOWN.iter().find(|(_, n, _)| *n == number).map_or(Self::Unknown(number), |(code, ..)| *code)
    }
}

impl std::fmt::Display for AbortCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Self::KNOWN.iter().find(|(code, ..)| code == self) {
            Some((_, _, name)) => f.write_str(name),
            None => write!(f, "code {}", self.number()),
        }
    }
}

impl Encode for AbortCode {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.number().encode(encoder)
    }
}

impl<Context> Decode<Context> for AbortCode {
    fn decode<D: bincode::de::Decoder<Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        Ok(Self::from_number(u16::decode(decoder)?))
    }
}

bincode::impl_borrow_decode!(AbortCode);

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
    /// stored, or was asked for again.
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
        /// [`MAX_RUNS_PER_FRAME`] runs in all: more come in further messages.
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
    /// now.
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
        /// Its addresses, at most [`MAX_MOVED_ADDRESSES`].
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

    /// Appends the next frame of a direction to `out`.
    ///
    /// # Errors
    /// A message that breaks a limit: a bug of the caller.
    pub fn encode(&self, at: &mut Sequencer, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        self.validate()?;
        frame::encode(FrameKind::Control, 0, at, out, |out| {
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

    /// The same rules before sending and after receiving.
    fn validate(&self) -> Result<(), DecodeError> {
        match self {
            Self::Hello(hello) => {
                if hello.versions.oldest > hello.versions.newest {
                    return Err(DecodeError::Invalid("a range of versions that ends before it begins"));
                }
                limit("a version's name", hello.engine.len(), MAX_NAME_BYTES)?;
                limit("a program's name", hello.program.len(), MAX_NAME_BYTES)
            }
            Self::Welcome(welcome) => {
                if !version::is_spoken(welcome.version) {
                    return Err(DecodeError::Version(welcome.version));
                }
                if welcome.streams == 0 {
                    return Err(DecodeError::Invalid("a welcome to no connection"));
                }
                limit("a session's connections", welcome.streams.into(), MAX_STREAMS.into())?;
                limit("a kept store's pages", to_usize(welcome.kept), to_usize(MAX_KEPT_PAGES))?;
                limit("a version's name", welcome.engine.len(), MAX_NAME_BYTES)
            }
            Self::Join { stream, .. } => match *stream {
                0 => Err(DecodeError::Invalid("a further connection under the number of the first")),
                stream => limit("a connection's number", stream.into(), usize::from(MAX_STREAMS) - 1),
            },
            Self::Late { stream, .. } => {
                limit("a late connection's number", (*stream).into(), MAX_STREAMS.into())
            }
            Self::Want { space, runs } | Self::Unwanted { space, runs } => {
                space.check_of_source()?;
                limit("a message's runs", runs.len(), MAX_RUNS_PER_FRAME)?;
                match check_runs(runs)? {
                    0 => Err(DecodeError::Invalid("a message about no page")),
                    _ => Ok(()),
                }
            }
            Self::Taken { space, .. } | Self::LateSeal { space, .. } => space.check_of_source(),
            Self::Again { spaces } => check_again(spaces),
            Self::Spaces { spaces, .. } => {
                limit("a list of spaces", spaces.len(), MAX_SPACES)?;
                spaces.iter().try_for_each(|info| {
                    info.space.check_of_source()?;
                    limit("a program's name", info.name.len(), MAX_NAME_BYTES)
                })
            }
            Self::SpaceGone { space } => space.check_of_source(),
            Self::Discard { space, runs } => {
                space.check_of_source()?;
                limit("a message's runs", runs.len(), MAX_RUNS_PER_FRAME)?;
                check_runs(runs).map(|_| ())
            }
            Self::SpaceSeal { space, regions, .. } => {
                space.check_of_source()?;
                limit("a space's regions", regions.len(), MAX_REGIONS)?;
                check_regions(regions)
            }
            Self::Ready { timings, .. } | Self::Resumed { timings, .. } => {
                limit("a list of timings", timings.len(), MAX_TIMINGS)
            }
            Self::Abort { code, detail } => {
                if AbortCode::from_number(code.number()) != *code {
                    return Err(DecodeError::Invalid("a known code under the name of an unknown one"));
                }
                limit("an abort's text", detail.len(), MAX_DETAIL_BYTES)
            }
            Self::Network { addresses, .. } => check_addresses(addresses),
            Self::RoundEnd { .. }
            | Self::RoundAck { .. }
            | Self::SealEnd { .. }
            | Self::Sealed { .. }
            | Self::ImagesEnd { .. }
            | Self::Commit
            | Self::Filled { .. }
            | Self::Query { .. }
            | Self::State(_)
            | Self::Joined
            | Self::Unsealed
            | Self::TakeUp
            | Self::TakenUp { .. }
            | Self::LateSealEnd { .. }
            | Self::LateSealed { .. }
            | Self::FaultTimes { .. }
            | Self::NetworkReady
            | Self::Announce
            | Self::Announced { .. }
            | Self::Delivered { .. }
            | Self::Ping { .. } => Ok(()),
        }
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Each address comes once, with a network that it can have and a device that could be.
fn check_addresses(addresses: &[MovingAddress]) -> Result<(), DecodeError> {
    limit("a list of addresses", addresses.len(), MAX_MOVED_ADDRESSES)?;
    for (n, moving) in addresses.iter().enumerate() {
        let most = if moving.address.is_ipv4() { 32 } else { 128 };
        if !(1..=most).contains(&moving.prefix) {
            return Err(DecodeError::Invalid("an address in a network that it cannot have"));
        }
        if addresses[..n].iter().any(|other| other.address == moving.address) {
            return Err(DecodeError::Invalid("an address that moves twice"));
        }
        if let Some(device) = &moving.device {
            limit("a device's name", device.len(), MAX_NAME_BYTES)?;
        }
    }
    Ok(())
}

/// Something is asked for, there is one way to ask for it, and the answer can be bounded.
fn check_again(spaces: &[(SpaceId, Vec<PageRun>)]) -> Result<(), DecodeError> {
    limit("a list of spaces", spaces.len(), MAX_SPACES)?;
    limit("a message's runs", spaces.iter().map(|(_, runs)| runs.len()).sum(), MAX_RUNS_PER_FRAME)?;
    if spaces.is_empty() || spaces.iter().any(|(_, runs)| runs.is_empty()) {
        return Err(DecodeError::Invalid("a request for no page"));
    }
    if !spaces.is_sorted_by(|(before, _), (after, _)| before < after) {
        return Err(DecodeError::Invalid("spaces that are out of order or come twice"));
    }
    spaces.iter().try_for_each(|(space, runs)| {
        space.check_of_source()?;
        check_runs(runs).map(|_| ())
    })
}

/// Regions are whole pages, ascending, and apart from or next to each other: as the kernel lists them.
fn check_regions(regions: &[RegionInfo]) -> Result<(), DecodeError> {
    let mut end = 0;
    for region in regions {
        if region.start >= region.end {
            return Err(DecodeError::Invalid("a region that ends before it begins"));
        }
        if region.start % PAGE_SIZE as u64 != 0 || region.end % PAGE_SIZE as u64 != 0 {
            return Err(DecodeError::Invalid("a region that is not of whole pages"));
        }
        if region.start < end {
            return Err(DecodeError::Invalid("regions that overlap or are not in order"));
        }
        end = region.end;
    }
    Ok(())
}
