//! The first connection once pages are owed: words as before, and between
//! them the pages that somebody on the target waits for, which must not queue
//! behind all the others.
//!
//! Both ends say every few seconds that they are there. So a link that has
//! died shows within [`limits::FRAME`], however long there is nothing to say.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, oneshot},
    task,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;
use transship_api::session::{Alive, Batch, ShimMessage, Want, shim_message::Message};
use transship_link::{BoxRead, BoxWrite, Channel};
use transship_memory::{
    Memory, MemoryError,
    codec::{BATCH_PAGES, Codec, Decoder},
};
use transship_types::{PAGE, PageRange, PageSet, Space};
use transship_wire::{Reader, Writer};

use crate::{
    MigrationError,
    bulk::{hear, joined, say},
    limits,
    pages::{PageSink, numbers, put, ranges, sort, space, space_name},
    target::PageStore,
};

/// Pages that go with one that is waited for: memory is used in the
/// neighbourhood, and on a link they take hardly longer than one.
const AROUND: u64 = 16;

/// Requests and words on their way through this end.
const QUEUE: usize = 64;

/// A page somebody touched that is not here: whose, and its address.
pub type Wanted = (Space, u64);

/// The first connection, in either of its two lives.
pub(crate) enum Speech {
    Plain(Box<Channel>),
    Line(Line),
    /// Being turned from one into the other, which failed.
    Over,
}

impl Speech {
    pub fn new(mut channel: Channel) -> Self {
        channel.writer.set_deadline(limits::TAKEN);
        channel.reader.set_control_limit(limits::MESSAGE);
        Self::Plain(Box::new(channel))
    }

    /// As long as nothing is owed.
    pub fn plain(&mut self) -> Result<&mut Channel, MigrationError> {
        match self {
            Self::Plain(channel) => Ok(channel),
            _ => Err(MigrationError::malformed("bulk data while pages are owed")),
        }
    }

    /// From now on pages travel between the words.
    pub fn turn(&mut self, into: impl FnOnce(Channel) -> Line) -> Result<(), MigrationError> {
        match std::mem::replace(self, Self::Over) {
            Self::Plain(channel) => {
                *self = Self::Line(into(*channel));
                Ok(())
            }
            _ => Err(MigrationError::malformed("pages are owed already")),
        }
    }

    pub async fn say(&mut self, message: Message) -> Result<(), MigrationError> {
        match self {
            Self::Plain(channel) => say(&mut channel.writer, message).await,
            Self::Line(line) => line.say(message).await,
            Self::Over => Err(over()),
        }
    }

    /// The next word, which must come `within` this time.
    pub async fn hear(&mut self, within: Duration) -> Result<Message, MigrationError> {
        match self {
            Self::Plain(channel) => {
                channel.reader.set_deadline(within);
                hear(&mut channel.reader).await
            }
            Self::Line(line) => timeout(within, line.hear()).await.unwrap_or_else(|_| {
                let seconds = within.as_secs();
                Err(MigrationError::Timeout { what: "the peer's next word", seconds })
            }),
            Self::Over => Err(over()),
        }
    }
}

fn over() -> MigrationError {
    MigrationError::runtime("speaking to the peer", "the connection has ended")
}

/// A connection that two tasks of their own read and write.
pub(crate) struct Line {
    inbox: mpsc::Receiver<Result<Message, MigrationError>>,
    outbox: mpsc::Sender<Word>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// Something to say, and where to tell how that went.
type Word = (Message, oneshot::Sender<Result<(), MigrationError>>);

impl Line {
    /// The source's end: pages that are wanted are read and sent at once.
    pub fn serving(channel: Channel, memory: Arc<dyn Memory>, served: Arc<Requests>) -> Self {
        let Channel { reader, mut writer, .. } = channel;
        let (wants, mut wanted) = mpsc::channel::<Want>(QUEUE);
        let (outbox, mut words) = mpsc::channel(QUEUE);
        let (told, inbox) = mpsc::channel(QUEUE);
        let writing = async move {
            let mut signs = signs();
            loop {
                let done = tokio::select! {
                    biased;
                    Some(want) = wanted.recv() => serve(&mut writer, &memory, want, &served).await,
                    word = words.recv() => match word {
                        Some(word) => utter(&mut writer, word).await,
                        None => return Ok(()),
                    },
                    _ = signs.tick() => say(&mut writer, Message::Alive(Alive {})).await,
                };
                done?;
            }
        };
        let reading = read(reader, told.clone(), Between::Wants(wants));
        Self::new(inbox, outbox, told, reading, writing)
    }

    /// The target's end: asks for what is wanted, and puts in what comes.
    pub fn asking(channel: Channel, debt: Arc<Debt>) -> Self {
        let Channel { reader, mut writer, .. } = channel;
        let (outbox, mut words) = mpsc::channel(QUEUE);
        let (told, inbox) = mpsc::channel(QUEUE);
        let sink = debt.clone();
        let writing = async move {
            let mut signs = signs();
            let mut wanted = debt.wanted.lock().await;
            for want in debt.still_wanted() {
                say(&mut writer, Message::Want(want)).await?;
            }
            loop {
                tokio::select! {
                    biased;
                    Some((space, address)) = wanted.recv() => {
                        if let Some(want) = debt.want(space, address) {
                            say(&mut writer, Message::Want(want)).await?;
                        }
                    }
                    word = words.recv() => match word {
                        Some(word) => utter(&mut writer, word).await?,
                        None => return Ok(()),
                    },
                    _ = signs.tick() => say(&mut writer, Message::Alive(Alive {})).await?,
                }
            }
        };
        let between = Between::Pages(Decoder::default(), sink);
        let reading = read(reader, told.clone(), between);
        Self::new(inbox, outbox, told, reading, writing)
    }

    fn new(
        inbox: mpsc::Receiver<Result<Message, MigrationError>>,
        outbox: mpsc::Sender<Word>,
        told: mpsc::Sender<Result<Message, MigrationError>>,
        reading: impl Future<Output = ()> + Send + 'static,
        writing: impl Future<Output = Result<(), MigrationError>> + Send + 'static,
    ) -> Self {
        let writing = async move {
            if let Err(error) = writing.await {
                // Whoever listens must not wait for an answer to what was
                // never sent.
                let _ = told.send(Err(error)).await;
            }
        };
        let tasks = [tokio::spawn(reading), tokio::spawn(writing)];
        Self { inbox, outbox, _tasks: tasks.map(AbortOnDropHandle::new) }
    }

    /// One that has ended.
    pub fn closed() -> Self {
        let ((_, inbox), (outbox, _)) = (mpsc::channel(1), mpsc::channel(1));
        let nothing = || AbortOnDropHandle::new(tokio::spawn(async {}));
        Self { inbox, outbox, _tasks: [nothing(), nothing()] }
    }

    pub async fn say(&self, message: Message) -> Result<(), MigrationError> {
        let (done, said) = oneshot::channel();
        self.outbox.send((message, done)).await.map_err(|_| over())?;
        said.await.map_err(|_| over())?
    }

    /// The next word. Waits as long as the peer shows that it is there.
    pub async fn hear(&mut self) -> Result<Message, MigrationError> {
        self.inbox.recv().await.unwrap_or_else(|| Err(over()))
    }
}

fn signs() -> tokio::time::Interval {
    let mut signs = interval_at(Instant::now() + limits::ALIVE, limits::ALIVE);
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    signs
}

async fn utter(writer: &mut Writer<BoxWrite>, (message, done): Word) -> Result<(), MigrationError> {
    match say(writer, message).await {
        Ok(()) => {
            let _ = done.send(Ok(()));
            Ok(())
        }
        Err(error) => {
            let again = MigrationError::runtime("speaking to the peer", error.to_string());
            let _ = done.send(Err(error));
            Err(again)
        }
    }
}

/// What comes between the words.
enum Between {
    /// At the source.
    Wants(mpsc::Sender<Want>),
    /// At the target.
    Pages(Decoder, Arc<Debt>),
}

impl Between {
    /// Answers what is a word.
    async fn keep(
        &mut self,
        message: Message,
        reader: &mut Reader<BoxRead>,
    ) -> Result<Option<Message>, MigrationError> {
        match (self, message) {
            (Self::Wants(wants), Message::Want(want)) => {
                // A writer that is gone has said why.
                let _ = wants.send(want).await;
                Ok(None)
            }
            (Self::Pages(decoder, debt), Message::Batch(batch)) => {
                // On this runtime: at most 1 MiB, for which somebody waits.
                put(reader, decoder, &**debt, &batch).await.map(|()| None)
            }
            (_, word) => Ok(Some(word)),
        }
    }
}

/// Reads until the connection fails.
async fn read(
    mut reader: Reader<BoxRead>,
    told: mpsc::Sender<Result<Message, MigrationError>>,
    mut between: Between,
) {
    loop {
        reader.set_deadline(limits::FRAME);
        let word = match hear(&mut reader).await {
            Ok(Message::Alive(_)) => continue,
            Ok(message) => between.keep(message, &mut reader).await,
            Err(error) => Err(error),
        };
        let failed = word.is_err();
        if let Some(word) = word.transpose()
            && told.send(word).await.is_err()
        {
            return;
        }
        if failed {
            return;
        }
    }
}

/// What was sent because somebody waited for it.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
}

async fn serve(
    writer: &mut Writer<BoxWrite>,
    memory: &Arc<dyn Memory>,
    want: Want,
    served: &Requests,
) -> Result<(), MigrationError> {
    let space = space(want.space.as_ref())?;
    let wanted = ranges(&want.pages, BATCH_PAGES)?;
    let memory = memory.clone();
    let reading = task::spawn_blocking(move || {
        let pages: u64 = wanted.iter().map(|range| range.pages()).sum();
        let mut bytes = vec![0; (pages * PAGE) as usize];
        let gone = memory.read(space, &wanted, &mut bytes)?;
        match gone.first() {
            Some(range) => Err(MemoryError::Missing { space, address: range.start() }),
            None => Ok((sort(&wanted, gone, &mut bytes), bytes)),
        }
    });
    let (sorted, bytes) = joined(reading.await)?;
    let batch = Batch {
        round: 0,
        space: Some(space_name(space)),
        pages: numbers(sorted.pages),
        zeros: numbers(sorted.zeros),
        codec: Codec::Raw.number(),
        wire_bytes: sorted.length as u32,
        memfd: None,
    };
    served.requests.fetch_add(1, Ordering::Relaxed);
    served.bytes.fetch_add(sorted.length as u64, Ordering::Relaxed);
    let message = ShimMessage { message: Some(Message::Batch(batch)) };
    if sorted.length == 0 {
        writer.control(&message).await?;
    } else {
        writer.control_with_data(&message, &bytes[..sorted.length]).await?;
        writer.flush().await?;
    }
    Ok(())
}

/// What the target still has to get, over all connections on which that may
/// take.
pub(crate) struct Debt {
    store: Arc<dyn PageStore>,
    spaces: BTreeSet<Space>,
    changed: Notify,
    /// Stretches that were asked for.
    asked: Mutex<BTreeSet<(Space, u64)>>,
    wanted: tokio::sync::Mutex<mpsc::UnboundedReceiver<Wanted>>,
}

impl Debt {
    pub fn new(
        store: Arc<dyn PageStore>,
        spaces: Vec<Space>,
        wanted: mpsc::UnboundedReceiver<Wanted>,
    ) -> Self {
        let (changed, asked) = Default::default();
        let spaces = spaces.into_iter().collect();
        Self { store, spaces, changed, asked, wanted: wanted.into() }
    }

    /// Everything that is owed.
    pub fn sets(&self) -> Vec<(Space, PageSet)> {
        let sets = self.spaces.iter().map(|space| (*space, self.store.missing(*space)));
        sets.filter(|(_, set)| !set.is_empty()).collect()
    }

    pub fn is_paid(&self) -> bool {
        self.spaces.iter().all(|space| self.store.missing(*space).is_empty())
    }

    /// Asks for all these that are not here, and waits for them.
    pub async fn fetch(
        &self,
        line: &mut Line,
        sets: &[(Space, PageSet)],
    ) -> Result<(), MigrationError> {
        for (space, pages) in sets {
            let owed = pages.iter().flat_map(|range| self.store.lacking(*space, range)).collect();
            for want in wants(*space, owed) {
                line.say(Message::Want(want)).await?;
            }
        }
        let here = |(space, pages): &(Space, PageSet)| {
            pages.iter().all(|range| self.store.lacking(*space, range).is_empty())
        };
        loop {
            let changed = self.changed.notified();
            if sets.iter().all(here) {
                return Ok(());
            }
            tokio::select! {
                () = changed => {}
                word = line.hear() => {
                    return Err(match word {
                        Ok(_) => MigrationError::malformed("a word where pages are due"),
                        Err(error) => error,
                    });
                }
            }
        }
    }

    /// Pages of a space without debts are nobody's: the store would keep them.
    fn owes(&self, space: Space) -> Result<(), MemoryError> {
        match self.spaces.contains(&space) {
            true => Ok(()),
            false => Err(MemoryError::Invalid(format!("pages of {space}, which lacks none"))),
        }
    }

    fn want(&self, space: Space, address: u64) -> Option<Want> {
        let start = address / (AROUND * PAGE) * (AROUND * PAGE);
        let want = self.want_from(space, start)?;
        self.asked().insert((space, start));
        Some(want)
    }

    fn want_from(&self, space: Space, start: u64) -> Option<Want> {
        let stretch = PageRange::of_pages(start, AROUND).ok()?;
        let pages = self.store.lacking(space, stretch);
        (!pages.is_empty()).then(|| Want { space: Some(space_name(space)), pages: numbers(pages) })
    }

    /// What was asked for on a connection that is gone.
    fn still_wanted(&self) -> Vec<Want> {
        let mut wants = Vec::new();
        self.asked().retain(|(space, start)| {
            let want = self.want_from(*space, *start);
            let wanted = want.is_some();
            wants.extend(want);
            wanted
        });
        if !wants.is_empty() {
            debug!(requests = wants.len(), "asked again");
        }
        wants
    }

    fn asked(&self) -> MutexGuard<'_, BTreeSet<(Space, u64)>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageSink for Debt {
    fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        self.owes(space)?;
        let put = self.store.put(space, ranges, bytes, round);
        self.changed.notify_waiters();
        put
    }

    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        self.owes(space)?;
        let zeroed = self.store.zero(space, ranges, round);
        self.changed.notify_waiters();
        zeroed
    }
}

/// A set as requests, none of which asks for more than a batch has.
fn wants(space: Space, pages: PageSet) -> Vec<Want> {
    let want = |ranges: &mut Vec<PageRange>| Want {
        space: Some(space_name(space)),
        pages: numbers(ranges.drain(..)),
    };
    let (mut all, mut ranges, mut room) = (Vec::new(), Vec::new(), BATCH_PAGES);
    for range in pages.iter() {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let (first, after) = range.split(room);
            room -= first.pages();
            ranges.push(first);
            rest = after;
            if room == 0 {
                all.push(want(&mut ranges));
                room = BATCH_PAGES;
            }
        }
    }
    if !ranges.is_empty() {
        all.push(want(&mut ranges));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> PageRange {
        PageRange::new(first * PAGE, last * PAGE).unwrap()
    }

    #[test]
    fn pages_of_a_space_that_lacks_none_are_not_kept() {
        let store = Arc::new(crate::fake::FakeStore::new(None));
        let (owing, other) = (Space::Process(1), Space::Process(2));
        store.expect(owing, &[range(1, 3)].into_iter().collect()).unwrap();
        let debt = Debt::new(store.clone(), vec![owing], mpsc::unbounded_channel().1);
        assert!(debt.put(other, &[range(1, 2)], &[7; PAGE as usize], 1).is_err());
        assert!(debt.zero(other, &[range(1, 2)], 1).is_err());
        debt.zero(owing, &[range(1, 3)], 1).unwrap();
        assert!(debt.is_paid());
    }

    #[test]
    fn no_request_is_larger_than_a_batch() {
        let pages: PageSet = [range(1, 3), range(10, 700)].into_iter().collect();
        let all = wants(Space::Process(1), pages.clone());
        let mut again = PageSet::new();
        for want in &all {
            let asked = ranges(&want.pages, BATCH_PAGES).unwrap();
            asked.into_iter().for_each(|range| again.insert(range));
        }
        assert_eq!((all.len(), again), (3, pages));
        assert!(wants(Space::Process(1), PageSet::new()).is_empty());
    }
}
