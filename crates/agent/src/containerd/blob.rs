//! Names and sizes of content, checked at the door.

use std::{collections::HashMap, fmt, str::FromStr};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use transship_api::session;

/// An image's document, or a peer's description of one, that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct InvalidContent(String);

pub(super) fn invalid(text: impl Into<String>) -> InvalidContent {
    InvalidContent(text.into())
}

/// A content address: `sha256:` and 64 hex digits (or sha512 and 128).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        Self(format!("sha256:{hex}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = InvalidContent;

    fn from_str(text: &str) -> Result<Self, InvalidContent> {
        let digits = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 => hex,
            Some(("sha512", hex)) if hex.len() == 128 => hex,
            _ => return Err(invalid(format!("no digest: {:?}", shortened(text)))),
        };
        if digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.into()))
        } else {
            Err(invalid(format!("no digest: {:?}", shortened(text))))
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidContent;

    fn try_from(text: String) -> Result<Self, InvalidContent> {
        text.parse()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A hostile text may be long; an error must not be.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// One piece of content: a descriptor that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
}

impl Blob {
    pub fn to_session(&self, labels: HashMap<String, String>) -> session::Descriptor {
        session::Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            labels,
        }
    }
}

impl TryFrom<&session::Descriptor> for Blob {
    type Error = InvalidContent;

    fn try_from(from: &session::Descriptor) -> Result<Self, InvalidContent> {
        if from.media_type.is_empty() || from.media_type.len() > 255 {
            return Err(invalid(format!("no media type: {:?}", shortened(&from.media_type))));
        }
        let size = u64::try_from(from.size)
            .map_err(|_| invalid(format!("blob {} has size {}", from.digest, from.size)))?;
        Ok(Self { media_type: from.media_type.clone(), digest: from.digest.parse()?, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_are_digests() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert!(good.parse::<Digest>().is_ok());
        assert!(format!("sha512:{}", "0a".repeat(64)).parse::<Digest>().is_ok());
        let (upper, long) = (good.to_uppercase(), "x".repeat(10_000));
        for bad in ["", "sha256:", "sha256:../../etc/passwd", &good[1..], &upper, &long] {
            let error = bad.parse::<Digest>().unwrap_err();
            assert!(error.to_string().len() < 200, "{bad:.20}");
        }
    }

    #[test]
    fn a_peers_descriptor_is_checked() {
        let good = session::Descriptor {
            media_type: "application/octet-stream".into(),
            digest: format!("sha256:{}", "00".repeat(32)),
            size: 5,
            ..Default::default()
        };
        assert_eq!(Blob::try_from(&good).unwrap().size, 5);
        assert!(Blob::try_from(&session::Descriptor { size: -1, ..good.clone() }).is_err());
        assert!(Blob::try_from(&session::Descriptor { media_type: "".into(), ..good }).is_err());
    }
}
