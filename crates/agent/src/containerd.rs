//! The daemon that is containerd.
