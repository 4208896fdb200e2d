//! Where a client wants a process's stdio: a fifo's path, or a URI.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Stdio as a Create or Exec request names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urls {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Nothing,
    Fifo(PathBuf),
    File(PathBuf),
    Logger(LoggerCommand),
}

/// A log driver by containerd's `binary://` protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggerCommand {
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

impl Output {
    pub fn parse(url: &str) -> Result<Self> {
        if url.is_empty() {
            return Ok(Output::Nothing);
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            return Ok(Output::Fifo(url.into()));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decoded(path, false));
        if !path.is_absolute() {
            return Err(Error::InvalidArgument(format!("{url} names no absolute path")));
        }
        match scheme {
            "fifo" => Ok(Output::Fifo(path)),
            "file" => Ok(Output::File(path)),
            "binary" => {
                Ok(Output::Logger(LoggerCommand { program: path, arguments: arguments(query) }))
            }
            _ => Err(Error::InvalidArgument(format!(
                "output scheme {scheme:?} of {url} is not known; fifo, file and binary are"
            ))),
        }
    }
}

/// stdin is always a fifo.
pub fn fifo_path(url: &str) -> &Path {
    Path::new(url.strip_prefix("fifo://").unwrap_or(url))
}

/// `?k=v&flag` becomes the arguments `k v flag`; of a repeated key the first.
fn arguments(query: &str) -> Vec<String> {
    let mut seen = Vec::new();
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) => (decoded(key, true), decoded(value, true)),
            None => (decoded(pair, true), String::new()),
        };
        if seen.contains(&key) {
            continue;
        }
        arguments.push(key.clone());
        if !value.is_empty() {
            arguments.push(value);
        }
        seen.push(key);
    }
    arguments
}

/// Percent decoding (RFC 3986); in a query `+` is a space. What is not a
/// sound escape stays as it is.
fn decoded(text: &str, query: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], escape.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) if query => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_told_apart() {
        for (url, wanted) in [
            ("", Output::Nothing),
            ("/run/x/stdout", Output::Fifo("/run/x/stdout".into())),
            ("fifo:///run/x", Output::Fifo("/run/x".into())),
            ("file:///var/log/a%20b.log", Output::File("/var/log/a b.log".into())),
            (
                "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib&flag&x=a+b&x=c",
                Output::Logger(LoggerCommand {
                    program: "/usr/bin/nerdctl".into(),
                    arguments: ["_NERDCTL_INTERNAL_LOGGING", "/var/lib", "flag", "x", "a b"]
                        .map(String::from)
                        .into(),
                }),
            ),
        ] {
            assert_eq!(Output::parse(url).unwrap(), wanted, "{url}");
        }
        for url in ["npipe:///x", "file://relative", "binary://"] {
            assert!(matches!(Output::parse(url), Err(Error::InvalidArgument(_))), "{url}");
        }
    }

    #[test]
    fn odd_escapes_stay() {
        assert_eq!(decoded("100%", false), "100%");
        assert_eq!(decoded("a%zz+%41", false), "a%zz+A");
    }
}
