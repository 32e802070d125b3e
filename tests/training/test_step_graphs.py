"""Recorded passes: when they are chosen, and that training with them is training without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qwha_cli.adapters.build import add_adapter
from qwha_cli.adapters.keep import set_keep
from qwha_cli.adapters.spectral.places import random_rows
from qwha_cli.data.tokenize import IGNORED, Encoded
from qwha_cli.errors import UsageError
from qwha_cli.training.engine import Engine
from qwha_cli.training.gradients import FlatGradients
from qwha_cli.training.loop import train
from qwha_cli.training.settings import TrainSettings
from qwha_cli.training.step_graphs import CannotRecord, StepGraphs, choose_launch, draws_at_random
from support.tiny_model import tiny_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def frozen(**shape: object) -> nn.Module:
    return tiny_llama(**shape).requires_grad_(False)


def reason(model: nn.Module, *, device: torch.device = CUDA, flat: bool = True, sharded: bool = False) -> str:
    choice = choose_launch("auto", model=model, device=device, flat=flat, sharded=sharded)
    assert not choice.graph
    return choice.reason


def test_what_prevents_recording_is_said() -> None:
    assert "need a CUDA device" in reason(frozen(), device=CPU)
    assert "padded batches" in reason(frozen(), flat=False)
    assert "gathered" in reason(frozen(), sharded=True)
    assert "embeddings are trained" in reason(tiny_llama())
    dropping = frozen()
    dropping.add_module("drop", nn.Dropout(0.1))
    assert draws_at_random(dropping)
    assert "at random" in reason(dropping)
    asking = frozen()
    asking.config.rope_parameters = {"rope_type": "dynamic"}
    assert "longest position" in reason(asking)
    assert choose_launch("auto", model=frozen(), device=CUDA, flat=True, sharded=False).graph


def test_what_the_recipe_asks_for_is_done_or_refused() -> None:
    assert "as the recipe asks" in choose_launch("eager", model=frozen(), device=CUDA, flat=True, sharded=False).reason
    with pytest.raises(UsageError, match="CUDA graphs"):
        choose_launch("graph", model=frozen(), device=CPU, flat=True, sharded=False)


def test_gradients_lie_in_one_tensor_and_add_up() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(()))]
    flat = FlatGradients(parameters)
    where = [parameter.grad.data_ptr() for parameter in parameters]
    assert all(address % 16 == where[0] % 16 for address in where)
    for _ in range(2):
        sum((i + 1) * p.square().sum() for i, p in enumerate(parameters)).backward()
    assert [p.grad.data_ptr() for p in parameters] == where
    assert [p.grad.unique().tolist() for p in parameters] == [[4.0], [8.0], [12.0]]
    assert flat.whole.sum() == 3 * 4 + 4 * 8 + 12
    flat.zero()
    assert not any(p.grad.any() for p in parameters)
    flat.release()
    assert all(p.grad is None for p in parameters)


def adapted(keep: str) -> nn.Module:
    torch.manual_seed(0)
    model = frozen(hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    start = {}
    for name in names:
        shape = tuple(model.get_submodule(name).weight.shape)
        start[name] = random_rows(shape, entries=4 * sum(shape), seed=0, name=name)
    found = add_adapter(model, rank=4, scale=1.0, targets=names, start=start, store="float32")
    set_keep(found, keep)
    return found


def examples(count: int = 24) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        ids = torch.randint(0, 256, (4 + 5 * index % 23,), generator=generator).tolist()
        found.append(Encoded(ids, [IGNORED, *ids[1:]]))
    return found


class Watcher:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.notes: list[str] = []

    def start(self, total: int) -> None: ...

    def step(self, metrics: object) -> None:
        self.losses.append(metrics.loss)

    def validation(self, after: int, loss: float) -> None:
        self.held_out.append(loss)

    def note(self, text: str) -> None:
        self.notes.append(text)


def losses(tmp: Path, launch: str, keep: str, *, checkpointing: bool, packing: bool) -> Watcher:
    watcher = Watcher()
    settings = TrainSettings(
        lr=1e-2, pad_id=256, steps=12, batch_size=4, accumulation=2, max_length=32, packing=packing, launch=launch,
        checkpointing=checkpointing, save_every=None, validate_every=5,
    )  # fmt: skip
    train(
        adapted(keep).cuda(), examples(), encoded_validation=examples(5), settings=settings, work_dir=tmp / f"{launch}-{keep}",
        identity="x", progress=watcher, interrupted=lambda: False,
    )  # fmt: skip
    return watcher


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["memory", "block", "speed"])
@pytest.mark.parametrize(("checkpointing", "packing"), [(True, False), (False, True)])
def test_training_with_recorded_passes_is_training_without(tmp_path: Path, keep: str, checkpointing: bool, packing: bool) -> None:
    how = {"checkpointing": checkpointing, "packing": packing}
    plain = losses(tmp_path, "eager", "memory", **how)
    recorded = losses(tmp_path, "graph", keep, **how)
    assert any("CUDA graphs" in note for note in recorded.notes)
    assert plain.losses[-1] < plain.losses[0]
    torch.testing.assert_close(torch.tensor(recorded.losses), torch.tensor(plain.losses), rtol=5e-3, atol=0)
    torch.testing.assert_close(torch.tensor(recorded.held_out), torch.tensor(plain.held_out), rtol=5e-3, atol=0)


@needs_cuda
@pytest.mark.gpu
def test_a_shape_runs_as_it_is_then_is_recorded_then_replayed_and_the_oldest_is_forgotten() -> None:
    total = torch.zeros((), device=CUDA)
    calls: list[tuple[int, ...]] = []

    def passes(batch: Mapping[str, Tensor], equal: int | None) -> Tensor:
        calls.append(tuple(batch["x"].shape))
        total.add_(batch["x"].sum())
        return batch["x"].sum() * (equal or 1)

    graphs = StepGraphs(passes, device=CUDA, most=1)
    seen = [float(graphs({"x": torch.full((n,), float(k))}, None)) for k, n in enumerate([2, 2, 2, 3, 3, 2, 2], start=1)]
    assert seen == [2.0, 4.0, 6.0, 12.0, 15.0, 12.0, 14.0]
    assert float(total) == sum(seen)
    # as it is, recorded, replayed; the same of the other; then recorded again
    assert calls == [(2,), (2,), (3,), (3,), (2,)]
    assert float(graphs({"x": torch.ones(2)}, 5)) == 10.0


@needs_cuda
@pytest.mark.gpu
def test_graphs_make_way_for_a_first_run_that_would_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def passes(batch: Mapping[str, Tensor], equal: int | None) -> Tensor:
        calls.append(len(batch["x"]))
        return (batch["x"].repeat(2**20, 1) * 2).sum() / 2**20

    graphs = StepGraphs(passes, device=CUDA)
    for _ in range(3):
        assert float(graphs({"x": torch.ones(8)}, None)) == 16.0
    assert calls == [8, 8]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert float(graphs({"x": torch.ones(9)}, None)) == 18.0
    assert float(graphs({"x": torch.ones(8)}, None)) == 16.0
    assert calls == [8, 8, 9, 8]


@needs_cuda
@pytest.mark.gpu
def test_a_pass_that_waits_for_the_device_cannot_be_recorded_and_training_says_so(tmp_path: Path) -> None:
    graphs = StepGraphs(lambda batch, _: batch["x"] * float(batch["x"].sum().item()), device=CUDA)
    assert graphs({"x": torch.ones(2)}, None).tolist() == [2.0, 2.0]
    with pytest.raises(CannotRecord):
        graphs({"x": torch.ones(2)}, None)
    assert float(torch.ones(2, device=CUDA).sum()) == 2.0


@needs_cuda
@pytest.mark.gpu
def test_an_engine_whose_model_waits_for_the_device_goes_on_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = Engine._passes

    def waiting(self: Engine, batch: Mapping[str, Tensor], equal: int | None) -> Tensor:
        assert batch["input_ids"].sum().item() >= 0
        return own(self, batch, equal)

    expected = losses(tmp_path, "eager", "memory", checkpointing=False, packing=False)
    monkeypatch.setattr(Engine, "_passes", waiting)
    found = losses(tmp_path, "auto", "memory", checkpointing=False, packing=False)
    assert any("could not be recorded" in note for note in found.notes)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=5e-3, atol=0)
