//! What a user sees, and parity with other programs.

mod bad_input;
mod gguf;
mod golden;
mod harness;
mod pipeline;
mod readme;
mod tidy;
