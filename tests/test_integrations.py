"""The public promise: after one import, plain transformers and plain peft load our bases and adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qwha_cli.integrations  # noqa: F401 - the import is what is tested
from qwha_cli.adapters.build import save_adapter
from qwha_cli.adapters.spectral.config import SpectralConfig
from qwha_cli.adapters.spectral.model import spectral_layers
from qwha_cli.errors import ArtifactError
from qwha_cli.quant.checkpoint import save_base
from qwha_cli.quant.linear import QuantizedLinear
from support.adapted import fill, quantize_model
from support.tiny_model import tiny_qwen2

IDS = torch.arange(20).reshape(2, 10)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def write_run(folder: Path, basis: str, *, seed: int = 0) -> Tensor:
    """A run's 1-quantize and 3-train; returns the trained model's logits."""
    model = quantize_model(tiny_qwen2(seed), basis)
    layer = model.model.layers[0].mlp.up_proj
    save_base(model, folder / "1-quantize", tokenizer=None, format=layer.format)
    adapted = get_peft_model(model, SpectralConfig(rank=4, task_type="CAUSAL_LM", scale=0.5))
    fill(adapted)
    save_adapter(adapted, folder / "3-train", base=str(folder / "1-quantize"))
    return logits(adapted)


@pytest.fixture(scope="module", params=["weight", "hadamard"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_run(folder, request.param)


def test_plain_transformers_loads_the_base_and_plain_peft_the_adapter(run: tuple[Path, Tensor]) -> None:
    folder, expected = run
    base = AutoModelForCausalLM.from_pretrained(folder / "1-quantize")
    assert isinstance(base.model.layers[0].mlp.up_proj, QuantizedLinear)
    for low_memory in (False, True):
        model = PeftModel.from_pretrained(base, str(folder / "3-train"), low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(model), expected)
        base = model.unload()


def test_auto_peft_loads_base_and_adapter_in_one_call(run: tuple[Path, Tensor]) -> None:
    folder, expected = run
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(str(folder / "3-train"))), expected)


def test_transformers_loads_the_adapters_folder_itself(run: tuple[Path, Tensor]) -> None:
    folder, expected = run
    model = AutoModelForCausalLM.from_pretrained(str(folder / "3-train"))
    assert len(spectral_layers(model)) == 3 * 7
    assert torch.equal(logits(model), expected)


def test_transformers_adds_a_second_adapter_switches_and_saves_it(run: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = run
    model = AutoModelForCausalLM.from_pretrained(folder / "1-quantize")
    plain = logits(model)
    model.load_adapter(str(folder / "3-train"), adapter_name="one")
    model.load_adapter(str(folder / "3-train"), adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.set_adapter("one")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["entries"] == json.loads((folder / "3-train" / "adapter_config.json").read_text())["entries"]
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "1-quantize"), str(tmp_path))
    assert torch.equal(logits(reloaded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_gives_the_stored_values_whatever_the_base_has(run: tuple[Path, Tensor], dtype: torch.dtype) -> None:
    folder, _ = run
    stored = load_file(folder / "3-train" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "1-quantize", dtype=dtype)
    model.load_adapter(str(folder / "3-train"))
    for name, layer in spectral_layers(model).items():
        values, gaps = (stored[f"base_model.model.{name}.qwha_{part}"] for part in ("values", "gaps"))
        assert values.dtype == torch.bfloat16
        assert torch.equal(layer.qwha_values["default"], values)
        assert torch.equal(layer.qwha_gaps["default"], gaps)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_places_give_no_output_through_transformers_either(run: tuple[Path, Tensor], tmp_path: Path, damage: str) -> None:
    folder, _ = run
    shutil.copytree(folder / "3-train", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.qwha_gaps"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name][3] ^= 64
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder / "1-quantize")
    model.load_adapter(str(tmp_path))
    with pytest.raises(ArtifactError, match="damaged or were never loaded"):
        logits(model)


def test_a_foreign_base_is_refused_by_every_door(run: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = run
    write_run(tmp_path, "weight", seed=3)
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "1-quantize")
    with pytest.raises(ArtifactError, match="fingerprint"):
        PeftModel.from_pretrained(foreign, str(folder / "3-train"))
    with pytest.raises(ArtifactError, match="fingerprint"):
        foreign.load_adapter(str(folder / "3-train"))
    with pytest.raises(ArtifactError, match="no quantized layers"):
        PeftModel.from_pretrained(tiny_qwen2(), str(folder / "3-train"))


def test_a_merged_model_is_saved_and_loads_without_us(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    expected = write_run(folder, "hadamard")
    merged = AutoPeftModelForCausalLM.from_pretrained(str(folder / "3-train")).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.save(logits(merged), tmp_path / "logits.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
found = model(torch.arange(20).reshape(2, 10)).logits
assert torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r}))
assert not any(name.startswith("qwha") for name in sys.modules)
print("same")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "same", result.stderr


def test_importing_twice_is_harmless_and_a_fresh_process_needs_only_the_import(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torch.save(write_run(folder, "hadamard"), tmp_path / "logits.pt")
    program = f"""
import importlib, torch
import qwha_cli.integrations
importlib.reload(qwha_cli.integrations)
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(folder / "1-quantize")!r})
model = PeftModel.from_pretrained(base, {str(folder / "3-train")!r})
torch.set_num_threads(2)
assert torch.equal(model(torch.arange(20).reshape(2, 10)).logits, torch.load({str(tmp_path / "logits.pt")!r}))
print("same")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "same", result.stderr
