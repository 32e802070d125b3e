"""Quantizers: pure functions (weight, gram) -> PackedWeight, one a file."""
