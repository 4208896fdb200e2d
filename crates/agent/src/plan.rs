//! What a migration would be like, before there is one.
//!
//! The container's memory is watched by its shim, the link is measured by a
//! short burst, the target says what it would say to the offer; what follows
//! from all that is computed ([`predict`], [`remarks`]). Nothing is begun.

mod link;
mod predict;
mod remarks;

use std::time::Duration;

use transship_api::control::{PlanRequest, PlanResponse};
use transship_migration::History;
use transship_types::{Code, MigrationId, Refusal, paths::PAUSES};

use crate::{
    failure::{Failure, Step, to_control},
    node::{Node, random},
    source, tuning,
};
use predict::{Behaviour, Way};

/// As the shim allows it.
const LONGEST: Duration = Duration::from_secs(60);

pub async fn plan(node: &Node, request: &PlanRequest) -> Step<PlanResponse> {
    let key = source::key(&request.namespace, &request.container)?;
    let to = node.find(&request.node)?;
    let tuning = tuning::choose(request.tuning.get_or_default(), &node.config.memory)?;
    let watch = Duration::from_micros(request.watch_us);
    if watch > LONGEST {
        let reason = format!("watching for {watch:?}");
        return Err(Failure::new(Code::Malformed, reason, format!("{LONGEST:?} are the most")));
    }
    if node.book.is_live(&key) {
        let reason = format!("{key} is being migrated");
        return Err(Failure::new(Code::Busy, reason, "see `transship status`"));
    }
    // What cannot be looked at cannot be planned either.
    let (subject, mut refusals) = source::look(node, &key, &tuning).await?;

    let migration = MigrationId::from_random(random()?);
    let offer = source::offer(node, &migration, &key, &subject).await;
    // One after the other: a burst takes processor time from the container.
    let asked = link::ask(node, &to, offer).await;
    let watched = node.shims.watch(&key, watch).await;

    let mut response = PlanResponse {
        source: node.name().to_string(),
        target: to.name.to_string(),
        rootfs_bytes: subject.rootfs_bytes,
        ..Default::default()
    };
    match asked {
        Ok(answer) => {
            refusals.extend(answer.refusals);
            response.content_bytes = subject.bytes_of(&answer.missing);
            response.link = Some(answer.link).into();
        }
        Err(Failure(reasons)) => refusals.extend(reasons),
    }
    match watched {
        Ok(memory) => response.memory = Some(memory).into(),
        Err(error) => refusals.push(unwatched(error.into())),
    }
    response.refusals = refusals.iter().map(to_control).collect();
    if let (Some(memory), Some(link)) = (response.memory.as_ref(), response.link.as_ref()) {
        let way = Way::new(link, tuning.bandwidth);
        let behaviour = Behaviour::new(memory);
        let before = response.rootfs_bytes.saturating_add(response.content_bytes);
        let mut budget = tuning::budget(&tuning);
        History::at(node.places.state.join(PAUSES)).inform(&mut budget);
        let prediction = predict::predict(&behaviour, &way, &budget, before);
        response.prediction = Some(prediction).into();
    }
    response.remarks = remarks::remarks(&response, &tuning);
    Ok(response)
}

fn unwatched(Failure(reasons): Failure) -> Refusal {
    let reason = Failure(reasons.clone()).sentence();
    let first = reasons.into_iter().next();
    let remedy = first.as_ref().map(|r| r.remedy.clone()).unwrap_or_default();
    Refusal::new(first.map_or(Code::Internal, |r| r.code), reason, remedy)
}
