//! The departing end of a migration: a running container leaves this node.

mod outbound;

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use tracing::{info, warn};
use transship_criu::{Remembered, images::MemoryDir};
use transship_memory::Memory;
use transship_migration::{Connect, Manifest, MigrationError, Source};
use transship_rootfs::Layer;

use self::outbound::Outbound;
use crate::{
    cgroup::{Cgroup, throttle::Throttle},
    container::{Context, Occupation},
    error::Error,
    held::{self, Held, LOG_LEVEL},
    netns,
    restore::DESCRIPTORS,
    tmpfs,
};

/// How long killed processes may take to go: they wait for nothing but the
/// release of their memory.
const END: Duration = Duration::from_secs(30);

type Result<T> = std::result::Result<T, MigrationError>;

/// A container that is about to leave.
pub struct Leaving {
    occupation: Occupation,
    layer: Layer,
    images: Arc<MemoryDir>,
    held: Option<Held>,
    connect: Option<Connect>,
    throttle: Option<Throttle>,
    outbound: Option<Outbound>,
    tmpfs: Option<tmpfs::Outgoing>,
    /// Why there is no `outbound`.
    fallback: Option<String>,
    /// CRIU has been told to go on: tasks may stand still.
    released: bool,
    guarded: bool,
}

impl Leaving {
    pub fn new(occupation: Occupation) -> std::result::Result<Self, Error> {
        let context = occupation.context();
        let layer = layer(context)?;
        let images = MemoryDir::create(None)
            .map_err(Error::other("make a place for CRIU's images".to_owned()))?;
        let images = Arc::new(images);
        // Without one the container can go; only not slowed down.
        let throttle = occupation.cgroup().and_then(Throttle::new).inspect_err(|error| {
            info!(error = error.sentence(), "the container cannot be slowed down");
        });
        Ok(Self {
            occupation,
            layer,
            images,
            held: None,
            connect: None,
            throttle: throttle.ok(),
            outbound: None,
            tmpfs: None,
            fallback: None,
            released: false,
            guarded: false,
        })
    }

    /// How further connections to the target are made.
    pub fn reach(&mut self, connect: Connect) {
        self.connect = Some(connect);
    }

    /// Why its memory travels in CRIU's images, if that was found out here.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    fn held(&mut self) -> Result<&mut Held> {
        let missing = || MigrationError::runtime("dump", "it was not prepared");
        self.held.as_mut().ok_or_else(missing)
    }

    async fn dump_processes(&mut self) -> Result<()> {
        let hidden = self.outbound.as_ref().filter(|outbound| outbound.is_hidden());
        let Some(shared) = hidden.map(Outbound::shared) else {
            return self.held()?.until("dump", "post-dump").await;
        };
        self.held()?.empty(&shared)?;
        let cgroup = self.occupation.cgroup().map_err(step("dump"))?.clone();
        let (guards, dumped) =
            tokio::join!(outbound::guards(&cgroup), self.held()?.until("dump", "post-dump"));
        dumped?;
        outbound::add_guards(self.images.clone(), guards?).await
    }

    /// What was begun is undone, and the container runs.
    async fn let_go(&mut self) -> Result<()> {
        if let Some(throttle) = &mut self.throttle
            && let Err(error) = throttle.restore()
        {
            warn!(error = error.sentence(), "the container stays slowed down");
        }
        let undone = match self.held.take() {
            Some(held) => held.abandon().await,
            None => Ok(()),
        };
        if std::mem::take(&mut self.guarded) {
            let cgroup = self.occupation.cgroup().map_err(step("thaw"))?;
            blocking(cgroup, Cgroup::thaw).await.map_err(step("thaw"))?;
        }
        if std::mem::take(&mut self.released) {
            // One that was killed could not do it itself.
            if undone.is_ok() {
                netns::unlock(self.occupation.pid()).await;
            }
            self.occupation.thawed().await.map_err(step("thaw"))?;
        }
        undone
    }

    /// No process of the container may ever run again here: it runs there.
    async fn kill(&self) -> Result<()> {
        let cgroup = self.occupation.cgroup().map_err(step("depart"))?;
        blocking(cgroup, |cgroup| cgroup.kill(END)).await.map_err(step("depart"))
    }
}

/// Freezes, thaws or kills off the runtime's own thread: the kernel takes its
/// time.
async fn blocking(
    cgroup: &Cgroup,
    work: impl FnOnce(&Cgroup) -> std::result::Result<(), Error> + Send + 'static,
) -> std::result::Result<(), Error> {
    let cgroup = cgroup.clone();
    let joined = tokio::task::spawn_blocking(move || work(&cgroup)).await;
    joined.map_err(Error::other("change the container's cgroup".to_owned()))?
}

/// What of the container's file system travels.
pub fn layer(context: &Context) -> std::result::Result<Layer, Error> {
    let root = context.root()?;
    let found = Layer::of_mount(&root)
        .map_err(Error::other(format!("find the writable layer of {}", context.key)))?;
    Ok(found.unwrap_or_else(|| Layer::whole(&root)))
}

fn step(step: &'static str) -> impl FnOnce(Error) -> MigrationError {
    move |error| MigrationError::runtime(step, error.sentence())
}

#[async_trait]
impl Source for Leaving {
    fn layer(&self) -> Option<Layer> {
        Some(self.layer.clone())
    }

    fn images(&self) -> PathBuf {
        self.images.path()
    }

    async fn prepare(&mut self) -> Result<()> {
        let context = self.occupation.context().clone();
        let work = context.criu_work();
        fs::create_dir_all(&work)
            .map_err(|source| MigrationError::Image { name: "work directory".into(), source })?;
        let mut command = context.oci.command("checkpoint");
        command.arg("--image-path").arg(self.images.path()).arg("--work-path").arg(&work);
        // What is open stays open: connections by TCP repair, locks by CRIU.
        command.args(["--tcp-established", "--file-locks"]).arg(context.id());
        let spec = context.spec().map_err(step("prepare"))?;
        let network = netns::shared_with(self.occupation.pid(), &spec).await;
        let log = work.join("dump.log");
        let library = held::library();
        let shared = library.is_some();
        if !shared {
            info!("shared memory travels in CRIU's images: its library is not installed");
        }
        let mut held =
            Held::start_isolated_in(network, library, &context.oci, command, log).await?;
        held.lock_network_quickly().await?;
        let options = held.conversation()?.options();
        let tmpfs = tmpfs::Outgoing::hold(self.occupation.pid(), options).await;
        held.conversation()?.amend(|request| {
            crate::checkpoint::amend(request);
            tmpfs.amend(request);
            // CRIU polls the freezer in steps of 100 ms; ptrace alone stops
            // the tasks in a few.
            request.freeze_cgroup(None);
            // Errors and warnings: what CRIU says beyond that costs of the
            // pause.
            request.log_level(LOG_LEVEL);
        });
        match Outbound::prepare(&self.occupation, held.criu_pid(), shared).await {
            Ok(outbound) => self.outbound = Some(outbound),
            Err(why) => {
                warn!(why, "the memory travels in CRIU's images");
                self.fallback = Some(why);
            }
        }
        self.tmpfs = Some(tmpfs);
        self.held = Some(held);
        Ok(())
    }

    fn complete(&mut self, manifest: &mut Manifest) -> Result<()> {
        let remembered = Remembered::of_dump(self.held()?.conversation()?.options());
        manifest.remembered = Some((&remembered).into());
        manifest.descriptors = fs::read_to_string(self.images.path().join(DESCRIPTORS))
            .map_err(|source| MigrationError::Image { name: DESCRIPTORS.into(), source })?;
        if self.outbound.is_some() {
            let cgroup = self.occupation.cgroup().map_err(step("prepare"))?;
            manifest.memory_bytes = cgroup.process_bytes().map_err(step("prepare"))?;
        }
        Ok(())
    }

    fn memory(&mut self) -> Option<Arc<dyn Memory>> {
        self.outbound.as_ref().map(Outbound::memory)
    }

    fn connect(&self) -> Option<Connect> {
        self.connect.clone()
    }

    fn throttle(&mut self, percent: Option<u32>) -> Result<()> {
        let Some(throttle) = &mut self.throttle else {
            return Err(MigrationError::runtime("throttle", "its cgroup takes no quota"));
        };
        let done = match percent {
            Some(percent) => throttle.slow_down(percent),
            None => throttle.restore(),
        };
        done.map_err(step("throttle"))
    }

    async fn freeze(&mut self) -> Result<()> {
        // A task without quota stops only once it has some, and CRIU would
        // write the quota down.
        if let Some(throttle) = &mut self.throttle {
            throttle.restore().map_err(step("freeze"))?;
        }
        self.released = true;
        let held = self.held()?;
        held.release("freeze").await?;
        // CRIU waits for the answer, and looks at nothing before it.
        held.until_frozen().await?;
        self.occupation.frozen().await.map_err(step("freeze"))
    }

    async fn hide(&mut self) -> Result<Option<String>> {
        let cgroup = self.occupation.cgroup().map_err(step("freeze"))?;
        match &mut self.outbound {
            Some(outbound) => outbound.hide(cgroup).await,
            None => Ok(self.fallback.clone()),
        }
    }

    async fn dump(&mut self) -> Result<()> {
        self.dump_processes().await?;
        // Afterwards, because CRIU gives names to deleted files that are still
        // linked somewhere.
        match &self.tmpfs {
            Some(tmpfs) => tmpfs.save(self.images.clone()).await,
            None => Ok(()),
        }
    }

    async fn guard(&mut self) -> Result<()> {
        self.guarded = true;
        let cgroup = self.occupation.cgroup().map_err(step("freeze"))?;
        blocking(cgroup, Cgroup::freeze).await.map_err(step("freeze"))?;
        // A CRIU that was killed (out of memory, say) has let the tasks go on
        // after they were dumped: then what was dumped is not what is here.
        self.held()?.is_held("freeze")
    }

    async fn thaw(&mut self) -> Result<()> {
        let undone = self.let_go().await;
        // Takes its time, and is nothing that the container waits for.
        if let Some(outbound) = self.outbound.take() {
            outbound.end().await;
        }
        undone
    }

    async fn leave(&mut self) -> Result<()> {
        let held = self.held.take();
        let dump = async {
            match held {
                Some(held) => held.accept_dump().await,
                None => Ok(()),
            }
        };
        // At the same time: CRIU waits for its tasks to die, and frozen ones
        // die only when the signal is there and the group is thawed.
        let (dumped, killed) = tokio::join!(dump, self.kill());
        if let Some(outbound) = self.outbound.take() {
            outbound.end().await;
        }
        if let Err(error) = dumped {
            // The tasks are dead in any case, and that was all it had to do.
            warn!(error = transship_migration::chain(&error), "CRIU did not end its dump well");
        }
        killed
    }
}
