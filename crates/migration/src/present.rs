//! The pages that exist at the freeze, in messages.

use std::collections::HashSet;

use transship_api::session::{Present, SpaceName};
use transship_types::{ADDRESS_LIMIT, PAGE, PageRange, PageSet, Space};

use crate::{
    MigrationError, limits,
    pages::{numbers, ranges, space, space_name},
};

/// The sets as messages, the last of which says so; one without a space if
/// there are none.
pub(crate) fn messages(sets: &[(Space, PageSet)]) -> Vec<Present> {
    let mut messages = Vec::new();
    for (space, pages) in sets {
        let name = Some(space_name(*space));
        let ranges: Vec<PageRange> = pages.iter().collect();
        // A space without a page is one all the same.
        if ranges.is_empty() {
            messages.push(message(name, Vec::new()));
        }
        for chunk in ranges.chunks(limits::PRESENT_CHUNK) {
            messages.push(message(name, numbers(chunk.iter().copied())));
        }
    }
    match messages.last_mut() {
        Some(last) => last.last = true,
        None => messages.push(Present { last: true, ..Present::default() }),
    }
    messages
}

fn message(space: Option<SpaceName>, pages: Vec<u64>) -> Present {
    Present { space, pages, last: false }
}

/// The sets again, as they come in.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    sets: Vec<(Space, PageSet)>,
    seen: HashSet<Space>,
    ranges: usize,
    complete: bool,
}

impl Presence {
    pub fn add(&mut self, message: Present) -> Result<(), MigrationError> {
        if self.complete {
            return Err(MigrationError::malformed("present pages after the last of them"));
        }
        self.complete = message.last;
        let nothing = message.space.is_none() && self.sets.is_empty() && message.last;
        if nothing && message.pages.is_empty() {
            return Ok(());
        }
        let space = space(message.space.as_ref())?;
        if message.pages.len() > 2 * limits::PRESENT_CHUNK {
            return Err(MigrationError::malformed("too many ranges in one message"));
        }
        let ranges = ranges(&message.pages, ADDRESS_LIMIT / PAGE)?;
        self.ranges += ranges.len();
        if self.ranges > limits::PRESENT_RANGES {
            let what = format!("present pages in more than {} ranges", limits::PRESENT_RANGES);
            return Err(MigrationError::malformed(what));
        }
        // The messages of one space follow one another.
        if let Some((last, pages)) = self.sets.last_mut()
            && *last == space
        {
            ranges.into_iter().for_each(|range| pages.insert(range));
            return Ok(());
        }
        if !self.seen.insert(space) {
            return Err(MigrationError::malformed(format!("the pages of {space} twice")));
        }
        if self.seen.len() > limits::SPACES {
            return Err(MigrationError::malformed("more spaces than a container has"));
        }
        self.sets.push((space, ranges.into_iter().collect()));
        Ok(())
    }

    /// The sets, if any have come; then all must have.
    pub fn if_any(self) -> Result<Vec<(Space, PageSet)>, MigrationError> {
        let begun = !self.sets.is_empty() || self.complete;
        match self.complete() {
            Some(sets) => Ok(sets),
            None if !begun => Ok(Vec::new()),
            None => Err(MigrationError::malformed("a list of pages without its end")),
        }
    }

    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The sets, if all of them have come.
    pub fn complete(self) -> Option<Vec<(Space, PageSet)>> {
        self.complete.then_some(self.sets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: impl Iterator<Item = u64>) -> PageSet {
        pages.map(|page| PageRange::of_pages(page * PAGE, 1).unwrap()).collect()
    }

    fn through(messages: Vec<Present>) -> Result<Option<Vec<(Space, PageSet)>>, MigrationError> {
        let mut presence = Presence::default();
        for message in messages {
            presence.add(message)?;
        }
        Ok(presence.complete())
    }

    #[test]
    fn sets_come_back_however_many_messages_they_take() {
        let fragmented = set((0..limits::PRESENT_CHUNK as u64 + 7).map(|page| 2 * page));
        let sets = vec![
            (Space::Process(1), set(1..9)),
            (Space::Process(2), fragmented),
            (Space::Shared(3), PageSet::new()),
        ];
        let sent = messages(&sets);
        assert_eq!(sent.len(), 4);
        assert_eq!(through(sent.clone()).unwrap(), Some(sets));
        assert_eq!(through(sent[..3].to_vec()).unwrap(), None, "the last is missing");
        assert_eq!(through(messages(&[])).unwrap(), Some(vec![]));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let one = |pid, pages: &[u64], last| Present {
            space: Some(space_name(Space::Process(pid))),
            pages: pages.to_vec(),
            last,
        };
        for (case, sent) in [
            ("after the last", vec![one(1, &[1, 1], true), one(1, &[3, 1], true)]),
            ("twice", vec![one(1, &[1, 1], false), one(2, &[1, 1], false), one(1, &[3, 1], true)]),
            ("of nobody", vec![Present { pages: vec![1, 1], last: true, ..Default::default() }]),
            ("half a range", vec![one(1, &[1], true)]),
            ("beyond every address", vec![one(1, &[u64::MAX, 2], true)]),
        ] {
            assert!(through(sent).is_err(), "{case}");
        }
    }
}
