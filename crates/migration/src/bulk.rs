//! Bulk data between blocking files and the first connection: passes over the
//! writable layer, and CRIU's images. Files are read and written on a thread of their
//! own; a short queue in between bounds the memory and couples both speeds.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use tokio::{sync::mpsc, task};
use transship_api::session::{
    Image, ImagesEnd, Pass, PassEnd, ShimMessage, SmallImage, SmallImages, shim_message::Message,
};
use transship_link::{BoxRead, BoxWrite};
use transship_rootfs::{Index, Layer, Receiver, Totals};
use transship_wire::{Reader, Writer};

use crate::{MigrationError, limits};

/// Chunks on their way between file and link: eight of up to 1 MiB.
const QUEUE: usize = 8;

/// One chunk of an image; as large as a data frame may be.
const CHUNK: usize = 1 << 20;

/// Images in one message: names take bytes too.
const BUNDLE: usize = 1000;

/// The target's own files among the images begin so: shared objects, as they
/// come in by lane.
const MADE_HERE: &str = "transship-shared-";

/// A joined thread that panicked is our own mistake; say where.
pub(crate) fn joined<T>(result: Result<T, task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

pub(crate) async fn say(
    writer: &mut Writer<BoxWrite>,
    message: Message,
) -> Result<(), MigrationError> {
    writer.control(&ShimMessage { message: Some(message) }).await?;
    writer.flush().await?;
    Ok(())
}

pub(crate) async fn hear(reader: &mut Reader<BoxRead>) -> Result<Message, MigrationError> {
    let message: ShimMessage = reader.control().await?;
    message.message.ok_or_else(|| MigrationError::malformed("a message of unknown kind"))
}

/// Sends one pass over the layer: everything, or what changed since `before`.
pub(crate) async fn send_pass(
    writer: &mut Writer<BoxWrite>,
    layer: &Layer,
    pass: Pass,
    before: Option<Arc<Index>>,
) -> Result<(Arc<Index>, Totals), MigrationError> {
    // Once the container is frozen a change is no race but an error.
    let last = pass.last;
    writer.control(&ShimMessage { message: Some(Message::Pass(pass)) }).await?;
    let (queue, mut chunks) = mpsc::channel::<Bytes>(QUEUE);
    let layer = layer.clone();
    let walk = task::spawn_blocking(move || {
        let mut sink = |bytes: &[u8]| {
            let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the link is gone");
            queue.blocking_send(Bytes::copy_from_slice(bytes)).map_err(|_| gone())
        };
        if last {
            transship_rootfs::send_frozen(&layer, before.as_deref(), &mut sink)
        } else {
            transship_rootfs::send(&layer, before.as_deref(), &mut sink)
        }
    });
    let mut sent = Ok(());
    while let Some(chunk) = chunks.recv().await {
        sent = writer.data(&chunk).await;
        if sent.is_err() {
            break;
        }
    }
    drop(chunks);
    let walked = joined(walk.await);
    // The link's error is the cause; the walk then only saw its queue close.
    sent?;
    let (index, totals) = walked?;
    writer.end_data().await?;
    let end = PassEnd { entries: totals.entries, bytes: totals.bytes };
    say(writer, Message::PassEnd(end)).await?;
    Ok((Arc::new(index), totals))
}

/// Applies one pass to the container's root.
pub(crate) async fn receive_pass(
    reader: &mut Reader<BoxRead>,
    root: &Path,
) -> Result<Totals, MigrationError> {
    let (queue, mut chunks) = mpsc::channel::<Bytes>(QUEUE);
    let root = root.to_path_buf();
    let apply = task::spawn_blocking(move || {
        let mut receiver = Receiver::new(&root)?;
        while let Some(chunk) = chunks.blocking_recv() {
            receiver.feed(&chunk)?;
        }
        receiver.finish()
    });
    let received = forward(reader, queue).await;
    let applied = joined(apply.await);
    match (received, applied) {
        (Ok(true), Ok(totals)) => match hear(reader).await? {
            Message::PassEnd(_) => Ok(totals),
            _ => Err(MigrationError::malformed("a pass without its end")),
        },
        // The applying thread stopped listening, or did not like the end.
        (_, Err(error)) => Err(error.into()),
        (Err(error), _) => Err(error),
        (Ok(false), Ok(_)) => Err(MigrationError::malformed("data after the end of a pass")),
    }
}

/// What was applied is on disk when this returns.
pub(crate) async fn sync(root: PathBuf) -> Result<(), MigrationError> {
    Ok(joined(task::spawn_blocking(move || transship_rootfs::sync(&root)).await)?)
}

/// Data frames into the queue, up to the end mark; false if nobody listens.
async fn forward(
    reader: &mut Reader<BoxRead>,
    queue: mpsc::Sender<Bytes>,
) -> Result<bool, MigrationError> {
    while let Some(chunk) = reader.data().await? {
        if queue.send(chunk).await.is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

enum Piece {
    Small(SmallImages),
    Start(Image),
    Bytes(Bytes),
    End,
}

/// Sends every image of the directory; `sent` hears the bytes as they go.
pub(crate) async fn send_images(
    writer: &mut Writer<BoxWrite>,
    directory: PathBuf,
    sent: &(dyn Fn(u64) + Sync),
) -> Result<u64, MigrationError> {
    let (queue, mut pieces) = mpsc::channel::<Piece>(QUEUE);
    let reading = task::spawn_blocking(move || read_images(&directory, &queue));
    let mut count = 0;
    let mut total = 0;
    let mut written = Ok(());
    while let Some(piece) = pieces.recv().await {
        written = match piece {
            Piece::Small(images) => {
                count += images.images.len() as u32;
                total += images.images.iter().map(|image| image.content.len() as u64).sum::<u64>();
                sent(total);
                writer.control(&ShimMessage { message: Some(Message::SmallImages(images)) }).await
            }
            Piece::Start(image) => {
                count += 1;
                writer.control(&ShimMessage { message: Some(Message::Image(image)) }).await
            }
            Piece::Bytes(bytes) => {
                total += bytes.len() as u64;
                sent(total);
                writer.data(&bytes).await
            }
            Piece::End => writer.end_data().await,
        };
        if written.is_err() {
            break;
        }
    }
    drop(pieces);
    let read = joined(reading.await);
    written?;
    read?;
    say(writer, Message::ImagesEnd(ImagesEnd { count, bytes: total })).await?;
    Ok(total)
}

/// The small ones go first, together: each message and each file takes both
/// sides some time that has nothing to do with its size, within the pause.
fn read_images(directory: &Path, queue: &mpsc::Sender<Piece>) -> Result<(), MigrationError> {
    let failed = |name: &str| {
        let name = name.to_owned();
        move |source| MigrationError::Image { name, source }
    };
    let mut small = Bundle::default();
    let mut large = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed("*"))? {
        let entry = entry.map_err(failed("*"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut file = File::open(entry.path()).map_err(failed(&name))?;
        let meta = file.metadata().map_err(failed(&name))?;
        // CRIU's sockets and pid files are not images.
        if !meta.is_file() || check_image_name(&name).is_err() {
            continue;
        }
        if meta.len() > limits::SMALL_IMAGE {
            large.push((name, file, meta.len()));
            continue;
        }
        let mut content = vec![0; meta.len() as usize];
        file.read_exact(&mut content).map_err(failed(&name))?;
        if let Some(full) = small.add(name, content)
            && queue.blocking_send(Piece::Small(full)).is_err()
        {
            return Ok(());
        }
    }
    let rest = small.take();
    if !rest.images.is_empty() && queue.blocking_send(Piece::Small(rest)).is_err() {
        return Ok(());
    }
    for (name, mut file, size) in large {
        let start = Piece::Start(Image { name: name.clone(), size });
        if queue.blocking_send(start).is_err() {
            return Ok(());
        }
        let mut left = size;
        while left > 0 {
            let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
            file.read_exact(&mut chunk).map_err(failed(&name))?;
            left -= chunk.len() as u64;
            if queue.blocking_send(Piece::Bytes(chunk.into())).is_err() {
                return Ok(());
            }
        }
        if queue.blocking_send(Piece::End).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Small images that share a message.
#[derive(Default)]
struct Bundle {
    images: Vec<SmallImage>,
    bytes: usize,
}

impl Bundle {
    /// Answers what was there before, if both together are too much.
    fn add(&mut self, name: String, content: Vec<u8>) -> Option<SmallImages> {
        let full = self.bytes + content.len() > CHUNK || self.images.len() >= BUNDLE;
        let before = full.then(|| self.take());
        self.bytes += content.len();
        self.images.push(SmallImage { name, content: content.into() });
        before
    }

    fn take(&mut self) -> SmallImages {
        self.bytes = 0;
        SmallImages { images: std::mem::take(&mut self.images) }
    }
}

/// The names of images that have come.
#[derive(Default)]
pub(crate) struct Names(HashSet<String>);

impl Names {
    /// One more, which has not come before and may lie in the directory.
    pub fn take(&mut self, name: &str) -> Result<(), MigrationError> {
        check_image_name(name)?;
        if self.0.len() >= limits::IMAGES {
            return Err(MigrationError::malformed("more images than CRIU ever writes"));
        }
        match self.0.insert(name.into()) {
            true => Ok(()),
            false => Err(MigrationError::malformed(format!("image {name} twice"))),
        }
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// Writes small images, whose names were taken, into the directory.
pub(crate) async fn write_images(
    directory: PathBuf,
    images: SmallImages,
) -> Result<(), MigrationError> {
    let writing = task::spawn_blocking(move || {
        for SmallImage { name, content } in images.images {
            let written =
                create(&directory.join(&name)).and_then(|mut file| file.write_all(&content));
            written.map_err(|source| MigrationError::Image { name, source })?;
        }
        Ok(())
    });
    joined(writing.await)
}

fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Receives one image into the directory; its header has been read, and its
/// name taken.
pub(crate) async fn receive_image(
    reader: &mut Reader<BoxRead>,
    directory: &Path,
    image: Image,
) -> Result<u64, MigrationError> {
    let (queue, mut chunks) = mpsc::channel::<Bytes>(QUEUE);
    let path = directory.join(&image.name);
    let size = image.size;
    let writing = task::spawn_blocking(move || -> io::Result<u64> {
        let mut file = create(&path)?;
        let mut written = 0;
        while let Some(chunk) = chunks.blocking_recv() {
            written += chunk.len() as u64;
            if written > size {
                let text = "more bytes than its header said";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            file.write_all(&chunk)?;
        }
        Ok(written)
    });
    let received = forward(reader, queue).await;
    let name = image.name;
    let written = joined(writing.await)
        .map_err(|source| MigrationError::Image { name: name.clone(), source })?;
    received?;
    if written != size {
        return Err(MigrationError::malformed(format!("image {name}: {written} bytes of {size}")));
    }
    Ok(written)
}

/// CRIU's own names and ours: nothing that could leave the directory, and
/// nothing that lies there already because the target has made it.
pub(crate) fn check_image_name(name: &str) -> Result<(), MigrationError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    let good = !name.is_empty()
        && name.len() <= limits::IMAGE_NAME
        && !name.starts_with('.')
        && !name.starts_with(MADE_HERE)
        && name.bytes().all(allowed);
    if good { Ok(()) } else { Err(MigrationError::malformed(format!("image name {name:?}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names_stay_in_their_directory() {
        for name in ["core-1.img", "pages-1.img", "tmpfs-dev-73.tar.gz.img", "transship.json"] {
            assert!(check_image_name(name).is_ok(), "{name}");
        }
        let long = "a".repeat(limits::IMAGE_NAME + 1);
        let ours = "transship-shared-7";
        for name in ["", ".", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a\0b", &long, ours] {
            assert!(check_image_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn an_image_comes_once_and_there_are_not_too_many() {
        let mut names = Names::default();
        names.take("core-1.img").unwrap();
        assert!(names.take("core-1.img").is_err());
        for number in 2..=limits::IMAGES {
            names.take(&format!("core-{number}.img")).unwrap();
        }
        assert!(names.take("one-more.img").is_err());
        assert_eq!(names.count(), limits::IMAGES);
    }

    /// Of every size around the limits, to the last byte.
    #[tokio::test]
    async fn images_arrive_whole_however_they_travel() {
        const SMALL: usize = limits::SMALL_IMAGE as usize;
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let sizes = [0, 1, SMALL - 1, SMALL, SMALL + 1, CHUNK, 2 * CHUNK + 7];
        // More small ones than one message takes.
        let sizes = sizes.into_iter().chain(std::iter::repeat_n(SMALL, 20));
        for (number, size) in sizes.enumerate() {
            let content = vec![number as u8; size];
            fs::write(from.path().join(format!("core-{number}.img")), content).unwrap();
        }
        fs::write(from.path().join(".pid"), "not an image").unwrap();

        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (mut near, mut far) = transship_link::in_memory::pair(a, b);
        let heard = std::sync::atomic::AtomicU64::new(0);
        let sent = |bytes| heard.store(bytes, std::sync::atomic::Ordering::Relaxed);
        let sending = send_images(&mut near.writer, from.path().into(), &sent);
        let receiving = async {
            let mut count = 0;
            loop {
                match hear(&mut far.reader).await.unwrap() {
                    Message::SmallImages(images) => {
                        count += images.images.len();
                        write_images(to.path().into(), images).await.unwrap();
                    }
                    Message::Image(image) => {
                        receive_image(&mut far.reader, to.path(), image).await.unwrap();
                        count += 1;
                    }
                    Message::ImagesEnd(end) => break (count, end),
                    other => panic!("{other:?}"),
                }
            }
        };
        let (total, (count, end)) = tokio::join!(sending, receiving);
        assert_eq!((count, end.count), (27, 27));
        assert_eq!((end.bytes, heard.into_inner()), (total.unwrap(), end.bytes));
        for entry in fs::read_dir(to.path()).unwrap() {
            let entry = entry.unwrap();
            let sent = fs::read(from.path().join(entry.file_name())).unwrap();
            assert!(fs::read(entry.path()).unwrap() == sent, "{:?}", entry.file_name());
        }
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 27);
    }
}
