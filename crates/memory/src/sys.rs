//! System calls that no crate wraps, and the layouts the kernel gives them.

pub mod uffd;
