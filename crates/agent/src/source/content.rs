//! The image content that the target lacks, blob by blob.

use std::collections::HashSet;

use transship_api::session::{Blob, Descriptor, agent_message::Message};
use transship_link::Channel;
use transship_types::Code;

use super::{cancelled, inspect::Subject};
use crate::{
    book::Entry,
    failure::{Failure, Step},
    node::Node,
    talk,
};

/// Sends what the verdict asks for; answers the number of bytes. A
/// cancellation ends between two pieces, so that the channel stays usable for
/// the discard.
pub async fn send(
    node: &Node,
    entry: &Entry,
    channel: &mut Channel,
    subject: &Subject,
    missing: &[String],
) -> Step<u64> {
    let blobs = wanted(channel, subject, missing)?;
    let total = blobs.iter().map(|b| b.size.unsigned_abs()).fold(0, u64::saturating_add);
    let mut sent = 0;
    let doing = format!("sending image content to {}", channel.peer);
    for descriptor in blobs {
        let mut blob = node.daemon.read_blob(namespace(entry), descriptor).await?;
        talk::send(channel, Message::Blob(Blob { descriptor: Some(descriptor.clone()) })).await?;
        loop {
            let piece = tokio::select! {
                piece = blob.next() => piece?,
                () = entry.cancelled() => return Err(cancelled()),
            };
            let Some(piece) = piece else { break };
            channel.writer.data(&piece).await.map_err(|e| Failure::wire(&doing, &e))?;
            sent += piece.len() as u64;
            entry.progress(sent, total);
        }
        channel.writer.end_data().await.map_err(|e| Failure::wire(&doing, &e))?;
    }
    Ok(sent)
}

/// In the order of the image: what refers to others first, as it was offered.
fn wanted<'a>(
    channel: &Channel,
    subject: &'a Subject,
    missing: &[String],
) -> Step<Vec<&'a Descriptor>> {
    let missing: HashSet<_> = missing.iter().collect();
    let blobs: Vec<_> = subject.content.iter().filter(|b| missing.contains(&b.digest)).collect();
    if blobs.len() != missing.len() {
        return Err(Failure::new(
            Code::Malformed,
            format!("{} asks for content that was not offered", channel.peer),
            "run the same version of Transship on both nodes",
        ));
    }
    match blobs.iter().find(|b| subject.absent.contains(&b.digest)) {
        None => Ok(blobs),
        Some(blob) => Err(Failure::new(
            Code::Image,
            format!("blob {} of image {} is on neither node", blob.digest, subject.record.image),
            format!("pull {} on {}", subject.record.image, channel.peer),
        )),
    }
}

fn namespace(entry: &Entry) -> &str {
    entry.key().namespace()
}
