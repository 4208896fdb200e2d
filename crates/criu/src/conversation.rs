//! One DUMP or RESTORE, seen and steered from the middle.
//!
//! ```text
//!  Requested ──release──▶ Talking ──until(script)──▶ Held
//!      │                   ▲  │                        │
//!    amend                 │  └──final answer──▶ Ended │
//!                          └──pass · acknowledge───────┘
//! ```
//!
//! Dropping a conversation closes both ends. CRIU that waits in a notification
//! then undoes what it did: the container of a dump runs on, with its network
//! unlocked; a restored tree is killed. Nothing is ever killed to stop CRIU:
//! SIGKILL would leave its packet filter rules and its parasite behind.

use std::{
    fmt, fs,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use prost::Message;
use transship_api::criu::{CriuOpts, CriuReq, CriuReqType, CriuResp};

use crate::{
    Amendments, CriuError, Side,
    amend::opt,
    fields::{BadFields, Fields},
    gate::{GateDir, LIBRARY},
    log,
    packet::{Packet, Socket},
    stub::Hello,
};

/// What the runtime wants of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Dump,
    Restore,
}

impl Kind {
    pub(crate) fn of_request(number: i32) -> Option<Self> {
        match CriuReqType::try_from(number) {
            Ok(CriuReqType::Dump) => Some(Kind::Dump),
            Ok(CriuReqType::Restore) => Some(Kind::Restore),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Dump => "dump",
            Kind::Restore => "restore",
        })
    }
}

/// A notification that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notified {
    pub script: String,
    /// The restored init, in our pid namespace, where CRIU says it.
    pub pid: Option<i32>,
}

/// CRIU's final answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    pub success: bool,
    /// The restored init.
    pub pid: Option<i32>,
    pub errno: Option<i32>,
    pub message: Option<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.success {
            return f.write_str("it succeeded");
        }
        f.write_str("it failed")?;
        if let Some(errno) = self.errno.filter(|&errno| errno != 0) {
            write!(f, " ({})", nix::errno::Errno::from_raw(errno).desc())?;
        }
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        Ok(())
    }
}

pub struct Conversation {
    kind: Kind,
    runtime: Socket,
    criu: Socket,
    criu_pid: i32,
    moved: Hello,
    dir: Arc<GateDir>,
    options: CriuOpts,
    state: State,
    /// Descriptors the request names, open here until CRIU is done.
    kept: Vec<OwnedFd>,
    /// The runtime wants notifications. crun does so for a restore only; then
    /// we answer in its place.
    runtime_listens: bool,
    /// The last script seen; says in an error how far CRIU had come.
    last: String,
    /// `post-dump` was answered yes: the tasks die, whoever goes away now.
    decided: bool,
}

enum State {
    Requested { request: Fields, descriptors: Vec<OwnedFd> },
    Talking,
    Held(Packet),
    Ended(Outcome),
}

// Field numbers of `criu_req` and its parts (proto/criu.proto).
const REQ_TYPE: u32 = 1;
pub(crate) const REQ_OPTS: u32 = 2;
const RESP_NOTIFY: u32 = 5;
const NOTIFY_SCRIPT: u32 = 1;
const NOTIFY_PID: u32 = 2;
/// Only the type: the rest of a request is not ours to judge.
pub(crate) fn request_type(packet: &Packet) -> Result<i32, BadFields> {
    let fields = Fields::parse(&packet.bytes)?;
    fields.varint(REQ_TYPE).map(|number| number as i32).ok_or(BadFields::Missing)
}

impl Conversation {
    pub(crate) fn begin(
        kind: Kind,
        packet: Packet,
        runtime: Socket,
        criu: Socket,
        criu_pid: i32,
        moved: Hello,
        dir: Arc<GateDir>,
    ) -> Result<Self, CriuError> {
        let bad = |source| CriuError::Malformed { from: Side::Runtime, source };
        let request = Fields::parse(&packet.bytes).map_err(bad)?;
        let options = decode_options(&request).map_err(bad)?;
        let state = State::Requested { request, descriptors: packet.descriptors };
        let runtime_listens = options.notify_scripts();
        let last = "its request".into();
        let kept = Vec::new();
        Ok(Self {
            kind,
            runtime,
            criu,
            criu_pid,
            moved,
            dir,
            options,
            state,
            kept,
            runtime_listens,
            last,
            decided: false,
        })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// As the runtime sent them, with what was amended since.
    pub fn options(&self) -> &CriuOpts {
        &self.options
    }

    pub fn criu_pid(&self) -> i32 {
        self.criu_pid
    }

    /// Whether descriptors can be sent with the request: CRIU has been started
    /// with the library that takes them ([`Gate::hollow`](crate::Gate)).
    pub fn takes_descriptors(&self) -> bool {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.criu_pid));
        maps.is_ok_and(|maps| maps.lines().any(|line| line.ends_with(LIBRARY)))
    }

    /// Changes options of the request. Only before [`release`](Self::release):
    /// afterwards there is nothing left to change, and nothing happens.
    pub fn amend(&mut self, change: impl FnOnce(&mut Amendments<'_>)) {
        let State::Requested { request, descriptors } = &mut self.state else { return };
        let mut change = Some(change);
        let kept = &mut self.kept;
        // Parsed in `begin`; there is one `opts` because `begin` decoded it.
        let _ = request.edit_all(REQ_OPTS, |fields| {
            if let Some(change) = change.take() {
                change(&mut Amendments::new(fields, kept, descriptors));
            }
        });
        if let Ok(options) = decode_options(request) {
            self.options = options;
        }
    }

    /// Sends the request to CRIU.
    pub async fn release(&mut self) -> Result<(), CriuError> {
        let State::Requested { .. } = self.state else { return Ok(()) };
        let (runtime_pid, _) = self.runtime.peer().map_err(CriuError::talk(Side::Runtime))?;
        let replaced = self.open_what_the_runtime_names(runtime_pid)?;
        let moved = [(1, self.moved.stdout), (2, self.moved.stderr)];
        let State::Requested { mut request, descriptors } =
            std::mem::replace(&mut self.state, State::Talking)
        else {
            return Ok(());
        };
        request
            .edit_all(REQ_OPTS, |opts| {
                for (number, fd) in &replaced {
                    opts.set_int32(*number, *fd);
                }
                // Without it a dump could not be held nor refused.
                opts.set_varint(opt::NOTIFY_SCRIPTS, 1);
                // The numbers are CRIU's own; the stub moved two of them. A
                // malformed entry is CRIU's to refuse.
                let _ = opts.edit_all(opt::INHERIT_FD, |entry| {
                    let named = entry.varint(2).map(|number| number as i32);
                    if let Some((_, now)) = moved.iter().find(|(was, _)| Some(*was) == named) {
                        entry.set_int32(2, *now);
                    }
                });
            })
            .map_err(|source| CriuError::Malformed { from: Side::Runtime, source })?;
        let packet = Packet { bytes: request.encode(), descriptors };
        self.tell_criu(&packet).await
    }

    /// CRIU looks these up in `/proc/PID/fd` of its peer. That is us now, so
    /// they are opened here, unless an amendment put ours in already.
    fn open_what_the_runtime_names(
        &mut self,
        runtime_pid: i32,
    ) -> Result<Vec<(u32, i32)>, CriuError> {
        let State::Requested { request, .. } = &self.state else { return Ok(Vec::new()) };
        let opts = request.bytes(REQ_OPTS).unwrap_or_default();
        let opts = Fields::parse(opts)
            .map_err(|source| CriuError::Malformed { from: Side::Runtime, source })?;
        let mut replaced = Vec::new();
        for number in [opt::IMAGES_DIR_FD, opt::WORK_DIR_FD, opt::STATUS_FD] {
            let Some(named) = opts.varint(number).map(|fd| fd as i32).filter(|&fd| fd >= 0) else {
                continue;
            };
            if self.kept.iter().any(|own| own.as_raw_fd() == named) {
                continue;
            }
            let path = PathBuf::from(format!("/proc/{runtime_pid}/fd/{named}"));
            let own = fs::OpenOptions::new()
                .read(number != opt::STATUS_FD)
                .write(number == opt::STATUS_FD)
                .open(&path)
                .map_err(CriuError::file("opening the OCI runtime's", &path))?;
            replaced.push((number, own.as_raw_fd()));
            self.kept.push(own.into());
        }
        Ok(replaced)
    }

    /// Passes everything along until CRIU sends this notification, which is
    /// then held: CRIU waits and the runtime knows nothing of it.
    pub async fn until(&mut self, script: &str) -> Result<Notified, CriuError> {
        self.until_any(&[script]).await
    }

    /// The same for a dump, until every task stands still. CRIU says so by
    /// `network-lock`, which it does not send where it shares the container's
    /// network namespace, and always by the notification after that.
    pub async fn until_frozen(&mut self) -> Result<Notified, CriuError> {
        self.until_any(&["network-lock", "query-ext-files"]).await
    }

    async fn until_any(&mut self, scripts: &[&str]) -> Result<Notified, CriuError> {
        let awaited = || scripts.join(" or ");
        loop {
            match self.next().await? {
                Some(notified) if scripts.contains(&notified.script.as_str()) => {
                    return Ok(notified);
                }
                // The runtime would agree to it, and the tasks would die. It
                // stays held: whoever drops us lets them run.
                Some(Notified { script, .. })
                    if self.kind == Kind::Dump && script == "post-dump" =>
                {
                    return Err(CriuError::Missed { awaited: awaited(), held: script });
                }
                Some(_) => {}
                None => {
                    let State::Ended(outcome) = &self.state else { continue };
                    let (kind, outcome) = (self.kind, outcome.clone());
                    return Err(CriuError::Ended { kind, awaited: awaited(), outcome });
                }
            }
        }
    }

    /// Passes a held notification along and holds the next one, whichever it
    /// is; `None` once CRIU has answered. Some are not sent for every
    /// container: without a network namespace there is no `network-lock`.
    pub async fn next(&mut self) -> Result<Option<Notified>, CriuError> {
        self.pass().await?;
        if let State::Ended(_) = self.state {
            return Ok(None);
        }
        let packet = self.next_of_criu().await?;
        match read(&packet)? {
            Said::Notification(notified) => {
                self.last.clone_from(&notified.script);
                self.state = State::Held(packet);
                Ok(Some(notified))
            }
            Said::Answer(outcome) => {
                self.ended(&packet, outcome).await;
                Ok(None)
            }
        }
    }

    /// The held notification goes to the runtime, its answer back to CRIU.
    /// Without a held one nothing happens.
    pub async fn pass(&mut self) -> Result<(), CriuError> {
        match std::mem::replace(&mut self.state, State::Talking) {
            State::Held(packet) => self.deliver(&packet).await,
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// Answers the held notification ourselves; the runtime never sees it.
    /// `false` at `post-dump` makes CRIU resume the container.
    pub async fn acknowledge(&mut self, ok: bool) -> Result<(), CriuError> {
        let State::Held(_) = self.state else { return Ok(()) };
        self.state = State::Talking;
        self.answer(ok).await
    }

    /// Passes everything along, a held notification first, up to CRIU's final
    /// answer, which the runtime gets as well.
    pub async fn finish(mut self) -> Result<Outcome, CriuError> {
        loop {
            if self.next().await?.is_none()
                && let State::Ended(outcome) = self.state
            {
                return Ok(outcome);
            }
        }
    }

    /// Gives the notification to the runtime and its answer to CRIU. Once a
    /// dump is decided a dead runtime changes nothing any more: CRIU must get
    /// its answers, or it would resume what has moved away.
    async fn deliver(&mut self, packet: &Packet) -> Result<(), CriuError> {
        if !self.runtime_listens {
            return self.answer(true).await;
        }
        let answer = match self.runtime.send(packet).await {
            Ok(()) => self.runtime_or_criu_death().await,
            Err(_) => Err(self.runtime_died()),
        };
        match answer {
            Ok(answer) => {
                let ok = Fields::parse(&answer.bytes)
                    .map_err(|source| CriuError::Malformed { from: Side::Runtime, source })?
                    .varint(3)
                    == Some(1);
                self.decide(ok);
                self.tell_criu(&answer).await
            }
            Err(CriuError::RuntimeDied { .. }) if self.decided => self.answer(true).await,
            Err(error) => Err(error),
        }
    }

    /// The runtime's next packet; CRIU says nothing while it waits for an
    /// answer, so anything from there is its end.
    async fn runtime_or_criu_death(&mut self) -> Result<Packet, CriuError> {
        tokio::select! {
            packet = self.runtime.receive() => match packet {
                Ok(Some(packet)) => Ok(packet),
                Ok(None) => Err(self.runtime_died()),
                Err(error) if gone(&error) => Err(self.runtime_died()),
                Err(source) => Err(CriuError::Talk { with: Side::Runtime, source }),
            },
            packet = self.criu.receive() => match packet {
                Ok(Some(_)) => Err(CriuError::OutOfTurn { from: Side::Criu }),
                Ok(None) => Err(self.criu_died()),
                Err(error) if gone(&error) => Err(self.criu_died()),
                Err(source) => Err(CriuError::Talk { with: Side::Criu, source }),
            },
        }
    }

    /// CRIU's next packet. What the runtime sends meanwhile is passed along;
    /// its death matters only before the decision.
    async fn next_of_criu(&mut self) -> Result<Packet, CriuError> {
        let mut listening = !self.decided;
        loop {
            tokio::select! {
                packet = self.criu.receive() => return match packet {
                    Ok(Some(packet)) => Ok(packet),
                    Ok(None) => Err(self.criu_died()),
                    Err(error) if gone(&error) => Err(self.criu_died()),
                    Err(source) => Err(CriuError::Talk { with: Side::Criu, source }),
                },
                packet = self.runtime.receive(), if listening => match packet {
                    Ok(Some(packet)) => self.tell_criu(&packet).await?,
                    Ok(None) if self.decided => listening = false,
                    Ok(None) => return Err(self.runtime_died()),
                    Err(error) if gone(&error) => return Err(self.runtime_died()),
                    Err(source) => {
                        return Err(CriuError::Talk { with: Side::Runtime, source });
                    }
                },
            }
        }
    }

    async fn answer(&mut self, ok: bool) -> Result<(), CriuError> {
        self.decide(ok);
        let answer = CriuReq {
            r#type: CriuReqType::Notify.into(),
            notify_success: Some(ok),
            ..Default::default()
        };
        self.tell_criu(&Packet::new(answer.encode_to_vec())).await
    }

    fn decide(&mut self, ok: bool) {
        if ok && self.kind == Kind::Dump && self.last == "post-dump" {
            self.decided = true;
        }
    }

    /// A runtime that is gone does not read the answer: not our failure.
    async fn ended(&mut self, packet: &Packet, outcome: Outcome) {
        let _ = self.runtime.send(packet).await;
        self.state = State::Ended(outcome);
    }

    async fn tell_criu(&mut self, packet: &Packet) -> Result<(), CriuError> {
        match self.criu.send(packet).await {
            Ok(()) => Ok(()),
            Err(error) if gone(&error) => Err(self.criu_died()),
            Err(source) => Err(CriuError::Talk { with: Side::Criu, source }),
        }
    }

    fn criu_died(&self) -> CriuError {
        CriuError::CriuDied { during: self.last.clone(), stderr: self.dir.stderr() }
    }

    fn runtime_died(&self) -> CriuError {
        CriuError::RuntimeDied { during: self.last.clone() }
    }
}

/// What CRIU says in a packet.
pub(crate) fn read(packet: &Packet) -> Result<Said, CriuError> {
    let bad = |source| CriuError::Malformed { from: Side::Criu, source };
    let fields = Fields::parse(&packet.bytes).map_err(bad)?;
    if fields.varint(REQ_TYPE) == Some(CriuReqType::Notify as u64) {
        let notify = fields.bytes(RESP_NOTIFY).ok_or(bad(BadFields::Missing))?;
        let notify = Fields::parse(notify).map_err(bad)?;
        let script = notify.bytes(NOTIFY_SCRIPT).ok_or(bad(BadFields::Missing))?;
        let script = String::from_utf8_lossy(script).into_owned();
        let pid = notify.varint(NOTIFY_PID).map(|pid| pid as i32).filter(|&pid| pid > 0);
        return Ok(Said::Notification(Notified { script, pid }));
    }
    let answer = CriuResp::decode(packet.bytes.as_slice()).map_err(|_| bad(BadFields::Missing))?;
    Ok(Said::Answer(Outcome {
        success: answer.success,
        pid: answer.restore.map(|restore| restore.pid),
        errno: answer.cr_errno,
        message: answer.cr_errmsg.as_deref().and_then(log::plain),
    }))
}

pub(crate) enum Said {
    Notification(Notified),
    Answer(Outcome),
}

pub(crate) fn decode_options(request: &Fields) -> Result<CriuOpts, BadFields> {
    let opts = request.bytes(REQ_OPTS).ok_or(BadFields::Missing)?;
    CriuOpts::decode(opts).map_err(|_| BadFields::Missing)
}

/// A socket whose other end went away with unread bytes says so this way.
fn gone(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | BrokenPipe | NotConnected)
}
