//! Results on standard output, errors where they belong.

use std::io::{self, Write};

use serde_json::Value;

use crate::{Output, error::Failure};

/// One JSON object or array, on one line.
pub fn json(value: &Value) {
    line(&value.to_string());
}

/// A reader that went away (`| head`) is no error of ours.
pub fn line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

pub fn error(output: Output, failure: &Failure) {
    match output {
        Output::Json => json(&failure.json()),
        Output::Text => drop(writeln!(io::stderr(), "transship: {failure}")),
    }
}

/// Columns as wide as their widest cell; the last one is ragged.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    for row in layout(head, rows) {
        line(&row);
    }
}

pub fn layout(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(|h| h.to_string()).collect();
    let all: Vec<_> = std::iter::once(&head).chain(rows).collect();
    let wide = |column: usize| {
        all.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..head.len()).map(wide).collect();
    all.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
        })
        .collect()
}

pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

pub fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// `1 lane`, `2 lanes`.
pub fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

pub fn micros(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} µs"),
        1_000..1_000_000 => format!("{:.1} ms", n as f64 / 1e3),
        _ => format!("{:.2} s", n as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "long".into()], vec!["wide".into(), String::new()]];
        assert_eq!(layout(&["X", "Y"], &rows), ["X     Y", "a     long", "wide"]);
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 30)], ["7 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!([micros(7), micros(34_140), micros(1_234_567)], ["7 µs", "34.1 ms", "1.23 s"]);
    }
}
