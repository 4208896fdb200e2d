//! The `tar` that CRIU starts, without what it costs.
//!
//! CRIU saves and restores the contents of a tmpfs (`/dev`, `/dev/shm`, each
//! masked directory: five or so in a container, nearly all of them empty) by
//! running `tar --gzip`, which starts a shell and gzip: three programs for
//! every mount, while the container stands still. A migration takes most of
//! them away from CRIU ([`Amendments::external_mount`](crate::Amendments));
//! this is for the rest, and for checkpoints. The gate puts this program in CRIU's
//! `PATH` under that name. It serves CRIU's two command lines itself and in
//! one process; for anything else, and for whatever it meets that it does not
//! know, it starts over as the real tar.
//!
//! The archives are ordinary ones: either tar reads what the other wrote. Ours
//! are not compressed, because they never leave memory but for the link, whose
//! time is less than that of gzip.

pub(crate) mod create;
pub(crate) mod extract;

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::PathBuf,
    process::{self, Command},
};

use crate::sys;

/// What CRIU 3 and 4 write between the verb and the directory.
const CREATE: [&str; 10] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
];
const EXTRACT: [&str; 5] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"];

/// This process is `tar`.
pub fn run(arguments: &[OsString]) -> ! {
    match serve(arguments) {
        Ok(()) => process::exit(0),
        Err(error) if error.kind() == io::ErrorKind::InvalidFilename => {
            eprintln!("tar: a name in the archive is longer than names are");
            process::exit(2);
        }
        Err(_) => {}
    }
    let Some(tar) = real_tar() else {
        eprintln!("tar: no tar in PATH");
        process::exit(127);
    };
    let error = Command::new(&tar).arg0("tar").args(arguments).exec();
    eprintln!("tar: executing {}: {error}", tar.display());
    process::exit(127);
}

/// After nearly every error the real tar can do the same from the beginning: both files
/// stand where they stood.
fn serve(arguments: &[OsString]) -> io::Result<()> {
    match command(arguments).ok_or_else(not_ours)? {
        Work::Create(dir) => {
            let archive = File::from(sys::inherited(1)?);
            let start = (&archive).stream_position()?;
            create::create(&dir, &archive).inspect_err(|_| {
                // A failure here is met again by the real tar, which tells it.
                let _ = archive.set_len(start);
                let _ = (&archive).seek(SeekFrom::Start(start));
                std::mem::forget(archive);
            })
        }
        Work::Extract(dir) => {
            let archive = File::from(sys::inherited(0)?);
            let start = (&archive).stream_position()?;
            extract::extract(&archive, &dir).inspect_err(|_| {
                let _ = (&archive).seek(SeekFrom::Start(start));
                std::mem::forget(archive);
            })
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Work {
    Create(PathBuf),
    Extract(PathBuf),
}

fn command(arguments: &[OsString]) -> Option<Work> {
    let after = |wanted: &[&str]| {
        let start = arguments.get(..wanted.len())?;
        let same = start.iter().zip(wanted).all(|(given, wanted)| given == wanted);
        same.then(|| &arguments[wanted.len()..])
    };
    match (after(&CREATE), after(&EXTRACT)) {
        (Some([dir, what]), _) if what == "." => Some(Work::Create(dir.into())),
        (_, Some([dir])) => Some(Work::Extract(dir.into())),
        _ => None,
    }
}

fn not_ours() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

/// The first that is not this program.
fn real_tar() -> Option<PathBuf> {
    let file = |path: &OsStr| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let own = file("/proc/self/exe".as_ref());
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join("tar"))
        .find(|tar| file(tar.as_os_str()).is_some_and(|found| Some(found) != own))
}

#[cfg(test)]
mod tests;
