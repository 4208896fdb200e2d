//! The content that was missing, blob by blob, until `Prepare`.

use bytes::Bytes;
use prost::Message as _;
use tokio::time;
use transship_api::session::{AgentMessage, Descriptor, agent_message::Message};
use transship_types::Code;
use transship_wire::{Frame, WireError};

use super::{NEXT, Stop, Target, Until, cancelled, is_prepare, unwelcome};
use crate::{daemon::Arriving, failure::Failure, talk};

/// Takes the missing blobs in whatever order they come.
pub async fn receive(
    target: &mut Target,
    arriving: &mut dyn Arriving,
    mut missing: Vec<String>,
) -> Until<()> {
    loop {
        let message = tokio::select! {
            message = time::timeout(NEXT, talk::receive(&mut target.channel)) => message,
            () = target.entry.cancelled() => return Err(Stop::Failed(cancelled())),
        };
        let message = match message {
            Ok(message) => message,
            Err(_) => return Err(Stop::Lost(Failure::timeout("waiting for the source", NEXT))),
        };
        match message {
            Ok(Message::Blob(blob)) => {
                let digest = blob.descriptor.unwrap_or_default().digest;
                let descriptor = take(target, &mut missing, &digest)?;
                one(target, arriving, &descriptor).await?;
            }
            Ok(message) if is_prepare(&message) && missing.is_empty() => return Ok(()),
            other => return Err(unwelcome(&target.channel, other)),
        }
    }
}

/// What was offered counts, not what comes with the blob.
fn take(target: &Target, missing: &mut Vec<String>, digest: &str) -> Until<Descriptor> {
    let place = missing.iter().position(|m| m == digest);
    let descriptor = target.offer.content.iter().find(|d| d.digest == digest);
    match (place, descriptor) {
        (Some(place), Some(descriptor)) => {
            missing.swap_remove(place);
            Ok(descriptor.clone())
        }
        _ => Err(malformed("a blob came that was not asked for")),
    }
}

async fn one(
    target: &mut Target,
    arriving: &mut dyn Arriving,
    descriptor: &Descriptor,
) -> Until<()> {
    let failed = |e: crate::daemon::DaemonError| Stop::Failed(e.into());
    let mut blob = arriving.blob(descriptor).await.map_err(failed)?;
    let size = descriptor.size.unsigned_abs();
    let mut left = size;
    while let Some(bytes) = piece(target).await? {
        left = left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| malformed("a blob is longer than it was offered"))?;
        blob.write(bytes).await.map_err(failed)?;
        target.entry.progress(size - left, size);
    }
    if left > 0 {
        return Err(malformed("a blob is shorter than it was offered"));
    }
    blob.commit().await.map_err(failed)
}

/// A source that cancels says so between two pieces.
async fn piece(target: &mut Target) -> Until<Option<Bytes>> {
    let frame = tokio::select! {
        frame = time::timeout(NEXT, target.channel.reader.next()) => frame,
        () = target.entry.cancelled() => return Err(Stop::Failed(cancelled())),
    };
    match frame {
        Err(_) => Err(Stop::Lost(Failure::timeout("waiting for content", NEXT))),
        Ok(Ok(Frame::Data(bytes))) => Ok(Some(bytes)),
        Ok(Ok(Frame::EndOfData)) => Ok(None),
        Ok(Ok(Frame::Control(bytes))) => {
            let message = AgentMessage::decode(bytes).map_err(WireError::Decode).and_then(|m| {
                m.message.ok_or(WireError::Unexpected { wanted: "data", got: "unknown" })
            });
            Err(unwelcome(&target.channel, message))
        }
        Ok(Err(error)) => Err(unwelcome(&target.channel, Err(error))),
    }
}

fn malformed(reason: &str) -> Stop {
    Stop::Failed(Failure::new(Code::Malformed, reason, "pull the image on both nodes"))
}
