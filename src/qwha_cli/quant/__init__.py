"""Quantized weights as values, as layers, and as folders that transformers loads."""
