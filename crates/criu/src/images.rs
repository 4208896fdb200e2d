//! CRIU images that live in memory only.

use std::{
    ffi::{CString, OsString},
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use crate::{CriuError, sys};

/// A tmpfs without a mount point. The OCI runtime and CRIU reach it through
/// [`path`](Self::path); when this process ends, however it ends, the memory
/// is free and nothing is left to unmount.
#[derive(Debug)]
pub struct MemoryDir(OwnedFd);

impl MemoryDir {
    /// `limit`: bytes it may hold; the kernel's default is half the memory.
    pub fn create(limit: Option<u64>) -> Result<Self, CriuError> {
        // The kernel rounds up to whole pages. 0 would mean "no limit".
        let size = limit.map(|bytes| bytes.max(1).to_string()).unwrap_or_else(|| "50%".into());
        let size = CString::new(size).map_err(|error| Self::failed(error.into()))?;
        let options = [(c"mode", c"0700"), (c"size", size.as_c_str())];
        sys::detached_tmpfs(&options).map(Self).map_err(Self::failed)
    }

    fn failed(source: io::Error) -> CriuError {
        CriuError::file("creating a tmpfs for images", "(no mount point)")(source)
    }

    /// Its path for every process that sees our `/proc`, as long as this value
    /// lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// A descriptor for [`Amendments::images_dir`](crate::Amendments).
    pub fn descriptor(&self) -> Result<OwnedFd, CriuError> {
        let path = self.path();
        let open = File::open(&path).map_err(CriuError::file("opening", &path))?;
        Ok(open.into())
    }

    /// Names and sizes of the files, in order of name.
    pub fn files(&self) -> Result<Vec<(OsString, u64)>, CriuError> {
        let path = self.path();
        let list = || -> io::Result<Vec<(OsString, u64)>> {
            let mut files = Vec::new();
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                let meta = entry.metadata()?;
                if meta.is_file() {
                    files.push((entry.file_name(), meta.len()));
                }
            }
            files.sort();
            Ok(files)
        };
        list().map_err(CriuError::file("listing", &path))
    }

    pub fn open(&self, name: &str) -> Result<File, CriuError> {
        let path = self.child(name)?;
        File::open(&path).map_err(CriuError::file("opening", &path))
    }

    /// A new file; an existing one is an error, as two images of one name are.
    pub fn create_file(&self, name: &str) -> Result<File, CriuError> {
        let path = self.child(name)?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(CriuError::file("creating", &path))
    }

    /// Writes a file and puts it in the place of another of that name, or of
    /// none. Whoever has the old one open still reads the old one.
    pub fn replace(
        &self,
        name: &str,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), CriuError> {
        let path = self.child(name)?;
        let fresh = self.child(&format!("{name}.new"))?;
        let all = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&fresh)?;
            write(&mut file)?;
            fs::rename(&fresh, &path)
        };
        all().map_err(CriuError::file("writing", &path))
    }

    /// Cuts a file off, or lets it end in a hole.
    pub fn set_len(&self, name: &str, bytes: u64) -> Result<(), CriuError> {
        let path = self.child(name)?;
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(bytes)).map_err(CriuError::file("cutting", &path))
    }

    pub fn remove(&self, name: &str) -> Result<(), CriuError> {
        let path = self.child(name)?;
        fs::remove_file(&path).map_err(CriuError::file("removing", &path))
    }

    /// Puts a file in the place of another, or of none.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), CriuError> {
        let path = self.child(to)?;
        fs::rename(self.child(from)?, &path).map_err(CriuError::file("writing", &path))
    }

    /// Names come from a peer: one component, no way out of the directory.
    fn child(&self, name: &str) -> Result<PathBuf, CriuError> {
        let plain = Path::new(name).file_name().is_some_and(|last| last == name);
        let path = self.path().join(if plain { name } else { "" });
        if plain && !name.contains('\0') {
            return Ok(path);
        }
        let shown: String = name.chars().take(80).collect();
        let why = io::Error::new(io::ErrorKind::InvalidInput, format!("{shown:?} is no file name"));
        Err(CriuError::file("naming an image in", path)(why))
    }
}

impl AsFd for MemoryDir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
