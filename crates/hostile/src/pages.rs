//! What shims say to each other, and the pages that follow.

use prost::Message as _;
use transship_api::session::{
    Batch, Image, ImagesEnd, Lane, Lost, Manifest, Paid, Present, Resume, RoundEnd, ShimMessage,
    SmallImage, SmallImages, SpaceName, Want, shim_message::Message, space_name::Space as Name,
};
use transship_memory::codec::{Codec, Compress, Encoder};
use transship_migration::fuzz;
use transship_types::{PAGE, Space};

pub fn message(bytes: &[u8]) {
    // Whether it is taken or refused: it returns.
    let _ = fuzz::message(bytes);
}

pub fn message_seeds() -> Vec<Vec<u8>> {
    let some = || Present { space: process(7), pages: vec![1, 2, 5, 1], last: true };
    let small = |name: &str| SmallImage { name: name.into(), content: b"image"[..].into() };
    let messages = [
        Message::Manifest(Manifest {
            migration: "01".repeat(16),
            ticket: "5a".repeat(16),
            container: "redis".into(),
            epoch: 3,
            descriptors: "[\"/dev/null\"]".into(),
            lanes: 2,
            memory_bytes: 1 << 30,
            ..Default::default()
        }),
        Message::Image(Image { name: "pages-1.img".into(), size: 1 << 20 }),
        Message::SmallImages(SmallImages { images: vec![small("core-1.img"), small("mm-1.img")] }),
        Message::ImagesEnd(ImagesEnd { count: 3, bytes: 10 }),
        Message::Lane(Lane { number: 1 }),
        Message::RoundEnd(RoundEnd { number: 1, batches: 2, last: true }),
        Message::Batch(batch_of(Codec::Raw, 3 * PAGE as usize)),
        Message::Present(some()),
        // Post-copy.
        Message::Owed(some()),
        Message::Want(Want { space: process(7), pages: vec![1, 2, 5, 1] }),
        Message::Resume(Resume { migration: "01".repeat(16), epoch: 3, lanes: 2 }),
        Message::Lacking(some()),
        Message::Paid(Paid {}),
        Message::Lost(Lost { reason: "it was killed".into() }),
    ];
    messages.map(|message| ShimMessage { message: Some(message) }.encode_to_vec()).into()
}

fn process(pid: u32) -> Option<SpaceName> {
    Some(SpaceName { space: Some(Name::Process(pid)) })
}

/// Of three pages and two that are zero.
fn batch_of(codec: Codec, wire_bytes: usize) -> Batch {
    Batch {
        round: 1,
        space: process(7),
        pages: vec![1, 2, 4, 1],
        zeros: vec![3, 1, 9, 1],
        codec: codec.number(),
        wire_bytes: wire_bytes as u32,
        memfd: None,
    }
}

pub fn batch(bytes: &[u8]) {
    if let Some(pages) = fuzz::batch(bytes) {
        assert!(pages.len().is_multiple_of(PAGE as usize));
    }
}

pub fn batch_seeds() -> Vec<Vec<u8>> {
    let pages: Vec<u8> = (0..3 * PAGE).map(|at| (at / 64) as u8).collect();
    [Compress::Never, Compress::With(Codec::Lz4), Compress::With(Codec::Zstd)]
        .into_iter()
        .map(|compress| {
            let mut encoder = Encoder::new(compress);
            let (codec, wire) = encoder.encode(&pages).expect("pages");
            fuzz::batch_of(&batch_of(codec, wire.len()), wire)
        })
        .collect()
}

pub fn present(bytes: &[u8]) {
    if let Some(sets) = fuzz::present(bytes) {
        let spaces: std::collections::HashSet<Space> = sets.iter().map(|(of, _)| *of).collect();
        assert_eq!(spaces.len(), sets.len(), "a space twice");
    }
}

pub fn present_seeds() -> Vec<Vec<u8>> {
    let two = [(Space::Process(1), fuzz::pages(1, 9)), (Space::Shared(3), fuzz::pages(0, 1))];
    [&two[..], &two[..1], &[]].map(fuzz::present_of).into()
}
