//! What all binaries share: the end of the program. One line for an error, the right exit code.

use crate::error::{Error, Result};
use crate::tensor::DType;
use std::io::Write;
use std::process::ExitCode;

/// Runs the program and turns its error into one line on stderr and its exit code (see `error`).
pub fn main_with(run: impl FnOnce() -> Result<()>) -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints the one line. A closed stderr is nobody's loss.
pub fn report(error: &Error) {
    let _ = writeln!(std::io::stderr(), "error: {error}");
}

/// For `--dtype`: f32 or bf16.
pub fn parse_dtype(text: &str) -> std::result::Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        other => Err(format!("{other:?} is neither f32 nor bf16")),
    }
}
