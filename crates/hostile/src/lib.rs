//! Every door at which bytes come in that somebody else has written, as one
//! function each: what a peer sends, what an image or a record on disk says,
//! what a client asks.
//!
//! ```text
//!                        ┌─▶ tests/corpus   stable: seeds, regressions, a few thousand
//!  ENTRIES ── run(bytes) ┤                  mutations of both (`cargo test`)
//!                        └─▶ fuzz/          nightly: libFuzzer (`make fuzz`)
//! ```
//!
//! An entry takes any bytes and returns. It panics where a promise is broken:
//! what was let in is not what it must be, what was understood cannot be said
//! again, something outside of a directory has changed. Its seeds are made by
//! our own writers, so they stay true to the format, and nothing binary has to
//! be kept.
#![forbid(unsafe_code)]

mod agent;
mod criu;
mod link;
mod mutate;
mod pages;
mod records;
mod rootfs;
mod wire;

pub use mutate::Mutations;

/// One of the doors.
pub struct Entry {
    /// Of its fuzz target, and of its directory in `fuzz/regressions`.
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The most that may be allocated at a time for a kilobyte of input, so
    /// that nothing is allocated because somebody says so.
    pub peak_bytes: usize,
    /// How many mutations the ordinary tests try. Where files are made there
    /// are fewer.
    pub mutations: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

pub const ENTRIES: &[Entry] = &[
    Entry {
        name: "frames",
        run: wire::frames,
        seeds: wire::frame_seeds,
        // The longest frame, whose header alone was believed.
        peak_bytes: transship_wire::MAX_CONTROL + 64 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "client_hello",
        run: link::client_hello,
        seeds: link::client_hello_seeds,
        peak_bytes: 256 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "hello",
        run: link::hello,
        seeds: link::hello_seeds,
        peak_bytes: 64 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "agent_message",
        run: agent::message,
        seeds: agent::message_seeds,
        peak_bytes: MIB,
        mutations: 4000,
    },
    Entry {
        name: "control_request",
        run: agent::request,
        seeds: agent::request_seeds,
        // The protobuf library believes a length up to 10 MB. Who may connect
        // to this socket is root.
        peak_bytes: 10 * MIB,
        mutations: 4000,
    },
    Entry {
        name: "shim_message",
        run: pages::message,
        seeds: pages::message_seeds,
        peak_bytes: 512 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "batch",
        run: pages::batch,
        seeds: pages::batch_seeds,
        // 256 pages expanded, and the same again as the answer.
        peak_bytes: 4 * MIB,
        mutations: 2000,
    },
    Entry {
        name: "present",
        run: pages::present,
        seeds: pages::present_seeds,
        peak_bytes: 512 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "rootfs",
        run: rootfs::stream,
        seeds: rootfs::stream_seeds,
        peak_bytes: 2 * MIB,
        mutations: 300,
    },
    Entry {
        name: "images",
        run: criu::images,
        seeds: criu::image_seeds,
        peak_bytes: 4 * MIB,
        mutations: 300,
    },
    Entry {
        name: "rpc",
        run: criu::rpc,
        seeds: criu::rpc_seeds,
        peak_bytes: 512 * KIB,
        mutations: 4000,
    },
    Entry {
        name: "tar",
        run: criu::tar,
        seeds: criu::tar_seeds,
        peak_bytes: 2 * MIB,
        mutations: 300,
    },
    Entry {
        name: "journal",
        run: records::journal,
        seeds: records::journal_seeds,
        peak_bytes: 256 * KIB,
        mutations: 1000,
    },
    Entry {
        name: "book",
        run: records::book,
        seeds: records::book_seeds,
        peak_bytes: 256 * KIB,
        mutations: 2000,
    },
];

/// The entry of that name, for a fuzz target.
pub fn run(name: &str, bytes: &[u8]) {
    let entry = ENTRIES.iter().find(|entry| entry.name == name);
    (entry.unwrap_or_else(|| panic!("there is no entry {name}")).run)(bytes);
}
