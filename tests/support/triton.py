"""Triton's interpreter, which runs kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

HAS_TRITON = importlib.util.find_spec("triton") is not None


# where e4m3 rounds, the interpreter cuts off, or loses a carry: torch's conversion takes its place
_ROUNDED = """
import numpy, torch, triton.language
from triton.runtime import interpreter
def _convert(x, source, target, mode, _own=interpreter._convert_float):
    if (source, target) != (triton.language.float32, triton.language.float8e4nv):
        return _own(x, source, target, mode)
    found = torch.from_numpy(numpy.array(x, dtype=numpy.float32)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return found.view(torch.uint8).numpy().reshape(x.shape)
interpreter._convert_float = _convert
"""


def run_interpreted(code: str) -> str:
    """Run Python code that calls Triton kernels on CPU tensors; return what it prints, fail with its errors."""
    # the interpreter is chosen when Triton is imported, so it needs a process of its own
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    done = subprocess.run([sys.executable, "-c", _ROUNDED + code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
