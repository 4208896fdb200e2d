//! `transship migrate` between two nodes with real daemons: what arrives, what
//! is refused, and what a failure leaves behind (nothing).

mod cancel;
mod failures;
mod faults;
mod happy;
mod mappings;
mod memory;
mod post_copy;
mod postgres;
mod refusals;
mod restricted;
mod room;
mod secrets;
mod shared;
mod tmpfs;
mod world;
