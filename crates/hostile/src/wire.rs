//! Frames, however their bytes arrive.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures::executor::block_on;
use tokio::io::{AsyncRead, ReadBuf};
use transship_api::session::Hello;
use transship_wire::{Frame, MAX_CONTROL, MAX_DATA, Reader, Writer};

/// The first byte says how many bytes arrive at a time.
pub fn frames(bytes: &[u8]) {
    let Some((&step, stream)) = bytes.split_first() else { return };
    let mut again = Vec::new();
    let arriving = Pieces { rest: stream, step: usize::from(step).max(1) };
    block_on(async {
        let mut reader = Reader::new(arriving);
        while let Ok(frame) = reader.next().await {
            header(&mut again, &frame);
        }
    });
    assert!(stream.starts_with(&again), "what came is not what was read");
}

/// The frame as it must have come.
fn header(out: &mut Vec<u8>, frame: &Frame) {
    let (kind, payload, most) = match frame {
        Frame::Control(payload) => (1, &payload[..], MAX_CONTROL),
        Frame::Data(payload) => (2, &payload[..], MAX_DATA),
        Frame::EndOfData => (2, &[][..], 0),
    };
    assert!(payload.len() <= most && (kind == 1 || payload.is_empty() == (most == 0)));
    out.extend([kind, 0, 0, 0]);
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
}

struct Pieces<'a> {
    rest: &'a [u8],
    step: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.step.min(self.rest.len()).min(into.remaining());
        let (piece, rest) = self.rest.split_at(length);
        into.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

pub fn frame_seeds() -> Vec<Vec<u8>> {
    let hello = Hello { protocol: 1, software: "transship".into(), node: "a".into() };
    let run = block_on(async {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        // Into memory: nothing that could fail.
        writer.control(&hello).await.expect("memory");
        writer.data(b"some pages").await.expect("memory");
        writer.end_data().await.expect("memory");
        writer.control(&hello).await.expect("memory");
        bytes
    });
    [1, 3, 255].map(|step| [&[step], &run[..]].concat()).into()
}
