//! The control service of this shim (`proto/control.proto`): what the node's
//! agent asks of a container that may leave.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::{
    self,
    r#async::{ServerStreamSender, Service, TtrpcContext},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span};
use transship_api::{
    control::{
        AbandonRequest, AbandonResponse, AdjustRequest, AdjustResponse, DepartEvent, DepartRequest,
        Departure, InspectRequest, InspectResponse, PhaseTime, SettleRequest, SettleResponse,
        WatchRequest, WatchResponse,
    },
    control_ttrpc::{Shim, create_shim},
};
use transship_link::{Credentials, Trust, connect_ticket};
use transship_migration::{
    Connect, Doubt, Evidence, History, Journal, Manifest, Options, chain, depart,
    handoff::Ending,
    journal::{Role, Subject},
    pages::RateLimit,
    settle,
};
use transship_types::{Epoch, MigrationId, NodeName, Ticket, paths, quantity::micros};

use crate::{
    depart::Leaving,
    error::{Error, Result},
    inspect, plan,
    pod::Pod,
    tuning,
};

/// Events on their way to the agent; it reads faster than phases change.
const QUEUE: usize = 64;

/// A pause that is of no use any more shall not last longer than this.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// The service, to be registered with a server.
pub fn services(pod: &Pod) -> HashMap<String, Service> {
    let (departures, watches) = Default::default();
    create_shim(Arc::new(Control { pod: pod.clone(), departures, watches }))
}

struct Control {
    pod: Pod,
    /// By container; one at a time.
    departures: Mutex<HashMap<String, Under>>,
    watches: plan::Watches,
}

/// A departure under way.
struct Under {
    migration: MigrationId,
    cancel: CancellationToken,
    limit: Arc<RateLimit>,
    /// None until it has ended.
    ending: watch::Receiver<Option<Ending>>,
    /// In doubt: where proof is awaited.
    proof: Option<mpsc::Sender<Proved>>,
}

struct Proved {
    proof: Evidence,
    /// Not the target's word but a person's, under this epoch.
    decided: Option<Epoch>,
    settled: oneshot::Sender<(Ending, std::result::Result<(), String>)>,
}

/// What a departure needs, checked.
struct Order {
    id: String,
    migration: MigrationId,
    ticket: Ticket,
    address: String,
    node: NodeName,
    credentials: Credentials,
    options: Options,
}

impl Order {
    fn check(request: DepartRequest) -> Result<Self> {
        let invalid =
            |error: transship_types::InvalidName| Error::InvalidArgument(error.to_string());
        let credentials = request.credentials.into_option().unwrap_or_default();
        Ok(Self {
            options: tuning::options(request.tuning.as_ref())?,
            migration: request.migration.parse().map_err(invalid)?,
            ticket: request.ticket.parse().map_err(invalid)?,
            node: request.node.parse().map_err(invalid)?,
            id: request.id,
            address: request.address,
            credentials: Credentials {
                ca: credentials.ca.into(),
                certificate: credentials.certificate.into(),
                key: credentials.key.into(),
                crl: Some(credentials.crl).filter(|crl| !crl.is_empty()).map(Into::into),
            },
        })
    }
}

#[async_trait]
impl Shim for Control {
    async fn inspect(
        &self,
        _: &TtrpcContext,
        request: InspectRequest,
    ) -> ttrpc::Result<InspectResponse> {
        let container = self.pod.find(&request.id)?;
        Ok(inspect::inspect(&container).await?)
    }

    async fn depart(
        &self,
        _: &TtrpcContext,
        request: DepartRequest,
        stream: ServerStreamSender<DepartEvent>,
    ) -> ttrpc::Result<()> {
        let order = Order::check(request)?;
        let container = self.pod.find(&order.id)?;
        self.watches.end(&order.id).await;
        let leaving = Leaving::new(container.occupy().await?)?;
        let cancel = CancellationToken::new();
        let (ended, ending) = watch::channel(None);
        let under = Under {
            migration: order.migration.clone(),
            cancel: cancel.clone(),
            limit: order.options.limit.clone(),
            ending,
            proof: None,
        };
        self.departures().insert(order.id.clone(), under);

        let (events, mut queue) = mpsc::channel(QUEUE);
        let span = info_span!("departure", id = order.id, migration = %order.migration);
        let (id, migration) = (order.id.clone(), order.migration.clone());
        let (key, cancel_it) = (container.key().clone(), cancel.clone());
        let (doubt, doubtful) = oneshot::channel();
        let journal = paths::journal_dir();
        // A task of its own: it must reach an ending even if the agent, whose
        // call this is, goes away.
        tokio::spawn(
            async move {
                let namespace = key.namespace().to_owned();
                run(leaving, order, namespace, journal, &cancel, events, &ended, doubt).await;
            }
            .instrument(span),
        );
        let mut told = Ok(());
        loop {
            let event = tokio::select! {
                event = queue.recv() => match event {
                    Some(event) => event,
                    None => break,
                },
                // Says nothing, but fails once the agent is gone.
                () = sleep(SIGN_OF_LIFE) => DepartEvent::new(),
            };
            told = stream.send(&event).await;
            if told.is_err() {
                // Nobody listens any more: before the commit that is a cancel.
                cancel_it.cancel();
                break;
            }
        }
        match doubtful.await {
            Ok(proof) => {
                if let Some(under) = self.departures().get_mut(&id) {
                    under.proof = Some(proof);
                }
            }
            // The container may have begun another one meanwhile.
            Err(_) => {
                self.departures().retain(|at, under| *at != id || under.migration != migration);
            }
        }
        told
    }

    async fn abandon(
        &self,
        _: &TtrpcContext,
        request: AbandonRequest,
    ) -> ttrpc::Result<AbandonResponse> {
        let (cancel, mut ending) = {
            let departures = self.departures();
            let under = find(&departures, &request.id, &request.migration)?;
            (under.cancel.clone(), under.ending.clone())
        };
        cancel.cancel();
        let ended = match ending.wait_for(Option::is_some).await {
            Ok(ended) => *ended,
            Err(_) => None,
        };
        let mut response = AbandonResponse::new();
        response.abandoned = ended == Some(Ending::StayedHome);
        response.detail = match ended {
            Some(Ending::StayedHome) => "it runs on here".into(),
            Some(Ending::Departed) => "too late: it had been committed and runs there".into(),
            Some(Ending::InDoubt) => "too late: it had been committed and is in doubt".into(),
            None => "its ending was not seen".into(),
        };
        Ok(response)
    }

    async fn adjust(
        &self,
        _: &TtrpcContext,
        request: AdjustRequest,
    ) -> ttrpc::Result<AdjustResponse> {
        let departures = self.departures();
        find(&departures, &request.id, &request.migration)?.limit.set(request.bandwidth);
        Ok(AdjustResponse::new())
    }

    async fn settle(
        &self,
        _: &TtrpcContext,
        request: SettleRequest,
    ) -> ttrpc::Result<SettleResponse> {
        let proof = {
            let mut departures = self.departures();
            find(&departures, &request.id, &request.migration)?;
            departures.get_mut(&request.id).and_then(|under| under.proof.clone())
        };
        let proof = proof.ok_or_else(|| {
            Error::FailedPrecondition(format!("the departure of {} is not in doubt", request.id))
        })?;
        let (settled, answer) = oneshot::channel();
        let gone = || Error::Internal(format!("the departure of {} was lost", request.id));
        let known = match (request.runs_there, request.may_lack) {
            (true, true) => Evidence::MayLack,
            (true, false) => Evidence::RunsThere,
            (false, _) => Evidence::NotThere,
        };
        let decided = (request.decided > 0).then_some(Epoch(request.decided));
        proof.send(Proved { proof: known, decided, settled }).await.map_err(|_| gone())?;
        let answer = answer.await;
        // Whether or not all went well: there is nothing left to settle.
        if !matches!(answer, Ok((Ending::InDoubt, _))) {
            self.departures().remove(&request.id);
        }
        let (ending, settled) = answer.map_err(|_| gone())?;
        let mut response = SettleResponse::new();
        response.ending = ending.as_str().into();
        match ending {
            Ending::InDoubt => response.error = settled.err().unwrap_or_default(),
            _ => settled.map_err(Error::Internal)?,
        }
        Ok(response)
    }

    async fn watch(&self, _: &TtrpcContext, request: WatchRequest) -> ttrpc::Result<WatchResponse> {
        let container = self.pod.find(&request.id)?;
        let watched = {
            let departures = self.departures();
            if departures.contains_key(&request.id) {
                let why = format!("{} is leaving this node", request.id);
                return Err(Error::FailedPrecondition(why).into());
            }
            self.watches.begin(&request.id)?
        };
        let duration = Duration::from_micros(request.duration_us);
        Ok(plan::watch(&container, duration, watched).await?)
    }
}

impl Control {
    fn departures(&self) -> MutexGuard<'_, HashMap<String, Under>> {
        self.departures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find<'a>(
    departures: &'a HashMap<String, Under>,
    id: &str,
    migration: &str,
) -> Result<&'a Under> {
    let under = departures.get(id).filter(|under| under.migration.as_str() == migration);
    under.ok_or_else(|| Error::NotFound(format!("no migration {migration} of {id} is under way")))
}

/// From the connection to the ending; `doubt` is used only if there is one.
#[allow(clippy::too_many_arguments, reason = "one call, and each is of its own kind")]
async fn run(
    mut leaving: Leaving,
    order: Order,
    namespace: String,
    journals: PathBuf,
    cancel: &CancellationToken,
    events: mpsc::Sender<DepartEvent>,
    ended: &watch::Sender<Option<Ending>>,
    doubt: oneshot::Sender<mpsc::Sender<Proved>>,
) {
    let (departure, ending, open) =
        attempt(&mut leaving, order, namespace, journals, cancel, &events).await;
    // Only a doubt leaves its journal open; otherwise the container is free
    // again before anybody hears of it.
    let mut kept = open.map(|doubt| (leaving, doubt));
    let mut event = DepartEvent::new();
    event.set_departure(departure);
    let (sender, mut proofs) = mpsc::channel(1);
    if kept.is_some() {
        let _ = doubt.send(sender);
    } else {
        drop(doubt);
    }
    let _ = ended.send(Some(ending));
    // An agent that is gone asks again by migration.
    let _ = events.send(event).await;
    drop(events);
    while let Some((mut leaving, doubt)) = kept.take()
        && let Some(proved) = proofs.recv().await
    {
        let answer = match settle(&mut leaving, doubt, proved.proof, proved.decided).await {
            Ok((ending, settled)) => {
                drop(leaving);
                (ending, settled.map_err(|error| chain(&error)))
            }
            Err((doubt, error)) => {
                kept = Some((leaving, doubt));
                (Ending::InDoubt, Err(chain(&error)))
            }
        };
        let _ = proved.settled.send(answer);
    }
}

async fn attempt(
    leaving: &mut Leaving,
    order: Order,
    namespace: String,
    journals: PathBuf,
    cancel: &CancellationToken,
    events: &mpsc::Sender<DepartEvent>,
) -> (Departure, Ending, Option<Doubt>) {
    let stayed = |error: String| {
        let mut departure = Departure::new();
        departure.ending = Ending::StayedHome.as_str().into();
        departure.error = error;
        (departure, Ending::StayedHome, None)
    };
    let trust = match Trust::load(&order.credentials) {
        Ok(trust) => trust,
        Err(error) => return stayed(chain(&error)),
    };
    let connected = tokio::select! {
        connected = connect_ticket(&trust, &order.address, &order.node, &order.ticket) => connected,
        () = cancel.cancelled() => return stayed("cancelled".into()),
    };
    let channel = match connected {
        Ok(channel) => channel,
        Err(error) => return stayed(chain(&error)),
    };
    leaving.reach(lanes(trust, &order));
    let subject = Subject {
        role: Role::Source,
        migration: order.migration.clone(),
        ticket: order.ticket.clone(),
        namespace,
        container: order.id.clone(),
        peer: order.node.clone(),
        epoch: Epoch(1),
    };
    let epoch = subject.epoch.0;
    let journal = match Journal::create(&journals, subject) {
        Ok(journal) => journal,
        Err(error) => return stayed(chain(&error)),
    };
    let mut options = order.options;
    let history = History::at(paths::pauses_file());
    history.inform(&mut options.budget);
    let manifest = Manifest {
        migration: order.migration.to_string(),
        ticket: order.ticket.to_string(),
        container: order.id,
        epoch,
        remembered: None,
        descriptors: String::new(),
        lanes: 0,
        memory_bytes: 0,
    };
    let progress = |progress: transship_migration::Progress| {
        let mut event = DepartEvent::new();
        event.set_progress(tuning::progress(progress));
        // A slow reader loses progress, never the ending.
        let _ = events.try_send(event);
    };
    let done = depart(channel, leaving, manifest, journal, &options, cancel, &progress).await;
    history.add(&done);
    let mut departure = Departure::new();
    departure.ending = done.ending.as_str().into();
    departure.error = done.error.as_ref().map(|error| chain(error)).unwrap_or_default();
    departure.target_pid = done.target_pid.unwrap_or_default();
    departure.downtime_us = micros(done.times.downtime());
    departure.image_bytes = done.image_bytes;
    departure.rootfs_bytes = done.layer.bytes;
    departure.phases = done
        .times
        .times()
        .into_iter()
        .map(|(phase, time)| {
            let mut entry = PhaseTime::new();
            entry.phase = phase.to_string();
            entry.duration_us = micros(time);
            entry
        })
        .collect();
    departure.memory = match (&done.memory, leaving.fallback()) {
        (Some(memory), _) => Some(tuning::memory_report(memory)),
        (None, Some(why)) => Some(tuning::ordinary_report(why)),
        (None, None) => None,
    }
    .into();
    (departure, done.ending, done.doubt)
}

/// One more connection to the same target each time, for pages.
fn lanes(trust: Trust, order: &Order) -> Connect {
    let trust = Arc::new(trust);
    let (address, node, ticket) = (order.address.clone(), order.node.clone(), order.ticket.clone());
    Arc::new(move || {
        let (trust, address) = (trust.clone(), address.clone());
        let (node, ticket) = (node.clone(), ticket.clone());
        Box::pin(async move { connect_ticket(&trust, &address, &node, &ticket).await })
    })
}
