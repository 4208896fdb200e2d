//! Bytes that are nearly right, the same ones in every run.

/// Spoils what it is given, endlessly.
pub struct Mutations {
    state: u64,
}

/// Numbers at which lengths and counts go wrong.
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

impl Mutations {
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1 }
    }

    /// One of the seeds with one to four changes.
    pub fn next(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = self.one_of(seeds).clone();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, seeds);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let length = self.below(17).min(bytes.len() - at);
        match self.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = self.random() as u8,
            2 => {
                let width = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
                let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                bytes[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let again = bytes[at..at + length].to_vec();
                let to = self.below(bytes.len() + 1);
                drop(bytes.splice(to..to, again));
            }
            5 => {
                let other = self.one_of(seeds);
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => bytes.truncate(at),
        }
    }

    fn one_of<'a>(&mut self, seeds: &'a [Vec<u8>]) -> &'a Vec<u8> {
        &seeds[self.below(seeds.len())]
    }

    fn below(&mut self, most: usize) -> usize {
        (self.random() % most.max(1) as u64) as usize
    }

    /// xorshift64: good enough to hit any byte with anything.
    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }
}
