//! Both ends of the conversation without CRIU and without an OCI runtime.

use std::{io, os::fd::OwnedFd, path::Path};

use prost::Message;
use transship_api::criu::{CriuNotify, CriuOpts, CriuReq, CriuReqType, CriuResp, CriuRestoreResp};

use crate::{
    packet::{Packet, Socket},
    stub::Hello,
    sys,
};

/// Where the stub of a [`FakeRuntime`] says it moved stdout and stderr.
pub const MOVED: (i32, i32) = (101, 102);

/// The OCI runtime's end of the RPC.
pub struct FakeRuntime(Socket);

/// CRIU's end of the RPC.
pub struct FakeCriu(Socket);

/// One session through the gate whose socket this is, as the stub makes it.
pub async fn connect(gate_socket: &Path) -> io::Result<(FakeRuntime, FakeCriu)> {
    let (runtime, childs_end) = sys::pair()?;
    let stub = Socket::new(sys::connect_to(gate_socket)?)?;
    let hello = Hello { stdout: MOVED.0, stderr: MOVED.1 };
    stub.send(&Packet { bytes: hello.encode(), descriptors: vec![childs_end] }).await?;
    let answer = stub.receive().await?.ok_or(io::ErrorKind::ConnectionReset)?;
    let criu = answer.descriptors.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
    Ok((FakeRuntime(Socket::new(runtime)?), FakeCriu(Socket::new(criu)?)))
}

impl FakeRuntime {
    pub async fn request(&self, r#type: CriuReqType, opts: Option<CriuOpts>) -> io::Result<()> {
        let request = CriuReq { r#type: r#type.into(), opts, ..Default::default() };
        self.send_bytes(request.encode_to_vec()).await
    }

    pub async fn answer(&self, ok: bool) -> io::Result<()> {
        let request = CriuReq {
            r#type: CriuReqType::Notify.into(),
            notify_success: Some(ok),
            ..Default::default()
        };
        self.send_bytes(request.encode_to_vec()).await
    }

    pub async fn send_bytes(&self, bytes: Vec<u8>) -> io::Result<()> {
        self.0.send(&Packet::new(bytes)).await
    }

    /// `None`: the gate closed the session.
    pub async fn receive(&self) -> io::Result<Option<(CriuResp, Vec<OwnedFd>)>> {
        let Some(packet) = self.0.receive().await? else { return Ok(None) };
        let response = CriuResp::decode(packet.bytes.as_slice())?;
        Ok(Some((response, packet.descriptors)))
    }

    /// Answers every notification with yes until the final answer or the end;
    /// gives the scripts that came by.
    pub async fn agree_to_everything(&self) -> io::Result<(Vec<String>, Option<CriuResp>)> {
        let mut scripts = Vec::new();
        while let Some((response, _)) = self.receive().await? {
            if response.r#type != CriuReqType::Notify as i32 {
                return Ok((scripts, Some(response)));
            }
            scripts.push(response.notify.and_then(|notify| notify.script).unwrap_or_default());
            self.answer(true).await?;
        }
        Ok((scripts, None))
    }
}

impl FakeCriu {
    /// The bytes of a request or of an answer; `None` after the gate's end.
    pub async fn receive_bytes(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.receive().await?.map(|packet| packet.bytes))
    }

    pub async fn receive(&self) -> io::Result<Option<CriuReq>> {
        let Some(bytes) = self.receive_bytes().await? else { return Ok(None) };
        Ok(Some(CriuReq::decode(bytes.as_slice())?))
    }

    /// Sends a notification and waits for its answer; `None` when the other
    /// side went away instead.
    pub async fn notify(&self, script: &str) -> io::Result<Option<bool>> {
        self.notify_with(script, Vec::new()).await
    }

    pub async fn notify_with(
        &self,
        script: &str,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<Option<bool>> {
        let notify = CriuNotify { script: Some(script.into()), pid: Some(4242) };
        let response = CriuResp {
            r#type: CriuReqType::Notify.into(),
            success: true,
            notify: Some(notify),
            ..Default::default()
        };
        self.0.send(&Packet { bytes: response.encode_to_vec(), descriptors }).await?;
        Ok(self.receive().await?.map(|answer| answer.notify_success()))
    }

    pub async fn respond(&self, r#type: CriuReqType, success: bool) -> io::Result<()> {
        let restore = (r#type == CriuReqType::Restore).then_some(CriuRestoreResp { pid: 4242 });
        let response = CriuResp { r#type: r#type.into(), success, restore, ..Default::default() };
        self.send_bytes(response.encode_to_vec()).await
    }

    pub async fn send_bytes(&self, bytes: Vec<u8>) -> io::Result<()> {
        self.0.send(&Packet::new(bytes)).await
    }
}
