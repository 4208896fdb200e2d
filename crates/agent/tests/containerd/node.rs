//! A real containerd for one test, in namespaces of its own.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use transship_agent::{containerd::Containerd, daemon::Daemon};

/// Set in the copy of the test that has namespaces of its own.
const PRIVATE: &str = "TRANSSHIP_TEST_IS_PRIVATE";
/// A first start of containerd on a busy machine.
const STARTS_WITHIN: Duration = Duration::from_secs(60);

/// Runs the calling test in mount and pid namespaces of its own, with an empty
/// `/run`: whatever it starts ends with it, and it meets nobody's containerd.
/// True in the copy that shall do the work.
pub fn in_private() -> bool {
    if std::env::var_os(PRIVATE).is_some() {
        return true;
    }
    if let Some(why) = cannot_run() {
        // Past the test harness, which would keep it to itself.
        let _ = writeln!(std::io::stderr(), "\nSKIPPED, nothing was tested: {why}\n");
        return false;
    }
    let test = std::thread::current().name().expect("tests have names").to_owned();
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "sh", "-c", r#"mount -t tmpfs tmpfs /run && exec "$0" "$@""#])
        .arg(std::env::current_exe().expect("our own path"))
        .args(["--exact", "--nocapture", &test])
        .env(PRIVATE, "1")
        .stdin(Stdio::null())
        .status()
        .expect("run unshare");
    assert!(status.success(), "{test} failed in its namespaces (its output is above)");
    false
}

fn cannot_run() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root".into());
    }
    let needed = ["containerd", "ctr", "runc", "containerd-shim-runc-v2", "busybox", "unshare"];
    needed.iter().find(|&&program| find(program).is_none()).map(|p| format!("{p} is missing"))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.exists())
}

pub struct Node {
    dir: TempDir,
    socket: PathBuf,
    child: Child,
    pub daemon: Containerd,
}

impl Node {
    pub async fn start() -> Node {
        let dir = TempDir::with_prefix("transship-agent-test-").expect("make a directory");
        let socket = dir.path().join("containerd.sock");
        let config = dir.path().join("config.toml");
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]\n\
             [grpc]\naddress = {socket:?}\n",
            root = dir.path().join("root"),
            state = dir.path().join("state"),
        );
        fs::write(&config, text).expect("write the configuration");
        let daemon = Containerd::at(&socket);
        let child = spawn(dir.path());
        let node = Node { dir, socket, child, daemon };
        node.wait_until_it_answers().await;
        node
    }

    async fn wait_until_it_answers(&self) {
        let end = Instant::now() + STARTS_WITHIN;
        while let Err(error) = self.daemon.version().await {
            assert!(Instant::now() < end, "containerd does not start: {error}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The shims and their containers live on.
    pub fn kill_containerd(&mut self) {
        self.child.kill().expect("kill containerd");
        self.child.wait().expect("wait for containerd");
    }

    pub async fn start_containerd(&mut self) {
        self.child = spawn(self.dir.path());
        self.wait_until_it_answers().await;
    }

    /// The end of containerd's log, for failures.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// What `ctr` prints; a failure of it is a failure of the test.
    pub fn ctr(&self, arguments: &str) -> String {
        self.ctr_in("default", arguments)
    }

    pub fn ctr_in(&self, namespace: &str, arguments: &str) -> String {
        let output = self.run_ctr(namespace, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments}: {error}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn run_ctr(&self, namespace: &str, arguments: &str) -> std::process::Output {
        Command::new("ctr")
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", namespace])
            .args(arguments.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .expect("run ctr")
    }

    /// The status of a task, as `ctr task ls` prints it.
    pub fn task_status(&self, id: &str) -> Option<String> {
        let table = self.ctr("tasks ls");
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(id))?;
        line.split_whitespace().last().map(str::to_owned)
    }

    pub fn wait_for_status(&self, id: &str, wanted: &str) {
        wait_until(&format!("{id} {wanted}"), || self.task_status(id).as_deref() == Some(wanted));
    }

    /// Returns when the garbage collector has been through: it runs when a
    /// lease ends, and `--sync` waits for it.
    pub fn collect_garbage(&self) {
        self.ctr("leases create --id collect");
        self.ctr("leases delete --sync collect");
    }

    pub fn stop(&self, id: &str) {
        self.ctr(&format!("tasks kill --signal SIGKILL {id}"));
        self.wait_for_status(id, "STOPPED");
    }

    /// Everything that could be left behind, in containerd and on disk.
    pub fn inventory(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let namespaces = self.ctr("namespaces ls -q");
        for namespace in namespaces.split_whitespace() {
            for list in [
                "content ls -q",
                "content active",
                "snapshots ls",
                "images ls -q",
                "containers ls -q",
                "tasks ls -q",
                "leases ls -q",
            ] {
                all.insert(format!("{namespace}: {list}"), self.ctr_in(namespace, list));
            }
        }
        all.insert("namespaces".into(), namespaces);
        let root = self.dir.path().join("root");
        for (name, place) in [
            ("blobs", root.join("io.containerd.content.v1.content/blobs/sha256")),
            ("ingests", root.join("io.containerd.content.v1.content/ingest")),
            ("layers", root.join("io.containerd.snapshotter.v1.overlayfs/snapshots")),
            ("bundles", self.dir.path().join("state/io.containerd.runtime.v2.task/default")),
            ("fifos", "/run/transship/fifo".into()),
        ] {
            all.insert(name.into(), names_in(&place));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        let here = self.dir.path().to_string_lossy().into_owned();
        let ours: Vec<_> = mounts.lines().filter(|line| line.contains(&here)).collect();
        all.insert("mounts".into(), ours.len().to_string());
        all
    }
}

fn spawn(directory: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(directory.join("log"));
    Command::new("containerd")
        .arg("--config")
        .arg(directory.join("config.toml"))
        .stdout(Stdio::null())
        .stderr(log.expect("make the log"))
        .spawn()
        .expect("start containerd")
}

/// Ends what still runs, so that no control group stays behind; processes end
/// with the namespace anyway.
impl Drop for Node {
    fn drop(&mut self) {
        let output = self.run_ctr("default", "tasks ls -q");
        for id in String::from_utf8_lossy(&output.stdout).split_whitespace() {
            self.run_ctr("default", &format!("tasks rm --force {id}"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn names_in(directory: &Path) -> String {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names.join(" ")
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// An image for `ctr image import`: busybox and, in a compressed second layer,
/// `/etc/version` with `version` in it. Its index lists another platform
/// first, of which nothing is there.
pub fn image(directory: &Path, name: &str, version: &str) -> PathBuf {
    let mut layout = Layout::new(&directory.join(format!("layout-{version}")));
    if layout.archive().exists() {
        return layout.archive();
    }
    let base = directory.join(format!("base-{version}"));
    for place in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
        fs::create_dir_all(base.join(place)).expect("make a root file system");
    }
    fs::copy(find("busybox").expect("busybox"), base.join("bin/busybox")).expect("copy busybox");
    for applet in ["sh", "sleep", "echo", "cat"] {
        symlink("busybox", base.join("bin").join(applet)).expect("link an applet");
    }
    let top = directory.join(format!("top-{version}"));
    fs::create_dir_all(top.join("etc")).expect("make a layer");
    fs::write(top.join("etc/version"), version).expect("write a version");

    let (plain, gzipped) = (tar(&base, false), tar(&top, true));
    let diff_ids = [digest(&plain), digest(&tar(&top, false))];
    let config = format!(
        r#"{{"architecture":"{ARCHITECTURE}","os":"linux","config":{{"Cmd":["sh"]}},
            "rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        diff_ids[0], diff_ids[1]
    );
    let config = layout.add("application/vnd.oci.image.config.v1+json", config.as_bytes());
    let layers = [
        layout.add("application/vnd.oci.image.layer.v1.tar", &plain),
        layout.add("application/vnd.oci.image.layer.v1.tar+gzip", &gzipped),
    ];
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{media_type}","config":{{{config}}},
            "layers":[{{{}}},{{{}}}]}}"#,
        layers[0], layers[1]
    );
    let manifest = layout.add(media_type, manifest.as_bytes());
    let absent = describe(media_type, &digest(b"absent"), 6);
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{media_type}","manifests":[
            {{{absent},"platform":{{"os":"linux","architecture":"s390x"}}}},
            {{{manifest},"platform":{{"os":"linux","architecture":"{ARCHITECTURE}"}}}}]}}"#
    );
    let index = layout.add(media_type, index.as_bytes());
    layout.finish(&format!(
        r#"{{"schemaVersion":2,"manifests":[
            {{{index},"annotations":{{"io.containerd.image.name":"{name}"}}}}]}}"#
    ))
}

const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// An OCI image layout.
struct Layout(PathBuf);

impl Layout {
    fn new(directory: &Path) -> Self {
        fs::create_dir_all(directory.join("blobs/sha256")).expect("make a layout");
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("write oci-layout");
        Self(directory.to_owned())
    }

    /// Returns the inside of its descriptor.
    fn add(&mut self, media_type: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let file = self.0.join("blobs").join(digest.replace(':', "/"));
        fs::write(file, bytes).expect("write a blob");
        describe(media_type, &digest, bytes.len())
    }

    fn finish(self, index: &str) -> PathBuf {
        fs::write(self.0.join("index.json"), index).expect("write index.json");
        fs::write(self.archive(), tar(&self.0, false)).expect("write the archive");
        self.archive()
    }

    fn archive(&self) -> PathBuf {
        self.0.with_extension("tar")
    }
}

fn describe(media_type: &str, digest: &str, size: usize) -> String {
    format!(r#""mediaType":"{media_type}","digest":"{digest}","size":{size}"#)
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

fn tar(directory: &Path, gzip: bool) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"])
        .args(gzip.then_some("--gzip"))
        .args(["--create", "--directory"])
        .arg(directory)
        .arg(".")
        .output()
        .expect("run tar");
    assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
