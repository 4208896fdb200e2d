//! Post-copy, seen from the source: the container runs on the target, and
//! some of its pages are still here.
//!
//! Its tasks here stay frozen, and their memory is read from them, until the
//! target says that it has every page. A link that breaks meanwhile costs
//! time and nothing else: the container waits at the pages it lacks, and this
//! side connects again under the same ticket.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};
use transship_api::session::{Paid, Resume, RoundEnd, shim_message::Message};
use transship_memory::{Dirty, Memory};
use transship_types::{PageSet, Space};

use super::Connect;
use crate::{
    Compress, MigrationError,
    bulk::{hear, say},
    error::chain,
    limits,
    line::{Line, Requests},
    pages::{PageSender, RateLimit},
    present::Presence,
    report,
};

/// Pages of a container that runs on the target, which only this node has.
pub struct Debt {
    pub(super) memory: Arc<dyn Memory>,
    pub(super) connect: Connect,
    pub(super) lanes: u32,
    pub(super) compress: Compress,
    pub(super) limit: Arc<RateLimit>,
    pub(super) migration: String,
    pub(super) epoch: u64,
    /// All that were owed at the freeze.
    pub(super) owed: Vec<(Space, PageSet)>,
    /// The number of the round in which they go.
    pub(super) round: u32,
    pub(super) requests: Arc<Requests>,
    pub(super) figures: report::PostCopy,
}

/// A connection on which pages are paid, with its lanes.
pub(super) struct Session {
    pub line: Line,
    pub pages: PageSender,
}

/// Why a session ended without all pages.
enum Broken {
    /// Another connection may do better.
    Link(MigrationError),
    /// None would.
    ForGood(MigrationError),
}

impl Debt {
    /// Returns once the target has every page, and has recorded so. An error
    /// leaves everything as it is: the target may ask again.
    pub(super) async fn pay(
        &mut self,
        first: Option<Session>,
        sent: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Line, MigrationError> {
        let begun = Instant::now();
        let total = self.owed.iter().map(|(_, pages)| pages.pages()).sum::<u64>();
        self.figures.pages = total;
        let mut session = first.map(|session| (session, self.owed.clone()));
        let mut silent_since = Instant::now();
        let paid = loop {
            let (session, owed) = match session.take() {
                Some(session) => session,
                None => match self.connect_again().await {
                    Ok(session) => {
                        info!("connected again: the rest of the pages follows");
                        self.figures.recoveries += 1;
                        session
                    }
                    Err(Broken::ForGood(error)) => break Err(error),
                    Err(Broken::Link(error)) if silent_since.elapsed() > limits::OWED => {
                        break Err(error);
                    }
                    Err(Broken::Link(error)) => {
                        warn!(error = chain(&error), "the target is not reached; trying again");
                        // Whoever watches sees that this goes on.
                        sent(0);
                        sleep(limits::AGAIN).await;
                        continue;
                    }
                },
            };
            match self.session(session, owed, sent).await {
                Ok(line) => {
                    // So that it need not wait for us any longer. It may be
                    // gone already, which is all the same now.
                    let _ = line.say(Message::Paid(Paid {})).await;
                    break Ok(line);
                }
                Err(Broken::ForGood(error)) => break Err(error),
                Err(Broken::Link(error)) => {
                    warn!(error = chain(&error), "the link broke while pages were owed");
                    silent_since = Instant::now();
                }
            }
        };
        self.figures.requests = self.requests.requests.load(Ordering::Relaxed);
        self.figures.request_bytes = self.requests.bytes.load(Ordering::Relaxed);
        self.figures.duration += begun.elapsed();
        paid
    }

    pub(super) fn figures(&self) -> report::PostCopy {
        self.figures
    }

    async fn session(
        &self,
        Session { mut line, pages }: Session,
        owed: Vec<(Space, PageSet)>,
        sent: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Line, Broken> {
        let dirty = Dirty { spaces: owed };
        {
            let mut sending = pin!(pages.send(self.memory.clone(), &dirty, self.round, sent));
            let totals = tokio::select! {
                totals = &mut sending => totals.map_err(Broken::Link)?,
                // All there are needed already, or nobody needs them.
                word = line.hear() => return ended(word).map(|()| line),
            };
            if totals.gone_pages > 0 {
                let what = format!("{} pages cannot be read any more", totals.gone_pages);
                return Err(Broken::ForGood(MigrationError::runtime("post-copy", what)));
            }
            let end = RoundEnd { number: self.round, batches: totals.batches, last: true };
            line.say(Message::RoundEnd(end)).await.map_err(Broken::Link)?;
        }
        let word = line.hear().await;
        pages.close().await;
        ended(word).map(|()| line)
    }

    /// Under the same ticket: the target says what it lacks.
    async fn connect_again(&self) -> Result<(Session, Vec<(Space, PageSet)>), Broken> {
        let connecting = timeout(limits::LANE, (self.connect)());
        let mut channel = connecting
            .await
            .map_err(|_| Broken::Link(self.slow()))?
            .map_err(|error| Broken::Link(error.into()))?;
        channel.writer.set_deadline(limits::TAKEN);
        channel.reader.set_control_limit(limits::MESSAGE);
        channel.reader.set_deadline(limits::FRAME);
        let resume =
            Resume { migration: self.migration.clone(), epoch: self.epoch, lanes: self.lanes };
        say(&mut channel.writer, Message::Resume(resume)).await.map_err(Broken::Link)?;
        let mut lacking = Presence::default();
        while !lacking.is_complete() {
            match hear(&mut channel.reader).await.map_err(Broken::Link)? {
                Message::Lacking(message) => lacking.add(message).map_err(Broken::ForGood)?,
                Message::Alive(_) => {}
                _ => return Err(Broken::ForGood(MigrationError::malformed("no answer to resume"))),
            }
        }
        let lacking = lacking.complete().unwrap_or_default();
        for (space, pages) in &lacking {
            let owed = self.owed.iter().find(|(of, _)| of == space).map(|(_, owed)| owed);
            let mut others = pages.clone();
            owed.into_iter().for_each(|owed| others.subtract(owed));
            if !others.is_empty() {
                let what = format!("the target lacks pages of {space} that it has had");
                return Err(Broken::ForGood(MigrationError::malformed(what)));
            }
        }
        let (compress, limit) = (self.compress, self.limit.clone());
        let opening = PageSender::open(self.connect.clone(), self.lanes, compress, limit);
        let pages = timeout(limits::LANE, opening).await;
        let pages = pages.map_err(|_| Broken::Link(self.slow()))?.map_err(Broken::Link)?;
        let line = Line::serving(channel, self.memory.clone(), self.requests.clone());
        Ok((Session { line, pages }, lacking))
    }

    fn slow(&self) -> MigrationError {
        let seconds = limits::LANE.as_secs();
        MigrationError::Timeout { what: "connecting again", seconds }
    }
}

/// What the word means that ends a session, one way or the other.
fn ended(word: Result<Message, MigrationError>) -> Result<(), Broken> {
    match word {
        Ok(Message::Paid(_)) => Ok(()),
        Ok(Message::Lost(lost)) => {
            let what = format!("it ran on the target and was lost there: {}", lost.reason);
            Err(Broken::ForGood(MigrationError::runtime("post-copy", what)))
        }
        Ok(_) => Err(Broken::ForGood(MigrationError::malformed("a word where pages are owed"))),
        Err(error) => Err(Broken::Link(error)),
    }
}

impl std::fmt::Debug for Debt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pages: u64 = self.owed.iter().map(|(_, pages)| pages.pages()).sum();
        f.debug_struct("Debt").field("pages", &pages).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use transship_link::in_memory;
    use transship_wire::WireError;

    use super::*;
    use crate::fake::FakeMemory;

    #[tokio::test]
    async fn an_endless_answer_to_resume_is_not_read() {
        let (near, mut far) = in_memory::pair("b".parse().unwrap(), "a".parse().unwrap());
        let near = std::sync::Mutex::new(Some(near));
        let connect: Connect =
            Arc::new(move || std::future::ready(Ok(near.lock().unwrap().take().unwrap())).boxed());
        let debt = Debt {
            memory: Arc::new(FakeMemory::new(1, 0, None)),
            connect,
            lanes: 1,
            compress: Compress::Never,
            limit: Arc::new(RateLimit::new(0)),
            migration: "m".into(),
            epoch: 1,
            owed: Vec::new(),
            round: 1,
            requests: Arc::default(),
            figures: report::PostCopy::default(),
        };
        let reason = "x".repeat(limits::MESSAGE);
        let lost = Message::Lost(transship_api::session::Lost { reason });
        // It is cut off in the middle.
        let (again, _) = tokio::join!(debt.connect_again(), say(&mut far.writer, lost));
        let Err(Broken::Link(error)) = again else { panic!("it is taken") };
        assert!(matches!(error, MigrationError::Wire(WireError::TooLong { .. })), "{error:?}");
    }
}
