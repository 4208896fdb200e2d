//! containerd's events about tasks, in the order they arrive.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use containerd_client::{
    events::{
        TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit,
        TaskOom, TaskPaused, TaskResumed, TaskStart,
    },
    services::v1::{PublishRequest, SubscribeRequest, events_client::EventsClient},
};
use prost::Message;
use prost_types::Any;
use tokio::runtime::Runtime as Tokio;
use tonic::transport::Channel;

use crate::{api::request, eventually, until};

/// No container has this name.
const PROBE: &str = "probe of the harness";

/// One event, reduced to what tests compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The last part of the topic: `create`, `exec-added`, `exit` …
    pub what: String,
    pub container: String,
    /// The process: an exec's id, or the container's id for its first.
    pub process: String,
    pub pid: u32,
    pub status: u32,
}

/// A subscription.
pub struct Events {
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Events {
    pub(crate) fn subscribe(tokio: &Tokio, channel: Channel) -> Result<Self> {
        let wanted = SubscribeRequest { filters: vec!["topic~=^/tasks/".into()] };
        let mut client = EventsClient::new(channel.clone());
        let events = Self { seen: Arc::new(Mutex::new(Vec::new())) };
        let into = Arc::clone(&events.seen);
        tokio.spawn(async move {
            // Answered with the first event, not before.
            let Ok(answer) = client.subscribe(request(wanted)).await else { return };
            let mut stream = answer.into_inner();
            while let Ok(Some(envelope)) = stream.message().await {
                let event =
                    envelope.event.as_ref().and_then(|any| Event::read(&envelope.topic, any));
                into.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(event);
            }
        });
        // Subscribed is who sees an event of his own.
        let probe = TaskResumed { container_id: PROBE.into() };
        let probe =
            Any { type_url: "containerd.events.TaskResumed".into(), value: probe.encode_to_vec() };
        eventually("the subscription to events", || {
            let wanted =
                PublishRequest { topic: "/tasks/probe".into(), event: Some(probe.clone()) };
            let mut client = EventsClient::new(channel.clone());
            tokio.block_on(client.publish(request(wanted))).context("publish an event")?;
            Ok(!events.of(PROBE).is_empty())
        })?;
        Ok(events)
    }

    /// Those of one container so far.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        seen.iter().filter(|event| event.container == container).cloned().collect()
    }

    /// Waits for one of `container`.
    pub fn await_one(&self, container: &str, what: &str) -> Result<Event> {
        let found = || Ok(self.of(container).into_iter().find(|event| event.what == what));
        until(&format!("event {what} of {container}"), found)
            .with_context(|| format!("what came: {:?}", self.names(container)))
    }

    /// What happened to a container, as `exit` or, of an exec, `exit:ID`.
    pub fn names(&self, container: &str) -> Vec<String> {
        let name = |event: Event| {
            if event.process.is_empty() || event.process == event.container {
                event.what
            } else {
                format!("{}:{}", event.what, event.process)
            }
        };
        self.of(container).into_iter().map(name).collect()
    }
}

impl Event {
    fn read(topic: &str, any: &Any) -> Option<Self> {
        let what = topic.rsplit('/').next()?.to_owned();
        let bytes = any.value.as_slice();
        let event = |container, process, pid, status| Self {
            what: what.clone(),
            container,
            process,
            pid,
            status,
        };
        match any.type_url.rsplit(['/', '.']).next()? {
            "TaskCreate" => TaskCreate::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, String::new(), e.pid, 0)),
            "TaskStart" => TaskStart::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, String::new(), e.pid, 0)),
            "TaskDelete" => TaskDelete::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, e.id, e.pid, e.exit_status)),
            "TaskExit" => TaskExit::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, e.id, e.pid, e.exit_status)),
            "TaskOOM" => {
                TaskOom::decode(bytes).ok().map(|e| event(e.container_id, String::new(), 0, 0))
            }
            "TaskExecAdded" => {
                TaskExecAdded::decode(bytes).ok().map(|e| event(e.container_id, e.exec_id, 0, 0))
            }
            "TaskExecStarted" => TaskExecStarted::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, e.exec_id, e.pid, 0)),
            "TaskPaused" => {
                TaskPaused::decode(bytes).ok().map(|e| event(e.container_id, String::new(), 0, 0))
            }
            "TaskResumed" => {
                TaskResumed::decode(bytes).ok().map(|e| event(e.container_id, String::new(), 0, 0))
            }
            "TaskCheckpointed" => TaskCheckpointed::decode(bytes)
                .ok()
                .map(|e| event(e.container_id, String::new(), 0, 0)),
            _ => None,
        }
    }
}
