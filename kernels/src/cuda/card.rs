//! A card, through CUDA's driver.
