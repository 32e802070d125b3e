"""Teaches transformers to load our folders: `AutoModelForCausalLM.from_pretrained(folder)` works after `register()`.

The folder's config names the quantized modules and their format. Their linears become QuantizedLinear on the meta device before
the files are read, so a dense weight is never made; afterwards the fingerprint is compared, because transformers fills what is
missing with noise and only warns. transformers knows a method by the string in `quant_method`: there is no enum to extend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwha_cli.errors import ArtifactError
from qwha_cli.kernels.hadamard import plan
from qwha_cli.quant.embedding import Vocabulary, put_vocabulary
from qwha_cli.quant.fingerprint import PackedLayer, base_name, combined, fingerprint, packed_modules
from qwha_cli.quant.linear import QuantizedLinear
from qwha_cli.quant.packed import QuantFormat
from qwha_cli.quant.swap import replace

METHOD = "qwha"
_PLACE = "config.json quantization_config"
_REMEDY = "take the folder as `qwha quantize` wrote it, or quantize the model again"


class QwhaQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` in config.json; its fields are plain JSON values.

    Args:
        method: The quantizer that chose the codes.
        bits: Bits a code.
        group_size: Inputs of a row that share scale and zero.
        sym: Whether the zero point is fixed in the middle.
        basis: What the codes stand for.
        zero_bits: Bits of a stored zero point; None as many as the codes.
        checkpoint_format: Layout of the tensors: `gptq_v2`, `bitsandbytes` for nf4, or `qwha`: gptq_v2 with something that its
            readers do not know, fine zero points or a vocabulary in codes.
        modules: Full names of the quantized linears of the blocks.
        fingerprint: SHA-256 over all packed tensors.
        hadamard: Input size (as text) to digest of its Hadamard matrix; empty in the weight basis.
        vocabulary: Which modules are embedding and head in codes, and their format, see `Vocabulary`; None for neither.
        **unknown: Fields of other versions, ignored.
    """

    def __init__(
        self,
        method: str | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        basis: str | None = None,
        zero_bits: int | None = None,
        checkpoint_format: str | None = None,
        modules: list[str] | None = None,
        fingerprint: str | None = None,
        hadamard: dict[str, str] | None = None,
        vocabulary: dict[str, object] | None = None,
        **unknown: object,
    ) -> None:
        # transformers annotates an enum of its own methods, but compares strings
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.method = method
        self.bits = bits
        self.group_size = group_size
        self.sym = sym
        self.basis = basis
        self.zero_bits = zero_bits
        self.checkpoint_format = checkpoint_format
        self.modules = list(modules or [])
        self.fingerprint = fingerprint
        self.hadamard = dict(hadamard or {})
        self.vocabulary = vocabulary

    @classmethod
    def describing(
        cls,
        layers: Mapping[str, PackedLayer],
        format: QuantFormat,
        *,
        vocabulary: Vocabulary | None = None,
        words: Mapping[str, str] | None = None,
    ) -> QwhaQuantizationConfig:
        """The config of a model with these quantized layers, by full name, all of one format.

        Args:
            layers: The linears of the blocks.
            format: Theirs.
            vocabulary: Embedding and head, where they are in codes.
            words: Digests of the modules that are `vocabulary.owners`.

        Raises:
            ModelError: No layer is quantized.
        """
        sizes = {layer.in_features for layer in layers.values()} if format.basis == "hadamard" else set[int]()
        return cls(
            method=format.method,
            bits=format.bits,
            group_size=format.group_size,
            sym=format.symmetric,
            basis=format.basis,
            zero_bits=format.zero_bits,
            checkpoint_format=checkpoint_format(format, vocabulary=vocabulary is not None),
            modules=sorted(layers),
            fingerprint=combined({base_name(name): layer.digest for name, layer in layers.items()} | dict(words or {})),
            hadamard={str(size): plan(size).digest for size in sorted(sizes)},
            vocabulary=None if vocabulary is None else vocabulary.to_dict(),
        )

    @property
    def format(self) -> QuantFormat:
        """The storage format of all quantized layers.

        Raises:
            ArtifactError: A field is missing, or this version cannot read its value.
        """
        names = {
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.sym,
            "basis": self.basis,
            "zero_bits": self.zero_bits,
        }
        return QuantFormat.from_dict(names)

    def prepare(self, model: PreTrainedModel) -> None:
        """Put empty modules on the meta device into a skeleton, wherever the model has codes.

        Raises:
            ArtifactError: It is the skeleton of another model, or a field is missing.
            ModelError: A layer's inputs are no whole number of groups.
        """
        put_quantized_layers(model, self.modules, format=self.format)
        if self.vocabulary is not None:
            put_vocabulary(model, Vocabulary.from_dict(self.vocabulary))

    def check_hadamard(self) -> None:
        """Refuse codes that were made with other Hadamard matrices than this version constructs.

        Raises:
            ArtifactError: A digest differs; the message shows both.
        """
        for size, digest in self.hadamard.items():
            if plan(int(size)).digest != digest:
                raise ArtifactError(
                    f"the codes were made with a Hadamard matrix of size {size} whose digest is {digest}, "
                    f"this version's is {plan(int(size)).digest}",
                    where=_PLACE,
                    remedy="load it with the version of qwha that made it, or quantize the model again",
                )


class QwhaQuantizer(HfQuantizer):
    """Prepares the skeleton for packed tensors, and checks what transformers put into it."""

    requires_calibration = True  # so transformers refuses to make one of our configs out of thin air

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Check the Hadamard matrices; here, because the later steps run where every new tensor is on the meta device."""
        cast(QwhaQuantizationConfig, self.quantization_config).check_hadamard()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:  # noqa: ANN401
        config = cast(QwhaQuantizationConfig, self.quantization_config)
        config.prepare(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:  # noqa: ANN401
        config = cast(QwhaQuantizationConfig, self.quantization_config)
        layers = packed_modules(model).values()
        if any(buffer.is_meta for layer in layers for buffer in layer.buffers()):
            return model  # offloaded to disk: nothing here to be read
        found = fingerprint(model)
        if found != config.fingerprint:
            raise ArtifactError(
                f"the packed tensors are incomplete or damaged: their fingerprint is {found}, "
                f"the config says {config.fingerprint}",
                where=_PLACE,
                remedy=_REMEDY,
            )
        return model

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - the base has a body of `...`
        """Adapters on it can be trained."""
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - likewise
        """The state dict is the checkpoint."""
        return True


def checkpoint_format(format: QuantFormat, *, vocabulary: bool = False) -> str:
    """What other packages would call the tensors; `qwha` where they would read them wrongly, or not find what they look for.

    Args:
        format: Of the linear layers.
        vocabulary: Whether embedding and head are in codes, which no other package expects.
    """
    if vocabulary:
        return METHOD
    if format.layout == "nf4":
        return "bitsandbytes"
    return "gptq_v2" if format.zero_bits == format.bits else "qwha"


def put_quantized_layers(model: nn.Module, names: list[str], *, format: QuantFormat) -> None:
    """Replace linears by empty QuantizedLinear layers on the meta device.

    Args:
        model: A skeleton or a whole model; changed in place.
        names: Full names of nn.Linear modules.
        format: Of all of them.

    Raises:
        ArtifactError: No name at all, or one that is not an nn.Linear of this model.
        ModelError: A layer's inputs are no whole number of groups.
    """
    if not names:
        raise ArtifactError("no quantized module is named", where=f"{_PLACE}.modules", remedy=_REMEDY)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        linear = linears.get(name)
        if linear is None:
            raise ArtifactError(
                f"{name} is no linear layer of a {type(model).__name__}",
                where=f"{_PLACE}.modules",
                remedy="load it with AutoModelForCausalLM, the class that it was saved from",
            )
        layer = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            bias=cast("nn.Parameter | None", linear.bias) is not None,
            format=format,
            device="meta",
            dtype=linear.weight.dtype,
        )
        replace(model, name, layer)


def register() -> None:
    """Make the method known to transformers; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QwhaQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QwhaQuantizer)
