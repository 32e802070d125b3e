"""Triton's interpreter, which runs kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

HAS_TRITON = importlib.util.find_spec("triton") is not None


def run_interpreted(code: str) -> str:
    """Run Python code that calls Triton kernels on CPU tensors; return what it prints, fail with its errors."""
    # the interpreter is chosen when Triton is imported, so it needs a process of its own
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
