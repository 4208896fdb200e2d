//! A container that runs while its memory is still being put in place.
//!
//! Everything works meanwhile but another dump: CRIU cannot save a process
//! whose pages wait elsewhere, so a checkpoint and a migration wait for the
//! end of the filling, and for a while only.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;

/// Filling takes seconds per GiB on the slowest host; a client's call does not
/// wait for ever.
pub const WAIT: Duration = Duration::from_secs(120);

/// What comes after [`Filling::stop`] takes moments; Delete waits for it.
pub const END: Duration = Duration::from_secs(30);

/// A container that has just arrived.
pub struct Arrived {
    /// Its first process, a child of ours.
    pub pid: i32,
    pub filling: Option<Filling>,
}

/// What goes on after the container runs.
pub struct Filling {
    /// No process of the container is left: nothing needs to be filled.
    pub stop: Arc<dyn Fn() + Send + Sync>,
    /// Ends when every page is in place, or nobody needs them any more.
    pub rest: BoxFuture<'static, ()>,
}
