"""Embedding and head in 8 bits through all stages: the same as with a 16-bit model that holds the dequantized vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from qwha_cli.adapters.build import adapted_layers, load_adapter
from qwha_cli.artifacts.store import verify
from qwha_cli.cli.app import app
from qwha_cli.data.collate import pad_batch
from qwha_cli.data.tokenize import Encoded
from qwha_cli.errors import RecipeError
from qwha_cli.models.token_loss import summed_loss
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.embedding import QuantizedEmbedding, TiedHead, dequantize_vocabulary
from qwha_cli.quantizers.vocabulary import quantize_words
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages import quantize as quantize_stage
from qwha_cli.stages.plan import plan
from qwha_cli.stages.runner import run_stages
from support.recording import RecordingEvents
from support.tiny_model import tiny_llama, tiny_qwen2, tiny_tokenizer

CODES = "quantize.embedding_bits=8"
GROUP = 16
SIZES = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def original(kind: str) -> PreTrainedModel:
    return tiny_qwen2(**SIZES) if kind == "tied" else tiny_llama(**SIZES, tie_word_embeddings=False)


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 16-bit model's folder, and that of the same model with the dequantized vocabulary."""
    folder = tmp_path_factory.mktemp(request.param)
    twin = original(request.param)
    matrices = {id(m.weight): m.weight for m in (twin.get_input_embeddings(), twin.get_output_embeddings())}
    assert len(matrices) == (1 if request.param == "tied" else 2)
    with torch.no_grad():
        for weight in matrices.values():
            packed = quantize_words(weight, group_size=GROUP, name="twin", device=torch.device("cpu"))
            weight.copy_(packed.dequantize(torch.float32))
    return saved(original(request.param), folder / "original"), saved(twin, folder / "twin")


def qwha(command: str, model: Path, output: Path, *overrides: str) -> dict[str, Any]:
    arguments = [command, "tiny-random", f"model.id={model}", f"output={output}", "--json", *overrides]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All stages with the vocabulary in codes, and all stages of the twin with it in 16 bits."""
    output = tmp_path_factory.mktemp("runs")
    qwha("run", models[0], output / "codes", CODES)
    qwha("run", models[1], output / "dense", "quantize.embedding_bits=16")
    return output / "codes" / "tiny-random", output / "dense" / "tiny-random"


def scores(run: Path) -> dict[str, dict[str, float]]:
    return {row["row"]: row for row in json.loads((run / "4-eval" / "scores.json").read_text())["rows"]}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.read_text().splitlines()]


def test_every_state_scores_as_with_the_dequantized_vocabulary(runs: tuple[Path, Path]) -> None:
    codes, dense = (scores(run) for run in runs)
    for row in ("base", "init", "trained", "merged"):
        for number in ("perplexity_answers", "perplexity_text"):
            assert codes[row][number] == pytest.approx(dense[row][number], rel=1e-5), (row, number)
    # the original is another model
    assert codes["16-bit"]["perplexity_text"] != pytest.approx(dense["16-bit"]["perplexity_text"], rel=1e-5)


def test_layers_are_fitted_to_the_inputs_that_the_codes_give(runs: tuple[Path, Path]) -> None:
    found = [lines(run / "1-quantize" / "layers.jsonl") for run in runs]
    assert [record["digest"] for record in found[0]] == [record["digest"] for record in found[1]]
    assert [record["error_ratio"] for record in found[0]] == [record["error_ratio"] for record in found[1]]
    for file in ("2-init", "3-train"):
        left, right = (load_file(run / file / "adapter_model.safetensors") for run in runs)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left if name.endswith("gaps"))


def test_training_takes_the_same_course(runs: tuple[Path, Path]) -> None:
    codes, dense = ([line["loss"] for line in lines(run / "3-train" / "metrics.jsonl")] for run in runs)
    assert codes == pytest.approx(dense, rel=1e-5)
    assert len(codes) == 6


def test_the_merged_folder_is_an_ordinary_model_with_the_dequantized_vocabulary(
    models: tuple[Path, Path], runs: tuple[Path, Path]
) -> None:
    merged, twin = (AutoModelForCausalLM.from_pretrained(folder) for folder in (runs[0] / "5-merge", models[1]))
    assert not hasattr(merged.config, "quantization_config")
    for module, expected in (
        (merged.get_input_embeddings(), twin.get_input_embeddings()),
        (merged.get_output_embeddings(), twin.get_output_embeddings()),
    ):
        assert type(module) is type(expected)
        assert torch.equal(module.weight, expected.weight)
    assert merged.config.tie_word_embeddings == twin.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is twin.config.tie_word_embeddings


def test_the_base_holds_the_vocabulary_once_and_says_what_it_costs(runs: tuple[Path, Path]) -> None:
    results = verify(runs[0] / "1-quantize", deep=True).results
    tied = "lm_head.weight" not in load_file(runs[1] / "1-quantize" / "model.safetensors")
    tensors = load_file(runs[0] / "1-quantize" / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(("lm_head", "model.embed_tokens"))}
    assert len(own) == (3 if tied else 6)
    assert results["vocabulary_weights"] == 260 * 48 * (1 if tied else 2)
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in own.values())
    assert results["vocabulary_bits_per_weight"] == pytest.approx(stored / results["vocabulary_weights"])
    assert results["vocabulary_sqnr_db"] > 40
    before = verify(runs[1] / "1-quantize").results
    assert results["megabytes_16_bit"] == before["megabytes_16_bit"]
    assert not any(name.startswith("vocabulary") for name in before)
    assert "of embedding and head 9.50 bits" in (runs[0] / "report.md").read_text()


def test_loss_and_gradients_over_codes_are_those_over_the_dense_vocabulary(runs: tuple[Path, Path]) -> None:
    example = list(range(40, 70))
    batch = pad_batch([Encoded(example, example[:5] + [-100] * 5 + example[10:])], pad_id=256)
    found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for dense in (False, True):
        model = load_adapter(load_base(runs[0] / "1-quantize", dtype=torch.float32), runs[0] / "3-train", trainable=True)
        inner = model.get_base_model()
        assert isinstance(inner.get_input_embeddings(), QuantizedEmbedding)
        if dense:
            dequantize_vocabulary(inner, torch.float32)
            assert not any(isinstance(module, QuantizedEmbedding | TiedHead) for module in model.modules())
        loss = summed_loss(model, batch, head=None)
        loss.backward()
        found.append((loss.detach(), [layer.qwha_values["default"].grad for layer in adapted_layers(model).values()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for left, right in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("override", ["train.checkpointing=true", "train.keep=speed"])
def test_how_training_computes_changes_nothing(
    override: str, models: tuple[Path, Path], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    qwha("train", models[0], tmp_path, CODES, override)
    losses = [line["loss"] for line in lines(tmp_path / "tiny-random" / "3-train" / "metrics.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in lines(runs[0] / "3-train" / "metrics.jsonl")], rel=1e-5)


def test_gradients_as_weights_are_those_of_the_16_bit_vocabulary(models: tuple[Path, Path], tmp_path: Path) -> None:
    weighted = "quantize.calibration.weighting=gradient"
    qwha("init", models[0], tmp_path / "codes", CODES, weighted, "init.budget=global", "init.reconstruct=values")
    qwha("quantize", models[0], tmp_path / "plain", weighted)
    left, right = (
        load_file(tmp_path / kind / "tiny-random" / "1-quantize" / "calibration" / "sensitivity.safetensors")
        for kind in ("codes", "plain")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_lora_trains_beside_it_too(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = qwha("merge", models[0], tmp_path, CODES, "adapter.method=lora", "init.method=cloq", "train.steps=2")
    assert found["stages"]["merge"]["results"]["kl"] < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_bfloat16_model_goes_the_same_way(dtype: str, tmp_path: Path) -> None:
    folder = saved(original("tied").to(torch.bfloat16), tmp_path / "model")
    how = (f"model.dtype={dtype}", "merge.into=bf16", "merge.tolerance.kl=0.01", "merge.tolerance.max_logit_difference=1")
    found = qwha("run", folder, tmp_path / "run", CODES, *how, "eval.rows=[base,merged]")
    rows = {row["row"]: row for row in found["table"]}
    assert rows["merged"]["perplexity_text"] > 1
    config = json.loads((tmp_path / "run" / "tiny-random" / "1-quantize" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_stage_that_was_stopped_goes_on_to_the_same_files(
    models: tuple[Path, Path], runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-random", [f"model.id={models[0]}", f"output={tmp_path}", CODES])
    whole = quantize_stage._quantize_block

    def stop(context: object, opened: object, block: Any, *rest: object) -> object:
        if block.index == 1:
            raise RuntimeError("stopped")
        return whole(context, opened, block, *rest)

    monkeypatch.setattr(quantize_stage, "_quantize_block", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run_stages(recipe, until="quantize", events=RecordingEvents())
    monkeypatch.undo()
    result = run_stages(recipe, until="quantize", events=RecordingEvents())
    assert any("continued behind 1 blocks" in note for note in result.stages["quantize"].notes)
    left, right = (folder / "1-quantize" / "model.safetensors" for folder in (result.run, runs[0]))
    assert left.read_bytes() == right.read_bytes()


def test_the_bits_belong_to_the_key_of_quantize_and_of_all_that_follows(tmp_path: Path) -> None:
    plans = [plan(load_recipe("tiny-random", [f"quantize.embedding_bits={bits}"]), root=tmp_path) for bits in (8, 16)]
    default = plan(load_recipe("tiny-random"), root=tmp_path)
    for stage, planned in plans[0].items():
        assert planned.key != plans[1][stage].key
        assert default[stage].key == plans[1][stage].key


@pytest.mark.parametrize("bits", ["4", "12", "eight"])
def test_other_bits_are_refused_with_those_there_are(bits: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-random", [f"quantize.embedding_bits={bits}"])
    (problem,) = caught.value.problems
    assert "8" in str(problem)
    assert "16" in str(problem)
    assert "embedding_bits" in str(problem)
