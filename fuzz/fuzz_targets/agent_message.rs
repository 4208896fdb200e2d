#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| transship_hostile::run("agent_message", bytes));
