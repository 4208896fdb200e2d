//! The control socket's door: who comes in, and what the others are told.
//!
//! The socket is root's alone, or also a group's if the configuration names
//! one. Its mode says so to the kernel; this asks the kernel who has come, in
//! case the mode has been changed.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

use async_trait::async_trait;
use futures::stream;
use nix::unistd::{Gid, Group, chown};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use transship_api::{
    control::{
        CancelRequest, CancelResponse, CheckRequest, CheckResponse, LimitRequest, LimitResponse,
        ListRequest, ListResponse, MigrateEvent, MigrateRequest, PlanRequest, PlanResponse,
        ResolveRequest, ResolveResponse, StatusRequest, StatusResponse, VersionRequest,
        VersionResponse,
    },
    control_ttrpc,
};
use transship_link::local::Peer;
use transship_types::Code;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext, transport::Listener};

use crate::{control::status, failure::Failure, node::Node};

/// On their way from the door to a server, which takes them at once.
const QUEUE: usize = 16;

/// The group that the configuration names, by its name or its number.
pub fn group(named: &str) -> io::Result<Gid> {
    if let Ok(number) = named.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(named)? {
        Some(group) => Ok(group.gid),
        None => Err(io::Error::new(io::ErrorKind::NotFound, format!("no group {named:?}"))),
    }
}

/// Lets a group through to the socket, and to nothing else: whatever lies
/// beside it is root's by its own mode.
pub fn open_to(group: Gid, socket: &Path, dir: &Path) -> io::Result<()> {
    for (path, mode) in [(socket, 0o660), (dir, 0o710)] {
        chown(path, None, Some(group))?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Who may come in, and who may not: for a server each.
pub fn sort(node: &Arc<Node>, listener: UnixListener, group: Option<Gid>) -> (Listener, Listener) {
    let (admitted, inside) = mpsc::channel(QUEUE);
    let (refused, outside) = mpsc::channel(QUEUE);
    let shutdown = node.shutdown.clone();
    node.tasks.spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return,
            };
            let sent = match accepted {
                Err(error) => admitted.send(Err(error)).await.is_ok(),
                Ok((stream, _)) => match Peer::enters(&stream, group.map(Gid::as_raw)) {
                    Ok(_) => admitted.send(Ok(stream)).await.is_ok(),
                    Err(stranger) => {
                        tracing::warn!(%stranger, "refused at the control socket");
                        // They must not be in anybody's way.
                        let _ = refused.try_send(Ok(stream));
                        true
                    }
                },
            };
            if !sent {
                return;
            }
        }
    });
    (listen(inside), listen(outside))
}

fn listen(queue: mpsc::Receiver<io::Result<UnixStream>>) -> Listener {
    Listener::new(stream::unfold(queue, |mut queue| async {
        let stream = queue.recv().await?;
        Some((stream, queue))
    }))
}

/// The service for those who may not use it.
pub struct Refused {
    /// Who may.
    pub group: Option<String>,
}

impl Refused {
    fn why(&self) -> ttrpc::Error {
        let (who, remedy) = match &self.group {
            Some(group) => (format!("root and the group {group}"), "run it as one of them"),
            None => ("root".into(), "run it as root"),
        };
        status(&Failure::new(Code::NotAllowed, format!("this is for {who} alone"), remedy))
    }
}

macro_rules! refused {
    ($($method:ident: $request:ty => $response:ty,)*) => {
        #[async_trait]
        impl control_ttrpc::Agent for Refused {
            $(async fn $method(&self, _: &TtrpcContext, _: $request) -> ttrpc::Result<$response> {
                Err(self.why())
            })*

            async fn migrate(
                &self,
                _: &TtrpcContext,
                _: MigrateRequest,
                _: ServerStreamSender<MigrateEvent>,
            ) -> ttrpc::Result<()> {
                Err(self.why())
            }
        }
    };
}

refused! {
    version: VersionRequest => VersionResponse,
    check: CheckRequest => CheckResponse,
    list: ListRequest => ListResponse,
    status: StatusRequest => StatusResponse,
    cancel: CancelRequest => CancelResponse,
    resolve: ResolveRequest => ResolveResponse,
    limit: LimitRequest => LimitResponse,
    plan: PlanRequest => PlanResponse,
}
