//! Compiles kernels for the card at hand, with NVRTC.
