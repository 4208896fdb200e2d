//! Every decision of the hand-over, and the order of its acts. A test puts a
//! wrong one in the place of one of them.

use transship_migration::{
    decide::{
        self, Became, Choice, Journaled, Kept, Obeyed, Overrule, Proof, Resume, Seen, Standing,
        Told, Word,
    },
    handoff::{Answer, Ending},
};
use transship_types::Epoch;

#[derive(Clone)]
pub struct Rules {
    pub after_answer: fn(&Answer) -> Ending,
    pub after_running: fn(bool) -> Option<Ending>,
    pub may_run: fn(Epoch, Word) -> bool,
    pub may_refuse: fn(bool) -> bool,
    pub became: fn(Seen, bool, Journaled, bool) -> Became,
    pub standing: fn(Option<Kept>) -> Standing,
    pub on_standing: fn(Standing) -> Option<Proof>,
    pub after_restart: fn(bool, bool, Journaled) -> Resume,
    pub tell_again: fn(Told) -> bool,
    pub on_decision: fn(Epoch, Epoch, bool) -> Overrule,
    pub after_decision: fn(Choice, Told, bool) -> Obeyed,
    /// The journal before the commit, on the source.
    pub journal_before_commit: bool,
    /// The journal before the first instruction, on the target.
    pub journal_before_run: bool,
    /// A container with an open migration gets no other one.
    pub one_at_a_time: bool,
    /// An open arrival is looked at again even if its lease is gone.
    pub look_beyond_leases: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            after_answer: decide::after_answer,
            after_running: decide::after_running,
            may_run: decide::may_run,
            may_refuse: decide::may_refuse,
            became: decide::became,
            standing: decide::standing,
            on_standing: decide::on_standing,
            after_restart: decide::after_restart,
            tell_again: decide::tell_again,
            on_decision: decide::on_decision,
            after_decision: decide::after_decision,
            journal_before_commit: true,
            journal_before_run: true,
            one_at_a_time: true,
            look_beyond_leases: true,
        }
    }
}
