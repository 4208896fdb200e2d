//! Checkpoint and restore under containerd's own commands and API: what of a
//! container must be there again afterwards, and what is told on the way.

mod api;
mod daemon;
mod failures;
mod features;
mod world;
