//! A swap device for as long as a test takes: compressed memory (zram), or the disk that tools/vm/run-in-vm gives its guest
//! for this. The live tests of migrations use it too.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const CONTROL: &str = "/sys/class/zram-control";
const SIZE: &str = "64M";
/// The serial number of a disk that is there to be swapped to.
const SERIAL: &str = "pageferry-swap";

/// A swap device that is in use. Dropping it brings all that is in it back to memory, and removes it.
pub struct Swap {
    device: String,
    /// Of the zram device, which is ours.
    number: Option<u32>,
    is_on: bool,
    _alone: MutexGuard<'static, ()>,
}

impl Swap {
    /// Makes a device, and has the kernel swap to it.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn on() -> Result<Self, String> {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut swap = match disk() {
            Some(device) => Self { device, number: None, is_on: false, _alone: alone },
            None => {
                // Reading it makes a device.
                let added = fs::read_to_string(format!("{CONTROL}/hot_add"))
                    .map_err(|error| format!("no zram device can be made: {CONTROL}/hot_add: {error}"))?;
                let number = added.trim().parse().map_err(|_| format!("hot_add says {added:?}"))?;
                let device = format!("/dev/zram{number}");
                let swap = Self { device, number: Some(number), is_on: false, _alone: alone };
                let size = format!("/sys/block/zram{number}/disksize");
                fs::write(&size, SIZE).map_err(|error| format!("{size}: {error}"))?;
                swap
            }
        };
        run("mkswap", &["-q", &swap.device])?;
        // Before any other: what these tests swap is to be here.
        run("swapon", &["-p", "32767", &swap.device])?;
        swap.is_on = true;
        Ok(swap)
    }

    fn off(&self) -> Result<(), String> {
        if self.is_on {
            run("swapoff", &[&self.device])?;
        }
        let Some(number) = self.number else { return Ok(()) };
        let mut tries = 0;
        while let Err(error) = fs::write(format!("{CONTROL}/hot_remove"), number.to_string()) {
            // Whoever looks at new devices may have it open for a moment.
            tries += 1;
            if tries == 200 {
                return Err(format!("{} cannot be removed: {error}", self.device));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // A test that fails already tells no more.
        if let Err(error) = self.off()
            && !std::thread::panicking()
        {
            panic!("{error}");
        }
    }
}

/// The disk with that serial number.
fn disk() -> Option<String> {
    let disks = fs::read_dir("/sys/block").ok()?;
    disks.flatten().find_map(|disk| {
        let serial = fs::read_to_string(disk.path().join("device/serial")).ok()?;
        (serial.trim() == SERIAL).then(|| format!("/dev/{}", disk.file_name().to_string_lossy()))
    })
}

/// Runs a program of the machine's administration, which need not be where everybody's programs are.
fn run(name: &str, arguments: &[&str]) -> Result<(), String> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let path = folders.iter().map(|folder| PathBuf::from(folder).join(name)).find(|path| path.exists());
    let path = path.ok_or_else(|| format!("there is no {name}"))?;
    let output = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{name}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
