//! A target whose copy a person has overruled is told until it has followed,
//! however long it is away. Only then one copy certainly runs.

use std::{sync::Arc, time::Duration};

use tokio::time;
use tracing::Instrument;
use transship_api::session::{self, agent_message::Message};
use transship_link::connect_agent;
use transship_migration::decide::Standing;

use super::settle::{AGAIN, ANSWER};
use crate::{book::Record, failure::Step, node::Node, talk};

/// A node may be away for weeks.
const SELDOM: Duration = Duration::from_secs(60);

/// In the background, until it is done or the agent ends.
pub fn begin(node: &Arc<Node>, record: Record) {
    let span = tracing::info_span!("fence", id = %record.migration, container = %record.key, to = %record.peer);
    let node = node.clone();
    let work = {
        let node = node.clone();
        async move {
            tokio::select! {
                () = fence(&node, &record) => {}
                () = node.shutdown.cancelled() => {}
            }
        }
    };
    node.tasks.spawn(work.instrument(span));
}

async fn fence(node: &Node, record: &Record) {
    let (mut wait, mut last) = (AGAIN, String::new());
    loop {
        let said = match tell(node, record).await {
            Ok(standing) if Standing::of(&standing.state) == Standing::Discarded => {
                return followed(node, record, standing.ran).await;
            }
            Ok(standing) => format!("it says {:.40}", standing.state),
            Err(failure) => failure.sentence(),
        };
        if said != last {
            tracing::warn!(said, "the target has not followed the decision yet");
            last = said;
        }
        time::sleep(wait).await;
        wait = SELDOM.min(wait * 2);
    }
}

async fn tell(node: &Node, record: &Record) -> Step<session::Standing> {
    let channel = connect_agent(&node.trust(), &record.address, &record.peer).await?;
    let (migration, epoch) = (record.migration.to_string(), record.epoch().0);
    let decision = session::Decision { migration, epoch };
    match talk::ask(channel, Message::Decision(decision), ANSWER).await? {
        Message::Standing(standing) => Ok(standing),
        other => Err(talk::out_of_place(&record.peer, &other)),
    }
}

async fn followed(node: &Node, record: &Record, ran: bool) {
    let peer = &record.peer;
    if ran {
        tracing::error!("both nodes ran it, until {peer} heard of the decision and ended its copy");
    } else {
        tracing::info!("the target has followed the decision");
    }
    let change = |record: &mut Record| {
        if let Some(decision) = &mut record.decision {
            (decision.followed, decision.both_ran) = (true, ran);
        }
        if ran {
            record.error += &format!("; it ran on {peer} as well, until {peer} heard of it");
        }
    };
    if let Err(failure) = node.book.change(&record.migration, change).await {
        tracing::error!(error = failure.sentence(), "it was not written down");
    }
}
