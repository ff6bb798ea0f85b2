#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pageferry_wire_format_fuzz::delta(data));
