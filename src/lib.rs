//! quantc: a post-training quantization compiler for large language models.
