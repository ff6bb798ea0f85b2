//! Workloads, baselines and benchmarks for pageferry.
//!
//! Two programs come out of this crate. `pageferry-workload` is what gets migrated (and, for redis, what uses
//! the migrated program): every workload can prove at any time that no byte of its memory is wrong.
//! `pageferry-bench` moves them between two hosts and measures.

pub mod bench;
pub mod connections;
pub mod redis;
pub mod sys;
pub mod workload;
