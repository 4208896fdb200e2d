//! How many pieces a message has, counted before anything is allocated for
//! them. A repeated field costs its sender two bytes an element, and its
//! receiver a hundred.

use bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};

/// Fields of a message and of the one inside it, repeated ones each time. The
/// most anybody has use for are 1024 blobs of an offer and 1000 images of a
/// bundle; lists of numbers are one field, however long.
pub const MAX_FIELDS: usize = 16 << 10;

/// Whether there are no more than [`MAX_FIELDS`]. What is no message at all
/// is for the decoder to say.
pub(crate) fn is_modest(message: &[u8]) -> bool {
    let mut count = 0;
    for field in Fields(message) {
        count += 1 + Fields(field).take(MAX_FIELDS).count();
        if count > MAX_FIELDS {
            return false;
        }
    }
    true
}

/// The bytes of each field with a length, and none of another, up to the
/// first that is none.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let (_, wire_type) = decode_key(&mut self.0).ok()?;
        let length = match wire_type {
            WireType::Varint => {
                decode_varint(&mut self.0).ok()?;
                return Some(&[]);
            }
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut self.0).ok()?).ok()?,
            // Groups, which nothing of ours has; the decoder allocates nothing
            // for one it does not know.
            WireType::StartGroup | WireType::EndGroup => return Some(&[]),
        };
        let inside = self.0.get(..length)?;
        self.0.advance(length);
        Some(if wire_type == WireType::LengthDelimited { inside } else { &[] })
    }
}
