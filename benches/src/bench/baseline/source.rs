//! Plain CRIU, source side.

use super::{BUFFER, Images, NAME_LIMIT, Steps, log_tail, send_file};
use anyhow::{Context, bail, ensure};
use clap::Args;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Options of the source side.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Process to move
    #[arg(long)]
    pid: i32,
    /// Where the other side listens
    #[arg(long)]
    to: SocketAddr,
    /// Directory to make for the images, on a tmpfs
    #[arg(long)]
    images: PathBuf,
    /// CRIU to use (otherwise as pageferry looks for it)
    #[arg(long, env = "PAGEFERRY_CRIU")]
    criu: Option<PathBuf>,
}

/// Dumps, sends, waits for the restore, and prints the steps as JSON.
///
/// # Errors
/// What failed.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let criu = super::find_criu(options.criu.as_deref())?;
    let images = Images::create(&options.images)?;
    // Connected before anything is frozen: not part of the downtime.
    let mut link = TcpStream::connect(options.to).with_context(|| format!("connecting to {}", options.to))?;
    link.set_nodelay(true)?;
    let started = Instant::now();
    let status = Command::new(&criu)
        .arg("dump")
        .args(["--tree", &options.pid.to_string(), "--images-dir"])
        .arg(&images.0)
        .args(["--tcp-close", "--file-locks", "--network-lock", "skip", "-v1", "--log-file", "dump.log"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", criu.display()))?;
    let dump_us = started.elapsed().as_micros() as u64;
    ensure!(status.success(), "criu dump failed ({status}):\n{}", log_tail(&images.0.join("dump.log")));
    let started = Instant::now();
    let mut image_bytes = 0;
    {
        let mut writer = BufWriter::with_capacity(BUFFER, &mut link);
        for entry in fs::read_dir(&images.0).context("reading the images")? {
            let path = entry.context("reading the images")?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.ends_with(".img") || !path.is_file() {
                continue;
            }
            ensure!(name.len() <= NAME_LIMIT, "an image's name is too long: {name}");
            let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            let len = file.metadata().with_context(|| format!("opening {}", path.display()))?.len();
            send_file(&mut writer, name, &mut file, len).with_context(|| format!("sending {name}"))?;
            image_bytes += len;
        }
        writer.write_all(&[0]).and_then(|()| writer.flush()).context("sending the end")?;
    }
    let mut received: serde_json::StreamDeserializer<'_, _, String> =
        serde_json::Deserializer::from_reader(&link).into_iter();
    let mut hear = |what: &str| match received.next() {
        Some(Ok(text)) => Ok(text),
        Some(Err(error)) => Err(error).with_context(|| format!("waiting for {what}")),
        None => bail!("the other side ended before {what}"),
    };
    ensure!(hear("the receipt")? == "received", "the other side has not received the images");
    let copy_us = started.elapsed().as_micros() as u64;
    let restored = hear("the restore")?;
    let restore_us = restored.parse().map_err(|_| anyhow::anyhow!("the restore failed: {restored}"))?;
    println!("{}", serde_json::to_string(&Steps { dump_us, copy_us, restore_us, image_bytes })?);
    Ok(ExitCode::SUCCESS)
}
