//! Turning other kinds of checkpoint into what a Hugging Face directory would hold.

pub(crate) mod gguf;
mod gguf_tokenizer;
