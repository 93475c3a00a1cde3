//! The flight ledger of a run, and what it calls the actions of a schedule.

use super::executor::Keep;
use crate::comm::{Groups, agree};
use crate::error::Result;
use crate::flight::{self, Phase, Recorder, Span};
use crate::parallel::schedule::Action;
use crate::recipe::Observe;
use std::path::Path;

/// Opens the rings of all ranks in the run directory, which exists. Collective.
pub fn open_ledger(groups: &Groups, run: &Path, observe: &Observe) -> Result<()> {
    let world = &*groups.world;
    agree(world, if world.rank() == 0 { flight::begin_folder(run) } else { Ok(()) })?;
    agree(world, groups.flight.open(&flight::folder(run), observe.flight_records, groups.layout, world.rank()))
}

/// The span around a whole pass over a schedule: what of it is in no action is the bubble and its messages.
pub fn of_pass(flight: &Recorder, keep: Keep) -> Span {
    flight.span(match keep {
        Keep::Saved => Phase::Pipeline,
        Keep::Nothing => Phase::HeldOut,
    })
}

/// The span of an action; None for messages, which record themselves.
pub fn of_action(flight: &Recorder, action: &Action, keep: Keep) -> Option<Span> {
    Some(match action {
        Action::Forward { chunk, micro } if keep == Keep::Nothing => flight.span_at(Phase::HeldOut, *chunk, Some(*micro)),
        Action::Forward { chunk, micro } => flight.span_at(Phase::Forward, *chunk, Some(*micro)),
        Action::Backward { chunk, micro } | Action::BackwardInput { chunk, micro } | Action::BackwardWeights { chunk, micro } => {
            flight.span_at(Phase::Backward, *chunk, Some(*micro))
        }
        Action::ReduceGrads { chunk } => flight.span_at(Phase::Reduce, *chunk, None),
        Action::Exchange { .. } | Action::Post { .. } | Action::Await { .. } => return None,
    })
}
