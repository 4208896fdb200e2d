//! The verb `start`: a server for the container, or the one of its pod.
//!
//! The socket is bound here and handed to the server by the fork, so that
//! containerd can connect as soon as it has the address, and nobody waits for
//! the server to come up.

use std::{
    env, fs,
    io::{self, IsTerminal, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
};

use containerd_shim::{
    Flags, StartOpts,
    bootstrap::{BootstrapParams, BootstrapResult},
    cgroup::adjust_oom_score,
};
use containerd_shim_protos::{
    TASK_API_VERSION,
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid},
};

use crate::{
    cgroup,
    container::Head,
    error::{Error, Result},
    options::RuntimeOptions,
    pod::{GROUP_ANNOTATIONS, answers},
    server, sys,
};

/// Upper bound of what containerd pipes in, the same as its own.
const INPUT_LIMIT: u64 = 10 << 20;
/// File in the bundle with the server's address, as containerd's shim has it.
const ADDRESS_FILE: &str = "address";

pub fn start(flags: &Flags) -> Result<()> {
    let input = read_stdin()?;
    let (start, reply) = parameters(&input, flags)?;
    let bundle = env::current_dir().map_err(Error::io("find the bundle"))?;
    let options = RuntimeOptions::decode(start.extensions.first())?;
    if let Some(address) = elsewhere(&options)? {
        return answer(&address, reply);
    }
    let address = start.socket_address(&group(&bundle, &flags.id)?);
    let socket = socket_path(&address);
    let address_file = bundle.join(ADDRESS_FILE);
    fs::write(&address_file, &address)
        .map_err(Error::io(format!("write {}", address_file.display())))?;
    let Some(listener) = bind(&socket)? else {
        // The pod's shim serves there already.
        return answer(&address, reply);
    };
    let served = fork_server(&start, &options, bundle, socket.clone(), listener);
    if served.is_err() {
        let _ = fs::remove_file(&socket);
    }
    served.and_then(|()| answer(&address, reply))
}

/// The verb `-info`: what this runtime is.
pub fn info() -> Result<()> {
    let _options = read_stdin()?;
    let info = RuntimeInfo {
        name: transship_types::RUNTIME.into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(Error::other("encode the runtime's description"))?;
    io::stdout().write_all(&bytes).map_err(Error::io("write the runtime's description"))
}

/// How containerd wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    /// Up to 2.2: a bare address, which means version 2 of the Task API to
    /// every containerd. (A JSON answer may name version 3, but 1.7 refuses
    /// that, and nothing tells the two apart.)
    Address,
    /// From 2.3: a protobuf message, which may name version 3.
    Message,
}

fn parameters(input: &[u8], flags: &Flags) -> Result<(StartOpts, Reply)> {
    // An `Any` decodes as BootstrapParams too, with its type as the id.
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && params.instance_id == flags.id
        && params.namespace == flags.namespace
    {
        return Ok((params.into(), Reply::Message));
    }
    let variable = |name| env::var(name).unwrap_or_default();
    let ttrpc_address = variable("TTRPC_ADDRESS");
    if ttrpc_address.is_empty() {
        return Err(Error::InvalidArgument(
            "TTRPC_ADDRESS is not set: containerd's socket for events is unknown".into(),
        ));
    }
    let options = Any::parse_from_bytes(input).map_err(|error| {
        Error::InvalidArgument(format!("decode the options on standard input: {error}"))
    })?;
    let address =
        if flags.address.is_empty() { variable("GRPC_ADDRESS") } else { flags.address.clone() };
    let start = StartOpts {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        publish_binary: flags.publish_binary.clone(),
        address,
        ttrpc_address,
        debug: flags.debug,
        extensions: if options.type_url.is_empty() { Vec::new() } else { vec![options] },
        ..Default::default()
    };
    Ok((start, Reply::Address))
}

fn read_stdin() -> Result<Vec<u8>> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(INPUT_LIMIT)
            .read_to_end(&mut input)
            .map_err(Error::io("read standard input"))?;
    }
    Ok(input)
}

/// A sandbox may offer its own Task API; then no server is needed here.
fn elsewhere(options: &RuntimeOptions) -> Result<Option<String>> {
    let address = &options.task_api_address;
    if address.is_empty() {
        return Ok(None);
    }
    let path = address.strip_prefix("ttrpc+").unwrap_or(address);
    if !path.starts_with("unix://") || ![0, 2, 3].contains(&options.task_api_version) {
        return Err(Error::InvalidArgument(format!(
            "task API {address} version {} cannot be used; a ttrpc unix socket with version 2 \
             or 3 can",
            options.task_api_version
        )));
    }
    if !answers(&socket_path(path)) {
        return Err(Error::FailedPrecondition(format!("nobody serves the task API at {address}")));
    }
    Ok(Some(path.to_owned()))
}

/// Containers with equal group share a shim.
fn group(bundle: &Path, id: &str) -> Result<String> {
    let annotations = Head::read(bundle)?.annotations;
    let group = GROUP_ANNOTATIONS.iter().find_map(|name| annotations.get(*name));
    Ok(group.cloned().unwrap_or_else(|| id.to_owned()))
}

pub fn socket_path(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap_or(address).into()
}

/// None: somebody serves there.
fn bind(socket: &Path) -> Result<Option<UnixListener>> {
    let doing = || format!("listen on {}", socket.display());
    if let Some(parent) = socket.parent() {
        fs::create_dir_all(parent).map_err(Error::io(format!("make {}", parent.display())))?;
    }
    let listener = match UnixListener::bind(socket) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if answers(socket) {
                return Ok(None);
            }
            // Left by a server that died.
            fs::remove_file(socket).map_err(Error::io(format!("remove {}", socket.display())))?;
            UnixListener::bind(socket).map_err(Error::io(doing()))?
        }
        Err(error) => return Err(Error::io(doing())(error)),
    };
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).map_err(Error::io(doing()))?;
    Ok(Some(listener))
}

fn fork_server(
    start: &StartOpts,
    options: &RuntimeOptions,
    bundle: PathBuf,
    socket: PathBuf,
    listener: UnixListener,
) -> Result<()> {
    match sys::fork_single_threaded().map_err(Error::io("fork the server"))? {
        None => {
            let code = match become_server(start.debug).and_then(|()| {
                server::serve(server::Setup {
                    namespace: start.namespace.clone(),
                    events: start.ttrpc_address.clone(),
                    bundle,
                    socket,
                    listener,
                })
            }) {
                Ok(()) => 0,
                Err(error) => {
                    tracing::error!(error = error.sentence(), "the shim ends");
                    1
                }
            };
            std::process::exit(code)
        }
        Some(child) => {
            let confined = confine(child.as_raw() as u32, &options.shim_cgroup);
            if confined.is_err() {
                let _ = kill(child, Signal::SIGKILL);
            }
            confined
        }
    }
}

/// Into the cgroup that the options want, and to be killed before containerd
/// when memory is short.
fn confine(server: u32, shim_cgroup: &str) -> Result<()> {
    if !shim_cgroup.is_empty() {
        cgroup::join(shim_cgroup, server)?;
    }
    adjust_oom_score(server).map_err(Error::other("raise the shim's OOM score"))
}

/// Away from containerd's session and from the pipe that it reads to the end.
fn become_server(debug: bool) -> Result<()> {
    let detach = || -> io::Result<()> {
        setsid()?;
        if env::var_os("SCHED_CORE").is_some_and(|on| !on.is_empty()) {
            sys::new_core_cookie()?;
        }
        let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        Ok(())
    };
    detach().map_err(Error::io("detach the server"))?;
    server::log(debug);
    Ok(())
}

fn answer(address: &str, reply: Reply) -> Result<()> {
    let bytes = match reply {
        Reply::Address => address.as_bytes().to_vec(),
        Reply::Message => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(Error::other("encode the answer to start"))?,
    };
    let mut stdout = io::stdout();
    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(Error::io("answer containerd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_nobody_serves_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s/sock");
        let first = bind(&socket).unwrap().expect("a free address");
        assert!(bind(&socket).unwrap().is_none(), "it is served");
        drop(first);
        assert!(bind(&socket).unwrap().is_some(), "its server died");
    }

    #[test]
    fn a_pod_is_found_by_its_annotations() {
        let dir = tempfile::tempdir().unwrap();
        for (annotations, wanted) in [
            ("{}", "own"),
            (r#"{"io.kubernetes.cri.sandbox-id":"pod"}"#, "pod"),
            (
                r#"{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"group"}"#,
                "group",
            ),
        ] {
            let spec = format!(r#"{{"annotations":{annotations}}}"#);
            fs::write(dir.path().join("config.json"), spec).unwrap();
            assert_eq!(group(dir.path(), "own").unwrap(), wanted);
        }
    }

    #[test]
    fn a_foreign_task_api_must_be_one_we_can_name() {
        let options = |address: &str, version| RuntimeOptions {
            task_api_address: address.into(),
            task_api_version: version,
            ..Default::default()
        };
        assert_eq!(elsewhere(&options("", 0)).unwrap(), None);
        for bad in [options("grpc+vsock://3:1", 3), options("unix:///x", 7)] {
            assert!(matches!(elsewhere(&bad), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("task.sock");
        let address = format!("ttrpc+unix://{}", socket.display());
        let here = options(&address, 3);
        assert!(matches!(elsewhere(&here), Err(Error::FailedPrecondition(_))));
        let _served = UnixListener::bind(&socket).unwrap();
        let wanted = format!("unix://{}", socket.display());
        assert_eq!(elsewhere(&here).unwrap(), Some(wanted));
    }
}
