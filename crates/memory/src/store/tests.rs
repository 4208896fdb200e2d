use std::collections::BTreeMap;

use super::*;

const SPACE: Space = Space::Process(7);

fn range(first: u64, last: u64) -> PageRange {
    PageRange::new(first * PAGE, last * PAGE).unwrap()
}

fn page(fill: u64) -> Vec<u8> {
    fill.to_ne_bytes().repeat(PAGE as usize / 8)
}

/// xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Against a plain map of pages; zero is content 0 here.
#[test]
fn it_keeps_what_a_plain_map_keeps() {
    const PAGES: u64 = 1500;
    for seed in [1, 0x5eed, 0xfeed_beef] {
        let mut random = Random(seed);
        let store = Store::new(64 << 20);
        let mut plain = BTreeMap::<u64, u64>::new();
        for step in 1..200_u32 {
            let first = random.below(PAGES - 1);
            let some = range(first, (first + 1 + random.below(300)).min(PAGES));
            let pages = some.start() / PAGE..some.end() / PAGE;
            match random.below(8) {
                0..5 => {
                    let fills: Vec<u64> =
                        pages.clone().map(|_| 1 + random.below(1 << 40)).collect();
                    let bytes: Vec<u8> = fills.iter().flat_map(|fill| page(*fill)).collect();
                    store.put(SPACE, &[some], &bytes, step).unwrap();
                    plain.extend(pages.zip(fills));
                }
                5 => {
                    store.zero(SPACE, &[some], step).unwrap();
                    plain.extend(pages.map(|page| (page, 0)));
                }
                6 => {
                    store.forget(SPACE, some).unwrap();
                    plain.retain(|page, _| !pages.contains(page));
                }
                _ => {
                    let keep: PageSet = plain
                        .keys()
                        .filter(|page| !pages.contains(page))
                        .map(|p| range(*p, p + 1))
                        .collect();
                    store.present(SPACE, &keep).unwrap();
                    plain.retain(|page, _| !pages.contains(page));
                }
            }
        }
        let mut bytes = page(0);
        for number in 0..PAGES {
            let read = store.copy_out(SPACE, range(number, number + 1), &mut bytes);
            match plain.get(&number) {
                Some(fill) => assert!(read.is_ok() && bytes == page(*fill), "page {number}"),
                None => assert!(matches!(read, Err(MemoryError::Missing { .. })), "page {number}"),
            }
        }
        let held = plain.values().filter(|fill| **fill != 0).count() as u64;
        assert_eq!(store.bytes(), held * PAGE, "seed {seed}");
        let all: u64 = store.rounds(SPACE).iter().map(|(range, _)| range.pages()).sum();
        assert_eq!(all, plain.len() as u64);
        store.present(SPACE, &PageSet::new()).unwrap();
        assert_eq!(store.bytes(), 0);
    }
}

#[test]
fn what_was_written_last_is_known_as_such() {
    let store = Store::new(1 << 20);
    store.put(SPACE, &[range(0, 4)], &page(1).repeat(4), 0).unwrap();
    store.put(SPACE, &[range(1, 2)], &page(2), 3).unwrap();
    let rounds = store.rounds(SPACE);
    assert_eq!(rounds, [(range(0, 1), 0), (range(1, 2), 3), (range(2, 4), 0)]);
}

#[test]
fn beyond_the_limit_is_refused_and_overwriting_is_not() {
    let store = Store::new(4 * PAGE);
    store.put(SPACE, &[range(0, 4)], &page(1).repeat(4), 0).unwrap();
    store.put(SPACE, &[range(0, 4)], &page(2).repeat(4), 1).unwrap();
    store.zero(SPACE, &[range(8, 4000)], 1).unwrap();
    let full = store.put(Space::Process(8), &[range(0, 1)], &page(1), 1);
    assert!(matches!(full, Err(MemoryError::Full { limit_bytes }) if limit_bytes == 4 * PAGE));
    store.forget(SPACE, range(3, 4)).unwrap();
    store.put(Space::Process(8), &[range(0, 1)], &page(1), 1).unwrap();
}

#[test]
fn zeros_without_end_are_refused_and_fair_ones_are_not() {
    let every_second = |pages: std::ops::Range<u64>| {
        pages.map(|page| range(2 * page, 2 * page + 1)).collect::<Vec<_>>()
    };
    let store = Store { limit_stretches: 8, ..Store::new(4 * PAGE) };
    store.zero(SPACE, &every_second(0..8), 0).unwrap();
    // The same again, and what joins them, is nothing more.
    store.zero(SPACE, &every_second(0..8), 1).unwrap();
    let more = store.zero(Space::Process(8), &[range(0, 1)], 1);
    assert!(matches!(more, Err(MemoryError::Scattered { limit: 8 })), "{more:?}");
    store.forget(SPACE, range(0, 4)).unwrap();
    store.zero(Space::Process(8), &[range(4, 5)], 1).unwrap();
    store.present(SPACE, &PageSet::new()).unwrap();
    store.zero(SPACE, &every_second(0..6), 2).unwrap();
    // With each page of the limit in the midst of zeros there is room.
    let store = Store::new(4 * PAGE);
    store.zero(SPACE, &[range(0, 100)], 0).unwrap();
    for first in [10, 20, 30, 40] {
        store.put(SPACE, &[range(first, first + 1)], &page(1), 0).unwrap();
    }
    store.zero(SPACE, &every_second(100..1000), 1).unwrap();
    let counted = store.stretches.load(Relaxed);
    assert_eq!(counted, store.rounds(SPACE).len(), "each is counted once");
}

#[test]
fn a_page_that_never_came_is_named() {
    let store = Store::new(1 << 20);
    store.put(SPACE, &[range(0, 2)], &page(1).repeat(2), 0).unwrap();
    let missing = store.present(SPACE, &[range(0, 3)].into_iter().collect());
    assert!(
        matches!(missing, Err(MemoryError::Missing { space: SPACE, address }) if address == 2 * PAGE)
    );
}

#[test]
fn only_what_is_expected_is_let_in() {
    let store = Store::new(1 << 20);
    store.put(SPACE, &[range(0, 2)], &page(1).repeat(2), 0).unwrap();
    assert_eq!(store.expect(SPACE, &[range(1, 4)].into_iter().collect()).unwrap(), 2);
    store.put(SPACE, &[range(0, 3)], &page(2).repeat(3), 1).unwrap();
    assert_eq!(store.missing(SPACE), [range(3, 4)].into_iter().collect());
    let mut bytes = page(0).repeat(2);
    store.copy_out(SPACE, range(1, 3), &mut bytes).unwrap();
    assert_eq!(bytes, [page(1), page(2)].concat(), "what was here stays as it was");
    store.forget(SPACE, range(1, 4)).unwrap();
    store.put(SPACE, &[range(1, 3)], &page(3).repeat(2), 1).unwrap();
    assert_eq!(store.bytes(), 0, "what was placed does not come back");
}

#[test]
fn lanes_write_side_by_side() {
    let store = Store::new(256 << 20);
    std::thread::scope(|scope| {
        for lane in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                for batch in 0..64 {
                    let first = (batch * 4 + lane) * 64;
                    let bytes: Vec<u8> = (first..first + 64).flat_map(page).collect();
                    store.put(SPACE, &[range(first, first + 64)], &bytes, 0).unwrap();
                }
            });
        }
    });
    let mut bytes = page(0);
    for number in 0..4 * 64 * 64 {
        store.copy_out(SPACE, range(number, number + 1), &mut bytes).unwrap();
        assert_eq!(bytes, page(number));
    }
}
