//! The control socket: what the command line asks of this agent.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use protobuf::Message as _;
use tokio::time;
use transship_api::{
    control::{
        CancelRequest, CancelResponse, CheckRequest, CheckResponse, ContainerEntry, Failed,
        LimitRequest, LimitResponse, ListRequest, ListResponse, MigrateEvent, MigrateRequest,
        MigrationEntry, PlanRequest, PlanResponse, Report, ResolveRequest, ResolveResponse,
        Started, StatusRequest, StatusResponse, VersionRequest, VersionResponse,
        migrate_event::Event,
    },
    control_ttrpc,
};
use transship_types::{Code, ContainerKey, MigrationId, PROTOCOL};
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use crate::{
    book::{Book, End, Ending, Live, Record, Role, View},
    check,
    daemon::{Listed, TaskStatus},
    failure::{Failure, Step, chain, from_control, to_control},
    node::Node,
    plan, resolve, source,
};

/// Also the proof that the command line is still there: a write to a socket
/// that was closed fails.
const TICK: Duration = Duration::from_millis(500);

/// How long a person waits for a doubt to end. The agent goes on asking.
const DOUBT: Duration = Duration::from_secs(30);

/// A shim that does not answer must not hold a list up.
const LOOK: Duration = Duration::from_secs(3);

pub struct Control(pub Arc<Node>);

#[async_trait]
impl control_ttrpc::Agent for Control {
    async fn version(&self, _: &TtrpcContext, _: VersionRequest) -> ttrpc::Result<VersionResponse> {
        let host = self.0.host().await;
        let containerd = match self.0.daemon.version().await {
            Ok(version) => version,
            Err(error) => chain(&error),
        };
        Ok(VersionResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.0.name().to_string(),
            kernel: host.kernel,
            criu: host.criu,
            containerd,
            protocol: PROTOCOL,
            ..Default::default()
        })
    }

    async fn check(&self, _: &TtrpcContext, request: CheckRequest) -> ttrpc::Result<CheckResponse> {
        let results = check::check(&self.0, &request.node).await;
        Ok(CheckResponse { results, ..Default::default() })
    }

    async fn list(&self, _: &TtrpcContext, request: ListRequest) -> ttrpc::Result<ListResponse> {
        let namespace = Some(request.namespace.as_str()).filter(|n| !n.is_empty());
        let listed = self.0.daemon.list(namespace).await.map_err(|e| status(&e.into()))?;
        let mut containers = Vec::with_capacity(listed.len());
        for one in listed {
            containers.push(entry(&self.0, one).await);
        }
        Ok(ListResponse { containers, ..Default::default() })
    }

    async fn status(
        &self,
        _: &TtrpcContext,
        request: StatusRequest,
    ) -> ttrpc::Result<StatusResponse> {
        let migrations = match request.migration.as_str() {
            "" => self.0.book.records().into_iter().map(|r| self.entry(r)).collect(),
            asked => vec![self.in_full(self.record(asked).map_err(|f| status(&f))?).await],
        };
        Ok(StatusResponse { migrations, ..Default::default() })
    }

    async fn migrate(
        &self,
        _: &TtrpcContext,
        request: MigrateRequest,
        events: ServerStreamSender<MigrateEvent>,
    ) -> ttrpc::Result<()> {
        let send = |event| {
            let event = MigrateEvent { event: Some(event), ..Default::default() };
            let events = &events;
            async move { events.send(&event).await }
        };
        let live = match source::begin(&self.0, &request).await {
            Ok(live) => live,
            Err(failure) => {
                let outcome = "nothing was begun".to_string();
                return send(failed(&failure, Ending::StayedHome, outcome, None)).await;
            }
        };
        let migration = live.migration.to_string();
        let followed = async {
            send(Event::Started(Started { migration, ..Default::default() })).await?;
            follow(&self.0.book, &live, send).await
        };
        let gone = followed.await;
        if gone.is_err() {
            // Nobody waits for the outcome any more: as good as a cancel.
            live.cancel.cancel();
        }
        gone
    }

    async fn cancel(
        &self,
        _: &TtrpcContext,
        request: CancelRequest,
    ) -> ttrpc::Result<CancelResponse> {
        let record = self.record(&request.migration).map_err(|f| status(&f))?;
        let Some(live) = self.0.book.live(&record.migration) else {
            let detail = format!("it has ended before: {}", record.ending.as_str());
            return Ok(CancelResponse { detail, ..Default::default() });
        };
        live.cancel.cancel();
        tracing::info!(id = %record.migration, "asked to cancel");
        let mut watch = live.watch();
        let over = watch.wait_for(|v| v.end.is_some() || v.too_late.is_some() || v.in_doubt).await;
        let view = over.map(|v| v.clone()).unwrap_or_default();
        Ok(cancellation(view))
    }

    async fn resolve(
        &self,
        _: &TtrpcContext,
        request: ResolveRequest,
    ) -> ttrpc::Result<ResolveResponse> {
        let record = self.record(&request.migration).map_err(|f| status(&f))?;
        resolve::resolve(&self.0, record, &request).await.map_err(|f| status(&f))
    }

    async fn limit(&self, _: &TtrpcContext, request: LimitRequest) -> ttrpc::Result<LimitResponse> {
        let record = self.record(&request.migration).map_err(|f| status(&f))?;
        self.adjust(&record, request.bandwidth).await.map_err(|f| status(&f))?;
        Ok(LimitResponse::default())
    }

    async fn plan(&self, _: &TtrpcContext, request: PlanRequest) -> ttrpc::Result<PlanResponse> {
        plan::plan(&self.0, &request).await.map_err(|f| status(&f))
    }
}

impl Control {
    pub async fn adjust(&self, record: &Record, bandwidth: u64) -> Step<()> {
        let refuse = |reason: String, remedy: &str| Failure::new(Code::NotRunning, reason, remedy);
        if self.0.book.live(&record.migration).is_none() {
            let reason = format!("it has ended before: {}", record.ending.as_str());
            return Err(refuse(reason, "see `transship status`"));
        }
        if record.role != Role::Source || !record.departing {
            let reason = match record.role {
                Role::Source => "its memory does not travel yet".to_string(),
                Role::Target => format!("its memory is sent by {}", record.peer),
            };
            return Err(refuse(reason, "ask the source, once it is in its rounds"));
        }
        self.0.shims.adjust(&record.key, &record.migration, bandwidth).await?;
        tracing::info!(id = %record.migration, bandwidth, "another bandwidth");
        Ok(())
    }

    /// One migration, with how far it is or how it went.
    async fn in_full(&self, record: Record) -> MigrationEntry {
        let live = self.0.book.live(&record.migration);
        let report = self.0.book.report(&record.migration).await;
        let progress = live.map(|live| live.watch().borrow().progress.clone());
        MigrationEntry { progress: progress.into(), report: report.into(), ..self.entry(record) }
    }

    fn entry(&self, record: Record) -> MigrationEntry {
        let live = self.0.book.live(&record.migration);
        let doubt = resolve::doubt(&self.0, &record, live.as_deref());
        MigrationEntry { doubt: doubt.into(), ..migration(record) }
    }

    fn record(&self, text: &str) -> Result<Record, Failure> {
        let unknown = || {
            let shown: String = text.chars().take(80).collect();
            Failure::new(
                Code::Internal,
                format!("there is no migration {shown:?} on this node"),
                "see `transship status`",
            )
        };
        let id = text.parse::<MigrationId>().map_err(|_| unknown())?;
        self.0.book.record(&id).ok_or_else(unknown)
    }
}

/// Passes on what a migration shows until it has ended.
async fn follow<F>(book: &Book, live: &Live, send: impl Fn(Event) -> F) -> ttrpc::Result<()>
where
    F: Future<Output = ttrpc::Result<()>>,
{
    let mut watch = live.watch();
    let mut doubt = None;
    loop {
        let view = watch.borrow_and_update().clone();
        match view.end {
            Some(End::Moved(report)) => return send(Event::Report(*report)).await,
            Some(End::Failed { refusals, ending, outcome }) => {
                let report = book.report(&live.migration).await;
                return send(failed(&Failure(refusals), ending, outcome, report)).await;
            }
            None => {}
        }
        if view.in_doubt {
            let since = *doubt.get_or_insert_with(time::Instant::now);
            if since.elapsed() > DOUBT {
                return send(still_in_doubt()).await;
            }
        }
        send(Event::Progress(view.progress)).await?;
        // An ending is passed on at once, anything else at the tick: bytes
        // change thousands of times a second.
        let ended = watch.wait_for(|v| v.end.is_some());
        // Both an ending and the end of the watch are seen by the next look.
        let _ = time::timeout(TICK, ended).await;
    }
}

fn still_in_doubt() -> Event {
    let reason = "the link broke at the commit, and the target has not said whether it has it";
    let remedy = "see that transshipd runs on the target; this node goes on asking \
                  (`transship status`); if the target is lost for good, \
                  `transship resolve` decides";
    let outcome = "the container is stopped here until the target has answered";
    failed(&Failure::new(Code::Link, reason, remedy), Ending::InDoubt, outcome.into(), None)
}

fn failed(failure: &Failure, ending: Ending, outcome: String, report: Option<Report>) -> Event {
    Event::Failed(Failed {
        refusals: failure.0.iter().map(to_control).collect(),
        ending: ending.as_str().into(),
        outcome,
        report: report.into(),
        ..Default::default()
    })
}

fn cancellation(view: View) -> CancelResponse {
    let (cancelled, detail) = match view {
        View {
            end: Some(End::Failed { ending: Ending::StayedHome | Ending::Discarded, outcome, .. }),
            ..
        } => (true, outcome),
        View { end: Some(End::Failed { outcome, .. }), .. } => (false, outcome),
        View { end: Some(End::Moved(_)), .. } => (false, "it had been committed already".into()),
        View { too_late: Some(why), .. } => (false, format!("it is too late: {why}")),
        _ => (false, "it is in doubt and cannot be cancelled".into()),
    };
    CancelResponse { cancelled, detail, ..Default::default() }
}

fn migration(record: Record) -> MigrationEntry {
    MigrationEntry {
        migration: record.migration.to_string(),
        namespace: record.key.namespace().into(),
        container: record.key.id().into(),
        role: record.role.as_str().into(),
        peer: record.peer.to_string(),
        phase: record.phase,
        ending: record.ending.as_str().into(),
        error: record.error,
        started: record.started,
        ..Default::default()
    }
}

async fn entry(node: &Node, listed: Listed) -> ContainerEntry {
    let task = listed.task.as_ref();
    let mut entry = ContainerEntry {
        namespace: listed.key.namespace().into(),
        id: listed.key.id().into(),
        image: listed.image,
        status: task.map_or("NONE", |t| t.status.as_str()).into(),
        pid: task.map_or(0, |t| t.pid),
        ..Default::default()
    };
    if task.is_none_or(|t| t.status != TaskStatus::Running) {
        // The list holds our own runtimes only.
        let refusals = source::refusals_of(node, &listed.key, transship_types::RUNTIME, task);
        entry.refusals = refusals.iter().map(to_control).collect();
        return entry;
    }
    match inspect(node, &listed.key).await {
        Ok((refusals, memory_bytes)) => {
            entry.refusals = refusals.iter().map(to_control).collect();
            entry.memory_bytes = memory_bytes;
        }
        Err(failure) => entry.refusals = failure.0.iter().map(to_control).collect(),
    }
    entry
}

async fn inspect(
    node: &Node,
    key: &ContainerKey,
) -> Result<(Vec<transship_types::Refusal>, u64), Failure> {
    let looked = time::timeout(LOOK, node.shims.inspect(key))
        .await
        .map_err(|_| Failure::timeout("the shim's answer", LOOK))??;
    Ok((looked.refusals.into_iter().map(from_control).collect(), looked.memory_bytes))
}

/// An error of a call that does not stream. The refusal travels beside the
/// text, so that programs need not read it.
pub fn status(failure: &Failure) -> ttrpc::Error {
    let mut status = ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, failure.sentence());
    for refusal in &failure.0 {
        // A message made of three strings always has a form.
        let value = to_control(refusal).write_to_bytes().unwrap_or_default();
        let type_url = "transship.control.v1.Refusal".into();
        status.details.push(ttrpc::proto::Any { type_url, value, ..Default::default() });
    }
    ttrpc::Error::RpcStatus(status)
}
