//! What agents say to each other, and what the command line asks.

use prost::Message as _;
use protobuf::Message as _;
use transship_agent::fuzz;
use transship_api::{
    control::{MigrateRequest, PlanRequest, StatusRequest, Tuning},
    session::{
        AgentMessage, Any, Blob, Consider, Container, Descriptor, Discard, Host, Offer, Prepare,
        agent_message::Message,
    },
};
use transship_types::RUNTIME;

const SPEC: &[u8] = br#"{"linux":{"namespaces":[{"type":"network"}],"cgroupsPath":"/a/b"},
"mounts":[{"type":"bind","source":"/data","destination":"/d","options":["rbind","ro"]}]}"#;

pub fn message(bytes: &[u8]) {
    fuzz::message(bytes);
}

pub fn message_seeds() -> Vec<Vec<u8>> {
    let blob = Descriptor {
        media_type: "application/octet-stream".into(),
        digest: format!("sha256:{}", "0a".repeat(32)),
        size: 10,
        ..Default::default()
    };
    let offer = Offer {
        migration: "ab".repeat(16),
        namespace: "default".into(),
        container: "redis".into(),
        record: Some(Container {
            image: "example.org/redis:1".into(),
            runtime: RUNTIME.into(),
            snapshotter: "overlayfs".into(),
            labels: [("a".into(), "b".into())].into(),
            spec: Some(Any { type_url: "spec".into(), value: SPEC.into() }),
            ..Default::default()
        }),
        content: vec![blob.clone()],
        host: Some(Host { cpu_flags: vec!["fpu".into()], ..Default::default() }),
        memory_bytes: 1 << 30,
        rootfs_bytes: 1 << 20,
        ..Default::default()
    };
    let messages = [
        Message::Offer(offer.clone()),
        Message::Consider(Consider { offer: Some(offer) }),
        Message::Blob(Blob { descriptor: Some(blob) }),
        Message::Prepare(Prepare {}),
        Message::Discard(Discard { reason: "asked to".into() }),
    ];
    messages.map(|message| AgentMessage { message: Some(message) }.encode_to_vec()).into()
}

pub fn request(bytes: &[u8]) {
    fuzz::request(bytes);
}

pub fn request_seeds() -> Vec<Vec<u8>> {
    let tuning = Tuning {
        max_pause_us: 200_000,
        throttle: "auto".into(),
        lanes: 4,
        compress: "zstd".into(),
        ..Default::default()
    };
    let migrate = MigrateRequest {
        namespace: "default".into(),
        container: "redis".into(),
        node: "b".into(),
        tuning: Some(tuning).into(),
        ..Default::default()
    };
    let plan = PlanRequest {
        namespace: "default".into(),
        container: "redis".into(),
        node: "b".into(),
        ..Default::default()
    };
    let status = StatusRequest { migration: "ab".repeat(16), ..Default::default() };
    [(0, migrate.write_to_bytes()), (1, plan.write_to_bytes()), (2, status.write_to_bytes())]
        .map(|(which, bytes)| [&[which], &bytes.expect("a message")[..]].concat())
        .into()
}
