"""Which implementation of an op runs, and why.

Every op has a form in plain torch operations, right on every device. A faster one in Triton would be a file `X_triton.py` beside
`X.py`, listed in `_TRITON`; none exists yet. The choice is returned together with its reason so that a stage can record both: a
fallback is never silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwha_cli.errors import KernelError

Backend = Literal["torch", "triton"]

# ops that have a Triton form
_TRITON: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """The backend an op runs on and the reason, for the manifest."""

    name: Backend
    reason: str


def choose(requested: Literal["auto", "torch", "triton"], *, op: str) -> Choice:
    """Choose the backend of one op.

    Args:
        requested: What the user asked for; `auto` takes the fastest that exists.
        op: The op's name, as its file is called.

    Raises:
        KernelError: `triton` was asked for and this op has no Triton form.
    """
    if requested == "torch":
        return Choice("torch", "asked for")
    if op in _TRITON:
        return Choice("triton", "asked for" if requested == "triton" else "the fastest that exists")
    if requested == "triton":
        raise KernelError("there is no Triton kernel for this op yet", where=op, remedy="use backend auto or torch")
    return Choice("torch", "the only one that exists")
