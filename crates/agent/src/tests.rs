//! Whole migrations between two agents in one process: real control flow,
//! real TLS over loopback, real hand-over by SCM_RIGHTS; only the daemons and
//! the shims are fakes.

mod cancels;
mod cuts;
mod doors;
mod fake;
mod hostile;
mod moves;
mod plans;
mod refuses;
mod resolves;
mod rotation;
mod secrets;
mod tickets;
mod world;
