"""Keeps other libraries' progress bars, hints and deprecation warnings out of a run's output; errors still come through.

A person watches our own progress; a line of another library's bar in the middle of it only hides what matters. `--debug` leaves
everything on.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Generator

# bitsandbytes says at import that an optional CPU kernel is missing: nothing here uses it.
_CHATTY = ("bitsandbytes", "transformers", "accelerate", "datasets", "huggingface_hub", "lm_eval")


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence the libraries for the block, and put everything back after it."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # imported here, after its logger is set: it takes seconds, and its import already warns
    from transformers.utils import logging as transformers_logging

    # transformers sets its logger's level again while it is imported
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
