//! Agent messages on a channel.

use std::time::Duration;

use tokio::time;
use transship_api::session::{AgentMessage, agent_message::Message};
use transship_link::Channel;
use transship_types::Code;
use transship_wire::WireError;

use crate::failure::{Failure, Step};

/// A peer that takes nothing for so long is gone.
pub const WRITE: Duration = Duration::from_secs(30);

pub async fn send(channel: &mut Channel, message: Message) -> Step<()> {
    let doing = format!("talking to {}", channel.peer);
    let message = AgentMessage { message: Some(message) };
    channel.writer.control(&message).await.map_err(|e| Failure::wire(&doing, &e))
}

/// The next message; cancel by dropping, without loss.
pub async fn receive(channel: &mut Channel) -> Result<Message, WireError> {
    let message: AgentMessage = channel.reader.control().await?;
    // A message of a later version decodes to nothing.
    message.message.ok_or(WireError::Unexpected { wanted: "known message", got: "unknown" })
}

/// The same, within a limit.
pub async fn receive_within(channel: &mut Channel, limit: Duration) -> Step<Message> {
    let doing = format!("waiting for {}", channel.peer);
    match time::timeout(limit, receive(channel)).await {
        Ok(received) => received.map_err(|e| Failure::wire(&doing, &e)),
        Err(_) => Err(Failure::timeout(&doing, limit)),
    }
}

/// One question on a connection of its own.
pub async fn ask(mut channel: Channel, question: Message, limit: Duration) -> Step<Message> {
    send(&mut channel, question).await?;
    let answer = receive_within(&mut channel, limit).await?;
    // So that the peer sees an end and not a cut; the answer is here anyway.
    let _ = channel.writer.close().await;
    Ok(answer)
}

/// A message that has no place here.
pub fn out_of_place(peer: &impl std::fmt::Display, message: &Message) -> Failure {
    let name = match message {
        Message::Offer(_) => "Offer",
        Message::Verdict(_) => "Verdict",
        Message::Blob(_) => "Blob",
        Message::Prepare(_) => "Prepare",
        Message::Ready(_) => "Ready",
        Message::Arrived(_) => "Arrived",
        Message::Failure(_) => "Failure",
        Message::Discard(_) => "Discard",
        Message::Probe(_) => "Probe",
        Message::ProbeResult(_) => "ProbeResult",
        Message::Progress(_) => "Progress",
        Message::Discarded(_) => "Discarded",
        Message::Inquiry(_) => "Inquiry",
        Message::Standing(_) => "Standing",
        Message::Consider(_) => "Consider",
        Message::LinkProbe(_) => "LinkProbe",
        Message::LinkProbed(_) => "LinkProbed",
        Message::Decision(_) => "Decision",
    };
    Failure::new(
        Code::Malformed,
        format!("{peer} sent {name} out of turn"),
        "run the same version of Transship on both nodes",
    )
}
