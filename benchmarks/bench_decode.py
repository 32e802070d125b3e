"""Tokens a second of generation with one sequence: a dense bfloat16 model and packed codes with adapters, in the same loop.

    python benchmarks/bench_decode.py --shape llama-3.2-3b --embedding-bits 16,8 --out decode.jsonl
    python benchmarks/bench_decode.py --shape tiny-llama --device cpu --group 16 --rank 2 --prompt 6 --new 8

Weights and codes are random: speed and memory do not depend on them. Adapters are as the product loads them for generation:
frozen, values in bfloat16. With --embedding-bits 8 embedding and head are codes too. The loop is greedy, on a static cache, and
never waits for the device between tokens; a step is launched from Python, or replayed as a CUDA graph, which must give the same
tokens. `ms` and `tokens_s` are of the new tokens without the prompt; `gib` is the most memory that generation took, model and
cache included.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shape_models import dense_model, quantized_model, with_sparse_adapter
from torch import Tensor, nn
from transformers import StaticCache

from qwha_cli.models.random import CONFIGS


class Decoder:
    """Greedy generation of one sequence.

    Args:
        model: A causal language model.
        prompt: (1, tokens), where generation starts.
        new: How many tokens to generate.
        graph: Whether a step is replayed as a CUDA graph.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, new: int, *, graph: bool) -> None:
        self.model, self.prompt, self.new = model, prompt, new
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new)
        self.last = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self.step: Callable[[], None] = self._step
        if graph:
            self._start()
            # libraries take their workspaces at the first calls
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            # the length of the cache is a tensor too, so a replay goes on where the last one ended
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                self._step()
            self.step = self.captured.replay

    def tokens(self) -> tuple[list[int], float]:
        """The new tokens, and the seconds that all but the first took."""
        self._start()
        found = [self.last.clone()]
        began = self._now()
        for _ in range(self.new - 1):
            self.step()
            found.append(self.last.clone())
        taken = self._now() - began
        return torch.cat(found).flatten().tolist(), taken

    def _start(self) -> None:
        self.cache.reset()
        logits = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.last.copy_(logits[:, -1:].argmax(dim=-1))

    def _step(self) -> None:
        logits = self.model(self.last, past_key_values=self.cache, use_cache=True).logits
        self.last.copy_(logits.argmax(dim=-1))

    def _now(self) -> float:
        if self.prompt.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def build(form: str, embedding_bits: int, a: argparse.Namespace) -> nn.Module:
    """A dense model, or one of packed codes in the Hadamard basis under the product's own layers."""
    if form == "bf16":
        return dense_model(a.shape, device=a.device).eval()
    how = {"group": a.group, "basis": "hadamard", "device": a.device}
    model = quantized_model(a.shape, bits=int(form), embedding_bits=embedding_bits, **how)  # pyright: ignore
    if a.no_adapter:
        return model.eval()
    return with_sparse_adapter(model, rank=a.rank, device=a.device, frozen=True).eval().requires_grad_(False)


def rows(a: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A line for every model and way to launch a step."""
    cuda = a.device == "cuda"
    for form, embedding_bits in (("bf16", 16), *itertools.product(a.formats, a.embedding_bits)):
        model = build(form, embedding_bits, a)
        gc.collect()
        prompt = torch.arange(1, a.prompt + 1, device=a.device)[None]
        told: list[int] | None = None
        for graph in (False, True) if cuda else (False,):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if cuda else 0
            decoder = Decoder(model, prompt, a.new, graph=graph)
            tokens, _ = decoder.tokens()
            # launched from Python it takes ten times as long, and varies less than the difference
            taken = statistics.median(decoder.tokens()[1] for _ in range(a.repeats if graph else 1))
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            agrees = told is None or told == tokens
            told = tokens
            line: dict[str, object] = {"shape": a.shape, "weights": form, "adapter": form != "bf16" and not a.no_adapter}
            line |= {"embedding_bits": embedding_bits}
            line |= {"graph": graph, "tokens_s": (a.new - 1) / taken, "ms": 1e3 * taken / (a.new - 1)}
            line |= {"model_gib": held / 2**30, "gib": peak / 2**30, "same_tokens": agrees, "distinct": len(set(tokens))}
            yield line
            assert agrees, "a graph's tokens are not those of the same steps launched one by one"
            del decoder
        del model


def vocabulary_bits(text: str) -> list[int]:
    """16 or 8, or both."""
    found = [int(part) for part in text.split(",")]
    if not {*found} <= {16, 8}:
        raise argparse.ArgumentTypeError(f"embeddings have 16 or 8 bits, not {text}")
    return found


def main() -> None:
    """Parse, run, write a JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-3b", choices=[name for name in CONFIGS if "llama" in name])
    parser.add_argument("--formats", default=["2"], type=lambda text: text.split(","), help="bits of codes: 2, 3, 4, 8")
    parser.add_argument("--embedding-bits", default=[16], type=vocabulary_bits, help="of embedding and head beside codes: 16, 8")
    parser.add_argument("--rank", type=int, default=64, help="the adapter has as many numbers as a LoRA of that rank")
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.device == "cuda":
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    with torch.inference_mode():
        for line in rows(a):
            text = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})
            print(text, flush=True)
            if a.out is not None:
                with a.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
