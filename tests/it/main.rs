//! What a user sees, and parity with other programs.

mod bad_input;
mod families;
mod gguf;
mod golden;
mod harness;
mod matrix;
mod pipeline;
mod readme;
mod tidy;
