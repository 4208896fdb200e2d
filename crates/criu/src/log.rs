//! The lines of a CRIU log that a person needs.
//!
//! CRIU answers its RPC with "failed"; the reason is in its log, among
//! thousands of lines. The first error is usually the cause and the last ones
//! are its echoes, so the beginning is kept when there are too many.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

/// Enough for a cause and its echoes, little enough for one error message.
const MAX_LINES: usize = 8;
const MAX_LINE: usize = 300;
/// A runaway log is not read for ever.
const MAX_READ: usize = 4 << 20;

/// Error lines, each with the warning right before it; `None` when the log
/// cannot be read or has no such line.
pub fn explain(path: &Path) -> Option<String> {
    let log = BufReader::new(File::open(path).ok()?);
    explain_lines(log.split(b'\n').map_while(Result::ok))
}

fn explain_lines(lines: impl Iterator<Item = Vec<u8>>) -> Option<String> {
    let mut kept: Vec<String> = Vec::new();
    let mut warning: Option<String> = None;
    let mut dropped = 0;
    let mut read = 0;
    for line in lines {
        read += line.len();
        if read > MAX_READ {
            break;
        }
        let line = String::from_utf8_lossy(&line);
        let text = without_clock(&line);
        match severity(text) {
            Some(Severity::Error) if plain(text).is_none() => {}
            Some(Severity::Error) => {
                for line in warning.take().into_iter().chain([shorten(text)]) {
                    if kept.contains(&line) {
                        continue;
                    }
                    if kept.len() < MAX_LINES { kept.push(line) } else { dropped += 1 }
                }
            }
            Some(Severity::Warning) => warning = Some(shorten(text)),
            None => warning = None,
        }
    }
    if dropped > 0 {
        kept.push(format!("({dropped} more)"));
    }
    (!kept.is_empty()).then(|| kept.join("; "))
}

/// One message of CRIU, without clock and line end; `None` if it means nothing.
pub(crate) fn plain(message: &str) -> Option<String> {
    let text = shorten(without_clock(message));
    (!text.is_empty() && !HARMLESS.iter().any(|known| text.contains(known))).then_some(text)
}

/// Called errors by CRIU, which goes on after them: without CAP_SYS_RESOURCE
/// it works with fewer descriptors.
const HARMLESS: [&str; 1] = ["Can't setup RLIMIT_NOFILE for self"];

enum Severity {
    Warning,
    Error,
}

/// CRIU marks lines `Error (file.c:12): ` and `Warn  (file.c:12): `; lines of
/// the restorer and of programs it starts carry the mark after a prefix.
fn severity(text: &str) -> Option<Severity> {
    let head: String = text.chars().take(48).collect();
    if head.contains("Error (") {
        Some(Severity::Error)
    } else if head.contains("Warn  (") {
        Some(Severity::Warning)
    } else {
        None
    }
}

/// `(00.012345)    123: Error (…` loses the clock and the pid column.
fn without_clock(line: &str) -> &str {
    let text = match line.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
        Some((clock, rest)) if clock.bytes().all(|b| b.is_ascii_digit() || b == b'.') => rest,
        _ => line,
    };
    let text = text.trim();
    match text.split_once(':') {
        Some((pid, rest)) if !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()) => {
            rest.trim_start()
        }
        _ => text,
    }
}

fn shorten(text: &str) -> String {
    // One message is one line: tabs and control characters would break it.
    let text: String =
        text.chars().take(MAX_LINE).map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// The last lines of a log, for a failure that CRIU did not call an error.
pub fn tail(path: &Path, lines: usize) -> Option<String> {
    let log = BufReader::new(File::open(path).ok()?);
    let mut last = VecDeque::with_capacity(lines);
    for line in log.split(b'\n').map_while(Result::ok) {
        if last.len() == lines {
            last.pop_front();
        }
        last.push_back(shorten(&String::from_utf8_lossy(&line)));
    }
    let text = Vec::from(last).join("; ");
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(text: &str) -> Option<String> {
        explain_lines(text.lines().map(|line| line.as_bytes().to_vec()))
    }

    #[test]
    fn errors_come_with_the_warning_before_them() {
        let log = "(00.000001) Version: 4.2.1\n\
            (00.001000) Warn  (criu/kerndat.c:1): unrelated\n\
            (00.002000) something else\n\
            (00.002100) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
            (00.003000) Warn  (criu/files.c:9): odd file\n\
            (00.003100) Error (criu/files-ext.c:99): Can't dump file 7 of that type [600] (unknown anon_inode:[io_uring])\n\
            (00.004000)     77: Error (criu/cr-dump.c:1669): Dump files (pid: 77) failed with -1\n\
            (00.005000) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(
            explain(log).unwrap(),
            "Warn  (criu/files.c:9): odd file; \
             Error (criu/files-ext.c:99): Can't dump file 7 of that type [600] (unknown anon_inode:[io_uring]); \
             Error (criu/cr-dump.c:1669): Dump files (pid: 77) failed with -1; \
             Error (criu/cr-dump.c:2111): Dumping FAILED."
        );
    }

    #[test]
    fn what_is_said_stays_short() {
        let log: String = (0..500)
            .map(|n| format!("(00.000001) Error (x.c:{n}): {}\n", "long ".repeat(400)))
            .collect();
        let text = explain(&log).unwrap();
        assert!(text.len() < MAX_LINES * (MAX_LINE + 2) + 20, "{}", text.len());
        assert!(text.starts_with("Error (x.c:0)") && text.ends_with("(492 more)"), "{text}");
    }

    #[test]
    fn a_clean_log_says_nothing() {
        assert_eq!(explain("(00.1) Dumping finished successfully\n"), None);
        assert_eq!(super::explain(Path::new("/nonexistent/dump.log")), None);
    }
}
