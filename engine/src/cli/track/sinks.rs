//! Where scans go: a recording, a CSV file, JSON lines, plain lines.

use super::super::arguments::TrackVerb;
use super::output::{self, ScanLine, Summary};
use anyhow::{Context, bail};
use pageferry_tracker::observation::Observation;
use pageferry_tracker::recording::{Header, Writer};
use pageferry_tracker::working_set::Estimator;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Lines of one kind, to a file or to standard output.
struct Lines {
    name: String,
    to: Box<dyn Write>,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        if path.as_os_str() == "-" {
            return Ok(Self { name: "standard output".to_owned(), to: Box::new(std::io::stdout()) });
        }
        let file = File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(Self { name: path.display().to_string(), to: Box::new(file) })
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        let said = self.to.write_all(text.as_bytes()).and_then(|()| self.to.flush());
        said.with_context(|| format!("writing to {}", self.name))
    }
}

/// A recording on its way: the file before its header is known, and its writer then.
enum Recording {
    Opened(File),
    Begun(Writer<File>),
    Ended,
}

/// All of them.
pub(super) struct Sinks {
    recording: Option<(PathBuf, Recording)>,
    csv: Option<Lines>,
    json: bool,
    /// Plain lines go where the tracked command's output does not.
    plain_to_stderr: bool,
    quiet: bool,
}

impl Sinks {
    /// Opens what was asked for.
    pub(super) fn open(verb: &TrackVerb) -> anyhow::Result<Self> {
        let recording = match &verb.record {
            None => None,
            Some(path) => {
                // A recording is measured data: none is written over.
                let file = OpenOptions::new().write(true).create_new(true).open(path).with_context(|| {
                    format!(
                        "the recording {} cannot be made (one that exists is not written over)",
                        path.display()
                    )
                })?;
                Some((path.clone(), Recording::Opened(file)))
            }
        };
        let mut csv = verb.csv.as_deref().map(Lines::open).transpose()?;
        if let Some(csv) = &mut csv {
            csv.say(ScanLine::CSV_HEAD)?;
        }
        let csv_to_stdout = verb.csv.as_deref().is_some_and(|path| path.as_os_str() == "-");
        Ok(Self {
            recording,
            csv,
            json: verb.json,
            plain_to_stderr: !verb.command.is_empty() || csv_to_stdout,
            quiet: verb.quiet,
        })
    }

    /// Whether programs read standard output: then nobody looks at a live view there.
    pub(super) fn use_stdout(&self) -> bool {
        self.json || self.plain_to_stderr || self.quiet
    }

    /// The header is known.
    pub(super) fn begin(&mut self, header: &Header) -> anyhow::Result<()> {
        if let Some((path, recording)) = &mut self.recording {
            let Recording::Opened(file) = std::mem::replace(recording, Recording::Ended) else {
                bail!("the recording {} was begun twice", path.display());
            };
            // Each scan is one write: who kills this program leaves whole scans behind.
            let writer = Writer::new(file, header);
            *recording = Recording::Begun(writer.with_context(|| failed(path))?);
        }
        Ok(())
    }

    /// Says what is being done.
    pub(super) fn attached(&self, header: &Header, reason: &str) -> anyhow::Result<()> {
        if self.json {
            let line = serde_json::json!({
                "event": "tracking",
                "pid": header.root_pid,
                "program": header.root_name,
                "tracker": header.source,
                "reason": reason,
                "scope": output::scope(header.scope),
                "interval_us": header.interval.as_micros() as u64,
            });
            return self.out(&format!("{line}\n"));
        }
        self.text(&format!(
            "tracking {} (pid {}), {}, by {} ({reason})\n",
            header.root_name,
            header.root_pid,
            output::scope_words(header.scope),
            header.source
        ))
    }

    /// One scan; `plainly` unless a live view shows it.
    pub(super) fn scan(
        &mut self,
        observation: &Observation,
        line: &ScanLine,
        plainly: bool,
    ) -> anyhow::Result<()> {
        if let Some((path, Recording::Begun(writer))) = &mut self.recording {
            writer.write(observation).with_context(|| failed(path))?;
        }
        if let Some(csv) = &mut self.csv {
            csv.say(&line.csv())?;
        }
        match (self.json, plainly) {
            (true, _) => self.out(&format!("{}\n", serde_json::to_string(line)?)),
            (false, true) => self.text(&line.plain()),
            (false, false) => Ok(()),
        }
    }

    /// No more scans: the recording is brought to its end.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        if let Some((path, recording)) = &mut self.recording
            && let Recording::Begun(writer) = std::mem::replace(recording, Recording::Ended)
        {
            let file = writer.finish().with_context(|| failed(path))?;
            file.sync_all().with_context(|| failed(path))?;
        }
        Ok(())
    }

    /// The last word.
    pub(super) fn summary(&self, summary: &Summary, estimator: &Estimator) -> anyhow::Result<()> {
        match self.json {
            true => self.out(&format!("{}\n", serde_json::to_string(summary)?)),
            false => self.text(&summary.text(estimator)),
        }
    }

    fn out(&self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to standard output")
    }

    fn text(&self, text: &str) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(());
        }
        if self.plain_to_stderr {
            eprint!("{text}");
            return Ok(());
        }
        self.out(text)
    }
}

fn failed(path: &Path) -> String {
    format!("the recording {}", path.display())
}

/// Whether a failure only says that nobody reads any more (`| head`): then there is nothing left to do, and no error.
pub(super) fn is_unread(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
