//! What an image is made of, decided without touching the store: documents
//! parsed, platforms ranked, chain ids computed.

use std::{collections::HashMap, fmt};

use serde::Deserialize;

use super::blob::{Blob, Digest, InvalidContent, invalid, shortened};

/// Manifests are kilobytes. containerd refuses larger ones from a registry.
pub(super) const DOCUMENT_MAX: u64 = 8 << 20;
/// overlayfs stops at 500 lower directories; nothing real comes near.
const LAYERS_MAX: usize = 500;
/// Entries of one index: a platform and an attestation each.
const ENTRIES_MAX: usize = 1000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl From<Descriptor> for Blob {
    fn from(from: Descriptor) -> Self {
        Self { media_type: from.media_type, digest: from.digest, size: from.size }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Platform {
    architecture: String,
    os: String,
}

impl Platform {
    /// This machine, in the words of Go that images use.
    pub(super) fn ours() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into() }
    }

    /// How well something made for `other` runs here: 0 is best, none is not
    /// at all. Without a platform its configuration will tell.
    fn rank(&self, other: Option<&Platform>) -> Option<u8> {
        let Some(other) = other else { return Some(1) };
        if other.os != self.os {
            return None;
        }
        match (self.architecture.as_str(), other.architecture.as_str()) {
            (ours, theirs) if ours == theirs => Some(0),
            ("amd64", "386") | ("arm64", "arm") => Some(2),
            _ => None,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// An index or a manifest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Document {
    /// What may run here, best first.
    Index(Vec<Blob>),
    Manifest {
        config: Blob,
        layers: Vec<Blob>,
    },
}

pub(super) fn parse(
    blob: &Blob,
    bytes: &[u8],
    ours: &Platform,
) -> Result<Document, InvalidContent> {
    match blob.media_type.as_str() {
        "application/vnd.oci.image.index.v1+json"
        | "application/vnd.docker.distribution.manifest.list.v2+json" => parse_index(bytes, ours),
        "application/vnd.oci.image.manifest.v1+json"
        | "application/vnd.docker.distribution.manifest.v2+json" => parse_manifest(bytes),
        other => Err(invalid(format!("its media type {:?} is not supported", shortened(other)))),
    }
}

fn parse_index(bytes: &[u8], ours: &Platform) -> Result<Document, InvalidContent> {
    #[derive(Deserialize)]
    struct Index {
        #[serde(default)]
        manifests: Vec<Descriptor>,
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    if index.manifests.len() > ENTRIES_MAX {
        return Err(invalid(format!("its index has {} entries", index.manifests.len())));
    }
    let mut ranked: Vec<(u8, Blob)> = index
        .manifests
        .into_iter()
        // Attestations are listed like images but say what they are.
        .filter(|entry| !entry.annotations.contains_key("vnd.docker.reference.type"))
        .filter_map(|entry| Some((ours.rank(entry.platform.as_ref())?, entry.into())))
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    Ok(Document::Index(ranked.into_iter().map(|(_, blob)| blob).collect()))
}

fn parse_manifest(bytes: &[u8]) -> Result<Document, InvalidContent> {
    #[derive(Deserialize)]
    struct Manifest {
        config: Descriptor,
        layers: Vec<Descriptor>,
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    if manifest.layers.is_empty() || manifest.layers.len() > LAYERS_MAX {
        return Err(invalid(format!("its manifest has {} layers", manifest.layers.len())));
    }
    Ok(Document::Manifest {
        config: manifest.config.into(),
        layers: manifest.layers.into_iter().map(Blob::from).collect(),
    })
}

/// The digests of the layers' uncompressed tars, if this configuration is of
/// an image that runs here.
pub(super) fn parse_config(
    bytes: &[u8],
    ours: &Platform,
) -> Result<Option<Vec<Digest>>, InvalidContent> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(flatten)]
        platform: Platform,
        rootfs: Rootfs,
    }
    #[derive(Deserialize)]
    struct Rootfs {
        #[serde(default)]
        diff_ids: Vec<Digest>,
    }
    let config: Config = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    Ok(ours.rank(Some(&config.platform)).map(|_| config.rootfs.diff_ids))
}

/// An image for this machine, down to its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub name: String,
    /// From the top (an index, usually) to the manifest.
    pub(super) path: Vec<Blob>,
    pub(super) config: Blob,
    /// Lowest first, each with the digest of its uncompressed tar.
    pub(super) layers: Vec<(Blob, Digest)>,
}

impl Image {
    pub(super) fn new(
        name: &str,
        path: Vec<Blob>,
        config: Blob,
        layers: Vec<Blob>,
        diff_ids: Vec<Digest>,
    ) -> Result<Self, InvalidContent> {
        if layers.len() != diff_ids.len() {
            let (many, named) = (layers.len(), diff_ids.len());
            return Err(invalid(format!("it has {many} layers but names {named}")));
        }
        let layers = layers.into_iter().zip(diff_ids).collect();
        Ok(Self { name: name.into(), path, config, layers })
    }

    /// Everything it needs, the top first.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.path
            .iter()
            .chain(std::iter::once(&self.config))
            .chain(self.layers.iter().map(|(layer, _)| layer))
    }

    /// The name of the snapshot that holds its whole file system.
    pub fn chain_id(&self) -> Option<Digest> {
        chain_ids(self.layers.iter().map(|(_, diff_id)| diff_id)).pop()
    }

    /// Who refers to whom, and under which label: what the garbage collector
    /// has to follow from the image record to the last layer.
    pub(super) fn references(&self) -> Vec<(&Blob, Vec<(&'static str, &Digest)>)> {
        let mut references: Vec<_> = self
            .path
            .windows(2)
            .map(|pair| (&pair[0], vec![("containerd.io/gc.ref.content.m", &pair[1].digest)]))
            .collect();
        if let Some(manifest) = self.path.last() {
            let config = ("containerd.io/gc.ref.content.config", &self.config.digest);
            let layers =
                self.layers.iter().map(|(l, _)| ("containerd.io/gc.ref.content.l", &l.digest));
            references.push((manifest, std::iter::once(config).chain(layers).collect()));
        }
        references
    }
}

/// The names of the snapshots that hold the first layer, the first two, and
/// so on (image-spec, "Layer ChainID").
pub(super) fn chain_ids<'a>(diff_ids: impl Iterator<Item = &'a Digest>) -> Vec<Digest> {
    diff_ids
        .scan(None::<Digest>, |below, diff_id| {
            let chain = match below {
                None => diff_id.clone(),
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
            };
            *below = Some(chain.clone());
            Some(chain)
        })
        .collect()
}

/// Labels that `present` lacks in order to refer to all `children`. Those
/// that are there stay: another platform's may be among them.
pub(super) fn lacking_labels(
    present: &HashMap<String, String>,
    children: &[(&'static str, &Digest)],
) -> HashMap<String, String> {
    let mut lacking: HashMap<String, String> = HashMap::new();
    for (prefix, digest) in children {
        let refers = |labels: &HashMap<String, String>| {
            labels.iter().any(|(k, v)| k.starts_with(prefix) && v == digest.as_str())
        };
        if refers(present) || refers(&lacking) {
            continue;
        }
        // containerd numbers the children of one kind; a configuration is alone.
        let alone = prefix.ends_with(".config").then(|| (*prefix).to_owned());
        let numbered = (0..).map(|number| format!("{prefix}.{number}"));
        let free = alone
            .into_iter()
            .chain(numbered)
            .find(|key| !present.contains_key(key) && !lacking.contains_key(key));
        lacking.extend(free.map(|key| (key, digest.to_string())));
    }
    lacking
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const MANIFEST_OF_DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";

    fn digest(n: u8) -> Digest {
        format!("sha256:{}", format!("{n:02x}").repeat(32)).parse().unwrap()
    }

    fn blob(media_type: &str, n: u8) -> Blob {
        Blob { media_type: media_type.into(), digest: digest(n), size: 10 }
    }

    fn entry(n: u8, more: &str) -> String {
        format!(r#"{{"mediaType":"{MANIFEST}","digest":"{}","size":10{more}}}"#, digest(n))
    }

    fn on(os: &str, architecture: &str) -> String {
        format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
    }

    fn amd64() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into() }
    }

    #[test]
    fn an_index_gives_what_runs_here_best_first() {
        let attestation = on("unknown", "unknown")
            + r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#;
        let entries = [
            entry(1, &on("windows", "amd64")),
            entry(2, &on("linux", "386")),
            entry(3, ""),
            entry(4, &on("linux", "arm64")),
            entry(5, &on("linux", "amd64")),
            entry(6, &attestation),
        ];
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        for media_type in [INDEX, LIST] {
            let Document::Index(found) =
                parse(&blob(media_type, 0), text.as_bytes(), &amd64()).unwrap()
            else {
                panic!("{media_type} is an index")
            };
            let digests: Vec<_> = found.into_iter().map(|b| b.digest).collect();
            assert_eq!(digests, [digest(5), digest(3), digest(2)]);
        }
    }

    #[test]
    fn a_manifest_of_either_kind_is_read() {
        let (config, layer) = (entry(1, ""), entry(2, ""));
        let text = format!(r#"{{"config":{config},"layers":[{layer},{layer}]}}"#);
        for media_type in [MANIFEST, MANIFEST_OF_DOCKER] {
            let read = parse(&blob(media_type, 0), text.as_bytes(), &amd64()).unwrap();
            let layers = vec![blob(MANIFEST, 2), blob(MANIFEST, 2)];
            assert_eq!(read, Document::Manifest { config: blob(MANIFEST, 1), layers });
        }
    }

    #[test]
    fn documents_that_cannot_be_are_refused() {
        let config = entry(1, "");
        let negative = config.replace(":10", ":-1");
        for (media_type, text) in [
            (MANIFEST, "".to_owned()),
            (MANIFEST, format!(r#"{{"config":{config},"layers":[]}}"#)),
            (MANIFEST, format!(r#"{{"config":{config},"layers":[{negative}]}}"#)),
            (INDEX, r#"{"manifests":[{"mediaType":"x","digest":"sha256:../..","size":1}]}"#.into()),
            ("application/vnd.docker.distribution.manifest.v1+prettyjws", "{}".into()),
        ] {
            assert!(parse(&blob(media_type, 0), text.as_bytes(), &amd64()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_configuration_tells_its_platform() {
        let config = |os: &str| {
            let id = digest(7);
            format!(r#"{{"os":"{os}","architecture":"amd64","rootfs":{{"diff_ids":["{id}"]}}}}"#)
        };
        assert_eq!(
            parse_config(config("linux").as_bytes(), &amd64()).unwrap(),
            Some(vec![digest(7)])
        );
        assert_eq!(parse_config(config("windows").as_bytes(), &amd64()).unwrap(), None);
    }

    #[test]
    fn chain_ids_are_those_of_the_image_spec() {
        let ids = [digest(1), digest(2)];
        let chain = chain_ids(ids.iter());
        assert_eq!(chain[0], ids[0]);
        // printf 'sha256:0101… sha256:0202…' | sha256sum
        assert_eq!(chain[1], Digest::of(format!("{} {}", ids[0], ids[1]).as_bytes()));
        assert_eq!(
            Digest::of(b"abc").as_str(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn labels_are_added_and_never_replaced() {
        let labels = |pairs: &[(&str, u8)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, n)| ((*k).to_owned(), digest(*n).to_string())).collect()
        };
        let (m, config) = ("containerd.io/gc.ref.content.m", "containerd.io/gc.ref.content.config");
        let (one, two) = (digest(1), digest(2));
        for (present, children, wanted) in [
            (labels(&[]), vec![(m, &one), (m, &two)], vec![("m.0", 1), ("m.1", 2)]),
            (labels(&[]), vec![(config, &one)], vec![("config", 1)]),
            // Another platform's manifest holds the first place.
            (labels(&[("containerd.io/gc.ref.content.m.0", 9)]), vec![(m, &one)], vec![("m.1", 1)]),
            (labels(&[("containerd.io/gc.ref.content.m.3", 1)]), vec![(m, &one)], vec![]),
        ] {
            let wanted: Vec<_> = wanted
                .iter()
                .map(|(k, n)| (format!("containerd.io/gc.ref.content.{k}"), *n))
                .collect();
            let wanted: Vec<(&str, u8)> = wanted.iter().map(|(k, n)| (k.as_str(), *n)).collect();
            assert_eq!(lacking_labels(&present, &children), labels(&wanted));
        }
    }
}
