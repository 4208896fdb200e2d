//! What a tmpfs was mounted with.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// Options of a tmpfs as a file system, as mountinfo shows them and as the
/// kernel takes them again. Only what is understood is one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub(super) read_only: bool,
    /// With a value, or a flag.
    pub(super) others: Vec<(String, Option<String>)>,
}

/// Some other option decides what the container sees, or what it may do.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the option {0:?} of a tmpfs is none that could be set again")]
pub struct UnknownOption(pub String);

/// Numbers, in the form in which the kernel writes them.
const NUMBERS: [&str; 5] = ["size", "nr_inodes", "mode", "uid", "gid"];
const FLAGS: [&str; 3] = ["inode32", "inode64", "noswap"];
const HUGE: [&str; 4] = ["never", "always", "within_size", "advise"];

/// More than the kernel ever shows.
const MOST: usize = 16;

impl FromStr for Options {
    type Err = UnknownOption;

    fn from_str(text: &str) -> Result<Self, UnknownOption> {
        let mut options = Self { read_only: false, others: Vec::new() };
        for option in text.split(',') {
            let unknown = || UnknownOption(option.chars().take(80).collect());
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            match (name, value) {
                ("rw", None) => options.read_only = false,
                ("ro", None) => options.read_only = true,
                // It says what the node's policy is, and sets nothing.
                ("seclabel", None) => {}
                (name, Some(value)) if NUMBERS.contains(&name) && is_number(value) => {
                    options.add(name, Some(value));
                }
                ("huge", Some(value)) if HUGE.contains(&value) => options.add(name, Some(value)),
                (name, None) if FLAGS.contains(&name) => options.add(name, None),
                _ => return Err(unknown()),
            }
            if options.others.len() > MOST {
                return Err(unknown());
            }
        }
        Ok(options)
    }
}

impl Options {
    fn add(&mut self, name: &str, value: Option<&str>) {
        self.others.push((name.to_owned(), value.map(str::to_owned)));
    }
}

/// As mountinfo has them; [`FromStr`] reads it.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.read_only { "ro" } else { "rw" })?;
        for (name, value) in &self.others {
            match value {
                Some(value) => write!(f, ",{name}={value}")?,
                None => write!(f, ",{name}")?,
            }
        }
        Ok(())
    }
}

/// Digits, and the unit of a size.
fn is_number(text: &str) -> bool {
    let digits = text.strip_suffix('k').unwrap_or(text);
    (1..=20).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_shows_is_read_and_written_again() {
        for text in [
            "rw",
            "ro",
            "rw,size=65536k,mode=755",
            "rw,size=1024k,nr_inodes=10,mode=700,uid=5,gid=6,inode64,huge=within_size,noswap",
        ] {
            assert_eq!(text.parse::<Options>().unwrap().to_string(), text);
        }
        assert_eq!("rw,seclabel".parse::<Options>().unwrap().to_string(), "rw");
    }

    #[test]
    fn nothing_else_is_an_option() {
        for text in [
            "",
            "rw,",
            "rw,sync",
            "rw,lazytime",
            "rw,mpol=bind:0",
            "rw,size=",
            "rw,size=-1",
            "rw,size=1g",
            "rw,size=50%",
            "rw,size=123456789012345678901",
            "rw,mode",
            "rw,huge=maybe",
            "rw,inode64=1",
            "rw,context=system_u:object_r:x",
            "rw,source=/etc",
            "rw,usrquota",
        ] {
            assert!(text.parse::<Options>().is_err(), "{text}");
        }
        let many = format!("rw{}", ",inode64".repeat(17));
        assert!(many.parse::<Options>().is_err());
    }
}
