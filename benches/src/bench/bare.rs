//! The bare loop alone, in variants: what sizes and socket options are worth on this machine.

use super::baseline::bare::{self, Copied, variant::Variant};
use super::hosts::Hosts;
use super::stats::Runs;
use super::subject::Subject;
use super::table::Table;
use super::{Common, ensure_memory, machine};
use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use std::process::ExitCode;

/// What is tried unless told otherwise: the plain loop, and one change of it at a time.
const VARIANTS: &str = "plain batch=16 batch=32 batch=128 batch=256 write=vectored congestion=cubic congestion=reno \
    congestion=bbr send-buffer=256KiB send-buffer=1MiB send-buffer=4MiB receive-buffer=256KiB receive-buffer=1MiB \
    receive-buffer=4MiB receive=64KiB receive=1MiB wait-all=yes into=huge into=fresh into=buffer digests=yes";

/// Options of this measurement.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Memory to copy
    #[arg(long, default_value = "2GiB")]
    memory: ByteSize,
    /// Connections
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    streams: Vec<u16>,
    /// Variants with spaces between, each `key=value` pairs with commas between: batch=PAGES, send-buffer=SIZE,
    /// receive-buffer=SIZE, congestion=NAME, write=whole|vectored, receive=SIZE, wait-all=yes|no,
    /// into=touched|huge|fresh|buffer, digests=yes|no; or `plain`
    #[arg(long, value_delimiter = ' ', default_value = VARIANTS)]
    variants: Vec<Variant>,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    variant: String,
    streams: u16,
    memory_bytes: u64,
    /// 10^9 bytes a second.
    bare_gb_s: Runs,
    /// Processor time of both sides, in seconds for 10^9 bytes.
    processor_s_gb: Runs,
    /// That speed over the first variant's with as many connections, run by run.
    to_first: Runs,
}

/// Measures and prints the table.
///
/// # Errors
/// What kept it from measuring.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { common, memory, streams, variants } = options;
    common.medians_need_runs()?;
    ensure_memory(*memory)?;
    anyhow::ensure!(!variants.is_empty() && !streams.is_empty(), "nothing to measure");
    let scratch = tempfile::Builder::new().prefix("pageferry-bench-").tempdir()?;
    let hosts = Hosts::up(&common.two_hosts, common.link.as_deref())?;
    let arguments = ["writer", "--memory", &memory.as_u64().to_string(), "--rate", "0"].map(str::to_owned);
    let subject = Subject::start(&hosts, scratch.path(), "writer", &arguments)?;
    // All variants in turn, and again: what the machine does meanwhile hits all of them.
    let mut measured = vec![Vec::new(); variants.len() * streams.len()];
    for run in 1..=common.runs {
        let each = streams.iter().flat_map(|&streams| variants.iter().map(move |variant| (streams, variant)));
        for (at, (streams, variant)) in each.enumerate() {
            machine::touch(memory.as_u64() / 4 * 5)?;
            let copied = bare::copy(&hosts, &subject, streams, variant)?;
            eprintln!("run {run} of {}, {streams} × {variant}: {:.2} GB/s", common.runs, copied.gb_s());
            measured[at].push(copied);
        }
    }
    let mut rows = Vec::new();
    for (&streams, copies) in streams.iter().zip(measured.chunks(variants.len())) {
        let first = copies.first().context("no --variants")?;
        for (variant, copies) in variants.iter().zip(copies) {
            let to_first = copies.iter().zip(first).map(|(own, first)| own.gb_s() / first.gb_s());
            let row = Row {
                variant: variant.to_string(),
                streams,
                memory_bytes: memory.as_u64(),
                bare_gb_s: Runs::new(copies.iter().map(Copied::gb_s).collect()),
                processor_s_gb: Runs::new(copies.iter().map(Copied::processor_s_gb).collect()),
                to_first: Runs::new(to_first.collect()),
            };
            if common.json {
                println!("{}", serde_json::to_string(&row)?);
            }
            rows.push(row);
        }
    }
    if !common.json {
        print!("{}", render(&rows, options));
    }
    Ok(ExitCode::SUCCESS)
}

fn render(rows: &[Row], options: &Options) -> String {
    let mut table = Table::new(&["variant", "streams", "bare GB/s", "to the first", "processor s/GB"]);
    for row in rows {
        table.row(vec![
            row.variant.clone(),
            row.streams.to_string(),
            row.bare_gb_s.display(2),
            row.to_first.display(2),
            row.processor_s_gb.display(2),
        ]);
    }
    let common = &options.common;
    format!(
        "{}\n{} of incompressible memory; link: {}; median (smallest..largest) of {} runs in turn\n\n{}",
        machine::describe(),
        options.memory,
        common.link.as_deref().unwrap_or("not shaped"),
        common.runs,
        table.render()
    )
}
