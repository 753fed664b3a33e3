//! Any bytes through the readers of `.npy` and `.npz`.
#![no_main]

#[path = "../one_input.rs"]
mod one_input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| one_input::run(bytes));
