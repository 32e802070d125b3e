"""The recipe's sections for the model and for what is done to it before training: model, quantize, adapter, init."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from qwha_cli.catalog import DATASETS, INITIALIZERS, LOW_RANK_INITIALIZERS, TEXTS
from qwha_cli.recipe.section import (
    Count,
    Fault,
    NotNegative,
    Positive,
    Section,
    Text,
    as_tuple,
    shaped,
    split_without,
    unknown_name,
)

# bitsandbytes' 4-bit kernels know these block sizes.
NF4_GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _calibration_source(value: str) -> str:
    known: Mapping[str, str] = {**TEXTS, **DATASETS}
    if value in known or value.endswith((".txt", ".jsonl")):
        return value
    raise unknown_name(value, {**known, "*.txt": "", "*.jsonl": ""}, what="calibration data")


class ModelSection(Section):
    """Which model, in which number format, on which device."""

    id: Annotated[
        Text, Field(description="Hub id, local folder, `.gguf` file, `builtin:NAME`, or `random:CONFIG` (random weights).")
    ]
    revision: Annotated[Text | None, Field(description="Branch, tag or commit of a hub model.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Number format of what is not quantized. `auto`: the device's best (bfloat16 on GPUs)."),
    ] = "auto"
    device: Annotated[
        str,
        shaped(r"auto|cpu|cuda(:[0-9]+)?", expected="auto, cpu, cuda or cuda:N"),
        Field(description="`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."),
    ] = "auto"


class CalibrationSection(Section):
    """The text that GPTQ, MagR and the initialisation look at; never test data."""

    data: Annotated[
        Text,
        AfterValidator(_calibration_source),
        Field(description="A text (`wikitext2`, `prose`, `text`), a training format (`gsm8k`, ...), or a `.txt`/`.jsonl` file."),
    ] = "wikitext2"
    path: Annotated[Text | None, Field(description="Local file to read the data from; relative to the current directory.")] = None
    split: Annotated[
        Text,
        split_without("test", because="calibration would leak test data into the weights"),
        Field(description="Split to take; a split named test is refused."),
    ] = "train"
    samples: Annotated[Count, Field(description="Number of sequences.")] = 128
    length: Annotated[Count, Field(description="Tokens a sequence.")] = 2048
    batch_size: Annotated[
        Count, Field(description="Sequences per forward: memory and speed, and the steps of a reconstruction.")
    ] = 8
    weighting: Annotated[
        Literal["none", "gradient"],
        Field(
            description="`gradient`: tokens count by what the loss minds of errors in them (squared gradient); `none`: all alike."
        ),
    ] = "none"

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the calibration."""
        if self.data == "text" and self.path is None:
            yield Fault(("path",), "data: text needs the file to read", "set quantize.calibration.path")


class QuantizeSection(Section):
    """How the linear layers of the decoder blocks become 2, 3 or 4 bits, and the vocabulary perhaps 8."""

    method: Annotated[Literal["gptq", "nf4", "rtn"], Field(description="Algorithm.")]
    bits: Annotated[Literal[2, 3, 4], Field(description="Bits a weight; `nf4` has 4.")]
    group_size: Annotated[
        Count, Field(description="Weights of a row that share scale and zero; must divide every layer's inputs.")
    ] = 64
    symmetric: Annotated[bool, Field(description="Grid symmetric around zero: no zero point.")] = False
    basis: Annotated[
        Literal["weight", "hadamard"],
        Field(description="What the codes stand for: `W`, or `W H` (the domain that the adapter lives in)."),
    ] = "hadamard"
    grid: Annotated[
        Literal["minmax", "search"],
        Field(description="Scales and zeros from the extremes, or from a search over shrink and zero. Not for `nf4`."),
    ] = "search"
    zeros: Annotated[
        Literal["integer", "fine"],
        Field(description="Zero points: integers as GPTQ has them, or four bits each with binary places. Not for `nf4`."),
    ] = "fine"
    damping: Annotated[Positive, Field(description="GPTQ: added to the Gram matrix's diagonal, as a part of its mean.")] = 0.1
    sweeps: Annotated[
        Annotated[int, Field(ge=0)],
        Field(description="GPTQ: sweeps of coordinate descent over codes, scales and zeros afterwards; 0 for none."),
    ] = 4
    magr: Annotated[
        Positive | None,
        Field(description="GPTQ: strength of MagR's smoothing of outliers before quantization; null for none."),
    ] = None
    reconstruct: Annotated[
        Literal["none", "scales", "full"],
        Field(
            description="What is trained afterwards, block by block, to give the 16-bit model's outputs: scales and zeros, or "
            "(`full`) the rounding too. Not for `nf4`."
        ),
    ] = "none"
    reconstruct_epochs: Annotated[Count, Field(description="Passes over the calibration text while reconstructing.")] = 4
    embedding_bits: Annotated[
        Literal[8, 16],
        Field(description="Bits a number of embedding and head: `16` leaves them as they are, `8` rounds them in groups."),
    ] = 16
    exclude: Annotated[
        tuple[str, ...], as_tuple(), Field(description="Linear layers of the blocks that stay in 16 bits, by name.")
    ] = ()
    calibration: Annotated[CalibrationSection, Field(description="The text it is measured on.")] = CalibrationSection()

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the quantization."""
        if self.magr is not None and self.method != "gptq":
            yield Fault(("magr",), f"MagR prepares weights for gptq, not for {self.method}", "set quantize.magr=null")
        if self.sweeps and self.method != "gptq" and "sweeps" in self.model_fields_set:
            yield Fault(("sweeps",), f"sweeps follow gptq, not {self.method}", "remove the key")
        if self.zeros == "fine" and self.symmetric and "zeros" in self.model_fields_set:
            yield Fault(("zeros",), "a symmetric grid has its zero in the middle", "set quantize.zeros=integer")
        if self.method != "nf4":
            return
        if self.reconstruct != "none":
            yield Fault(("reconstruct",), "nf4 has a fixed grid", "set quantize.reconstruct=none, or quantize.method=gptq")
        if self.bits != 4:
            yield Fault(("bits",), f"nf4 is a 4-bit format, not {self.bits}", "set quantize.bits=4, or quantize.method=gptq")
        for key in ("grid", "zeros"):
            if key in self.model_fields_set:
                yield Fault((key,), "nf4 has a fixed grid", "remove the key")
        if self.symmetric:
            yield Fault(("symmetric",), "nf4 has a fixed grid", "remove the key")
        if self.group_size not in NF4_GROUP_SIZES:
            sizes = ", ".join(map(str, NF4_GROUP_SIZES))
            yield Fault(("group_size",), f"nf4 has no blocks of {self.group_size}", f"one of {sizes}")


def _targets(value: object) -> object:
    if value == "all-linear":
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    # checked here, before pydantic tries both sides of the union and reports two faults for one
    message = f"expected all-linear or a list of layer names such as [q_proj, v_proj], got {value!r}"
    raise ValueError(message)


def _initializers(names: tuple[str, ...]) -> tuple[str, ...]:
    known = {**INITIALIZERS, **LOW_RANK_INITIALIZERS}
    for name in names:
        if name not in known:
            raise unknown_name(name, known, what="initializer")
    return names


class AdapterSection(Section):
    """The trainable part."""

    method: Annotated[
        Literal["qwha", "lora"],
        Field(description="`qwha`: sparse, in the Walsh-Hadamard domain; `lora`: low rank, its rival of the same size."),
    ] = "qwha"
    rank: Annotated[Count, Field(description="Budget: each layer gets rank x (inputs + outputs) trainable values.")] = 64
    scale: Annotated[Positive, Field(description="Factor on the adapter's contribution.")] = 1.0
    store: Annotated[
        Literal["bfloat16", "float32"],
        Field(description="Number format of the values on disk, rounded when a stage is done; training has float32."),
    ] = "bfloat16"
    targets: Annotated[
        Literal["all-linear"] | tuple[str, ...],
        BeforeValidator(_targets),
        Field(description="Layers that get an adapter: `all-linear` (of the decoder blocks), or a list of names."),
    ] = "all-linear"
    exclude: Annotated[tuple[str, ...], as_tuple(), Field(description="Layers that get no adapter, by name.")] = ()


class InitSection(Section):
    """Where the adapter's values stand and what they start from."""

    method: Annotated[
        Literal["pursuit", "adaalloc", "zero", "random", "cloq", "qera", "loftq"],
        Field(
            description="`pursuit`: places by what they gain; `adaalloc`: the paper's; `zero`: its places, values 0; "
            "`random`: random places, fitted values. Of a `lora`: `cloq` (least error of the outputs), `qera` (the same, inputs "
            "taken as uncorrelated), `loftq` (of the weights), `zero`."
        ),
    ] = "pursuit"
    budget: Annotated[
        Literal["per_layer", "global"],
        Field(
            description="`global`: all layers of a `qwha` share their entries by what each would take off the loss; `per_layer`: "
            "each has those of its rank."
        ),
    ] = "per_layer"
    temperature: Annotated[
        NotNegative,
        Field(description="Exponent of a row's error when the budget is shared out; 0 shares it evenly."),
    ] = 1.0
    damping: Annotated[
        Positive | None,
        Field(
            description="Added to the Gram matrix's diagonal, as a part of its mean; null: 0.1 for `pursuit`, 0.01 for `cloq`, "
            "else 1e-4."
        ),
    ] = None
    min_per_row: Annotated[Annotated[int, Field(ge=0)], Field(description="Values that each row of a `qwha` gets at least.")] = 2
    reconstruct: Annotated[
        Literal["none", "values"],
        Field(
            description="`values`: afterwards train the values of a `qwha`, block by block, to give the 16-bit model's outputs."
        ),
    ] = "none"
    reconstruct_epochs: Annotated[Count, Field(description="Passes over the calibration text while reconstructing.")] = 4
    compare: Annotated[
        tuple[str, ...],
        as_tuple(),
        AfterValidator(_initializers),
        Field(description="Other initializers to report beside the one used, on the same layers at the same bytes, by name."),
    ] = ()
    precision: Annotated[Literal["float32", "float64"], Field(description="Arithmetic of the fit (`lora`: float64).")] = "float32"
    gate: Annotated[
        bool, Field(description="Exit 1 when a layer's error after init is above the error without adapter. Off for `zero`.")
    ] = True

    def faults(self) -> Iterator[Fault]:
        """Yield what cannot stand together in the initialisation."""
        if self.method == "zero" and self.gate and "gate" in self.model_fields_set:
            yield Fault(("gate",), "a zero init has nothing to compare with a zero init", "set init.gate=false")
        if self.method == "zero" and self.reconstruct != "none":
            yield Fault(("reconstruct",), "a zero init leaves nothing to reconstruct", "set init.reconstruct=none")
