"""Kernels: tensors in, tensors out. An op X is `X.py`; a faster form of it would be `X_triton.py` beside it."""
