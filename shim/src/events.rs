//! Events to containerd, in the order in which they happened.
//!
//! One task sends them one after the other. While containerd is away (it may
//! be restarted at any time) they wait, oldest first out when there are too
//! many: a restarted containerd asks for the state anyway.

use std::{collections::VecDeque, time::Duration};

use containerd_shim_protos::{
    events::task::{
        TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit,
        TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{
        Message,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    topics,
    ttrpc::context,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::error::{Error, Result};

/// Events kept while containerd is away; a pod of a hundred containers that
/// all end leaves a few hundred.
const KEPT: usize = 1024;
/// containerd answers an event at once; one that does not is restarting.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Paused(TaskPaused),
    Resumed(TaskResumed),
    Checkpointed(TaskCheckpointed),
    Oom(TaskOOM),
    Exit(TaskExit),
    Delete(TaskDelete),
}

impl Event {
    /// Topic, message name and bytes. The names are written out because
    /// asking protobuf for them loads its whole reflection data, which would
    /// double the memory of a sleeping shim.
    fn parts(&self) -> (&'static str, &'static str, protobuf::Result<Vec<u8>>) {
        match self {
            Event::Create(m) => (
                topics::TASK_CREATE_EVENT_TOPIC,
                "containerd.events.TaskCreate",
                m.write_to_bytes(),
            ),
            Event::Start(m) => {
                (topics::TASK_START_EVENT_TOPIC, "containerd.events.TaskStart", m.write_to_bytes())
            }
            Event::ExecAdded(m) => (
                topics::TASK_EXEC_ADDED_EVENT_TOPIC,
                "containerd.events.TaskExecAdded",
                m.write_to_bytes(),
            ),
            Event::ExecStarted(m) => (
                topics::TASK_EXEC_STARTED_EVENT_TOPIC,
                "containerd.events.TaskExecStarted",
                m.write_to_bytes(),
            ),
            Event::Paused(m) => (
                topics::TASK_PAUSED_EVENT_TOPIC,
                "containerd.events.TaskPaused",
                m.write_to_bytes(),
            ),
            Event::Resumed(m) => (
                topics::TASK_RESUMED_EVENT_TOPIC,
                "containerd.events.TaskResumed",
                m.write_to_bytes(),
            ),
            Event::Checkpointed(m) => (
                topics::TASK_CHECKPOINTED_EVENT_TOPIC,
                "containerd.events.TaskCheckpointed",
                m.write_to_bytes(),
            ),
            Event::Oom(m) => {
                (topics::TASK_OOM_EVENT_TOPIC, "containerd.events.TaskOOM", m.write_to_bytes())
            }
            Event::Exit(m) => {
                (topics::TASK_EXIT_EVENT_TOPIC, "containerd.events.TaskExit", m.write_to_bytes())
            }
            Event::Delete(m) => (
                topics::TASK_DELETE_EVENT_TOPIC,
                "containerd.events.TaskDelete",
                m.write_to_bytes(),
            ),
        }
    }

    fn envelope(&self, namespace: &str) -> Result<Envelope> {
        let (topic, name, bytes) = self.parts();
        let value = bytes.map_err(Error::other(format!("encode {name}")))?;
        Ok(Envelope {
            timestamp: Some(timestamp(std::time::SystemTime::now())).into(),
            namespace: namespace.to_owned(),
            topic: topic.to_owned(),
            event: Some(Any { type_url: name.to_owned(), value, ..Default::default() }).into(),
            ..Default::default()
        })
    }
}

pub fn timestamp(at: std::time::SystemTime) -> Timestamp {
    let since = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
        ..Default::default()
    }
}

enum Item {
    Event(Envelope),
    Flushed(oneshot::Sender<()>),
}

#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    /// Publishes to containerd's ttrpc socket at `address`.
    pub fn new(namespace: &str, address: &str) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        let address =
            if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        tokio::spawn(Sender { address, client: None, waiting: VecDeque::new() }.run(items));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event; it follows all that were queued before.
    pub fn publish(&self, event: Event) {
        match event.envelope(&self.namespace) {
            // The sender lives as long as the runtime.
            Ok(envelope) => drop(self.queue.send(Item::Event(envelope))),
            Err(error) => warn!(error = error.sentence(), "event lost"),
        }
    }

    /// Waits until what was queued so far is with containerd, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flushed(done)).is_ok() {
            let _ = timeout(limit, flushed).await;
        }
    }

    /// For tests: what would have been sent, as topic and message.
    #[cfg(test)]
    pub fn recording(namespace: &str) -> (Self, Recorded) {
        let (queue, items) = mpsc::unbounded_channel();
        (Self { namespace: namespace.to_owned(), queue }, Recorded(items))
    }
}

#[cfg(test)]
pub struct Recorded(mpsc::UnboundedReceiver<Item>);

#[cfg(test)]
impl Recorded {
    pub async fn next(&mut self) -> (String, Vec<u8>) {
        loop {
            match self.0.recv().await.expect("a publisher") {
                Item::Event(e) => return (e.topic.clone(), e.event.value.clone()),
                Item::Flushed(done) => drop(done.send(())),
            }
        }
    }
}

struct Sender {
    address: String,
    client: Option<EventsClient>,
    waiting: VecDeque<Item>,
}

impl Sender {
    async fn run(mut self, mut items: mpsc::UnboundedReceiver<Item>) {
        let mut pause = RETRY_FIRST;
        loop {
            while let Ok(item) = items.try_recv() {
                self.keep(item);
            }
            let Some(item) = self.waiting.pop_front() else {
                match items.recv().await {
                    Some(item) => self.keep(item),
                    None => return,
                }
                continue;
            };
            let envelope = match item {
                Item::Event(envelope) => envelope,
                Item::Flushed(done) => {
                    let _ = done.send(());
                    continue;
                }
            };
            match self.forward(&envelope).await {
                Ok(()) => pause = RETRY_FIRST,
                Err(error) => {
                    debug!(topic = envelope.topic, error, "event not taken, will be sent again");
                    self.client = None;
                    self.waiting.push_front(Item::Event(envelope));
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY_LONGEST);
                }
            }
        }
    }

    fn keep(&mut self, item: Item) {
        if self.waiting.len() >= KEPT
            && let Some(Item::Event(lost)) = self.waiting.pop_front()
        {
            warn!(topic = lost.topic, "containerd is away for too long, event lost");
        }
        self.waiting.push_back(item);
    }

    async fn forward(&mut self, envelope: &Envelope) -> std::result::Result<(), String> {
        if self.client.is_none() {
            let client = Client::connect(&self.address).await.map_err(|e| e.to_string())?;
            self.client = Some(EventsClient::new(client));
        }
        let Some(client) = &self.client else { return Err("not connected".into()) };
        let request =
            ForwardRequest { envelope: Some(envelope.clone()).into(), ..Default::default() };
        let context = context::with_duration(FORWARD_TIMEOUT);
        client.forward(context, &request).await.map(drop).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_bears_the_name_protobuf_gives_it() {
        use containerd_shim_protos::protobuf::MessageFull;
        fn full<M: MessageFull>() -> String {
            M::descriptor().full_name().to_owned()
        }
        for (event, name) in [
            (Event::Create(Default::default()), full::<TaskCreate>()),
            (Event::Start(Default::default()), full::<TaskStart>()),
            (Event::ExecAdded(Default::default()), full::<TaskExecAdded>()),
            (Event::ExecStarted(Default::default()), full::<TaskExecStarted>()),
            (Event::Paused(Default::default()), full::<TaskPaused>()),
            (Event::Resumed(Default::default()), full::<TaskResumed>()),
            (Event::Checkpointed(Default::default()), full::<TaskCheckpointed>()),
            (Event::Oom(Default::default()), full::<TaskOOM>()),
            (Event::Exit(Default::default()), full::<TaskExit>()),
            (Event::Delete(Default::default()), full::<TaskDelete>()),
        ] {
            assert_eq!(event.parts().1, name);
        }
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_keep_their_order() {
        use containerd_shim_protos::{
            api::Empty,
            shim_async::{Events, create_events},
            ttrpc::{self, r#async::Server, r#async::TtrpcContext},
        };
        struct Daemon(mpsc::UnboundedSender<String>);
        #[async_trait::async_trait]
        impl Events for Daemon {
            async fn forward(&self, _: &TtrpcContext, r: ForwardRequest) -> ttrpc::Result<Empty> {
                self.0.send(r.envelope.topic.clone()).unwrap();
                Ok(Empty::new())
            }
        }

        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/events.sock", dir.path().display());
        let publisher = Publisher::new("test", &address);
        publisher.publish(Event::Create(Default::default()));
        publisher.publish(Event::Start(Default::default()));
        publisher.publish(Event::Exit(Default::default()));

        let (sender, mut seen) = mpsc::unbounded_channel();
        let service = create_events(std::sync::Arc::new(Daemon(sender)));
        let mut server = Server::new().bind(&address).unwrap().register_service(service);
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(30)).await;
        for topic in ["/tasks/create", "/tasks/start", "/tasks/exit"] {
            assert_eq!(seen.recv().await.as_deref(), Some(topic));
        }
        server.shutdown().await.unwrap();
    }
}
