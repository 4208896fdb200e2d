//! Pinned bytes and hostile streams.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use prost::Message;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf, duplex};
use transship_api::session::Hello;

use crate::{Frame, MAX_CONTROL, MAX_DATA, MAX_FIELDS, Reader, WireError, Writer, decode};

fn hello() -> Hello {
    Hello { protocol: 1, software: "transship 0.1.0".into(), node: "node-a".into() }
}

async fn written(write: impl AsyncFnOnce(&mut Writer<&mut Vec<u8>>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut Writer::new(&mut bytes)).await;
    bytes
}

/// A change here breaks every deployed node: Hello never changes shape.
#[tokio::test]
async fn hello_has_the_bytes_it_always_had() {
    let bytes = written(async |w| w.control(&hello()).await.unwrap()).await;
    let mut golden = vec![1, 0, 0, 0, 27, 0, 0, 0];
    golden.extend_from_slice(b"\x08\x01");
    golden.extend_from_slice(b"\x12\x0ftransship 0.1.0");
    golden.extend_from_slice(b"\x1a\x06node-a");
    assert_eq!(bytes, golden);
    let back: Hello = Reader::new(&golden[..]).control().await.unwrap();
    assert_eq!(back, hello());
}

#[tokio::test]
async fn data_has_the_bytes_it_always_had() {
    let bytes = written(async |w| {
        w.data(b"abc").await.unwrap();
        w.end_data().await.unwrap();
    })
    .await;
    assert_eq!(bytes, b"\x02\0\0\0\x03\0\0\0abc\x02\0\0\0\0\0\0\0");
}

/// Takes what it likes of what it is offered, as sockets do.
struct Nibbling(Vec<u8>);

impl tokio::io::AsyncWrite for Nibbling {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        b: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let n = b.len().min(3);
        self.get_mut().0.extend_from_slice(&b[..n]);
        Poll::Ready(Ok(n))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_message_with_its_data_is_the_same_bytes() {
    let apart = written(async |w| {
        w.control(&hello()).await.unwrap();
        w.data(b"some pages").await.unwrap();
        w.end_data().await.unwrap();
    })
    .await;
    let together = written(async |w| {
        w.control_with_data(&hello(), b"some pages").await.unwrap();
        assert!(matches!(
            w.control_with_data(&hello(), b"").await,
            Err(WireError::Unexpected { .. })
        ));
        let long = vec![0; MAX_DATA + 1];
        assert!(matches!(
            w.control_with_data(&hello(), &long).await,
            Err(WireError::TooLong { .. })
        ));
    })
    .await;
    assert_eq!(together, apart);
    let mut nibbling = Nibbling(Vec::new());
    Writer::new(&mut nibbling).control_with_data(&hello(), b"some pages").await.unwrap();
    assert_eq!(nibbling.0, apart);
}

/// The memory of one frame serves the next, and not while somebody reads it.
#[tokio::test]
async fn a_frame_may_be_given_back() {
    let bytes = written(async |w| {
        for byte in 0..4 {
            w.data(&[byte; 4096]).await.unwrap();
        }
    })
    .await;
    let mut reader = Reader::new(&bytes[..]);
    let first = reader.data().await.unwrap().unwrap();
    let at = first.as_ptr();
    reader.reuse(first);
    let second = reader.data().await.unwrap().unwrap();
    assert_eq!((second.as_ptr(), &second[..]), (at, &[1; 4096][..]));
    reader.reuse(second.clone());
    let third = reader.data().await.unwrap().unwrap();
    assert_eq!((&second[..], &third[..]), (&[1; 4096][..], &[2; 4096][..]));
    reader.reuse(third);
    assert_eq!(reader.data().await.unwrap().unwrap(), &[3; 4096][..]);
}

#[tokio::test]
async fn a_long_run_is_split_and_joined() {
    let sent: Vec<u8> = (0..2 * MAX_DATA + 7).map(|i| i as u8).collect();
    let bytes = written(async |w| {
        w.data(&sent).await.unwrap();
        w.end_data().await.unwrap();
        w.control(&hello()).await.unwrap();
    })
    .await;
    let mut reader = Reader::new(&bytes[..]);
    let mut got = Vec::new();
    let mut sizes = Vec::new();
    while let Some(piece) = reader.data().await.unwrap() {
        sizes.push(piece.len());
        got.extend_from_slice(&piece);
    }
    assert_eq!(sizes, [MAX_DATA, MAX_DATA, 7]);
    assert!(got == sent);
    assert_eq!(reader.control::<Hello>().await.unwrap(), hello());
    assert!(matches!(reader.next().await, Err(WireError::Closed)));
}

#[tokio::test]
async fn an_empty_message_is_a_message() {
    let bytes = written(async |w| w.control(&Hello::default()).await.unwrap()).await;
    assert_eq!(Reader::new(&bytes[..]).control::<Hello>().await.unwrap(), Hello::default());
}

#[tokio::test]
async fn an_empty_slice_is_not_an_end() {
    let bytes = written(async |w| {
        assert!(matches!(w.data(b"").await, Err(WireError::Unexpected { .. })));
    })
    .await;
    assert!(bytes.is_empty());
}

/// The header alone must be enough to refuse: no payload follows here, and a
/// reader that allocated or waited for one would not answer `TooLong`.
#[tokio::test]
async fn limits_hold_before_anything_is_allocated() {
    for (kind, limit) in [(1_u8, MAX_CONTROL), (2, MAX_DATA)] {
        for length in [limit + 1, u32::MAX as usize] {
            let mut header = vec![kind, 0, 0, 0];
            header.extend_from_slice(&(length as u32).to_le_bytes());
            let error = Reader::new(&header[..]).next().await.unwrap_err();
            match error {
                WireError::TooLong { length: l, limit: m, .. } => {
                    assert_eq!((l, m), (length, limit))
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn an_overlong_message_is_not_sent() {
    let long = Hello { software: "x".repeat(MAX_CONTROL), ..Default::default() };
    let bytes = written(async |w| {
        assert!(matches!(w.control(&long).await, Err(WireError::TooLong { .. })));
    })
    .await;
    assert!(bytes.is_empty());
}

#[tokio::test]
async fn hostile_headers_are_refused() {
    for (header, wanted) in [
        (*b"\x00\0\0\0\0\0\0\0", "UnknownKind(0)"),
        (*b"\x03\0\0\0\0\0\0\0", "UnknownKind(3)"),
        (*b"\x16\x03\x01\x02\0\x01\0\x01", "UnknownKind(22)"),
        (*b"\x01\x01\0\0\0\0\0\0", "Reserved"),
        (*b"\x02\0\0\x01\0\0\0\0", "Reserved"),
    ] {
        let error = Reader::new(&header[..]).next().await.unwrap_err();
        assert_eq!(format!("{error:?}"), wanted);
    }
}

#[tokio::test]
async fn a_cut_is_told_from_an_end() {
    let whole = written(async |w| w.control(&hello()).await.unwrap()).await;
    for cut in 0..whole.len() {
        let error = Reader::new(&whole[..cut]).next().await.unwrap_err();
        match (cut, error) {
            (0, WireError::Closed) => {}
            (1.., WireError::Truncated) => {}
            (_, other) => panic!("cut after {cut} bytes: {other:?}"),
        }
    }
}

#[tokio::test]
async fn the_wrong_kind_of_frame_is_refused() {
    let control = written(async |w| w.control(&hello()).await.unwrap()).await;
    let error = Reader::new(&control[..]).data().await.unwrap_err();
    assert!(matches!(error, WireError::Unexpected { wanted: "data", got: "control" }));

    let end = written(async |w| w.end_data().await.unwrap()).await;
    let error = Reader::new(&end[..]).control::<Hello>().await.unwrap_err();
    assert!(matches!(error, WireError::Unexpected { wanted: "control", got: "end-of-data" }));
}

#[tokio::test]
async fn a_message_that_is_none_is_refused() {
    let error = Reader::new(&b"\x01\0\0\0\x02\0\0\0\xff\xff"[..]).control::<Hello>().await;
    assert!(matches!(error, Err(WireError::Decode(_))));
}

#[tokio::test(start_paused = true)]
async fn a_frame_must_arrive_whole_within_its_deadline() {
    let (mut peer, ours) = duplex(64);
    let mut reader = Reader::new(ours);
    reader.set_deadline(Duration::from_secs(10));
    // A byte every four seconds: each wait is short, the frame is not.
    let drip = async {
        for byte in *b"\x02\0\0\0\x01\0\0\0x" {
            peer.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
    };
    let (result, ()) = tokio::join!(reader.next(), drip);
    assert!(matches!(result, Err(WireError::Deadline(d)) if d.as_secs() == 10));
}

/// Each frame is in time, and the run would never end.
#[tokio::test(start_paused = true)]
async fn a_run_that_trickles_meets_a_deadline() {
    let (peer, ours) = duplex(64);
    let mut reader = Reader::new(ours);
    reader.set_deadline(Duration::from_secs(10));
    let mut writer = Writer::new(peer);
    let drip = async {
        while writer.data(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
    };
    let read = async {
        let mut frames = 0;
        loop {
            match reader.data().await {
                Ok(_) => frames += 1,
                Err(error) => break (frames, error),
            }
        }
    };
    let (frames, error) = tokio::select! {
        read = read => read,
        () = drip => unreachable!("the reader is there"),
    };
    assert!(matches!(error, WireError::Deadline(_)), "{error:?}");
    assert!(frames <= 3, "{frames}");
}

/// A reader that is slow itself blames nobody, and a run that moves may last.
#[tokio::test(start_paused = true)]
async fn a_slow_run_that_moves_is_in_time() {
    let (peer, ours) = duplex(256 << 10);
    let mut reader = Reader::new(ours);
    reader.set_deadline(Duration::from_secs(10));
    let mut writer = Writer::new(peer);
    let send = async {
        for _ in 0..20 {
            writer.data(&[7; 40 << 10]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(4)).await;
        }
        writer.end_data().await.unwrap();
    };
    let read = async {
        let mut total = 0;
        while let Some(piece) = reader.data().await.unwrap() {
            total += piece.len();
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        total
    };
    let (total, ()) = tokio::join!(read, send);
    assert_eq!(total, 20 * (40 << 10));
}

/// What takes two bytes each here would take a hundred each there.
#[tokio::test]
async fn a_message_of_too_many_parts_is_refused_before_it_is_decoded() {
    use transship_api::session::{Descriptor, Offer};
    for (count, fits) in [(1024, true), (MAX_FIELDS + 1, false)] {
        let offer = Offer { content: vec![Descriptor::default(); count], ..Default::default() };
        let bytes = bytes::Bytes::from(offer.encode_to_vec());
        assert_eq!(bytes.len(), 2 * count);
        let inside = transship_api::session::Consider { offer: Some(offer) };
        assert_eq!(decode::<Offer>(bytes).is_ok(), fits);
        let decoded = decode::<transship_api::session::Consider>(inside.encode_to_vec().into());
        match decoded {
            Err(WireError::TooMany { .. }) => assert!(!fits),
            decoded => assert_eq!(decoded.unwrap(), inside),
        }
    }
}

#[tokio::test]
async fn a_reader_may_want_less_than_the_frame_allows() {
    let bytes = written(async |w| w.control(&hello()).await.unwrap()).await;
    let mut reader = Reader::new(&bytes[..]);
    reader.set_control_limit(26);
    let error = reader.next().await.unwrap_err();
    assert!(matches!(error, WireError::TooLong { length: 27, limit: 26, .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_meets_a_deadline() {
    let (ours, _peer) = duplex(64);
    let mut writer = Writer::new(ours);
    writer.set_deadline(Duration::from_secs(10));
    assert!(matches!(writer.data(&[0; 1000]).await, Err(WireError::Deadline(_))));
}

/// What a `select!` drops in the middle of a frame is not lost.
#[tokio::test(start_paused = true)]
async fn a_cancelled_read_loses_nothing() {
    let frames = written(async |w| {
        w.control(&hello()).await.unwrap();
        w.data(b"abc").await.unwrap();
    })
    .await;
    let (mut peer, ours) = duplex(1);
    let mut reader = Reader::new(ours);
    let drip = async {
        for byte in frames {
            peer.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let impatient = async {
        let mut got = Vec::new();
        while got.len() < 2 {
            let wait = tokio::time::timeout(Duration::from_millis(300), reader.next());
            if let Ok(frame) = wait.await {
                got.push(frame.unwrap());
            }
        }
        got
    };
    let (got, ()) = tokio::join!(impatient, drip);
    assert_eq!(got[0], Frame::Control(hello().encode_to_vec().into()));
    assert_eq!(got[1], Frame::Data(b"abc"[..].into()));
}

/// A reader that gives one byte at a time must not change anything.
struct ByteByByte<'a>(&'a [u8]);

impl AsyncRead for ByteByByte<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if let Some((first, rest)) = self.0.split_first() {
            buf.put_slice(&[*first]);
            self.0 = rest;
        }
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn frames_do_not_depend_on_how_bytes_arrive() {
    let bytes = written(async |w| {
        w.control(&hello()).await.unwrap();
        w.data(b"some bytes").await.unwrap();
        w.end_data().await.unwrap();
    })
    .await;
    let mut reader = Reader::new(ByteByByte(&bytes));
    assert_eq!(reader.control::<Hello>().await.unwrap(), hello());
    assert_eq!(reader.data().await.unwrap().unwrap(), &b"some bytes"[..]);
    assert_eq!(reader.data().await.unwrap(), None);
}
