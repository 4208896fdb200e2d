//! `/proc/PID/smaps` as far as CRIU reads it: the lines of `/proc/PID/maps`,
//! and after each the flags of that mapping.
//!
//! CRIU 4.1 and 4.2 (`parse_smaps` in criu/proc_parse.c) skip every line that
//! is neither the head of a mapping nor its `VmFlags`.

use std::io::Write;

use super::flags::Flagged;

/// The head of a mapping, `start-end perms offset device inode   name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    pub start: u64,
    pub end: u64,
    pub name: &'a [u8],
}

/// Joins them; `None` if they are not of the same mappings, or one has flags
/// that we do not know.
pub fn join(maps: &[u8], flags: &[Flagged]) -> Option<Vec<u8>> {
    let mut flags = flags.iter();
    let mut joined = Vec::with_capacity(maps.len() * 2);
    for line in maps.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let header = header(line)?;
        joined.extend_from_slice(line);
        joined.push(b'\n');
        // Listed for everybody and mapped for nobody.
        if header.name == b"[vsyscall]" {
            continue;
        }
        let of_it = flags.next().filter(|of| (of.start, of.end) == (header.start, header.end))?;
        joined.extend_from_slice(b"VmFlags:");
        for name in of_it.names()? {
            write!(joined, " {name}").ok()?;
        }
        joined.extend_from_slice(b" \n");
    }
    flags.next().is_none().then_some(joined)
}

/// The mappings in the text of a smaps file, with the names of their flags.
pub fn entries(text: &[u8]) -> Vec<(Header<'_>, Vec<&str>)> {
    let mut entries = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let flags = std::str::from_utf8(flags).unwrap_or_default();
            if let Some((_, last)) = entries.last_mut() {
                *last = flags.split_ascii_whitespace().collect();
            }
        } else if let Some(header) = header(line) {
            entries.push((header, Vec::new()));
        }
    }
    entries
}

fn header(line: &[u8]) -> Option<Header<'_>> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let range = std::str::from_utf8(fields.next()?).ok()?;
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let name = fields.nth(4)?.trim_ascii_start();
    Some(Header { start: address(start)?, end: address(end)?, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
55d0c0000000-55d0c0002000 r--p 00000000 fe:00 1234                       /usr/bin/with space
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
7f0000100000-7f0000200000 rw-s 00000000 00:01 99                         /memfd:\xff (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    fn flags() -> Vec<Flagged> {
        let flagged = |start, end, word| Flagged { start, end, word };
        vec![
            flagged(0x55d0_c000_0000, 0x55d0_c000_2000, 0),
            flagged(0x7f00_0000_0000, 0x7f00_0002_1000, 1 << 13 | 1 << 17),
            flagged(0x7f00_0010_0000, 0x7f00_0020_0000, 1 << 26),
        ]
    }

    #[test]
    fn every_line_is_followed_by_its_flags() {
        let joined = join(MAPS, &flags()).unwrap();
        let entries = entries(&joined);
        let names: Vec<_> = entries.iter().map(|(header, _)| header.name).collect();
        let of_each: Vec<_> = entries.iter().map(|(_, flags)| flags.as_slice()).collect();
        assert_eq!(
            names,
            [b"/usr/bin/with space", &b""[..], b"/memfd:\xff (deleted)", b"[vsyscall]"]
        );
        assert_eq!(of_each, [&[][..], &["lo", "dc"], &["dd"], &[]]);
        let heads = joined.split(|byte| *byte == b'\n');
        let heads: Vec<_> = heads.filter(|line| !line.starts_with(b"VmFlags:")).collect();
        assert_eq!(heads.join(&b'\n'), MAPS);
    }

    #[test]
    fn two_that_differ_are_not_joined() {
        let mut flags = flags();
        assert!(join(MAPS, &flags[..2]).is_none(), "one is missing");
        flags[1].end += 4096;
        assert!(join(MAPS, &flags).is_none(), "one is longer");
        flags[1].end -= 4096;
        flags.push(Flagged { start: 1 << 50, end: 1 << 51, word: 0 });
        assert!(join(MAPS, &flags).is_none(), "one is new");
        flags.pop();
        flags[2].word = 1 << 41;
        assert!(join(MAPS, &flags).is_none(), "nobody knows what that is");
    }
}
