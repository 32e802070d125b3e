"""All five stages on a tiny model whose sizes are no powers of two: what comes out, what is skipped, what is made again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwha_cli.adapters.build import adapted_layers, load_adapter
from qwha_cli.artifacts.store import verify
from qwha_cli.errors import GateError, ModelError
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.gram import Gram
from qwha_cli.recipe.load import load_recipe
from qwha_cli.recipe.schema import Recipe
from qwha_cli.stages import init_record
from qwha_cli.stages.init_layer import InitLayer
from qwha_cli.stages.plan import FOLDERS, plan
from qwha_cli.stages.runner import RunResult, run_stages
from support.recording import RecordingEvents

STAGES = ["quantize", "init", "train", "merge", "eval"]


def run(output: Path, *overrides: str, until: str | None = None) -> tuple[RunResult, RecordingEvents]:
    events = RecordingEvents()
    recipe = load_recipe("tiny-random", [f"output={output}", *overrides])
    return run_stages(recipe, until=until, events=events), events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    started = time.monotonic()
    result, events = run(output)
    assert time.monotonic() - started < 60, "the smoke recipe promises a minute"
    assert list(events.started) == STAGES
    assert set(events.started.values()) == {"missing"}
    return result.run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / finished.name)
    return tmp_path


def test_every_artifact_is_complete_and_verifies_by_content(finished: Path) -> None:
    for folder in FOLDERS.values():
        assert verify(finished / folder, deep=True).seconds > 0
    assert (finished / "recipe.resolved.yaml").is_file()
    leftovers = [p.name for p in finished.iterdir() if p.name.endswith(".draft")]
    assert leftovers == []


def test_second_run_does_nothing_and_shows_the_same_table(finished: Path) -> None:
    before = json.dumps(run_stages_again(finished)[0].table)
    result, events = run_stages_again(finished)
    assert events.started == {}
    assert events.fresh == STAGES
    assert all(stage.fresh for stage in result.stages.values())
    assert json.dumps(result.table) == before


def run_stages_again(finished: Path) -> tuple[RunResult, RecordingEvents]:
    return run(finished.parent)


def test_json_has_the_promised_shape(finished: Path) -> None:
    found = json.loads(json.dumps(run_stages_again(finished)[0].to_json()))
    assert set(found) == {"run", "stages", "table"}
    assert set(found["stages"]) == set(STAGES)
    for stage in found["stages"].values():
        assert {"path", "seconds", "fresh", "results"} <= set(stage)
    assert [row["row"] for row in found["table"]] == ["16-bit", "base", "init", "trained", "merged"]
    for row in found["table"]:
        assert row["perplexity_answers"] > 1
        assert row["perplexity_text"] > 1
        assert 0 <= row["exact_match"] <= 1


def test_init_lowers_the_error_of_every_layer_with_exactly_the_budget(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "2-init" / "layers.jsonl").read_text().splitlines()]
    rank = load_recipe("tiny-random").adapter.rank
    assert len(records) == 14
    for record in records:
        assert record["error_after"] < record["error_zero"]
        assert record["entries"] == rank * sum(record["shape"])
        assert record["entries_min"] >= 2
        histogram = record["entries_histogram"]
        assert sum(histogram["counts"]) == record["shape"][0]
        assert histogram["edges"][0] <= record["entries_min"] <= record["entries_max"] < histogram["edges"][-1]


def test_the_stored_bits_are_those_of_the_files(finished: Path) -> None:
    base, init = (verify(finished / folder).results for folder in ("1-quantize", "2-init"))
    tensors = load_file(finished / "2-init" / "adapter_model.safetensors")
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert init["adapter_bits_per_entry"] == pytest.approx(bits / int(init["entries"]), rel=1e-12)
    assert 24 < init["adapter_bits_per_entry"] < 24.5
    assert init["bits_per_weight"] == pytest.approx(base["bits_per_weight"] + bits / base["weights"], rel=1e-12)
    table = {row["row"]: row["bits_per_weight"] for row in run_stages_again(finished)[0].table}
    assert table["init"] == table["trained"] >= init["bits_per_weight"]  # the table counts the file's header too


@pytest.mark.parametrize("store", ["bfloat16", "float32"])
def test_init_measures_its_errors_on_the_values_that_it_stores(copied: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    measured: list[SparseRows] = []

    def spy(recipe: Recipe, layer: InitLayer, gram: Gram, starts: list[SparseRows | None], *, low_rank: bool) -> list[float]:
        measured.extend(start for start in starts if start is not None)
        return errors(recipe, layer, gram, starts, low_rank=low_rank)

    errors = init_record._errors
    monkeypatch.setattr(init_record, "_errors", spy)
    run(copied, f"adapter.store={store}", "adapter.scale=0.3", until="init")
    folder = next(copied.iterdir())
    names = [json.loads(line)["name"] for line in (folder / "2-init" / "layers.jsonl").read_text().splitlines()]
    base = load_base(folder / "1-quantize", dtype=torch.float32)
    layers = adapted_layers(load_adapter(base, folder / "2-init", trainable=False))
    assert len(measured) == len(names) == 14
    for name, rows in zip(names, measured, strict=True):
        stored = layers[name].rows("default")
        assert torch.equal(rows.columns.cpu(), stored.columns)
        assert torch.equal(rows.values.cpu(), stored.values)
        assert torch.equal(stored.values.bfloat16().float(), stored.values) == (store == "bfloat16")


def test_training_lowers_the_loss(finished: Path) -> None:
    results = verify(finished / "3-train").results
    assert results["last_loss"] < results["first_loss"]
    steps = [json.loads(line) for line in (finished / "3-train" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == list(range(1, int(results["steps"]) + 1))


def test_merged_folder_loads_with_plain_transformers_and_equals_base_plus_adapter(finished: Path) -> None:
    check = json.loads((finished / "5-merge" / "check.json").read_text())
    assert check["kl"] < 1e-3
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "out = m.generate(**t('Two plus two', return_tensors='pt'), max_new_tokens=2, do_sample=False)\n"
        "assert not any(n.startswith('qwha_cli') for n in sys.modules); assert not hasattr(m.config, 'quantization_config')\n"
        "print(out.shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished / "5-merge")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_from_pretrained_reads_base_and_adapter_and_equals_the_merged_model(finished: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import qwha_cli.integrations  # noqa: F401 - registers the formats

    ids = torch.arange(3, 35).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(finished / "1-quantize")
    adapted = PeftModel.from_pretrained(base, str(finished / "3-train")).eval()
    merged = AutoModelForCausalLM.from_pretrained(finished / "5-merge", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (adapted(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()
    assert float(difference) < 0.05  # the merged weights are bfloat16


def test_a_changed_setting_runs_only_what_depends_on_it_and_comes_back_from_the_archive(copied: Path) -> None:
    _, events = run(copied, "train.lr=0.0007", until="train")
    assert events.fresh == ["quantize", "init"]
    assert events.started == {"train": "changed: train.lr"}
    _, events = run(copied, until="train")
    assert events.fresh == ["quantize", "init", "train"]
    assert events.started == {}


def test_a_damaged_artifact_is_made_again_and_the_damage_named(copied: Path) -> None:
    run_folder = next(copied.iterdir())
    (run_folder / "3-train" / "metrics.jsonl").unlink()
    _, events = run(copied, until="train")
    assert events.started == {"train": "damaged: metrics.jsonl"}
    verify(run_folder / "3-train", deep=True)


def test_asking_for_a_late_stage_runs_the_missing_ones_first(copied: Path) -> None:
    run_folder = next(copied.iterdir())
    shutil.rmtree(run_folder / "1-quantize")
    _, events = run(copied, until="init")
    assert events.started == {"quantize": "missing"}  # the same key comes out, so init is still what was asked for
    assert events.fresh == ["init"]


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
@pytest.mark.parametrize(("method", "bits"), [("rtn", 2), ("gptq", 3), ("gptq", 4), ("nf4", 4)])
def test_every_method_and_basis_goes_through_quantize_and_init(tmp_path: Path, method: str, bits: int, basis: str) -> None:
    overrides = [f"quantize.method={method}", f"quantize.bits={bits}", f"quantize.basis={basis}"]
    if method == "nf4":  # bitsandbytes has no blocks below 32: sizes that 32 divides, and still no powers of two
        sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "num_key_value_heads": 2, **sizes}))
        overrides += ["quantize.group_size=32", f"model.id=random:{config}"]
    _, events = run(tmp_path / "runs", *overrides, until="init")
    errors = [float(str(r["error_after"])) / float(str(r["error_zero"])) for r in events.records["init"]]
    assert len(errors) == 14
    assert max(errors) < 1


@pytest.mark.parametrize("left", ["layers.0", "layers.1"])
def test_a_whole_block_can_stay_in_16_bits_and_the_base_is_complete(tmp_path: Path, left: str) -> None:
    run(tmp_path, f"quantize.exclude=[{left}]", "init.gate=false", until="init")
    folder = next(tmp_path.iterdir())
    records = [json.loads(line) for line in (folder / "1-quantize" / "layers.jsonl").read_text().splitlines()]
    assert len(records) == 7
    assert not any(left in record["name"] for record in records)
    model = load_base(folder / "1-quantize", dtype=torch.float32)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    errors = [json.loads(line) for line in (folder / "2-init" / "layers.jsonl").read_text().splitlines()]
    assert {record["error_zero"] == 0 for record in errors if left in record["name"]} == {True}


def test_group_size_that_does_not_divide_is_refused_with_the_layer_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer model\.layers\.0\.\S+: in_features \d+ is no multiple of group_size 64"):
        run(tmp_path, "quantize.group_size=64", until="quantize")
    run_folder = next(tmp_path.iterdir())
    assert not (run_folder / "1-quantize").exists()


def test_worse_than_zero_stops_the_run_unless_the_gate_is_off(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(recipe: Recipe, layer: InitLayer, gram: Gram, starts: list[SparseRows | None], *, low_rank: bool) -> list[float]:
        return [1.0 if start is None else 1e9 for start in starts]

    monkeypatch.setattr(init_record, "_errors", worse)
    with pytest.raises(GateError, match="14 of 14 layers are worse than with a zero adapter") as caught:
        run(copied, "init.damping=0.02", until="init")
    assert caught.value.exit_code == 1
    _, events = run(copied, "init.damping=0.02", "init.gate=false", until="init")
    assert any("worse than with a zero adapter" in note for note in events.notes)


def test_merge_above_the_tolerance_is_refused_and_publishes_nothing(copied: Path) -> None:
    with pytest.raises(GateError, match=r"merged model differs from base . adapter"):
        run(copied, "merge.into=bf16", "merge.tolerance.kl=1e-30", until="merge")
    run_folder = next(copied.iterdir())
    recipe = load_recipe("tiny-random", [f"output={copied}"])
    assert verify(run_folder / "5-merge").key == plan(recipe, root=run_folder)["merge"].key
