//! The header of a frame, and the limits that hold before anything is
//! allocated for its payload.

use bytes::Bytes;

use crate::WireError;

/// The largest control message is an offer: an OCI spec and the labels of a
/// container and its image, tens of kilobytes in practice. Decoded, a message
/// may take twenty times as much.
pub const MAX_CONTROL: usize = 4 << 20;

/// Large enough that headers cost nothing, small enough that a control
/// message never waits long behind bulk bytes.
pub const MAX_DATA: usize = 1 << 20;

pub(crate) const HEADER: usize = 8;

/// A frame as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// One encoded message.
    Control(Bytes),
    /// A piece of a run of bulk bytes, never empty.
    Data(Bytes),
    /// The run of bulk bytes is complete.
    EndOfData,
}

impl Frame {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Frame::Control(_) => Kind::Control.name(),
            Frame::Data(_) => Kind::Data.name(),
            Frame::EndOfData => "end-of-data",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Control = 1,
    Data = 2,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Control => "control",
            Kind::Data => "data",
        }
    }

    fn limit(self) -> usize {
        match self {
            Kind::Control => MAX_CONTROL,
            Kind::Data => MAX_DATA,
        }
    }
}

/// A header that was checked: its length is within the limit of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub length: usize,
}

impl Header {
    pub fn new(kind: Kind, length: usize) -> Result<Self, WireError> {
        let limit = kind.limit();
        if length > limit {
            return Err(WireError::TooLong { kind: kind.name(), length, limit });
        }
        Ok(Self { kind, length })
    }

    pub fn parse(bytes: [u8; HEADER]) -> Result<Self, WireError> {
        let [kind, z0, z1, z2, length @ ..] = bytes;
        let kind = match kind {
            1 => Kind::Control,
            2 => Kind::Data,
            other => return Err(WireError::UnknownKind(other)),
        };
        if [z0, z1, z2] != [0; 3] {
            return Err(WireError::Reserved);
        }
        // u32 always fits where we run: CRIU knows no 16-bit machines.
        Self::new(kind, u32::from_le_bytes(length) as usize)
    }

    /// A reader may take less than the kind of frame allows.
    pub fn within(self, most: usize) -> Result<Self, WireError> {
        match self {
            Self { kind: Kind::Control, length } if length > most => {
                Err(WireError::TooLong { kind: self.kind.name(), length, limit: most })
            }
            _ => Ok(self),
        }
    }

    pub fn bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        // Both limits are far below 4 GiB.
        bytes[4..].copy_from_slice(&(self.length as u32).to_le_bytes());
        bytes
    }
}
