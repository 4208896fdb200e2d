//! Two nodes, what was on them before, and containers to move.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{
    agents::{Inventory, Pair, Refused, Site},
    daemon::Runtime,
    eventually,
    images::Image,
    until,
};

pub struct World {
    pub a: Site,
    pub b: Site,
    before: (Inventory, Inventory),
}

/// Runs a test with two fresh nodes whose agents serve; shows the agents' logs
/// if it fails.
pub fn with_agents(test: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    let world = World::of(Pair::start()?)?;
    world.run(test)
}

impl World {
    pub fn of(pair: Pair) -> Result<Self> {
        let Pair { a, b } = pair;
        a.image(Image::Busybox)?;
        let before = (a.inventory()?, b.inventory()?);
        Ok(Self { a, b, before })
    }

    pub fn run(self, test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let done = test(&self);
        if done.is_err() {
            for site in [&self.a, &self.b] {
                eprintln!("--- transshipd on {}:\n{}", site.name(), site.agent_log());
                transship_integration::daemon::show_log(site);
            }
        }
        done
    }

    /// Starts a shell script under our shim on `site`.
    pub fn start(&self, site: &Site, id: &str, flags: &[&str], script: &str) -> Result<()> {
        self.start_of(site, Image::Busybox, id, flags, &["sh", "-c", script])
    }

    pub fn start_of(
        &self,
        site: &Site,
        image: Image,
        id: &str,
        flags: &[&str],
        program: &[&str],
    ) -> Result<()> {
        let reference = site.image(image)?;
        let mut arguments = vec!["run", "-d", "--runtime", Runtime::Transship.name()];
        arguments.extend(flags);
        arguments.extend([reference, id]);
        arguments.extend(program);
        site.ctr_ok(&arguments)?;
        Ok(())
    }

    /// A container that counts in /tmp/count.
    pub fn start_counter(&self, site: &Site, id: &str, flags: &[&str]) -> Result<()> {
        self.start(site, id, flags, COUNTER)?;
        counts_on(site, id, 0)
    }

    /// Kills, deletes, removes.
    pub fn remove(&self, site: &Site, id: &str) -> Result<()> {
        site.ctr_ok(&["task", "kill", "-s", "KILL", id])?;
        eventually(&format!("{id} to stop"), || Ok(site.status(id)? == "STOPPED"))?;
        site.ctr_ok(&["task", "rm", id])?;
        site.ctr_ok(&["container", "rm", id])?;
        Ok(())
    }

    pub fn nothing_on_a(&self) -> Result<()> {
        self.a.nothing_more(&self.before.0)
    }

    pub fn nothing_on_b(&self) -> Result<()> {
        self.b.nothing_more(&self.before.1)
    }

    pub fn nothing_left(&self) -> Result<()> {
        self.nothing_on_a()?;
        self.nothing_on_b()
    }

    pub fn nothing_left_but(&self, fine: impl Fn(&str) -> bool) -> Result<()> {
        self.a.nothing_but(&self.before.0, &fine)?;
        self.b.nothing_but(&self.before.1, &fine)
    }
}

pub const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo $i > /tmp/new; \
                           mv /tmp/new /tmp/count; sleep 0.02; done";

/// A tmpfs that is left to CRIU, because it shares mounts: with the gate
/// `tar` a test can hold CRIU in its dump and in its restore.
pub const FOR_TAR: &str = "--mount=type=tmpfs,src=tmpfs,dst=/kept,options=shared";

pub fn refused_with(answer: std::result::Result<Value, Refused>, code: &str) -> Result<Refused> {
    let refused = match answer {
        Ok(report) => anyhow::bail!("it should be refused with {code}, but: {report}"),
        Err(refused) => refused,
    };
    ensure!(refused.code == code, "the code is not {code}: {refused:#?}");
    ensure!(refused.exit == 1 && !refused.reason.is_empty(), "{refused:#?}");
    Ok(refused)
}

/// A file as the container's first process sees it, without a process more.
pub fn read(site: &Site, id: &str, path: &str) -> Result<String> {
    let pid = site.task_pid(id)?;
    site.sh(&format!("cat /proc/{pid}/root{path}"))
}

pub fn count(site: &Site, id: &str) -> Result<u64> {
    read(site, id, "/tmp/count")?.trim().parse().context("a count")
}

/// Waits until it counts beyond `start`.
pub fn counts_on(site: &Site, id: &str, start: u64) -> Result<()> {
    until(&format!("{id} to count beyond {start} on {}", site.name()), || {
        Ok(count(site, id).ok().filter(|now| *now > start))
    })?;
    Ok(())
}

/// It runs, and goes on with what it does.
pub fn runs_on(site: &Site, id: &str) -> Result<()> {
    let status = site.status(id)?;
    ensure!(status == "RUNNING", "{id} is {status} on {}", site.name());
    counts_on(site, id, count(site, id)?)
}

/// Nothing is there that was not there `before`, while a counter ran and
/// started its own programs now and then.
pub fn unchanged(site: &Site, before: &Inventory) -> Result<()> {
    let own = |one: &str| one.ends_with(" sleep") || one.ends_with(" mv");
    site.nothing_but(before, |one| own(one.trim_end_matches(" (2 times)")))
}

/// Established connections of a container, by both addresses.
pub fn connections(site: &Site, id: &str) -> Result<Vec<String>> {
    let pid = site.task_pid(id)?;
    let text = site.sh(&format!("cat /proc/{pid}/net/tcp"))?;
    let mut found: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().skip(1).take(3).collect::<Vec<_>>())
        // 01: established (tcp_states.h). Those of clients that ended are gone.
        .filter(|fields| fields.get(2) == Some(&"01"))
        .map(|fields| fields.join(" "))
        .collect();
    found.sort();
    Ok(found)
}
