//! The flags for how memory travels, checked before anything is asked.

use std::time::Duration;

use clap::Args;
use transship_api::control;
use transship_types::{quantity, tuning};

/// What is not given is as transshipd's configuration says.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Memory (defaults: [memory] of transshipd's configuration)")]
pub struct Tuning {
    /// Go on sending what was written until a pause of so long is expected
    /// (100ms).
    #[arg(long, value_name = "DURATION", value_parser = max_pause)]
    pub max_pause: Option<Duration>,
    /// Slow down a container that writes faster than the link carries (auto).
    #[arg(long, value_parser = tuning::THROTTLE)]
    pub throttle: Option<String>,
    /// Let it run there before all its memory is there (never).
    #[arg(long, value_parser = tuning::POST_COPY)]
    pub post_copy: Option<String>,
    /// Connections for pages (2).
    #[arg(long, value_name = "N", value_parser = lanes)]
    pub lanes: Option<u32>,
    /// A limit for pages on the wire, such as 1Gbit/s or 100MiB/s, or none
    /// (none).
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub bandwidth: Option<Bandwidth>,
    /// Compress pages (auto).
    #[arg(long, value_parser = tuning::COMPRESS)]
    pub compress: Option<String>,
}

/// Bytes per second; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth(pub Option<u64>);

impl Tuning {
    pub fn message(&self) -> control::Tuning {
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        control::Tuning {
            max_pause_us: self.max_pause.map_or(0, micros),
            throttle: self.throttle.clone().unwrap_or_default(),
            post_copy: self.post_copy.clone().unwrap_or_default(),
            lanes: self.lanes.unwrap_or_default(),
            // Without a limit is not the same as without a wish.
            bandwidth: self.bandwidth.map_or(0, |Bandwidth(rate)| rate.unwrap_or(u64::MAX)),
            compress: self.compress.clone().unwrap_or_default(),
            ..Default::default()
        }
    }
}

fn max_pause(text: &str) -> Result<Duration, String> {
    let pause = quantity::duration(text).map_err(|e| e.to_string())?;
    let (least, most) = (tuning::MAX_PAUSE.start(), tuning::MAX_PAUSE.end());
    if tuning::MAX_PAUSE.contains(&pause) {
        Ok(pause)
    } else {
        Err(format!("it must be from {least:?} to {most:?}"))
    }
}

fn lanes(text: &str) -> Result<u32, String> {
    let (least, most) = (tuning::LANES.start(), tuning::LANES.end());
    text.parse()
        .ok()
        .filter(|n| tuning::LANES.contains(n))
        .ok_or_else(|| format!("it must be a number from {least} to {most}"))
}

pub fn bandwidth(text: &str) -> Result<Bandwidth, String> {
    quantity::rate(text).map(Bandwidth).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        tuning: Tuning,
    }

    fn parse(arguments: &[&str]) -> Result<Tuning, String> {
        let all = std::iter::once("program").chain(arguments.iter().copied());
        Program::try_parse_from(all).map(|p| p.tuning).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_not_said_is_left_to_the_agent() {
        assert_eq!(parse(&[]).unwrap().message(), control::Tuning::default());
    }

    #[test]
    fn everything_can_be_said() {
        let tuning = parse(&[
            "--max-pause=250ms",
            "--throttle=never",
            "--post-copy=always",
            "--lanes=4",
            "--bandwidth=1Gbit/s",
            "--compress=zstd",
        ]);
        let wanted = control::Tuning {
            max_pause_us: 250_000,
            throttle: "never".into(),
            post_copy: "always".into(),
            lanes: 4,
            bandwidth: 125_000_000,
            compress: "zstd".into(),
            ..Default::default()
        };
        assert_eq!(tuning.unwrap().message(), wanted);
        assert_eq!(parse(&["--bandwidth=none"]).unwrap().message().bandwidth, u64::MAX);
    }

    #[test]
    fn a_mistake_is_named() {
        for (wrong, words) in [
            ("--max-pause=100", "write it like 100ms"),
            ("--max-pause=10us", "from 1ms to 60s"),
            ("--max-pause=61s", "from 1ms to 60s"),
            ("--throttle=maybe", "auto, never"),
            ("--post-copy=on", "never, auto, always"),
            ("--lanes=0", "from 1 to 16"),
            ("--lanes=99", "from 1 to 16"),
            ("--bandwidth=fast", "write it like 1Gbit/s"),
            ("--bandwidth=0MB/s", "write it like 1Gbit/s"),
            ("--compress=gzip", "auto, never, lz4, zstd"),
        ] {
            let error = parse(&[wrong]).unwrap_err();
            assert!(error.contains(words), "{wrong}: {error}");
        }
    }
}
