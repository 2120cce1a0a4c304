//! What a user sees, and parity with other programs.

mod adapter;
mod bad_input;
mod configurations;
mod cuda;
mod endings;
mod evidence;
mod families;
mod folders;
mod gguf;
mod gguf_families;
mod golden;
mod guesses;
mod harness;
mod hostile;
mod inputs;
mod matrix;
mod pipeline;
mod readme;
mod records;
mod sentencepiece;
mod spelling;
mod stray;
mod tidy;
mod tokenizer_notes;
mod tokenizers;
mod unknown;
