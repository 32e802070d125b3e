from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from qwha_cli.data.calibration import calibration_tokens
from qwha_cli.data.gsm8k import INSTRUCTION
from qwha_cli.errors import DataError
from support.tiny_model import tiny_tokenizer

EOS = 258


def _tokens(
    data: str, path: object = None, *, split: str = "train", samples: int = 4, length: int = 16, seed: int = 0
) -> torch.Tensor:
    where = None if path is None else str(path)
    return calibration_tokens(
        data=data, path=where, split=split, samples=samples, length=length, seed=seed, tokenizer=tiny_tokenizer()
    )


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A text whose every window of 16 bytes is unique."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{number:04d}" for number in range(400)))
    return file


def test_windows_are_contiguous_pieces_of_the_text_and_do_not_overlap(numbered: Path) -> None:
    tokens = _tokens("text", numbered, samples=100)
    assert tokens.shape == (100, 16)
    assert tokens.dtype == torch.int64
    source = numbered.read_text()
    starts = sorted(source.index(tiny_tokenizer().decode(window)) for window in tokens)
    assert all(second - first >= 16 for first, second in itertools.pairwise(starts))


def test_windows_depend_on_the_seed(numbered: Path) -> None:
    first = _tokens("text", numbered, seed=1)
    assert torch.equal(_tokens("text", numbered, seed=1), first)
    assert not torch.equal(_tokens("text", numbered, seed=2), first)


def test_a_short_text_gives_overlapping_but_different_windows_and_a_shorter_one_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    tokens = _tokens("text", tmp_path / "a.txt", samples=11)
    assert len({tuple(window) for window in tokens.tolist()}) == 11
    with pytest.raises(DataError, match="26 tokens are too few for 12 different windows of 16") as caught:
        _tokens("text", tmp_path / "a.txt", samples=12)
    assert caught.value.where == str(tmp_path / "a.txt")
    assert "samples" in str(caught.value.remedy)


def test_examples_of_a_data_set_are_joined_with_the_end_token() -> None:
    tokens = _tokens("synthetic", samples=20, length=256)
    text = "".join(tiny_tokenizer().decode(window) for window in tokens)
    assert text.count("<eos>") > 10
    assert text.count(INSTRUCTION) > 10
    assert text.count("The final answer is: ") > 10


def test_files_can_be_named_directly(numbered: Path, tmp_path: Path) -> None:
    assert torch.equal(_tokens(str(numbered)), _tokens("text", numbered))
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p" * 10, "response": "r" * 10}) + "\n" for _ in range(10)))
    assert (_tokens(str(file)) == EOS).any()


@pytest.mark.parametrize(
    ("data", "path", "split"),
    [
        ("wikitext2", None, "test"),
        ("wikitext2", None, "Test"),
        ("gsm8k", None, "test[:10%]"),
        ("synthetic", None, "TEST"),
        ("prose", None, "test"),
        ("text", "wiki.TEST.raw.txt", "train"),
        ("gsm8k", "/data/gsm8k/test.jsonl", "train"),
        ("my-test.txt", None, "train"),
    ],
)
def test_a_test_set_is_refused(data: str, path: str | None, split: str) -> None:
    with pytest.raises(DataError, match="test set") as caught:
        _tokens(data, path, split=split)
    assert "split: train" in str(caught.value.remedy)


def test_the_real_test_text_is_refused_and_the_validation_text_is_not(shared_data: Path) -> None:
    with pytest.raises(DataError, match="test set"):
        _tokens("wikitext2", shared_data / "wikitext-2" / "test.raw.txt")
    assert _tokens("wikitext2", shared_data / "wikitext-2" / "valid.txt").shape == (4, 16)


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"did you mean 'wikitext2'\? known: alpaca, chat"):
        _tokens("wikitext")
