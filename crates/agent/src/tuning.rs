//! How memory is to travel: what a request wants, else what the configuration
//! says, else what the shim does by itself.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error};
use transship_api::control::Tuning;
use transship_migration::{Budget, PostCopy, Throttle};
use transship_types::{
    Code,
    quantity::{self, micros},
    tuning,
};

use crate::failure::{Failure, Step};

/// `[memory]` of the configuration. Absent: the shim's own default.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    #[serde(deserialize_with = "pause")]
    pub max_pause: Option<Duration>,
    #[serde(deserialize_with = "throttle")]
    pub throttle: Option<String>,
    #[serde(deserialize_with = "post_copy")]
    pub post_copy: Option<String>,
    #[serde(deserialize_with = "lanes")]
    pub lanes: Option<u32>,
    /// Bytes per second.
    #[serde(deserialize_with = "bandwidth")]
    pub bandwidth: Option<u64>,
    #[serde(deserialize_with = "compress")]
    pub compress: Option<String>,
}

/// For the shim: checked, and 0 bandwidth is no limit.
pub fn choose(wish: &Tuning, configured: &Memory) -> Step<Tuning> {
    let configured_pause = configured.max_pause.unwrap_or_default();
    let chosen = Tuning {
        max_pause_us: or(wish.max_pause_us, micros(configured_pause)),
        throttle: word(&wish.throttle, configured.throttle.as_ref()),
        post_copy: word(&wish.post_copy, configured.post_copy.as_ref()),
        lanes: or(wish.lanes, configured.lanes.unwrap_or_default()),
        bandwidth: match or(wish.bandwidth, configured.bandwidth.unwrap_or_default()) {
            u64::MAX => 0,
            rate => rate,
        },
        compress: word(&wish.compress, configured.compress.as_ref()),
        ..Default::default()
    };
    check(&chosen)?;
    Ok(chosen)
}

/// Requests come from our own command line, which has checked them, and from
/// programs.
fn check(tuning: &Tuning) -> Step<()> {
    let one_of = |name: &str, word: &str, words: &[&str]| {
        let good = word.is_empty() || words.contains(&word);
        if good { Ok(()) } else { Err(wrong(name, word, &words.join(", "))) }
    };
    one_of("throttle", &tuning.throttle, &tuning::THROTTLE)?;
    one_of("post_copy", &tuning.post_copy, &tuning::POST_COPY)?;
    one_of("compress", &tuning.compress, &tuning::COMPRESS)?;
    if tuning.max_pause_us > 0 {
        let pause = Duration::from_micros(tuning.max_pause_us);
        pause_within(pause).map_err(|wanted| wrong("max_pause", &format!("{pause:?}"), &wanted))?;
    }
    if tuning.lanes > 0 {
        lanes_within(tuning.lanes)
            .map_err(|wanted| wrong("lanes", &tuning.lanes.to_string(), &wanted))?;
    }
    Ok(())
}

/// The budget as the shim will have it.
pub fn budget(tuning: &Tuning) -> Budget {
    let by_default = Budget::default();
    Budget {
        max_pause: match tuning.max_pause_us {
            0 => by_default.max_pause,
            pause => Duration::from_micros(pause),
        },
        throttle: match tuning.throttle.as_str() {
            "never" => Throttle::Never,
            _ => by_default.throttle,
        },
        post_copy: match tuning.post_copy.as_str() {
            "auto" => PostCopy::Auto,
            "always" => PostCopy::Always,
            _ => by_default.post_copy,
        },
        ..by_default
    }
}

/// Whether the container would run before all of its memory is there.
pub fn wants_post_copy(tuning: &Tuning) -> bool {
    !["", "never"].contains(&tuning.post_copy.as_str())
}

fn wrong(name: &str, said: &str, wanted: &str) -> Failure {
    let shown: String = said.chars().take(40).collect();
    Failure::new(
        Code::Malformed,
        format!("{name} is {shown:?}"),
        format!("what can be asked for is: {wanted}"),
    )
}

fn pause_within(pause: Duration) -> Result<Duration, String> {
    let (least, most) = (tuning::MAX_PAUSE.start(), tuning::MAX_PAUSE.end());
    let good = tuning::MAX_PAUSE.contains(&pause);
    good.then_some(pause).ok_or_else(|| format!("from {least:?} to {most:?}"))
}

fn lanes_within(lanes: u32) -> Result<u32, String> {
    let (least, most) = (tuning::LANES.start(), tuning::LANES.end());
    let good = tuning::LANES.contains(&lanes);
    good.then_some(lanes).ok_or_else(|| format!("from {least} to {most}"))
}

fn or<T: Default + PartialEq>(wish: T, otherwise: T) -> T {
    if wish == T::default() { otherwise } else { wish }
}

fn word(wish: &str, configured: Option<&String>) -> String {
    let chosen = Some(wish).filter(|w| !w.is_empty()).or(configured.map(String::as_str));
    chosen.unwrap_or_default().into()
}

type Read<T, E> = Result<Option<T>, E>;

fn pause<'de, D: Deserializer<'de>>(from: D) -> Read<Duration, D::Error> {
    let pause = quantity::duration(&String::deserialize(from)?).map_err(D::Error::custom)?;
    pause_within(pause).map(Some).map_err(D::Error::custom)
}

fn bandwidth<'de, D: Deserializer<'de>>(from: D) -> Read<u64, D::Error> {
    quantity::rate(&String::deserialize(from)?).map_err(D::Error::custom)
}

fn lanes<'de, D: Deserializer<'de>>(from: D) -> Read<u32, D::Error> {
    lanes_within(u32::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

fn throttle<'de, D: Deserializer<'de>>(from: D) -> Read<String, D::Error> {
    choice(from, &tuning::THROTTLE)
}

fn post_copy<'de, D: Deserializer<'de>>(from: D) -> Read<String, D::Error> {
    choice(from, &tuning::POST_COPY)
}

fn compress<'de, D: Deserializer<'de>>(from: D) -> Read<String, D::Error> {
    choice(from, &tuning::COMPRESS)
}

fn choice<'de, D: Deserializer<'de>>(from: D, words: &[&str]) -> Read<String, D::Error> {
    let word = String::deserialize(from)?;
    if words.contains(&word.as_str()) {
        return Ok(Some(word));
    }
    Err(D::Error::custom(format!("it must be one of {}", words.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured() -> Memory {
        Memory {
            max_pause: Some(Duration::from_millis(30)),
            throttle: Some("never".into()),
            lanes: Some(2),
            bandwidth: Some(1000),
            ..Default::default()
        }
    }

    #[test]
    fn a_wish_comes_before_the_configuration() {
        let wish = Tuning { lanes: 7, throttle: "auto".into(), ..Default::default() };
        let chosen = choose(&wish, &configured()).unwrap();
        assert_eq!((chosen.lanes, chosen.throttle.as_str()), (7, "auto"));
        assert_eq!((chosen.max_pause_us, chosen.bandwidth), (30_000, 1000));
        assert_eq!((chosen.compress.as_str(), chosen.post_copy.as_str()), ("", ""));
    }

    #[test]
    fn a_limit_can_be_wished_away() {
        let wish = Tuning { bandwidth: u64::MAX, ..Default::default() };
        assert_eq!(choose(&wish, &configured()).unwrap().bandwidth, 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let wishes = [
            Tuning { throttle: "x".into(), ..Default::default() },
            Tuning { post_copy: "x".into(), ..Default::default() },
            Tuning { compress: "gzip".into(), ..Default::default() },
            Tuning { lanes: 1000, ..Default::default() },
            Tuning { max_pause_us: 1, ..Default::default() },
        ];
        for wish in wishes {
            let refused = choose(&wish, &Memory::default()).unwrap_err();
            assert_eq!(refused.0[0].code, Code::Malformed, "{wish:?}");
        }
    }
}
