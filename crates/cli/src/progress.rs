//! A bar on a terminal, nothing elsewhere.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use transship_api::control::Progress;

use crate::Output;

const COUNTED: &str =
    "{spinner} {msg:10} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
const UNCOUNTED: &str = "{spinner} {msg:10} {binary_bytes} {binary_bytes_per_sec}";
const BARE: &str = "{spinner} {msg} {elapsed}";

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
        let template = match (progress.bytes, progress.bytes_total) {
            (0, 0) => BARE,
            (_, 0) => UNCOUNTED,
            _ => COUNTED,
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        for template in [COUNTED, UNCOUNTED, BARE] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
