//! The tracker on real processes: this test program starts itself again as
//! the program that is watched. Needs root, and Linux 6.7 or later.

mod changes;
mod random;
mod shared;
mod stops;
mod store;
mod sys;
mod target;
