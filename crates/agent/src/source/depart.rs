//! The part of a migration in which the shim has the say.

use std::time::Duration;

use tokio::time;
use transship_api::{
    control::{Credentials, DepartRequest, Departure, depart_event::Event},
    session::{Arrived, agent_message::Message},
};
use transship_types::Code;

use super::{Ready, Source, cancelled, settle::Proof};
use crate::{
    failure::{Failure, chain},
    talk,
};

/// Memory moves all the time or the shim's own deadlines end it; this is for
/// a shim that does neither.
const SILENCE: Duration = Duration::from_secs(600);

pub enum Outcome {
    Departed {
        departure: Box<Departure>,
        arrived: Option<Arrived>,
    },
    /// `target`: what the target said after it had removed what it made.
    StayedHome {
        failure: Failure,
        target: Option<Failure>,
        /// Absent if the shim had not begun.
        departure: Option<Box<Departure>>,
    },
    /// Only the target can tell; it may have done so already.
    InDoubt {
        error: String,
        proof: Option<Proof>,
    },
}

/// What the target said meanwhile.
#[derive(Default)]
struct Heard {
    arrived: Option<Arrived>,
    failed: Option<Failure>,
    silent: bool,
}

impl Heard {
    fn proof(self) -> Option<Proof> {
        match self {
            Heard { arrived: Some(arrived), .. } => Some(Proof::Runs { arrived, whole: false }),
            Heard { failed: Some(failure), .. } => Some(Proof::Never(failure)),
            _ => None,
        }
    }
}

impl Source {
    pub(super) async fn departure(&mut self, ready: &mut Ready) -> Outcome {
        self.entry.phase("depart");
        if let Err(failure) = self.entry.departing().await {
            return not_begun(failure);
        }
        if self.entry.live.cancel.is_cancelled() {
            return not_begun(cancelled());
        }
        let request = self.depart_request(ready);
        let mut departing = match self.node.shims.depart(&self.key, request).await {
            Ok(departing) => departing,
            Err(e) => return not_begun(e.into()),
        };
        let mut heard = Heard::default();
        let mut asked_to_stop = false;
        let lost = loop {
            tokio::select! {
                event = time::timeout(SILENCE, departing.next()) => match event {
                    Ok(Ok(Some(event))) => match event.event {
                        Some(Event::Progress(p)) => self.entry.shim_progress(p),
                        Some(Event::Departure(d)) => return self.over(d, heard, asked_to_stop),
                        Some(_) | None => {}
                    },
                    Ok(Ok(None)) => break "the shim ended without an outcome".to_string(),
                    Ok(Err(error)) => break chain(&error),
                    Err(_) if asked_to_stop => break "the shim does not answer".to_string(),
                    // Still cancellable as far as we know: find out.
                    Err(_) => self.entry.live.cancel.cancel(),
                },
                message = talk::receive(&mut ready.channel), if !heard.silent => match message {
                    Ok(Message::Arrived(arrived)) => heard.arrived = Some(arrived),
                    Ok(Message::Failure(f)) => {
                        heard.failed = Some(Failure::from_message(&self.to.name, f));
                        heard.silent = true;
                    }
                    Ok(_) => {}
                    // The shims have a connection of their own.
                    Err(_) => heard.silent = true,
                },
                () = self.entry.cancelled(), if !asked_to_stop => {
                    asked_to_stop = true;
                    self.abandon().await;
                }
            }
        };
        // A shim that died before its commit leaves the container running or
        // dead, one that died after it leaves it stopped. Only the target can
        // tell which.
        Outcome::InDoubt { error: lost, proof: heard.proof() }
    }

    fn depart_request(&self, ready: &Ready) -> DepartRequest {
        let files = &self.node.identities.current().files;
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        DepartRequest {
            id: self.key.id().into(),
            migration: self.entry.migration().to_string(),
            ticket: ready.ticket.to_string(),
            address: self.to.address.clone(),
            node: self.to.name.to_string(),
            credentials: Some(Credentials {
                ca: text(&files.ca),
                certificate: text(&files.certificate),
                key: text(&files.key),
                crl: files.crl.as_deref().map(text).unwrap_or_default(),
                ..Default::default()
            })
            .into(),
            tuning: Some(self.tuning.clone()).into(),
            ..Default::default()
        }
    }

    /// Carries the cancellation to the shim; its outcome comes as an event.
    async fn abandon(&self) {
        match self.node.shims.abandon(&self.key, self.entry.migration()).await {
            Ok(None) => tracing::info!("the departure was abandoned"),
            Ok(Some(why)) => self.entry.too_late(&why),
            Err(error) => self.entry.too_late(&chain(&error)),
        }
    }

    fn over(&self, departure: Departure, heard: Heard, asked_to_stop: bool) -> Outcome {
        match departure.ending.as_str() {
            "departed" => {
                Outcome::Departed { departure: Box::new(departure), arrived: heard.arrived }
            }
            "stayed-home" => {
                let failure = if asked_to_stop {
                    cancelled()
                } else {
                    Failure::new(
                        Code::Runtime,
                        departure.error.clone(),
                        "see transshipd's log on both nodes and the shim's in containerd's",
                    )
                };
                let departure = Some(Box::new(departure));
                Outcome::StayedHome { failure, target: heard.failed, departure }
            }
            // "in-doubt", and whatever a later shim may say.
            _ => Outcome::InDoubt { error: departure.error, proof: heard.proof() },
        }
    }
}

fn not_begun(failure: Failure) -> Outcome {
    Outcome::StayedHome { failure, target: None, departure: None }
}
