//! System calls that no crate wraps, and the layouts the kernel gives them.

pub(crate) mod pagemap;
pub(crate) mod process;
pub(crate) mod ptrace;
pub mod uffd;
