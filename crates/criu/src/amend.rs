//! What may be changed in a request to CRIU.

use std::os::fd::{AsRawFd, OwnedFd};

use transship_api::criu::CriuNetworkLockMethod;

use crate::fields::Fields;

/// Field numbers of `criu_opts` (proto/criu.proto).
pub(crate) mod opt {
    pub const IMAGES_DIR_FD: u32 = 1;
    pub const LEAVE_RUNNING: u32 = 3;
    pub const EXT_UNIX_SK: u32 = 4;
    pub const TCP_ESTABLISHED: u32 = 5;
    pub const SHELL_JOB: u32 = 7;
    pub const FILE_LOCKS: u32 = 8;
    pub const LOG_LEVEL: u32 = 9;
    pub const LOG_FILE: u32 = 10;
    pub const NOTIFY_SCRIPTS: u32 = 12;
    pub const WORK_DIR_FD: u32 = 17;
    pub const LINK_REMAP: u32 = 18;
    pub const INHERIT_FD: u32 = 27;
    pub const GHOST_LIMIT: u32 = 35;
    pub const EXTERNAL: u32 = 37;
    pub const FREEZE_CGROUP: u32 = 44;
    pub const TIMEOUT: u32 = 45;
    pub const TCP_SKIP_IN_FLIGHT: u32 = 46;
    pub const LAZY_PAGES: u32 = 48;
    pub const STATUS_FD: u32 = 49;
    pub const TCP_CLOSE: u32 = 52;
    pub const NETWORK_LOCK: u32 = 64;
}

/// Options that can be changed; every other stays as the runtime sent it.
pub struct Amendments<'a> {
    fields: &'a mut Fields,
    kept: &'a mut Vec<OwnedFd>,
    sent: &'a mut Vec<OwnedFd>,
}

/// A file for CRIU to take where its images have one of this name.
#[derive(Debug)]
pub struct Inherited {
    pub key: String,
    pub file: OwnedFd,
}

/// How many of them a request may carry: one message of a socket takes 253
/// descriptors, and CRIU puts its own behind the last of them.
pub const MAX_INHERITED: usize = 192;

/// Where the library in CRIU (`transship-hollow`) puts the first of them.
const PLACE: i32 = 64;

/// Field numbers of `inherit_fd`.
const INHERIT_KEY: u32 = 1;
const INHERIT_NUMBER: u32 = 2;

macro_rules! switches {
    ($($(#[$doc:meta])* $name:ident = $number:ident;)*) => {
        $($(#[$doc])* pub fn $name(&mut self, on: bool) {
            self.fields.set_varint(opt::$number, on.into());
        })*
    };
}

impl<'a> Amendments<'a> {
    /// Changes `fields`; what they then name stays open in `kept`, or goes to
    /// CRIU with the request, in `sent`.
    pub(crate) fn new(
        fields: &'a mut Fields,
        kept: &'a mut Vec<OwnedFd>,
        sent: &'a mut Vec<OwnedFd>,
    ) -> Self {
        Self { fields, kept, sent }
    }

    switches! {
        leave_running = LEAVE_RUNNING;
        ext_unix_sk = EXT_UNIX_SK;
        /// Keep established connections, by TCP repair.
        tcp_established = TCP_ESTABLISHED;
        /// Restore established connections as closed ones.
        tcp_close = TCP_CLOSE;
        /// Forget connections that were not accepted yet.
        tcp_skip_in_flight = TCP_SKIP_IN_FLIGHT;
        shell_job = SHELL_JOB;
        file_locks = FILE_LOCKS;
        /// Deleted files that still have another name get a temporary one.
        link_remap = LINK_REMAP;
        lazy_pages = LAZY_PAGES;
    }

    /// Where the images are: a descriptor of ours, kept until CRIU is done.
    pub fn images_dir(&mut self, dir: OwnedFd) {
        self.fields.set_int32(opt::IMAGES_DIR_FD, dir.as_raw_fd());
        self.kept.push(dir);
    }

    /// Where the log goes, and `lazy-pages.socket` is looked for.
    pub fn work_dir(&mut self, dir: OwnedFd) {
        self.fields.set_int32(opt::WORK_DIR_FD, dir.as_raw_fd());
        self.kept.push(dir);
    }

    pub fn log_level(&mut self, level: i32) {
        self.fields.set_int32(opt::LOG_LEVEL, level);
    }

    pub fn log_file(&mut self, name: &str) {
        self.fields.set_bytes(opt::LOG_FILE, name.as_bytes());
    }

    pub fn network_lock(&mut self, method: CriuNetworkLockMethod) {
        self.fields.set_int32(opt::NETWORK_LOCK, method.into());
    }

    /// `None`: seize with ptrace only (milliseconds; CRIU polls a freezer
    /// cgroup in steps of 100 ms).
    pub fn freeze_cgroup(&mut self, path: Option<&str>) {
        match path {
            Some(path) => self.fields.set_bytes(opt::FREEZE_CGROUP, path.as_bytes()),
            None => self.fields.remove(opt::FREEZE_CGROUP),
        }
    }

    /// Up to this size deleted files travel inside the images.
    pub fn ghost_limit(&mut self, bytes: u32) {
        self.fields.set_varint(opt::GHOST_LIMIT, bytes.into());
    }

    /// Seconds that seizing the tasks may take.
    pub fn timeout(&mut self, seconds: u32) {
        self.fields.set_varint(opt::TIMEOUT, seconds.into());
    }

    pub fn external(&mut self, resource: &str) {
        self.fields.add_bytes(opt::EXTERNAL, resource.as_bytes());
    }

    /// For a dump: what is mounted on `from` in the container is not saved,
    /// and images know it as `to`. For a restore: what images know as `from`
    /// is bound from the path `to`.
    pub fn external_mount(&mut self, from: &str, to: &str) {
        self.external(&format!("mnt[{from}]:{to}"));
    }

    /// CRIU takes these files, which go to it with the request. Only for one
    /// that [takes descriptors](crate::Conversation::takes_descriptors), and
    /// at most [`MAX_INHERITED`].
    pub fn inherit(&mut self, files: Vec<Inherited>) {
        for Inherited { key, file } in files {
            let mut entry = Fields::default();
            entry.set_bytes(INHERIT_KEY, key.as_bytes());
            // Below the limit on what is sent.
            entry.set_int32(INHERIT_NUMBER, PLACE + self.sent.len() as i32);
            self.fields.add_bytes(opt::INHERIT_FD, &entry.encode());
            self.sent.push(file);
        }
    }
}
