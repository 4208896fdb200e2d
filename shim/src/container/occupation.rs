//! The right to be the only one who changes a container.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::{Context, Reply, Request};
use crate::{
    cgroup::Cgroup,
    error::{Error, Result},
};

/// While it lives, Pause, Resume, Update, Checkpoint, Exec and Delete wait (a
/// checkpoint) or are refused (a migration); State, Kill and Wait answer.
/// Dropping it ends that; the container is then what it was before, unless
/// its processes have ended meanwhile.
pub struct Occupation {
    pub(super) context: Arc<Context>,
    pub(super) pid: i32,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) owner: mpsc::UnboundedSender<Request>,
}

impl Occupation {
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The container's first process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn cgroup(&self) -> Result<&Cgroup> {
        self.cgroup.as_ref().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {} has no cgroup", self.context.key))
        })
    }

    /// The processes stand still: State says PAUSED from now on.
    pub async fn frozen(&self) -> Result<()> {
        self.tell(|reply| Request::Frozen { reply }).await
    }

    /// The processes run again (or are paused as before).
    pub async fn thawed(&self) -> Result<()> {
        self.tell(|reply| Request::Thawed { reply }).await
    }

    async fn tell(&self, request: impl FnOnce(Reply<()>) -> Request) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let _ = self.owner.send(request(reply));
        answer.await.unwrap_or_else(|_| Err(Error::gone(self.context.id())))
    }
}

impl Drop for Occupation {
    fn drop(&mut self) {
        let _ = self.owner.send(Request::Released);
    }
}
