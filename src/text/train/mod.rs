//! (trainer)
