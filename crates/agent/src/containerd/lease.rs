//! The lease of an arrival: it keeps the garbage collector off what arrives
//! until the image and the container hold it, and it is the record by which
//! an agent that died finds its unfinished arrivals.

use std::{collections::HashMap, time::Duration};

use containerd_client::services::v1::{
    AddResourceRequest, CreateNamespaceRequest, CreateRequest, DeleteNamespaceRequest,
    DeleteRequest, ListNamespacesRequest, ListRequest, Namespace, Resource,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use transship_types::ContainerKey;

use super::{CHANGE, Containerd, ContainerdError, LOOK_UP, Object, Result, Scope};

/// Marks what was made for an arrival with the id of its lease; on the lease
/// itself it names the container.
pub(super) const MARK: &str = "dev.transship.arrival";
/// The namespace was made for the arrival too.
const NEW_NAMESPACE: &str = "dev.transship.new-namespace";
/// After this, what an agent left behind and nobody undid is collected.
/// containerd's own clients give a pull as long.
const EXPIRES_AFTER: time::Duration = time::Duration::hours(24);
/// Ending a lease waits for a whole garbage collection.
const COLLECT: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lease {
    pub id: String,
    pub key: ContainerKey,
    new_namespace: bool,
}

impl Lease {
    /// The label by which undo knows its own.
    pub(super) fn mark(&self) -> (String, String) {
        (MARK.to_owned(), self.id.clone())
    }

    pub(super) fn made(&self, labels: &HashMap<String, String>) -> bool {
        labels.get(MARK) == Some(&self.id)
    }

    /// Two arrivals may write the same blob at once: each has its own ingest.
    pub(super) fn ingest(&self, digest: &str) -> String {
        format!("{}-{digest}", self.id)
    }
}

impl Containerd {
    pub(super) async fn create_lease(&self, key: &ContainerKey) -> Result<Lease> {
        let new_namespace = self.ensure_namespace(key.namespace()).await?;
        let lease =
            Lease { id: format!("transship-{}", unique()?), key: key.clone(), new_namespace };
        let expires = (OffsetDateTime::now_utc() + EXPIRES_AFTER)
            .format(&Rfc3339)
            .map_err(|e| ContainerdError::malformed(format!("this machine's clock: {e}")))?;
        let mut labels = HashMap::from([
            ("containerd.io/gc.expire".to_owned(), expires),
            (MARK.to_owned(), key.id().to_owned()),
        ]);
        if new_namespace {
            labels.insert(NEW_NAMESPACE.to_owned(), "true".to_owned());
        }
        let request = CreateRequest { id: lease.id.clone(), labels };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Lease(lease.id.clone()).doing("create");
        self.ask(doing, CHANGE, self.leases().create(request)).await?;
        Ok(lease)
    }

    /// Leases that were neither kept nor undone, in every namespace.
    pub(super) async fn unfinished_leases(&self) -> Result<Vec<Lease>> {
        let mut found = Vec::new();
        for namespace in self.namespace_names().await? {
            for lease in self.our_leases(&namespace).await? {
                let named = lease.labels.get(MARK).map(|id| ContainerKey::new(&namespace, id));
                let Some(Ok(key)) = named else {
                    tracing::warn!(lease = lease.id, "a lease like ours names no container");
                    continue;
                };
                let new_namespace = lease.labels.contains_key(NEW_NAMESPACE);
                found.push(Lease { id: lease.id, key, new_namespace });
            }
        }
        Ok(found)
    }

    async fn our_leases(
        &self,
        namespace: &str,
    ) -> Result<Vec<containerd_client::services::v1::Lease>> {
        let request = ListRequest { filters: vec![format!("labels.\"{MARK}\"")] };
        let request = Scope::of(namespace)?.request(request);
        let doing = Object::Namespace(namespace.into()).doing("list the leases of");
        Ok(self.ask(doing, LOOK_UP, self.leases().list(request)).await?.leases)
    }

    /// Keeps something for this arrival, whether it is there already or comes
    /// later. Asking first and holding then would leave a gap for the collector.
    pub(super) async fn hold(&self, lease: &Lease, kind: String, id: &str) -> Result<()> {
        let resource = Some(Resource { id: id.to_owned(), r#type: kind });
        let request = AddResourceRequest { id: lease.id.clone(), resource };
        let request = Scope::of(lease.key.namespace())?.request(request);
        let doing = Object::Lease(lease.id.clone()).doing("add a resource to");
        self.ask(doing, CHANGE, self.leases().add_resource(request)).await?;
        Ok(())
    }

    /// Lets go. With `collect`, what nobody else holds is gone on return.
    pub(super) async fn delete_lease(&self, lease: &Lease, collect: bool) -> Result<()> {
        let request = DeleteRequest { id: lease.id.clone(), sync: collect };
        let request = Scope::of(lease.key.namespace())?.request(request);
        let doing = Object::Lease(lease.id.clone()).doing("delete");
        let limit = if collect { COLLECT } else { CHANGE };
        absent_is_fine(self.ask(doing, limit, self.leases().delete(request)).await)
    }

    pub(super) async fn namespace_names(&self) -> Result<Vec<String>> {
        let request = ListNamespacesRequest::default();
        let doing = Object::Containerd.doing("list the namespaces of");
        let answer = self.ask(doing, LOOK_UP, self.namespaces().list(request)).await?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// Whether it had to be made. (A look-up by name would not tell: it
    /// answers for every name.)
    async fn ensure_namespace(&self, name: &str) -> Result<bool> {
        if self.namespace_names().await?.iter().any(|known| known == name) {
            return Ok(false);
        }
        let namespace = Some(Namespace { name: name.to_owned(), labels: HashMap::new() });
        let create = CreateNamespaceRequest { namespace };
        let doing = Object::Namespace(name.to_owned()).doing("create");
        match self.ask(doing, CHANGE, self.namespaces().create(create)).await {
            Ok(_) => Ok(true),
            // Somebody was faster; then it is theirs.
            Err(error) if error.is_already_exists() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes a namespace that was made for this arrival, unless something
    /// moved in meanwhile.
    pub(super) async fn delete_new_namespace(&self, lease: &Lease) -> Result<()> {
        let name = lease.key.namespace();
        // containerd minds everything in a namespace but its leases.
        if !lease.new_namespace || !self.our_leases(name).await?.is_empty() {
            return Ok(());
        }
        let request = DeleteNamespaceRequest { name: name.to_owned() };
        let doing = Object::Namespace(name.to_owned()).doing("delete");
        match self.ask(doing, CHANGE, self.namespaces().delete(request)).await {
            Err(error) if error.grpc() == Some(tonic::Code::FailedPrecondition) => Ok(()),
            other => absent_is_fine(other),
        }
    }
}

/// For whatever is removed: gone is gone, whoever did it.
pub(super) fn absent_is_fine<T>(done: Result<T>) -> Result<()> {
    match done {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// 128 random bits, in hex.
fn unique() -> Result<String> {
    let path = std::path::Path::new("/proc/sys/kernel/random/uuid");
    let text = std::fs::read_to_string(path).map_err(|e| ContainerdError::file("read", path, e))?;
    Ok(text.trim().replace('-', ""))
}
