"""How the benchmarks of kernels take time: calls in one CUDA graph, each on memory of its own, the median of several replays.

In a graph the host's launches cost nothing; copies of the inputs that are together several times the cache (`num_copies`), each
read by one call, leave nothing in it from the last replay. Results are kept, so that each call also writes memory of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

# five times the cache of an H100
COLD_BYTES = 256 * 2**20

Call = Callable[[], object]


def num_copies(nbytes: int, *, most: int | None = None) -> int:
    """How many copies of so many bytes no cache holds: at least two, and not more than `most`."""
    wanted = max(2, math.ceil(COLD_BYTES / nbytes))
    return wanted if most is None else min(most, wanted)


def graph_us(calls: Sequence[Call], *, replays: int = 7) -> float:
    """Microseconds of a call inside a CUDA graph of all of them, one after the other.

    Args:
        calls: Each on tensors of its own; what they return is kept until the time is taken.
        replays: How many times the graph is timed, after one replay that uploads it.
    """
    # compiles, and makes what is made once, which a capture does not allow or would time; some of it belongs to a call's own
    # tensors, like the starts of spans of places, so every call needs its first time
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    found = _median_us(graph.replay, replays, cuda=True) / len(calls)
    # here, not earlier: a result given back during the capture would be the next call's memory
    del kept
    return found


def eager_us(calls: Sequence[Call], *, cuda: bool, repeats: int = 3) -> float:
    """Microseconds of a call when all are launched from Python one by one; `cuda` says what the calls run on."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return _median_us(all_of_them, repeats, cuda=cuda) / len(calls)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 448 MiB (4 MiB on a CPU)."""
    cuda = device == "cuda"
    # not 512: the driver copies exactly as many at two thirds of the speed of a little less or more (an H200, 580.159.04)
    source = torch.ones((7 * 2**26 if cuda else 2**22) // 4, device=device)
    target = torch.empty_like(source)
    calls: list[Call] = [lambda: target.copy_(source)] * 4
    taken = graph_us(calls) if cuda else eager_us(calls, cuda=False)
    return 2 * source.numel() * source.element_size() / taken * 1e6


def _median_us(work: Call, repeats: int, *, cuda: bool) -> float:
    work()
    found: list[float] = []
    for _ in range(repeats):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append((time.perf_counter() - began) * 1e6)
    return statistics.median(found)
