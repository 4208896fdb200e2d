//! Passes over the writable layer: while the container runs, until the rest
//! is small, and the last one while it stands still.

use std::sync::Arc;

use transship_api::session::{Pass, shim_message::Message};
use transship_link::Channel;
use transship_rootfs::{Index, Layer, Totals};

use crate::{MigrationError, bulk::send_pass, limits};

/// A layer on its way.
pub(super) struct Passes {
    layer: Option<Layer>,
    before: Option<Arc<Index>>,
    number: u32,
    previous: Option<u64>,
}

impl Passes {
    pub fn over(layer: Option<Layer>) -> Self {
        Self { layer, before: None, number: 0, previous: None }
    }

    /// Sends what has changed since the pass before; `None` without a layer.
    /// The target answers with [`PassDone`](Message::PassDone) of this number.
    pub async fn send(
        &mut self,
        channel: &mut Channel,
        last: bool,
    ) -> Result<Option<(u32, Totals)>, MigrationError> {
        let Some(layer) = &self.layer else { return Ok(None) };
        self.number += 1;
        let pass = Pass { number: self.number, last };
        let before = self.before.take();
        let (index, totals) = send_pass(&mut channel.writer, layer, pass, before).await?;
        self.before = Some(index);
        Ok(Some((self.number, totals)))
    }

    /// Whether another pass makes sense after one of so many bytes.
    pub fn is_enough(&mut self, bytes: u64) -> bool {
        let previous = self.previous.replace(bytes);
        is_enough(self.number, bytes, previous)
    }
}

/// Checks the target's answer to a pass.
pub(super) fn check_done(message: Message, number: u32) -> Result<(), MigrationError> {
    match message {
        Message::PassDone(done) if done.number == number => Ok(()),
        _ => Err(MigrationError::malformed(format!("no answer to pass {number}"))),
    }
}

/// Whether the container may freeze after this pass: the rest is small, or
/// it will not become smaller (a layer on tmpfs is sent whole every time).
fn is_enough(number: u32, bytes: u64, previous: Option<u64>) -> bool {
    let shrinks = previous.is_none_or(|previous| bytes <= previous / 2);
    bytes < limits::SMALL_PASS || number >= limits::PASSES || !shrinks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_end_when_the_rest_is_small_or_stays_large() {
        const GIB: u64 = 1 << 30;
        for (number, bytes, previous, enough) in [
            (1, 0, None, true),
            (1, limits::SMALL_PASS - 1, None, true),
            (1, GIB, None, false),
            (2, GIB / 10, Some(GIB), false),
            (2, GIB, Some(GIB), true),
            (2, GIB - 1, Some(GIB), true),
            (limits::PASSES, GIB / 100, Some(GIB), true),
        ] {
            assert_eq!(is_enough(number, bytes, previous), enough, "{number} {bytes} {previous:?}");
        }
    }
}
