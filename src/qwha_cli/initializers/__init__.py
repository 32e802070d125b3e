"""Initializers: (delta, gram, budget) -> the adapter's places and values, one matrix at a time."""
