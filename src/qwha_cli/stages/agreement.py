"""What the first of several processes decides, and the others follow: which stages run, and when an artifact is there.

Through the store that torchrun and accelerate keep for their processes, not through files: one of an earlier run would be taken
for this run's. Nor through collectives: the others may wait for hours while the first quantizes, and a collective gives up.
"""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from qwha_cli.stages.ranks import Ranks

_POLL_S = 0.2


class Agreement:
    """Words from the first process to the others.

    Args:
        ranks: The processes; a single one needs no words.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._store: Store | None = None
        if ranks.size > 1:
            store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))
            # the n-th use in this process meets the n-th use in the others
            use = store.add(f"qwha/uses/{ranks.rank}", 1)
            self._store = PrefixStore(f"qwha/{use}", store)

    def tell(self, subject: str, word: str) -> None:
        """Say something to the others; for the first process."""
        if self._store is not None:
            self._store.set(subject, word)

    def hear(self, subject: str) -> str:
        """Wait for what the first process says; torchrun ends this one if the first fails."""
        assert self._store is not None, "nobody speaks to a single process"
        while not self._store.check([subject]):
            time.sleep(_POLL_S)
        return self._store.get(subject).decode()
