//! Content in and out of containerd's store, blob by blob.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ListStatusesRequest, ReadContentRequest, ReadContentResponse,
    UpdateRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use futures::{SinkExt, channel::mpsc};
use prost_types::FieldMask;
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;
use transship_api::session::Descriptor;
use transship_types::Code;

use super::{
    CHANGE, Containerd, ContainerdError, Doing, LOOK_UP, Object, Result, Scope,
    blob::{Blob, Digest},
    image::DOCUMENT_MAX,
    lease::{Lease, absent_is_fine},
};

/// For one piece of a stream: the disk may be slow, but not silent.
const PIECE: Duration = Duration::from_secs(60);
/// How long containerd may take to notice that a stream was dropped, and how
/// often to look.
const STREAM_ENDS_WITHIN: Duration = Duration::from_secs(10);
const STREAM_ENDING: Duration = Duration::from_millis(20);
/// Below containerd's limit for one message; its own readers use as much.
const PIECE_BYTES: usize = 1 << 20;
/// Where an image came from. Of a peer's labels only these are taken over;
/// those for the garbage collector we make ourselves.
const ORIGIN_LABEL: &str = "containerd.io/distribution.source.";

fn named(digest: &Digest) -> Object {
    Object::Blob(digest.to_string())
}

impl Containerd {
    /// None: it is not in this namespace.
    pub(super) async fn blob_info(&self, namespace: &str, digest: &Digest) -> Result<Option<Info>> {
        let request = InfoRequest { digest: digest.to_string() };
        let request = Scope::of(namespace)?.request(request);
        match self.ask(named(digest).doing("look up"), LOOK_UP, self.content().info(request)).await
        {
            Ok(answer) => Ok(answer.info),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Blobs that would have to come from elsewhere.
    ///
    /// Content in another namespace counts as here if containerd shares it:
    /// an arrival takes it over without a copy (see [`Containerd::take_in`]).
    pub(super) async fn missing_blobs(
        &self,
        namespace: &str,
        blobs: &[Blob],
    ) -> Result<Vec<Digest>> {
        let mut places = vec![namespace.to_owned()];
        if self.shares_content().await? {
            let others = self.namespace_names().await?;
            places.extend(others.into_iter().filter(|other| other != namespace));
        }
        let mut missing = Vec::new();
        'blobs: for blob in blobs {
            for place in &places {
                if self.blob_info(place, &blob.digest).await?.is_some() {
                    continue 'blobs;
                }
            }
            missing.push(blob.digest.clone());
        }
        Ok(missing)
    }

    /// Makes sure that a blob is in the arrival's namespace and stays there.
    /// False: it is not, and its bytes are needed.
    pub(super) async fn take_in(&self, lease: &Lease, blob: &Blob) -> Result<bool> {
        self.hold(lease, "content".to_owned(), blob.digest.as_str()).await?;
        if self.blob_info(lease.key.namespace(), &blob.digest).await?.is_some() {
            return Ok(true);
        }
        let mut writer = self.open_blob(lease, blob, HashMap::new()).await?;
        if writer.stream.is_none() {
            return Ok(true);
        }
        writer.give_up().await?;
        Ok(false)
    }

    /// A whole document of an image.
    pub(super) async fn read_document(&self, namespace: &str, blob: &Blob) -> Result<Vec<u8>> {
        if blob.size > DOCUMENT_MAX {
            let reason = format!("blob {} of {} bytes is no manifest", blob.digest, blob.size);
            return Err(ContainerdError::unfit(Code::Image, reason, ""));
        }
        let mut reader = self.read_content(namespace, blob).await?;
        let mut bytes = Vec::new();
        while let Some(more) = reader.next_bytes().await? {
            bytes.extend_from_slice(&more);
        }
        Ok(bytes)
    }

    /// Reads a blob from its beginning.
    pub(super) async fn read_content(&self, namespace: &str, blob: &Blob) -> Result<Reader> {
        let request = ReadContentRequest { digest: blob.digest.to_string(), offset: 0, size: 0 };
        let request = Scope::of(namespace)?.request(request);
        let doing = named(&blob.digest).doing("read");
        let stream = self.ask(doing.clone(), PIECE, self.content().read(request)).await?;
        Ok(Reader { daemon: self.clone(), doing, stream, left: blob.size })
    }

    /// Opens a blob for writing, at its beginning.
    pub(super) async fn write_content(&self, lease: &Lease, from: &Descriptor) -> Result<Writer> {
        let blob = Blob::try_from(from)?;
        let mut labels = from.labels.clone();
        labels.retain(|key, _| key.starts_with(ORIGIN_LABEL));
        self.open_blob(lease, &blob, labels).await
    }

    async fn open_blob(
        &self,
        lease: &Lease,
        blob: &Blob,
        labels: HashMap<String, String>,
    ) -> Result<Writer> {
        let mut writer = Writer {
            daemon: self.clone(),
            lease: lease.clone(),
            blob: blob.clone(),
            labels,
            doing: named(&blob.digest).doing("write"),
            stream: None,
            written: 0,
        };
        let state = match writer.open().await {
            Err(error) if error.is_already_exists() => return Ok(writer),
            other => other?,
        };
        if blob.size > 0 && state.offset == signed(blob.size) {
            // All of it is there without a byte from us: shared, or written by
            // an attempt that died before its commit. The commit verifies.
            writer.written = blob.size;
            if writer.try_commit().await.is_err() {
                writer.give_up().await?;
                return Err(writer.spoilt());
            }
        }
        // An older attempt's bytes are cut off by the first write at offset 0.
        Ok(writer)
    }

    /// Gives up a blob under way. The stream that wrote it may not have ended
    /// yet at containerd's end; while it does, its files cannot be removed.
    pub(super) async fn abort_ingest(&self, namespace: &str, reference: &str) -> Result<()> {
        let scope = Scope::of(namespace)?;
        let end = Instant::now() + STREAM_ENDS_WITHIN;
        loop {
            let request = scope.request(AbortRequest { r#ref: reference.to_owned() });
            let doing = Object::Blob(reference.to_owned()).doing("give up");
            let done = self.ask(doing, CHANGE, self.content().abort(request)).await;
            match absent_is_fine(done) {
                Err(error) if error.grpc().is_some() && Instant::now() < end => {
                    sleep(STREAM_ENDING).await;
                }
                done => return done,
            }
        }
    }

    /// Gives up every blob that this arrival was still writing.
    pub(super) async fn abort_ingests(&self, lease: &Lease) -> Result<()> {
        let namespace = lease.key.namespace();
        let request = ListStatusesRequest { filters: vec![format!("ref~=^{}-", lease.id)] };
        let request = Scope::of(namespace)?.request(request);
        let doing = Object::Namespace(namespace.to_owned()).doing("list the ingests of");
        let answer = self.ask(doing, LOOK_UP, self.content().list_statuses(request)).await?;
        for status in answer.statuses {
            self.abort_ingest(namespace, &status.r#ref).await?;
        }
        Ok(())
    }

    /// Adds labels to a blob; what it has besides stays.
    pub(super) async fn label_blob(
        &self,
        namespace: &str,
        digest: &Digest,
        labels: HashMap<String, String>,
    ) -> Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest {
            info: Some(Info { digest: digest.to_string(), labels, ..Default::default() }),
            update_mask: Some(FieldMask { paths }),
        };
        let request = Scope::of(namespace)?.request(request);
        self.ask(named(digest).doing("label"), CHANGE, self.content().update(request)).await?;
        Ok(())
    }
}

/// The bytes of one blob, in order.
pub struct Reader {
    daemon: Containerd,
    doing: Doing,
    stream: Streaming<ReadContentResponse>,
    left: u64,
}

impl Reader {
    pub(super) async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(piece) = next_piece(&self.daemon, &self.doing, &mut self.stream).await? else {
                return if self.left == 0 { Ok(None) } else { Err(self.not_as_described()) };
            };
            let data = Bytes::from(piece.data);
            self.left = match self.left.checked_sub(data.len() as u64) {
                Some(left) => left,
                None => return Err(self.not_as_described()),
            };
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }

    fn not_as_described(&self) -> ContainerdError {
        let reason = format!("{} has not the size that its image says", self.doing.object);
        ContainerdError::unfit(Code::Image, reason, "pull the image again")
    }
}

struct WriteStream {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

/// A blob on its way into the store; the store verifies its digest.
///
/// Without a stream, the blob turned out to be there: bytes that come all the
/// same are counted and forgotten.
pub struct Writer {
    daemon: Containerd,
    lease: Lease,
    blob: Blob,
    labels: HashMap<String, String>,
    doing: Doing,
    stream: Option<WriteStream>,
    written: u64,
}

impl Writer {
    /// Opens the stream and returns what containerd has of the blob so far.
    async fn open(&mut self) -> Result<WriteContentResponse> {
        let end = Instant::now() + STREAM_ENDS_WITHIN;
        loop {
            match self.try_open().await {
                // The reference is ours alone, so it is locked by a stream of
                // our own that was dropped and has not ended yet.
                Err(error)
                    if error.grpc() == Some(tonic::Code::Unavailable) && Instant::now() < end =>
                {
                    sleep(STREAM_ENDING).await;
                }
                other => return other,
            }
        }
    }

    async fn try_open(&mut self) -> Result<WriteContentResponse> {
        let open = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: self.reference(),
            // The size and digest open the door to content that another
            // namespace has; they are checked again by the commit.
            total: signed(self.blob.size),
            expected: self.blob.digest.to_string(),
            ..Default::default()
        };
        let (mut requests, queue) = mpsc::channel(1);
        // The queue is new and has room.
        let _ = requests.try_send(open);
        let request = Scope::under(&self.lease)?.request(queue);
        let mut client = self.daemon.content();
        let answers = self.daemon.ask(self.doing.clone(), PIECE, client.write(request)).await?;
        let mut stream = WriteStream { requests, answers };
        let state = self.answer(&mut stream).await?;
        self.stream = Some(stream);
        Ok(state)
    }

    pub(super) async fn write_bytes(&mut self, bytes: Bytes) -> Result<()> {
        let end = self.written + bytes.len() as u64;
        // Before anything reaches the disk: a peer must not fill it.
        if end > self.blob.size {
            return Err(self.spoilt());
        }
        if let Some(mut stream) = self.stream.take() {
            let mut rest = bytes;
            let mut offset = self.written;
            while !rest.is_empty() {
                let data = rest.split_to(rest.len().min(PIECE_BYTES));
                let length = data.len() as u64;
                let request = WriteContentRequest {
                    action: WriteAction::Write.into(),
                    offset: signed(offset),
                    data: data.into(),
                    ..Default::default()
                };
                self.send(&mut stream, request).await?;
                self.answer(&mut stream).await?;
                offset += length;
            }
            self.stream = Some(stream);
        }
        self.written = end;
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<()> {
        if self.written != self.blob.size {
            // Too short: what came must not be taken up by anybody.
            self.give_up().await?;
            return Err(self.spoilt());
        }
        match self.try_commit().await {
            Err(error) if error.grpc() == Some(tonic::Code::FailedPrecondition) => {
                self.give_up().await?;
                Err(self.spoilt())
            }
            other => other,
        }
    }

    async fn try_commit(&mut self) -> Result<()> {
        let Some(mut stream) = self.stream.take() else { return Ok(()) };
        let commit = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: signed(self.written),
            total: signed(self.blob.size),
            expected: self.blob.digest.to_string(),
            labels: self.labels.clone(),
            ..Default::default()
        };
        self.send(&mut stream, commit).await?;
        match self.answer(&mut stream).await {
            // Another arrival brought the same blob; ours is held by the lease.
            Err(error) if error.is_already_exists() => Ok(()),
            other => other.map(drop),
        }
    }

    async fn send(&self, stream: &mut WriteStream, request: WriteContentRequest) -> Result<()> {
        match timeout(PIECE, stream.requests.send(request)).await {
            // A closed stream has an answer that says why.
            Ok(_) => Ok(()),
            Err(_) => Err(ContainerdError::Slow { doing: self.doing.clone(), limit: PIECE }),
        }
    }

    async fn answer(&self, stream: &mut WriteStream) -> Result<WriteContentResponse> {
        let answer = next_piece(&self.daemon, &self.doing, &mut stream.answers).await?;
        answer.ok_or_else(|| {
            let status = tonic::Status::aborted("containerd closed the stream");
            self.daemon.failed(self.doing.clone(), &status)
        })
    }

    /// Ends the stream from our end, waits for containerd's, and removes what
    /// was written.
    async fn give_up(&mut self) -> Result<()> {
        if let Some(WriteStream { requests, mut answers }) = self.stream.take() {
            drop(requests);
            while let Ok(Some(_)) = next_piece(&self.daemon, &self.doing, &mut answers).await {}
        }
        self.daemon.abort_ingest(self.lease.key.namespace(), &self.reference()).await
    }

    fn reference(&self) -> String {
        self.lease.ingest(self.blob.digest.as_str())
    }

    fn spoilt(&self) -> ContainerdError {
        let Blob { digest, size, .. } = &self.blob;
        let reason = format!("what came as blob {digest} has not its digest or its {size} bytes");
        ContainerdError::unfit(Code::Image, reason, "pull the image again on the source")
    }
}

async fn next_piece<T>(
    daemon: &Containerd,
    doing: &Doing,
    stream: &mut Streaming<T>,
) -> Result<Option<T>> {
    match timeout(PIECE, stream.message()).await {
        Ok(Ok(piece)) => Ok(piece),
        Ok(Err(status)) => Err(daemon.failed(doing.clone(), &status)),
        Err(_) => Err(ContainerdError::Slow { doing: doing.clone(), limit: PIECE }),
    }
}

/// containerd counts in signed numbers. A size beyond them fits nothing that
/// can be stored, and is refused as such when it is compared.
fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
