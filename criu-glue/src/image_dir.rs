//! A directory for criu's images that leaves nothing behind.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Names that [`ImageDir::list`] leaves out: they are about a run of criu, not about the tree.
const NOT_IMAGES: [&str; 4] =
    [crate::dump::LOG_FILE, crate::restore::LOG_FILE, crate::lazy::SOCKET_NAME, "stats-restore"];

/// A tmpfs that is mounted nowhere: it exists as long as somebody holds its descriptor. When the last holder ends,
/// even by SIGKILL, memory and files are gone.
#[derive(Debug)]
pub struct ImageDir {
    root: OwnedFd,
}

/// Why no image directory could be made.
#[derive(Debug, thiserror::Error)]
#[error("could not make a detached tmpfs for criu's images ({step}); this needs root and Linux 5.2 or newer")]
pub struct ImageDirError {
    /// The system call that failed.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl ImageDir {
    /// Makes an empty one. Its size is limited by the machine's memory alone.
    pub fn new() -> Result<Self, ImageDirError> {
        let failed = |step| move |e: rustix::io::Errno| ImageDirError { step, source: e.into() };
        let context =
            rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
        for (key, value) in [("source", "pageferry"), ("mode", "0700"), ("size", "100%")] {
            rustix::mount::fsconfig_set_string(context.as_fd(), key, value).map_err(failed("fsconfig"))?;
        }
        rustix::mount::fsconfig_create(context.as_fd()).map_err(failed("fsconfig"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(failed("fsmount"))?;
        Ok(Self { root })
    }

    /// The directory itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// A path to the directory for other processes of the same pid namespace, valid while `self` lives.
    pub fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.root.as_raw_fd()))
    }

    /// Creates or truncates a file. `name` may have one folder in front (`p0/inventory.img`), which is made.
    /// Anything that could lead out of the directory is refused: names may come from a peer.
    pub fn create(&self, name: &str) -> io::Result<File> {
        let path = checked(name)?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            self.make_folder(parent)?;
        }
        self.open_with(path, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)
    }

    /// Opens a file for reading and writing.
    pub fn open(&self, name: &str) -> io::Result<File> {
        self.open_with(checked(name)?, OFlags::RDWR)
    }

    /// Reads a whole file.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut self.open(name)?, &mut bytes)?;
        Ok(bytes)
    }

    /// The images as (name, size in bytes), sorted, recursively: `inventory.img`, `p0/pagemap-1.img`. Symbolic
    /// links and sockets are left out, and so are criu's logs.
    pub fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let mut names = Vec::new();
        self.list_into("", &mut names)?;
        names.sort();
        Ok(names)
    }

    fn list_into(&self, folder: &str, names: &mut Vec<(String, u64)>) -> io::Result<()> {
        let path = if folder.is_empty() { "." } else { folder };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.root, path, flags, Mode::empty())?;
        for entry in Dir::new(fd)? {
            let entry = entry?;
            let name = entry.file_name().to_str().map_err(|_| io::ErrorKind::InvalidData)?;
            if name == "." || name == ".." || NOT_IMAGES.contains(&name) {
                continue;
            }
            let path = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
            let stat = rustix::fs::statat(&self.root, &path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => self.list_into(&path, names)?,
                FileType::RegularFile => names.push((path, stat.st_size as u64)),
                _ => {}
            }
        }
        Ok(())
    }

    /// The same directory under another descriptor.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { root: self.root.try_clone()? })
    }

    pub(crate) fn make_folder(&self, name: &Path) -> io::Result<()> {
        match rustix::fs::mkdirat(&self.root, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes a file or a link; that it was not there is no error.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.root, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes a folder and the files in it.
    pub(crate) fn remove_folder(&self, name: &str) -> io::Result<()> {
        let mut files = Vec::new();
        self.list_into(name, &mut files)?;
        for (file, _) in files {
            self.remove(&file)?;
        }
        Ok(rustix::fs::unlinkat(&self.root, name, rustix::fs::AtFlags::REMOVEDIR)?)
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.root, from, &self.root, to)?)
    }

    fn open_with(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        let fd = rustix::fs::openat2(
            &self.root,
            path,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            if flags.contains(OFlags::CREATE) { Mode::RUSR | Mode::WUSR } else { Mode::empty() },
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )?;
        Ok(File::from(fd))
    }
}

fn checked(name: &str) -> io::Result<&Path> {
    let path = Path::new(name);
    let parts = path.components().count();
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    let spelled = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
    if !plain || !spelled || !(1..=2).contains(&parts) || name.contains('\0') || name.len() > 200 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no name of an image file"),
        ));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::checked;

    #[test]
    fn names_that_lead_out_are_refused() {
        for name in ["", ".", "..", "/a", "a/../b", "a//b", "./a", "a/", "a/b/c", "a\0b"] {
            assert!(checked(name).is_err(), "{name:?}");
        }
        for name in ["inventory.img", "p0/pagemap-1.img", "..img"] {
            assert!(checked(name).is_ok(), "{name:?}");
        }
    }
}
