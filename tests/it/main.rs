//! What a user sees, and parity with other programs.

mod golden;
mod pipeline;
