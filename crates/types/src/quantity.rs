//! Durations and rates as people write them: `100ms`, `1Gbit/s`.

use std::time::Duration;

use thiserror::Error;

/// Text that is no such quantity.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidQuantity {
    #[error("{0:?} is no duration; write it like 100ms or 1.5s")]
    Duration(String),
    #[error("{0:?} is no rate; write it like 1Gbit/s, 100MiB/s or none")]
    Rate(String),
}

/// As messages and reports carry a duration. Longer than they can say is as
/// long as they can.
pub fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

const DURATIONS: [(&str, f64); 5] =
    [("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0)];

/// Bytes per unit. Networks count in powers of ten and bits, programs in
/// powers of two and bytes; both write it out.
const RATES: [(&str, f64); 12] = [
    ("bit", 0.125),
    ("kbit", 125.0),
    ("Mbit", 125e3),
    ("Gbit", 125e6),
    ("Tbit", 125e9),
    ("B", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("KiB", 1024.0),
    ("MiB", 1048576.0),
    ("GiB", 1073741824.0),
];

/// A number and a unit, without which it would mean something else to each.
pub fn duration(text: &str) -> Result<Duration, InvalidQuantity> {
    let invalid = || InvalidQuantity::Duration(shown(text));
    let seconds = number(text, &DURATIONS).ok_or_else(invalid)?;
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid())
}

/// Bytes per second; `None` for `none`. `/s` may be left out.
pub fn rate(text: &str) -> Result<Option<u64>, InvalidQuantity> {
    if text == "none" {
        return Ok(None);
    }
    let bytes = number(text.strip_suffix("/s").unwrap_or(text), &RATES);
    match bytes.map(f64::round) {
        // Beyond that a number is a slip, and below it nothing would move.
        Some(bytes) if (1.0..=1e15).contains(&bytes) => Ok(Some(bytes as u64)),
        _ => Err(InvalidQuantity::Rate(shown(text))),
    }
}

fn number(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    Some(number.parse::<f64>().ok()? * factor)
}

/// Errors repeat what was written, and not a whole file.
fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        for (text, micros) in [
            ("100ms", 100_000),
            ("1.5s", 1_500_000),
            ("250 us", 250),
            ("7µs", 7),
            ("2min", 120_000_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_micros(micros)), "{text}");
        }
        for text in ["", "100", "ms", "-1s", "1e3s", "1..2s", "1S", "1 fortnight", "1s2"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_in_bits_or_in_bytes() {
        for (text, bytes) in [
            ("1Gbit/s", 125_000_000),
            ("1Gbit", 125_000_000),
            ("100MiB/s", 100 << 20),
            ("12.5 MB/s", 12_500_000),
            ("8bit/s", 1),
        ] {
            assert_eq!(rate(text), Ok(Some(bytes)), "{text}");
        }
        assert_eq!(rate("none"), Ok(None));
        for text in [
            "",
            "0MB/s",
            "1",
            "100",
            "1Gb/s",
            "1gbit/s",
            "MiB/s",
            "999999TB",
            "1MB/h",
            "9999999Tbit",
        ] {
            let error = rate(text).unwrap_err().to_string();
            assert!(error.contains("1Gbit/s"), "{error}");
        }
    }
}
