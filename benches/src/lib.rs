//! Workloads, baselines and benchmarks for pageferry.
