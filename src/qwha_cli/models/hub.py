"""Models on the Hugging Face hub: fetched to its local cache, with an answer in seconds when that is impossible.

HF_HUB_OFFLINE=1 is respected: then only the cache is looked at. Without a network the cache is used too. Only safetensors,
configuration and tokenizer files are downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwha_cli.errors import ModelError

SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]
# repositories keep the same weights a second time in other frameworks' folders
ELSEWHERE = ["original/*", "onnx/*", "*/*"]
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Snapshot:
    """A model's files in the local cache of the hub, and the commit that they are of."""

    folder: Path
    commit: str


def snapshot(model_id: str, *, revision: str | None, weights: bool) -> Snapshot:
    """Fetch a model's files, or find them in the cache.

    Args:
        model_id: "owner/name".
        revision: Branch, tag or commit; None for the main branch.
        weights: Whether the weights are wanted too.

    Raises:
        ModelError: No such model or revision, a gated one, or out of reach and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = SETTINGS + WEIGHTS if weights else SETTINGS
    try:
        path = snapshot_download(
            model_id, revision=revision, allow_patterns=wanted, ignore_patterns=ELSEWHERE, etag_timeout=TIMEOUT_S
        )
    except GatedRepoError as error:
        raise ModelError(
            "this model is gated: its owner wants you to accept a licence first",
            where=model_id,
            remedy=f"accept it at https://huggingface.co/{model_id}, then `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"no revision {revision!r}", where=model_id, remedy="correct model.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            "no such model on the hub, nor a folder of this name",
            where=model_id,
            remedy="correct model.id; for a private model set HF_TOKEN",
        ) from error
    except Exception as error:
        # LocalEntryNotFoundError, OfflineModeIsEnabled, or an exception of whichever HTTP library the client uses
        raise _out_of_reach(model_id, _reason(error)) from error
    folder = Path(path)
    if not (folder / "config.json").is_file() or (weights and not any(folder.glob("*.safetensors"))):
        raise _out_of_reach(model_id, "only a part of its files is in the local cache, or it has no safetensors")
    return Snapshot(folder, folder.name)


def _out_of_reach(model_id: str, reason: str) -> ModelError:
    return ModelError(
        f"not in the local cache, and cannot be fetched: {reason}",
        where=model_id,
        remedy="connect (and unset HF_HUB_OFFLINE) to download it once, or use a local folder or builtin:smollm2-135m",
    )


def _reason(error: Exception) -> str:
    cause: BaseException = error
    # the outer message is a paragraph about caches; the innermost says what happened
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
