"""All five stages with a LoRA in the place of the sparse adapter, on the same recipe and the same base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwha_cli.artifacts.store import verify
from qwha_cli.errors import NumericsError
from qwha_cli.recipe.load import load_recipe
from qwha_cli.report.render import write_report
from qwha_cli.stages.plan import FOLDERS
from qwha_cli.stages.runner import RunResult, run_stages
from support.recording import RecordingEvents

STAGES = ["quantize", "init", "train", "merge", "eval"]


def run(output: Path, *overrides: str, until: str | None = None) -> tuple[RunResult, RecordingEvents]:
    events = RecordingEvents()
    recipe = load_recipe("tiny-random", [f"output={output}", "adapter.method=lora", *overrides])
    return run_stages(recipe, until=until, events=events), events


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "2-init" / "layers.jsonl").read_text().splitlines()]


def changed_factors(folder: Path) -> list[str]:
    before, after = (load_file(folder / stage / "adapter_model.safetensors") for stage in ("2-init", "3-train"))
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result, events = run(tmp_path_factory.mktemp("runs"), "init.method=cloq")
    assert list(events.started) == STAGES
    return result.run


def test_every_artifact_is_complete_and_every_row_is_measured(finished: Path) -> None:
    for folder in FOLDERS.values():
        assert verify(finished / folder, deep=True).seconds > 0
    rows = json.loads((finished / "4-eval" / "scores.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["16-bit", "base", "init", "trained", "merged"]
    assert all(row["perplexity_text"] > 1 for row in rows)


def test_cloq_lowers_every_layers_error_with_as_many_numbers_as_the_sparse_adapter(finished: Path) -> None:
    found = records(finished)
    rank = load_recipe("tiny-random").adapter.rank
    assert len(found) == 14
    for record in found:
        assert record["error_after"] < record["error_zero"]
        assert (record["rank"], record["entries"]) == (rank, rank * sum(record["shape"]))
    assert verify(finished / "2-init").results["entries"] == sum(record["entries"] for record in found)


def test_training_moves_both_factors_of_every_layer(finished: Path) -> None:
    assert len(changed_factors(finished)) == 2 * 14


def test_the_merged_folder_equals_base_plus_lora(finished: Path) -> None:
    check = json.loads((finished / "5-merge" / "check.json").read_text())
    assert check["max_logit_difference"] < 1e-4
    rows = {row["row"]: row for row in json.loads((finished / "4-eval" / "scores.json").read_text())["rows"]}
    assert rows["merged"]["perplexity_text"] == pytest.approx(rows["trained"]["perplexity_text"], rel=1e-4)


def test_plain_peft_reads_base_and_lora_after_one_import(finished: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    import qwha_cli.integrations  # noqa: F401 - registers the formats

    ids = torch.arange(3, 35).unsqueeze(0)
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(finished / "3-train")).eval()
    merged = AutoModelForCausalLM.from_pretrained(finished / "5-merge", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_the_report_draws_no_rows_that_a_lora_does_not_have(finished: Path) -> None:
    assert not (finished / "2-init" / "entries.png").exists()
    write_report(finished)
    page, text = ((finished / name).read_text() for name in ("report.html", "report.md"))
    assert "LoRA of rank 2" in page
    assert "LoRA of rank 2" in text
    assert "in each layer's emptiest" not in page
    assert "Entries in a row" not in page


def test_a_second_run_does_nothing(finished: Path) -> None:
    _, events = run(finished.parent, "init.method=cloq")
    assert (events.started, events.fresh) == ({}, STAGES)


@pytest.mark.parametrize("method", ["qera", "loftq", "zero"])
def test_on_the_calibration_text_no_other_start_beats_cloq(finished: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(finished, tmp_path / finished.name)
    _, events = run(tmp_path, f"init.method={method}", until="init")
    assert events.fresh == ["quantize"]
    found, best = records(tmp_path / finished.name), records(finished)
    for record, least in zip(found[:3], best[:3], strict=True):  # q, k and v of block 0 see the same inputs in both runs
        assert least["error_after"] < record["error_after"] <= record["error_zero"]
        assert record["error_zero"] == pytest.approx(least["error_zero"], rel=1e-6)
        assert (record["error_after"] == record["error_zero"]) == (method == "zero")


@pytest.mark.parametrize(
    "overrides",
    [
        ("quantize.basis=weight", "adapter.scale=0.5"),
        ("quantize.basis=hadamard", "quantize.exclude=[down_proj]"),
        ("quantize.method=nf4", "quantize.bits=4", "quantize.group_size=32", "model.id=random:CONFIG"),
    ],
    ids=["weight", "excluded", "nf4"],
)
def test_other_bases_go_through_to_the_merge(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = tmp_path / "config.json"  # sizes that 32 divides, and still no powers of two
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "num_key_value_heads": 2, **sizes}))
    changes = [change.replace("CONFIG", str(config)) for change in overrides]
    result, events = run(tmp_path / "runs", "init.method=cloq", *changes, until="merge")
    for record in events.records["init"]:
        kept_in_16_bits = "exclude" in overrides[-1] and record["projection"] == "down_proj"
        assert record["error_after"] == 0 if kept_in_16_bits else record["error_after"] < record["error_zero"]
    assert json.loads((result.run / "5-merge" / "check.json").read_text())["max_logit_difference"] < 1e-3
    assert len(changed_factors(result.run)) == 2 * 14


def test_a_rank_that_does_not_fit_is_refused_with_the_layer(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"layer model\.layers\.0\.\S+: rank 40 does not fit a weight of 24 x 48"):
        run(tmp_path, "init.method=zero", "adapter.rank=40", until="init")
