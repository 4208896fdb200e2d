//! Container images for the tests, made from what Debian has installed: a
//! root file system, one uncompressed layer, an OCI archive. Nothing is
//! fetched. Built once per machine, kept in `target/images/`.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::locate;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// A shell and the small tools.
    Busybox,
    /// `redis-server` on all addresses, no persistence; `redis-cli`; and
    /// `redis-writer`, where it is built.
    Redis,
    /// `postgres` with `initdb`, `psql` and `pg_amcheck`, and a place for the
    /// data of anybody.
    Postgres,
    /// The interpreter with its standard library.
    Python,
    /// What Kubernetes holds a pod's namespaces with: no shell, not root.
    Pause,
    /// `workload`, memory that is written while it moves, where it is built.
    Workload,
}

impl Image {
    pub fn reference(self) -> &'static str {
        match self {
            Self::Busybox => "docker.io/library/busybox:1.35",
            Self::Redis => "docker.io/library/redis:7",
            Self::Postgres => "docker.io/library/postgres:1",
            Self::Python => "docker.io/library/python:3",
            Self::Pause => "registry.k8s.io/pause:3.8",
            Self::Workload => "docker.io/library/workload:1",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Busybox => "busybox",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Python => "python",
            Self::Pause => "pause",
            Self::Workload => "workload",
        }
    }

    /// The `config` of the image.
    fn config(self) -> serde_json::Value {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        match self {
            Self::Busybox => json!({"Env": [path], "Cmd": ["sh"]}),
            Self::Redis => json!({"Env": [path], "WorkingDir": "/data",
                "Cmd": ["redis-server", "--save", "", "--protected-mode", "no"]}),
            Self::Postgres => json!({"Env": [path], "Cmd": ["postgres"]}),
            Self::Python => json!({"Env": [path], "Cmd": ["python3"]}),
            Self::Pause => json!({"Env": [path], "Entrypoint": ["/pause"], "User": "65535:65535"}),
            Self::Workload => json!({"Env": [path], "Cmd": ["workload"]}),
        }
    }

    /// What of ours is in it: once that is newer, the archive is made again.
    fn source(self) -> Option<PathBuf> {
        match self {
            Self::Redis => ours("redis-writer"),
            Self::Workload => ours("workload"),
            Self::Busybox | Self::Postgres | Self::Python | Self::Pause => None,
        }
    }

    fn fill(self, root: &Path) -> Result<()> {
        match self {
            Self::Pause => return pause(root),
            Self::Busybox => base(root)?,
            Self::Redis => {
                base(root)?;
                // One program under two names: it looks at the name.
                program(root, Path::new("/usr/bin/redis-check-rdb"), "usr/bin/redis-server")?;
                program(root, Path::new("/usr/bin/redis-cli"), "usr/bin/redis-cli")?;
                if let Some(writer) = ours("redis-writer") {
                    program(root, &writer, "usr/bin/redis-writer")?;
                }
            }
            Self::Postgres => {
                base(root)?;
                postgres(root)?;
            }
            Self::Python => {
                base(root)?;
                python(root)?;
            }
            Self::Workload => {
                base(root)?;
                // Where it is driven from.
                fs::create_dir(root.join("workload"))?;
                if let Some(workload) = ours("workload") {
                    program(root, &workload, "usr/bin/workload")?;
                }
            }
        }
        Ok(())
    }
}

/// The archive of an image, made when it is missing or outdated. It can be
/// given to `ctr image import` and to `docker load`.
pub fn archive(image: Image) -> Result<PathBuf> {
    let dir = locate::target_dir()?.join("images");
    fs::create_dir_all(&dir)?;
    let lock = fs::File::create(dir.join(format!(".{}.lock", image.name())))?;
    let _one_at_a_time = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("lock an image")?;
    let archive = dir.join(format!("{}.tar", image.name()));
    if !outdated(&archive, image.source().as_deref())? {
        return Ok(archive);
    }
    let work = tempfile::Builder::new().prefix(".build-").tempdir_in(&dir)?;
    let root = work.path().join("root");
    self::root(image, &root)?;
    let built = oci_archive(image, work.path(), &root)?;
    fs::rename(built, &archive)?;
    Ok(archive)
}

/// The root file system of an image in a folder of its own, for runtimes that
/// are called without containerd.
pub fn root(image: Image, root: &Path) -> Result<()> {
    fs::create_dir(root)?;
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    image.fill(root).with_context(|| format!("fill image {}", image.name()))
}

fn outdated(archive: &Path, source: Option<&Path>) -> Result<bool> {
    let Ok(made) = archive.metadata() else { return Ok(true) };
    let Some(source) = source else { return Ok(false) };
    Ok(source.metadata()?.modified()? > made.modified()?)
}

// --- root file systems ---------------------------------------------------

/// Folders, users and busybox under all its names.
fn base(root: &Path) -> Result<()> {
    for dir in [
        "bin", "sbin", "usr/bin", "usr/sbin", "usr/lib", "lib64", "etc", "proc", "sys", "dev",
        "run", "var/run", "var/lib", "root", "data", "home",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::create_dir(root.join("tmp"))?;
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    symlink("usr/lib", root.join("lib"))?;
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    let busybox = root.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).context("copy busybox (Debian: busybox-static)")?;
    for applet in output(Command::new(&busybox).arg("--list"))?.split_whitespace() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    Ok(())
}

/// A program with the libraries it names.
fn program(root: &Path, from: &Path, to: &str) -> Result<()> {
    copy(from, &root.join(to))?;
    libraries(root, from)
}

fn libraries(root: &Path, of: &Path) -> Result<()> {
    let named = output(Command::new("ldd").arg(of))?;
    let paths: BTreeSet<_> =
        named.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in paths {
        let target = root.join(library.trim_start_matches('/'));
        if !target.exists() {
            copy(Path::new(library), &target)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn python(root: &Path) -> Result<()> {
    let python = fs::canonicalize("/usr/bin/python3").context("Debian's python3")?;
    let version = python.file_name().context("python3's own name")?.to_string_lossy().into_owned();
    program(root, &python, &format!("usr/bin/{version}"))?;
    symlink(&version, root.join("usr/bin/python3"))?;
    let (from, to) = (format!("/usr/lib/{version}"), root.join("usr/lib").join(&version));
    fs::create_dir_all(&to)?;
    // Without the parts that are large and that no test asks for.
    let left_out =
        ["__pycache__", "test", "idlelib", "ensurepip", "dist-packages", "config-*", "lib2to3"];
    let exclude: Vec<_> = left_out.iter().map(|name| format!("--exclude={name}")).collect();
    let mut packing = Command::new("tar")
        .args(&exclude)
        .args(["-C", &from, "-cf", "-", "."])
        .stdout(Stdio::piped())
        .spawn()
        .context("run tar")?;
    let packed = packing.stdout.take().context("output of tar")?;
    succeed(Command::new("tar").arg("-C").arg(&to).args(["-xf", "-"]).stdin(packed))?;
    if !packing.wait()?.success() {
        bail!("tar could not read {from}");
    }
    if let Ok(modules) = fs::read_dir(to.join("lib-dynload")) {
        for module in modules {
            libraries(root, &module?.path())?;
        }
    }
    Ok(())
}

/// Where Debian has it: it looks for its other parts from there.
fn postgres(root: &Path) -> Result<()> {
    let versions = fs::read_dir("/usr/lib/postgresql").context("Debian's postgresql")?;
    let installed = versions
        .filter_map(|version| version.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| {
            Path::new(&format!("/usr/lib/postgresql/{version}/bin/postgres")).exists()
        });
    let version = installed.max().context("Debian's postgresql")?;
    let home = format!("usr/lib/postgresql/{version}");
    for name in ["postgres", "initdb", "psql", "pg_amcheck"] {
        let path = format!("{home}/bin/{name}");
        program(root, &Path::new("/").join(&path), &path)?;
        symlink(Path::new("/").join(&path), root.join("usr/bin").join(name))?;
    }
    for module in ["plpgsql.so", "dict_snowball.so", "amcheck.so"] {
        let path = format!("{home}/lib/{module}");
        copy(&Path::new("/").join(&path), &root.join(&path))?;
    }
    let share = format!("usr/share/postgresql/{version}");
    fs::create_dir_all(root.join("usr/share/postgresql"))?;
    succeed(
        Command::new("cp")
            .arg("-rL")
            .arg(Path::new("/").join(&share))
            .arg(root.join("usr/share/postgresql")),
    )?;
    let zone = "usr/share/zoneinfo/Etc/UTC";
    copy(&Path::new("/").join(zone), &root.join(zone))?;
    copy(&Path::new("/").join(zone), &root.join("etc/localtime"))?;
    let data = root.join("var/lib/postgresql");
    fs::create_dir_all(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o1777))?;
    let mut users = fs::OpenOptions::new().append(true).open(root.join("etc/passwd"))?;
    writeln!(users, "postgres:x:70:70::/var/lib/postgresql:/bin/sh")?;
    Ok(())
}

/// A pause container's only program: waits for a signal and reaps.
fn pause(root: &Path) -> Result<()> {
    const SOURCE: &str = r"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) {
    signal(SIGINT, end);
    signal(SIGTERM, end);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
";
    let mut gcc = Command::new("gcc")
        .args(["-O1", "-static", "-s", "-xc", "-", "-o"])
        .arg(root.join("pause"))
        .stdin(Stdio::piped())
        .spawn()
        .context("run gcc")?;
    gcc.stdin.take().context("input of gcc")?.write_all(SOURCE.as_bytes())?;
    if !gcc.wait()?.success() {
        bail!("gcc could not compile the pause program");
    }
    Ok(())
}

/// A program of the harness's own, built beside it.
fn ours(name: &str) -> Option<PathBuf> {
    let dir = locate::bin_dir().ok()?;
    Some(dir.join(name)).filter(|path| path.exists())
}

// --- the archive -------------------------------------------------------------

/// Packs `root` as an OCI image layout in a tar file.
fn oci_archive(image: Image, work: &Path, root: &Path) -> Result<PathBuf> {
    let layout = work.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer_tar = work.join("layer.tar");
    // The same bytes whenever and by whomever it is built.
    succeed(
        Command::new("tar")
            .args([
                "--sort=name",
                "--mtime=@0",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
                "--format=pax",
            ])
            .args(["--pax-option=delete=atime,delete=ctime", "-cf"])
            .arg(&layer_tar)
            .arg("-C")
            .arg(root)
            .arg("."),
    )?;
    let layer = fs::read(&layer_tar)?;
    let blob = |bytes: &[u8], kind: &str| -> Result<serde_json::Value> {
        let hash = hex(&Sha256::digest(bytes));
        fs::write(blobs.join(&hash), bytes)?;
        let kind = format!("application/vnd.oci.image.{kind}");
        Ok(json!({"mediaType": kind, "digest": format!("sha256:{hash}"), "size": bytes.len()}))
    };
    let layer = blob(&layer, "layer.v1.tar")?;
    let config = json!({
        "created": "2024-01-01T00:00:00Z", "architecture": architecture(), "os": "linux",
        "config": image.config(),
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        "history": [{"created": "2024-01-01T00:00:00Z"}],
    });
    let config = blob(&serde_json::to_vec(&config)?, "config.v1+json")?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer],
    });
    let mut manifest = blob(&serde_json::to_vec(&manifest)?, "manifest.v1+json")?;
    let reference = image.reference();
    let tag = reference.rsplit(':').next().unwrap_or_default();
    manifest["annotations"] =
        json!({"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": tag});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(layout.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let path = |descriptor: &serde_json::Value| {
        descriptor["digest"].as_str().unwrap_or_default().replace("sha256:", "blobs/sha256/")
    };
    let docker =
        json!([{"Config": path(&config), "RepoTags": [reference], "Layers": [path(&layer)]}]);
    fs::write(layout.join("manifest.json"), serde_json::to_vec(&docker)?)?;
    let archive = work.join("image.tar");
    succeed(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&layout).args([
        "oci-layout",
        "index.json",
        "manifest.json",
        "blobs",
    ]))?;
    Ok(archive)
}

fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("run {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
