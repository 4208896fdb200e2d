//! Everything that comes in before the restore: passes over the writable
//! layer and rounds of memory while the container runs there, and then, while
//! it stands still, what is left of both, and CRIU's images.

use std::{collections::HashSet, sync::Arc};

use tokio::{task, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::info;
use transship_api::session::{Pass, PassDone, RoundDone, RoundEnd, shim_message::Message};
use transship_link::Channel;
use transship_types::{PageSet, Space};

use super::{PageStore, Target, not_aborted};
use crate::{
    Manifest, MigrationError,
    bulk::{Names, hear, joined, receive_image, receive_pass, say, sync, write_images},
    limits,
    pages::PageReceiver,
    present::Presence,
};

pub(super) struct Landing<'a> {
    channel: &'a mut Channel,
    pages: Pages,
    /// The last pass over the writable layer brought something.
    changed: bool,
    /// Came while lanes were still awaited.
    early: Option<Message>,
}

/// What has come in.
pub(super) struct Landed {
    /// The pages that exist; none: CRIU's images have them all.
    pub present: Vec<(Space, PageSet)>,
    /// The layer has changed since it was last made durable.
    pub unsynced: bool,
    /// The spaces of which pages are still to come, and on which lanes.
    pub owed: Vec<Space>,
    pub receiver: Option<PageReceiver>,
}

/// The last round, once it is complete.
struct Settled {
    present: Vec<(Space, PageSet)>,
    owed: Vec<Space>,
    receiver: PageReceiver,
}

/// Pages that come by lane.
enum Pages {
    /// None: memory is in CRIU's images.
    No,
    Coming {
        store: Arc<dyn PageStore>,
        receiver: PageReceiver,
        presence: Box<Presence>,
        owed: Box<Presence>,
    },
    /// The last round has been sent; beside the images, it comes to its end.
    Settling(AbortOnDropHandle<Result<Settled, MigrationError>>),
}

impl<'a> Landing<'a> {
    pub fn new(channel: &'a mut Channel, store: Option<Arc<dyn PageStore>>) -> Self {
        let pages = store.map_or(Pages::No, |store| Pages::Coming {
            receiver: PageReceiver::new(store.clone()),
            store,
            presence: Box::default(),
            owed: Box::default(),
        });
        Self { channel, pages, changed: false, early: None }
    }

    /// Takes in the lanes, which the source makes before it says anything.
    pub async fn lanes<T: Target>(
        &mut self,
        target: &mut T,
        count: u32,
    ) -> Result<(), MigrationError> {
        let Pages::Coming { receiver, .. } = &self.pages else { return Ok(()) };
        let nobody = || MigrationError::malformed("lanes that nobody waits for");
        let next = target.next().ok_or_else(nobody)?;
        for _ in 0..count {
            let mut lane = std::pin::pin!(timeout(limits::LANE, next()));
            let lane = loop {
                tokio::select! {
                    biased;
                    lane = &mut lane => break lane,
                    // Most likely that it gives up.
                    message = hear_source(self.channel), if self.early.is_none() => {
                        self.early = Some(message?);
                    }
                }
            };
            let lane = lane.map_err(|_| MigrationError::Timeout {
                what: "a lane of the source",
                seconds: limits::LANE.as_secs(),
            })??;
            receiver.add(lane)?;
        }
        Ok(())
    }

    /// Returns once everything is here.
    pub async fn receive<T: Target>(
        mut self,
        target: &mut T,
        manifest: &Manifest,
    ) -> Result<Landed, MigrationError> {
        let mut prepared = false;
        let mut images = Names::default();
        loop {
            match self.next().await? {
                Message::Pass(pass) if images.count() == 0 => self.pass(pass, target).await?,
                Message::Alive(_) => {}
                Message::RoundEnd(end) => self.round(end).await?,
                Message::Present(present) => match &mut self.pages {
                    Pages::Coming { presence, .. } => presence.add(present)?,
                    _ => return Err(MigrationError::malformed("pages without a lane")),
                },
                Message::Owed(present) => match &mut self.pages {
                    Pages::Coming { owed, .. } => owed.add(present)?,
                    _ => return Err(MigrationError::malformed("pages owed without a lane")),
                },
                Message::SmallImages(small) => {
                    small.images.iter().try_for_each(|image| images.take(&image.name))?;
                    write_images(target.images(), small).await?;
                }
                Message::Image(image) => {
                    images.take(&image.name)?;
                    receive_image(&mut self.channel.reader, &target.images(), image).await?;
                }
                Message::ImagesEnd(end) if end.count as usize == images.count() => {
                    return self.end().await;
                }
                _ => return Err(MigrationError::malformed("neither pass nor page nor image")),
            }
            // After the first message the root is as complete as it gets
            // before the freeze: the runtime can start, and waits at the gate.
            if !prepared {
                target.prepare(manifest).await?;
                prepared = true;
            }
        }
    }

    /// The next word of the source; that a lane fails is one as well.
    async fn next(&mut self) -> Result<Message, MigrationError> {
        if let Some(message) = self.early.take() {
            return Ok(message);
        }
        // Between two of them the source may be busy with its own preparation.
        self.channel.reader.set_deadline(limits::PASS);
        let message = match &self.pages {
            Pages::Coming { receiver, .. } => tokio::select! {
                biased;
                message = hear_source(self.channel) => message,
                failure = receiver.failure() => Err(self.cause(failure).await),
            },
            _ => hear_source(self.channel).await,
        };
        self.channel.reader.set_deadline(limits::FRAME);
        message
    }

    /// A source that gives up cuts its lanes, and says why here.
    async fn cause(&mut self, failure: MigrationError) -> MigrationError {
        if !matches!(failure, MigrationError::Wire(_)) {
            return failure;
        }
        match timeout(limits::REASON, hear_source(self.channel)).await {
            Ok(Err(reason)) => reason,
            _ => failure,
        }
    }

    async fn pass<T: Target>(&mut self, pass: Pass, target: &T) -> Result<(), MigrationError> {
        let totals = receive_pass(&mut self.channel.reader, &target.root()).await?;
        if pass.last {
            self.changed = totals.entries > 0;
        } else {
            // So that there is less to do within the pause, mostly nothing.
            sync(target.root()).await?;
        }
        info!(pass = pass.number, last = pass.last, bytes = totals.bytes, "pass applied");
        let done = PassDone { number: pass.number };
        say(&mut self.channel.writer, Message::PassDone(done)).await
    }

    async fn round(&mut self, end: RoundEnd) -> Result<(), MigrationError> {
        let RoundEnd { number, batches, last } = end;
        if last {
            return self.last_round(number, batches);
        }
        let Pages::Coming { receiver, .. } = &self.pages else {
            return Err(MigrationError::malformed("a round without a lane"));
        };
        receiver.complete(number, batches).await?;
        info!(round = number, batches, "round complete");
        say(&mut self.channel.writer, Message::RoundDone(RoundDone { number })).await
    }

    /// What the pause still brings of the memory, while images come.
    fn last_round(&mut self, number: u32, batches: u64) -> Result<(), MigrationError> {
        let Pages::Coming { store, receiver, presence, owed } =
            std::mem::replace(&mut self.pages, Pages::No)
        else {
            return Err(MigrationError::malformed("a round without a lane"));
        };
        let sets = presence
            .complete()
            .ok_or_else(|| MigrationError::malformed("a last round without all present pages"))?;
        let owed = owed.if_any()?;
        let settling = tokio::spawn(async move {
            receiver.complete(number, batches).await?;
            let spaces = owed.iter().map(|(space, _)| *space).collect();
            let settled = task::spawn_blocking(move || settle(&*store, sets, &owed));
            let present = joined(settled.await)?;
            Ok(Settled { present, owed: spaces, receiver })
        });
        self.pages = Pages::Settling(AbortOnDropHandle::new(settling));
        Ok(())
    }

    async fn end(self) -> Result<Landed, MigrationError> {
        let unsynced = self.changed;
        match self.pages {
            Pages::No => {
                Ok(Landed { present: Vec::new(), unsynced, owed: Vec::new(), receiver: None })
            }
            Pages::Settling(settling) => {
                let Settled { present, owed, receiver } = joined(settling.await)?;
                // Without debts nobody needs the lanes any more.
                let receiver = Some(receiver).filter(|_| !owed.is_empty());
                Ok(Landed { present, unsynced, owed, receiver })
            }
            Pages::Coming { .. } => Err(MigrationError::malformed("images before the last round")),
        }
    }
}

/// Leaves in the store what existed at the freeze, and nothing else; of what
/// is `owed` not even what came before.
fn settle(
    store: &dyn PageStore,
    sets: Vec<(Space, PageSet)>,
    owed: &[(Space, PageSet)],
) -> Result<Vec<(Space, PageSet)>, MigrationError> {
    let existing: HashSet<Space> = sets.iter().map(|(space, _)| *space).collect();
    for space in store.spaces() {
        if !existing.contains(&space) {
            store.present(space, &PageSet::new())?;
        }
    }
    for (space, _) in owed {
        if !existing.contains(space) || matches!(space, Space::Shared(_)) {
            return Err(MigrationError::malformed(format!("pages owed of {space}")));
        }
    }
    for (space, pages) in &sets {
        let Some((_, late)) = owed.iter().find(|(of, _)| of == space) else {
            store.present(*space, pages)?;
            continue;
        };
        let mut here = pages.clone();
        here.subtract(late);
        store.present(*space, &here)?;
        if here.pages() + late.pages() != pages.pages() {
            return Err(MigrationError::malformed(format!("pages owed that {space} has not")));
        }
        store.expect(*space, pages)?;
    }
    Ok(sets)
}

async fn hear_source(channel: &mut Channel) -> Result<Message, MigrationError> {
    not_aborted(hear(&mut channel.reader).await?)
}
