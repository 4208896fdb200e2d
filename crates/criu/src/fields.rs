//! Protobuf edited field by field.
//!
//! The gate must set an option and leave every other byte as it was: a newer
//! runtime may send what our copy of `rpc.proto` has never heard of, and
//! decoding it into generated types would drop it. So a message is kept as a
//! list of undecoded fields.

use thiserror::Error;

/// Bytes that are no protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BadFields {
    #[error("a field is cut short")]
    Truncated,
    #[error("wire type {0} is not one of protobuf's")]
    WireType(u8),
    #[error("a varint is longer than ten bytes")]
    Varint,
    #[error("a field that must be there is missing, or of another type")]
    Missing,
}

/// A message as a list of fields, each with its bytes as they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<Field>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    number: u32,
    /// Tag and value.
    raw: Vec<u8>,
    /// Where the value starts; for a length-delimited field, after the length.
    value_at: usize,
    wire: Wire,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    Varint,
    Fixed64,
    Bytes,
    Fixed32,
}

impl Fields {
    pub fn parse(mut bytes: &[u8]) -> Result<Self, BadFields> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let field = Field::first_of(bytes)?;
            bytes = &bytes[field.raw.len()..];
            fields.push(field);
        }
        Ok(Self(fields))
    }

    pub fn encode(&self) -> Vec<u8> {
        self.0.iter().flat_map(|field| field.raw.iter().copied()).collect()
    }

    /// The last value, as protobuf wants it for a field given twice.
    pub fn varint(&self, number: u32) -> Option<u64> {
        let field = self.0.iter().rfind(|f| f.number == number && f.wire == Wire::Varint)?;
        read_varint(&field.raw[field.value_at..]).ok().map(|(value, _)| value)
    }

    pub fn bytes(&self, number: u32) -> Option<&[u8]> {
        self.all_bytes(number).next_back()
    }

    pub fn all_bytes(&self, number: u32) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0
            .iter()
            .filter(move |f| f.number == number && f.wire == Wire::Bytes)
            .map(|f| &f.raw[f.value_at..])
    }

    pub fn remove(&mut self, number: u32) {
        self.0.retain(|f| f.number != number);
    }

    pub fn set_varint(&mut self, number: u32, value: u64) {
        let mut raw = varint(u64::from(number) << 3);
        let value_at = raw.len();
        raw.extend(varint(value));
        self.set(Field { number, raw, value_at, wire: Wire::Varint });
    }

    /// Protobuf writes a negative int32 as ten bytes.
    pub fn set_int32(&mut self, number: u32, value: i32) {
        self.set_varint(number, i64::from(value) as u64);
    }

    pub fn set_bytes(&mut self, number: u32, value: &[u8]) {
        self.set(Field::of_bytes(number, value));
    }

    pub fn add_bytes(&mut self, number: u32, value: &[u8]) {
        self.0.push(Field::of_bytes(number, value));
    }

    /// Changes each occurrence of an embedded message where it stands.
    pub fn edit_all(
        &mut self,
        number: u32,
        mut edit: impl FnMut(&mut Fields),
    ) -> Result<(), BadFields> {
        for field in &mut self.0 {
            if field.number == number && field.wire == Wire::Bytes {
                let mut inner = Fields::parse(&field.raw[field.value_at..])?;
                edit(&mut inner);
                *field = Field::of_bytes(number, &inner.encode());
            }
        }
        Ok(())
    }

    /// Replaces where the first one stood: order is kept for readers of logs.
    fn set(&mut self, field: Field) {
        let number = field.number;
        match self.0.iter().position(|f| f.number == number) {
            None => self.0.push(field),
            Some(at) => {
                self.0[at] = field;
                let mut index = 0;
                self.0.retain(|f| {
                    index += 1;
                    f.number != number || index - 1 == at
                });
            }
        }
    }
}

impl Field {
    fn of_bytes(number: u32, value: &[u8]) -> Self {
        let mut raw = varint(u64::from(number) << 3 | 2);
        raw.extend(varint(value.len() as u64));
        let value_at = raw.len();
        raw.extend_from_slice(value);
        Field { number, raw, value_at, wire: Wire::Bytes }
    }

    fn first_of(bytes: &[u8]) -> Result<Self, BadFields> {
        let (tag, tag_len) = read_varint(bytes)?;
        let number = u32::try_from(tag >> 3).map_err(|_| BadFields::Varint)?;
        let rest = &bytes[tag_len..];
        let (wire, skip, len) = match (tag & 7) as u8 {
            0 => (Wire::Varint, 0, read_varint(rest)?.1),
            1 => (Wire::Fixed64, 0, 8),
            2 => {
                let (len, len_len) = read_varint(rest)?;
                let len = usize::try_from(len).map_err(|_| BadFields::Truncated)?;
                (Wire::Bytes, len_len, len)
            }
            5 => (Wire::Fixed32, 0, 4),
            // 3 and 4 are groups, which CRIU's RPC has never had.
            other => return Err(BadFields::WireType(other)),
        };
        let value_at = tag_len + skip;
        let end = value_at.checked_add(len).ok_or(BadFields::Truncated)?;
        let raw = bytes.get(..end).ok_or(BadFields::Truncated)?.to_vec();
        Ok(Field { number, raw, value_at, wire })
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(10);
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The value and how many bytes it took.
fn read_varint(bytes: &[u8]) -> Result<(u64, usize), BadFields> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate() {
        if index == 10 {
            return Err(BadFields::Varint);
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, index + 1));
        }
    }
    Err(BadFields::Truncated)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use transship_api::criu::{CriuOpts, CriuReq};

    use super::*;

    #[test]
    fn agrees_with_a_generated_message() {
        let opts = CriuOpts {
            images_dir_fd: -1,
            log_file: Some("dump.log".into()),
            external: vec!["mnt[/etc/hosts]:/etc/hosts".into(), "net[1]:x".into()],
            tcp_established: Some(true),
            ..Default::default()
        };
        let mut fields = Fields::parse(&opts.encode_to_vec()).unwrap();
        fields.set_varint(8, 1);
        fields.set_int32(1, 7);
        fields.remove(5);
        fields.add_bytes(37, b"third");
        let edited = CriuOpts::decode(fields.encode().as_slice()).unwrap();
        assert_eq!(edited.images_dir_fd, 7);
        assert_eq!(edited.file_locks, Some(true));
        assert_eq!(edited.tcp_established, None);
        assert_eq!(edited.external.len(), 3);
        assert_eq!(edited.log_file.as_deref(), Some("dump.log"));
    }

    #[test]
    fn unknown_fields_keep_their_bytes() {
        // Field 999 (varint, written with a needless leading group), 1000
        // (fixed64), 1001 (bytes), 1002 (fixed32).
        let mut raw = varint(999 << 3);
        raw.extend([0x81, 0x00]);
        raw.extend(varint(1000 << 3 | 1));
        raw.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        raw.extend(varint(1001 << 3 | 2));
        raw.extend([3, b'a', b'b', b'c']);
        raw.extend(varint(1002 << 3 | 5));
        raw.extend([9, 9, 9, 9]);
        let mut fields = Fields::parse(&raw).unwrap();
        assert_eq!(fields.encode(), raw);
        fields.set_varint(3, 1);
        assert!(fields.encode().starts_with(&raw));
        assert_eq!(fields.varint(999), Some(1));
    }

    #[test]
    fn a_field_set_twice_is_one_again() {
        let mut raw = vec![0x18, 1, 0x18, 0];
        raw.extend(CriuReq { r#type: 1, ..Default::default() }.encode_to_vec());
        let mut fields = Fields::parse(&raw).unwrap();
        assert_eq!(fields.varint(3), Some(0));
        fields.set_varint(3, 1);
        assert_eq!(fields.encode(), [0x18, 1, 0x08, 1]);
    }

    #[test]
    fn edits_inside_stay_in_place() {
        let mut inner = Fields::default();
        inner.set_bytes(1, b"pipe:[1]");
        inner.set_int32(2, 1);
        let mut outer = Fields::default();
        outer.add_bytes(27, &inner.encode());
        outer.set_varint(3, 1);
        outer.edit_all(27, |fd| fd.set_int32(2, 12)).unwrap();
        let edited = Fields::parse(outer.bytes(27).unwrap()).unwrap();
        assert_eq!(edited.varint(2), Some(12));
        assert_eq!(edited.bytes(1), Some(b"pipe:[1]".as_slice()));
    }

    #[test]
    fn hostile_bytes_are_errors() {
        for (bytes, why) in [
            (&[0x08][..], BadFields::Truncated),
            (&[0x0a, 0x05, 1][..], BadFields::Truncated),
            (&[0x0b][..], BadFields::WireType(3)),
            (&[0x0f][..], BadFields::WireType(7)),
            (&[0xff; 12][..], BadFields::Varint),
            (
                &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1][..],
                BadFields::Truncated,
            ),
            (&[0x09, 1, 2][..], BadFields::Truncated),
        ] {
            assert_eq!(Fields::parse(bytes), Err(why), "{bytes:x?}");
        }
    }
}
