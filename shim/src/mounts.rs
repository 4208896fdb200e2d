//! The root filesystem that containerd wants mounted in the bundle.

use std::{
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, umount2};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Mounts all of them, in order, under `target`.
///
/// On a thread of its own, which ends afterwards: a network filesystem may
/// take long, and for many overlay layers the thread changes its directory.
pub async fn mount(wanted: Vec<Mount>, target: PathBuf) -> Result<()> {
    on_own_thread(move || {
        for mount in &wanted {
            let at = match mount.target.trim_start_matches('/') {
                "" => target.clone(),
                below => target.join(below),
            };
            let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let (kind, source) = (given(&mount.type_), given(&mount.source));
            containerd_shim::mount::mount_rootfs(
                kind.as_deref(),
                source.as_deref(),
                &mount.options,
                &at,
            )
            .map_err(Error::other(format!(
                "mount {} on {}",
                mount.type_,
                at.display()
            )))?;
        }
        Ok(())
    })
    .await
}

/// Unmounts whatever is mounted at `target` or below it.
pub async fn unmount(target: &Path) -> Result<()> {
    let target = target.to_owned();
    on_own_thread(move || unmount_now(&target)).await
}

fn unmount_now(target: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(Error::io("read /proc/self/mountinfo"))?;
    // Later mounts lie on top of earlier ones.
    for point in mount_points(&table).filter(|point| point.starts_with(target)).rev() {
        match umount2(&point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            // Something still looks into it (an operator's shell): out of
            // sight now, gone when that leaves.
            Err(nix::Error::EBUSY) => {
                umount2(&point, MntFlags::MNT_DETACH).map_err(Error::errno("detach", &point))?;
            }
            Err(errno) => return Err(Error::errno("unmount", &point)(errno)),
        }
    }
    Ok(())
}

fn mount_points(table: &str) -> impl DoubleEndedIterator<Item = PathBuf> {
    let points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescaped(field)))
        .collect();
    points.into_iter()
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
pub fn unescaped(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out + rest
}

/// On a thread that ends with the work, for what changes the thread itself.
pub async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, outcome) = oneshot::channel();
    std::thread::Builder::new()
        .name("mounts".into())
        .spawn(move || drop(done.send(work())))
        .map_err(Error::io("start a thread to mount"))?;
    outcome.await.unwrap_or_else(|_| Err(Error::Internal("the mounting thread died".into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_unescaped_and_taken_from_the_top() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda rw\n\
                     30 22 0:5 / /b\\040c/rootfs rw - overlay overlay rw\n\
                     31 30 0:6 / /b\\040c/rootfs/proc rw - proc proc rw\n\
                     32 22 0:7 / /b\\040c/rootfs2 rw - tmpfs tmpfs rw\n";
        let below: Vec<_> =
            mount_points(table).filter(|p| p.starts_with("/b c/rootfs")).rev().collect();
        assert_eq!(below, [Path::new("/b c/rootfs/proc"), Path::new("/b c/rootfs")]);
        assert_eq!(unescaped("a\\\\134"), "a\\\\");
    }
}
