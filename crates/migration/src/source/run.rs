//! One departure, step by step.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{time::timeout, try_join};
use tracing::{error, info, warn};
use transship_api::session::{Abort, Commit, Prepared, shim_message::Message};
use transship_link::Channel;
use transship_rootfs::Totals;
use transship_types::{PageSet, Space};

use super::{
    Debt, Doubt, Progress, Source,
    owing::Session,
    passes::{Passes, check_done},
    record, refusal,
    rounds::Rounds,
    watched::Watched,
};
use crate::{
    DepartError, Journal, Manifest, MigrationError, Options, Phase, Stopwatch,
    bulk::send_images,
    error::chain,
    handoff::{Answer, Ending, Frozen, Guarded, Owing, Paid, guard},
    limits,
    line::{Line, Speech},
    options::MAX_LANES,
    policy::Next,
    report,
};

/// Proof that the target holds the whole container, ready to run.
pub(super) struct Dumped(Guarded);

pub(super) struct Outcome {
    pub ending: Ending,
    pub error: Option<DepartError>,
    pub pid: Option<u32>,
    pub doubt: Option<Doubt>,
}

pub(super) struct Run<'a> {
    speech: Speech,
    pub watch: Stopwatch,
    progress: &'a (dyn Fn(Progress) + Send + Sync),
    options: &'a Options,
    pub layer: Totals,
    pub image_bytes: u64,
    epoch: u64,
    /// Its memory, if that is watched.
    watched: Option<Watched>,
    rounds: Option<Rounds>,
    /// It has been slowed down.
    throttled: bool,
    /// Its pages may follow after it runs on the target.
    late: bool,
    /// Those that do.
    debt: Option<Debt>,
    migration: String,
}

impl<'a> Run<'a> {
    pub fn new(
        channel: Channel,
        manifest: &Manifest,
        options: &'a Options,
        progress: &'a (dyn Fn(Progress) + Send + Sync),
    ) -> Self {
        Self {
            speech: Speech::new(channel),
            watch: Stopwatch::start(Phase::Offer),
            progress,
            options,
            layer: Totals::default(),
            image_bytes: 0,
            epoch: manifest.epoch,
            watched: None,
            rounds: None,
            throttled: false,
            late: false,
            debt: None,
            migration: manifest.migration.clone(),
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.watch.enter(phase);
        info!(%phase, "phase");
        (self.progress)(Progress { phase, bytes: 0, round: None });
    }

    pub async fn until_prepared<S: Source>(
        &mut self,
        source: &mut S,
        manifest: Manifest,
    ) -> Result<Dumped, MigrationError> {
        (self.progress)(Progress { phase: Phase::Offer, bytes: 0, round: None });
        self.offer(source, manifest).await?;

        self.enter(Phase::Prepare);
        let mut passes = Passes::over(source.layer());
        while let Some(bytes) = self.pass(&mut passes).await? {
            if passes.is_enough(bytes) {
                break;
            }
        }

        if self.rounds.is_some() {
            self.enter(Phase::Rounds);
            self.converge(source, &mut passes).await?;
            // At full speed again: what it writes until it stands is little,
            // and tasks that wait for their quota would not stop before they
            // get some.
            self.release(source);
        }

        self.enter(Phase::Freeze);
        self.speech.plain()?.reader.set_deadline(limits::FRAME);
        let begun = Instant::now();
        source.freeze().await?;
        let freeze = begun.elapsed();

        self.enter(Phase::Dump);
        match &mut self.rounds {
            Some(rounds) => {
                rounds.report().pause.freeze = freeze;
                let owed = rounds.finish(source, self.speech.plain()?, self.late).await?;
                if !owed.is_empty() {
                    self.owe(source, owed)?;
                }
            }
            None => source.dump().await?,
        }
        // After the dump and not beside it: CRIU gives names to deleted files
        // that are still linked somewhere, and those belong to the layer too.
        // The images follow at once; the answer is read when they are gone.
        let last_pass = passes.send(self.speech.plain()?, true).await?;
        if let Some((_, totals)) = last_pass {
            self.count(totals);
        }

        self.enter(Phase::Transfer);
        let progress = self.progress;
        let sent = move |bytes| progress(Progress { phase: Phase::Transfer, bytes, round: None });
        let writer = &mut self.speech.plain()?.writer;
        self.image_bytes = send_images(writer, source.images(), &sent).await?;
        if let Some(debt) = &self.debt {
            // The target asks for what it cannot restore without.
            let (memory, requests) = (debt.memory.clone(), debt.requests.clone());
            self.speech.turn(|channel| Line::serving(channel, memory, requests))?;
        }
        if let Some((number, _)) = last_pass {
            check_done(self.hear(limits::FRAME).await?, number)?;
        }

        self.enter(Phase::Restore);
        // While the target restores, so that it costs nothing.
        let (guarded, message) = try_join!(guard(source), self.hear(limits::RESTORE))?;
        match message {
            Message::Prepared(prepared) => self.prepared(&prepared),
            _ => return Err(MigrationError::malformed("no answer to the images")),
        }
        Ok(Dumped(guarded))
    }

    /// Both agree on what travels, and on how.
    async fn offer<S: Source>(
        &mut self,
        source: &mut S,
        mut manifest: Manifest,
    ) -> Result<(), MigrationError> {
        // First of all, because the target's runtime wants to know what this
        // one finds out, and because a dump that cannot start need not travel.
        source.prepare().await?;
        source.complete(&mut manifest)?;
        let lanes = self.options.lanes.min(MAX_LANES);
        let connect = source.connect().filter(|_| lanes > 0);
        if connect.is_some() {
            self.watched = source.memory().map(Watched::new);
        }
        manifest.lanes = if self.watched.is_some() { lanes } else { 0 };
        let offered = manifest.lanes;
        self.speech.say(Message::Manifest(manifest)).await?;
        let lanes = match self.hear(limits::FRAME).await? {
            Message::Waiting(waiting) if waiting.lanes <= offered => waiting.lanes,
            _ => return Err(MigrationError::malformed("no answer to the manifest")),
        };
        if let (Some(watched), Some(connect), 1..) = (&self.watched, connect, lanes) {
            let opened = Rounds::open(watched.clone(), connect, lanes, self.options).await;
            self.rounds = Some(opened?);
        }
        Ok(())
    }

    /// One pass while the container runs; answers the bytes of its content.
    async fn pass(&mut self, passes: &mut Passes) -> Result<Option<u64>, MigrationError> {
        let Some((number, totals)) = passes.send(self.speech.plain()?, false).await? else {
            return Ok(None);
        };
        self.count(totals);
        // The target writes the pass to its disk before it answers.
        check_done(self.hear(limits::PASS).await?, number)?;
        Ok(Some(totals.bytes))
    }

    /// Rounds, until a freeze now would be short.
    async fn converge<S: Source>(
        &mut self,
        source: &mut S,
        passes: &mut Passes,
    ) -> Result<(), MigrationError> {
        let mut first = true;
        loop {
            let Some(rounds) = &mut self.rounds else { return Ok(()) };
            if !rounds.are_possible() {
                self.late = rounds.may_owe();
                return Ok(());
            }
            rounds.one(self.speech.plain()?, self.progress).await?;
            let long = rounds.last_took() >= limits::LONG_ROUND;
            if std::mem::take(&mut first) && long && self.pass(passes).await?.is_some() {
                // What was written meanwhile is for a round and not for the pause.
                continue;
            }
            let Some(rounds) = &mut self.rounds else { return Ok(()) };
            loop {
                match rounds.decide() {
                    Next::Another => break,
                    Next::Freeze => return Ok(()),
                    Next::Throttle(percent) => {
                        // Also if it fails: it may have failed half-way.
                        self.throttled = true;
                        match source.throttle(Some(percent)) {
                            Ok(()) => {
                                info!(percent, "slowed down");
                                rounds.throttled(percent);
                                break;
                            }
                            Err(error) => {
                                warn!(error = chain(&error), "it cannot be slowed down");
                                rounds.cannot_throttle();
                            }
                        }
                    }
                    Next::PostCopy => {
                        self.late = rounds.may_owe();
                        return Ok(());
                    }
                    Next::GiveUp { reason, remedy } => {
                        return Err(MigrationError::GivenUp { reason, remedy });
                    }
                }
            }
        }
    }

    /// It has all the processor time again that it had before.
    pub fn release<S: Source>(&mut self, source: &mut S) {
        if std::mem::take(&mut self.throttled)
            && let Err(error) = source.throttle(None)
        {
            error!(error = chain(&error), "the container is still slowed down");
        }
    }

    /// These pages follow after it runs on the target.
    fn owe<S: Source>(
        &mut self,
        source: &mut S,
        owed: Vec<(Space, PageSet)>,
    ) -> Result<(), MigrationError> {
        let (Some(rounds), Some(watched)) = (&self.rounds, &self.watched) else { return Ok(()) };
        let nowhere = || MigrationError::runtime("post-copy", "there is no way to connect again");
        self.debt = Some(Debt {
            memory: watched.memory().clone(),
            connect: source.connect().ok_or_else(nowhere)?,
            lanes: rounds.lanes(),
            compress: self.options.compress,
            limit: self.options.limit.clone(),
            migration: self.migration.clone(),
            epoch: self.epoch,
            round: rounds.last_number() + 1,
            owed,
            requests: Arc::default(),
            figures: report::PostCopy::default(),
        });
        Ok(())
    }

    fn prepared(&mut self, prepared: &Prepared) {
        let Some(rounds) = &mut self.rounds else { return };
        let time = |phase| {
            let times = self.watch.times();
            times.iter().find(|(at, _)| *at == phase).map_or(Duration::ZERO, |(_, time)| *time)
        };
        let report = rounds.report();
        report.pause.transfer = time(Phase::Transfer);
        report.pause.restore = Duration::from_micros(prepared.restore_us);
        report.criu_pages = prepared.criu_pages;
        report.shared_bytes = prepared.shared_bytes;
        report.given_bytes = prepared.given_bytes;
        report.lazy = prepared.lazy;
    }

    /// The point of no return: journal first, then the word.
    pub async fn commit<S: Source>(
        &mut self,
        dumped: Dumped,
        frozen: Frozen<'_, S>,
        mut journal: Journal,
    ) -> Outcome {
        self.enter(Phase::Commit);
        let proof = match journal.commit() {
            Ok(proof) => proof,
            // Maybe on disk, surely not sent: it stays, and the journal says so.
            Err(error) => return self.stay_home(frozen, journal, error).await,
        };
        let promised = frozen.promise(proof, dumped.0);
        let (answer, pid, reason) = self.ask().await;
        let mut phase = Phase::Commit;
        let (ending, settled) = match self.debt.take() {
            Some(debt) if answer == Answer::Accepted => {
                phase = Phase::PostCopy;
                self.enter(phase);
                self.pay(promised.owe(), debt).await
            }
            debt => {
                self.debt = debt;
                self.enter(Phase::Depart);
                promised.settle(answer).await
            }
        };
        let doubt = match ending {
            Ending::InDoubt => Some(Doubt { journal, debt: self.debt.take() }),
            Ending::Departed | Ending::StayedHome => {
                record(journal, ending);
                None
            }
        };
        let failed = settled.err().or(reason);
        if let Some(failed) = &failed {
            error!(error = chain(failed), ending = ending.as_str(), "after the commit");
        }
        Outcome { ending, pid, error: failed.map(|error| error.during(phase)), doubt }
    }

    /// It runs there: what it lacks follows.
    async fn pay<S: Source>(
        &mut self,
        owing: Owing<'_, S>,
        mut debt: Debt,
    ) -> (Ending, Result<(), MigrationError>) {
        let line = match std::mem::replace(&mut self.speech, Speech::Over) {
            Speech::Line(line) => Some(line),
            _ => None,
        };
        let pages = self.rounds.as_mut().and_then(Rounds::take_pages);
        let first = line.zip(pages).map(|(line, pages)| Session { line, pages });
        let progress = self.progress;
        let sent = move |bytes| progress(Progress { phase: Phase::PostCopy, bytes, round: None });
        let paid = debt.pay(first, &sent).await;
        if let Some(rounds) = &mut self.rounds {
            rounds.report().post_copy = Some(debt.figures());
        }
        match paid {
            Ok(line) => {
                self.speech = Speech::Line(line);
                self.enter(Phase::Depart);
                owing.paid(Paid::heard()).await
            }
            Err(error) => {
                self.debt = Some(debt);
                (owing.in_doubt(), Err(error))
            }
        }
    }

    /// Sends the commit and reads the answer. Only the target's own word
    /// proves anything; everything else is silence.
    async fn ask(&mut self) -> (Answer, Option<u32>, Option<MigrationError>) {
        let commit = Message::Commit(Commit { epoch: self.epoch });
        let answer = async {
            self.speech.say(commit).await?;
            self.speech.hear(limits::COMMIT).await
        };
        match timeout(limits::COMMIT, answer).await {
            Ok(Ok(Message::Running(running))) => {
                if let Some(rounds) = &mut self.rounds {
                    rounds.report().pause.resume = Duration::from_micros(running.resume_us);
                }
                (Answer::Accepted, Some(running.pid), None)
            }
            Ok(Ok(Message::Refused(refused))) => (Answer::Refused, None, Some(refusal(&refused))),
            Ok(Ok(_)) => {
                let text = "an answer to the commit that is none";
                (Answer::Silence, None, Some(MigrationError::malformed(text)))
            }
            Ok(Err(error)) => (Answer::Silence, None, Some(error)),
            Err(_) => {
                let seconds = limits::COMMIT.as_secs();
                let error = MigrationError::Timeout { what: "the answer to the commit", seconds };
                (Answer::Silence, None, Some(error))
            }
        }
    }

    pub async fn stay_home<S: Source>(
        &mut self,
        frozen: Frozen<'_, S>,
        journal: Journal,
        reason: MigrationError,
    ) -> Outcome {
        let failed = reason.during(self.watch.phase());
        warn!(error = chain(&failed), "staying home");
        if let Err(error) = frozen.stay_home().await {
            error!(error = chain(&error), "the container could not be thawed");
        }
        // The target sees the link close in any case; this only tells it why.
        let abort = Abort { reason: failed.to_string() };
        let told = self.speech.say(Message::Abort(abort));
        let _ = timeout(Duration::from_secs(1), told).await;
        record(journal, Ending::StayedHome);
        Outcome { ending: Ending::StayedHome, error: Some(failed), pid: None, doubt: None }
    }

    /// What remains when the ending is certain, and nobody waits any more:
    /// the figures of the memory, and that nothing of it is watched.
    pub async fn after(&mut self, ending: Ending, owes: bool) -> Option<report::Memory> {
        let report = match self.rounds.take() {
            Some(mut rounds) => {
                if ending == Ending::Departed && rounds.report().lazy {
                    self.enter(Phase::Fill);
                    rounds.report().fill = self.filled().await;
                }
                Some(rounds.close().await)
            }
            None => None,
        };
        // In doubt it stands still, and may yet run here; or its memory is read
        // once more.
        let needed = ending == Ending::Departed || owes;
        if let Some(watched) = self.watched.take()
            && !needed
        {
            watched.disarm().await;
        }
        report
    }

    /// The target's word that every page is in its place.
    async fn filled(&mut self) -> Option<report::Fill> {
        match self.speech.hear(limits::FILLED).await {
            Ok(Message::Filled(filled)) => Some(report::Fill {
                faults: filled.faults,
                fault_latency: filled.fault_latency,
                pages: filled.pages,
                duration: Duration::from_micros(filled.duration_us),
            }),
            other => {
                warn!(?other, "the target did not say how its memory was put in place");
                None
            }
        }
    }

    fn count(&mut self, totals: Totals) {
        self.layer.entries += totals.entries;
        self.layer.bytes += totals.bytes;
        let bytes = self.layer.bytes;
        (self.progress)(Progress { phase: self.watch.phase(), bytes, round: None });
    }

    /// The next message; a refusal is an error of its own.
    async fn hear(&mut self, within: Duration) -> Result<Message, MigrationError> {
        match self.speech.hear(within).await? {
            Message::Refused(refused) => Err(refusal(&refused)),
            message => Ok(message),
        }
    }
}
