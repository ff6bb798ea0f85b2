//! Plain CRIU, destination side.

use super::{Images, log_tail, pump, receive_header};
use anyhow::{Context, bail};
use clap::Args;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Options of the destination side.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Address to listen on
    #[arg(long)]
    listen: SocketAddr,
    /// Directory to make for the images, on a tmpfs
    #[arg(long)]
    images: PathBuf,
    /// CRIU to use (otherwise as pageferry looks for it)
    #[arg(long, env = "PAGEFERRY_CRIU")]
    criu: Option<PathBuf>,
}

/// Takes images from one sender, restores, and leaves the restored process running.
///
/// # Errors
/// What failed.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let criu = super::find_criu(options.criu.as_deref())?;
    let images = Images::create(&options.images)?;
    let listener =
        TcpListener::bind(options.listen).with_context(|| format!("listening on {}", options.listen))?;
    println!("listening on {}", options.listen);
    let (mut link, _) = listener.accept().context("waiting for the images")?;
    link.set_nodelay(true)?;
    while let Some((name, len)) = receive_header(&mut link).context("receiving an image")? {
        let path = images.0.join(&name);
        let mut file = File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        let copied =
            pump(&mut (&mut link).take(len), &mut file).with_context(|| format!("receiving {name}"))?;
        if copied != len {
            bail!("the sender ended in the middle of {name}");
        }
    }
    say(&mut link, "received")?;
    let started = Instant::now();
    let status = Command::new(&criu)
        .args(["restore", "--restore-detached", "--images-dir"])
        .arg(&images.0)
        .args(["--tcp-close", "--file-locks", "--network-lock", "skip", "-v1", "--log-file", "restore.log"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", criu.display()))?;
    let restore_us = started.elapsed().as_micros() as u64;
    if !status.success() {
        let tail = log_tail(&images.0.join("restore.log"));
        say(&mut link, &format!("criu restore: {status}\n{tail}"))?;
        bail!("criu restore failed ({status}):\n{tail}");
    }
    say(&mut link, &restore_us.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn say(link: &mut TcpStream, text: &str) -> anyhow::Result<()> {
    link.write_all(serde_json::to_string(text)?.as_bytes()).context("answering the sender")
}
