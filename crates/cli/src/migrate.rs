//! `transship migrate`: move one container, and tell how it went.

use std::{future::pending, time::Duration};

use clap::Args;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep_until, timeout},
};
use transship_api::{
    control::{CancelRequest, Failed, MigrateEvent, MigrateRequest, migrate_event::Event},
    control_ttrpc::AgentClient,
};

use crate::{
    Common, Output, client,
    error::{Failure, Reason},
    print,
    progress::Bar,
    report,
    tuning::Tuning,
};

/// For an agent that has said everything to close the stream.
const GOODBYE: Duration = Duration::from_secs(1);

const EXAMPLES: &str = "\
Examples:
  transship migrate redis --to node-b
  transship migrate -n k8s.io 3f2a… --to node-b --output json
  transship migrate redis --to node-b@10.0.0.2:7430 --timeout 120
  transship migrate redis --to node-b --max-pause 50ms --bandwidth 1Gbit/s

The container keeps running here unless it runs there. Ctrl-C cancels and
waits for the outcome, a second Ctrl-C does not wait; after the commit it is
too late and the migration completes.";

/// Move a running container to another node.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Migrate {
    /// The container's id.
    pub container: String,
    /// A node of transshipd's configuration, or NODE@HOST:PORT.
    #[arg(long, value_name = "NODE")]
    pub to: String,
    /// containerd's namespace.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Leave the stopped container and its record here.
    #[arg(long)]
    pub keep: bool,
    /// Cancel if it has not ended after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    #[command(flatten)]
    pub tuning: Tuning,
}

impl Migrate {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = format!("{}/{} was not moved to {}", self.namespace, self.container, self.to);
        let mut wishes = Wishes::new(self.timeout)
            .map_err(|e| Failure::new(&what, vec![internal(&format!("signals: {e}"))]))?;
        let client = client::connect(common, &what).await?;
        let request = MigrateRequest {
            namespace: self.namespace,
            container: self.container,
            node: self.to,
            keep: self.keep,
            tuning: Some(self.tuning.message()).into(),
            ..Default::default()
        };
        let mut events = client
            .migrate(client::patient(), &request)
            .await
            .map_err(|e| Failure::from_call(&what, &e))?;
        let mut bar = Bar::new(common.output);
        let mut migration = None;
        let outcome = loop {
            let event = tokio::select! {
                event = events.recv() => event,
                wish = wishes.next() => {
                    bar.say(wish);
                    if wishes.made > 1 {
                        break Err(left(&what, migration.as_deref()));
                    }
                    cancel(&client, migration.as_deref(), &bar);
                    continue;
                }
            };
            match event {
                Ok(Some(MigrateEvent { event: Some(event), .. })) => match event {
                    Event::Started(started) => {
                        migration = Some(started.migration);
                        // Wished for before there was something to cancel.
                        if wishes.made > 0 {
                            cancel(&client, migration.as_deref(), &bar);
                        }
                    }
                    Event::Progress(progress) => bar.show(&progress),
                    Event::Report(report) => break Ok(report),
                    Event::Failed(failed) => break Err(refused(&what, failed)),
                    _ => {}
                },
                Ok(Some(_)) => {}
                Ok(None) => {
                    break Err(Failure::new(
                        &what,
                        vec![internal("transshipd ended it without an outcome")],
                    ));
                }
                Err(error) => break Err(Failure::from_call(&what, &error)),
            }
        };
        bar.clear();
        // The stream ends after the outcome; leaving before that would show
        // in the agent's log as a connection that broke.
        if wishes.made < 2 {
            let _ = timeout(GOODBYE, events.recv()).await;
        }
        let done = outcome?;
        match common.output {
            Output::Json => print::json(&report::as_json(&done)),
            Output::Text => report::text(&done).iter().for_each(|line| print::line(line)),
        }
        Ok(())
    }
}

/// `timeout` and shells signal a program and its group, so that one wish may
/// come twice; people need longer for a second one.
const ONE_WISH: Duration = Duration::from_millis(400);

/// Reasons to stop: a signal, or the clock.
struct Wishes {
    interrupt: Signal,
    terminate: Signal,
    deadline: Option<Instant>,
    last: Option<Instant>,
    made: u32,
}

impl Wishes {
    fn new(timeout: Option<u64>) -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            deadline: timeout.map(|s| Instant::now() + Duration::from_secs(s)),
            last: None,
            made: 0,
        })
    }

    async fn next(&mut self) -> &'static str {
        let deadline = self.deadline;
        let clock = async move {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.signalled() => {}
            () = clock => {
                self.deadline = None;
                // The clock alone never stops the waiting.
                self.made = 1;
                return "the time is up; cancelling";
            }
        }
        self.made += 1;
        match self.made {
            1 => "cancelling; waiting for the outcome (again: do not wait)",
            _ => "not waiting",
        }
    }

    async fn signalled(&mut self) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
            }
            let now = Instant::now();
            let echo = self.last.is_some_and(|last| now - last < ONE_WISH);
            self.last = Some(now);
            if !echo {
                return;
            }
        }
    }
}

/// Asked beside the stream, which brings the outcome.
fn cancel(client: &AgentClient, migration: Option<&str>, bar: &Bar) {
    let Some(migration) = migration else { return };
    let request = CancelRequest { migration: migration.into(), ..Default::default() };
    let client = client.clone();
    bar.say("the container stays here unless it has been committed");
    tokio::spawn(async move {
        // An answer that is lost changes nothing: the stream tells the end.
        let _ = client.cancel(client::patient(), &request).await;
    });
}

fn left(what: &str, migration: Option<&str>) -> Failure {
    let see = migration
        .map_or("see `transship status`".into(), |m| format!("see `transship status {m}`"));
    let reason = "it was cancelled, and its outcome was not waited for".into();
    Failure::new(what, vec![Reason { code: "cancelled".into(), reason, remedy: see }])
}

fn refused(what: &str, failed: Failed) -> Failure {
    let what = match failed.ending.as_str() {
        "departed" => what.replace("was not moved", "may not have arrived"),
        "in-doubt" => what.replace("was not moved", "is in doubt on its way"),
        _ => what.into(),
    };
    let reasons = failed.refusals.into_iter().map(Reason::from).collect();
    let report = failed.report.into_option().map(Box::new);
    Failure {
        outcome: failed.outcome,
        ending: failed.ending,
        report,
        ..Failure::new(what, reasons)
    }
}

fn internal(reason: &str) -> Reason {
    Reason { code: "internal".into(), reason: reason.into(), remedy: "see transshipd's log".into() }
}
