//! The hand-over as a model that a checker walks through, in every order.
//!
//! Two nodes, a container, and up to two migrations of it. Messages are lost,
//! overtake each other and come twice; shims, agents and nodes crash at any
//! point, disks are full when a journal is written, and a person decides. What
//! follows from what somebody knows is not written here: it is
//! [`transship_migration::decide`], which the real shims and agents call too.
//!
//! ```text
//! world.rs   who knows what: copies, shims, journals, books, messages
//! steps.rs   what can happen next, and what it changes
//! heal.rs    the same without faults: what the world comes to by itself
//! rules.rs   the decisions, each replaceable by a wrong one
//! tests.rs   the promises, how far they were checked, and that each wrong
//!            decision is found
//! ```
//!
//! Not in it: memory, time, and whom a message is from (TLS sees to that). A
//! deadline is an event that may come at any moment.
//!
//! A crate of its own because it is compiled with optimisation in every
//! profile.
#![forbid(unsafe_code)]

#[cfg(test)]
mod heal;
#[cfg(test)]
mod rules;
#[cfg(test)]
mod steps;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
