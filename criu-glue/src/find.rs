//! Which criu to use.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The environment variable that names the criu to use.
pub const ENVIRONMENT: &str = "PAGEFERRY_CRIU";
/// Where `tools/setup` puts a criu of its own: a wrapper script that runs it with the libraries beside it.
pub const PRIVATE_PREFIX: &str = "/usr/local/lib/pageferry/criu/criu";
/// The oldest version whose notifications and image formats are known to do.
pub const MINIMUM: Version = Version { major: 4, minor: 0, sublevel: 0 };

/// A version of criu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 4 in 4.2.1.
    pub major: u32,
    /// 2 in 4.2.1.
    pub minor: u32,
    /// 1 in 4.2.1.
    pub sublevel: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.sublevel)
    }
}

/// An executable criu of a version that will do.
#[derive(Clone, Debug)]
pub struct Criu {
    path: PathBuf,
    version: Version,
}

/// Why there is no criu to use.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing was named and nothing was found.
    #[error(
        "no criu found: not in ${ENVIRONMENT}, not at {PRIVATE_PREFIX}, not in PATH, /usr/sbin or /usr/local/sbin; \
         run tools/setup to install one"
    )]
    Missing,
    /// The named or found criu does not run.
    #[error("{path} could not be run as criu; name another one or run tools/setup")]
    NotRunnable {
        /// What was tried.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ran, but does not say a version.
    #[error("{path} --version ended with {status} and said {output:?}; name another criu or run tools/setup")]
    NotCriu {
        /// What was tried.
        path: PathBuf,
        /// How it ended.
        status: String,
        /// What it printed.
        output: String,
    },
    /// It is older than [`MINIMUM`].
    #[error(
        "{path} is criu {found}, and at least {MINIMUM} is needed; run tools/setup to install a newer one"
    )]
    TooOld {
        /// What was tried.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
}

impl Criu {
    /// Finds criu: `explicit` if given, else `$PAGEFERRY_CRIU`, else the private prefix of `tools/setup`, else
    /// the first in PATH, `/usr/sbin` or `/usr/local/sbin`. What was named explicitly is used or refused, never
    /// replaced by something else.
    pub fn find(explicit: Option<&Path>) -> Result<Self, FindError> {
        Self::find_with(
            explicit,
            std::env::var_os(ENVIRONMENT).as_deref(),
            std::env::var_os("PATH").as_deref(),
        )
    }

    fn find_with(
        explicit: Option<&Path>,
        variable: Option<&OsStr>,
        search: Option<&OsStr>,
    ) -> Result<Self, FindError> {
        if let Some(path) = explicit {
            return Self::at(path.to_owned());
        }
        if let Some(path) = variable.filter(|v| !v.is_empty()) {
            return Self::at(PathBuf::from(path));
        }
        let private = PathBuf::from(PRIVATE_PREFIX);
        if private.exists() {
            return Self::at(private);
        }
        let fixed = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
        let in_path = search.map(|s| std::env::split_paths(s).collect::<Vec<_>>()).unwrap_or_default();
        match in_path.into_iter().chain(fixed).map(|dir| dir.join("criu")).find(|p| p.is_file()) {
            Some(path) => Self::at(path),
            None => Err(FindError::Missing),
        }
    }

    fn at(path: PathBuf) -> Result<Self, FindError> {
        let output = match Command::new(&path).arg("--version").stdin(Stdio::null()).output() {
            Ok(output) => output,
            Err(source) => return Err(FindError::NotRunnable { path, source }),
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let Some(version) = parse_version(&text).filter(|_| output.status.success()) else {
            let output_text = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
            return Err(FindError::NotCriu {
                path,
                status: output.status.to_string(),
                output: output_text.trim().chars().take(400).collect(),
            });
        };
        if version < MINIMUM {
            return Err(FindError::TooOld { path, found: version });
        }
        Ok(Self { path, version })
    }

    /// The executable.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }
}

/// Reads `Version: 4.2.1`, as `criu --version` prints it.
fn parse_version(text: &str) -> Option<Version> {
    let numbers = text.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
    let mut parts = numbers.split('.').map(|part| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    let major = parts.next()??;
    let minor = parts.next().flatten().unwrap_or(0);
    let sublevel = parts.next().flatten().unwrap_or(0);
    Some(Version { major, minor, sublevel })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let v = |major, minor, sublevel| Some(Version { major, minor, sublevel });
        assert_eq!(parse_version("Version: 4.2.1\nGitID: v4.2.1\n"), v(4, 2, 1));
        assert_eq!(parse_version("Version: 4.0\n"), v(4, 0, 0));
        assert_eq!(parse_version("Version: 4.1-rc1\n"), v(4, 1, 0));
        assert_eq!(parse_version("Version: x\n"), None);
        assert_eq!(parse_version("4.2.1"), None);
    }

    #[test]
    fn what_is_named_is_not_replaced() {
        let error = Criu::find_with(Some(Path::new("/nonexistent/criu")), None, None).unwrap_err();
        assert!(matches!(error, FindError::NotRunnable { .. }));
        let error = Criu::find_with(None, Some(OsStr::new("/bin/true")), None).unwrap_err();
        assert!(error.to_string().contains("/bin/true --version ended with exit status: 0 and said"));
    }
}
