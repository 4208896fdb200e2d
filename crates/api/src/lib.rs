//! Generated code only: the messages and services of `proto/`.
// Generated code answers to its generators, not to our lints.
#![allow(warnings, clippy::all, clippy::undocumented_unsafe_blocks)]

/// `proto/session.proto`: what two nodes say to each other.
pub mod session {
    include!(concat!(env!("OUT_DIR"), "/transship.session.v1.rs"));
}

/// `proto/criu.proto`: the part of CRIU's RPC that we read or set.
pub mod criu {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

/// `proto/control.proto`: messages of the control interface.
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/control.rs"));
}

/// `proto/control.proto`: clients and servers of the control interface.
pub mod control_ttrpc {
    use super::control;
    include!(concat!(env!("OUT_DIR"), "/control_ttrpc.rs"));
}
