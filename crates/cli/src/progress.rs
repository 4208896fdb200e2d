//! A bar on a terminal, nothing elsewhere.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use transship_api::control::Progress;

use crate::{Output, print};

const COUNTED: &str =
    "{spinner} {msg:10} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
const UNCOUNTED: &str = "{spinner} {msg:10} {binary_bytes} {binary_bytes_per_sec}";
const BARE: &str = "{spinner} {msg} {elapsed}";
const ROUNDS: &str = "{spinner} {msg}";

pub struct Bar {
    bar: ProgressBar,
    phase: String,
}

impl Bar {
    pub fn new(output: Output) -> Self {
        let shown = output == Output::Text && io::stderr().is_terminal();
        let bar = if shown { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if shown {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self { bar, phase: String::new() }
    }

    pub fn show(&mut self, progress: &Progress) {
        if progress.phase != self.phase {
            self.phase.clone_from(&progress.phase);
            self.bar.set_message(self.phase.clone());
            // The rate is that of the phase.
            self.bar.reset();
        }
        let template = match (progress.round, progress.bytes, progress.bytes_total) {
            (1.., ..) => ROUNDS,
            (_, 0, 0) => BARE,
            (_, _, 0) => UNCOUNTED,
            _ => COUNTED,
        };
        if progress.round > 0 {
            self.bar.set_message(round(progress));
        }
        // The templates are constants, tested below.
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_length(progress.bytes_total);
        self.bar.set_position(progress.bytes);
    }

    /// A line above the bar.
    pub fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// What matters while memory travels in rounds: the bytes that were sent are
/// no measure of how far it is.
pub fn round(p: &Progress) -> String {
    let mut text = format!("round {}: {} to go", p.round, print::bytes(p.dirty_bytes));
    if p.rate > 0 {
        text += &format!(" at {}", print::rate(p.rate));
    }
    if p.expected_downtime_us > 0 {
        text += &format!(", pause of {} expected", print::micros(p.expected_downtime_us));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        for template in [COUNTED, UNCOUNTED, BARE, ROUNDS] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn a_round_says_what_is_left_and_what_to_expect() {
        let mut progress = Progress { round: 2, dirty_bytes: 3 << 20, ..Default::default() };
        assert_eq!(round(&progress), "round 2: 3.0 MiB to go");
        (progress.rate, progress.expected_downtime_us) = (100 << 20, 64_000);
        assert_eq!(
            round(&progress),
            "round 2: 3.0 MiB to go at 100.0 MiB/s, pause of 64.0 ms expected"
        );
    }
}
