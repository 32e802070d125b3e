"""Files of data sets on the Hugging Face hub, and a quick clear answer when the hub cannot be reached.

Single files are fetched instead of `datasets.load_dataset`, which takes seconds to import and hangs 25 s without a network.
`snapshot_download` is used even for one file because, unlike `hf_hub_download`, it does not retry a dead network for 23 s. What
is in the local cache is used without a network; HF_HUB_OFFLINE=1 asks for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwha_cli.data.files import Record
from qwha_cli.errors import DataError

TIMEOUT_S = 5.0


def fetch(repo: str, file: str) -> Path:
    """The local copy of one file of a data set repository, downloaded once.

    Args:
        repo: "owner/name" of a data set.
        file: Path inside the repository.

    Raises:
        DataError: The hub cannot be reached and the file is not in the cache, or the repository does not have it.
    """
    from huggingface_hub import snapshot_download

    where = f"hub data set {repo}"
    remedy = "connect once so that it is cached, or name a local copy with `path` in the recipe"
    try:
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=[file], etag_timeout=TIMEOUT_S)
    except Exception as error:
        # the hub client raises OSErrors, ValueErrors and its HTTP library's own errors, which changed between versions
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot download {file}: {cause}", where=where, remedy=remedy) from error
    local = Path(folder) / file
    if not local.is_file():
        raise DataError(f"{file} is neither in the local cache nor to be had from the hub", where=where, remedy=remedy)
    return local


def read_parquet(file: Path) -> Iterator[tuple[str, Record]]:
    """The rows of a parquet file as records with their places, like `files.read_records`."""
    import pyarrow.parquet as parquet

    rows: list[Record] = parquet.read_table(file).to_pylist()
    for index, row in enumerate(rows):
        yield f"{file}:[{index}]", row
