//! How the pages of one batch look on the wire: without those that are zero,
//! and compressed where that gets them there sooner.
//!
//! Whether it does is measured and not guessed. A container's memory may be
//! text or may be random; a link may be slower than any compressor or faster
//! than all of them.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use transship_types::PAGE;

use crate::MemoryError;

/// Pages in one batch: one data frame, and few enough that nobody waits long
/// behind one.
pub const BATCH_PAGES: u64 = 256;

/// Bytes in one batch before compression.
pub const BATCH_BYTES: usize = (BATCH_PAGES * PAGE) as usize;

/// A batch that compression makes hardly shorter travels as it is: the target
/// has a use for the time.
const WORTH: f64 = 0.95;

/// Compression must promise this much more throughput before it is used: it
/// takes processor time that belongs to the container.
const GAIN: f64 = 1.2;

/// What is compressed to learn how well it goes while nothing is: 16 pages of
/// every 64th batch, a thousandth of the bytes.
const SAMPLE_BYTES: usize = 16 * PAGE as usize;
const SAMPLE_EVERY: u32 = 64;

/// How much a new measurement counts against those before.
const WEIGHT: f64 = 0.25;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    Raw,
    /// One LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    const COMPRESSING: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    /// As `Batch.codec` says it.
    pub fn number(self) -> u32 {
        match self {
            Codec::Raw => 0,
            Codec::Lz4 => 1,
            Codec::Zstd => 2,
        }
    }

    pub fn from_number(number: u32) -> Result<Self, MemoryError> {
        match number {
            0 => Ok(Codec::Raw),
            1 => Ok(Codec::Lz4),
            2 => Ok(Codec::Zstd),
            other => Err(MemoryError::Invalid(format!("there is no codec {other}"))),
        }
    }
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compress {
    Never,
    /// Where it helps, as measured.
    #[default]
    Auto,
    /// Always try this one; what does not shrink still travels raw.
    With(Codec),
}

impl FromStr for Compress {
    type Err = MemoryError;

    /// As flags and messages say it.
    fn from_str(text: &str) -> Result<Self, MemoryError> {
        match text {
            "never" => Ok(Compress::Never),
            "" | "auto" => Ok(Compress::Auto),
            "lz4" => Ok(Compress::With(Codec::Lz4)),
            "zstd" => Ok(Compress::With(Codec::Zstd)),
            other => Err(MemoryError::Invalid(format!("there is no compression {other:?}"))),
        }
    }
}

/// Whether every byte is zero. Most pages that are not show it in their first
/// bytes; the compiler makes vector instructions of the rest.
pub fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<128>();
    let none = |block: &[u8; 128]| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)) == 0
    };
    blocks.iter().all(none) && rest.iter().all(|byte| *byte == 0)
}

/// What a codec has shown so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Bytes after / bytes before.
    pub ratio: f64,
    /// Bytes before, by second of one thread.
    pub bytes_per_s: f64,
}

/// The codec that gets most memory through a link of `link_bytes_per_s`.
///
/// A lane compresses and then writes. The kernel sends while it compresses,
/// so this errs a little towards raw, which costs nobody anything.
pub fn choose(seen: &[(Codec, Measured)], link_bytes_per_s: f64) -> Codec {
    let through = |m: &Measured| 1.0 / (1.0 / m.bytes_per_s + m.ratio / link_bytes_per_s);
    let mut best = (Codec::Raw, link_bytes_per_s * GAIN);
    for (codec, measured) in seen {
        if measured.ratio < WORTH && through(measured) > best.1 {
            best = (*codec, through(measured));
        }
    }
    best.0
}

/// Compresses the batches of one lane.
pub struct Encoder {
    wanted: Compress,
    seen: Vec<(Codec, Measured)>,
    link_bytes_per_s: Option<f64>,
    batches: u32,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Encoder {
    pub fn new(wanted: Compress) -> Self {
        let (seen, out) = (Vec::new(), Vec::new());
        Self { wanted, seen, link_bytes_per_s: None, batches: 0, zstd: None, out }
    }

    /// What travels for `bytes`, and how it is written.
    pub fn encode<'a>(&'a mut self, bytes: &'a [u8]) -> Result<(Codec, &'a [u8]), MemoryError> {
        let codec = match self.wanted {
            Compress::Never => Codec::Raw,
            Compress::With(codec) => codec,
            Compress::Auto => self.chosen(bytes)?,
        };
        if codec == Codec::Raw || bytes.is_empty() {
            return Ok((Codec::Raw, bytes));
        }
        let length = self.measure(codec, bytes)?;
        if length as f64 > bytes.len() as f64 * WORTH {
            return Ok((Codec::Raw, bytes));
        }
        Ok((codec, &self.out[..length]))
    }

    /// How long the link took for so many bytes, waiting for room included.
    pub fn sent(&mut self, bytes: usize, took: Duration) {
        let rate = bytes as f64 / took.as_secs_f64().max(1e-9);
        // By time and not by rate: one batch that found an empty buffer must
        // not hide ten that waited.
        self.link_bytes_per_s = Some(match self.link_bytes_per_s {
            None => rate,
            Some(old) => 1.0 / ((1.0 - WEIGHT) / old + WEIGHT / rate),
        });
    }

    fn chosen(&mut self, bytes: &[u8]) -> Result<Codec, MemoryError> {
        // Nothing is known of the link before something was sent.
        let Some(link) = self.link_bytes_per_s else { return Ok(Codec::Raw) };
        if self.batches.is_multiple_of(SAMPLE_EVERY) {
            let sample = &bytes[..bytes.len().min(SAMPLE_BYTES)];
            for codec in Codec::COMPRESSING {
                self.measure(codec, sample)?;
            }
        }
        self.batches = self.batches.wrapping_add(1);
        Ok(choose(&self.seen, link))
    }

    /// Compresses into `out` and remembers how well that went.
    fn measure(&mut self, codec: Codec, bytes: &[u8]) -> Result<usize, MemoryError> {
        let start = Instant::now();
        let length = self.compress(codec, bytes)?;
        let now = Measured {
            ratio: length as f64 / bytes.len().max(1) as f64,
            bytes_per_s: bytes.len() as f64 / start.elapsed().as_secs_f64().max(1e-9),
        };
        match self.seen.iter_mut().find(|(seen, _)| *seen == codec) {
            None => self.seen.push((codec, now)),
            Some((_, seen)) => {
                seen.ratio += WEIGHT * (now.ratio - seen.ratio);
                seen.bytes_per_s += WEIGHT * (now.bytes_per_s - seen.bytes_per_s);
            }
        }
        Ok(length)
    }

    fn compress(&mut self, codec: Codec, bytes: &[u8]) -> Result<usize, MemoryError> {
        let failed = |source| MemoryError::System { what: "compressing pages", source };
        let room = match codec {
            Codec::Raw => return Ok(bytes.len()),
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(bytes.len()),
            Codec::Zstd => zstd::zstd_safe::compress_bound(bytes.len()),
        };
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        if codec == Codec::Lz4 {
            return lz4_flex::block::compress_into(bytes, &mut self.out)
                .map_err(|e| failed(std::io::Error::other(e)));
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            // The fastest level: the next ones cost more than they save.
            none => none.insert(zstd::bulk::Compressor::new(1).map_err(failed)?),
        };
        zstd.compress_to_buffer(bytes, &mut self.out[..]).map_err(failed)
    }
}

/// Undoes an [`Encoder`].
#[derive(Default)]
pub struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    out: Vec<u8>,
}

impl Decoder {
    /// The `length` bytes (at most [`BATCH_BYTES`]) that travelled as `wire`;
    /// exactly as many, or it is an error. Never writes nor allocates more,
    /// whatever `wire` claims to become.
    pub fn decode<'a>(
        &'a mut self,
        codec: Codec,
        wire: &'a [u8],
        length: usize,
    ) -> Result<&'a [u8], MemoryError> {
        let invalid = |why: String| MemoryError::Invalid(why);
        if length > BATCH_BYTES {
            return Err(invalid(format!("a batch of {length} bytes")));
        }
        if codec == Codec::Raw {
            return if wire.len() == length {
                Ok(wire)
            } else {
                Err(invalid(format!("{} bytes for {length} of pages", wire.len())))
            };
        }
        self.out.resize(BATCH_BYTES, 0);
        let out = &mut self.out[..length];
        let got = if codec == Codec::Lz4 {
            lz4_flex::block::decompress_into(wire, out)
                .map_err(|e| invalid(format!("no LZ4 block of {length} bytes: {e}")))?
        } else {
            let zstd = match &mut self.zstd {
                Some(zstd) => zstd,
                none => none.insert(zstd::bulk::Decompressor::new().map_err(|source| {
                    MemoryError::System { what: "preparing to decompress", source }
                })?),
            };
            zstd.decompress_to_buffer(wire, out)
                .map_err(|e| invalid(format!("no zstd frame of {length} bytes: {e}")))?
        };
        if got == length {
            Ok(&self.out[..length])
        } else {
            Err(invalid(format!("{got} bytes for {length} of pages")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: usize = PAGE as usize;

    /// Words of text, and bytes that nothing can compress.
    fn text(bytes: usize) -> Vec<u8> {
        b"the container survives; its pause is short; "
            .iter()
            .copied()
            .cycle()
            .take(bytes)
            .collect()
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_ne_bytes()
        };
        std::iter::repeat_with(&mut next).flatten().take(bytes).collect()
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = vec![0; P];
        assert!(is_zero(&page));
        for at in 0..P {
            page[at] = 0x10;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
        assert!(is_zero(&page[..P - 3]) && is_zero(&[]));
        assert!(!is_zero(&[0, 0, 1]));
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut decoder = Decoder::default();
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            let mut encoder = Encoder::new(Compress::With(codec));
            for bytes in [text(P), text(BATCH_BYTES), noise(BATCH_BYTES), vec![7; 3 * P]] {
                let (used, wire) = encoder.encode(&bytes).unwrap();
                assert!(wire.len() <= bytes.len());
                let back = decoder.decode(used, wire, bytes.len()).unwrap();
                assert!(back == bytes, "{codec:?}");
            }
            assert_eq!(Codec::from_number(codec.number()).unwrap(), codec);
        }
        assert!(Codec::from_number(3).is_err());
    }

    #[test]
    fn what_does_not_shrink_travels_as_it_is() {
        for codec in Codec::COMPRESSING {
            let mut encoder = Encoder::new(Compress::With(codec));
            assert_eq!(encoder.encode(&noise(BATCH_BYTES)).unwrap().0, Codec::Raw);
            assert_eq!(encoder.encode(&text(BATCH_BYTES)).unwrap().0, codec);
        }
    }

    #[test]
    fn the_codec_follows_the_link() {
        const MB: f64 = 1e6;
        let lz4 = |ratio| (Codec::Lz4, Measured { ratio, bytes_per_s: 700.0 * MB });
        let zstd = |ratio| (Codec::Zstd, Measured { ratio, bytes_per_s: 350.0 * MB });
        for (seen, link, codec) in [
            (vec![], 10.0, Codec::Raw),
            // Slow links want the smallest, fast ones nothing at all.
            (vec![lz4(0.5), zstd(0.35)], 10.0, Codec::Zstd),
            (vec![lz4(0.5), zstd(0.35)], 120.0, Codec::Lz4),
            (vec![lz4(0.5), zstd(0.35)], 1200.0, Codec::Raw),
            // Little to gain is not worth the processor.
            (vec![lz4(0.9), zstd(0.85)], 50.0, Codec::Raw),
            (vec![lz4(1.0), zstd(0.99)], 1.0, Codec::Raw),
            (vec![lz4(0.97), zstd(0.5)], 10.0, Codec::Zstd),
        ] {
            assert_eq!(choose(&seen, link * MB), codec, "{seen:?} at {link} MB/s");
        }
    }

    #[test]
    fn a_slow_link_turns_compression_on_and_a_fast_one_off() {
        let bytes = text(BATCH_BYTES);
        let mut encoder = Encoder::new(Compress::Auto);
        assert_eq!(encoder.encode(&bytes).unwrap().0, Codec::Raw);
        encoder.sent(BATCH_BYTES, Duration::from_secs(10));
        assert_ne!(encoder.encode(&bytes).unwrap().0, Codec::Raw);
        for _ in 0..200 {
            encoder.sent(BATCH_BYTES, Duration::from_nanos(1));
        }
        assert_eq!(encoder.encode(&bytes).unwrap().0, Codec::Raw);
    }

    #[test]
    fn hostile_bytes_are_errors() {
        let mut decoder = Decoder::default();
        let bomb = vec![0; 64 << 20];
        let lz4 = lz4_flex::block::compress(&bomb);
        let zstd = zstd::bulk::compress(&bomb, 1).unwrap();
        for (codec, wire) in [(Codec::Lz4, &lz4), (Codec::Zstd, &zstd)] {
            assert!(wire.len() < BATCH_BYTES, "{codec:?}: it would fit into a frame");
            for length in [P, BATCH_BYTES, BATCH_BYTES + P, bomb.len()] {
                assert!(decoder.decode(codec, wire, length).is_err(), "{codec:?} {length}");
            }
        }
        assert!(decoder.out.len() <= BATCH_BYTES && decoder.out.capacity() < 2 * BATCH_BYTES);
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            for wire in [&[][..], &[0xff; 64], &noise(P)[..P - 1], b"\x28\xb5\x2f\xfd"] {
                assert!(decoder.decode(codec, wire, P).is_err(), "{codec:?} {}", wire.len());
            }
            // Too short is as wrong as too long.
            let mut encoder = Encoder::new(Compress::With(codec));
            let bytes = text(P);
            let (used, wire) = encoder.encode(&bytes).unwrap();
            for length in [0, P - 1, P + 1, 2 * P] {
                assert!(decoder.decode(used, wire, length).is_err(), "{codec:?} {length}");
            }
        }
    }
}
