"""Language models: loading them, finding the linear layers to compress, and walking through them block by block."""
