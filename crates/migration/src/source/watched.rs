//! A container's memory, asked on threads that may block.

use std::sync::Arc;

use tokio::{sync::Mutex, task};
use transship_memory::{Memory, MemoryError};

use crate::{MigrationError, bulk::joined};

/// Questions are put one at a time: one whose asker has gone may still be
/// under way, and nothing may begin to watch after `disarm` has ended it.
#[derive(Clone)]
pub(super) struct Watched {
    memory: Arc<dyn Memory>,
    turn: Arc<Mutex<()>>,
}

impl Watched {
    pub fn new(memory: Arc<dyn Memory>) -> Self {
        Self { memory, turn: Arc::default() }
    }

    pub fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Memory) -> Result<T, MemoryError> + Send + 'static,
    ) -> Result<T, MigrationError> {
        let turn = self.turn.clone().lock_owned().await;
        let memory = self.memory.clone();
        let asked = task::spawn_blocking(move || {
            let _turn = turn;
            question(&*memory)
        });
        Ok(joined(asked.await)?)
    }

    /// No process is slower any more once this returns.
    pub async fn disarm(&self) {
        let disarmed = self.ask(|memory| {
            memory.disarm();
            Ok(())
        });
        // It answers nothing that could be an error.
        let _ = disarmed.await;
    }
}
