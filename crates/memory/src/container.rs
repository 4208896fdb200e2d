//! All of a container's memory: that of its processes, and what they share.

use std::{sync::Arc, thread};

use transship_types::{PageRange, Space};

use crate::{Backend, Dirty, Last, Memory, MemoryError, SharedObjects};

/// Private memory as something else watches it, and shared objects beside it.
pub struct ContainerMemory {
    private: Arc<dyn Memory>,
    shared: SharedObjects,
}

impl ContainerMemory {
    pub fn new(private: Arc<dyn Memory>, shared: SharedObjects) -> Self {
        Self { private, shared }
    }

    /// Device and inode of the shared objects that the last look has found.
    pub fn shared(&self) -> Vec<(u64, u64)> {
        self.shared.names()
    }

    /// Both at once: in the pause, the longer one counts and not their sum.
    fn both<P: Send, S>(
        &self,
        private: impl FnOnce(&dyn Memory) -> Result<P, MemoryError> + Send,
        shared: impl FnOnce(&SharedObjects) -> Result<S, MemoryError>,
    ) -> Result<(P, S), MemoryError> {
        thread::scope(|scope| {
            let private = scope.spawn(|| private(&*self.private));
            let shared = shared(&self.shared);
            let private = private.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
            Ok((private?, shared?))
        })
    }
}

impl Memory for ContainerMemory {
    fn backend(&self) -> Backend {
        self.private.backend()
    }

    fn round(&self) -> Result<Dirty, MemoryError> {
        let (mut dirty, shared) = self.both(|m| m.round(), SharedObjects::round)?;
        dirty.spaces.extend(shared.spaces);
        Ok(dirty)
    }

    fn peek(&self) -> Result<u64, MemoryError> {
        let (private, shared) = self.both(|m| m.peek(), SharedObjects::round)?;
        Ok(private + shared.pages())
    }

    fn last(&self) -> Result<Last, MemoryError> {
        let (mut last, (dirty, present)) = self.both(|m| m.last(), SharedObjects::last)?;
        last.dirty.spaces.extend(dirty.spaces);
        last.present.extend(present);
        Ok(last)
    }

    fn read(
        &self,
        space: Space,
        ranges: &[PageRange],
        into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        match space {
            Space::Process(_) => self.private.read(space, ranges, into),
            Space::Shared(object) => self.shared.read(object, ranges, into),
        }
    }

    fn memfd(&self, space: Space) -> Option<Vec<u8>> {
        match space {
            Space::Process(_) => self.private.memfd(space),
            Space::Shared(object) => self.shared.memfd(object),
        }
    }

    fn disarm(&self) {
        self.private.disarm();
        self.shared.disarm();
    }
}
