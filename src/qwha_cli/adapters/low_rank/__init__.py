"""The low-rank adapter (LoRA) on layers that may be quantized: peft's own method, with a layer that knows our codes."""
