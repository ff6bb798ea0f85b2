//! How a receiver is, for those who ask.

use serde::{Deserialize, Serialize};

/// How far a receiver is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ReceiverStage {
    /// No migration is under way.
    #[default]
    Waiting,
    /// Memory arrives in rounds; the program runs at its source.
    Receiving,
    /// The program stands still and is handed over.
    Freezing,
    /// The program runs here, and pages of it are put in place.
    Filling,
}

impl ReceiverStage {
    /// The word in answers.
    pub fn name(self) -> &'static str {
        match self {
            ReceiverStage::Waiting => "waiting",
            ReceiverStage::Receiving => "receiving",
            ReceiverStage::Freezing => "freezing",
            ReceiverStage::Filling => "filling",
        }
    }
}

/// What a receiver is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReceiverStatus {
    /// How far it is.
    pub stage: ReceiverStage,
    /// The program that comes, as its source calls it.
    pub program: Option<String>,
    /// Since that began to come, by this engine's clock, in microseconds; 0 if none does.
    pub elapsed_us: u64,
    /// Bytes of pages that were announced for it. Before one comes: for which memory is made ready.
    pub announced_bytes: u64,
    /// Bytes of memory that its pages were put into, at their highest.
    pub page_bytes: u64,
    /// Bytes that the index takes, and lists of pages, or will take over what was announced.
    pub index_bytes: u64,
    /// Bytes that pages and their index may take; none if it is what the machine has.
    pub memory_limit: Option<u64>,
    /// Bytes of memory that the engine may take for itself; none if nobody cares.
    pub engine_memory: Option<u64>,
    /// Per cent of one processor that the engine may take unless a program stands still; none if nobody cares.
    pub cpu: Option<u32>,
    /// Nice value of the threads that receive.
    pub nice: u8,
}
