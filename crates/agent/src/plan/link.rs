//! What the target says to an offer, and what the way to it carries.

use std::time::{Duration, Instant};

use transship_api::{
    control::LinkReport,
    session::{Consider, LinkProbe, Offer, agent_message::Message},
};
use transship_link::{Channel, connect_agent};
use transship_types::Refusal;

use crate::{
    failure::{Failure, Step, from_session},
    node::{Destination, Node},
    talk,
};

/// The target probes its CRIU and asks its daemon.
const VERDICT: Duration = Duration::from_secs(60);
/// A link that is slow empties its buffers within that.
const PROBED: Duration = Duration::from_secs(30);
/// TCP and the processors get up to speed before anything counts.
const WARM_UP: Duration = Duration::from_millis(100);
const BURST: Duration = Duration::from_millis(300);
/// The smallest of a few counts: the others met something.
const ROUND_TRIPS: usize = 4;

pub struct Answer {
    /// The target's.
    pub refusals: Vec<Refusal>,
    /// Digests it would ask for.
    pub missing: Vec<String>,
    pub link: LinkReport,
}

pub async fn ask(node: &Node, to: &Destination, offer: Offer) -> Step<Answer> {
    let mut channel = connect_agent(&node.trust(), &to.address, &to.name).await?;
    channel.writer.set_deadline(talk::WRITE);
    let consider = Message::Consider(Consider { offer: Some(offer) });
    talk::send(&mut channel, consider).await?;
    let (refusals, missing): (Vec<Refusal>, _) =
        match talk::receive_within(&mut channel, VERDICT).await? {
            Message::Verdict(verdict) => {
                (verdict.refusals.into_iter().map(from_session).collect(), verdict.missing)
            }
            Message::Failure(failure) => return Err(Failure::from_message(&to.name, failure)),
            other => return Err(talk::out_of_place(&to.name, &other)),
        };
    let link = measure(&mut channel).await?;
    let _ = channel.writer.close().await;
    Ok(Answer { refusals, missing, link })
}

async fn measure(channel: &mut Channel) -> Step<LinkReport> {
    let mut round_trip = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        round_trip = round_trip.min(burst(channel, Duration::ZERO).await?.1);
    }
    burst(channel, WARM_UP).await?;
    let (bytes, took) = burst(channel, BURST).await?;
    // The answer's way back carried nothing.
    let sending = took.saturating_sub(round_trip / 2).max(Duration::from_micros(1));
    Ok(LinkReport {
        rate: (bytes as f64 / sending.as_secs_f64()) as u64,
        round_trip_us: round_trip.as_micros().try_into().unwrap_or(u64::MAX),
        bytes,
        ..Default::default()
    })
}

/// Sends for so long, and waits until all has been read there.
async fn burst(channel: &mut Channel, length: Duration) -> Step<(u64, Duration)> {
    let doing = format!("measuring the link to {}", channel.peer);
    let wire = |e| Failure::wire(&doing, &e);
    // Not zeros: something on the way may compress.
    let piece: Vec<u8> =
        (0..256u32 << 10).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let began = Instant::now();
    talk::send(channel, Message::LinkProbe(LinkProbe {})).await?;
    while began.elapsed() < length {
        channel.writer.data(&piece).await.map_err(wire)?;
    }
    channel.writer.end_data().await.map_err(wire)?;
    let answer = talk::receive_within(channel, PROBED).await?;
    match answer {
        Message::LinkProbed(probed) => Ok((probed.bytes, began.elapsed())),
        Message::Failure(failure) => Err(Failure::from_message(&channel.peer, failure)),
        other => Err(talk::out_of_place(&channel.peer, &other)),
    }
}
