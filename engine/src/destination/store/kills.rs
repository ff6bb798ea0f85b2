//! Whether the kernel has ended processes because there was no memory for them: what a restore that fails for that cannot say itself.

use super::budget::group_dirs;
use std::fs;
use std::path::{Path, PathBuf};

/// How many the kernel has ended so far: of this process's control group, or where there is none for memory, of the machine.
#[derive(Debug)]
pub(crate) struct Kills {
    file: Option<PathBuf>,
    before: u64,
}

impl Kills {
    /// Counts from now on.
    pub(crate) fn begin() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let of_groups = group_dirs(&own)
            .into_iter()
            .flat_map(|dir| ["memory.events", "memory.oom_control"].map(|name| dir.join(name)));
        let mut files = of_groups.chain([PathBuf::from("/proc/vmstat")]);
        let file = files.find(|file| count(file).is_some());
        let before = file.as_deref().and_then(count).unwrap_or(0);
        Self { file, before }
    }

    /// How many it has ended since.
    pub(crate) fn since(&self) -> u64 {
        self.file.as_deref().and_then(count).unwrap_or(0).saturating_sub(self.before)
    }
}

/// The count in a file that has one.
fn count(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_ends_is_counted_from_the_beginning_on() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |count: u32| {
            // As in `memory.events`, and in `memory.oom_control`.
            let text = format!("oom 9\noom_kill {count}\noom_group_kill 0\n");
            fs::write(file.path(), text).unwrap();
        };
        write(3);
        let kills = Kills { file: Some(file.path().to_owned()), before: count(file.path()).unwrap() };
        assert_eq!(kills.since(), 0);
        write(5);
        assert_eq!(kills.since(), 2);
        fs::write(file.path(), "nothing of it\n").unwrap();
        assert_eq!(kills.since(), 0, "it cannot be known");
        assert_eq!(Kills::begin().since(), 0, "nobody is ended for memory here");
    }
}
