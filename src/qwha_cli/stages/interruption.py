"""Whether the user asked to stop: Ctrl-C, or a scheduler's SIGTERM.

While training runs, a request only raises a flag: the loop finishes its step, saves, and leaves. A second one, or any outside
training, ends the process at once. A process that `qwha --gpus` started may be told twice, by the scheduler and by its parent: it
is the parent that ends it, when the user insists.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

from qwha_cli.stages.ranks import Ranks


class Interruption:
    """The flag, and whether raising it is enough.

    Args:
        ranks: This process among others.

    Attributes:
        asked: Whether the user asked to stop.
        graceful: Whether somebody looks at the flag: training does.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self.graceful = False
        self._ours = ranks.ours

    def __call__(self) -> bool:
        """Whether the user asked to stop."""
        return self.asked

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self.graceful and (self._ours or not self.asked):
            self.asked = True
            return
        if self._ours and signum == signal.SIGTERM:
            os._exit(128 + signum)  # another process failed, or the parent was told as well and says so
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(ranks: Ranks) -> Generator[Interruption]:
    """Handle both signals for the block; of several processes, leave as soon as another has failed."""
    interruption = Interruption(ranks)
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals belong to the main thread; a library user's thread does without
        return
    previous = [signal.signal(number, interruption.handle) for number in signals]
    ended = threading.Event()
    if ranks.failure is not None:
        # a thread: the main one may wait in NCCL for the process that failed, where no handler runs
        threading.Thread(target=_leave_with_others, args=(ranks, ended), daemon=True).start()
    try:
        yield interruption
    finally:
        ended.set()
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _leave_with_others(ranks: Ranks, ended: threading.Event) -> None:
    assert ranks.failure is not None
    while not ended.wait(1.0):
        if ranks.failure.exists():
            os._exit(1)
