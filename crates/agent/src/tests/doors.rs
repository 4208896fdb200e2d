//! Local sockets: their modes, and who is refused when the modes are not
//! what they were.

use std::{
    env, fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transship_api::{control::ListRequest, control_ttrpc::AgentClient};
use ttrpc::{asynchronous::Client, context};

use super::world::{Side, World};

/// Where the stranger goes.
const VISIT: &str = "TRANSSHIP_TEST_VISIT";
/// A member of the group, and of nothing else.
const NOBODY: u32 = 65534;
const GROUP: u32 = 4242;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn runtime(side: &Side) -> PathBuf {
    side.node.places.runtime.clone()
}

#[tokio::test]
async fn sockets_and_their_directory_are_roots_alone() {
    let world = World::new().await;
    let run = runtime(&world.a);
    assert_eq!(mode(&run), 0o700);
    for socket in ["agent.sock", "arrivals.sock"] {
        assert_eq!(mode(&run.join(socket)), 0o600, "{socket}");
    }
    let state = world.a.node.places.state.join("migrations");
    assert_eq!(mode(&state), 0o700);
}

#[tokio::test]
async fn a_group_gets_to_the_control_socket_and_to_nothing_else() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root can give a socket to a group");
    }
    let world = World::new().await;
    let group = Some(GROUP.to_string());
    let c = Side::new(&world.dir, "c", |config| config.control.group = group).await;
    let run = runtime(&c);
    assert_eq!((mode(&run), fs::metadata(&run).unwrap().gid()), (0o710, GROUP));
    for entry in fs::read_dir(&run).unwrap() {
        let path = entry.unwrap().path();
        match path.file_name().unwrap().to_str().unwrap() {
            "agent.sock" => {
                assert_eq!((mode(&path), fs::metadata(&path).unwrap().gid()), (0o660, GROUP));
            }
            _ => assert_eq!(mode(&path) & 0o077, 0, "{}", path.display()),
        }
    }
    // The way there is the test's own.
    for dir in [world.dir.path(), run.parent().unwrap()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let said = visit(&world, &run, &[GROUP]).await;
    assert!(said.contains("listed 0") && said.contains("arrivals: Permission denied"), "{said}");
    let said = visit(&world, &run, &[]).await;
    assert!(said.contains("not reached") && !said.contains("listed"), "{said}");
}

#[tokio::test]
async fn a_stranger_is_refused_whatever_the_modes() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root can send a stranger");
    }
    let world = World::new().await;
    let run = runtime(&world.a);
    for path in [world.dir.path(), run.parent().unwrap(), &run] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    for socket in ["agent.sock", "arrivals.sock"] {
        fs::set_permissions(run.join(socket), fs::Permissions::from_mode(0o666)).unwrap();
    }
    let said = visit(&world, &run, &[]).await;
    assert!(said.contains("this is for root alone"), "{said}");
    assert!(said.contains("not-allowed"), "with its code: {said}");
    assert!(said.contains("arrivals: ") && said.contains("is for root alone"), "{said}");
    assert!(!said.contains("listed"), "{said}");
}

/// This test program again, as somebody else; answers what they met.
async fn visit(world: &World, run: &Path, groups: &[u32]) -> String {
    let program = world.dir.path().join("visitor");
    let own = env::current_exe().unwrap();
    if fs::hard_link(&own, &program).is_err() && !program.exists() {
        fs::copy(&own, &program).unwrap();
    }
    let mut visitor = Command::new(program);
    visitor.args(["--exact", "tests::doors::visitor", "--nocapture"]).env(VISIT, run);
    // The primary group stands for any: which are supplementary is set only
    // by what is not stable yet.
    visitor.uid(NOBODY).gid(groups.first().copied().unwrap_or(NOBODY)).current_dir("/");
    let output = tokio::task::spawn_blocking(move || visitor.output().unwrap()).await.unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Does nothing unless it was sent.
#[tokio::test]
async fn visitor() {
    let Some(run) = env::var_os(VISIT).map(PathBuf::from) else { return };
    match Client::connect(&format!("unix://{}", run.join("agent.sock").display())).await {
        Err(error) => println!("not reached: {error}"),
        Ok(client) => {
            let client = AgentClient::new(client);
            match client.list(context::with_timeout(0), &ListRequest::default()).await {
                Ok(list) => println!("listed {}", list.containers.len()),
                Err(error) => println!("{error:?} {}", details(&error)),
            }
        }
    }
    let arrivals = async {
        let mut socket = tokio::net::UnixStream::connect(run.join("arrivals.sock")).await?;
        socket.write_all(&[b'0'; 32]).await?;
        let mut said = String::new();
        socket.read_to_string(&mut said).await.map(|_| said)
    };
    match arrivals.await {
        Ok(said) => println!("arrivals: {said}"),
        Err(error) => println!("arrivals: {error}"),
    }
}

fn details(error: &ttrpc::Error) -> String {
    let ttrpc::Error::RpcStatus(status) = error else { return String::new() };
    status.details.iter().map(|any| String::from_utf8_lossy(&any.value).into_owned()).collect()
}
