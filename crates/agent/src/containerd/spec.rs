//! Reading and editing an OCI spec without understanding all of it: whatever
//! we do not name stays as it was.

use serde_json::{Map, Value};
use transship_types::{ContainerKey, TICKET_ANNOTATION, Ticket};

use super::{ContainerdError, Result};

/// An OCI runtime spec, as a container record carries it.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec(Map<String, Value>);

/// The network namespace that a spec asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's: what listens there cannot move.
    Host,
    /// A new one, made by the OCI runtime.
    New,
    /// One that somebody made before.
    At(String),
}

/// A directory or file of the host that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    pub source: String,
    pub destination: String,
    pub read_only: bool,
}

impl Spec {
    /// From its JSON; `object` names the container in errors.
    pub fn read(json: &[u8], object: &ContainerKey) -> Result<Self> {
        let why = match serde_json::from_slice(json) {
            Ok(Value::Object(map)) => return Ok(Self(map)),
            Ok(_) => "it is no JSON object".to_owned(),
            Err(error) => error.to_string(),
        };
        let reason = format!("the spec of container {object} cannot be read: {why}");
        Err(ContainerdError::malformed(reason))
    }

    pub fn write(&self) -> Vec<u8> {
        // A map with string keys always has a JSON form.
        Value::Object(self.0.clone()).to_string().into_bytes()
    }

    pub fn network(&self) -> Network {
        match self.namespace("network") {
            None => Network::Host,
            Some(None) => Network::New,
            // pid 1 is the host's, and a spec that names it means the host.
            Some(Some("/proc/1/ns/net")) => Network::Host,
            Some(Some(path)) => Network::At(path.to_owned()),
        }
    }

    /// None: the host's. Some(None): a new one. Some(path): an existing one.
    fn namespace(&self, kind: &str) -> Option<Option<&str>> {
        let entry = self
            .0
            .get("linux")?
            .get("namespaces")?
            .as_array()?
            .iter()
            .find(|entry| text(entry, "type") == Some(kind))?;
        Some(text(entry, "path").filter(|path| !path.is_empty()))
    }

    pub fn bind_mounts(&self) -> Vec<BindMount> {
        let mounts = self.0.get("mounts").and_then(Value::as_array);
        mounts.into_iter().flatten().filter_map(bind_mount).collect()
    }

    /// `linux.cgroupsPath`; empty means that the OCI runtime chooses.
    pub fn cgroup_path(&self) -> &str {
        self.0.get("linux").and_then(|linux| text(linux, "cgroupsPath")).unwrap_or_default()
    }

    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.0.get("annotations").and_then(|annotations| text(annotations, key))
    }

    /// Sets an annotation, or removes it.
    pub fn annotate(&mut self, key: &str, value: Option<&str>) {
        let annotations = self.0.entry("annotations").or_insert(Value::Null);
        if !annotations.is_object() {
            *annotations = Value::Object(Map::new());
        }
        let Value::Object(map) = annotations else { return };
        match value {
            Some(value) => drop(map.insert(key.into(), value.into())),
            None => drop(map.remove(key)),
        }
        if map.is_empty() {
            self.0.remove("annotations");
        }
    }

    pub fn set_ticket(&mut self, ticket: Option<&Ticket>) {
        self.annotate(TICKET_ANNOTATION, ticket.map(Ticket::as_str));
    }
}

fn bind_mount(mount: &Value) -> Option<BindMount> {
    let options: Vec<&str> = mount
        .get("options")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let bind = text(mount, "type") == Some("bind")
        || options.contains(&"bind")
        || options.contains(&"rbind");
    bind.then(|| BindMount {
        source: text(mount, "source").unwrap_or_default().into(),
        destination: text(mount, "destination").unwrap_or_default().into(),
        read_only: options.contains(&"ro"),
    })
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: &[u8]) -> Result<Spec> {
        Spec::read(json, &ContainerKey::new("default", "redis").unwrap())
    }

    fn spec(value: Value) -> Spec {
        read(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_network_is_the_hosts_unless_the_spec_says_otherwise() {
        let with = |namespaces: Value| spec(json!({"linux": {"namespaces": namespaces}}));
        for (spec, wanted) in [
            (spec(json!({})), Network::Host),
            (with(json!([{"type": "pid"}])), Network::Host),
            (with(json!([{"type": "network"}])), Network::New),
            (with(json!([{"type": "network", "path": ""}])), Network::New),
            (with(json!([{"type": "network", "path": "/proc/1/ns/net"}])), Network::Host),
            (
                with(json!([{"type": "network", "path": "/run/netns/web"}])),
                Network::At("/run/netns/web".into()),
            ),
        ] {
            assert_eq!(spec.network(), wanted, "{spec:?}");
        }
    }

    #[test]
    fn bind_mounts_are_found_by_type_or_option() {
        let spec = spec(json!({"mounts": [
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "bind", "source": "/data", "destination": "/d", "options": ["rbind", "ro"]},
            {"type": "none", "source": "/etc/hosts", "destination": "/etc/hosts",
             "options": ["bind"]},
        ]}));
        let found: Vec<_> = spec
            .bind_mounts()
            .into_iter()
            .map(|m| (m.source, m.destination, m.read_only))
            .collect();
        assert_eq!(
            found,
            [
                ("/data".into(), "/d".into(), true),
                ("/etc/hosts".into(), "/etc/hosts".into(), false)
            ]
        );
    }

    #[test]
    fn the_ticket_comes_and_goes_and_all_else_stays() {
        let ticket = Ticket::from_random([7; 16]);
        for before in [
            json!({"ociVersion": "1.1.0", "linux": {"cgroupsPath": "/a/b", "unknown": [1, 2.5]}}),
            json!({"annotations": {"a": "b"}, "process": {"terminal": true}}),
        ] {
            let before = spec(before);
            let mut moved = before.clone();
            moved.set_ticket(Some(&ticket));
            assert_eq!(moved.annotation(TICKET_ANNOTATION), Some(ticket.as_str()));
            let mut again = read(&moved.write()).unwrap();
            assert_eq!(again, moved);
            again.set_ticket(None);
            assert_eq!(again, before);
        }
    }

    #[test]
    fn a_control_group_may_be_left_to_the_runtime() {
        let spec = spec(json!({"linux": {"cgroupsPath": "/default/x"}}));
        assert_eq!(spec.cgroup_path(), "/default/x");
        assert_eq!(read(b"{}").unwrap().cgroup_path(), "");
    }

    #[test]
    fn a_spec_that_is_none_is_refused_by_name() {
        for value in ["", "[]", "{"] {
            let error = read(value.as_bytes()).unwrap_err();
            assert_eq!(error.code(), transship_types::Code::Malformed);
            assert!(error.to_string().contains("default/redis"), "{error}");
        }
    }
}
