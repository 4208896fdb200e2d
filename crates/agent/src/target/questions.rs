//! What a peer may ask before it moves anything, or after a link broke. No
//! answer changes anything here.

use std::time::Duration;

use tokio::time;
use transship_api::session::{
    Consider, LinkProbed, Offer, ProbeResult, Standing, Verdict, agent_message::Message,
};
use transship_link::Channel;
use transship_migration::decide::{self, Kept};
use transship_types::{Code, NodeName, Refusal};

use crate::{
    book::{Ending, Role},
    failure::{Failure, Step, to_session},
    node::Node,
    offer, preflight,
};

/// A probe takes some tenths of a second; this is for a link that dies in it.
const PIECE: Duration = Duration::from_secs(10);
/// Far beyond what a link carries in the time that a probe takes.
const PROBE_MAX: u64 = 8 << 30;

pub async fn probe(node: &Node) -> Message {
    let host = Some(node.host().await);
    Message::ProbeResult(ProbeResult { host })
}

/// Only the node that a migration came from learns of it.
pub fn standing(node: &Node, peer: &NodeName, migration: &str) -> Message {
    let record = migration.parse().ok().and_then(|m| node.book.record(&m));
    let record = record.filter(|r| r.role == Role::Target && r.peer == *peer);
    let standing = decide::standing(record.map(|record| match record.ending {
        Ending::Arrived if node.book.owes(&record) => Kept::Owed,
        Ending::Arrived => Kept::Arrived,
        Ending::Discarded => Kept::Discarded,
        _ => Kept::Open,
    }));
    Message::Standing(Standing { state: standing.as_str().into(), ran: false })
}

/// The verdict that this offer would meet now, without a ticket.
pub async fn consider(node: &Node, consider: Consider) -> Message {
    let judged = judge(node, consider.offer.unwrap_or_default()).await;
    let (refusals, missing) = judged.unwrap_or_else(|Failure(refusals)| (refusals, vec![]));
    let refusals = refusals.iter().map(to_session).collect();
    Message::Verdict(Verdict { refusals, missing, ..Default::default() })
}

async fn judge(node: &Node, offer: Offer) -> Step<(Vec<Refusal>, Vec<String>)> {
    let offer = offer::check(offer)?;
    let facts = preflight::gather(node, &offer).await?;
    let mut refusals = preflight::judge(&offer, &facts, &node.config.limits);
    if node.book.is_live(&offer.key) {
        let reason = format!("{} is being migrated already", offer.key);
        refusals.push(Refusal::new(Code::Busy, reason, "wait for it"));
    }
    Ok((refusals, facts.missing))
}

/// Reads what comes, and says how much that was.
pub async fn link_probe(node: &Node, channel: &mut Channel) -> Step<Message> {
    let doing = format!("measuring the link from {}", channel.peer);
    let mut bytes = 0u64;
    loop {
        let piece = tokio::select! {
            piece = time::timeout(PIECE, channel.reader.data()) => piece,
            () = node.shutdown.cancelled() => {
                return Err(Failure::cancelled("transshipd is shutting down"));
            }
        };
        let piece = piece.map_err(|_| Failure::timeout(&doing, PIECE))?;
        let Some(piece) = piece.map_err(|e| Failure::wire(&doing, &e))? else {
            return Ok(Message::LinkProbed(LinkProbed { bytes }));
        };
        bytes += piece.len() as u64;
        channel.reader.reuse(piece);
        if bytes > PROBE_MAX {
            let reason = format!("{doing}: it does not end");
            return Err(Failure::new(Code::Malformed, reason, ""));
        }
    }
}
