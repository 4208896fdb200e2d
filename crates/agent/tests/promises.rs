//! What docs/security.md calls the proof of a promise must be there.

use std::{fs, path::Path};

const MODEL: &str = include_str!("../../../docs/security.md");

#[test]
fn every_promise_has_its_tests() {
    let mut code = String::new();
    for part in ["crates", "shim", "integration"] {
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(part), &mut code);
    }
    let tables = MODEL.lines().filter(|line| line.starts_with("| ") && line.ends_with(" |"));
    let promises = tables.filter_map(|line| line.trim_end_matches(" |").rsplit_once("| "));
    let mut named = 0;
    for test in promises.flat_map(|(_, tests)| tests.split('`').skip(1).step_by(2)) {
        let is_test =
            test.contains('_') && test.bytes().all(|b| b == b'_' || b.is_ascii_lowercase());
        if is_test && !["receive_from", "send_to"].contains(&test) {
            assert!(code.contains(&format!("fn {test}()")), "there is no test {test}");
            named += 1;
        }
    }
    assert!(named > 40, "{named}");
}

fn read(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}
