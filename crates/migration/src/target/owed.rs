//! Post-copy, seen from the target: the container runs here, and some of its
//! pages are still at the source.
//!
//! Whoever touches such a page waits, however long that takes. When the link
//! breaks, the source connects again under the same ticket, hears what is
//! lacking, and goes on.

use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};
use transship_api::session::{Lost, Paid, shim_message::Message};
use transship_link::Channel;

use super::{Filled, NextConnection};
use crate::{
    Journal, MigrationError,
    bulk::{hear, say},
    error::chain,
    journal::State,
    limits,
    line::{Debt, Line},
    options::MAX_LANES,
    pages::PageReceiver,
    present,
};

/// What the target holds of a container whose pages it lacks.
pub(super) struct Owed {
    pub debt: Arc<Debt>,
    /// Of the connection on which they come, if it still stands.
    pub receiver: Option<PageReceiver>,
    pub next: NextConnection,
    pub migration: String,
    pub epoch: u64,
}

/// How it ended that pages were owed.
pub(super) enum End {
    /// Every page is here.
    Paid,
    /// Nobody here waits for any more.
    Filled(Filled),
}

impl Owed {
    /// Waits for all pages, over as many connections as that takes, and
    /// answers the last of these if it still stands. `filling` ends early if
    /// nobody is left who would need them.
    pub async fn collect(
        &mut self,
        first: Option<Line>,
        filling: &mut BoxFuture<'static, Filled>,
    ) -> (End, Option<Line>) {
        let mut line = first;
        loop {
            if let (Some(line), Some(receiver)) = (&mut line, &self.receiver) {
                let all = all_of_it(line, receiver, &self.debt);
                tokio::select! {
                    biased;
                    filled = &mut *filling => return (End::Filled(filled), Some(self.take(line))),
                    came = all => match came {
                        Ok(()) => return (End::Paid, Some(self.take(line))),
                        Err(error) => {
                            warn!(error = chain(&error), "pages are lacking, and the link is lost");
                        }
                    },
                }
            }
            // Whatever is left of the connection is cut.
            self.receiver = None;
            drop(line.take());
            tokio::select! {
                biased;
                filled = &mut *filling => return (End::Filled(filled), None),
                (again, receiver) = self.reconnected() => {
                    (line, self.receiver) = (Some(again), Some(receiver));
                }
            }
        }
    }

    /// Once it is over: tells the source, which may have to come back for it,
    /// until it has heard. If it does not hear, its agent asks.
    pub async fn tell(&self, line: Option<Line>, word: Option<Message>) -> Option<Line> {
        let word = word?;
        let mut line = line;
        loop {
            let mut to = match line.take() {
                Some(line) => line,
                None => self.reconnected().await.0,
            };
            match heard(&mut to, word.clone()).await {
                Ok(()) => return Some(to),
                Err(error) => {
                    warn!(error = chain(&error), "the source was not told how it ended");
                    sleep(limits::AGAIN).await;
                }
            }
        }
    }

    /// The source is back, sooner or later.
    async fn reconnected(&self) -> (Line, PageReceiver) {
        loop {
            match self.connected().await {
                Ok(again) => {
                    info!("the source is back");
                    return again;
                }
                Err(error) => {
                    warn!(error = chain(&error), "waiting for the source to come back");
                    sleep(limits::AGAIN).await;
                }
            }
        }
    }

    fn take(&self, line: &mut Line) -> Line {
        std::mem::replace(line, Line::closed())
    }

    /// The source's next attempt.
    async fn connected(&self) -> Result<(Line, PageReceiver), MigrationError> {
        let connecting = (self.next)().await?;
        let mut channel: Channel = connecting.await?;
        channel.writer.set_deadline(limits::TAKEN);
        channel.reader.set_control_limit(limits::MESSAGE);
        channel.reader.set_deadline(limits::FRAME);
        let resume = match hear(&mut channel.reader).await? {
            Message::Resume(resume) => resume,
            _ => return Err(MigrationError::malformed("a connection that resumes nothing")),
        };
        if resume.migration != self.migration || resume.epoch != self.epoch {
            return Err(MigrationError::malformed("another migration under this ticket"));
        }
        if !(1..=MAX_LANES).contains(&resume.lanes) {
            let what = format!("{} lanes to resume with", resume.lanes);
            return Err(MigrationError::malformed(what));
        }
        for message in present::messages(&self.debt.sets()) {
            say(&mut channel.writer, Message::Lacking(message)).await?;
        }
        let receiver = PageReceiver::new(self.debt.clone());
        for _ in 0..resume.lanes {
            let lane = timeout(limits::LANE, (self.next)()).await;
            let lane = lane.map_err(|_| MigrationError::Timeout {
                what: "a lane of the source",
                seconds: limits::LANE.as_secs(),
            })??;
            receiver.add(lane)?;
        }
        Ok((Line::asking(channel, self.debt.clone()), receiver))
    }
}

/// Says it, and waits for the answer to what has one.
async fn heard(line: &mut Line, word: Message) -> Result<(), MigrationError> {
    let answered = matches!(word, Message::Paid(_));
    line.say(word).await?;
    if !answered {
        return Ok(());
    }
    loop {
        match line.hear().await? {
            Message::Paid(_) => return Ok(()),
            // Of a round that nobody waits for any more.
            Message::RoundEnd(_) => {}
            _ => return Err(MigrationError::malformed("no answer to the end of a debt")),
        }
    }
}

/// Until the source's round of them is complete.
async fn all_of_it(
    line: &mut Line,
    receiver: &PageReceiver,
    debt: &Debt,
) -> Result<(), MigrationError> {
    let word = tokio::select! {
        word = line.hear() => word?,
        failure = receiver.failure() => return Err(failure),
    };
    let end = match word {
        Message::RoundEnd(end) if end.last => end,
        _ => return Err(MigrationError::malformed("a word where pages are owed")),
    };
    receiver.complete(end.number, end.batches).await?;
    match debt.is_paid() {
        true => Ok(()),
        false => Err(MigrationError::malformed("a last round without all pages that are owed")),
    }
}

impl End {
    /// What the source is to be told, once it is on disk.
    pub fn word(&self, journal: &mut Journal) -> Option<Message> {
        if let End::Filled(Filled::Failed(reason)) = self {
            return Some(Message::Lost(Lost { reason: reason.clone() }));
        }
        match journal.record(State::Released) {
            Ok(()) => Some(Message::Paid(Paid {})),
            // It will ask, hear that pages may be lacking, and connect in
            // vain: in doubt for want of a disk.
            Err(error) => {
                error!(error = chain(&error), "that all pages are here was not recorded");
                None
            }
        }
    }
}
