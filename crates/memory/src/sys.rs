//! System calls that no crate wraps, and the layouts the kernel gives them.

pub(crate) mod arena;
pub(crate) mod pagemap;
pub(crate) mod process;
pub(crate) mod ptrace;
pub(crate) mod socket;
pub mod uffd;
pub(crate) mod view;
