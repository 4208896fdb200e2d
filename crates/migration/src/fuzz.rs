//! The places at which bytes of a peer come in, for `crates/hostile`.

use bytes::Bytes;
use prost::Message as _;
use transship_api::session::{Batch, Present, ShimMessage, shim_message::Message};
use transship_memory::codec::{BATCH_PAGES, Decoder};
use transship_types::{PAGE, PageRange, PageSet, Space, Ticket};

use crate::{
    MigrationError, bulk,
    pages::{Checked, ranges, space},
    present::{self, Presence},
};

/// One message of a shim, and what is looked at before it is believed.
pub fn message(bytes: &[u8]) -> Result<(), MigrationError> {
    let message: ShimMessage = transship_wire::decode(Bytes::copy_from_slice(bytes))?;
    match message.message {
        Some(Message::Manifest(manifest)) => drop(manifest.ticket.parse::<Ticket>()?),
        Some(Message::Batch(batch)) => batch_holds(&Checked::new(&batch)?),
        Some(Message::Present(sets) | Message::Owed(sets) | Message::Lacking(sets)) => {
            Presence::default().add(sets)?;
        }
        Some(Message::Want(want)) => {
            space(want.space.as_ref())?;
            let wanted = ranges(&want.pages, BATCH_PAGES)?;
            // So large is the memory that is taken to answer.
            let pages: u64 = wanted.iter().map(|range| range.pages()).sum();
            assert!(pages <= BATCH_PAGES, "more than a batch is asked for");
        }
        Some(Message::Image(image)) => bulk::check_image_name(&image.name)?,
        Some(Message::SmallImages(small)) => {
            small.images.iter().try_for_each(|image| bulk::check_image_name(&image.name))?;
        }
        _ => {}
    }
    Ok(())
}

/// A batch (a length of two bytes, and so much of a message) and the bytes
/// that follow it on the lane. Answers the pages, if all of it holds.
pub fn batch(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    let (message, wire) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
    let checked = Checked::new(&Batch::decode(message).ok()?).ok()?;
    batch_holds(&checked);
    let wire = &wire[..wire.len().min(checked.wire_bytes)];
    let mut decoder = Decoder::default();
    let pages = decoder.decode(checked.codec, wire, checked.length()).ok()?;
    assert_eq!(pages.len(), checked.length());
    Some(pages.to_vec())
}

fn batch_holds(batch: &Checked) {
    let all: Vec<PageRange> = batch.pages.iter().chain(&batch.zeros).copied().collect();
    let set: PageSet = all.iter().copied().collect();
    let pages: u64 = all.iter().map(|range| range.pages()).sum();
    assert_eq!(set.pages(), pages, "a page twice");
    assert!((1..=BATCH_PAGES).contains(&pages));
    assert!(batch.wire_bytes <= batch.length());
}

/// The bytes of a batch, for a corpus.
pub fn batch_of(batch: &Batch, wire: &[u8]) -> Vec<u8> {
    let message = batch.encode_to_vec();
    [&(message.len() as u16).to_le_bytes()[..], &message, wire].concat()
}

/// Messages of present pages, each after its length. Answers the sets if they
/// are complete.
pub fn present(mut bytes: &[u8]) -> Option<Vec<(Space, PageSet)>> {
    let mut presence = Presence::default();
    while !bytes.is_empty() {
        let message = Present::decode_length_delimited(&mut bytes).ok()?;
        presence.add(message).ok()?;
    }
    let sets = presence.complete()?;
    // What was understood can be said again, and means the same.
    let mut again = Presence::default();
    present::messages(&sets).into_iter().for_each(|message| again.add(message).unwrap());
    assert_eq!(again.complete().as_ref(), Some(&sets));
    Some(sets)
}

/// The bytes of such messages, for a corpus.
pub fn present_of(sets: &[(Space, PageSet)]) -> Vec<u8> {
    present::messages(sets).iter().flat_map(Present::encode_length_delimited_to_vec).collect()
}

/// Pages that start and end at these numbers.
pub fn pages(first: u64, last: u64) -> PageSet {
    PageRange::new(first * PAGE, last * PAGE).into_iter().collect()
}
