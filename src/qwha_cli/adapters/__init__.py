"""Adapters: what is trained beside the frozen quantized weights, and how peft comes to know it."""
