//! Compiles the preloaded shim (`src/sys/shim/shim.rs`) into a shared object of its own, which the library embeds.
//!
//! The shim is loaded into criu, not into us, so it cannot be part of this crate's object code; and as it may
//! meet another C library than the one this crate was linked with, it is `no_std` and asks libc for a handful of
//! symbols that every glibc has.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let dir = PathBuf::from("src/sys/shim");
    for file in ["shim.rs", "table.rs"] {
        println!("cargo::rerun-if-changed={}", dir.join(file).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("shim.so");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    let target = std::env::var_os("TARGET").expect("cargo sets TARGET");
    let status = Command::new(rustc)
        .args(["--crate-name", "pageferry_shim", "--crate-type", "cdylib", "--edition", "2024"])
        .args(["-C", "panic=abort", "-C", "opt-level=3", "-C", "strip=symbols", "-C", "debuginfo=0"])
        .args(["-C", "overflow-checks=off", "-A", "dead_code"])
        .arg("--target")
        .arg(target)
        .arg("-o")
        .arg(&out)
        .arg(dir.join("shim.rs"))
        .status()
        .expect("rustc can be started");
    assert!(status.success(), "compiling the shim failed: {status}");
}
