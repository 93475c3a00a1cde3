//! The text of a schedule.

use super::{Action, Parcel, Schedule, What};
use std::fmt;

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (stage, actions) in self.stages.iter().enumerate() {
            write!(f, "{stage}:")?;
            for action in actions {
                write!(f, " {action}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Forward { chunk, micro } => write!(f, "F{chunk}.{micro}"),
            Action::Backward { chunk, micro } => write!(f, "B{chunk}.{micro}"),
            Action::BackwardInput { chunk, micro } => write!(f, "I{chunk}.{micro}"),
            Action::BackwardWeights { chunk, micro } => write!(f, "W{chunk}.{micro}"),
            Action::ReduceGrads { chunk } => write!(f, "R{chunk}"),
            Action::Exchange { sends, recvs } => write!(f, "[{}]", parcels(sends, recvs)),
            Action::Post { sends, recvs } => write!(f, "({})", parcels(sends, recvs)),
            Action::Await { sends, recvs } => write!(f, "{{{}}}", parcels(sends, recvs)),
        }
    }
}

fn parcels(sends: &[Parcel], recvs: &[Parcel]) -> String {
    let sends = sends.iter().map(|parcel| format!(">{parcel}"));
    let recvs = recvs.iter().map(|parcel| format!("<{parcel}"));
    sends.chain(recvs).collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Parcel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            What::Activation => 'a',
            What::Gradient => 'g',
        };
        write!(f, "{what}{}.{}@{}", self.chunk, self.micro, self.peer)
    }
}
