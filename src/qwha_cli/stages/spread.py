"""The matrices of a block, shared out to several devices: each is computed whole on one of them, so the result is that of one.

A matrix needs its weight and the Gram matrix of its inputs, and nothing of the others. So a thread a device takes its share, the
Gram matrices are copied there, and what comes out is brought back; the calibration text runs through the blocks on the first
device alone. Equal devices are taken for granted: another kind of GPU may round otherwise.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

from qwha_cli.quant.gram import Gram

T = TypeVar("T")


def spread(
    shapes: Mapping[str, tuple[int, int]],
    work: Callable[[str, Gram], T],
    *,
    grams: Mapping[str, Gram],
    devices: Sequence[torch.device],
) -> dict[str, T]:
    """Do the work of every layer of a block.

    Args:
        shapes: Layer to (out, in), in the block's order.
        work: Computes one layer where its Gram matrix lies; runs in a thread of its own if there are several devices.
        grams: Layer to its Gram matrix on the first device; layers with common inputs share one.
        devices: Where to compute.

    Returns:
        Layer to what `work` gave, in the block's order.

    Raises:
        Exception: That of the first layer, in the block's order, that failed.
    """
    if len(devices) < 2:
        return {name: work(name, grams[name]) for name in shapes}
    _load_linear_algebra(devices[0])
    results: dict[str, T] = {}
    failures: dict[str, BaseException] = {}
    stopped = threading.Event()

    def share(names: Sequence[str], device: torch.device) -> None:
        copies: dict[int, Gram] = {}
        with _current(device):
            for name in names:
                if stopped.is_set():
                    return
                gram = grams[name]
                if gram.device != device and id(gram) not in copies:
                    copies[id(gram)] = Gram(gram.matrix.to(device))
                try:
                    results[name] = work(name, copies.get(id(gram), gram))
                except BaseException as error:
                    failures[name] = error
                    return

    with ThreadPoolExecutor(len(devices)) as pool:
        jobs = [pool.submit(share, names, device) for names, device in zip(shares(shapes, len(devices)), devices, strict=True)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            stopped.set()  # Ctrl-C: the pool waits for what has begun, not for the rest
            raise
    for name in shapes:
        if name in failures:
            raise failures[name]
    return {name: results[name] for name in shapes}


def shares(shapes: Mapping[str, tuple[int, int]], count: int) -> list[list[str]]:
    """Split layers into `count` shares of similar cost, out · in² each: the costliest first, to whoever has least."""
    cost = {name: float(out) * size**2 for name, (out, size) in shapes.items()}
    found: list[list[str]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for name in sorted(shapes, key=lambda name: -cost[name]):
        least = loads.index(min(loads))
        found[least].append(name)
        loads[least] += cost[name]
    return found


def release(devices: Sequence[torch.device]) -> None:
    """Give back the memory that torch keeps in reserve on all devices but the first: other processes will train there."""
    for device in devices[1:]:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def _load_linear_algebra(device: torch.device) -> None:
    """Let torch load its library of factorisations here, once: if two threads are the first to ask for it, one of them fails."""
    # "lazy wrapper should be called at most once", pytorch issue 90613
    if device.type == "cuda":
        torch.linalg.inv(torch.ones(1, 1, device=device))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    # a thread begins on GPU 0, and kernels of Triton run on the current one
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
