//! The wire between nodes: a bridge in a network namespace of its own, so
//! that no test touches the host's network or another test's.

use std::{
    io::{BufReader, Read},
    process::{Child, ChildStdin, Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{inside, locate};

/// A bridge that nodes are plugged into. Lives as long as this value.
pub struct Switch {
    pid: i32,
    process: Child,
    /// Its end is the bridge's end.
    lifeline: Option<ChildStdin>,
}

/// The network of the nodes: 10.77.0.N, N counted from 1.
const PREFIX: &str = "10.77.0";

impl Switch {
    pub fn start() -> Result<Self> {
        let mut process = Command::new(locate::helper()?)
            .arg("switch")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the bridge between nodes")?;
        let lifeline = process.stdin.take();
        let lines = process.stdout.take().context("output of the bridge")?;
        let pid = inside::await_ready(&mut BufReader::new(lines))?;
        Ok(Self { pid, process, lifeline })
    }

    /// Gives the network namespace of process `pid` an `eth0` at port
    /// `number`; returns its address.
    pub(crate) fn plug(&self, pid: i32, number: u8) -> Result<String> {
        let (port, address) = (format!("port{number}"), format!("{PREFIX}.{number}"));
        self.ip(self.pid, &format!("link add {port} type veth peer name eth0 netns {pid}"))?;
        self.ip(self.pid, &format!("link set {port} master br0 up"))?;
        self.ip(pid, &format!("addr add {address}/24 dev eth0"))?;
        self.ip(pid, "link set eth0 up")?;
        Ok(address)
    }

    /// Cuts a plugged node off (`up` false) or connects it again.
    pub fn set_port(&self, address: &str, up: bool) -> Result<()> {
        let number = address.rsplit('.').next().context("an address of the switch")?;
        self.ip(self.pid, &format!("link set port{number} {}", if up { "up" } else { "down" }))
    }

    fn ip(&self, namespace_of: i32, arguments: &str) -> Result<()> {
        let done = Command::new("nsenter")
            .args(["-n", "-t", &namespace_of.to_string(), "ip"])
            .args(arguments.split(' '))
            .output()
            .context("run nsenter")?;
        if !done.status.success() {
            bail!("ip {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        if let Some(rest) = &mut self.process.stdout {
            let _ = rest.read_to_end(&mut Vec::new());
        }
        let _ = self.process.wait();
    }
}
