//! How much memory may still be taken: what the kernel says is available, less a margin, so that a large
//! migration ends in an error and never in the arms of the out-of-memory killer.

use super::error::Bound;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Part of the machine's memory that is left alone: the rest of the engine, CRIU and the page tables of what is
/// restored have to fit beside the pages.
const MARGIN_SHARE: u64 = 64;
const MARGIN_LEAST: u64 = 32 << 20;
const MARGIN_MOST: u64 = 512 << 20;

/// Where to ask for available memory.
#[derive(Debug)]
pub(super) struct Budget {
    groups: Vec<PathBuf>,
}

impl Budget {
    pub(super) fn new() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self { groups: group_dirs(&own) }
    }

    /// Bytes that may be taken now, and what bounds them.
    ///
    /// # Errors
    /// When `/proc/meminfo` cannot be read or understood.
    pub(super) fn left(&self) -> io::Result<(u64, Bound)> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let field = |name| kib_field(&meminfo, name);
        let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
            return Err(io::Error::other("/proc/meminfo has no MemTotal and MemAvailable"));
        };
        let margin = (total / MARGIN_SHARE).clamp(MARGIN_LEAST, MARGIN_MOST);
        let mut left = (available.saturating_sub(margin), Bound::Machine);
        for dir in &self.groups {
            if let Some(room) = group_room(dir) {
                // A group's margin is a share of what it may use, not of a machine that may be far larger.
                let room = room.saturating_sub(margin.min(MARGIN_LEAST));
                if room < left.0 {
                    left = (room, Bound::ControlGroup);
                }
            }
        }
        Ok(left)
    }
}

/// Bytes of a `Name:   123 kB` line.
fn kib_field(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The directories of the control groups that bound this process's memory: its own and all above it.
pub(super) fn group_dirs(own: &str) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup"),
            _ if controllers.split(',').any(|c| c == "memory") => Path::new("/sys/fs/cgroup/memory"),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        dirs.extend(own.ancestors().take_while(|dir| dir.starts_with(root)).map(Path::to_path_buf));
    }
    dirs
}

/// Bytes that may still be used in a group. `None` when it has no limit.
fn group_room(dir: &Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    // Clean file pages count as used, and go away when memory is needed.
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    Some(limit.saturating_sub(used.saturating_sub(reclaimable(&stat))))
}

fn reclaimable(stat: &str) -> u64 {
    let field = |name: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        value.trim().parse::<u64>().ok()
    };
    let cold = field("total_inactive_file").or_else(|| field("inactive_file")).unwrap_or(0);
    let dirty = field("total_dirty").or_else(|| field("file_dirty")).unwrap_or(0);
    cold.saturating_sub(dirty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_some_memory() {
        let (left, _) = Budget::new().left().unwrap();
        assert!(left > 0 && left < 1 << 50);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "MemTotal:       100 kB\nMemAvailableX:  1 kB\nMemAvailable:     50 kB\n";
        assert_eq!(kib_field(text, "MemAvailable:"), Some(50 * 1024));
        assert_eq!(kib_field(text, "Missing:"), None);
        assert_eq!(reclaimable("active_file 7\ninactive_file 4096\nfile_dirty 96\n"), 4000);
        assert_eq!(reclaimable(""), 0);
    }

    #[test]
    fn groups_of_both_hierarchies_up_to_the_root() {
        let dirs = group_dirs("3:cpu,memory:/a\n2:cpu:/b\n0::/x/y\n");
        let expected = ["memory/a", "memory", "x/y", "x", ""];
        let expected: Vec<_> = expected.iter().map(|p| Path::new("/sys/fs/cgroup").join(p)).collect();
        assert_eq!(dirs, expected);
    }

    #[test]
    fn a_group_with_a_limit_bounds() {
        let dir = std::env::temp_dir().join(format!("pageferry-budget-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(group_room(&dir), None);
        fs::write(dir.join("memory.max"), "max\n").unwrap();
        fs::write(dir.join("memory.current"), "600\n").unwrap();
        assert_eq!(group_room(&dir), None);
        fs::write(dir.join("memory.max"), "1000\n").unwrap();
        assert_eq!(group_room(&dir), Some(400));
        fs::write(dir.join("memory.stat"), "inactive_file 100\n").unwrap();
        assert_eq!(group_room(&dir), Some(500));
        fs::remove_dir_all(&dir).unwrap();
    }
}
