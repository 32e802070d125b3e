"""The 8-bit form of a transform that several layers read: made by whoever makes the transform, or by the first reader.

It is noted on the transform's tensor, like the transform on its input (shared_wht.py). A kernel that writes a transform as 8-bit
numbers writes nothing else, and gives the form a tensor that stands for it (stand_in.py).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from qwha_cli.errors import KernelError
from qwha_cli.kernels.backend import Requested
from qwha_cli.kernels.fp8 import Fp8Matrix, to_fp8
from qwha_cli.kernels.stand_in import mark_stand_in, stands_in, version_of

_FORM = "_qwha_fp8"


def shared_fp8(z: Tensor, *, backend: Requested = "auto") -> Fp8Matrix:
    """The 8-bit form of z (..., in) as a matrix (tokens, in), made once for all that ask for it before z is written to.

    Raises:
        KernelError: z has neither numbers nor the form.
    """
    version = version_of(z)
    found = cast("tuple[int, Fp8Matrix] | None", getattr(z, _FORM, None))
    if found is not None and found[0] == version:
        return found[1]
    if stands_in(z):
        raise KernelError("a transform without numbers was read after its 8-bit form was gone", where="shared_fp8")
    form = to_fp8(z.detach().reshape(-1, z.shape[-1]), backend=backend)
    setattr(z, _FORM, (version, form))
    return form


def hand_on_fp8(form: Fp8Matrix, passed: Tensor) -> None:
    """Let `passed`, the numbers that `form` was made of under another name, be known in that form too."""
    setattr(passed, _FORM, (version_of(passed), form))


def known_as(form: Fp8Matrix, z: Tensor) -> Tensor:
    """Z (..., in), a tensor without numbers, as what stands for the transform that is known as `form`."""
    mark_stand_in(z)
    hand_on_fp8(form, z)
    return z
