//! Memory on its way, seen from the source: rounds while the container runs,
//! and what is left within the pause.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    time::{MissedTickBehavior, interval_at, timeout},
    try_join,
};
use tracing::{info, warn};
use transship_api::session::{Alive, RoundEnd, shim_message::Message};
use transship_link::Channel;
use transship_memory::{Backend, Dirty, Last, Memory};
use transship_types::{PAGE, PageSet, Space};

use super::{Connect, Progress, RoundProgress, Source, refusal, watched::Watched};
use crate::{
    Budget, MigrationError, Options, Phase, Throttle,
    bulk::{hear, say},
    limits,
    options::PostCopy,
    pages::{PageSender, RoundTotals},
    policy::{self, Next, RoundFigures},
    present, report,
};

type Hear<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// Everything about the memory of one departure.
pub(super) struct Rounds {
    watched: Watched,
    /// Gone once others send with it.
    pages: Option<PageSender>,
    budget: Budget,
    figures: Vec<RoundFigures>,
    throttle: u32,
    /// Of the rounds so far.
    sent: u64,
    report: report::Memory,
}

impl Rounds {
    /// Connects the lanes, on which the target waits.
    pub async fn open(
        watched: Watched,
        connect: Connect,
        lanes: u32,
        options: &Options,
    ) -> Result<Self, MigrationError> {
        let limit = options.limit.clone();
        let opening = PageSender::open(connect, lanes, options.compress, limit);
        let opened = timeout(limits::LANE, opening).await;
        let pages = opened.map_err(|_| MigrationError::Timeout {
            what: "connecting the lanes",
            seconds: limits::LANE.as_secs(),
        })??;
        let report = report::Memory::new(watched.memory().backend(), lanes);
        let (pages, budget) = (Some(pages), options.budget.clone());
        Ok(Self { watched, pages, budget, figures: Vec::new(), throttle: 0, sent: 0, report })
    }

    pub fn report(&mut self) -> &mut report::Memory {
        &mut self.report
    }

    /// Whether rounds make sense: without knowing what was written meanwhile,
    /// every one of them would send everything.
    pub fn are_possible(&self) -> bool {
        self.watched.memory().backend() != Backend::None
    }

    /// One round, from its scan until the target has it.
    pub async fn one(
        &mut self,
        channel: &mut Channel,
        hear_of_it: Hear<'_>,
    ) -> Result<(), MigrationError> {
        let number = self.figures.len() as u32 + 1;
        let begun = Instant::now();
        let dirty = self.watched.ask(|memory| memory.round()).await?;
        let scan = begun.elapsed();
        let expected_downtime = policy::expected_pause(&self.figures, &self.budget);
        let rate = (policy::page_rate(&self.figures) * PAGE as f64) as u64;
        let dirty_bytes = dirty.pages() * PAGE;
        let (sent, known) = (self.sent, !self.figures.is_empty());
        let told = |bytes| {
            let round = RoundProgress {
                number,
                dirty_bytes,
                rate,
                expected_downtime: if known { expected_downtime } else { Duration::ZERO },
            };
            let bytes = sent + bytes;
            hear_of_it(Progress { phase: Phase::Rounds, bytes, round: Some(round) });
        };
        let totals = self.send(channel, &dirty, number, &told).await?;
        let end = RoundEnd { number, batches: totals.batches, last: false };
        say(&mut channel.writer, Message::RoundEnd(end)).await?;
        channel.reader.set_deadline(limits::ROUND);
        match answer(channel).await? {
            Message::RoundDone(done) if done.number == number => {}
            _ => return Err(MigrationError::malformed(format!("no answer to round {number}"))),
        }
        let duration = begun.elapsed();
        let left = self.watched.ask(|memory| memory.peek()).await?;
        self.sent += dirty_bytes;
        let figures =
            RoundFigures { pages: dirty.pages(), left, scan, duration, throttle: self.throttle };
        info!(
            round = number,
            pages = figures.pages,
            left,
            duration_ms = duration.as_millis() as u64,
            "round sent"
        );
        self.figures.push(figures);
        let dirty_pages = dirty.pages();
        let round = report::Round { number, dirty_pages, scan, duration, ..Default::default() };
        self.report.add(round, &totals);
        if self.throttle == 0 {
            self.report.dirty_pages_rate = policy::dirty_rate(&figures) as u64;
        }
        Ok(())
    }

    /// How long the last round took.
    pub fn last_took(&self) -> Duration {
        self.figures.last().map_or(Duration::ZERO, |round| round.duration)
    }

    /// What the rounds so far lead to.
    pub fn decide(&mut self) -> Next {
        let next = policy::decide(&self.figures, &self.budget);
        if next == Next::Freeze {
            let expected = policy::expected_pause(&self.figures, &self.budget);
            self.report.expected_downtime = expected;
        }
        next
    }

    /// The container has been slowed down since the last round.
    pub fn throttled(&mut self, percent: u32) {
        self.throttle = percent;
        self.report.cpu_throttle_percentage = percent;
    }

    pub fn cannot_throttle(&mut self) {
        self.budget.throttle = Throttle::Never;
    }

    /// Pages may follow later, and nothing else makes the pause short enough.
    /// Without knowing what was written that is always so.
    pub fn may_owe(&mut self) -> bool {
        self.report.expected_downtime = self.budget.fixed;
        self.budget.post_copy != PostCopy::Never
    }

    /// The number of the round within the pause.
    pub fn last_number(&self) -> u32 {
        self.figures.len() as u32 + 1
    }

    pub fn lanes(&self) -> u32 {
        self.report.lanes
    }

    /// For whoever sends what is owed.
    pub fn take_pages(&mut self) -> Option<PageSender> {
        self.pages.take()
    }

    /// Within the pause: what was written since the last round, and which
    /// pages there are, while CRIU writes its images. Answers the pages that
    /// it owes: all of processes, if they may be `late`, and else none.
    ///
    /// The last scan comes before CRIU does anything in the tasks: it runs
    /// code of its own in them, for which it changes their text for a moment.
    pub async fn finish<S: Source>(
        &mut self,
        source: &mut S,
        channel: &mut Channel,
        late: bool,
    ) -> Result<Vec<(Space, PageSet)>, MigrationError> {
        let begun = Instant::now();
        let (why_not, mut last) =
            try_join!(source.hide(), self.watched.ask(|memory| memory.last()))?;
        let found = begun.elapsed();
        let number = self.last_number();
        if let Some(reason) = why_not {
            // CRIU saves them all: whatever was sent before is of no use.
            warn!(reason, "CRIU saves the pages itself");
            self.report.fallback = Some(reason);
            let nothing = async {
                say_present(channel, &Last::default(), &[]).await?;
                say_last_round(channel, number, 0).await
            };
            let ((dump, ()), ()) = try_join!(timed(source.dump()), nothing)?;
            self.report.pause.dump = dump;
            return Ok(Vec::new());
        }
        self.report.page_less = true;
        let owed = if late { owe(&mut last) } else { Vec::new() };
        let memory = self.watched.memory().clone();
        let pages = sender(&self.pages)?;
        let sending = async {
            let begun = Instant::now();
            let all = pages.send(memory, &last.dirty, number, &|_| {});
            let totals = match try_join!(all, say_present(channel, &last, &owed)) {
                Ok((totals, ())) => totals,
                Err(error) => return Err(reason(channel, error).await),
            };
            say_last_round(channel, number, totals.batches).await?;
            Ok((totals, begun.elapsed()))
        };
        let ((dump, ()), (totals, send)) = try_join!(timed(source.dump()), sending)?;
        let pause = &mut self.report.pause;
        (pause.final_scan, pause.final_send, pause.dump) = (found, send, dump);
        let (dirty_pages, scan, duration) = (last.dirty.pages(), last.scan, found + send);
        let round = report::Round { number, dirty_pages, scan, duration, ..Default::default() };
        self.report.add(round, &totals);
        self.report.total = last.present.iter().map(|(_, pages)| pages.pages() * PAGE).sum();
        Ok(owed)
    }

    /// Ends the lanes; nothing more will be sent.
    pub async fn close(self) -> report::Memory {
        if let Some(pages) = self.pages {
            pages.close().await;
        }
        self.report
    }

    /// Sends pages, and meanwhile tells the target that this goes on, and
    /// listens whether it refuses.
    async fn send(
        &self,
        channel: &mut Channel,
        dirty: &Dirty,
        number: u32,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<RoundTotals, MigrationError> {
        let memory: Arc<dyn Memory> = self.watched.memory().clone();
        let pages = sender(&self.pages)?;
        let mut sending = std::pin::pin!(pages.send(memory, dirty, number, told));
        let mut signs = interval_at(tokio::time::Instant::now() + limits::ALIVE, limits::ALIVE);
        signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The lanes notice themselves if the target stops reading.
        channel.reader.clear_deadline();
        let sent = loop {
            tokio::select! {
                sent = &mut sending => break sent,
                message = answer(channel) => {
                    message?;
                    return Err(MigrationError::malformed("a word in the middle of a round"));
                }
                _ = signs.tick() => {}
            }
            say(&mut channel.writer, Message::Alive(Alive {})).await?;
        };
        match sent {
            Ok(totals) => Ok(totals),
            Err(error) => Err(reason(channel, error).await),
        }
    }
}

/// Why the lanes broke: a target that refuses closes them first, and says why
/// on the first connection.
async fn reason(channel: &mut Channel, error: MigrationError) -> MigrationError {
    match timeout(limits::REASON, answer(channel)).await {
        Ok(Err(refused @ MigrationError::Peer(_))) => refused,
        _ => error,
    }
}

async fn answer(channel: &mut Channel) -> Result<Message, MigrationError> {
    match hear(&mut channel.reader).await? {
        Message::Refused(refused) => Err(refusal(&refused)),
        message => Ok(message),
    }
}

async fn say_present(
    channel: &mut Channel,
    last: &Last,
    owed: &[(Space, PageSet)],
) -> Result<(), MigrationError> {
    for message in present::messages(&last.present) {
        say(&mut channel.writer, Message::Present(message)).await?;
    }
    if !owed.is_empty() {
        for message in present::messages(owed) {
            say(&mut channel.writer, Message::Owed(message)).await?;
        }
    }
    Ok(())
}

/// Takes out what can follow after the container runs: CRIU restores shared
/// objects whole, and needs theirs before.
fn owe(last: &mut Last) -> Vec<(Space, PageSet)> {
    let dirty = std::mem::take(&mut last.dirty.spaces);
    let (private, shared) = dirty.into_iter().partition(|(space, _)| match space {
        Space::Process(_) => true,
        Space::Shared(_) => false,
    });
    last.dirty.spaces = shared;
    let present = |space: Space, pages: PageSet| {
        let of = last.present.iter().find(|(present, _)| *present == space);
        of.map_or_else(PageSet::new, |(_, present)| pages.intersection(present))
    };
    let private: Vec<_> = private;
    let owed = private.into_iter().map(|(space, pages)| (space, present(space, pages)));
    owed.filter(|(_, pages)| !pages.is_empty()).collect()
}

fn sender(pages: &Option<PageSender>) -> Result<&PageSender, MigrationError> {
    pages.as_ref().ok_or_else(|| MigrationError::runtime("sending pages", "the lanes have ended"))
}

async fn say_last_round(
    channel: &mut Channel,
    number: u32,
    batches: u64,
) -> Result<(), MigrationError> {
    let end = RoundEnd { number, batches, last: true };
    say(&mut channel.writer, Message::RoundEnd(end)).await
}

async fn timed<T>(
    work: impl Future<Output = Result<T, MigrationError>>,
) -> Result<(Duration, T), MigrationError> {
    let begun = Instant::now();
    let done = work.await?;
    Ok((begun.elapsed(), done))
}
