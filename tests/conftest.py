"""What every test shares: no network, few threads, the path to `support`, and where the real data lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# before transformers or datasets are imported by any test: they read these once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine waits for long


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $QWHA_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QWHA_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set QWHA_DATA to a folder that has them")
    return folder
