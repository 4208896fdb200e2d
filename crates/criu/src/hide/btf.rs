//! What the kernel says of its own types: `/sys/kernel/btf/vmlinux`.
//!
//! As much of it as it takes to find one function and the places of some
//! fields in one structure. The format is in Documentation/bpf/btf.rst: a
//! header, type records of various lengths that are numbered from 1 on, and
//! names.

use std::io;

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// What every record begins with.
const RECORD: usize = 12;

mod kind {
    pub const INT: u32 = 1;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const ENUM64: u32 = 19;
}

/// Structures within structures; the kernel's have a few.
const DEEPEST: usize = 8;

pub struct Btf<'a> {
    types: &'a [u8],
    names: &'a [u8],
    /// Where each record begins, by number; the first is of number 1.
    places: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Record<'a> {
    name: u32,
    info: u32,
    /// Members, parameters, values.
    rest: &'a [u8],
}

impl<'a> Record<'a> {
    fn read(types: &'a [u8], at: usize) -> Option<Self> {
        let record = types.get(at..)?;
        let info = number(record, 1)?;
        let count = (info & 0xffff) as usize;
        let length = match info >> 24 & 0x1f {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
            kind::ENUM | kind::FUNC_PROTO => 8 * count,
            _ => 0,
        };
        let rest = record.get(RECORD..RECORD + length)?;
        Some(Self { name: number(record, 0)?, info, rest })
    }

    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn has_bit_fields(self) -> bool {
        self.info >> 31 == 1
    }
}

impl<'a> Btf<'a> {
    pub fn parse(bytes: &'a [u8]) -> io::Result<Self> {
        Self::read(bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the kernel's types cannot be read")
        })
    }

    fn read(bytes: &'a [u8]) -> Option<Self> {
        let header = bytes.get(..HEADER)?;
        let (magic, ends) = header.split_at(4);
        if u16::from_ne_bytes([magic[0], magic[1]]) != MAGIC {
            return None;
        }
        let body = bytes.get(number(ends, 0)? as usize..)?;
        let part = |at| {
            let start = number(ends, at)? as usize;
            body.get(start..start.checked_add(number(ends, at + 1)? as usize)?)
        };
        let (types, names) = (part(1)?, part(3)?);
        let mut places = Vec::new();
        let mut at = 0;
        while at < types.len() {
            places.push(u32::try_from(at).ok()?);
            at += RECORD + Record::read(types, at)?.rest.len();
        }
        Some(Self { types, names, places })
    }

    /// The number of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.find(name, kind::FUNC).map(|(number, _)| number)
    }

    /// Where a field begins in a structure, in bytes; it may be in a structure
    /// without a name within it.
    pub fn offset(&self, structure: &str, field: &str) -> Option<u16> {
        let (_, structure) = self.find(structure, kind::STRUCT)?;
        u16::try_from(self.member(structure, field, DEEPEST)?).ok()
    }

    fn find(&self, name: &str, kind: u32) -> Option<(u32, Record<'a>)> {
        let records = (1..).map_while(|number| Some((number, self.record(number)?)));
        let mut alike = records.filter(|(_, record)| record.kind() == kind);
        alike.find(|(_, record)| self.is(record.name, name))
    }

    /// Number 0 is "void", which has no record.
    fn record(&self, number: u32) -> Option<Record<'a>> {
        let at = self.places.get((number as usize).checked_sub(1)?)?;
        Record::read(self.types, *at as usize)
    }

    fn member(&self, structure: Record<'_>, field: &str, depth: usize) -> Option<u32> {
        structure.rest.chunks_exact(12).find_map(|member| {
            let (name, of, at) = (number(member, 0)?, number(member, 1)?, number(member, 2)?);
            let bits = if structure.has_bit_fields() { at & 0xff_ffff } else { at };
            if self.is(name, field) {
                return Some(bits / 8);
            }
            let inner = self.record(of).filter(|_| self.is(name, ""))?;
            let nested = matches!(inner.kind(), kind::STRUCT | kind::UNION) && depth > 0;
            let within = nested.then(|| self.member(inner, field, depth - 1))??;
            Some(bits / 8 + within)
        })
    }

    fn is(&self, name: u32, wanted: &str) -> bool {
        let rest = self.names.get(name as usize..).unwrap_or_default();
        rest.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// The `index`th number of four bytes.
fn number(bytes: &[u8], index: usize) -> Option<u32> {
    let bytes = bytes.get(index * 4..index * 4 + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// void; int; union { ulong flags; }; struct thing { int a; <union>; };
    /// a function without a type.
    fn small() -> Vec<u8> {
        let names = b"\0int\0flags\0thing\0a\0look\0";
        let types: &[u32] = &[
            1,
            kind::INT << 24,
            4,
            32, // 1
            0,
            kind::UNION << 24 | 1,
            8,
            5,
            1,
            0, // 2
            11,
            kind::STRUCT << 24 | 2,
            16,
            17,
            1,
            0,
            0,
            2,
            64, // 3
            19,
            kind::FUNC << 24,
            0, // 4
        ];
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        let ends = [HEADER, 0, types.len(), types.len(), names.len()];
        bytes.extend(ends.iter().flat_map(|end| (*end as u32).to_ne_bytes()));
        bytes.extend(types);
        bytes.extend(names);
        bytes
    }

    #[test]
    fn functions_and_fields_are_found() {
        let bytes = small();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.function("look"), Some(4));
        assert_eq!(btf.function("thing"), None, "a structure is no function");
        assert_eq!(btf.offset("thing", "a"), Some(0));
        assert_eq!(btf.offset("thing", "flags"), Some(8));
        assert_eq!(btf.offset("thing", "b"), None);
    }

    #[test]
    fn half_a_file_is_refused() {
        let bytes = small();
        for length in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..length]).is_err(), "{length} bytes");
        }
        let mut other = bytes;
        other[0] ^= 1;
        assert!(Btf::parse(&other).is_err());
    }

    #[test]
    fn this_kernel_describes_its_mappings() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            eprintln!("note: this kernel does not describe its types; nothing tested");
            return;
        };
        let btf = Btf::parse(&bytes).unwrap();
        let places = ["vm_start", "vm_end", "vm_flags"];
        let places = places.map(|field| btf.offset("vm_area_struct", field).unwrap());
        assert_eq!(places[..2], [0, 8]);
        assert!(places[2] > 8, "{places:?}");
    }
}
