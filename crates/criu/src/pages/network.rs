//! Whose network namespace the images belong to.

use super::{
    PagesError,
    image::{IdsEntry, Image, InventoryEntry, PstreeEntry, Type},
};
use crate::images::MemoryDir;

/// Whether CRIU was in the container's network namespace when it wrote these
/// images ([`Gate::network`](crate::Gate::network)). Then they say of the
/// container that it is where CRIU is, and a restore must be in a namespace
/// that was made for it: in another one the container would get that of the
/// host.
pub fn shares_network(dir: &MemoryDir) -> Result<bool, PagesError> {
    let tree = must(dir, "pstree.img".into(), Type::Pstree)?;
    let root: PstreeEntry = tree.only(dir)?;
    let ids: IdsEntry = must(dir, format!("ids-{}.img", root.pid), Type::Ids)?.only(dir)?;
    let inventory: InventoryEntry =
        must(dir, "inventory.img".into(), Type::Inventory)?.only(dir)?;
    // Without the ids nothing is known, and the worse is to be feared.
    Ok(inventory.root_ids.is_none_or(|own| own.net_ns_id == ids.net_ns_id))
}

fn must(dir: &MemoryDir, name: String, kind: Type) -> Result<Image, PagesError> {
    let missing = || PagesError::Image { path: dir.path().join(&name), why: "it is missing" };
    Image::read(dir, name.clone(), kind)?.ok_or_else(missing)
}
