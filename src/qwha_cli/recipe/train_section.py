"""The recipe's sections from training on: train, eval, merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qwha_cli.catalog import DATASETS, TEXTS
from qwha_cli.recipe.section import (
    Count,
    Fault,
    Fraction,
    NotNegative,
    Positive,
    Section,
    Text,
    as_mapping,
    as_tuple,
    name_from,
    split_without,
)

Row = Literal["16-bit", "base", "init", "trained", "merged"]
DatasetName = Annotated[Text, name_from(DATASETS, what="data format")]
# These formats describe a file; the others know where on the hub their data is.
NEEDS_PATH = ("chat", "jsonl")


class TrainDataSection(Section):
    """The examples to train on."""

    format: Annotated[DatasetName, Field(description="`alpaca`, `chat`, `gsm8k`, `jsonl` or `synthetic`.")]
    path: Annotated[Text | None, Field(description="Local file instead of the hub; relative to the current directory.")] = None
    split: Annotated[
        Text,
        split_without("test", because="training on it would make every score worthless"),
        Field(description="Split to take; a split named test is refused."),
    ] = "train"
    limit: Annotated[Count | None, Field(description="Take only so many examples.")] = None
    mask_prompt: Annotated[bool, Field(description="Learn the answers only, not the prompts.")] = True

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the training data."""
        if self.format in NEEDS_PATH and self.path is None:
            yield Fault(("path",), f"format {self.format} needs the file to read", "set train.data.path")


class ValidationSection(Section):
    """A part of the training examples kept for watching; never test data."""

    examples: Annotated[Count, Field(description="Examples set aside from training.")]
    every: Annotated[Count, Field(description="Optimizer steps between validations.")]


class TrainSection(Section):
    """The training loop. Exactly one of `epochs` and `steps`."""

    data: Annotated[
        TrainDataSection, as_mapping("format"), Field(description="A format's name alone is short for `{format: NAME}`.")
    ]
    epochs: Annotated[Positive | None, Field(description="Passes over the data; may be a fraction.")] = None
    steps: Annotated[Count | None, Field(description="Optimizer steps.")] = None
    batch_size: Annotated[Count, Field(description="Sequences per forward, over all devices together.")] = 16
    accumulation: Annotated[Count, Field(description="Forwards per optimizer step.")] = 1
    max_length: Annotated[Count, Field(description="Tokens at which a sequence is cut.")] = 512
    packing: Annotated[bool, Field(description="Put several examples into a sequence, isolated from one another.")] = False
    lr: Annotated[Positive, Field(description="Peak learning rate.")]
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Field(description="How the learning rate falls after the warm-up.")
    ] = "cosine"
    warmup: Annotated[Fraction, Field(description="Part of the steps in which the learning rate rises.")] = 0.03
    weight_decay: Annotated[NotNegative, Field(description="AdamW's weight decay.")] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adamw8bit"], Field(description="`adamw8bit` keeps its moments in 8 bits: a quarter of their memory.")
    ] = "adamw"
    clip: Annotated[Positive | None, Field(description="Largest norm of the gradient; null for none.")] = 1.0
    precision: Annotated[
        Literal["auto", "bf16", "fp8", "fp32"],
        Field(
            description="Arithmetic of both passes; adapter values stay float32. `fp8` is bf16 with 8-bit products in adapted "
            "layers of the Hadamard basis: large batches take seven tenths of the time on GPUs from Ada and Hopper on."
        ),
    ] = "auto"
    backend: Annotated[
        Literal["auto", "torch", "triton"],
        Field(description="Of the adapted layers' kernels: Triton's where they run (`auto`), or plain torch."),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "torch", "liger"],
        Field(
            description="Norms, activations, rotations and loss: Liger's where they run (`auto`), or transformers' own (`torch`)."
        ),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "varlen", "padded"],
        Field(
            description="Sequences end to end in one row, without padding, where that runs (`auto`), or side by side (`padded`)."
        ),
    ] = "auto"
    launch: Annotated[
        Literal["auto", "graph", "eager"],
        Field(
            description="Record the step's kernels as a CUDA graph and replay it, where that can be done (`auto`), "
            "or launch them one by one (`eager`)."
        ),
    ] = "auto"
    checkpointing: Annotated[bool, Field(description="Recompute activations in the backward: less memory, more time.")] = False
    keep: Annotated[
        Literal["auto", "memory", "block", "speed"],
        Field(
            description="`memory` makes dense weights again for each pass, `block` keeps those of a recomputed block for its "
            "backward (without `checkpointing` it is `memory`), `speed` keeps all for an optimizer step; `auto` takes the last "
            "of them for which a GPU has four times the room. Same result."
        ),
    ] = "auto"
    save_every: Annotated[Count, Field(description="Optimizer steps between checkpoints.")] = 50
    validation: Annotated[ValidationSection | None, Field(description="Watch held-out training examples; null for not.")] = None

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the training."""
        if (self.epochs is None) == (self.steps is None):
            if self.epochs is None:
                yield Fault((), "how long to train is not said", "set one of train.epochs and train.steps")
            else:
                yield Fault(("steps",), "epochs and steps are both given", "remove one")


class TaskSection(Section):
    """One task of lm-eval."""

    name: Annotated[Text, Field(description="lm-eval's name for the task.")]
    shots: Annotated[
        Annotated[int, Field(ge=0)] | None, Field(description="Solved examples in the prompt; null for the task's own.")
    ] = None
    limit: Annotated[Count | None, Field(description="Score only so many items; null for `eval.limit`.")] = None


class PerplexitySection(Section):
    """Perplexity of running text by a sliding window."""

    data: Annotated[Annotated[Text, name_from(TEXTS, what="text")], Field(description="`prose`, `text` or `wikitext2`.")]
    path: Annotated[Text | None, Field(description="Local file to read the text from; relative to the current directory.")] = None
    split: Annotated[Text, Field(description="Split to score.")] = "test"
    window: Annotated[Annotated[int, Field(ge=2)], Field(description="Tokens a window.")] = 1024
    stride: Annotated[Count, Field(description="Tokens that each window scores; the rest is context.")] = 512
    windows: Annotated[Count | None, Field(description="Score only so many windows; null for all.")] = None

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the perplexity."""
        if self.stride > self.window:
            yield Fault(("stride",), f"a stride of {self.stride} skips text between windows of {self.window}", "lower it")
        if self.data == "text" and self.path is None:
            yield Fault(("path",), "data: text needs the file to read", "set eval.perplexity.path")


class AnswersSection(Section):
    """Perplexity and exact match of answers to held-out questions."""

    format: Annotated[DatasetName, Field(description="`alpaca`, `chat`, `gsm8k`, `jsonl` or `synthetic`.")]
    path: Annotated[Text | None, Field(description="Local file instead of the hub; relative to the current directory.")] = None
    split: Annotated[
        Text,
        split_without("train", because="scores on it measure memory"),
        Field(description="Split to score; the training split is refused."),
    ] = "test"
    examples: Annotated[Count | None, Field(description="Examples scored; null for all.")] = None
    exact_match: Annotated[
        Count | None,
        Field(description="So many of the examples, at most, are also answered by greedy generation; null for none."),
    ] = None
    max_new_tokens: Annotated[Count, Field(description="Tokens at which a generated answer is cut.")] = 256

    @property
    def limit(self) -> int | None:
        """The number of examples to read, under the name it has in `train.data`."""
        return self.examples

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the scoring of answers."""
        if self.format in NEEDS_PATH and self.path is None:
            yield Fault(("path",), f"format {self.format} needs the file to read", "set eval.answers.path")


def _task(item: object) -> object:
    return {"name": item} if isinstance(item, str) else item


class EvalSection(Section):
    """What is measured, and on which states of the model."""

    tasks: Annotated[
        tuple[TaskSection, ...],
        as_tuple(_task),
        Field(description="lm-eval tasks; a name alone is short for `{name: NAME}`."),
    ] = ()
    limit: Annotated[Count | None, Field(description="Items per task; null for all.")] = None
    batch_size: Annotated[Count, Field(description="Sequences per forward.")] = 8
    rows: Annotated[
        tuple[Row, ...],
        as_tuple(),
        Field(min_length=1, description="Rows of the table: `16-bit`, `base`, `init`, `trained`, `merged`."),
    ] = ("16-bit", "base", "init", "trained", "merged")
    perplexity: Annotated[PerplexitySection | None, Field(description="Score running text; null for not.")] = None
    answers: Annotated[AnswersSection | None, Field(description="Score held-out answers; null for not.")] = None
    data: Annotated[
        dict[str, dict[str, str]],
        Field(description="Local files instead of the hub: task to split to path, e.g. `{gsm8k: {test: data/test.jsonl}}`."),
    ] = Field(default_factory=dict)

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the evaluation."""
        names = [task.name for task in self.tasks]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Fault(("tasks",), f"the task {name} stands twice", "remove one")
        if len(set(self.rows)) < len(self.rows):
            yield Fault(("rows",), "a row stands twice", "remove one")


class ToleranceSection(Section):
    """How far the merged model may be from base and adapter; beyond it the merge is refused."""

    max_logit_difference: Annotated[Positive, Field(description="Largest absolute difference of a logit.")] = 4.0
    kl: Annotated[Positive, Field(description="Mean Kullback-Leibler divergence a token, in nats.")] = 0.01


class MergeSection(Section):
    """The ordinary model folder at the end."""

    into: Annotated[Literal["bf16", "fp16", "fp32"], Field(description="Number format of the merged weights.")] = "bf16"
    tolerance: Annotated[ToleranceSection, Field(description="Above it the merge exits 1.")] = ToleranceSection()
    prompts: Annotated[Annotated[int, Field(ge=1, le=8)], Field(description="Fixed prompts that both are compared on.")] = 8
