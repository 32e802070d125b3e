"""Block-wise reconstruction and rivals at the same bytes, through the runner on a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qwha_cli.adapters.build import adapted_layers, load_adapter
from qwha_cli.artifacts.store import verify
from qwha_cli.data.calibration import calibration_tokens
from qwha_cli.errors import RecipeError
from qwha_cli.kernels.sparse_matmul import SparseRows
from qwha_cli.kernels.wht import wht
from qwha_cli.models.load import load
from qwha_cli.models.walk import Original, walk
from qwha_cli.quant.checkpoint import load_base
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.recipe.load import load_recipe
from qwha_cli.stages import reconstruct as reconstruct_stage
from qwha_cli.stages.init_record import numbers_at_same_bytes
from qwha_cli.stages.plan import plan
from qwha_cli.stages.runner import run_stages
from qwha_cli.training.reconstruct import Reconstruction
from support.recording import RecordingEvents

Records = list[dict[str, object]]
# Four batches, and so many steps that codes can change; all tokens alike and each layer its own entries, so that blocks can be
# compared; codes that depend on nothing but the weights, so that those of later blocks can be compared too.
COMMON = (
    "quantize.calibration.batch_size=2",
    "quantize.calibration.weighting=none",
    "quantize.reconstruct_epochs=8",
    "quantize.method=rtn",
    "quantize.grid=minmax",
    "init.budget=per_layer",
)
GPTQ = ("quantize.method=gptq", "quantize.grid=search")
FULL = "quantize.reconstruct=full"
SCALES = "quantize.reconstruct=scales"
VALUES = "init.reconstruct=values"


def run(output: Path, *overrides: str, until: str) -> tuple[Path, RecordingEvents]:
    events = RecordingEvents()
    recipe = load_recipe("tiny-random", [f"output={output}", *COMMON, *overrides])
    return run_stages(recipe, until=until, events=events).run, events


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run's folder by its overrides, made once; what starts from a finished base is made in a copy of it."""
    known: dict[tuple[object, ...], Path] = {}

    def make(*overrides: str, until: str = "quantize", base: Sequence[str] = ()) -> Path:
        key = (overrides, until, tuple(base))
        if key not in known:
            output = tmp_path_factory.mktemp("runs")
            if until == "init":
                start = make(*base)
                shutil.copytree(start, output / start.name)
            known[key], events = run(output, *base, *overrides, until=until)
            assert events.fresh == (["quantize"] if until == "init" else [])
            assert list(events.started) == [until]
        return known[key]

    return make


def lines(folder: Path, stage: str) -> Records:
    return [json.loads(line) for line in (folder / stage / "layers.jsonl").read_text().splitlines()]


def layers_of(folder: Path) -> dict[str, QuantizedLinear]:
    base = load_base(folder / "1-quantize", dtype=torch.float32)
    return {name: module for name, module in base.named_modules() if isinstance(module, QuantizedLinear)}


def rows_of(folder: Path) -> dict[str, SparseRows]:
    base = load_base(folder / "1-quantize", dtype=torch.float32)
    found = adapted_layers(load_adapter(base, folder / "2-init", trainable=False))
    return {name: layer.rows("default") for name, layer in found.items()}


def errors_of_blocks(records: Records) -> dict[int, tuple[float, float]]:
    """Before and after by block; the layers of a block have one error."""
    found: dict[int, set[tuple[float, float]]] = {}
    for record in records:
        found.setdefault(int(str(record["block"])), set()).add(
            (float(str(record["block_error_before"])), float(str(record["block_error"])))
        )
    assert all(len(errors) == 1 for errors in found.values())
    assert sorted(found) == [0, 1]
    return {block: next(iter(errors)) for block, errors in found.items()}


def measured(model: nn.Module) -> dict[int, float]:
    """Every block's error against the recipe's model, on the recipe's calibration text."""
    recipe = load_recipe("tiny-random", COMMON)
    original = load(recipe.model.id, dtype=torch.float32, seed=recipe.seed)
    settings = recipe.quantize.calibration
    tokens = calibration_tokens(
        data=settings.data,
        path=settings.path,
        split=settings.split,
        samples=settings.samples,
        length=settings.length,
        seed=recipe.seed,
        tokenizer=original.tokenizer,
    )
    beside = Original(original.model)
    return {b.index: Reconstruction(b).error() for b in walk(model, tokens, device="cpu", batch_size=2, original=beside)}


# ---- the base


def test_without_reconstruction_no_block_error_is_written(made: Make) -> None:
    assert all("block_error" not in record for record in lines(made(), "1-quantize"))
    assert all("block_error" not in record for record in lines(made(until="init"), "2-init"))


@pytest.mark.parametrize("how", [SCALES, FULL])
def test_reconstructing_the_base_lowers_the_error_of_every_block(made: Make, how: str) -> None:
    folder = made(how)
    records = lines(folder, "1-quantize")
    assert len(records) == 14
    assert all(after < before for before, after in errors_of_blocks(records).values())


@pytest.mark.parametrize("how", [SCALES, FULL])
def test_the_written_block_errors_are_those_of_the_stored_base(made: Make, how: str) -> None:
    folder = made(how)
    stored = measured(load_base(folder / "1-quantize", dtype=torch.float32))
    for block, (before, after) in errors_of_blocks(lines(folder, "1-quantize")).items():
        assert after == pytest.approx(stored[block], rel=1e-4)
        assert before > stored[block]
    # of block 0 the error before is that of the base without reconstruction; later blocks have other inputs
    plain = measured(load_base(made() / "1-quantize", dtype=torch.float32))
    assert errors_of_blocks(lines(folder, "1-quantize"))[0][0] == pytest.approx(plain[0], rel=1e-4)


@pytest.mark.parametrize("how", [SCALES, FULL])
def test_the_reconstructed_base_loads_and_its_digests_are_those_of_its_records(made: Make, how: str) -> None:
    folder = made(how)
    verify(folder / "1-quantize", deep=True)
    found = {name: layer.packed().digest() for name, layer in layers_of(folder).items()}
    assert found == {record["name"]: record["digest"] for record in lines(folder, "1-quantize")}
    plain = {record["name"]: record["digest"] for record in lines(made(), "1-quantize")}
    assert found.keys() == plain.keys()
    assert all(found[name] != plain[name] for name in found)


def test_scales_keeps_every_code_and_changes_scales(made: Make) -> None:
    plain, trained = layers_of(made()), layers_of(made(SCALES))
    assert len(plain) == 14
    for name, layer in plain.items():
        assert torch.equal(trained[name].get_buffer("qweight"), layer.get_buffer("qweight"))
        assert not torch.equal(trained[name].get_buffer("scales"), layer.get_buffer("scales"))
        assert trained[name].format == layer.format


def test_full_changes_some_codes_and_most_of_them_not(made: Make) -> None:
    plain, trained = layers_of(made()), layers_of(made(FULL))
    for name, layer in plain.items():
        share = float((trained[name].packed().codes()[0] != layer.packed().codes()[0]).float().mean())
        assert 0 < share < 0.3, name


def test_full_changes_codes_of_weights_that_nearly_fell_on_the_other_side(made: Make) -> None:
    recipe = load_recipe("tiny-random", COMMON)
    original = load(recipe.model.id, dtype=torch.float32, seed=recipe.seed).model
    plain, trained = layers_of(made()), layers_of(made(FULL))
    for name, layer in plain.items():
        codes, scales, zeros = (part.float() for part in layer.packed().codes())
        weight = wht(original.get_submodule(name).weight.detach()).view(*scales.shape, -1)
        distance = (weight / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).view_as(codes) - codes
        moved = trained[name].packed().codes()[0].float() - codes
        assert torch.equal(moved[moved != 0], distance[moved != 0].sign()), name
        assert (distance[moved != 0].abs() > 0.3).all(), name


def test_what_lies_outside_the_quantized_layers_is_not_touched(made: Make) -> None:
    plain, trained = (load_base(folder / "1-quantize", dtype=torch.float32) for folder in (made(), made(FULL)))
    before = dict(plain.named_parameters())
    assert len(before) == 2 * 2 + 3  # norms, embeddings, head
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.named_parameters())


def test_a_symmetric_base_in_the_weight_basis_keeps_its_zeros_in_the_middle(made: Make) -> None:
    folder = made(*GPTQ, FULL, "quantize.symmetric=true", "quantize.basis=weight", "quantize.bits=3")
    assert all(after < before for before, after in errors_of_blocks(lines(folder, "1-quantize")).values())
    for layer in layers_of(folder).values():
        zeros = layer.packed().codes()[2]
        assert torch.equal(zeros, torch.full_like(zeros, 4))


# ---- the adapter's values


@pytest.mark.parametrize("base", [(), (FULL,)])
def test_reconstructing_values_lowers_the_error_of_every_block(made: Make, base: Sequence[str]) -> None:
    folder = made(VALUES, until="init", base=base)
    records = lines(folder, "2-init")
    assert len(records) == 14
    assert all(after < before for before, after in errors_of_blocks(records).values())


def test_reconstructed_values_stand_in_the_same_places(made: Make) -> None:
    plain, trained = rows_of(made(until="init")), rows_of(made(VALUES, until="init"))
    assert plain.keys() == trained.keys()
    for name, rows in plain.items():
        assert trained[name].values.shape == rows.values.shape
        assert not torch.equal(trained[name].values, rows.values)
        if ".layers.0." in name:  # the inputs of later blocks are others, and so their places
            assert torch.equal(trained[name].columns, rows.columns)
            assert torch.equal(trained[name].row_starts, rows.row_starts)


def test_the_base_below_reconstructed_values_is_not_touched(made: Make) -> None:
    name = "model.safetensors"
    assert _sha(made() / "1-quantize" / name) == _sha(made(VALUES, until="init") / "1-quantize" / name)


def test_the_error_before_is_that_of_the_adapter_without_reconstruction(made: Make) -> None:
    plain = made(until="init")
    base = load_base(plain / "1-quantize", dtype=torch.float32)
    expected = measured(load_adapter(base, plain / "2-init", trainable=False))
    found = errors_of_blocks(lines(made(VALUES, until="init"), "2-init"))
    assert found[0][0] == pytest.approx(expected[0], rel=1e-4)  # later blocks have other inputs


@pytest.mark.parametrize("store", ["bfloat16", "float32"])
def test_values_are_stored_and_judged_in_the_adapters_precision(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    judged: list[dict[str, torch.Tensor]] = []

    class Spy(Reconstruction):
        def error(self) -> float:
            block = self._block
            values = {name: p.detach().clone() for name, p in block.module.named_parameters() if "qwha_values" in name}
            judged.append({f"{block.name}.{name}": value for name, value in values.items()})
            return super().error()

    monkeypatch.setattr(reconstruct_stage, "Reconstruction", Spy)
    shutil.copytree(made(), tmp_path / made().name)
    folder, _ = run(tmp_path, VALUES, f"adapter.store={store}", "adapter.scale=0.3", until="init")
    tensors = load_file(folder / "2-init" / "adapter_model.safetensors")
    values = [tensor for name, tensor in tensors.items() if "values" in name]
    assert {str(value.dtype) for value in values} == {f"torch.{store}"}
    assert sum(len(value) for value in values) == sum(int(str(record["entries"])) for record in lines(folder, "2-init"))
    assert len(judged) == 4  # before and after, of two blocks
    after = judged[1] | judged[3]
    stored = rows_of(folder)
    assert len(after) == len(stored) == 14
    for name, value in after.items():
        assert torch.equal(value, stored[name.partition(".qwha_values")[0]].values)
        assert torch.equal(value.bfloat16().float(), value) == (store == "bfloat16")
    adapted = load_adapter(load_base(folder / "1-quantize", dtype=torch.float32), folder / "2-init", trainable=False)
    found = measured(adapted)
    for block, (error_before, error_after) in errors_of_blocks(lines(folder, "2-init")).items():
        assert error_after == pytest.approx(found[block], rel=1e-4)
        assert error_before > found[block]


def test_what_is_reconstructed_and_how_long_decides_the_key_of_its_stage(tmp_path: Path) -> None:
    def keys(*overrides: str) -> tuple[str, str]:
        planned = plan(load_recipe("tiny-random", [*COMMON, *overrides]), root=tmp_path)
        return planned["quantize"].key, planned["init"].key

    plain = keys()
    for override in (VALUES, "init.reconstruct_epochs=3"):
        assert keys(override)[0] == plain[0]
        assert keys(override)[1] != plain[1]
    bases = {keys(override)[0] for override in (SCALES, FULL, "quantize.reconstruct_epochs=3")}
    assert len(bases | {plain[0]}) == 4


# ---- what holds for both


class _Worsening(Reconstruction):
    def train(self, parameters: Iterable[tuple[nn.Parameter, float]], *, epochs: int, seed: int) -> None:
        with torch.no_grad():
            for parameter, _rate in parameters:
                parameter += 3.0


def test_a_block_that_did_not_get_better_stays_as_it_was(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct_stage, "Reconstruction", _Worsening)
    folder, _ = run(tmp_path, FULL, VALUES, until="init")
    for stage in ("1-quantize", "2-init"):
        assert all(before == after for before, after in errors_of_blocks(lines(folder, stage)).values())
    plain = made(until="init")
    assert _digests(folder) == _digests(plain)
    assert _adapter(folder) == _adapter(plain)
    for stage in ("1-quantize", "2-init"):
        assert _without(lines(folder, stage), "seconds", "block_error", "block_error_before") == _without(
            lines(plain, stage), "seconds"
        )


def test_tokens_that_count_by_their_gradients_and_a_global_budget_are_reconstructed_too(tmp_path: Path) -> None:
    weighted = (*GPTQ, "quantize.calibration.weighting=gradient", "init.budget=global")
    folder, _ = run(tmp_path, *weighted, SCALES, VALUES, until="init")
    for stage in ("1-quantize", "2-init"):
        assert all(after < before for before, after in errors_of_blocks(lines(folder, stage)).values())


def test_a_run_with_reconstruction_is_the_same_twice_with_rivals_or_without(made: Make, tmp_path: Path) -> None:
    first = made(VALUES, until="init", base=(FULL,))
    again, events = run(tmp_path, FULL, VALUES, "init.compare=[random, cloq]", until="init")
    assert list(events.started) == ["quantize", "init"]
    assert _digests(first) == _digests(again)
    for stage in ("1-quantize", "2-init"):
        assert _without(lines(first, stage), "seconds") == _without(lines(again, stage), "seconds", "compare")
    for file in ("1-quantize/model.safetensors", "2-init/adapter_model.safetensors"):
        assert _sha(first / file) == _sha(again / file)


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digests(folder: Path) -> list[object]:
    return [record["digest"] for record in lines(folder, "1-quantize")]


def _adapter(folder: Path) -> str:
    return _sha(folder / "2-init" / "adapter_model.safetensors")


def _without(records: Records, *keys: str) -> Records:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


def test_a_block_without_quantized_layers_is_passed_by(tmp_path: Path) -> None:
    folder, _ = run(tmp_path, SCALES, "quantize.exclude=[layers.0]", until="quantize")
    assert {record["block"] for record in lines(folder, "1-quantize")} == {1}
    assert all("block_error" in record for record in lines(folder, "1-quantize"))


def test_a_block_without_adapters_is_passed_by(made: Make, tmp_path: Path) -> None:
    shutil.copytree(made(), tmp_path / made().name)
    folder, _ = run(tmp_path, VALUES, "adapter.exclude=[layers.1]", until="init")
    assert {record["block"] for record in lines(folder, "2-init")} == {0}
    assert all("block_error" in record for record in lines(folder, "2-init"))


# ---- recipes that cannot be


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((SCALES, "quantize.method=nf4", "quantize.bits=4", "quantize.group_size=32"), "quantize.reconstruct"),
        ((FULL, "quantize.method=nf4", "quantize.bits=4", "quantize.group_size=32"), "quantize.reconstruct"),
        ((VALUES, "init.method=zero"), "init.reconstruct"),
        ((VALUES, "adapter.method=lora", "init.method=cloq"), "init.reconstruct"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused_with_the_keys_name(overrides: Sequence[str], key: str) -> None:
    (fault,) = faults(*overrides)
    assert f"{key}: " in fault
    assert f"set {key}=none" in fault
    load_recipe("tiny-random", overrides[1:])  # the rest of it can be


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.reconstruct=zeros", "expected none or scales or full"),
        ("init.reconstruct=scales", "expected none or values"),
        ("quantize.reconstruct_epochs=0", "must be at least 1"),
        ("init.reconstruct_epochs=0", "must be at least 1"),
        ("init.compare=[zero, adaloc]", "initializer adaloc is unknown; known: adaalloc, cloq,"),
        ("init.compare=[zero, adaloc]", "(did you mean adaalloc?)"),
        ("init.compare=[cloqq]", "(did you mean cloq?)"),
    ],
)
def test_a_bad_value_is_refused_with_the_keys_name_and_what_was_expected(override: str, message: str) -> None:
    (fault,) = faults(override)
    assert override.partition("=")[0] in fault
    assert message in fault


def faults(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-random", overrides)
    return [str(problem) for problem in caught.value.problems]


# ---- rivals at the same bytes


def of_first_block(folder: Path, pick: Callable[[Mapping[str, object]], object]) -> dict[object, object]:
    """Something of the records of block 0, whose inputs are the same whatever adapter there is."""
    found = {record["name"]: pick(record) for record in lines(folder, "2-init") if record["block"] == 0}
    assert len(found) == 7
    return found


def error_of(name: str) -> Callable[[Mapping[str, object]], object]:
    return lambda record: dict(record["compare"])[name]  # pyright: ignore[reportArgumentType]


# of rank 3 half as much again is 4.5: rounding shows
RANK = "adapter.rank=3"


@pytest.fixture(scope="module")
def compared(made: Make) -> Path:
    return made(RANK, "init.compare=[zero, cloq, adaalloc]", until="init")


def test_every_line_has_the_rivals_that_were_asked_for_in_their_order(made: Make, compared: Path) -> None:
    for record in lines(compared, "2-init"):
        assert list(dict(record["compare"])) == ["zero", "cloq", "adaalloc"]
        assert dict(record["compare"])["zero"] == record["error_zero"]
    assert all("compare" not in record for record in lines(made(until="init"), "2-init"))


def test_a_sparse_rival_has_the_error_of_a_run_of_its_own(made: Make, compared: Path) -> None:
    own = made(RANK, "init.method=adaalloc", until="init")
    assert of_first_block(compared, error_of("adaalloc")) == of_first_block(own, lambda record: record["error_after"])
    # nor is it by chance the error of the initializer that was used
    assert of_first_block(compared, error_of("adaalloc")) != of_first_block(compared, lambda record: record["error_after"])


def test_cloq_has_the_error_of_a_run_of_its_own_at_half_as_large_a_rank_again(made: Make, compared: Path) -> None:
    recipe = load_recipe("tiny-random", [RANK])
    for record in lines(compared, "2-init"):
        out_features, in_features = (int(size) for size in list(record["shape"]))
        size = out_features + in_features
        assert numbers_at_same_bytes(recipe, 3 * size, own="qwha", other="lora") // size == 4
    own = made("adapter.rank=4", "adapter.method=lora", "init.method=cloq", until="init")
    expected = of_first_block(own, lambda record: record["error_after"])
    found = of_first_block(compared, error_of("cloq"))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_lora_is_compared_with_sparse_adapters_at_two_thirds_of_its_numbers(made: Make) -> None:
    found = made(RANK, "adapter.method=lora", "init.method=cloq", "init.compare=[pursuit, zero]", until="init")
    assert all(dict(record["compare"])["zero"] == record["error_zero"] for record in lines(found, "2-init"))
    sparse = made(until="init")
    assert load_recipe("tiny-random").adapter.rank == 2
    expected = of_first_block(sparse, lambda record: record["error_after"])
    assert of_first_block(found, error_of("pursuit")) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("store", "lora", "sparse"), [("bfloat16", 1.5, 2 / 3), ("float32", 1.25, 0.8)])
def test_numbers_at_the_same_bytes_count_a_sparse_entrys_place(store: str, lora: float, sparse: float) -> None:
    recipe = load_recipe("tiny-random", [f"adapter.store={store}"])
    for count in (1, 383, 384):
        assert numbers_at_same_bytes(recipe, count, own="qwha", other="lora") == math.floor(lora * count + 1e-9)
        assert numbers_at_same_bytes(recipe, count, own="lora", other="qwha") == math.floor(sparse * count + 1e-9)
        for kind in ("qwha", "lora"):
            assert numbers_at_same_bytes(recipe, count, own=kind, other=kind) == count
