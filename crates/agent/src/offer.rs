//! A peer's offer, checked once at the door. What comes out needs no second
//! look: names are valid, digests are digests, sizes are sizes.

use std::collections::HashSet;

use transship_api::session::{Container, Descriptor, Host, Offer, Stdio};
use transship_types::{Code, ContainerKey, MigrationId};

use crate::{
    containerd::spec::Spec,
    failure::{Failure, Step},
};

/// Images have tens of layers; containerd's snapshots end at 127.
const CONTENT_MAX: usize = 1024;

#[derive(Debug, Clone)]
pub struct Checked {
    pub migration: MigrationId,
    pub key: ContainerKey,
    pub record: Container,
    pub spec: Spec,
    pub content: Vec<Descriptor>,
    pub host: Host,
    pub memory_bytes: u64,
    pub rootfs_bytes: u64,
    pub stdio: Stdio,
    /// Name and version of the OCI runtime.
    pub runtime: String,
}

pub fn check(offer: Offer) -> Step<Checked> {
    let key = ContainerKey::new(&offer.namespace, &offer.container)
        .map_err(|e| malformed(e.to_string()))?;
    let migration = offer.migration.parse().map_err(|e| malformed(format!("{e}")))?;
    let record = offer.record.ok_or_else(|| malformed("the container's record is missing"))?;
    let spec = record.spec.as_ref().ok_or_else(|| malformed("the container's spec is missing"))?;
    let spec = Spec::read(&spec.value, &key).map_err(|e| malformed(e.to_string()))?;
    if offer.content.len() > CONTENT_MAX {
        return Err(malformed(format!("an image of {} blobs", offer.content.len())));
    }
    let mut seen = HashSet::new();
    for blob in &offer.content {
        if !is_digest(&blob.digest) || blob.size < 0 {
            let digest: String = blob.digest.chars().take(80).collect();
            return Err(malformed(format!("a blob {digest:?} of {} bytes", blob.size)));
        }
        if !seen.insert(&blob.digest) {
            return Err(malformed(format!("blob {} is named twice", blob.digest)));
        }
    }
    Ok(Checked {
        migration,
        key,
        spec,
        content: offer.content,
        host: offer.host.ok_or_else(|| malformed("the source's host is missing"))?,
        memory_bytes: offer.memory_bytes,
        rootfs_bytes: offer.rootfs_bytes,
        stdio: offer.stdio.unwrap_or_default(),
        runtime: offer.runtime,
        record,
    })
}

/// `sha256:` and 64 hex digits, or the same with sha512: what containerd
/// accepts, and nothing that could be a path.
fn is_digest(text: &str) -> bool {
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    match text.split_once(':') {
        Some(("sha256", hex)) => hex.len() == 64 && hex.bytes().all(lower_hex),
        Some(("sha512", hex)) => hex.len() == 128 && hex.bytes().all(lower_hex),
        _ => false,
    }
}

fn malformed(what: impl Into<String>) -> Failure {
    let reason = format!("the offer cannot be accepted: {}", what.into());
    Failure::new(Code::Malformed, reason, "run the same version of Transship on both nodes")
}

#[cfg(test)]
pub mod tests {
    use transship_api::session::Any;

    use super::*;

    pub fn digest(n: u8) -> String {
        format!("sha256:{}", format!("{n:02x}").repeat(32))
    }

    pub fn offer() -> Offer {
        Offer {
            migration: "ab".repeat(16),
            namespace: "default".into(),
            container: "redis".into(),
            record: Some(Container {
                image: "example.org/redis:1".into(),
                runtime: transship_types::RUNTIME.into(),
                snapshotter: "overlayfs".into(),
                spec: Some(Any {
                    type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
                    value: br#"{"linux":{"namespaces":[{"type":"network"}]}}"#[..].into(),
                }),
                ..Default::default()
            }),
            content: vec![Descriptor { digest: digest(1), size: 10, ..Default::default() }],
            host: Some(Host::default()),
            ..Default::default()
        }
    }

    #[test]
    fn a_good_offer_passes() {
        let checked = check(offer()).unwrap();
        assert_eq!(checked.key.to_string(), "default/redis");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        type Change = fn(&mut Offer);
        let changes: [(&str, Change); 9] = [
            ("container", |o| o.container = "../../etc".into()),
            ("namespace", |o| o.namespace = String::new()),
            ("migration", |o| o.migration = "x".into()),
            ("record", |o| o.record = None),
            ("spec", |o| o.record.as_mut().unwrap().spec = None),
            ("spec json", |o| {
                o.record.as_mut().unwrap().spec.as_mut().unwrap().value = b"[]"[..].into();
            }),
            ("digest", |o| o.content[0].digest = "sha256:../../../etc/passwd".into()),
            ("size", |o| o.content[0].size = -1),
            ("twice", |o| o.content.push(o.content[0].clone())),
        ];
        for (what, change) in changes {
            let mut bad = offer();
            change(&mut bad);
            let failure = check(bad).expect_err(what);
            assert_eq!(failure.0[0].code, Code::Malformed, "{what}");
        }
    }
}
