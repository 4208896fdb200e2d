//! From an image's name to everything it needs on this machine.

use containerd_client::services::v1::{GetImageRequest, Image as Record};
use transship_api::session::Descriptor;
use transship_types::Code;

use super::{
    Containerd, ContainerdError, LOOK_UP, Object, Result, Scope,
    blob::{Blob, InvalidContent},
    image::{Document, Image, Platform, parse, parse_config},
};

/// Indexes may lie in indexes, but not without end.
const DEPTH_MAX: usize = 4;
/// Documents read for one image. A hostile image could otherwise name
/// thousands that all exist.
const DOCUMENTS_MAX: usize = 64;

impl Containerd {
    /// The images that a name stands for here; the best first, never none.
    pub(super) async fn images_named(&self, namespace: &str, name: &str) -> Result<Vec<Image>> {
        let record = self.image_record(namespace, name).await?.ok_or_else(|| {
            let reason = format!("image {name} is not on this node any more");
            ContainerdError::unfit(Code::Image, reason, "pull or tag it again on the source")
        })?;
        let target = record.target.unwrap_or_default();
        let top = Blob::try_from(&Descriptor {
            media_type: target.media_type,
            digest: target.digest,
            size: target.size,
            ..Default::default()
        })?;
        self.images_under(namespace, name, top).await
    }

    pub(super) async fn image_record(&self, namespace: &str, name: &str) -> Result<Option<Record>> {
        let request = Scope::of(namespace)?.request(GetImageRequest { name: name.to_owned() });
        let doing = Object::Image(name.to_owned()).doing("look up");
        match self.ask(doing, LOOK_UP, self.images().get(request)).await {
            Ok(answer) => Ok(answer.image),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Walks down from `top`. Layers need not be here: the other node may
    /// have them, and a container runs without.
    pub(super) async fn images_under(
        &self,
        namespace: &str,
        name: &str,
        top: Blob,
    ) -> Result<Vec<Image>> {
        let ours = Platform::ours();
        let mut found = Vec::new();
        // A stack whose top is what comes next: the best of a level first.
        let mut ahead = vec![vec![top]];
        let mut documents = 0;
        while let Some(path) = ahead.pop() {
            let Some(blob) = path.last() else { continue };
            documents += 1;
            if path.len() > DEPTH_MAX || documents > DOCUMENTS_MAX {
                return Err(unreadable(name, &blob.digest.to_string(), "it does not end"));
            }
            let bytes = match self.read_document(namespace, blob).await {
                // Other platforms are listed but were not pulled.
                Err(error) if error.is_not_found() && path.len() > 1 => continue,
                other => other?,
            };
            match parse(blob, &bytes, &ours).map_err(|e| invalid(name, blob, &e))? {
                Document::Index(entries) => {
                    let deeper = entries
                        .into_iter()
                        .rev()
                        .map(|entry| path.iter().cloned().chain(std::iter::once(entry)).collect());
                    ahead.extend(deeper);
                }
                Document::Manifest { config, layers } => {
                    let image = self.image_of(namespace, name, &path, config, layers, &ours);
                    found.extend(image.await?);
                }
            }
        }
        if found.is_empty() {
            let reason = format!("image {name} has nothing for {ours} on this node");
            return Err(ContainerdError::unfit(Code::Image, reason, "pull it again"));
        }
        Ok(found)
    }

    /// None: it is for another platform, or not here.
    async fn image_of(
        &self,
        namespace: &str,
        name: &str,
        path: &[Blob],
        config: Blob,
        layers: Vec<Blob>,
        ours: &Platform,
    ) -> Result<Option<Image>> {
        let bytes = match self.read_document(namespace, &config).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        let bad = |e: InvalidContent| invalid(name, &config, &e);
        let Some(diff_ids) = parse_config(&bytes, ours).map_err(bad)? else { return Ok(None) };
        let image = Image::new(name, path.to_vec(), config.clone(), layers, diff_ids);
        image.map(Some).map_err(bad)
    }

    /// As it goes to the other node: every blob with its labels, the top first.
    pub(super) async fn descriptors(
        &self,
        namespace: &str,
        image: &Image,
    ) -> Result<Vec<Descriptor>> {
        let mut descriptors = Vec::new();
        for blob in image.blobs() {
            let info = self.blob_info(namespace, &blob.digest).await?;
            descriptors.push(blob.to_session(info.unwrap_or_default().labels));
        }
        Ok(descriptors)
    }
}

fn invalid(name: &str, blob: &Blob, why: &InvalidContent) -> ContainerdError {
    unreadable(name, blob.digest.as_str(), &why.to_string())
}

fn unreadable(name: &str, digest: &str, why: &str) -> ContainerdError {
    let reason = format!("image {name} cannot be read at {digest}: {why}");
    ContainerdError::unfit(Code::Image, reason, "")
}
