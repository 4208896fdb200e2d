//! Which nodes may send containers to this one, and to which it may send.
//!
//! A certificate of the CA proves who a node is; what it may do is said here,
//! by the name in its certificate. A peer is held to it when its session
//! begins, before anything it says has an effect, and a destination before it
//! is dialled.

use serde::Deserialize;
use transship_types::{Code, InvalidName, NodeName, Refusal};

/// A node's name, or a pattern in which each `*` stands for any characters of
/// a name, or none.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(String);

impl Pattern {
    fn covers(&self, node: &NodeName) -> bool {
        let mut pieces = self.0.split('*');
        // `split` gives at least one piece.
        let first = pieces.next().unwrap_or_default();
        let Some(mut rest) = node.as_str().strip_prefix(first) else { return false };
        let Some(last) = pieces.next_back() else { return rest.is_empty() };
        for piece in pieces {
            // The earliest place leaves the most for what follows.
            let Some(at) = rest.find(piece) else { return false };
            rest = &rest[at + piece.len()..];
        }
        rest.ends_with(last)
    }
}

impl TryFrom<String> for Pattern {
    type Error = InvalidName;

    /// A pattern that no name could match is a misspelling, and one in a list
    /// of who may do what must not go unnoticed.
    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.replace('*', "x").parse::<NodeName>()?;
        Ok(Self(text))
    }
}

/// A list of nodes in the configuration. One that is absent names every node
/// of the CA, an empty one names none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Nodes(Option<Vec<Pattern>>);

impl Nodes {
    pub fn include(&self, node: &NodeName) -> bool {
        self.0.as_ref().is_none_or(|patterns| patterns.iter().any(|p| p.covers(node)))
    }
}

/// Why nothing is taken from `peer`, for the peer.
pub fn receive(here: &NodeName, from: &Nodes, peer: &NodeName) -> Option<Refusal> {
    (!from.include(peer)).then(|| {
        Refusal::new(
            Code::NotAllowed,
            format!("it takes no containers from {peer}"),
            format!("add {peer} to `receive_from` in the configuration of {here}"),
        )
    })
}

/// Why nothing is sent to `peer`.
pub fn send(here: &NodeName, to: &Nodes, peer: &NodeName) -> Option<Refusal> {
    (!to.include(peer)).then(|| {
        Refusal::new(
            Code::NotAllowed,
            format!("{here} sends no containers to {peer}"),
            format!("add {peer} to `send_to` in the configuration of {here}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(toml: &str) -> Result<Nodes, toml::de::Error> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            nodes: Nodes,
        }
        toml::from_str::<File>(toml).map(|file| file.nodes)
    }

    #[test]
    fn a_list_names_whom_it_says_and_nobody_else() {
        for (list, node, included) in [
            ("", "anyone", true),
            ("nodes = []", "a", false),
            ("nodes = ['a']", "a", true),
            ("nodes = ['a']", "ab", false),
            ("nodes = ['a']", "ba", false),
            ("nodes = ['a', 'b']", "b", true),
            ("nodes = ['*']", "anyone", true),
            ("nodes = ['rack1-*']", "rack1-n7", true),
            ("nodes = ['rack1-*']", "rack1-", false),
            ("nodes = ['rack1-*']", "rack10-n7", false),
            ("nodes = ['rack1-*']", "xrack1-n7", false),
            ("nodes = ['*-gpu']", "n7-gpu", true),
            ("nodes = ['*-gpu']", "n7-gpu2", false),
            ("nodes = ['r*-n*-x']", "r1-n2-x", true),
            ("nodes = ['r*-n*-x']", "r1-m2-x", false),
            ("nodes = ['a*a']", "a", false),
            ("nodes = ['a*a']", "aa", true),
            ("nodes = ['a*b*b']", "ab", false),
            ("nodes = ['a**b']", "ab", true),
        ] {
            // `rack1-` is no name, so it can be no peer either.
            let Ok(node) = node.parse() else { continue };
            assert_eq!(nodes(list).unwrap().include(&node), included, "{list} {node}");
        }
    }

    #[test]
    fn a_pattern_that_fits_no_name_is_a_mistake() {
        for wrong in ["", "A", "node_a", "a.b", "-*", "*-", "a b"] {
            assert!(nodes(&format!("nodes = ['{wrong}']")).is_err(), "{wrong:?}");
        }
    }
}
