"""What the stages call: an adapter is added with computed entries, saved offline, loaded on its own base and on no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwha_cli.adapters.build import (
    add_adapter,
    as_stored,
    cache_weights,
    freeze_adapter,
    load_adapter,
    merged_weight,
    save_adapter,
    set_backend,
)
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.provenance import base_fingerprint, hadamard_digests
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.adapters.spectral.model import spectral_layers
from qwha_cli.errors import ArtifactError, KernelError, ModelError
from qwha_cli.kernels import effective_weight, spectral_linear
from qwha_cli.kernels.sparse_matmul import SparseRows
from support.adapted import dense_delta, fill, quantize_model, random_sparse
from support.tiny_model import tiny_llama
from support.triton import HAS_TRITON

IDS = torch.arange(22).reshape(2, 11)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def base(basis: str = "weight", seed: int = 0) -> nn.Module:
    return quantize_model(tiny_llama(seed), basis)


def entries() -> dict[str, SparseRows]:
    return {Q: random_sparse((48, 48)), DOWN: random_sparse((48, 80), seed=1, density=0.3)}


def built(model: nn.Module | None = None) -> PeftModel:
    return add_adapter(model or base(), rank=4, scale=0.5, targets=[Q, DOWN], start=entries())


@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_an_added_adapter_has_the_given_entries_and_only_they_train(basis: str) -> None:
    model = built(base(basis))
    layers = spectral_layers(model)
    assert set(layers) == {Q, DOWN}
    for name, rows in entries().items():
        found = layers[name].rows("default")
        assert all(torch.equal(getattr(found, part), getattr(rows, part)) for part in ("values", "columns", "row_starts"))
        expected = layers[name].base_layer.weight_in_weight_basis(torch.float64) + dense_delta(rows, 0.5)
        torch.testing.assert_close(merged_weight(layers[name], torch.float32).double(), expected, atol=1e-5, rtol=1e-4)
        assert merged_weight(layers[name], torch.bfloat16).dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(len(rows.values) for rows in entries().values())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("basis", ["weight", "hadamard"])
def test_what_was_saved_loads_with_the_same_bits(tmp_path: Path, basis: str, trainable: bool) -> None:
    model = built(base(basis)).eval()
    for _ in range(2):  # peft updates an existing card
        save_adapter(model, tmp_path / "adapter", base="some/base")
    assert (tmp_path / "adapter" / "README.md").read_text().count("import qwha_cli.integrations") == 1
    loaded = load_adapter(base(basis), tmp_path / "adapter", trainable=trainable)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert any(p.requires_grad for p in loaded.parameters()) == trainable
    values = {layer.qwha_values["default"].dtype for layer in spectral_layers(loaded).values()}
    assert values == {torch.float32 if trainable else torch.bfloat16}
    freeze_adapter(model)
    assert {p.dtype for name, p in model.named_parameters() if "qwha" in name} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["entries"] == {name: len(rows.values) for name, rows in entries().items()}


def test_an_adapter_saved_after_training_loads_and_trains_on(tmp_path: Path) -> None:
    model = built()
    fill(model, seed=5)
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path, trainable=True).train()
    loaded(IDS, labels=IDS).loss.backward()
    assert all(layer.qwha_values["default"].grad is not None for layer in spectral_layers(loaded).values())


@pytest.mark.parametrize("loader", ["load_adapter", "peft"])
def test_another_base_is_refused_with_both_fingerprints_and_left_untouched(tmp_path: Path, loader: str) -> None:
    save_adapter(built(), tmp_path)
    other = base(seed=1)
    before = logits(other)
    with pytest.raises(ArtifactError) as error:
        load_adapter(other, tmp_path, trainable=False) if loader == "load_adapter" else PeftModel.from_pretrained(
            other, str(tmp_path)
        )
    assert str(base_fingerprint(base())) in error.value.message
    assert str(base_fingerprint(other)) in error.value.message
    assert error.value.remedy
    assert not spectral_layers(other)
    assert torch.equal(logits(other), before)


def test_the_unquantized_original_is_refused_as_a_base(tmp_path: Path) -> None:
    save_adapter(built(), tmp_path)
    with pytest.raises(ArtifactError, match="no quantized layers"):
        load_adapter(tiny_llama(), tmp_path, trainable=False)


def test_a_second_adapter_is_checked_against_the_base_too(tmp_path: Path) -> None:
    save_adapter(built(), tmp_path / "ours")
    save_adapter(built(base(seed=1)), tmp_path / "foreign")
    model = load_adapter(base(), tmp_path / "ours", trainable=False)
    model.load_adapter(str(tmp_path / "ours"), adapter_name="twin")
    with pytest.raises(ArtifactError, match="fingerprint"):
        model.load_adapter(str(tmp_path / "foreign"), adapter_name="foreign")
    assert set(model.peft_config) == {"default", "twin"}


def test_the_fingerprint_does_not_depend_on_adapters_or_wrappers() -> None:
    plain = base()
    expected = base_fingerprint(plain)
    wrapped = built(plain)
    assert base_fingerprint(wrapped) == base_fingerprint(wrapped.get_base_model()) == expected
    assert base_fingerprint(tiny_llama()) is None


def test_another_hadamard_matrix_is_refused_with_both_digests(tmp_path: Path) -> None:
    save_adapter(built(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hadamard_digest": {**config["hadamard_digest"], "80": "0123"}}))
    with pytest.raises(ArtifactError, match="size 80 whose digest is 0123") as error:
        load_adapter(base(), tmp_path, trainable=False)
    assert hadamard_digests([80])["80"] in error.value.message


def damage(folder: Path, kind: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.{Q}.qwha_"
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
        return
    if kind == "bit":
        tensors[f"{name}gaps"][7] ^= 1
    elif kind == "skip":
        tensors[f"{name}gaps"][7] = 255
    elif kind == "outside":
        tensors[f"{name}gaps"][-1] += 100
    elif kind == "wide":
        tensors[f"{name}gaps"] = tensors[f"{name}gaps"].to(torch.int16)
    elif kind == "unrounded":
        tensors[f"{name}values"] = tensors[f"{name}values"].float()
    elif kind == "shorter":
        tensors[f"{name}values"] = tensors[f"{name}values"][:-1].clone()
    elif kind == "shorter gaps":
        tensors[f"{name}gaps"] = tensors[f"{name}gaps"][:-1].clone()
    else:
        del tensors[f"{name}{kind.removeprefix('no ')}"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no adapter_model.safetensors"),
        ("truncated", "cannot be read"),
        ("bit", f"layer {Q}: the places of adapter default are damaged"),
        ("skip", f"layer {Q}: the places of adapter default are damaged"),
        ("outside", f"layer {Q}: the places of adapter default are damaged"),
        ("wide", r"should have \(\d+,\) of U8 as qwha_gaps, the file has \(\d+,\) of I16"),
        ("unrounded", r"should have \(\d+,\) of BF16 as qwha_values, the file has \(\d+,\) of F32"),
        ("shorter", r"should have \(\d+,\) of BF16 as qwha_values, the file has \(\d+,\) of BF16"),
        ("shorter gaps", r"should have \(\d+,\) of U8 as qwha_gaps, the file has \(\d+,\) of U8"),
        ("no values", "as qwha_values, the file has none"),
        ("no gaps", "as qwha_gaps, the file has none"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    save_adapter(built(), tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(base(), tmp_path, trainable=False)


@pytest.mark.parametrize("kind", ["bit", "no gaps"])
def test_damaged_places_give_no_output_through_plain_peft_either(tmp_path: Path, kind: str) -> None:
    save_adapter(built(), tmp_path)
    damage(tmp_path, kind)
    model = PeftModel.from_pretrained(base(), str(tmp_path))
    with pytest.raises(ArtifactError, match="damaged or were never loaded"):
        logits(model)


def test_the_format_of_earlier_versions_is_refused_by_name_and_with_a_remedy(tmp_path: Path) -> None:
    save_adapter(built(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, rows in entries().items():
        del tensors[f"base_model.model.{name}.qwha_gaps"]
        tensors[f"base_model.model.{name}.qwha_values"] = rows.values
        tensors[f"base_model.model.{name}.qwha_columns"] = rows.columns.short()
        tensors[f"base_model.model.{name}.qwha_row_starts"] = rows.row_starts
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["gap_bytes"], config["store"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    doors = (
        lambda model: load_adapter(model, tmp_path, trainable=False),
        lambda model: PeftModel.from_pretrained(model, str(tmp_path)),
        lambda model: model.load_adapter(str(tmp_path)),
    )
    for door in doors:
        model = base()
        with pytest.raises(ArtifactError, match="format of an earlier version") as error:
            door(model)
        assert "qwha init" in str(error.value.remedy)
        assert not spectral_layers(model)


def test_what_is_stored_in_bfloat16_is_what_the_reloaded_adapter_has(tmp_path: Path) -> None:
    rows = {Q: SparseRows.from_mask(torch.randn(48, 48), torch.rand(48, 48) < 0.2)}
    for store in ("bfloat16", "float32"):
        save_adapter(add_adapter(base(), rank=4, scale=0.5, targets=[Q], start=rows, store=store), tmp_path / store)
        loaded = load_adapter(base(), tmp_path / store, trainable=True)
        expected = as_stored(rows[Q], store)
        assert torch.equal(spectral_layers(loaded)[Q].rows("default").values, expected.values)
        assert torch.equal(expected.values, rows[Q].values) == (store == "float32")


def test_another_methods_adapter_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), OFTConfig(target_modules=["q_proj"], oft_block_size=8)).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(ArtifactError, match="method is OFT, not QWHA or LORA"):
        load_adapter(base(), tmp_path, trainable=False)


def test_wrong_layers_are_refused_before_anything_is_changed() -> None:
    model = base()
    with pytest.raises(ModelError, match=r"layer model.layers.9.x: the model has no such module"):
        add_adapter(model, rank=4, scale=1.0, targets=["model.layers.9.x"], start={})
    with pytest.raises(ModelError, match=f"layer {Q}: no start"):
        add_adapter(model, rank=4, scale=1.0, targets=[Q], start={})
    with pytest.raises(ArtifactError, match=r"\(48, 48\) on one of \(48, 80\)"):
        add_adapter(base(), rank=4, scale=1.0, targets=[DOWN], start={DOWN: entries()[Q]})
    assert not spectral_layers(model)


def test_assigning_to_a_layer_without_adapter_is_refused() -> None:
    model = built()
    with pytest.raises(ModelError, match=r"layer model.layers.1.self_attn.q_proj: adapter default has no such layer"):
        model.base_model.assign("default", {"model.layers.1.self_attn.q_proj": entries()[Q]})


def test_settings_for_all_layers_reach_every_layer() -> None:
    model = built().eval()
    plain = logits(model)
    cache_weights(model, True)
    set_keep(model, "speed")
    assert torch.equal(logits(model), plain)
    assert all(len(layer._weights) == 1 and layer.keep == "speed" for layer in spectral_layers(model).values())
    model.zero_grad()
    model.train()(IDS, labels=IDS).loss.backward()
    speed = [layer.qwha_values["default"].grad.clone() for layer in spectral_layers(model).values()]
    model.zero_grad()
    set_keep(model, "memory")
    model(IDS, labels=IDS).loss.backward()
    memory = [layer.qwha_values["default"].grad for layer in spectral_layers(model).values()]
    assert all(torch.equal(one, other) for one, other in zip(speed, memory, strict=True))


def test_speed_builds_a_weight_once_until_its_values_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built().train()
    set_keep(model, "speed")
    made: list[object] = []
    build = effective_weight.build_weight
    for module in (effective_weight, spectral_linear):
        monkeypatch.setattr(module, "build_weight", lambda *a: made.append(a) or build(*a))
    layers = spectral_layers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # two forwards a step, and their backward passes
        model(IDS, labels=IDS).loss.backward()
    assert len(made) == len(layers)
    optimizer.step()
    model(IDS, labels=IDS).loss.backward()
    assert len(made) == 2 * len(layers)
    # a validation finds them, and leaves them where they are; a recorded pass reads them there
    where = [layer._kept(("default",), "wht", torch.float32).data_ptr() for layer in layers.values()]
    optimizer.step()
    with torch.no_grad():
        model.eval()(IDS, labels=IDS)
    model.train()(IDS, labels=IDS)
    assert len(made) == 3 * len(layers)
    assert [layer._kept(("default",), "wht", torch.float32).data_ptr() for layer in layers.values()] == where
    set_keep(model, "memory")
    assert all(len(layer._weights) == 0 for layer in layers.values())


def test_a_config_filled_for_one_model_still_serves_another() -> None:
    config = SpectralConfig(rank=2, target_modules=["q_proj"])
    for width in (48, 96):
        model = get_peft_model(tiny_llama(hidden_size=width), config)
        counts = {len(layer.qwha_values["default"]) for layer in spectral_layers(model).values()}
        assert counts == {2 * 2 * width}


def test_the_backend_reaches_every_quantized_layer_and_its_choice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built()
    assert set_backend(model, "torch", dtype=torch.float32) == ("layers' weights by torch: asked for",)
    layers = [module for module in model.modules() if hasattr(module, "backend")]
    # two adapted layers, and all that are quantized
    assert len(layers) == 2 + 3 * 7
    assert all(layer.backend == "torch" for layer in layers)
    with pytest.raises(KernelError, match="run on CUDA devices, not on cpu"):
        set_backend(model, "triton", dtype=torch.float32)
    assert all(layer.backend == "torch" for layer in layers)
    assert "by torch: Triton kernels run on CUDA devices" in set_backend(model, "auto", dtype=torch.float32)[0]
    # what would be said of sizes that its transform does not take
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if HAS_TRITON:
        weights, *transforms = set_backend(model, "auto", dtype=torch.float32)
        assert "by triton" in weights
        assert [text.partition(" by torch")[0] for text in transforms] == ["transform of 48 numbers", "transform of 80 numbers"]
