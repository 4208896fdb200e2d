//! The node agent: admits, routes, cancels and remembers migrations, and asks
//! the local daemon for the arriving container. It never sees a memory page.
#![forbid(unsafe_code)]

pub mod containerd;
pub mod daemon;
